"""Tox21: twelve toxicity assays of small molecules, with labels missing (Tox21 Data Challenge 2014; MoleculeNet)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from gradstats.data.samples import SPLIT_CODES, Samples, read_npz

if TYPE_CHECKING:
    import os


def tox21(folder: str | os.PathLike[str], *, split: Literal["random", "scaffold"] = "random") -> dict[str, Samples]:
    """Training, validation and test molecules.

    Args:
        folder: Where ``tox21.npz`` is, with the arrays ``fp2048`` (uint8 ``[N, 256]``, packed bits of a Morgan
            fingerprint), ``y`` (float32 ``[N, T]``: 1 active, 0 inactive, NaN not measured), ``tasks`` (names of the
            ``T`` assays) and ``split_random``, ``split_scaffold`` (uint8 ``[N]``: 0 train, 1 valid, 2 test).
        split: Whether molecules are split at random or by scaffold, which is harder.

    Returns:
        ``{"train": ..., "valid": ..., "test": ...}``; each has ``"fingerprint"``, uint8 ``[n, 2048]`` of 0 and 1, and
        for each assay its labels, float32 ``[n]``, by name.

    Raises:
        FileNotFoundError: If the file is missing; names it.
        ValueError: If an array is missing, or ``split`` is neither of the two.
    """
    if split not in ("random", "scaffold"):
        raise ValueError(f"split: expected 'random' or 'scaffold', got {split!r}")
    arrays = read_npz(folder, "tox21.npz", ("fp2048", "y", "tasks", f"split_{split}"))
    splits = {}
    for name, code in SPLIT_CODES.items():
        rows = arrays[f"split_{split}"] == code
        labels = torch.from_numpy(arrays["y"][rows])
        splits[name] = Samples(
            {
                "fingerprint": torch.from_numpy(np.unpackbits(arrays["fp2048"][rows], axis=1)),
                **{str(task): labels[:, t].contiguous() for t, task in enumerate(arrays["tasks"])},
            }
        )
    return splits

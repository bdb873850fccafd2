"""NYUv2: indoor scenes with 13 classes of pixels and depth (Silberman et al., 2012), in small images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gradstats.data.samples import Samples, read_npz

if TYPE_CHECKING:
    import os

NUM_CLASSES = 13
IGNORED = 255
CODES_PER_METRE = 25.5
VALID_SHARE = 0.1


def nyuv2(folder: str | os.PathLike[str], *, seed: int = 0) -> dict[str, Samples]:
    """Training, validation and test images.

    The test images are the official ones; a tenth of the official training images, drawn at random, is for validation
    (our choice: there is no official validation split).

    Args:
        folder: Where ``nyuv2/train.npz`` and ``nyuv2/test.npz`` are, with the arrays ``image`` (uint8
            ``[N, H, W, 3]``), ``label13`` (uint8 ``[N, H, W]``: class 0 to 12, 255 to be ignored) and ``depth_code``
            (uint8 ``[N, H, W]``: 25.5 times the depth in metres).
        seed: Seed of the validation split.

    Returns:
        ``{"train": ..., "valid": ..., "test": ...}``; each has ``"image"``, uint8 ``[n, 3, H, W]``, ``"segmentation"``,
        uint8 ``[n, H, W]``, and ``"depth"``, float32 ``[n, H, W]`` in metres.

    Raises:
        FileNotFoundError: If a file is missing; names it.
        ValueError: If an array is missing.
    """
    train, test = (_samples(folder, f"nyuv2/{name}.npz") for name in ("train", "test"))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(train)))
    cut = round(VALID_SHARE * len(train))
    return {"train": Samples(train[order[cut:]]), "valid": Samples(train[order[:cut]]), "test": test}


def _samples(folder: str | os.PathLike[str], file: str) -> Samples:
    arrays = read_npz(folder, file, ("image", "label13", "depth_code"))
    return Samples(
        {
            "image": torch.from_numpy(np.ascontiguousarray(arrays["image"].transpose(0, 3, 1, 2))),
            "segmentation": torch.from_numpy(arrays["label13"]),
            "depth": torch.from_numpy(arrays["depth_code"]).float() / CODES_PER_METRE,
        }
    )

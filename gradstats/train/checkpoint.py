"""What makes a resumed run continue bit for bit: atomic files, random states and a check of the set-up."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from gradstats._files import written_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Fabric's checkpoint files, written so that a process that dies leaves the old file or the whole new one."""

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path`` in one move."""
        with written_atomically(path) as file:
            torch.save(checkpoint, file)


class RandomState:
    """The random states that a training process draws from: Python's, numpy's, torch's and those of its loaders.

    Args:
        device: Where the model is; the generator of a CUDA device is included.
        loaders: Data loaders, whose own generators are included; None stands for no loader.
    """

    def __init__(self, device: torch.device, loaders: Sequence[Any]) -> None:
        self._device = device
        owners = list(loaders)
        for owner in owners:  # grows on the way: a loader has a batch sampler, which has a sampler
            owners += [
                part for name in ("batch_sampler", "sampler") if (part := getattr(owner, name, None)) is not None
            ]
        found = [getattr(owner, "generator", None) for owner in owners]
        self._generators = list({id(g): g for g in found if g is not None}.values())  # shared ones once

    def get(self) -> dict[str, Any]:
        """The states, in types that ``torch.load(weights_only=True)`` accepts."""
        # numpy's global generator is the one that datasets draw from.
        name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))  # noqa: NPY002
        return {
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
            "generators": [g.get_state() for g in self._generators],
        }

    def set(self, state: Mapping[str, Any]) -> None:
        """Go back to what :meth:`get` returned."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self._device)
        for generator, generator_state in zip(self._generators, state["generators"], strict=True):
            generator.set_state(generator_state)


def check_same_setup(path: str | os.PathLike[str], saved: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that this run cannot continue, before anything is loaded from it.

    Raises:
        ValueError: If ``saved`` is None (not a trainer's checkpoint) or differs from ``own``; names the differences.
    """
    if saved is None:
        raise ValueError(f"resume: {os.fspath(path)!r} is not a checkpoint of gradstats.train.Trainer")
    differences = []
    for what, ours in own.items():
        theirs = saved.get(what)
        if theirs == ours:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):  # of many parameters name those that differ
            names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
            theirs, ours = ({name: d.get(name) for name in names[:3]} for d in (theirs, ours))
        differences.append(f"{what} {theirs} there, {ours} here")
    if differences:
        raise ValueError(f"resume: {os.fspath(path)!r} was written by a different set-up: " + "; ".join(differences))

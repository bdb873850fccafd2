"""Which faster kernels are here: loading them, choosing between them, and saying so."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators.

    Attributes:
        name: ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.
        devices: Device type that it serves; ``"any"`` for the reference.
        available: Whether it is loaded, so that the dispatcher uses it for tensors on its devices.
        detail: The library file, or why it is not available.
    """

    name: str
    devices: str
    available: bool
    detail: str


def _load(module: str) -> tuple[bool, str]:
    """Import a compiled library, whose kernels register themselves as it loads."""
    try:
        loaded = importlib.import_module(f"gradstats.{module}")
    except ImportError as error:
        return False, f"not loaded: {error}"
    return True, str(loaded.__file__)


# Kept alive for the life of the process, as the dispatcher drops what is registered with the object.
_triton_library = torch.library.Library("gradstats", "IMPL")


def _gram_by_triton(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> Tensor:
    from gradstats.ops import triton_gram  # importing Triton takes long

    return triton_gram.gram(grads, num_tasks, metric, stacked)


def _combine_by_triton(grads: Sequence[Tensor], num_tasks: int, weights: Tensor, stacked: bool) -> list[Tensor]:
    from gradstats.ops import triton_gram

    return triton_gram.combine(grads, num_tasks, weights, stacked)


def _register_triton() -> tuple[bool, str]:
    """Register the Triton kernels, which are imported and compiled when they are first used."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    _triton_library.impl("gram", _gram_by_triton, "CUDA")
    _triton_library.impl("combine", _combine_by_triton, "CUDA")
    return True, "compiled on first use"


def load_backends() -> dict[str, Backend]:
    """Load what is compiled and what ``GRADSTATS_BACKEND`` allows; called once, on import of gradstats."""
    forced = os.environ.get("GRADSTATS_BACKEND", "").strip().lower()
    if forced and forced not in NAMES:
        raise ValueError(f"environment variable GRADSTATS_BACKEND is {forced!r}; expected one of {', '.join(NAMES)}")
    found = {"reference": Backend("reference", "any", True, "plain torch, float64")}
    for name, module, usable in (("cpu", "_C", True), ("cuda", "_C_cuda", torch.version.cuda is not None)):
        if forced not in ("", name):
            loaded, detail = False, f"GRADSTATS_BACKEND={forced}"
        elif not usable:
            loaded, detail = False, "this torch is built without CUDA"
        else:
            loaded, detail = _load(module)
        found[name] = Backend(name, name, loaded, detail)
    if forced not in ("", "triton"):
        loaded, detail = False, f"GRADSTATS_BACKEND={forced}"
    elif torch.version.cuda is None:
        loaded, detail = False, "this torch is built without CUDA"
    elif found["cuda"].available:
        loaded, detail = False, "the compiled CUDA kernels are preferred"
    else:
        loaded, detail = _register_triton()
    found["triton"] = Backend("triton", "cuda", loaded, detail)
    if forced and not found[forced].available:
        raise ImportError(f"GRADSTATS_BACKEND={forced}, but that backend is {found[forced].detail}")
    return found


_loaded = load_backends()


def backends() -> dict[str, Backend]:
    """The backends by name, with whether each is loaded here and why not.

    The choice is the dispatcher's: ``"cpu"`` for tensors on the CPU; ``"cuda"`` for those on a GPU, or ``"triton"``
    where that is not compiled; else ``"reference"``. Set the environment variable ``GRADSTATS_BACKEND`` to one of the
    names before the first import to load that one (and the reference) only.
    """
    return dict(_loaded)

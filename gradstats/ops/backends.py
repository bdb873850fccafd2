"""Which faster kernels are here: loading them, choosing between them, and saying so."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

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


#: The operators that have Triton kernels, by the module that has them. Of linear layers there are no others on a GPU.
_TRITON_KERNELS = {
    "gram": "triton_gram",
    "combine": "triton_gram",
    "linear_gram": "triton_linear",
    "linear_gram_combine": "triton_linear",
}


def _triton_kernel(name: str) -> Callable[..., Any]:
    """A kernel that is imported when it is first used: importing Triton takes long."""

    @torch.no_grad()
    def kernel(*arguments: Any) -> Any:
        module = importlib.import_module(f"gradstats.ops.{_TRITON_KERNELS[name]}")
        return getattr(module, name)(*arguments)

    return kernel


def _register_triton(*, beside_cuda: bool) -> tuple[bool, str]:
    """Register the Triton kernels; beside those of the CUDA library, which are preferred, what that lacks."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    for name, module in _TRITON_KERNELS.items():
        if not beside_cuda or module == "triton_linear":
            _triton_library.impl(name, _triton_kernel(name), "CUDA")
    return True, "for linear layers; else CUDA is preferred" if beside_cuda else "compiled on first use"


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
    else:
        loaded, detail = _register_triton(beside_cuda=found["cuda"].available)
    found["triton"] = Backend("triton", "cuda", loaded, detail)
    if forced and not found[forced].available:
        raise ImportError(f"GRADSTATS_BACKEND={forced}, but that backend is {found[forced].detail}")
    return found


_loaded = load_backends()


def backends() -> dict[str, Backend]:
    """The backends by name, with whether each is loaded here and why not.

    The choice is the dispatcher's: ``"cpu"`` for tensors on the CPU; ``"cuda"`` for those on a GPU, or ``"triton"``
    where that is not compiled, and for linear layers; else ``"reference"``. Set the environment variable
    ``GRADSTATS_BACKEND`` to one of the names before the first import to load that one (and the reference) only.
    """
    return dict(_loaded)

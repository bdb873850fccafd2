"""UPGrad's and DualProj's quadratic programs, compiled.

The operator exists where the library for CPUs is loaded. It has no reference kernel: without it, and for the Gramians
that it declines, the weightings solve the same problems with :mod:`gradstats.weighting.solvers`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from gradstats.ops.backends import backends

# Kept alive for the life of the process, as the library of the operators proper.
_library = torch.library.Library("gradstats", "FRAGMENT")
_library.define("_dual_cone(Tensor gram, bool each) -> Tensor")

_available = backends()["cpu"].available


def weights(gram: NDArray[np.float64], *, each: bool) -> NDArray[np.float64] | None:
    """Project the mean gradient onto the cone of directions that conflict with no gradient.

    Args:
        gram: ``[T, T]``, with any strides.
        each: Project every gradient, and take the mean of the projections.

    Returns:
        Weights of the gradients, ``[T]``; None where nothing is compiled, a gradient is zero or not finite, or the
        Gramian is not positive semidefinite.
    """
    if not _available:
        return None
    found: NDArray[np.float64] = torch.ops.gradstats._dual_cone(torch.from_numpy(gram), each).numpy()
    return None if math.isnan(found[0]) else found

"""The operator contract: one schema, its fake kernel, and the reference kernel every device has.

Compiled libraries (see :mod:`gradstats.ops.backends`) only register faster kernels for this schema under
their own dispatch key, so the dispatcher picks the fastest one that is there for the tensors at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstats.ops import reference

#: What a gradient may be made of.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

SCHEMA = "gram(Tensor[] grads, int num_tasks, Tensor[] metric, bool stacked) -> Tensor"

# Kept alive for the life of the process: the dispatcher drops the definition with the object.
_library = torch.library.Library("gradstats", "DEF")
_library.define(SCHEMA)
_library.impl("gram", reference.gram, "CompositeExplicitAutograd")


def _gram_fake(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> Tensor:
    return grads[0].new_empty((num_tasks, num_tasks), dtype=torch.float64)


torch.library.register_fake("gradstats::gram", _gram_fake, lib=_library)


def gram(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor] = (), stacked: bool = False) -> Tensor:
    """Gramian ``J diag(metric) Jᵀ`` of the gradients of ``num_tasks`` tasks, through the dispatcher.

    This is the unchecked layer below :func:`gradstats.pairwise`, which validates and normalises its input.

    Args:
        grads: With ``stacked=False``, ``T·K`` tensors in task-major order: ``grads[t * K + k]`` is the gradient of
            task ``t`` for parameter ``k``. For each ``k`` shape and dtype agree between tasks, strides need not; a
            tensor with no entries stands for a gradient of zeros. With ``stacked=True``, ``K`` blocks of shape
            ``[T, *param_k]`` with any strides.
        num_tasks: ``T``, at least 1.
        metric: Empty, or ``K`` tensors of shape ``param_k`` with non-negative entries.
        stacked: Which of the two forms ``grads`` has.

    Returns:
        Float64 tensor ``[T, T]``, exactly symmetric, on the device of ``grads``.
    """
    result: Tensor = torch.ops.gradstats.gram(list(grads), num_tasks, list(metric), stacked)
    return result

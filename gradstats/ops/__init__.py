"""The operator contract: the schemas, their fake kernels, and the reference kernels every device has.

Compiled libraries (see :mod:`gradstats.ops.backends`) only register faster kernels for these schemas under
their own dispatch key, so the dispatcher picks the fastest one that is there for the tensors at hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats.ops import reference

DTYPES = reference.DTYPES

SCHEMAS = (
    "gram(Tensor[] grads, int num_tasks, Tensor[] metric, bool stacked) -> Tensor",
    "combine(Tensor[] grads, int num_tasks, Tensor weights, bool stacked) -> Tensor[]",
    "gram_combine(Tensor[] grads, int num_tasks, Tensor weights, Tensor[] metric, bool stacked) -> (Tensor, Tensor[])",
    "linear_gram(Tensor inputs, Tensor[] cotangents) -> Tensor",
    "linear_gram_combine(Tensor inputs, Tensor[] cotangents, Tensor weights) -> (Tensor, Tensor)",
    "_plan_gram(Tensor[] grads, int num_tasks, Tensor[] metric, bool stacked, int[] addresses) -> int",
    "_planned_gram(Tensor like, int plan) -> Tensor?",
    "_forget_plan(Tensor like, int plan) -> ()",
)


def _gram_fake(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> Tensor:
    reference.check(grads, num_tasks, metric, stacked)
    return grads[0].new_empty((num_tasks, num_tasks), dtype=torch.float64)


def _combine_fake(grads: Sequence[Tensor], num_tasks: int, weights: Tensor, stacked: bool) -> list[Tensor]:
    return [reference.empty_combination(rows) for rows in reference.rows_by_parameter(grads, num_tasks, stacked)]


def _gram_combine_fake(
    grads: Sequence[Tensor], num_tasks: int, weights: Tensor, metric: Sequence[Tensor], stacked: bool
) -> tuple[Tensor, list[Tensor]]:
    return _gram_fake(grads, num_tasks, metric, stacked), _combine_fake(grads, num_tasks, weights, stacked)


def _gram_then_combine(
    grads: Sequence[Tensor], num_tasks: int, weights: Tensor, metric: Sequence[Tensor], stacked: bool
) -> tuple[Tensor, list[Tensor]]:
    """What a backend without a fused kernel does: its own two, one after the other."""
    return gram(grads, num_tasks, metric, stacked), combine(grads, num_tasks, weights, stacked)


def _linear_gram_fake(inputs: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
    return inputs.new_empty((len(cotangents), len(cotangents)), dtype=torch.float64)


def _linear_gram_combine_fake(inputs: Tensor, cotangents: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    combined = cotangents[0].new_empty((cotangents[0].shape[1], inputs.shape[1]))
    return _linear_gram_fake(inputs, cotangents), combined


def _linear_gram_by_parts(inputs: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
    """What a backend without a kernel of its own does: form a part of the gradients at a time, for its :func:`gram`."""
    gramian = torch.zeros_like(_linear_gram_fake(inputs, cotangents))
    for block in reference.weight_gradients(inputs, cotangents):
        gramian += gram([block], len(cotangents), stacked=True)
    return gramian


def _linear_gram_combine_by_parts(
    inputs: Tensor, cotangents: Sequence[Tensor], weights: Tensor
) -> tuple[Tensor, Tensor]:
    gramian, combined = _linear_gram_combine_fake(inputs, cotangents, weights)
    gramian.zero_()
    filled = 0
    for block in reference.weight_gradients(inputs, cotangents):
        part, (combination,) = gram_combine([block], len(cotangents), weights, stacked=True)
        gramian += part
        combined[filled : filled + len(combination)] = combination
        filled += len(combination)
    return gramian, combined


def _no_plan(
    grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool, addresses: Sequence[int]
) -> int:
    """What a backend that keeps no plans does."""
    reference.check(grads, num_tasks, metric, stacked)
    return 0


# Kept alive for the life of the process: the dispatcher drops the definitions with the object.
_library = torch.library.Library("gradstats", "DEF")
for _schema in SCHEMAS:
    _library.define(_schema)
    # No result requires grad, whatever the arguments do; cheaper for small problems than a context without grad.
    _library.impl(_schema.split("(")[0], torch.library.fallthrough_kernel, "Autograd")
_KERNELS: dict[str, Callable[..., Any]] = {
    "gram": reference.gram,
    "combine": reference.combine,
    "gram_combine": _gram_then_combine,
    "linear_gram": _linear_gram_by_parts,
    "linear_gram_combine": _linear_gram_combine_by_parts,
    "_plan_gram": _no_plan,
}
for _name, _kernel in _KERNELS.items():
    _library.impl(_name, torch.no_grad()(_kernel), "CompositeExplicitAutograd")
torch.library.register_fake("gradstats::gram", _gram_fake, lib=_library)
torch.library.register_fake("gradstats::combine", _combine_fake, lib=_library)
torch.library.register_fake("gradstats::gram_combine", _gram_combine_fake, lib=_library)
torch.library.register_fake("gradstats::linear_gram", _linear_gram_fake, lib=_library)
torch.library.register_fake("gradstats::linear_gram_combine", _linear_gram_combine_fake, lib=_library)


def gram(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor] = (), stacked: bool = False) -> Tensor:
    """Gramian ``J diag(metric) Jᵀ`` of the gradients of ``num_tasks`` tasks, through the dispatcher.

    This is the layer below :func:`gradstats.pairwise`, which normalises its input and says more of what is wrong.

    Args:
        grads: With ``stacked=False``, ``T·K`` tensors in task-major order: ``grads[t * K + k]`` is the gradient of
            task ``t`` for parameter ``k``. For each ``k`` shape and dtype agree between tasks, strides need not; a
            tensor of shape ``[0]`` and any dtype stands for a gradient of zeros. With ``stacked=True``, ``K`` blocks of
            shape ``[T, *param_k]`` with any strides.
        num_tasks: ``T``, at least 1.
        metric: Empty, or ``K`` tensors of shape ``param_k`` with non-negative entries.
        stacked: Which of the two forms ``grads`` has.

    Returns:
        Float64 tensor ``[T, T]``, exactly symmetric, on the device of ``grads``.

    Raises:
        RuntimeError, TypeError, ValueError: If the tensors do not go together: every kernel tells.
    """
    result: Tensor = torch.ops.gradstats.gram(list(grads), num_tasks, list(metric), stacked)
    return result


class GramPlan:
    """:func:`gram` of tensors whose memory is used again and again: their addresses and layouts are read once.

    The tensors are kept alive, and each call compares them with what was read. A backend that keeps no plans reads them
    at each call, as does code under ``torch.compile``.

    Args:
        grads: As for :func:`gram`.
        num_tasks: ``T``, at least 1.
        metric: As for :func:`gram`.
        stacked: Which of the two forms ``grads`` has.
    """

    def __init__(self, grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> None:
        self._arguments = list(grads), num_tasks, list(metric), stacked
        addresses = list(map(Tensor.data_ptr, (*grads, *metric)))
        self._number: int = torch.ops.gradstats._plan_gram(*self._arguments, addresses)
        self._like = grads[0].new_empty(0)  # by which the backend is chosen that has the plan
        if self._number:
            weakref.finalize(self, torch.ops.gradstats._forget_plan, self._like, self._number)

    def __call__(self) -> Tensor | None:
        """What :func:`gram` gives now; None if a tensor is no longer where it was, or has another layout or dtype."""
        if not self._number or torch.compiler.is_compiling():
            return gram(*self._arguments)
        result: Tensor | None = torch.ops.gradstats._planned_gram(self._like, self._number)
        return result

    def __reduce__(self) -> tuple[type[GramPlan], tuple[list[Tensor], int, list[Tensor], bool]]:
        return GramPlan, self._arguments  # a copy, or another process, has a plan of its own


def combine(grads: Sequence[Tensor], num_tasks: int, weights: Tensor, stacked: bool = False) -> list[Tensor]:
    """Weighted sum ``Σ_t weights[t] · g_t`` of the gradients of ``num_tasks`` tasks, for each parameter.

    The sums are formed in float32 (float64 for float64 gradients) and rounded once to the gradients' dtype. A weight
    of 0 keeps nothing out: ``0 · inf`` is NaN.

    Args:
        grads: As for :func:`gram`.
        num_tasks: ``T``, at least 1.
        weights: Float64 tensor ``[T]`` on the device of ``grads``.
        stacked: Which of the two forms ``grads`` has.

    Returns:
        ``K`` new tensors of the gradients' dtypes. The ``k``-th has shape ``param_k``, and the strides that all tasks'
        gradients share where these are dense; else it is contiguous. Where no task has a gradient, it has no entries
        either: no gradient at all.
    """
    result: list[Tensor] = torch.ops.gradstats.combine(list(grads), num_tasks, weights, stacked)
    return result


def gram_combine(
    grads: Sequence[Tensor], num_tasks: int, weights: Tensor, metric: Sequence[Tensor] = (), stacked: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """The results of :func:`gram` and :func:`combine`, to the bit, from one pass over the gradients.

    Args:
        grads: As for :func:`gram`.
        num_tasks: ``T``, at least 1.
        weights: As for :func:`combine`.
        metric: As for :func:`gram`; the weighted sum is without it.
        stacked: Which of the two forms ``grads`` has.

    Returns:
        The Gramian, float64 ``[T, T]``, and the ``K`` weighted sums.
    """
    gramian, combination = torch.ops.gradstats.gram_combine(list(grads), num_tasks, weights, list(metric), stacked)
    return gramian, combination


def linear_gram(inputs: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
    """Gramian of the gradients ``cotangents[t]ᵀ inputs`` of a linear layer's weight, which are never held all at once.

    A gradient is a sum over the layer's rows, formed in float32 (float64 if an operand is float64): compiled, within
    4e-7 of the sizes of its terms for any number of rows (5e-7 by Triton, of up to 16 tasks and operands of one dtype);
    on other backends as torch multiplies matrices. Products of gradients are those of :func:`gram`.

    Args:
        inputs: What the layer multiplies, ``[N, k]`` with any strides.
        cotangents: For each of ``T`` tasks, at least one, the cotangents ``[N, o]`` at the layer's output, with any
            strides. Dtypes may differ.

    Returns:
        Float64 tensor ``[T, T]``, exactly symmetric, on the device of ``inputs``.
    """
    result: Tensor = torch.ops.gradstats.linear_gram(inputs, list(cotangents))
    return result


def linear_gram_combine(inputs: Tensor, cotangents: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """The result of :func:`linear_gram`, and ``Σ_t weights[t] · cotangents[t]ᵀ inputs`` from the same pass.

    Args:
        inputs: As for :func:`linear_gram`.
        cotangents: As for :func:`linear_gram`.
        weights: As for :func:`combine`.

    Returns:
        The Gramian, float64 ``[T, T]``, and the weighted sum, contiguous ``[o, k]`` of the first cotangents' dtype.
    """
    gramian, combined = torch.ops.gradstats.linear_gram_combine(inputs, list(cotangents), weights)
    return gramian, combined

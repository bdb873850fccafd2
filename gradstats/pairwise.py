"""Gradients in any accepted form -> :class:`~gradstats.stats.GradStats`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeVar

import torch
from torch import Tensor

from gradstats import ops
from gradstats.stats import GradStats, check_names

#: The gradient of one task: one tensor, or one per parameter with None for a parameter that it does not reach.
TaskGrads: TypeAlias = Tensor | Sequence[Tensor | None]

_Result = TypeVar("_Result")


def pairwise(
    grads: Tensor | Sequence[TaskGrads | None] | Mapping[str, TaskGrads],
    *,
    names: Sequence[str] | None = None,
    stacked: bool = False,
    metric: Tensor | Sequence[Tensor] | None = None,
) -> GradStats:
    """All pairwise dot products of task gradients, read where they lie: nothing is flattened or concatenated.

    Gradients may be float32, bfloat16, float16 or float64 (dtypes may differ between parameters), in any layout, and
    may require grad (they are treated as detached). Traces under ``torch.compile(fullgraph=True)``.

    Args:
        grads: One of

            * a tensor ``[T, ...]``, one row per task;
            * ``T`` tensors, or ``T`` sequences of ``K`` parameter gradients as ``torch.autograd.grad`` returns them
              (None stands for zeros, and so does a tensor of shape ``[0]``);
            * a mapping from task name to one of those;
            * with ``stacked=True``, ``K`` blocks ``[T, *param_k]`` (None stands for zeros).
        names: Names of the ``T`` tasks; by default the keys of a mapping, else ``"task0"``, ``"task1"``, ...
        stacked: Whether ``grads`` is a sequence of blocks with the task in the first dimension.
        metric: Positive diagonal ``d``, in the layout of one task's gradients (a tensor for the tensor forms, else
            ``K`` tensors): the result is the Gramian ``J diag(d) Jᵀ``, as with Adam's ``1 / (sqrt(v) + eps)``. A
            negative entry makes the result NaN.

    Returns:
        The statistics, with a float64 Gramian ``[T, T]`` on the device of the gradients.

    Raises:
        TypeError: If a gradient is not a tensor or None, or has an integer, complex, sparse or quantised type.
        ValueError: If there is no task or no gradient at all, tasks have different numbers of parameters, a
            parameter's shape, dtype or device differs between tasks, ``metric`` does not match the gradients, or
            ``names`` are not ``T`` different names.
    """
    grads, names = _without_names(grads, names, stacked)
    operands = _operands(grads, stacked, metric)
    task_names = check_names(names, operands.num_tasks)
    gram = _diagnosed(ops.gram, operands, grads, operands.stacked)
    present = torch.ones(operands.num_tasks, dtype=torch.bool, device=gram.device)
    return GradStats(gram=gram, names=task_names, present=present)


class PairwisePlan:
    """:func:`pairwise` for gradients whose memory is used again and again: the arguments are read and checked once.

    ``plan()`` reads the same tensors again and gives what ``pairwise`` would give then, to the bit, at a fraction of
    its cost on the host. A tensor that meanwhile lies elsewhere (``t.data = ...``) or in another way (``t.resize_``) is
    noticed; then all are read and checked anew. Other tensors need a plan of their own, so keep ``.grad`` alive with
    ``zero_grad(set_to_none=False)``.

    The plan keeps the tensors alive, and any thread may call it. Where a backend keeps no plans (Triton, reference), it
    saves little. Under ``torch.compile`` call ``pairwise``.

    Args:
        grads: As for :func:`pairwise`.
        names: As for :func:`pairwise`.
        stacked: As for :func:`pairwise`.
        metric: As for :func:`pairwise`; it is read again as well.

    Raises:
        TypeError: As for :func:`pairwise`; a call raises it, too, if what was done to a tensor is the reason.
        ValueError: Likewise.
    """

    def __init__(
        self,
        grads: Tensor | Sequence[TaskGrads | None] | Mapping[str, TaskGrads],
        *,
        names: Sequence[str] | None = None,
        stacked: bool = False,
        metric: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        self._grads, self._names = _without_names(_copied(grads), names, stacked)
        self._stacked, self._metric = stacked or isinstance(grads, Tensor), _copied(metric)
        self._planned = self._plan()

    def _plan(self) -> tuple[ops.GramPlan, tuple[str, ...], Tensor]:
        operands = _operands(self._grads, self._stacked, self._metric)
        names = check_names(self._names, operands.num_tasks)
        plan = _diagnosed(ops.GramPlan, operands, self._grads, operands.stacked)
        return plan, names, torch.ones(operands.num_tasks, dtype=torch.bool, device=operands.tensors[0].device)

    def __call__(self) -> GradStats:
        """The statistics of what the gradients hold now."""
        plan, names, present = self._planned
        gram = _diagnosed(plan, (), self._grads, self._stacked)
        if gram is None:
            self._planned = self._plan()
            return self()
        return GradStats(gram=gram, names=names, present=present)


class _Operands(NamedTuple):
    """What the operators take."""

    tensors: list[Tensor]
    num_tasks: int
    metric: list[Tensor]
    stacked: bool


def _diagnosed(call: Callable[..., _Result], operands: Sequence[Any], grads: Any, stacked: bool) -> _Result:
    """``call(*operands)``, which passes ``grads`` to an operator.

    Its kernels check their many tensors as they read them, far faster than Python could. If they refuse, it is found
    out here what is wrong with which one.
    """
    try:
        return call(*operands)
    except (RuntimeError, TypeError, ValueError) as error:
        failure = error
    (_check_blocks if stacked else _check_lists)(grads)
    raise failure


def _without_names(grads: Any, names: Sequence[str] | None, stacked: bool) -> tuple[Any, Sequence[str] | None]:
    """A mapping's values, and its keys as names."""
    if not isinstance(grads, Mapping):
        return grads, names
    if stacked:
        raise ValueError("grads: expected a sequence of blocks [T, *param] with stacked=True, got a mapping")
    if names is not None:
        raise ValueError("names: expected None where grads is a mapping, whose keys are the names")
    return list(grads.values()), check_names(list(grads), len(grads), "grads")


def _copied(value: Any) -> Any:
    """The same tensors in containers that nobody else changes."""
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_copied(entry) for entry in value]
    return value


def _operands(grads: Any, stacked: bool, metric: Any) -> _Operands:
    """What the operators take for gradients in any form. Most of what may be wrong is left to :func:`_diagnosed`."""
    return (_stacked_operands if stacked or isinstance(grads, Tensor) else _listed_operands)(grads, metric)


def _stacked_operands(grads: Any, metric: Any) -> _Operands:
    given = _as_blocks(grads)
    blocks = [block for block in given if block is not None]
    if not (blocks and isinstance(blocks[0], Tensor) and blocks[0].ndim and len(blocks[0])):
        _check_blocks(grads)
    scale = []
    if metric is not None:
        scale = _metric_operand(metric, len(given), {k: block[0] for k, block in _check_blocks(grads).items()})
    return _Operands(blocks, len(blocks[0]), scale, stacked=True)


def _listed_operands(grads: Any, metric: Any) -> _Operands:
    tasks, scale = _as_tasks(grads), []
    if metric is not None:
        models = _check_lists(grads)
        scale = _metric_operand(metric, len(tasks[0]), models)
        tasks = [[task[k] for k in models] for task in tasks]
    tensors = [grad for task in tasks for grad in task]
    if NoneType in set(map(type, tensors)):
        model = next((grad for grad in tensors if isinstance(grad, Tensor)), None)
        if model is None:
            _check_lists(grads)
        else:  # the operators take tensors alone
            missing = model.new_empty(0)
            tensors = [missing if grad is None else grad for grad in tensors]
    return _Operands(tensors, len(tasks), scale, stacked=False)


def _as_blocks(grads: object) -> list[Any]:
    return [grads] if isinstance(grads, Tensor) else _as_list(grads, "grads")


def _as_tasks(grads: object) -> list[list[Any]]:
    """For each task its list of gradients, of which all have as many."""
    given = _as_list(grads, "grads")
    tasks = [[task] if isinstance(task, Tensor) else _as_list(task, f"grads[{t}]") for t, task in enumerate(given)]
    if not tasks:
        raise ValueError("grads: expected at least one task, got none")
    num_params = len(tasks[0])
    for t, task in enumerate(tasks):
        if len(task) != num_params:
            raise ValueError(f"grads[{t}]: expected {num_params} parameter gradients as in grads[0], got {len(task)}")
    return tasks


def _check_blocks(grads: object) -> dict[int, Tensor]:
    """Check every block ``[T, *param]``; return those that are there, by position."""
    blocks = {k: _tensor(block, "grads[{}]", k) for k, block in enumerate(_as_blocks(grads)) if block is not None}
    if not blocks:
        raise ValueError("grads: expected at least one gradient, got none")
    first, model = next(iter(blocks.items()))
    for k, block in blocks.items():
        if block.ndim == 0:
            raise ValueError(f"grads[{k}]: expected a block [T, *param], got a zero-dimensional tensor")
        if block.shape[0] != model.shape[0]:
            raise ValueError(
                f"grads[{k}]: expected {model.shape[0]} tasks in the first dimension as in grads[{first}], "
                f"got shape {tuple(block.shape)}"
            )
        _check_device(block, model, "grads[{}]", k)
    if model.shape[0] == 0:
        raise ValueError(f"grads: expected at least one task, got shape {tuple(model.shape)}")
    return blocks


def _check_lists(grads: object) -> dict[int, Tensor]:
    """Check every task's every gradient; return one of each parameter that has any, by position."""
    models: dict[int, Tensor] = {}
    for k, column in enumerate(zip(*_as_tasks(grads), strict=True)):
        model = _check_parameter(column, k)
        if model is not None:
            models[k] = model
    if not models:
        raise ValueError("grads: expected at least one gradient, got none")
    first = next(iter(models.values()))
    for k, model in models.items():
        _check_device(model, first, "grads[...][{}]", k)
    return models


def _check_parameter(column: tuple[Any, ...], k: int) -> Tensor | None:
    """Check one parameter's gradients against each other; return one of them, or None where all tasks have None."""
    given = [t for t, grad in enumerate(column) if grad is not None]
    if not given:
        return None
    owner = next((t for t in given if not _is_missing(column[t])), given[0])
    model = _tensor(column[owner], "grads[{}][{}]", owner, k)
    shape, dtype, device = model.shape, model.dtype, model.device
    for t, grad in enumerate(column):
        # One quick test for each of the many tensors; what is wrong is found out when something is.
        if not _is_missing(grad) and not (
            isinstance(grad, Tensor)
            and grad.shape == shape
            and grad.dtype is dtype
            and grad.device == device
            and grad.layout is torch.strided
        ):
            _refuse(grad, model, f"grads[{t}][{k}]", f"grads[{owner}][{k}]")
    return model


def _is_missing(grad: object) -> bool:
    """Whether it stands for zeros."""
    return grad is None or (isinstance(grad, Tensor) and grad.shape == (0,))


def _refuse(value: object, model: Tensor, argument: str, other: str) -> NoReturn:
    """Raise what is wrong with a gradient that does not go with ``model``."""
    grad = _tensor(value, argument)
    if grad.shape != model.shape:
        raise ValueError(f"{argument}: expected shape {tuple(model.shape)} as in {other}, got {tuple(grad.shape)}")
    if grad.dtype != model.dtype:
        raise ValueError(f"{argument}: expected dtype {model.dtype} as in {other}, got {grad.dtype}")
    raise ValueError(f"{argument}: expected device {model.device} as in {other}, got {grad.device}")


def _metric_operand(metric: object, num_params: int, models: Mapping[int, Tensor]) -> list[Tensor]:
    """``metric`` for the parameters in ``models``, which has a tensor of each one's shape."""
    diagonal = [metric] if isinstance(metric, Tensor) else _as_list(metric, "metric")
    if len(diagonal) != num_params:
        raise ValueError(f"metric: expected {num_params} tensors, one per parameter, got {len(diagonal)}")
    kept = []
    for k, model in models.items():
        argument = f"metric[{k}]"
        entry = _tensor(diagonal[k], argument)
        if entry.shape != model.shape:
            expected = f"expected shape {tuple(model.shape)} as one task's gradient"
            raise ValueError(f"{argument}: {expected}, got {tuple(entry.shape)}")
        _check_device(entry, model, argument)
        kept.append(entry)
    return kept


def _as_list(value: object, argument: str) -> list[Any]:
    if isinstance(value, (list, tuple)):  # as nearly all are; the abstract types take long to ask
        return list(value)
    if isinstance(value, Mapping) or not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{argument}: expected a tensor or a sequence of tensors, got {type(value).__name__}")
    return list(value)


def _tensor(value: object, argument: str, *at: int) -> Tensor:
    """``value``, if it is a tensor that the operator reads; ``argument`` names it, with indices ``at`` filled in."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument.format(*at)}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{argument.format(*at)}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in ops.DTYPES:
        expected = "expected float32, bfloat16, float16 or float64"
        raise TypeError(f"{argument.format(*at)}: {expected}, got {value.dtype}")
    return value


def _check_device(value: Tensor, model: Tensor, argument: str, *at: int) -> None:
    if value.device != model.device:
        expected = f"expected device {model.device} as the other gradients"
        raise ValueError(f"{argument.format(*at)}: {expected}, got {value.device}")

"""Gradients in any accepted form -> :class:`~gradstats.stats.GradStats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from gradstats import ops
from gradstats.stats import GradStats, check_names

#: The gradient of one task: one tensor, or one per parameter with None for a parameter that it does not reach.
TaskGrads: TypeAlias = Tensor | Sequence[Tensor | None]


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
              (None stands for zeros);
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
    if isinstance(grads, Mapping):
        if stacked:
            raise ValueError("grads: expected a sequence of blocks [T, *param] with stacked=True, got a mapping")
        if names is not None:
            raise ValueError("names: expected None where grads is a mapping, whose keys are the names")
        names, grads = check_names(list(grads), len(grads), "grads"), list(grads.values())
    if stacked or isinstance(grads, Tensor):
        tensors, num_tasks, scale = _stacked_operands(grads, metric)
        stacked = True
    else:
        tensors, num_tasks, scale = _listed_operands(grads, metric)
    task_names = check_names(names, num_tasks)
    with torch.no_grad():
        gram = ops.gram(tensors, num_tasks, scale, stacked)
    present = torch.ones(num_tasks, dtype=torch.bool, device=gram.device)
    return GradStats(gram=gram, names=task_names, present=present)


def _stacked_operands(grads: object, metric: object) -> tuple[list[Tensor], int, list[Tensor]]:
    """The operator's tensors, number of tasks and metric for blocks ``[T, *param]``."""
    given = [grads] if isinstance(grads, Tensor) else _as_list(grads, "grads")
    blocks = {k: _tensor(block, "grads[{}]", k) for k, block in enumerate(given) if block is not None}
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
    num_tasks = model.shape[0]
    if num_tasks == 0:
        raise ValueError(f"grads: expected at least one task, got shape {tuple(model.shape)}")
    scale = [] if metric is None else _metric_operand(metric, len(given), {k: b[0] for k, b in blocks.items()})
    return list(blocks.values()), num_tasks, scale


def _listed_operands(grads: object, metric: object) -> tuple[list[Tensor], int, list[Tensor]]:
    """The operator's tensors, number of tasks and metric for ``T`` tensors or ``T`` lists of tensors."""
    given = _as_list(grads, "grads")
    tasks = [[task] if isinstance(task, Tensor) else _as_list(task, f"grads[{t}]") for t, task in enumerate(given)]
    if not tasks:
        raise ValueError("grads: expected at least one task, got none")
    num_params = len(tasks[0])
    for t, task in enumerate(tasks):
        if len(task) != num_params:
            raise ValueError(f"grads[{t}]: expected {num_params} parameter gradients as in grads[0], got {len(task)}")
    models: dict[int, Tensor] = {}
    for k, column in enumerate(zip(*tasks, strict=True)):
        model = _check_parameter(column, k)
        if model is not None:
            models[k] = model
    if not models:
        raise ValueError("grads: expected at least one gradient, got none")
    first = next(iter(models.values()))
    for k, model in models.items():
        _check_device(model, first, "grads[...][{}]", k)
    scale = [] if metric is None else _metric_operand(metric, num_params, models)
    # An empty tensor stands for a gradient of zeros in the operator, whose schema takes tensors alone.
    tensors = [task[k] for task in tasks for k in models]
    if any(tensor is None for tensor in tensors):
        missing = {k: model.new_empty(0) for k, model in models.items()}
        tensors = [missing[k] if task[k] is None else task[k] for task in tasks for k in models]
    return tensors, len(tasks), scale


def _check_parameter(column: tuple[Any, ...], k: int) -> Tensor | None:
    """Check one parameter's gradients against each other; return one of them, or None where all tasks have None."""
    owner = next((t for t, grad in enumerate(column) if grad is not None), None)
    if owner is None:
        return None
    model = _tensor(column[owner], "grads[{}][{}]", owner, k)
    shape, dtype, device = model.shape, model.dtype, model.device
    for t, grad in enumerate(column):
        # One quick test for each of the many tensors; what is wrong is found out when something is.
        if grad is not None and not (
            isinstance(grad, Tensor)
            and grad.shape == shape
            and grad.dtype is dtype
            and grad.device == device
            and grad.layout is torch.strided
        ):
            _refuse(grad, model, f"grads[{t}][{k}]", f"grads[{owner}][{k}]")
    return model


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

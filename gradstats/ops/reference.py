"""The reference backend: the operators in plain torch, on any device; the Gramian in float64.

It is the oracle that the compiled backends are tested against and what runs where none is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

#: What a gradient may be made of.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Entries of one float64 working block (32 MiB): bounds the extra memory whatever the size of a parameter.
_BLOCK_ENTRIES = 1 << 22


def gram(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> Tensor:
    """Kernel of ``gradstats::gram``; the arguments are described at :func:`gradstats.ops.gram`."""
    check(grads, num_tasks, metric, stacked)
    total = torch.zeros((num_tasks, num_tasks), dtype=torch.float64, device=grads[0].device)
    for k, parameter in enumerate(rows_by_parameter(grads, num_tasks, stacked)):
        rows = [row.reshape(-1) for row in parameter]
        size = max(row.numel() for row in rows)
        scale = metric[k].reshape(-1) if metric else None
        step = max(1, _BLOCK_ENTRIES // num_tasks)
        for start in range(0, size, step):
            block = _block(rows, start, min(start + step, size))
            if scale is not None:
                block *= scale[start : start + step].double().sqrt()
            total += block @ block.T
    # A matrix product need not be symmetric to the last bit; the contract is.
    return total.triu() + total.triu(1).T


def check(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> None:
    """Raise ValueError where ``gradstats::gram`` could not read its arguments, as the other kernels do."""
    if num_tasks < 1 or not grads:
        raise ValueError("gradstats: expected at least one task and one tensor")
    device = grads[0].device
    for tensor in (*grads, *metric):
        if tensor.device != device:
            raise ValueError(f"gradstats: expected all tensors on {device}, got one on {tensor.device}")
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
            raise ValueError("gradstats: expected float32, float64, float16 or bfloat16 tensors, dense ones")
    if stacked and any(block.ndim == 0 or block.shape[0] != num_tasks for block in grads):
        raise ValueError("gradstats: expected stacked blocks of shape [num_tasks, ...]")
    if not stacked and len(grads) % num_tasks:
        raise ValueError(f"gradstats: {len(grads)} tensors are not a multiple of num_tasks = {num_tasks}")
    parameters = list(rows_by_parameter(grads, num_tasks, stacked))
    if metric and len(metric) != len(parameters):
        raise ValueError(f"gradstats: expected a metric of {len(parameters)} tensors, got {len(metric)}")
    for k, rows in enumerate(parameters):
        present = [row for row in rows if row.shape != (0,)]
        scale = metric[k : k + 1] if any(row.numel() for row in present) else []
        if any(tensor.shape != present[0].shape for tensor in (*present, *scale)):
            raise ValueError("gradstats: tensors of one parameter differ in shape")
        if any(row.dtype != present[0].dtype for row in present):
            raise ValueError("gradstats: tensors of one parameter differ in dtype")


def combine(grads: Sequence[Tensor], num_tasks: int, weights: Tensor, stacked: bool) -> list[Tensor]:
    """Kernel of ``gradstats::combine``; the arguments are described at :func:`gradstats.ops.combine`."""
    return [_combine_rows(rows, weights) for rows in rows_by_parameter(grads, num_tasks, stacked)]


def weight_gradients(inputs: Tensor, cotangents: Sequence[Tensor]) -> Iterator[Tensor]:
    """The gradients ``cotangents[t]ᵀ inputs`` of all tasks by blocks ``[T, rows, k]``, at least in float32."""
    wide = functools.reduce(torch.promote_types, (rows.dtype for rows in cotangents), inputs.dtype)
    wide = torch.promote_types(wide, torch.float32)
    inputs = inputs.to(wide)
    fan_out, fan_in = cotangents[0].shape[1], inputs.shape[1]
    step = max(1, _BLOCK_ENTRIES // max(1, len(cotangents) * fan_in))
    for start in range(0, fan_out, step):
        yield torch.stack([rows[:, start : start + step].to(wide).mT @ inputs for rows in cotangents])


def rows_by_parameter(grads: Sequence[Tensor], num_tasks: int, stacked: bool) -> Iterator[Sequence[Tensor]]:
    """For each parameter the gradients of the ``T`` tasks, each of the parameter's shape or without entries."""
    if stacked:
        for block in grads:
            yield block.unbind(0)
    else:
        num_params = len(grads) // num_tasks
        for k in range(num_params):
            yield [grads[t * num_params + k] for t in range(num_tasks)]


def empty_combination(rows: Sequence[Tensor]) -> Tensor:
    """What the weighted sum of one parameter's gradients is written to: of their layout, where they share a dense one.

    Strides along sides of length 1 mean nothing and are not compared.
    """
    present = [row for row in rows if row.numel() > 0]
    if not present:
        return rows[0].new_empty(rows[0].shape)
    first = present[0]
    # Dense strides, and only these, are those that torch gives a new tensor like it.
    layouts = [torch.empty_like(first), *present]
    if all(_same_layout(first, other) for other in layouts):
        return torch.empty_like(first)
    return first.new_empty(first.shape)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return all(s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if size != 1)


def _combine_rows(rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    result = empty_combination(rows)
    wide = torch.promote_types(result.dtype, torch.float32)
    total = torch.zeros_like(result, dtype=wide)
    for row, weight in zip(rows, weights.to(wide).unbind(), strict=True):
        total += weight * (row.to(wide) if row.numel() else 0.0)
    return result.copy_(total)


def _block(rows: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Entries ``start:stop`` of every task in float64, ``[T, stop - start]``; a missing gradient becomes zeros."""
    zeros = torch.zeros(stop - start, dtype=torch.float64, device=rows[0].device)
    return torch.stack([row[start:stop].double() if row.numel() else zeros for row in rows])

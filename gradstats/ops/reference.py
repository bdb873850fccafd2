"""The reference backend: the Gramian in plain torch operations, in float64, on any device.

It is the oracle that the compiled backends are tested against and what runs where none is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Entries of one float64 working block (32 MiB): bounds the extra memory whatever the size of a parameter.
_BLOCK_ENTRIES = 1 << 22


def gram(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> Tensor:
    """Kernel of ``gradstats::gram``; the arguments are described at :func:`gradstats.ops.gram`."""
    total = torch.zeros((num_tasks, num_tasks), dtype=torch.float64, device=grads[0].device)
    for k, rows in enumerate(_rows_by_parameter(grads, num_tasks, stacked)):
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


def _rows_by_parameter(grads: Sequence[Tensor], num_tasks: int, stacked: bool) -> Iterator[list[Tensor]]:
    """For each parameter the ``T`` task gradients as 1-d tensors in contiguous order."""
    if stacked:
        for block in grads:
            yield [row.reshape(-1) for row in block.unbind(0)]
    else:
        num_params = len(grads) // num_tasks
        for k in range(num_params):
            yield [grads[t * num_params + k].reshape(-1) for t in range(num_tasks)]


def _block(rows: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Entries ``start:stop`` of every task in float64, ``[T, stop - start]``; a missing gradient becomes zeros."""
    zeros = torch.zeros(stop - start, dtype=torch.float64, device=rows[0].device)
    return torch.stack([row[start:stop].double() if row.numel() else zeros for row in rows])

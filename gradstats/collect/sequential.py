"""One ``torch.autograd.grad`` call for each task; all gradients are stored and folded in at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstats.collect.fold import Fold
from gradstats.collect.job import Job


def collect_sequentially(job: Job, *, store_dtype: torch.dtype | None = None, retain_graph: bool) -> Fold:
    """Collect; gradients wait in ``store_dtype`` (None: their own) until all are there. ``job.weights`` is ignored."""
    rows: list[Sequence[Tensor | None]] = []
    for task, loss in enumerate(job.losses, start=1):
        grads = _gradients(loss, job.inputs, retain_graph=retain_graph or task < len(job.losses))
        rows.append([None if grad is None else grad.to(store_dtype or grad.dtype) for grad in grads])
    fold = job.new_fold()
    fold.add_rows(rows)
    return fold


def _gradients(loss: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(loss, inputs, torch.ones_like(loss), retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "a compiled model's backward overwrites what it saved and so runs only once; to let it run for every task, "
            "set torch._functorch.config.donated_buffer = False (after `import torch._functorch.config`) before the "
            "model's first step"
        ) from error

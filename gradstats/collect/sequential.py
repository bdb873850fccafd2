"""One ``torch.autograd.grad`` call for each task; all gradients are stored and folded in at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstats.collect.fold import Fold
from gradstats.collect.graph import edge_of, pull
from gradstats.collect.job import Job


def collect_sequentially(job: Job, *, store_dtype: torch.dtype | None = None, retain_graph: bool) -> Fold:
    """Collect; gradients wait in ``store_dtype`` (None: their own) until all are there. ``job.weights`` is ignored."""
    edges = [edge_of(tensor) for tensor in job.inputs]
    rows: list[Sequence[Tensor | None]] = []
    for task, loss in enumerate(job.losses, start=1):
        grads = pull(
            [edge_of(loss)], [torch.ones_like(loss)], edges, retain_graph=retain_graph or task < len(job.losses)
        )
        rows.append([None if grad is None else grad.to(store_dtype or grad.dtype) for grad in grads])
    fold = job.new_fold()
    fold.add_columns(range(len(job.inputs)), list(zip(*rows, strict=True)))
    return fold

"""One ``backward`` call for each task, for what hooks the engine and so escapes ``torch.autograd.grad`` (FSDP2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstats.collect.fold import Fold
from gradstats.collect.job import Job


def collect_with_engine(job: Job, *, retain_graph: bool) -> Fold:
    """Collect what each loss's backward leaves in ``.grad`` of the inputs, then put every leaf's ``.grad`` back.

    ``job.weights`` is ignored.

    Raises:
        ValueError: If an input is not a leaf, or no loss reaches any.
    """
    for k, tensor in enumerate(job.inputs):
        if not tensor.is_leaf:
            raise ValueError(f"inputs: expected leaf tensors with method='engine', input {k} is an activation")
    rows: list[Sequence[Tensor | None]] = []
    leaves = {id(leaf): leaf for leaf in (*job.inputs, *job.graph.leaves.values())}.values()
    saved = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for task, loss in enumerate(job.losses, start=1):
            for leaf in leaves:
                leaf.grad = None
            torch.autograd.backward(loss, torch.ones_like(loss), retain_graph=retain_graph or task < len(job.losses))
            rows.append([leaf.grad for leaf in job.inputs])
    finally:
        for leaf, grad in saved:
            leaf.grad = grad
    if all(grad is None for row in rows for grad in row):
        raise ValueError(f"inputs: no loss reaches any of the {len(job.inputs)} inputs")
    fold = job.new_fold()
    fold.add_columns(range(len(job.inputs)), list(zip(*rows, strict=True)))
    return fold

"""Summing the Gram products of single inputs into the Gramian, by group of inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstats import ops

#: Applied to every block ``[T, *shape]`` before it is folded, such as a mean over data-parallel ranks.
Reduce = Callable[[Tensor], Tensor]


class Fold:
    """A float64 accumulator ``[T, T]`` for each group of inputs.

    Args:
        num_tasks: ``T``.
        inputs: The tensors whose gradients are folded in.
        groups: For each input the name of its group.
        metric: For each input its positive diagonal; empty where there is none.
        device: Where the Gramian is kept.
        reduce: Applied to blocks before they are folded.

    Attributes:
        grams: The Gramian of each group so far.
        standard_errors: Where estimates were added, the standard error of the Gramian of each group so far.
        groups: As given.
        metric: As given.
        reduce: As given.
    """

    def __init__(
        self,
        num_tasks: int,
        inputs: Sequence[Tensor],
        groups: Sequence[str],
        metric: Sequence[Tensor],
        device: torch.device,
        reduce: Reduce | None,
    ) -> None:
        self.num_tasks = num_tasks
        self.grams = {g: torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device) for g in groups}
        self.standard_errors: dict[str, Tensor] = {}
        self.groups = groups
        self.metric = metric
        self.reduce = reduce
        self._inputs = inputs

    def add_block(self, k: int, block: Tensor) -> None:
        """Fold in the gradients ``[T, *shape]`` of input ``k``."""
        if self.reduce is not None:
            block = self.reduce(block.to(self._inputs[k].dtype))  # which autocast's gradients do not have yet
        self.add_gram(k, ops.gram([block], self.num_tasks, self._metric_of([k]), stacked=True))

    def add_row(self, k: int, task: int, grad: Tensor) -> None:
        """Fold in the gradient of input ``k``, which ``task`` alone reaches."""
        if self.reduce is not None:
            block = grad.new_zeros(self.num_tasks, *grad.shape)
            block[task] = grad
            self.add_block(k, block)
        else:
            self.add_gram(k, ops.gram([_local(grad)], 1, self._metric_of([k])), [task])

    def add_gram(self, k: int, gram: Tensor, tasks: Sequence[int] | None = None) -> None:
        """Add a Gramian of the gradients of input ``k``, ``[n, n]`` for ``n`` tasks, all if None."""
        total = self.grams[self.groups[k]]
        if tasks is None:
            total += gram.to(total.device)
        else:
            at = torch.tensor(tasks, device=total.device)
            total[at[:, None], at] += gram.to(total.device)

    def add_estimate(self, group: str, gram: Tensor, standard_error: Tensor) -> None:
        """Add an estimate of a Gramian ``[T, T]``, independent of those before, and its standard error."""
        total = self.grams[group]
        total += gram.to(total.device)
        before = self.standard_errors.get(group, torch.zeros_like(total))
        self.standard_errors[group] = torch.hypot(before, standard_error.to(total.device))

    def add_columns(
        self, members: Sequence[int], columns: Sequence[Sequence[Tensor | None]], weights: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Fold in stored gradients of the inputs ``members``: for each one per task, None for zeros.

        DTensors count in all their shards, and are not reduced.

        Returns:
            With ``weights``, float64 ``[T]``, the weighted sums ``Σ_t w_t g_t`` of the members where they come from
            the same pass over the gradients: where these are dense, whole on every rank and not reduced.
        """
        combined: dict[int, Tensor] = {}
        if self.reduce is not None:
            # One block for each input, in their order and with zeros for None, so that ranks reduce the same blocks
            # whatever their own losses reach.
            for k, column in zip(members, columns, strict=True):
                like = self._inputs[k]
                if not is_dtensor(like):
                    self.add_block(k, torch.stack([torch.zeros_like(like) if g is None else g for g in column]))
        calls: dict[tuple[Any, ...], list[tuple[int, list[Tensor]]]] = {}
        for k, column in zip(members, columns, strict=True):
            given = [grad for grad in column if grad is not None]
            # DTensors are not reduced above: what shards them (FSDP2) has averaged their gradients already.
            if given and (self.reduce is None or is_dtensor(given[0])):
                is_dense = all(grad.layout == torch.strided for grad in given)
                device, mesh, replicas = _placement(given[0])
                if mesh is not None or not is_dense:
                    given = [_local(grad) for grad in given]
                if len(given) < len(column):  # one with no entries stands for a gradient of zeros
                    present, none = iter(given), given[0].new_empty(0)
                    given = [none if grad is None else next(present) for grad in column]
                calls.setdefault((self.groups[k], is_dense, device, mesh, replicas), []).append((k, given))
        for (_, is_dense, _, mesh, replicas), found in calls.items():
            at = [k for k, _ in found]
            grads = [grads[task] for task in range(self.num_tasks) for _, grads in found]
            metric = self._metric_of(at)
            if weights is not None and is_dense and mesh is None:
                gram, sums = ops.gram_combine(grads, self.num_tasks, weights, metric)
                combined.update(zip(at, sums, strict=True))
            else:
                gram = ops.gram(grads, self.num_tasks, metric)
            if mesh is not None:
                # Every rank holds shards; shards that several ranks hold must count once.
                gram /= replicas
                for dim in range(mesh.ndim):
                    torch.distributed.all_reduce(gram, group=mesh.get_group(dim))
            self.add_gram(at[0], gram)
        return combined

    def _metric_of(self, members: Sequence[int]) -> list[Tensor]:
        return [_local(self.metric[k]) for k in members] if self.metric else []


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a ``DTensor``; does not import what defines it (a program that has one has done so)."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _placement(grad: Any) -> tuple[torch.device, Any, int]:
    """Device, mesh (None for an ordinary tensor) and the number of ranks that hold the same shard."""
    if not is_dtensor(grad):
        return grad.device, None, 1
    replicas = 1
    for dim, placement in enumerate(grad.placements):
        if placement.is_replicate():
            replicas *= grad.device_mesh.size(dim)
    return _local(grad).device, grad.device_mesh, replicas


def _local(value: Any) -> Tensor:
    """This rank's shard of a DTensor; any other tensor itself, dense."""
    local: Tensor = value.to_local() if is_dtensor(value) else value
    return local.to_dense() if local.layout != torch.strided else local

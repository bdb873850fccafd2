"""What is to be collected, checked and in normal form: the operand of every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from gradstats.collect.fold import Fold
from gradstats.collect.graph import Graph


@dataclass(frozen=True)
class Job:
    """One collection, of the ``T`` tasks that are present.

    Attributes:
        losses: For each task its loss.
        inputs: Different tensors; the Gramian is that of the gradients with respect to them.
        graph: The graph below ``losses``.
        new_fold: Makes an empty accumulator, so that a method that fails midway leaves nothing behind.
        weights: Float64 ``[T]`` if ``Σ_t w_t ∂L_t`` is to be accumulated into ``.grad`` of the leaves, else None.
    """

    losses: list[Tensor]
    inputs: list[Tensor]
    graph: Graph
    new_fold: Callable[[], Fold]
    weights: Tensor | None

    def without_weights(self) -> Job:
        """The same collection, of the Gramian alone."""
        return replace(self, weights=None)

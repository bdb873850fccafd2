"""What is to be collected, checked and in normal form: the operand of every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor
from torch.autograd.graph import Node

from gradstats.collect.fold import Fold
from gradstats.collect.graph import Edge, Graph


@dataclass(frozen=True)
class Job:
    """One collection, of the ``T`` tasks that are present.

    Attributes:
        losses: For each task its loss.
        inputs: Different tensors; the Gramian is that of the gradients with respect to them.
        graph: The graph below ``losses``.
        new_fold: Makes an empty accumulator, so that a method that fails midway leaves nothing behind.
        weights: Float64 ``[T]`` if ``Σ_t w_t ∂L_t`` is to be accumulated into ``.grad`` of the leaves, else None.
        names: Names of the inputs, if they have any.
        needs_gradients: Whether something is to be done with the gradients besides products of theirs, such as a mean
            over ranks or a metric.
    """

    losses: list[Tensor]
    inputs: list[Tensor]
    graph: Graph
    new_fold: Callable[[], Fold]
    weights: Tensor | None
    names: list[str] | None = None
    needs_gradients: bool = False

    @cached_property
    def edges(self) -> list[Edge]:
        """For each input where its gradients arrive."""
        return [self.graph.edge_of(tensor) for tensor in self.inputs]

    @cached_property
    def targets(self) -> set[Node]:
        """The nodes at which the gradients arrive that are asked for."""
        wanted = {node for node, _ in self.edges} & self.graph.children.keys()
        return wanted if self.weights is None else wanted | self.graph.leaves.keys()

    def without_weights(self) -> Job:
        """The same collection, of the Gramian alone."""
        return replace(self, weights=None)

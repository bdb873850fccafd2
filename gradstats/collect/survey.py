"""What a collection has to pass, and how large it is: the segments of a graph with their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradstats.collect.graph import Edge, Graph, metadata_of
from gradstats.collect.plan import LeafFacts, SegmentFacts
from gradstats.collect.rules import Rows, Use, uses
from gradstats.collect.segments import Segment, cut, whole

#: Nodes on whose batching nothing is lost: in thin matrix products and elementwise operations the gradients of several
#: tasks are one larger tensor. Convolutions, attention and normalisations run faster task by task.
_BATCH_WELL = {
    f"{name}Backward0"
    for names in (
        ("Addmm", "Mm", "T", "Transpose", "Permute", "View", "UnsafeView", "Expand", "Squeeze", "Unsqueeze", "Alias"),
        ("Clone", "ToCopy", "Add", "Sub", "Mul", "Div", "Neg", "Mean", "Sum"),
        ("Relu", "LeakyRelu", "Threshold", "Tanh", "Sigmoid", "Gelu", "Silu", "Elu", "Softplus"),
    )
    for name in names
}
#: What a multiply-add of a matrix product costs in 16 bits, in those of float32, as measured for bfloat16 on AMD Zen 5.
_COST_OF_16_BITS = 0.3
#: Nodes that hand their gradient on as it is, or as a view: reordered, or reshaped, and then reordered ones are copied.
_REORDERING = {"T", "Transpose", "Permute"}
_RESHAPING = {"View", "UnsafeView"}
_PASSING = {"Add", "Squeeze", "Unsqueeze", "Alias"} | _REORDERING | _RESHAPING


@dataclass(frozen=True)
class Linear:
    """A linear layer that alone uses a leaf.

    Attributes:
        leaf: The leaf.
        use: Where the layer uses it.
        rows: The way from the cotangents of its output to rows ``[N, o]``.
        inputs: What it multiplies, ``[N, k]``.
    """

    leaf: Node
    use: Use
    rows: Rows
    inputs: Tensor

    @property
    def output(self) -> Edge:
        """Where the cotangents of the layer's output arrive."""
        return self.use.node, 0


class Survey:
    """The segments above ``targets``, and their sizes.

    Args:
        graph: The graph below the losses.
        targets: The nodes whose gradients are wanted.
        inputs: What the Gramian is taken of; the leaves among them may stay factored.
        names: Their names, for people.
        may_cut: Whether to look for segments, or for linear layers; otherwise everything is one segment.

    Attributes:
        segments: Losses first.
        facts: For each segment its sizes; the order of leaves is that of ``segment.leaves``.
        linear: The leaves whose gradients may stay factored.
    """

    def __init__(
        self,
        graph: Graph,
        targets: Iterable[Node],
        inputs: Sequence[Tensor],
        names: Sequence[str] | None,
        *,
        may_cut: bool = True,
    ) -> None:
        self._graph = graph
        self._uses = uses(graph)
        self._beside = {node for found in self._uses.values() for use in found for node in use.path}
        nodes = [graph.edge_of(tensor)[0] for tensor in inputs]
        self._labels = dict(zip(nodes, names or (), strict=False))
        self.segments = cut(graph, targets) if may_cut else [whole(graph, targets)]
        segment_of = {node: segment for segment in self.segments for node in segment.nodes}
        self.linear: dict[Node, Linear] = {}
        for leaf in nodes:
            layer = self._linear_layer(leaf) if may_cut and leaf in graph.leaves else None
            # Taken where its layer is passed, which is where it would be formed.
            if layer and all(leaf in segment_of[node].leaves for node in (layer.use.node, *layer.use.path)):
                self.linear[leaf] = layer
        self.facts = self._measure()

    def form(self, leaves: Iterable[Node]) -> None:
        """Let the gradients of ``leaves`` not stay factored."""
        for leaf in leaves:
            del self.linear[leaf]
        self.facts = self._measure()

    def _linear_layer(self, leaf: Node) -> Linear | None:
        """The linear layer that is the only use of ``leaf``."""
        tensor, found = self._graph.leaves[leaf], self._uses.get(leaf, [])
        if len(found) != 1 or tensor.ndim < 2 or not tensor.numel():
            return None
        rows = found[0].rows(tensor)
        if rows is None or rows.arrange is None or rows.left is None or rows.left.ndim != 2 or not rows.left.numel():
            return None
        return Linear(leaf, found[0], rows, rows.left.detach())

    def _measure(self) -> list[SegmentFacts]:
        graph = self._graph
        entering = _entering(graph, self.segments)
        waiting = _passed_on(graph, set().union(*entering)) if self.linear else set()
        return [
            SegmentFacts(
                tasks=max((graph.reached_by[node].bit_count() for node in segment.nodes), default=1),
                nodes=len(segment.nodes),
                batches_well=i > 0 and all(node.name() in _BATCH_WELL for node in segment.nodes),
                bytes_in=sum(map(_bytes, entering[i])),
                bytes_out=sum(map(_bytes, segment.outs)),
                widest=max(self._bytes_within(segment), default=0),
                leaves=tuple(self._leaf_facts(leaf, waiting) for leaf in segment.leaves),
            )
            for i, segment in enumerate(self.segments)
        ]

    def _bytes_within(self, segment: Segment) -> Iterator[int]:
        """Of one task's gradients wherever they flow in a segment, but for those of leaves."""
        nodes: list[Any] = [node for node in segment.nodes if node not in self._beside]
        return (_size(metadata) for node in nodes for metadata in node._input_metadata)

    def _leaf_facts(self, node: Node, waiting: set[Edge]) -> LeafFacts:
        leaf, found = self._graph.leaves[node], self._uses.get(node, [])
        # A matrix or a kernel [o, ...] takes part in one product of its size for each of the rows [..., o] that its
        # layer puts out; anything else in one for each of its entries.
        rows = 1
        if leaf.ndim >= 2 and found and found[0].node.name() != "EmbeddingBackward0":
            rows = max(1, sum(_numel((use.node, 0)) for use in found) // max(1, leaf.shape[0]))
        gradient = metadata_of((node, 0))
        sizes = leaf.numel(), gradient.dtype.itemsize, rows * leaf.numel()
        facts = LeafFacts(self._labels.get(node, ""), *sizes, cost=_cost(gradient))
        if node not in self.linear:
            return facts
        num_rows, fan_in = self.linear[node].inputs.shape
        factors = (num_rows, fan_in, leaf.numel() // fan_in)
        return replace(facts, factors=factors, enters=self.linear[node].output in waiting)


def _entering(graph: Graph, segments: Sequence[Segment]) -> list[set[Edge]]:
    """For each segment the edges at which gradients enter it."""
    segment_of = {node: i for i, segment in enumerate(segments) for node in segment.nodes}
    entering: list[set[Edge]] = [set() for _ in segments]
    for edge in (*graph.roots, *(edge for segment in segments for edge in segment.outs)):
        if edge[0] in segment_of:
            entering[segment_of[edge[0]]].add(edge)
    return entering


def _passed_on(graph: Graph, entering: set[Edge]) -> set[Edge]:
    """The edges at which gradients of ``entering`` arrive as they are, so that they share its memory."""
    sources: dict[Edge, list[Node]] = {}
    for node, edges in graph.children.items():
        for edge in edges:
            sources.setdefault(edge, []).append(node)
    found, reordered = set(entering), set[Edge]()
    for node in graph.children:  # from the losses downwards
        given = (node, 0)
        for edge in graph.children[node]:
            if len(sources[edge]) == 1 and given in found and _passes_on(node, edge, given in reordered):
                found.add(edge)
                if given in reordered or _kind(node) in _REORDERING:
                    reordered.add(edge)
    return found


def _passes_on(node: Node, edge: Edge, reordered: bool) -> bool:
    """Whether ``node`` hands its gradient, which may lie in memory in another order, on to ``edge`` without a copy."""
    kind = _kind(node)
    if kind not in _PASSING or (reordered and kind in _RESHAPING) or getattr(node, "_saved_alpha", 1) != 1:
        return False
    return _numel((node, 0)) == _numel(edge) and metadata_of((node, 0)).dtype == metadata_of(edge).dtype


def _kind(node: Node) -> str:
    return node.name().removesuffix("Backward0")


def _numel(edge: Edge) -> int:
    return math.prod(metadata_of(edge).shape)


def _cost(metadata: Any) -> float:
    """Of a multiply-add, in those of float32."""
    # CPUs have instructions for products of bfloat16, but few have them for float16, and torch is slow without.
    fast = (torch.bfloat16,) if metadata.device.type == "cpu" else (torch.bfloat16, torch.float16)
    return _COST_OF_16_BITS if metadata.dtype in fast else 1.0


def _bytes(edge: Edge) -> int:
    return _size(metadata_of(edge))


def _size(metadata: Any) -> int:
    """In bytes."""
    size: int = math.prod(metadata.shape) * metadata.dtype.itemsize
    return size

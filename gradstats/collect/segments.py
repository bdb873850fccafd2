"""Cuts the graph below some losses into segments that can be passed one after the other.

Between two segments a gradient flows, for each task, into one node only. So ``torch.autograd.grad`` can be asked for
the gradients at that node, and started anew below it: nothing of one segment is needed for the next but these.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch.autograd.graph import Node

from gradstats.collect.graph import Edge, Graph, can_cross


@dataclass(frozen=True)
class Segment:
    """Nodes that are passed together.

    Attributes:
        nodes: In topological order.
        outs: The edges from here into later segments, with the tasks (as bits) whose gradients flow through each.
        leaves: For each leaf asked for that is used here the edges at which its gradients are taken: that of the leaf
            itself, or those into the nodes that lead to it alone, where a later segment uses it as well.
    """

    nodes: tuple[Node, ...]
    outs: Mapping[Edge, int] = field(default_factory=dict)
    leaves: Mapping[Node, tuple[Edge, ...]] = field(default_factory=dict)


def cut(graph: Graph, targets: Iterable[Node]) -> list[Segment]:
    """Cut what lies above ``targets`` into segments, each of which but the first uses a leaf for the last time.

    The first one holds the heads: all nodes that a single loss reaches, and shared ones as far as heads are entangled
    with them. A leaf that is used in several segments, and in one of them without a node that leads to it alone,
    keeps these together.

    Args:
        graph: The graph below the losses.
        targets: The nodes whose gradients are wanted: ``AccumulateGrad`` nodes and others.
    """
    leaves = set(targets) & graph.leaves.keys()
    order = _order(graph, graph.with_any_below(targets) - leaves)
    pieces = _split(order, _starts(graph, order))
    while True:
        segments, stuck = _connect(graph, pieces, leaves)
        if not stuck:
            break
        inside = {i for first, last in stuck for i in range(first, last)}
        pieces = _merged(pieces, [i not in inside for i in range(len(pieces))])
    ends = [i == 0 or bool(segment.leaves) for i, segment in enumerate(segments)]
    return join(graph, segments, ends)


def whole(graph: Graph, targets: Iterable[Node]) -> Segment:
    """All that lies above ``targets`` as one segment."""
    leaves = set(targets) & graph.leaves.keys()
    above = graph.with_any_below(targets) - leaves
    nodes = tuple(node for node in graph.children if node in above)
    return Segment(nodes, {}, {leaf: ((leaf, 0),) for leaf in graph.leaves if leaf in leaves})


def join(graph: Graph, segments: Sequence[Segment], ends: Sequence[bool]) -> list[Segment]:
    """The segments, joined with the next one wherever ``ends`` does not say that one ends."""
    if all(ends[:-1]):
        return list(segments)
    leaves = {leaf for segment in segments for leaf in segment.leaves}
    joined, _ = _connect(graph, _merged([list(segment.nodes) for segment in segments], ends), leaves)
    return joined


def _merged(pieces: Sequence[list[Node]], ends: Sequence[bool]) -> list[list[Node]]:
    merged: list[list[Node]] = [[]]
    for piece, end in zip(pieces, ends, strict=True):
        merged[-1].extend(piece)
        if end:
            merged.append([])
    return [piece for piece in merged if piece]


def _split(order: list[Node], starts: list[int]) -> list[list[Node]]:
    return [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)], strict=True)]


def _order(graph: Graph, nodes: set[Node]) -> list[Node]:
    """``nodes`` in a topological order: those that one loss reaches first, short branches before long ones.

    So what leads to a leaf alone, such as the transposition of a weight, stands right below what uses it.
    """
    index = {node: i for i, node in enumerate(graph.children) if node in nodes}
    height: dict[Node, int] = {}
    parents = dict.fromkeys(index, 0)
    for node in reversed(index):
        below = {child for child, _ in graph.children[node] if child in index}
        height[node] = 1 + max((height[child] for child in below), default=0)
        for child in below:
            parents[child] += 1

    def ready(node: Node) -> tuple[bool, int, int, Node]:
        return graph.is_shared(node), height[node], index[node], node

    heap = [ready(node) for node, count in parents.items() if count == 0]
    heapq.heapify(heap)
    order = []
    while heap:
        node = heapq.heappop(heap)[-1]
        order.append(node)
        for child in {child for child, _ in graph.children[node] if child in index}:
            parents[child] -= 1
            if parents[child] == 0:
                heapq.heappush(heap, ready(child))
    return order


def _starts(graph: Graph, order: list[Node]) -> list[int]:
    """The positions in ``order`` where a segment can start.

    There no task's gradients wait at two nodes, and the nodes at which they wait can be crossed. A module's backward
    hook remembers at the module's output what it needs at its input, for one task; so nothing is cut between these.
    """
    known = set(order)
    hooked = [i for i, node in enumerate(order) if node.name() == "BackwardHookFunctionBackward"]
    kept = range(hooked[0] + 1, hooked[-1] + 1) if hooked else range(0)
    starts = [0]
    waiting: dict[Node, int] = {}
    for position, node in enumerate(order):
        is_open = 0 < position not in kept and graph.is_shared(node) and _are_disjoint(waiting.values())
        if is_open and all(can_cross(graph, below) for below in waiting):
            starts.append(position)
        waiting.pop(node, None)
        for child, _ in graph.children[node]:
            if child in known:
                waiting[child] = waiting.get(child, 0) | graph.reached_by[node]
    return starts


def _are_disjoint(masks: Iterable[int]) -> bool:
    seen = 0
    for mask in masks:
        if seen & mask:
            return False
        seen |= mask
    return True


def _connect(graph: Graph, pieces: list[list[Node]], leaves: set[Node]) -> tuple[list[Segment], list[tuple[int, int]]]:
    """The segments of these nodes, and the ranges of segments that a leaf keeps together."""
    piece_of = {node: i for i, piece in enumerate(pieces) for node in piece}
    last_use: dict[Node, int] = {}
    for node, i in piece_of.items():
        last_use.update((child, i) for child, _ in graph.children[node] if child in leaves)
    chains = _chains(graph, piece_of, leaves)
    outs: list[dict[Edge, int]] = [{} for _ in pieces]
    taken: list[dict[Node, dict[Edge, None]]] = [{} for _ in pieces]
    stuck = []
    for node, i in piece_of.items():
        for edge in graph.children[node]:
            child = edge[0]
            if child in leaves:
                if last_use[child] == i:
                    taken[i].setdefault(child, {})[edge] = None
                elif node not in chains:
                    stuck.append((i, last_use[child]))
            elif child in chains and node not in chains and last_use[chains[child]] > i:
                taken[i].setdefault(chains[child], {})[edge] = None
            elif child in piece_of and piece_of[child] != i:
                outs[i][edge] = outs[i].get(edge, 0) | graph.reached_by[node]
    segments = [
        Segment(tuple(piece), out, {leaf: tuple(edges) for leaf, edges in found.items()})
        for piece, out, found in zip(pieces, outs, taken, strict=True)
    ]
    return segments, stuck


def _chains(graph: Graph, piece_of: dict[Node, int], leaves: set[Node]) -> dict[Node, Node]:
    """The nodes from which a single path within one segment leads down to a leaf, and that leaf.

    Nothing else flows into such a path but at its first node, so a gradient that arrives there can be taken.
    """
    parents: dict[Node, set[Node]] = {}
    roots = {root for root, _ in graph.roots}
    for node in piece_of:
        for child, _ in graph.children[node]:
            parents.setdefault(child, set()).add(node)
    chains: dict[Node, Node] = {}
    for node in reversed(piece_of):
        below = {child for child, _ in graph.children[node] if child in leaves or child in piece_of}
        if len(below) != 1 or node in roots or any(piece_of[above] != piece_of[node] for above in parents[node]):
            continue
        (child,) = below
        if child in leaves:
            chains[node] = child
        elif child in chains and parents[child] == {node}:
            chains[node] = chains[child]
    return chains

"""Facts read off the autograd graph: which losses reach which nodes, without running a backward."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

#: One input slot of a node: gradients of one tensor are summed there. The same as ``GradientEdge`` without its owner.
Edge = tuple[Node, int]

#: Nodes whose backward reaches parameters that are not below them in the graph, or hands gradients on to others.
_HIDING = frozenset(("CheckpointFunctionBackward", "RegisterPostBackwardFunctionBackward"))

#: The node at a leaf.
_ACCUMULATE = "torch::autograd::AccumulateGrad"

#: Nodes with one operand whose backward gives just its gradient.
_UNARY = frozenset(
    (
        *("Relu", "LeakyRelu", "Gelu", "Silu", "Mish", "Elu", "Tanh", "Sigmoid", "Softplus", "Hardswish", "Hardtanh"),
        *("View", "UnsafeView", "ReshapeAlias", "Permute", "Transpose", "T", "Clone", "Select", "Slice", "Split"),
        *("Squeeze", "Unsqueeze", "ToCopy", "Mean", "NativeDropout"),
        *("MaxPool2DWithIndices", "AvgPool2D", "AdaptiveAvgPool2D"),
    )
)
#: Elementwise nodes with two operands; where these have one shape, no gradient is summed over a broadcast dimension.
_BINARY = frozenset(("Add", "Sub", "Mul"))


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of ``tensor`` arrives: its ``grad_fn``, or its ``AccumulateGrad`` node if it is a leaf."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def pull(
    edges: Sequence[Edge], cotangents: Sequence[Tensor], targets: Sequence[Edge], *, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """The vector-Jacobian product from ``edges`` down to ``targets``, None for a target that nothing reaches.

    Raises:
        RuntimeError: As ``torch.autograd.grad``, or if a compiled model's backward cannot run for every task.
    """
    try:
        return torch.autograd.grad(
            [GradientEdge(*edge) for edge in edges],
            [GradientEdge(*edge) for edge in targets],
            cotangents,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "donated buffer" not in str(error):
            raise
        raise RuntimeError(
            "a compiled model's backward overwrites what it saved and so runs only once; to let it run for every task, "
            "set torch._functorch.config.donated_buffer = False (after `import torch._functorch.config`) before the "
            "model's first step"
        ) from error


def can_cross(graph: Graph, node: Node) -> bool:
    """Whether :func:`cross` gives what the engine would."""
    kind, backward, _ = node.name().partition("Backward")
    if not backward or any(child in graph.leaves for child, _ in graph.children[node]):
        return False
    if kind in _UNARY:
        return True
    shape = metadata_of((node, 0)).shape
    return kind in _BINARY and all(metadata_of(edge).shape == shape for edge in graph.children[node])


def cross(graph: Graph, rows: Mapping[Edge, Tensor]) -> dict[Edge, Tensor]:
    """The gradients right below the nodes at which ``rows`` arrive.

    A gradient that has been taken out of the backward has passed the hooks of its tensor. Where it is put back in it
    would pass them once more, so the node below them is run by itself.
    """
    arriving: dict[Node, dict[int, Tensor]] = {}
    for (node, slot), row in rows.items():
        arriving.setdefault(node, {})[slot] = row
    found: dict[Edge, Tensor] = {}
    for node, slots in arriving.items():
        call: Any = node
        grads = call(*(slots.get(slot) for slot in range(len(call._input_metadata))))
        for (child, slot), grad in zip(
            node.next_functions, grads if isinstance(grads, tuple) else (grads,), strict=True
        ):
            if child in graph.children and grad is not None:
                edge = (child, slot)
                found[edge] = found[edge] + grad if edge in found else grad
    return found


def zero_gradient(edge: Edge) -> Tensor:
    """A zero gradient for ``edge`` that takes no memory."""
    metadata = metadata_of(edge)
    return torch.zeros((), dtype=metadata.dtype, device=metadata.device).expand(metadata.shape)


def metadata_of(edge: Edge) -> Any:
    """Shape, dtype and device of the gradients of ``edge``, for which nodes have no public attribute."""
    node: Any = edge[0]
    return node._input_metadata[edge[1]]


class Graph:
    """The graph below some losses, walked once.

    Args:
        losses: One number each.
        through_casts: Whether the gradients of leaves may be read above their casts; see :meth:`edge_of`.

    Attributes:
        roots: For each task the edge of its loss.
        children: For each node the edges its gradients flow to; keys are in topological order, losses first.
        reached_by: For each node the set of tasks whose loss reaches it, as the bits of an integer.
    """

    def __init__(self, losses: Sequence[Tensor], *, through_casts: bool = True) -> None:
        self._through_casts = through_casts
        self.roots = [edge_of(loss) for loss in losses]
        # Holding every node keeps its Python wrapper alive, so that a node met twice is the same dictionary key.
        self.children = _topological([node for node, _ in self.roots])
        self.reached_by = dict.fromkeys(self.children, 0)
        for task, (root, _) in enumerate(self.roots):
            self.reached_by[root] |= 1 << task
        for node, edges in self.children.items():
            for child, _ in edges:
                self.reached_by[child] |= self.reached_by[node]

    def tasks_reaching(self, tensor: Tensor) -> int:
        """Bits of the tasks whose loss reaches ``tensor``."""
        return self.reached_by.get(self.edge_of(tensor)[0], 0)

    def is_shared(self, node: Node) -> bool:
        """Whether at least two losses reach ``node``."""
        return self.reached_by[node].bit_count() > 1

    @cached_property
    def leaves(self) -> dict[Node, Tensor]:
        """The leaves that some loss reaches, by the node of their :meth:`edge_of`, in the order of the forward."""
        found: list[Any] = [node for node, name in self._names.items() if name == _ACCUMULATE]
        return {self._casts.get(node, node): node.variable for node in reversed(found)}

    def edge_of(self, tensor: Tensor) -> Edge:
        """Where the gradient of ``tensor`` is read.

        Of a leaf that is used in lower precision alone, as under autocast, that is above the cast: there its gradient
        has the same value in less memory, and layers are the same as without a cast.
        """
        known = self._node_of.get(tensor)  # torch builds a graph to find that of a leaf
        return (known, 0) if known is not None else edge_of(tensor)

    @cached_property
    def _node_of(self) -> dict[Tensor, Node]:
        """The node of each of ``leaves``."""
        return {leaf: node for node, leaf in self.leaves.items()}

    @cached_property
    def _casts(self) -> dict[Node, Node]:
        """For the ``AccumulateGrad`` node of each such leaf the node of the cast."""
        casts = [node for node, name in self._names.items() if name == "ToCopyBackward0"]
        if not (casts and self._through_casts):
            return {}
        arriving = Counter(child for edges in (self.roots, *self.children.values()) for child, _ in edges)
        return {
            leaf: node
            for node in casts
            for leaf, _ in self.children[node]
            if self._names[leaf] == _ACCUMULATE and arriving[leaf] == 1 and _is_as_exact(node, leaf)
        }

    @cached_property
    def _names(self) -> dict[Node, str]:
        """The kind of each node."""
        return {node: node.name() for node in self.children}

    @cached_property
    def hides_parameters(self) -> bool:
        """Whether it holds parameters that only a ``backward`` call reaches: in reentrant checkpoints, under FSDP2.

        FSDP2 frees the parameters that the forward has used; the graph holds their empty shells.
        """
        if not _HIDING.isdisjoint(self._names.values()):
            return True
        may_have_shells = "torch.distributed.fsdp" in sys.modules
        return may_have_shells and any(map(_is_shell, self.leaves.values()))

    def with_any_below(self, targets: Iterable[Node]) -> set[Node]:
        """The nodes from which a gradient flows into one of ``targets``, themselves included."""
        found = set(targets) & self.children.keys()
        for node in reversed(self.children):
            if any(child in found for child, _ in self.children[node]):
                found.add(node)
        return found


def _is_shell(leaf: Tensor) -> bool:
    """Whether its memory has been freed."""
    return leaf.numel() > 0 and not leaf.untyped_storage().size()


def _is_as_exact(cast: Node, leaf: Any) -> bool:
    """Whether a gradient above ``cast`` is just what arrives at ``leaf``, in another dtype."""
    if leaf.variable._backward_hooks:
        return False
    above, below = metadata_of((cast, 0)), metadata_of((leaf, 0))
    return bool(above.device == below.device and torch.promote_types(above.dtype, below.dtype) == below.dtype)


def _topological(roots: Iterable[Node]) -> dict[Node, tuple[Edge, ...]]:
    """Every node below ``roots`` with its children, parents before children (depth first; graphs are deep)."""
    children: dict[Node, tuple[Edge, ...]] = {}
    finished: list[Node] = []
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            finished.append(node)
        elif node not in children:
            children[node] = tuple((child, slot) for child, slot in node.next_functions if child is not None)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in children[node] if child not in children)
    return {node: children[node] for node in reversed(finished)}

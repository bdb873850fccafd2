"""Whose each row of a cotangent is: where in the graph the tasks' samples lie apart, and in what order.

The user says which task owns each sample or token; the graph shows tensors whose rows are those samples in some order,
or parameters on their way to such a tensor. No order is taken on trust. One backward of all losses and one of losses
with factors must agree: a row that belongs to task ``t`` carries the factor of task ``t``, and nothing but zeros where
that factor is 0. Where no order agrees, the place is no tensor of samples (a parameter on its way, such as a weight
that is computed), so the places that use it are looked at, or else the model mixes samples, and the caller is told.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradstats.collect.graph import Graph

#: The cotangents at the outputs of a node; None for one that no gradient reaches.
Cotangents: TypeAlias = Sequence[Tensor | None]

#: Factors of the losses that a rounded number can be told by, and that round nothing themselves.
_FACTORS = (0.0, 1.0, -1.0, 0.5, -0.5)

#: At most so many inputs may be computed from before they meet the samples. More are a sign of samples that are mixed.
_MOST_ABSORBED = 4

#: Entries of a cotangent that are looked at at a time.
_ENTRIES = 2**18

#: Beyond so many models and owners the oldest is forgotten.
_MOST_REMEMBERED = 256


@dataclass(frozen=True)
class Layout:
    """The order of samples in a tensor.

    Attributes:
        level: The sample changes within the first ``level`` dimensions, as if they were one.
        cyclic: Whether it changes with every row there (tokens first), or stays the same for equal parts (batch first).
        transposed: Whether the two dimensions of ``owner`` change places.
    """

    level: int
    cyclic: bool = False
    transposed: bool = False

    def owners(self, owner: Tensor, shape: Sequence[int], rows: int) -> Tensor | None:
        """The task of each of ``rows`` equal parts of a tensor of ``shape``; None if a part has several owners."""
        owner = (owner.mT if self.transposed else owner).flatten()
        size = math.prod(shape[: self.level])
        times, rest = divmod(size, owner.numel())
        if rest or not times:
            raise ValueError(
                f"owner: expected one entry for each sample or token, got {owner.numel()}, which does not fit a layer "
                f"with an output of shape {tuple(shape)}"
            )
        if rows % size == 0:
            entries = owner.repeat(times) if self.cyclic else owner.repeat_interleave(times)
            return entries.repeat_interleave(rows // size)
        if size % rows:
            return None
        length = size // rows  # of a part; no more entries are formed than it takes to see whether it has one owner
        if self.cyclic:
            parts = owner.repeat(math.lcm(length, owner.numel()) // owner.numel()).view(-1, length)
        else:
            parts = owner.repeat_interleave(times // math.gcd(times, length)).view(rows, -1)
        return parts[:, 0].repeat(rows // len(parts)) if bool((parts == parts[:, :1]).all()) else None


@dataclass(frozen=True)
class Place:
    """A node at whose output the samples lie apart.

    Attributes:
        layouts: For each output of the node the order of samples in its cotangent; None where it has none.
    """

    layouts: tuple[Layout | None, ...]


@dataclass(frozen=True)
class Findings:
    """What holds for all graphs of one form; nodes are given by their position among ``Graph.children``.

    Attributes:
        places: Where samples lie apart.
        absorbed: The nodes between these and leaves that lead to leaves alone.
    """

    places: dict[int, Place]
    absorbed: frozenset[int]


_known: dict[int, Findings] = {}
_random = random.Random(0)  # not the user's: collecting leaves random-number state alone


def find(
    graph: Graph,
    losses: Sequence[Tensor],
    owner: Tensor,
    consumers: Iterable[Node],
    is_layer: Callable[[Node], bool],
) -> Findings:
    """Where the samples lie apart that the gradients of parameters are made of.

    The first graph of a form costs two backwards. For later ones only the part above the first such place is run
    through once more, which tells whether ``owner`` fits these losses.

    Args:
        graph: The graph below ``losses``; it is kept.
        losses: For each task its loss.
        owner: The task of each sample ``[B]`` or token ``[B, S]``, ``[tokens]``.
        consumers: The nodes that consume parameters.
        is_layer: Whether a node applies a parameter to something that may be samples.

    Raises:
        ValueError: If ``owner`` does not fit, or the samples of different tasks meet before the losses do.
    """
    nodes = list(graph.children)
    position = {node: i for i, node in enumerate(nodes)}
    consumers = list(consumers)
    form = _form(graph, position, consumers, owner)
    findings = _known.get(form)
    if findings is None:
        _refuse_batch_norm(graph)
        findings, certain = _Probe(graph, losses, owner, is_layer).run(consumers, position)
        if certain:
            _known[form] = findings
            if len(_known) > _MOST_REMEMBERED:
                del _known[next(iter(_known))]
    else:
        _check_losses(graph, losses, owner, {nodes[i]: place for i, place in findings.places.items()})
    return findings


def visit(
    graph: Graph,
    losses: Sequence[Tensor],
    factors: Tensor,
    nodes: Iterable[Node],
    see: Callable[[Node, Cotangents], None],
    *,
    leaves: Sequence[Tensor] = (),
    retain_graph: bool,
) -> tuple[Tensor | None, ...]:
    """One backward of ``Σ_t factor_t loss_t``, as far as it takes to see the cotangents at the outputs of ``nodes``.

    Args:
        graph: The graph below ``losses``.
        losses: For each task its loss.
        factors: ``[T]``.
        nodes: The nodes to see; each is seen once, as soon as its cotangents are there, which are then freed.
        see: What to do there.
        leaves: Leaves whose gradients are wanted as well.
        retain_graph: Whether the graph is kept.

    Returns:
        The gradients of ``leaves``.
    """
    above = graph.with_any_below(nodes)
    # A node without any of `nodes` below is where this backward ends, unless it goes on to the leaves.
    last = [n for n in nodes if not leaves and not any(child in above for child, _ in graph.children[n])]
    ends = [GradientEdge(node, slot) for node in last for slot in range(_num_outputs(node))]
    with contextlib.ExitStack() as hooks:
        for node in set(nodes).difference(last):
            hooks.callback(node.register_prehook(_seeing(node, see)).remove)
        outputs, cotangents = _heads(losses, factors)
        grads = list(
            torch.autograd.grad(outputs, leaves or ends, cotangents, retain_graph=retain_graph, allow_unused=True)
        )
    if leaves:
        return tuple(grads)
    for node in last:
        number = _num_outputs(node)
        cotangent, grads = grads[:number], grads[number:]
        see(node, cotangent)
        del cotangent
    return ()


def _seeing(node: Node, see: Callable[[Node, Cotangents], None]) -> Callable[[Cotangents], None]:
    return lambda cotangents: see(node, cotangents)


def _num_outputs(node: Any) -> int:
    return len(node._input_metadata)


def _heads(losses: Sequence[Tensor], factors: Tensor) -> tuple[list[Any], list[Tensor]]:
    """Where a backward of all losses starts, and the cotangents there.

    Losses that are the entries of one vector are left in it: a thousand roots cost more than the backward of a layer.
    """
    vector = _common_vector(losses)
    if vector is not None:
        node, slots = vector
        weights = losses[0].new_zeros(_num_outputs(node))
        weights[torch.tensor(slots, device=weights.device)] = factors.to(weights)
        child, slot = node.next_functions[0]
        assert child is not None
        return [GradientEdge(child, slot)], [weights]
    return list(losses), [f.to(loss).expand(loss.shape) for f, loss in zip(factors, losses, strict=True)]


def _common_vector(losses: Sequence[Tensor]) -> tuple[Node, list[int]] | None:
    """The node that has made all losses by taking a vector apart, and which entry each is; None if there is none."""
    node = losses[0].grad_fn
    if node is None or node.name() != "UnbindBackward0":
        return None
    if any(loss.grad_fn is not node or loss.ndim or loss._backward_hooks for loss in losses):
        return None
    return node, [loss.output_nr for loss in losses]


# ---- comparing two backwards -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Signature:
    """A cotangent with each of its rows (all dimensions but the last) summed with random factors, and their size."""

    shape: torch.Size
    sums: Tensor
    sizes: Tensor

    @classmethod
    def empty(cls, output: Any) -> _Signature:
        """Room for that of the cotangent of an output, of which autograd says shape, dtype and device."""
        shape = torch.Size(output.shape)
        rows = shape[:-1].numel() if len(shape) > 1 else shape.numel()
        dtype = torch.promote_types(output.dtype, torch.float32)
        make = functools.partial(torch.empty, rows, device=output.device)
        return cls(shape, make(dtype=dtype), make(dtype=dtype.to_real()))

    def fill(self, cotangent: Tensor) -> _Signature:
        """Take that of ``cotangent``."""
        flat = cotangent.reshape(-1, cotangent.shape[-1] if cotangent.ndim > 1 else 1)
        factors = torch.rand(flat.shape[1], generator=torch.Generator().manual_seed(0)).sub_(0.5).to(self.sums)
        many = max(1, _ENTRIES // max(1, flat.shape[1]))
        for rows, sums, sizes in zip(
            *(torch.split(tensor, many) for tensor in (flat, self.sums, self.sizes)), strict=True
        ):
            rows = rows.to(factors)
            torch.mv(rows, factors, out=sums)
            torch.mv(rows.abs(), factors.abs(), out=sizes)
        return self


class _Probe:
    """Compares two backwards at more and more nodes, from those that consume parameters upwards."""

    def __init__(self, graph: Graph, losses: Sequence[Tensor], owner: Tensor, is_layer: Callable[[Node], bool]) -> None:
        self._graph = graph
        self._losses = losses
        self._owner = owner
        self._is_layer = is_layer
        self._factors = _shuffled_factors(len(losses), owner)
        self._parents: dict[Node, list[Node]] = {}
        for node, edges in graph.children.items():
            for child, _ in edges:
                self._parents.setdefault(child, []).append(node)

    def run(self, consumers: Sequence[Node], position: Mapping[Node, int]) -> tuple[Findings, bool]:
        """The places, and whether the gradients of this step suffice to be certain of them."""
        places: dict[Node, Place] = {}
        absorbed: dict[Node, torch.Size] = {}
        certain = True
        roots = {root for root, _ in self._graph.roots}
        waiting = list(dict.fromkeys(consumers))
        while waiting:
            above: dict[Node, None] = {}
            for node, shape, layouts, sure in self._compare(waiting):
                if layouts is not None:
                    places[node] = Place(layouts)
                    certain &= sure
                    continue
                absorbed[node] = shape
                if node in roots:
                    self._refuse(absorbed)
                above |= dict.fromkeys(self._parents[node])
            waiting = [node for node in above if node not in places and node not in absorbed]
        self._check_absorbed(absorbed, places)
        return Findings({position[n]: p for n, p in places.items()}, frozenset(position[n] for n in absorbed)), certain

    def _compare(
        self, nodes: Sequence[Node]
    ) -> Iterator[tuple[Node, torch.Size, tuple[Layout | None, ...] | None, bool]]:
        """For each node the shape of its first output, the layouts of all (None: none fits), and whether it is sure."""
        plain, scaled = self._signatures(nodes, torch.ones_like(self._factors)), self._signatures(nodes, self._factors)
        for node in nodes:
            layouts, sure = [], True
            for first, second in zip(plain[node], scaled[node], strict=True):
                layout = None
                if first is not None and second is not None:
                    layout, certain = _match(first, second, self._owner, self._factors)
                    sure &= certain
                    if layout is None:
                        yield node, first.shape, None, False
                        break
                layouts.append(layout)
            else:
                yield node, torch.Size(), tuple(layouts), sure

    def _signatures(self, nodes: Sequence[Node], factors: Tensor) -> dict[Node, list[_Signature | None]]:
        # Made beforehand: small tensors that stay, put between large ones that go, would leave holes in the heap.
        room = {node: [_Signature.empty(output) for output in node._input_metadata] for node in nodes}
        found: dict[Node, list[_Signature | None]] = {}

        def see(node: Node, cotangents: Cotangents) -> None:
            pairs = zip(room[node], cotangents, strict=True)
            found[node] = [None if grad is None else signature.fill(grad) for signature, grad in pairs]

        visit(self._graph, self._losses, factors, nodes, see, retain_graph=True)
        return found

    def _check_absorbed(self, absorbed: Mapping[Node, torch.Size], places: Mapping[Node, Place]) -> None:
        """Refuse to take a part of the model that mixes samples for parameters on their way to a layer."""
        for node, shape in absorbed.items():
            below = set(_below(self._graph, node))
            layer_of_samples = bool(_candidates(self._owner, shape)) and self._is_layer(node)
            if layer_of_samples or below & places.keys() or len(below & self._graph.leaves.keys()) > _MOST_ABSORBED:
                self._refuse(absorbed)

    def _refuse(self, absorbed: Mapping[Node, torch.Size]) -> NoReturn:
        node, shape = next(iter(absorbed.items()))
        count = self._owner.numel()
        if not any(_candidates(self._owner, shape) for shape in absorbed.values()):
            raise ValueError(
                f"owner: expected one entry for each sample or token that enters a layer, got {count}; the output of "
                f"{node.name()}, for example, has shape {tuple(shape)}"
            )
        raise ValueError(
            f"owner: expected losses that each depend on their task's own samples alone, but at the output of "
            f"{node.name()}, {tuple(shape)}, gradients of different tasks meet in one row, or another task's than "
            f"owner says. Either owner is in another order than the samples, or the model or a loss mixes samples (as "
            "a contrastive loss does): leave owner out then"
        )


def _match(first: _Signature, second: _Signature, owner: Tensor, factors: Tensor) -> tuple[Layout | None, bool]:
    """The layout by which ``second`` is ``first`` times factors, if there is one, and whether it must be that one."""
    tolerance = 1e-3 * first.sizes
    known = first.sizes.isfinite()  # what is not finite shows nothing, and may be so in the row of one task alone
    alive = known & (first.sizes > 0)
    fitting: list[tuple[Layout, Tensor]] = []
    for layout in _candidates(owner, first.shape):
        owners = layout.owners(owner, first.shape, len(first.sums))
        if owners is None:
            continue
        factor = factors[owners].to(first.sums)
        right = torch.where(factor == 0, second.sizes == 0, (second.sums - factor * first.sums).abs() <= tolerance)
        if bool((right | ~known).all()):
            fitting.append((layout, owners))
    if not fitting:
        return None, False
    layout, owners = fitting[0]
    seen = factors[owners][alive]
    certain = bool((owners == owners[0]).all()) or bool((seen == 0).any() and (seen != 0).any())
    return layout, certain and all(torch.equal(owners, other) for _, other in fitting[1:])


def _candidates(owner: Tensor, shape: torch.Size) -> list[Layout]:
    """The orders that the samples can have in a tensor of this shape, plausible ones first."""
    levels = [n for n in range(1, len(shape) + 1) if math.prod(shape[:n]) and not math.prod(shape[:n]) % owner.numel()]
    cyclic = [Layout(n, cyclic=True) for n in levels if math.prod(shape[:n]) != owner.numel()]
    found = [Layout(levels[0]), *cyclic] if levels else []
    return found + [replace(layout, transposed=True) for layout in found if owner.ndim == 2]


def _shuffled_factors(num_tasks: int, owner: Tensor) -> Tensor:
    """Factors ``[T]`` of which at least one task with samples has 0 and one another, if there are two."""
    tasks = sorted(set(owner.flatten().tolist()))
    _random.shuffle(tasks)
    factors = torch.zeros(num_tasks)
    factors[tasks] = torch.tensor([_FACTORS[i % len(_FACTORS)] for i in range(len(tasks))])
    return factors.to(owner.device)


def _check_losses(graph: Graph, losses: Sequence[Tensor], owner: Tensor, places: Mapping[Node, Place]) -> None:
    """Check that the losses reach the rows of their own tasks alone where samples first lie apart."""
    factors = _shuffled_factors(len(losses), owner)
    below: set[Node] = set()
    for node, edges in graph.children.items():
        if node in places or node in below:
            below.update(child for child, _ in edges)

    def see(node: Node, cotangents: Cotangents) -> None:
        for layout, output, grad in zip(places[node].layouts, node._input_metadata, cotangents, strict=True):
            if layout is None or grad is None:
                continue
            signature = _Signature.empty(output).fill(grad)
            owners = layout.owners(owner, grad.shape, len(signature.sizes))
            if owners is None or bool((signature.sizes[factors[owners] == 0] > 0).any()):
                raise ValueError(
                    f"owner: expected losses that each depend on their task's own samples alone, but at the output of "
                    f"{node.name()}, {tuple(grad.shape)}, a loss reaches samples that owner gives to another task"
                )

    visit(graph, losses, factors, [node for node in places if node not in below], see, retain_graph=True)


# ---- the form of a graph ---------------------------------------------------------------------------------------------


def _form(graph: Graph, position: Mapping[Node, int], consumers: Sequence[Node], owner: Tensor) -> int:
    """What the places depend on: nodes, how they are connected and along which dimensions they work; not the sizes."""
    nodes = tuple(
        (node.name(), _options(node), tuple(position[child] for child, _ in edges))
        for node, edges in graph.children.items()
    )
    return hash((nodes, tuple(position[node] for node in consumers), owner.ndim))


_option_names: dict[str, tuple[str, ...]] = {}


def _options(node: Node) -> tuple[Any, ...]:
    name = node.name()
    if name not in _option_names:
        _option_names[name] = tuple(a for a in dir(node) if a.startswith("_saved_dim") or a == "_saved_training")
    return tuple(getattr(node, option) for option in _option_names[name])


def _refuse_batch_norm(graph: Graph) -> None:
    for node in graph.children:
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", True) and graph.is_shared(node):
            raise ValueError(
                f"owner: expected a model that treats samples one by one, but it holds a BatchNorm layer in training "
                f"mode ({node.name()}), whose statistics mix them: put it into eval mode, or leave owner out"
            )


def _below(graph: Graph, node: Node) -> Iterator[Node]:
    """All nodes below ``node``."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        for child, _ in graph.children[stack.pop()]:
            if child not in seen:
                seen.add(child)
                stack.append(child)
                yield child

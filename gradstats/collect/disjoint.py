"""Tasks that own disjoint samples: one ordinary backward of all losses carries the gradients of every task.

Where a parameter is used, the cotangent has a row for each sample (or token), and each row is some task's own. So the
gradient of a task is what its rows contribute, and the rows are split where they appear, by the rule of the node that
uses the parameter (:mod:`~gradstats.collect.rules`): the backward stops short of forming weight gradients, and either
the tasks' gradients are formed from their own rows, which costs together as much as the one weight gradient, or only
their inner products are, from the products of all pairs of rows. With one sample for each task these are the Gramian
of per-sample gradients. A node without a rule runs once for each task, with the other tasks' rows put to zero.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradstats.collect import owners
from gradstats.collect.fold import Fold
from gradstats.collect.graph import edge_of, pull
from gradstats.collect.job import Job
from gradstats.collect.owners import Cotangents, Layout
from gradstats.collect.rules import Rows, Use, uses

#: Entries of the block ``[T, columns, k]`` that is formed at a time: small enough for a cache, large enough for speed.
_BLOCK = 2**21

#: From so many tasks on, products of rows are faster than the operator for few long gradients.
_MANY = 256

#: Rows whose products with as many others are formed at a time.
_ROWS = 512

#: Terms that are summed up in float32 before they go into a sum in float64.
_CHAIN = 512

#: What writing and reading an entry of a block costs, in multiplications.
_TRAFFIC = 16

#: Weights further apart than this are not carried through the backward of the Gramian, lest gradients underflow.
_MOST_APART = 1e3


def collect_disjoint(job: Job, owner: Tensor, *, retain_graph: bool) -> tuple[Fold, dict[Tensor, Tensor] | None]:
    """Collect from one backward.

    Args:
        job: The collection.
        owner: The task of each sample ``[B]`` or token, ``[B, S]`` or ``[tokens]``, as :func:`task_positions` gives it.
        retain_graph: Whether the graph is kept.

    Returns:
        The Gramian, and with ``job.weights`` the weighted gradient of every leaf, or None if that takes a backward of
        its own.

    Raises:
        ValueError: If ``owner`` does not fit, or samples of different tasks meet before their losses do.
    """
    return _Disjoint(job, owner).run(retain_graph)


def task_positions(owner: Tensor, num_tasks: int, present: Sequence[int], device: torch.device) -> Tensor:
    """``owner`` in terms of the tasks that are present; what absent tasks own, which no gradient reaches, goes to any.

    Raises:
        TypeError: If it is not a tensor of integers.
        ValueError: If it has a wrong number of dimensions, no entry, or one that is no task.
    """
    if not isinstance(owner, Tensor) or owner.is_floating_point() or owner.is_complex() or owner.dtype == torch.bool:
        got = owner.dtype if isinstance(owner, Tensor) else type(owner).__name__
        raise TypeError(f"owner: expected a tensor of integers, the task of each sample or token, got {got}")
    if owner.ndim not in (1, 2) or not owner.numel():
        raise ValueError(f"owner: expected shape [B], [B, S] or [tokens], got {tuple(owner.shape)}")
    low, high = int(owner.min()), int(owner.max())
    if low < 0 or high >= num_tasks:
        raise ValueError(f"owner: expected tasks from 0 to {num_tasks - 1}, got {low if low < 0 else high}")
    positions = torch.zeros(num_tasks, dtype=torch.int64)
    positions[list(present)] = torch.arange(len(present))
    return positions.to(device)[owner.to(device)]


def should_factor(rows: int, tasks: int, left: int, right: int, numel: int) -> bool:
    """Whether products of all pairs of rows cost less than forming the gradients of the tasks.

    Args:
        rows: Rows of all tasks together.
        tasks: ``T``.
        left: Multiplications for the product of two left factors.
        right: The same of right factors.
        numel: Entries of the parameter.
    """
    pairs = rows * (rows + min(rows, _ROWS)) / 2  # those within a part are taken both ways round
    factored = pairs * (left + right + _TRAFFIC)
    formed = rows * left * right + tasks * numel * (tasks / 2 + _TRAFFIC)
    return factored < formed


@dataclass(frozen=True)
class _Consumer:
    """An operand through which gradients reach input ``k``; ``use`` if it is that input itself, or a view of it."""

    k: int
    child: int
    use: Use | None


class _Grouping:
    """The rows of a tensor by the task that owns each.

    Attributes:
        owner: The task of each row, ``[N]``.
        num_tasks: ``T``.
        even: The number of rows of a task if all have as many, else None.
    """

    def __init__(self, owner: Tensor, num_tasks: int) -> None:
        self.owner = owner
        self.num_tasks = num_tasks
        counts = torch.bincount(owner, minlength=num_tasks).tolist()
        self.even = counts[0] if min(counts) == max(counts) else None
        self._ends = list(itertools.accumulate(counts, initial=0))
        is_sorted = bool((owner[1:] >= owner[:-1]).all())
        self._order = None if is_sorted else owner.argsort(stable=True)

    def sort(self, rows: Tensor) -> Tensor:
        """``rows [N, ...]`` task by task."""
        return rows if self._order is None else rows[self._order]

    def slices(self) -> Iterator[tuple[int, slice]]:
        """For each task that owns rows these, once sorted."""
        for task, (start, end) in enumerate(itertools.pairwise(self._ends)):
            if start < end:
                yield task, slice(start, end)

    def sums(self, rows: Tensor) -> Tensor:
        """``[T, ...]``, for each task the sum of its ``rows [N, ...]``."""
        if self.even is not None:
            return self.sort(rows).reshape(self.num_tasks, self.even, *rows.shape[1:]).sum(1)
        return rows.new_zeros(self.num_tasks, *rows.shape[1:]).index_add_(0, self.owner, rows)

    def parts(self, size: int) -> list[_Part]:
        """The sorted rows in parts of whole tasks, of about ``size`` rows."""
        found, first = [], 0
        for task in range(1, self.num_tasks + 1):
            if task == self.num_tasks or self._ends[task + 1] - self._ends[first] > size:
                found.append(_Part(slice(self._ends[first], self._ends[task]), slice(first, task)))
                first = task
        return [part for part in found if part.rows.start < part.rows.stop]

    def sum_part(self, rows: Tensor, part: _Part) -> Tensor:
        """For each task of ``part`` the sum of its ``rows``, which are those of ``part``."""
        if self.even == 1:
            return rows
        if self.even is not None:
            return rows.reshape(-1, self.even, *rows.shape[1:]).sum(1)
        ends = torch.tensor(self._ends[part.tasks.start : part.tasks.stop + 1], device=rows.device)
        return torch.segment_reduce(rows, "sum", lengths=ends.diff())


class _Part(NamedTuple):
    """Some tasks and their rows."""

    rows: slice
    tasks: slice


class _Disjoint:
    """One collection."""

    def __init__(self, job: Job, owner: Tensor) -> None:
        self._job = job
        self._owner = owner
        self._num_tasks = len(job.losses)
        self._fold = job.new_fold()
        self._groupings: dict[tuple[Layout, torch.Size, int], _Grouping | None] = {}
        self._is_running_alone = False
        self._sums: dict[int, Tensor] = {}  # of inputs with several consumers: their blocks [T, *shape] so far

    def run(self, retain_graph: bool) -> tuple[Fold, dict[Tensor, Tensor] | None]:
        """Collect."""
        nodes = list(self._job.graph.children)
        consumers = self._direct_consumers()

        def is_layer(node: Node) -> bool:
            return any(self._applies_weights(consumer) for consumer in consumers.get(node, ()))

        findings = owners.find(self._job.graph, self._job.losses, self._owner, consumers, is_layer)
        self._places = {nodes[i]: place for i, place in findings.places.items()}
        self._consumers = self._by_place(consumers, {nodes[i] for i in findings.absorbed})
        operands = [(node, consumer.k) for node, found in self._consumers.items() for consumer in found]
        self._num_consumers = Counter(k for _, k in operands)
        self._missing = Counter(k for _, k in set(operands))  # places still to be seen

        weights = self._carried_weights()
        factors = torch.ones(self._num_tasks, device=self._owner.device) if weights is None else weights
        leaves = [] if weights is None else list(self._job.graph.leaves.values())
        keep = retain_graph or (self._job.weights is not None and weights is None)
        grads = owners.visit(
            self._job.graph,
            self._job.losses,
            factors,
            list(self._consumers),
            self._see,
            leaves=leaves,
            retain_graph=keep,
        )
        if weights is None:
            return self._fold, None
        for gram in self._fold.grams.values():
            gram /= weights[:, None] * weights
        return self._fold, {leaf: grad for leaf, grad in zip(leaves, grads, strict=True) if grad is not None}

    # ---- where -------------------------------------------------------------------------------------------------------

    def _direct_consumers(self) -> dict[Node, list[_Consumer]]:
        """The nodes that consume inputs, with the operands that these are."""
        found = uses(self._job.graph)
        consumers: dict[Node, list[_Consumer]] = {}
        for k, tensor in enumerate(self._job.inputs):
            node, slot = self._job.graph.edge_of(tensor)
            if node in self._job.graph.leaves:
                for use in found.get(node, []):
                    consumers.setdefault(use.node, []).append(_Consumer(k, use.child, use))
            elif node in self._job.graph.children:
                consumers.setdefault(node, []).append(_Consumer(k, -1 - slot, None))
        return consumers

    def _applies_weights(self, consumer: _Consumer) -> bool:
        """Whether it is the weight of a linear layer or a convolution."""
        rows = None if consumer.use is None else consumer.use.rows(self._job.inputs[consumer.k])
        return rows is not None and rows.left is not None and rows.left.is_floating_point()

    def _by_place(self, consumers: Mapping[Node, list[_Consumer]], absorbed: set[Node]) -> dict[Node, list[_Consumer]]:
        """The same by the first nodes at or above them where samples lie apart."""
        found = {node: list(operands) for node, operands in consumers.items() if node not in absorbed}
        inputs_below = {node: {c.k for c in operands} for node, operands in consumers.items() if node in absorbed}
        for node in reversed(self._job.graph.children) if absorbed else ():
            for i, (child, _) in enumerate(node.next_functions):
                if child not in absorbed or child is None:
                    continue
                if node in absorbed:
                    inputs_below.setdefault(node, set()).update(inputs_below.get(child, ()))
                else:
                    found.setdefault(node, []).extend(_Consumer(k, i, None) for k in inputs_below.get(child, ()))
        return found

    def _carried_weights(self) -> Tensor | None:
        """The weights, if the same backward may yield the weighted gradients of the leaves as well."""
        weights = self._job.weights
        if weights is None or any(leaf._backward_hooks for leaf in self._job.graph.leaves.values()):
            return None  # a user's hook on a leaf would run twice
        sizes = weights.abs()
        return weights if bool((sizes.max() <= sizes.min() * _MOST_APART) & (sizes.min() > 0)) else None

    def _grouping(self, layout: Layout, shape: torch.Size, rows: int) -> _Grouping | None:
        key = (layout, shape, rows)
        if key not in self._groupings:
            owner = layout.owners(self._owner, shape, rows)
            self._groupings[key] = None if owner is None else _Grouping(owner, self._num_tasks)
        return self._groupings[key]

    # ---- what --------------------------------------------------------------------------------------------------------

    def _see(self, node: Node, cotangents: Cotangents) -> None:
        """Fold in what a node's cotangents say of the inputs below it."""
        if self._is_running_alone:  # a backward within this one
            return
        consumers = self._consumers[node]
        if any(grad is not None for grad in cotangents):
            with torch.no_grad():
                general = [c for c in consumers if not self._by_rule(node, c, cotangents)]
                if general:
                    self._by_masks(node, general, cotangents)
        for k in {consumer.k for consumer in consumers}:
            self._missing[k] -= 1
            if not self._missing[k] and k in self._sums:
                self._fold.add_block(k, self._sums.pop(k))

    def _by_rule(self, node: Node, consumer: _Consumer, cotangents: Cotangents) -> bool:
        """Fold in by the rule of ``node``; False if none fits."""
        k, use = consumer.k, consumer.use
        leaf, grad, layout = self._job.inputs[k], cotangents[0], self._places[node].layouts[0]
        if use is None or grad is None or layout is None:
            return False
        rows = use.rows(leaf)
        if rows is None:
            return False
        right = rows.right(grad)
        grouping = self._grouping(layout, grad.shape, len(right))
        if grouping is None:
            return False
        if self._num_consumers[k] > 1 or self._job.needs_gradients or leaf._backward_hooks:
            self._add_block(k, _hooked(leaf, _gradients(rows, right, grouping, use)))
        elif rows.left is None:
            self._fold_sums(k, grouping.sums(right))
        else:
            factors = _cheaper_factors(rows, right, self._num_tasks, leaf.numel())
            if factors is not None:
                finer = self._grouping(layout, grad.shape, len(factors[1]))
                assert finer is not None
                self._fold.add_gram(k, _products(*factors, finer))
            elif rows.outer:
                for block in _partial_gradients(rows.left, right, grouping):
                    self._fold.add_block(k, block)
            else:
                self._fold.add_block(k, _gradients(rows, right, grouping, use))
        return True

    def _fold_sums(self, k: int, block: Tensor) -> None:
        """Fold in gradients that are small enough to be formed in any case, such as a bias's."""
        if self._num_tasks <= _MANY:
            self._fold.add_block(k, block)
        else:
            each = torch.arange(self._num_tasks, device=block.device)
            self._fold.add_gram(k, _products(None, block, _Grouping(each, self._num_tasks)))

    def _by_masks(self, node: Node, consumers: Sequence[_Consumer], cotangents: Cotangents) -> None:
        """Run ``node``, and what lies between it and the inputs, once for each task."""
        rows = {
            slot: (grad, self._row_owners(layout, grad))
            for slot, (grad, layout) in enumerate(zip(cotangents, self._places[node].layouts, strict=True))
            if grad is not None and layout is not None
        }
        through = {consumer.child for consumer in consumers if consumer.child >= 0}
        below = list(dict.fromkeys(consumer.k for consumer in consumers if consumer.child >= 0))
        made_here = [consumer for consumer in consumers if consumer.child < 0 and -1 - consumer.child in rows]
        for task in sorted({task for _, owner in rows.values() for task in owner.tolist()}):
            masked = {slot: _rows_of(task, grad, owner) for slot, (grad, owner) in rows.items()}
            for consumer in made_here:
                self._fold.add_row(consumer.k, task, masked[-1 - consumer.child])
            if below:
                for k, grad in zip(below, self._run_alone(node, masked, through, below), strict=True):
                    if grad is not None:
                        self._block(k)[task] += grad.to_dense() if grad.layout != torch.strided else grad

    def _run_alone(
        self, node: Node, cotangents: Mapping[int, Tensor], through: set[int], inputs: Sequence[int]
    ) -> tuple[Tensor | None, ...]:
        """What ``cotangents`` (by output) give to ``inputs`` by way of the operands ``through`` of ``node``."""

        def stop(grads: Cotangents, _: Cotangents) -> Cotangents:
            return tuple(grad if child in through else None for child, grad in enumerate(grads))

        edges = [(node, slot) for slot in cotangents]
        for edge, grad in zip(edges, cotangents.values(), strict=True):
            if pull([edge], [grad], [edge], retain_graph=True)[0] is not grad:  # the hook has been run already
                raise ValueError(
                    f"owner: a hook changes the gradient of the output of {node.name()}, which has no rule "
                    "(gradstats.collect.rules) and so runs once more for every task; remove the hook or leave owner out"
                )
        targets = [edge_of(self._job.inputs[k]) for k in inputs]
        handle = node.register_hook(stop)
        self._is_running_alone = True
        try:
            return pull(edges, list(cotangents.values()), targets, retain_graph=True)
        finally:
            self._is_running_alone = False
            handle.remove()

    def _row_owners(self, layout: Layout, grad: Tensor) -> Tensor:
        grouping = self._grouping(layout, grad.shape, math.prod(grad.shape[: layout.level]))
        assert grouping is not None
        return grouping.owner

    def _add_block(self, k: int, block: Tensor) -> None:
        self._sums[k] = self._sums[k].add_(block) if k in self._sums else block.to(self._job.inputs[k].dtype)

    def _block(self, k: int) -> Tensor:
        if k not in self._sums:
            leaf = self._job.inputs[k]
            self._sums[k] = leaf.new_zeros(self._num_tasks, *leaf.shape)
        return self._sums[k]


def _hooked(leaf: Tensor, block: Tensor) -> Tensor:
    """The gradients of a leaf as the hooks that users registered on it leave them."""
    if not leaf._backward_hooks:
        return block
    edge = edge_of(leaf)
    hooked = [pull([edge], [grad], [edge], retain_graph=True)[0] for grad in block]
    return torch.stack([grad for grad in hooked if grad is not None])


def _rows_of(task: int, grad: Tensor, owners: Tensor) -> Tensor:
    """``grad`` with zeros in the rows of other tasks, whatever they hold."""
    rows = grad.reshape(len(owners), -1)
    return torch.where((owners == task)[:, None], rows, 0).view(grad.shape)


# ---- by rules --------------------------------------------------------------------------------------------------------


def _gradients(rows: Rows, right: Tensor, grouping: _Grouping, use: Use) -> Tensor:
    """The gradients of all tasks, ``[T, *shape]``."""
    if rows.left is None:
        block = rows.contract(None, grouping.sums(right)[:, None])
        return torch.stack([use.restore(grad) for grad in block]) if use.path else block
    left, right = grouping.sort(rows.left), grouping.sort(right)
    found: Tensor | None = None
    for task, part in grouping.slices():
        grad = use.restore(rows.contract(left[part], right[part]))
        if found is None:
            found = grad.new_zeros(grouping.num_tasks, *grad.shape)
        found[task] = grad
    assert found is not None  # there is an owner
    return found


def _partial_gradients(left: Tensor, right: Tensor, grouping: _Grouping) -> Iterator[Tensor]:
    """Blocks ``[T, columns, k]`` of sums of outer products, which hold each entry of the gradients once."""
    tasks, fan_in, fan_out = grouping.num_tasks, left.shape[1], right.shape[1]
    left, right = grouping.sort(left), grouping.sort(right)
    step = max(1, _BLOCK // (tasks * fan_in))
    for start in range(0, fan_out, step):
        columns = right[:, start : start + step]
        if grouping.even is not None:
            split = (tasks, grouping.even, -1)
            yield columns.reshape(split).mT @ left.reshape(split)
        else:
            block = left.new_zeros(tasks, columns.shape[1], fan_in)
            for task, part in grouping.slices():
                torch.mm(columns[part].mT, left[part], out=block[task])
            yield block


def _cheaper_factors(rows: Rows, right: Tensor, tasks: int, numel: int) -> tuple[Tensor, Tensor] | None:
    """Left and right factors of the outer products, if their products cost less than gradients of ``numel`` entries."""
    assert rows.left is not None
    if not (rows.outer or rows.unfold):
        return None
    if not rows.left.is_floating_point():  # of an embedding, whose gradients would be as large as the vocabulary
        return rows.left, right
    width = right.shape[1]
    if not should_factor(right.numel() // width, tasks, numel // width, width, numel):
        return None
    return rows.unfold(right) if rows.unfold else (rows.left, right)


def _products(left: Tensor | None, right: Tensor, grouping: _Grouping) -> Tensor:
    """The Gramian ``[T, T]`` of sums of outer products (of ``right`` if ``left`` is None), by products of rows."""
    left, right = None if left is None else grouping.sort(left), grouping.sort(right)
    gram = torch.zeros(grouping.num_tasks, grouping.num_tasks, dtype=torch.float64, device=right.device)
    parts = grouping.parts(_ROWS)
    for i, part in enumerate(parts):
        for other in parts[i:]:
            # In float64, as a product of four numbers may leave the range of the other types.
            products = _inner(right[part.rows], right[other.rows])
            if left is not None:
                products *= _inner(left[part.rows], left[other.rows])
            sums = grouping.sum_part(grouping.sum_part(products, part).mT, other).mT
            if other is part:
                sums = (sums + sums.mT) / 2  # whose entries are rounded independently
            gram[part.tasks, other.tasks] = sums
            gram[other.tasks, part.tasks] = sums.mT
    return gram


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """The products ``[n, m]`` of all pairs of rows, in float64."""
    if not first.is_floating_point():  # rows of an identity matrix
        return (first[:, None] == second).double()
    wide = torch.promote_types(first.dtype, torch.float32)
    chains = zip(torch.split(first.to(wide), _CHAIN, 1), torch.split(second.to(wide), _CHAIN, 1), strict=True)
    total = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for a, b in chains:
        total += a @ b.mT
    return total

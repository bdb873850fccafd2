"""The backward of all tasks, segment by segment: the gradients of only a few leaves live at a time.

The gradients of the tasks at the edges between two segments wait as rows, one for each task. A segment takes the rows
at its upper edges, by vector-Jacobian products task by task or for all tasks at once (``torch.vmap``), down to its
lower edges and its leaves. There they are folded into the Gramian and freed.

With weights the same backward yields ``Σ_t w_t ∂L_t`` of every leaf. From where no input lies below, one weighted row
takes the place of the tasks' rows.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradstats import ops
from gradstats.collect.fold import Fold
from gradstats.collect.graph import Edge, cross, pull, zero_gradient
from gradstats.collect.job import Job
from gradstats.collect.plan import SMALL_BYTES, Plan, Step, make_plan, takes_basis
from gradstats.collect.segments import Segment, join, whole
from gradstats.collect.survey import Linear, Survey

_log = logging.getLogger(__name__)

#: Sizes of jobs (:func:`_sizes`) whose plans have left them uncut, so that those of later steps need no survey. A job
#: of the same sizes for which another plan were better is passed right as well. Forgotten when they are that many, as
#: of a program whose graph never is the same.
_uncut: set[tuple[int, ...]] = set()
_MOST_UNCUT = 1000

#: About what a step frees, in bytes, whose gradients are too small to be looked at.
_SMALL_STEP = 8 * SMALL_BYTES

#: The gradients of one tensor: ``[T, *shape]``, or a list with None for a task that has none.
Rows: TypeAlias = Tensor | list[Tensor | None]


def route(job: Job, *, batched: bool | None, max_bytes: int | None = None) -> tuple[Survey, Plan]:
    """The segments that a collection passes, and how.

    Args:
        job: The collection.
        batched: Pass all segments batched, or none; None leaves the choice to the plan.
        max_bytes: Bound on the predicted peak.

    Raises:
        ValueError: If no plan stays within ``max_bytes``.
    """
    make = functools.partial(
        make_plan,
        batched=batched,
        may_factor=not job.needs_gradients,
        max_bytes=max_bytes,
        spare_cuts=job.weights is not None,  # one backward takes the place of another
    )
    may_cut = batched is not None or max_bytes is not None or not _is_small(*_sizes(job))
    look = functools.partial(Survey, job.graph, job.targets, job.inputs, job.names)
    here = look(may_cut=may_cut)
    if any(_changes(edge, edge) for edge in _taken_above_leaves(here.segments)):
        here = look(may_cut=False)  # as a hook there would run once more on the way to the leaf
    plan = make(here.facts)
    factored = [leaf for step, segments in _by_step(here, plan) for leaf in _factored(step, segments)]
    hooked = [leaf for leaf in factored if _is_hooked(here.linear[leaf])]
    if hooked:
        here.form(hooked)
        plan = make(here.facts)
    return here, plan


def _sizes(job: Job) -> tuple[int, ...]:
    """The number of tasks, bytes of the gradients of one, and what else tells one job of a program from another."""
    graph = job.graph
    leaves = (graph.leaves[node] for node in job.targets if node in graph.leaves)
    num_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    counts = len(graph.children), len(job.inputs), len(job.targets)
    return len(job.losses), num_bytes, *counts, job.weights is not None, job.needs_gradients


def _is_small(tasks: int, num_bytes: int, *_: int) -> bool:
    """Whether the gradients of all tasks take so little together that looking for segments costs more."""
    return tasks * num_bytes <= SMALL_BYTES


@torch.no_grad()
def collect_walking(
    job: Job, *, batched: bool | None, max_bytes: int | None = None, retain_graph: bool
) -> tuple[Fold, dict[Tensor, Tensor] | None, str]:
    """Collect segment by segment.

    Args:
        job: The collection.
        batched: As for :func:`route`; if True, it is an error where ``vmap`` refuses.
        max_bytes: As for :func:`route`.
        retain_graph: Whether the graph is kept.

    Returns:
        The Gramian; with ``job.weights`` the weighted gradient of every leaf that has one (else None); the method:
        "batched" if all segments below the heads were passed so, else "blockwise".
    """
    sizes = _sizes(job) if batched is None and max_bytes is None else None
    linear: Mapping[Node, Linear] = {}
    if sizes and (sizes in _uncut or _is_small(*sizes)):
        _keep_freed(_SMALL_STEP)
        stages = [_single_stage(job)]
    else:
        survey, plan = route(job, batched=batched, max_bytes=max_bytes)
        _keep_freed(plan.bytes)
        stages, linear = _make_stages(job, survey, plan), survey.linear
        if sizes and _is_uncut(stages):
            if len(_uncut) == _MOST_UNCUT:
                _uncut.clear()
            _uncut.add(sizes)
            stages = [_single_stage(job)]
    walk = _Walk(job, stages, linear, must_batch=batched is True)
    walk.run(retain_graph)
    weighted = None if job.weights is None else walk.weighted_leaves()
    return walk.fold, weighted, "batched" if walk.all_batched else "blockwise"


@functools.cache
def _keep_freed(num_bytes: int) -> None:
    """Let the C library keep about so much freed memory, which every step frees and the next one takes again.

    glibc gives back to the system what exceeds the largest block freed so far (32 MiB at most), and taking it again
    costs more page by page than filling it. This block is never touched.
    """
    torch.empty(min(num_bytes, (1 << 25) - (1 << 16)), dtype=torch.uint8, device="cpu")


def _by_step(here: Survey, plan: Plan) -> Iterator[tuple[Step, list[Segment]]]:
    """Each step with the segments that it joins."""
    first = 0
    for step in plan.steps:
        yield step, here.segments[first : first + step.segments]
        first += step.segments


def _taken_above_leaves(segments: Iterable[Segment]) -> Iterator[Edge]:
    """The edges at which gradients of leaves are taken that later segments use as well."""
    for segment in segments:
        for leaf, edges in segment.leaves.items():
            yield from (edge for edge in edges if edge[0] is not leaf)


def _leaves(segments: Iterable[Segment]) -> list[Node]:
    """The leaves of joined segments, in the order of their facts."""
    return [leaf for segment in segments for leaf in segment.leaves]


def _factored(step: Step, segments: Iterable[Segment]) -> list[Node]:
    leaves = _leaves(segments)
    return [leaves[k] for k in sorted(step.factored)]


def _is_hooked(layer: Linear) -> bool:
    """Whether a hook of the user changes a gradient on its way from the output of ``layer`` to the weight.

    What is asked for amid a segment is seen before it passes the hooks there; those of a weight would be left out.
    """
    leaf = (layer.leaf, 0)
    weight = (layer.use.path[0], 0) if layer.use.path else leaf
    return _changes(layer.output, layer.output) or _changes(weight, leaf)


def _changes(edge: Edge, target: Edge) -> bool:
    """Whether more happens to a gradient from ``edge`` to ``target``, the same or below, than that it is rearranged."""
    probe = zero_gradient(edge)
    try:
        (seen,) = pull([edge], [probe], [target], retain_graph=True)
    except Exception:  # a hook that writes into what it is given
        return True
    return seen is None or seen.data_ptr() != probe.data_ptr()


@dataclass
class _Target:
    """An edge whose gradients are asked for.

    Attributes:
        edge: The edge.
        tasks: Bits of the tasks that may have a gradient there.
        leaf: The leaf that it is a gradient of, if it is.
        rows: What has been found, where it waits for that of other tasks; None where it is settled at once.
        is_sum: Whether one weighted row stands for all tasks.
    """

    edge: Edge
    tasks: int
    leaf: Node | None
    rows: Rows | None
    is_sum: bool = False


@dataclass
class _Stage:
    """One step of the plan, and what waits for it.

    Attributes:
        segment: What is passed.
        batched: All tasks at a time, or task by task.
        passes: The leaves whose gradients are formed, in groups; every group takes a pass.
        factored: The leaves whose gradients are not formed.
        activations: Inputs that are made in this segment.
        sums: Whether one weighted row stands for all tasks, as no input lies below.
        losses: The rows at losses that lie within.
        waiting: The rows taken at the edges into the segment.
    """

    segment: Segment
    batched: bool
    passes: list[list[Node]]
    factored: list[Node]
    activations: list[Edge]
    sums: bool
    losses: dict[Edge, Rows] = field(default_factory=dict)
    waiting: dict[Edge, Rows] = field(default_factory=dict)

    @property
    def entering(self) -> list[Rows]:
        """The rows that enter the segment, those that wait and then those at losses."""
        return [*self.waiting.values(), *self.losses.values()]


def _is_uncut(stages: Sequence[_Stage]) -> bool:
    """Whether nothing sets these apart from :func:`_single_stage` but a cut right below the heads."""
    return len(stages) <= 2 and not any(stage.batched or stage.factored or stage.sums for stage in stages)


def _single_stage(job: Job) -> _Stage:
    """All that there is to pass, task by task."""
    segment = whole(job.graph, job.targets)
    return _Stage(segment, False, [list(segment.leaves)], [], _activations(job, segment), False)


def _make_stages(job: Job, here: Survey, plan: Plan) -> list[_Stage]:
    ends = [i == step.segments - 1 for step in plan.steps for i in range(step.segments)]
    above_inputs = job.graph.with_any_below(node for node, _ in job.edges)
    stages = []
    joined = join(job.graph, here.segments, ends)
    for segment, (step, parts) in zip(joined, _by_step(here, plan), strict=True):
        if job.weights is not None and above_inputs.isdisjoint(segment.nodes):
            # A single row, of which nothing is folded in.
            stages.append(_Stage(segment, False, [list(segment.leaves)], [], [], True))
        else:
            leaves = _leaves(parts)
            passes = [list(dict.fromkeys(leaves[k] for k in group)) for group in step.passes]
            activations = _activations(job, segment)
            stages.append(_Stage(segment, step.batched, passes, _factored(step, parts), activations, False))
    return stages


def _activations(job: Job, segment: Segment) -> list[Edge]:
    """The inputs that are made in ``segment``."""
    nodes = set(segment.nodes)
    return [edge for edge in job.edges if edge[0] in nodes]


class _Walk:
    """One collection on its way.

    Args:
        job: The collection.
        stages: What is passed, losses first.
        linear: The layers of leaves whose gradients are not formed.
        must_batch: Whether it is an error where ``vmap`` refuses.
    """

    def __init__(
        self, job: Job, stages: list[_Stage], linear: Mapping[Node, Linear] | None = None, *, must_batch: bool = False
    ) -> None:
        self.fold = job.new_fold()
        self.all_batched = True
        self._weighted: dict[Node, Tensor] = {}
        self._weights = () if job.weights is None else job.weights.unbind()
        self._job = job
        self._graph = job.graph
        self._must_batch = must_batch
        self._linear = linear or {}
        self._inputs = {edge: k for k, edge in enumerate(job.edges)}
        self._leaf_rows: dict[Node, list[Tensor | None]] = {}
        self._stages = stages
        self._stage_of = {node: stage for stage in stages for node in stage.segment.nodes}

    def run(self, retain_graph: bool) -> None:
        for task, (edge, loss) in enumerate(zip(self._graph.roots, self._job.losses, strict=True)):
            rows = self._no_rows()
            rows[task] = torch.ones_like(loss)
            self._start(edge, rows, task)
        for stage in self._stages:
            if stage.waiting or stage.losses:
                self._pass(stage, retain_graph)
        self._fold_leaves(self._leaf_rows)  # those that no segment uses: they are losses

    def _start(self, edge: Edge, rows: list[Tensor | None], task: int) -> None:
        """Let the backward of a loss start; it may reach nothing that is asked for."""
        stage = self._stage_of.get(edge[0])
        if stage is not None:
            stage.losses[edge] = _added(stage.losses.get(edge), self._for_stage(stage, rows))
        elif edge[0] in self._job.targets:
            self._take(_Target(edge, 1 << task, edge[0], self._rows_of(edge[0])), task, rows[task])

    def weighted_leaves(self) -> dict[Tensor, Tensor]:
        """The weighted gradient of each leaf."""
        leaves = self._graph.leaves
        return {leaves[node]: grad.to(leaves[node].dtype) for node, grad in self._weighted.items()}

    def _hand_on(self, edge: Edge, rows: Rows) -> None:
        """Let the rows wait for the segment below, added to those that wait there already."""
        if _present(rows):  # a custom backward may return nothing
            stage = self._stage_of[edge[0]]
            stage.waiting[edge] = _added(stage.waiting.get(edge), self._for_stage(stage, rows))

    def _for_stage(self, stage: _Stage, rows: Rows) -> Rows:
        return [self._combined(rows)] if stage.sums and len(rows) > 1 else rows

    # ---- one segment -----------------------------------------------------------------------------------------------

    def _pass(self, stage: _Stage, retain_graph: bool) -> None:
        for i, leaves in enumerate(stage.passes, start=1):
            is_last = i == len(stage.passes)
            targets = self._targets(stage, leaves, with_rest=is_last)
            keep = retain_graph or not is_last
            if not (stage.batched and self._try_batched(stage, targets, keep)):
                self._pull_by_task(stage, targets, keep)
                self.all_batched = self.all_batched and not any(map(self._graph.is_shared, stage.segment.nodes))
            # A leaf whose own edge is asked for is used by no lower segment.
            self._fold_leaves([target.leaf for target in targets if target.leaf is target.edge[0]])
            if is_last:
                self._settle_rest(stage, {target.edge: target.rows for target in targets if target.rows is not None})
                stage.waiting.clear()

    def _targets(self, stage: _Stage, leaves: Iterable[Node], *, with_rest: bool) -> list[_Target]:
        """What to ask of a pass: the gradients of ``leaves``, and with the last pass of a segment the rest."""
        reached_by = self._graph.reached_by

        def target(edge: Edge, tasks: int, leaf: Node | None = None) -> _Target:
            if stage.sums:
                return _Target(edge, 1, leaf, None if leaf else [None], is_sum=True)
            rows = self._no_rows() if leaf is None else self._rows_of(leaf) if edge[0] is leaf else None
            return _Target(edge, tasks, leaf, rows)

        found = [target(edge, reached_by[leaf], leaf) for leaf in leaves for edge in stage.segment.leaves[leaf]]
        if with_rest:
            outputs = [self._linear[leaf].output for leaf in stage.factored]
            rest = {edge: reached_by[edge[0]] for edge in (*outputs, *stage.activations)} | dict(stage.segment.outs)
            found += [target(edge, tasks) for edge, tasks in rest.items()]
        return found

    def _no_rows(self) -> list[Tensor | None]:
        return [None] * len(self._job.losses)

    def _rows_of(self, leaf: Node) -> list[Tensor | None] | None:
        """Where gradients of ``leaf`` wait to be folded in with those of other tasks; None if they need not."""
        if (leaf, 0) not in self._inputs or not self._graph.is_shared(leaf):
            return None
        return self._leaf_rows.setdefault(leaf, self._no_rows())

    def _pull_by_task(self, stage: _Stage, targets: Sequence[_Target], keep: bool) -> None:
        tasks = sorted({task for rows in stage.entering for task in _present(rows)})
        for task in tasks:
            entering = self._below(stage, [rows[task] for rows in stage.entering])
            wanted = [target for target in targets if target.tasks >> task & 1]
            if not (entering and wanted):
                continue
            edges = [target.edge for target in wanted]
            grads = pull([*entering], [*entering.values()], edges, retain_graph=keep or task != tasks[-1])
            for target, grad in zip(wanted, grads, strict=True):
                self._take(target, task, grad)

    def _try_batched(self, stage: _Stage, targets: Sequence[_Target], keep: bool) -> bool:
        """Pass all tasks at once; whether that was possible."""
        tasks = _present(stage.entering[0])
        if any(_present(rows) != tasks for rows in stage.entering):
            return False
        found: list[_Target] = []

        def pull_all(*rows: Tensor) -> tuple[Tensor, ...]:
            entering = self._below(stage, rows)
            edges = [target.edge for target in targets]
            # Kept for a second try, task by task, after which it is freed; or with the losses.
            grads = pull([*entering], [*entering.values()], edges, retain_graph=keep or not self._must_batch)
            found.extend(target for target, grad in zip(targets, grads, strict=True) if grad is not None)
            return tuple(grad for grad in grads if grad is not None)

        try:
            with warnings.catch_warnings():
                # Operators without a batching rule run task by task: no reason to alarm the user of a model.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                # "same": what a backward draws at random (a recomputed dropout mask, say) is one draw for all tasks.
                blocks = torch.vmap(pull_all, randomness="same")(*(_stacked(rows, tasks) for rows in stage.entering))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self._must_batch:
                raise
            _say_refused(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            return False
        for target, block in zip(found, blocks, strict=True):
            if target.leaf is None and len(tasks) == len(self._job.losses):
                target.rows = block
            else:
                for task, row in zip(tasks, block, strict=True):
                    self._take(target, task, row)
        return True

    def _below(self, stage: _Stage, rows: Iterable[Tensor | None]) -> dict[Edge, Tensor]:
        """The gradients to start a pass from, one row of each of ``stage.entering``."""
        given = zip((*stage.waiting, *stage.losses), rows, strict=True)
        present = {edge: row for edge, row in given if row is not None}
        crossed = cross(self._graph, {edge: row for edge, row in present.items() if edge not in stage.losses})
        entering = {edge: row for edge, row in crossed.items() if edge[0] in self._stage_of}
        entering.update((edge, row) for edge, row in present.items() if edge in stage.losses)
        return entering

    # ---- what a pass has found -------------------------------------------------------------------------------------

    def _take(self, target: _Target, task: int, grad: Tensor | None) -> None:
        leaf, rows = target.leaf, target.rows
        if grad is None:
            return
        if rows is not None:
            assert isinstance(rows, list)
            rows[task] = _sum(rows[task], grad)
            return
        assert leaf is not None
        own = (leaf, 0)
        if target.edge != own:  # below it there is only the leaf
            (grad,) = pull([target.edge], [grad], [own], retain_graph=True)
            self._take(replace(target, edge=own, rows=self._rows_of(leaf)), task, grad)
            return
        if self._job.weights is not None:
            self._add_weighted(leaf, grad, None if target.is_sum else task)
        if own in self._inputs:
            self.fold.add_row(self._inputs[own], task, grad)

    def _fold_leaves(self, leaves: Iterable[Node | None]) -> None:
        """Fold in what has been found of ``leaves``, and with weights add it up."""
        found = {leaf: rows for leaf in list(leaves) if leaf and (rows := self._leaf_rows.pop(leaf, None))}
        if not found:
            return
        members, weights = [self._inputs[leaf, 0] for leaf in found], self._job.weights
        combined = self.fold.add_columns(members, list(found.values()), weights)
        if weights is None:
            return
        for k, (leaf, rows) in zip(members, found.items(), strict=True):
            if k in combined:
                self._weighted[leaf] = combined[k]
                continue
            for task, row in enumerate(rows):
                if row is not None:
                    self._add_weighted(leaf, row, task)

    def _settle_rest(self, stage: _Stage, found: Mapping[Edge, Rows]) -> None:
        for leaf in stage.factored:
            self._fold_factored(leaf, found[self._linear[leaf].output])
        for edge in stage.activations:
            rows = _added(stage.waiting.get(edge), found[edge])
            self.fold.add_columns([self._inputs[edge]], [[*rows]])
        for edge in stage.segment.outs:
            self._hand_on(edge, found[edge])

    # ---- linear layers whose weight gradients are not formed -------------------------------------------------------

    def _fold_factored(self, leaf: Node, rows: Rows) -> None:
        """Fold in the gradients of a layer's weight, from the cotangents of its output."""
        layer, weights = self._linear[leaf], self._job.weights
        tasks = _present(rows)
        if not tasks:
            return
        cotangents = [layer.rows.right(row) for row in rows if row is not None]
        gram, combined = _products(layer.inputs, cotangents, None if weights is None else weights[tasks])
        self.fold.add_gram(self._inputs[leaf, 0], gram, tasks)
        if combined is not None:
            assert layer.rows.arrange is not None
            self._add_weighted(leaf, layer.use.restore(layer.rows.arrange(combined)))

    # ---- the weighted sum ------------------------------------------------------------------------------------------

    def _add_weighted(self, leaf: Node, grad: Tensor, task: int | None = None) -> None:
        """Add ``w_t`` times a task's gradient, or a weighted one as it is, at least in float32."""
        wide = grad if grad.dtype.itemsize >= 4 else grad.float()
        total = self._weighted.get(leaf)
        if task is None:
            self._weighted[leaf] = wide if total is None else total + wide
            return
        weight = self._weights[task]  # of no dimension: the result is no wider than the gradient
        if total is None or wide.layout != torch.strided or total.layout != torch.strided:
            self._weighted[leaf] = weight * wide if total is None else total + weight * wide
        else:
            total.addcmul_(wide, weight)

    def _combined(self, rows: Rows) -> Tensor:
        """``Σ_t w_t row_t``, accumulated in float32 at least."""
        assert self._job.weights is not None
        tasks = _present(rows)
        block = _stacked(rows, tasks)
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        total: Tensor = torch.tensordot(self._job.weights[tasks].to(wide), wide, 1)
        return total.to(block.dtype)


def _products(inputs: Tensor, cotangents: list[Tensor], weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The Gramian of the gradients ``DᵀA`` of inputs ``A`` and cotangents ``D``, and with weights their weighted sum.

    With ``Aᵀ = QR`` they are ``(DᵀRᵀ)Qᵀ``, and the rows of ``Qᵀ`` are orthonormal: ``DᵀRᵀ`` has the same products.
    """
    (rows, fan_in), fan_out = inputs.shape, cotangents[0].shape[1]
    if takes_basis(len(cotangents), rows, fan_in, fan_out):
        triangle = torch.linalg.qr(inputs.double().mT, mode="r").R.to(torch.promote_types(inputs.dtype, torch.float32))
        gram = ops.linear_gram(triangle.mT, cotangents)
        if weights is None:
            return gram, None
        # As of a single task, which is faster than torch's product.
        summed = ops.combine(cotangents, len(cotangents), weights)
        return gram, ops.linear_gram_combine(inputs, summed, weights.new_ones(1))[1]
    if weights is None:
        return ops.linear_gram(inputs, cotangents), None
    return ops.linear_gram_combine(inputs, cotangents, weights)


# ---- rows -----------------------------------------------------------------------------------------------------------


def _present(rows: Rows) -> list[int]:
    """The tasks that have a row."""
    return [task for task, row in enumerate(rows) if row is not None]


def _stacked(rows: Rows, tasks: Sequence[int]) -> Tensor:
    """The rows of ``tasks``, all of which have one, as ``[n, *shape]``."""
    if isinstance(rows, Tensor):
        return rows if len(tasks) == len(rows) else rows[tasks]
    return torch.stack([row for task in tasks if (row := rows[task]) is not None])


def _added(present: Rows | None, rows: Rows) -> Rows:
    if present is None:
        return rows
    if isinstance(present, Tensor) and isinstance(rows, Tensor):
        return present + rows
    return [_sum(a, b) for a, b in zip(present, rows, strict=True)]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@functools.cache
def _say_refused(reason: str) -> None:
    """Said once for each reason."""
    _log.warning("torch.vmap refuses a part of the backward, which is passed task by task instead; reason: %s", reason)

"""How a collection passes the segments of a graph: a pure function of sizes.

Every segment is passed in one of two ways. *Task by task* runs it ``T`` times, each time with tensors small enough for
the caches. *Batched* runs it once with the gradients of all tasks beside each other (``torch.vmap``), which spares the
launching of operators where they are small, and makes one large matrix product of ``T`` thin ones.

The gradients of a weight with respect to ``T`` tasks are *formed*, ``T`` times its size, or, for a linear layer, stay
*factored*: the cotangents of its output wait for those of all tasks, and the gradients are formed and multiplied part
by part in cache (:func:`gradstats.ops.linear_gram`), in an orthonormal basis of the layer's inputs where these are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

#: Largest gradient of one task in a segment that is still passed batched: ``T`` of them leave the caches.
_BATCHED_BYTES = 1 << 19
#: Memory that is not worth time: up to here segments are joined, or not looked for, to save time on the host, and by so
#: much cotangents that wait may exceed the gradients that are not formed.
SMALL_BYTES = 1 << 20
#: What one operation of a QR decomposition in float64 costs in those of a matrix product in float32, as measured.
_QR_COST = 8
#: What one operation of ``ops.linear_gram`` costs in those of the formed way in float32, as measured, and the multiples
#: of outputs and inputs in which it works.
_IN_CACHE_COST, _OUTPUTS, _INPUTS = 0.5, 8, 32
#: So many times the memory may be taken in place of cutting, where time counts more.
_UNCUT = 4 / 3


@dataclass(frozen=True)
class LeafFacts:
    """A leaf whose gradients are taken in a segment.

    Attributes:
        name: Name for people.
        numel: Number of its entries.
        itemsize: Bytes of an entry.
        products: Multiply-adds that one task's gradient takes.
        factors: Rows, fan-in and fan-out of the linear layer that alone uses it, if one does.
        enters: Whether the cotangents of that layer's output are gradients that enter the segment, and so wait anyway.
        cost: What a multiply-add of torch's matrix products costs in the gradient's dtype, relative to float32.
    """

    name: str
    numel: int
    itemsize: int
    products: int
    factors: tuple[int, int, int] | None = None
    enters: bool = False
    cost: float = 1.0


@dataclass(frozen=True)
class SegmentFacts:
    """A segment.

    Attributes:
        tasks: How many tasks' gradients pass it.
        nodes: Number of its autograd nodes.
        batches_well: Whether ``torch.vmap`` loses nothing on any of them.
        bytes_in: Bytes of one task's gradients where it begins.
        bytes_out: Bytes of one task's gradients that it hands on.
        widest: Bytes of the largest gradient of one task within.
        leaves: The leaves whose gradients are taken here.
    """

    tasks: int
    nodes: int
    batches_well: bool
    bytes_in: int
    bytes_out: int
    widest: int
    leaves: tuple[LeafFacts, ...]

    def joined(self, other: SegmentFacts) -> SegmentFacts:
        """This segment and the one below it as one."""
        return SegmentFacts(
            max(self.tasks, other.tasks),
            self.nodes + other.nodes,
            self.batches_well and other.batches_well,
            self.bytes_in,
            other.bytes_out,
            max(self.widest, other.widest),
            self.leaves + tuple(replace(leaf, enters=False) for leaf in other.leaves),
        )


@dataclass(frozen=True)
class Step:
    """How one segment, or several joined ones, are passed.

    Attributes:
        segments: How many of the segments that there are it passes, from where the last step ended.
        batched: All tasks at a time, or task by task.
        factored: Which of its leaves' gradients are not formed, by their position in the facts.
        passes: Groups of leaves whose gradients are formed together, each at the cost of a further pass.
        facts: The facts of the segments, joined.
    """

    segments: int
    batched: bool
    factored: frozenset[int]
    passes: tuple[tuple[int, ...], ...]
    facts: SegmentFacts

    @property
    def bytes(self) -> int:
        """Predicted bytes that are live at once, above the graph, the parameters and their ``.grad``."""
        facts, tasks = self.facts, self.facts.tasks
        formed = max(sum(_formed_bytes(facts.leaves[k]) for k in group) for group in self.passes)
        factored = sum(_factored_bytes(facts.leaves[k]) for k in self.factored)
        copied = facts.bytes_in if self.batched else 0  # to stand beside each other
        passing = 2 * facts.widest * (tasks if self.batched else 1)
        return tasks * (facts.bytes_in + facts.bytes_out + formed + factored + copied) + passing

    @property
    def operations(self) -> int:
        """Predicted multiply-adds in weighted layers and in products of their gradients."""
        facts, tasks = self.facts, self.facts.tasks
        onward = tasks * sum(leaf.products for leaf in facts.leaves) * len(self.passes)
        return onward + sum(
            _factored_operations(leaf, tasks) if k in self.factored else _formed_operations(leaf, tasks)
            for k, leaf in enumerate(facts.leaves)
        )


@dataclass(frozen=True)
class Plan:
    """The steps of a collection, losses first."""

    steps: tuple[Step, ...]

    @property
    def bytes(self) -> int:
        """Predicted peak above the graph, the parameters and their ``.grad``."""
        return max(step.bytes for step in self.steps)

    @property
    def operations(self) -> int:
        """Predicted multiply-adds in weighted layers and in products of their gradients."""
        return sum(step.operations for step in self.steps)

    def __str__(self) -> str:
        """A table with a line for each step."""
        lines = [f"{'tasks':>5}  {'passed':<12} {'nodes':>5}  {'MiB':>8}  {'10^6 op.':>9}  leaves (* not formed)"]
        for step in self.steps:
            passed = (
                "all at once"
                if step.batched
                else "one by one"
                if len(step.passes) == 1
                else f"{len(step.passes)} times"
            )
            lines.append(
                f"{step.facts.tasks:>5}  {passed:<12} {step.facts.nodes:>5}  {step.bytes / 2**20:>8.1f}  "
                f"{step.operations / 1e6:>9.0f}  {_shortened([_label(step, k) for k in range(len(step.facts.leaves))])}"
            )
        return "\n".join([*lines, f"peak {self.bytes / 2**20:.1f} MiB, {self.operations / 1e6:.0f}e6 operations"])


def _label(step: Step, k: int) -> str:
    leaf = step.facts.leaves[k]
    return (leaf.name or f"[{leaf.numel}]") + ("*" if k in step.factored else "")


def _shortened(labels: Sequence[str], most: int = 6) -> str:
    return ", ".join(labels[:most]) + (f", and {len(labels) - most} more" if len(labels) > most else "")


def make_plan(
    segments: Sequence[SegmentFacts],
    *,
    batched: bool | None = None,
    may_factor: bool = True,
    max_bytes: int | None = None,
    spare_cuts: bool = False,
) -> Plan:
    """The fastest plan, as far as sizes tell, among the leanest ones or those within ``max_bytes``.

    Args:
        segments: The segments that there are, losses first.
        batched: Pass all of them batched, or none; None chooses for each.
        may_factor: Whether gradients may stay factored.
        max_bytes: Bound on the predicted peak.
        spare_cuts: Whether to pass all below the heads in one step, task by task, where a third more memory suffices: a
            cut takes about 0.1 ms a task on the host, and spares little where the last layers hold most parameters.

    Raises:
        ValueError: If no plan stays within ``max_bytes``.
    """
    free = _greedy(segments, batched, may_factor, None)
    if max_bytes is None or free.bytes <= max_bytes:
        uncut = _uncut(free) if spare_cuts else free
        return uncut if uncut.bytes <= min(_UNCUT * free.bytes, max_bytes or math.inf) else free
    tight = _greedy(segments, batched, may_factor, max_bytes)
    if tight.bytes > max_bytes:
        least = min(free.bytes, tight.bytes)
        raise ValueError(f"max_bytes: the leanest plan needs about {least} bytes, got {max_bytes}")
    return tight


def _greedy(segments: Sequence[SegmentFacts], batched: bool | None, may_factor: bool, max_bytes: int | None) -> Plan:
    """Each segment in the way that is best for it, and neighbours joined while that needs no more memory."""
    single = [_lean_step(facts, batched, may_factor, max_bytes) for facts in segments]
    if may_factor and any(leaf.factors for facts in segments for leaf in facts.leaves):
        room = _greedy(segments, batched, False, None).bytes + SMALL_BYTES
        room = room if max_bytes is None else min(room, max_bytes)
        single = [_fast_step(step, room) for step in single]
    bound = max([SMALL_BYTES, *(step.bytes for step in single)])
    if max_bytes is not None:
        bound = min(bound, max_bytes)
    steps = [single[0]]
    for step in single[1:]:
        joint = _joint_step(steps[-1], step)
        # The heads stay apart: each task passes its own alone. What waits between two segments may outweigh both.
        if joint is not None and len(steps) > 1 and joint.bytes <= max(bound, steps[-1].bytes, step.bytes):
            steps[-1] = joint
        else:
            steps.append(step)
    return Plan(tuple(steps))


def _uncut(plan: Plan) -> Plan:
    """The plan with all that is below the heads as one step, where its steps are passed task by task."""
    heads, *rest = plan.steps
    if len(rest) < 2 or any(step.batched or step.factored for step in rest):
        return plan
    whole: Step | None = rest[0]
    for step in rest[1:]:
        whole = whole and _joint_step(whole, step)
    return plan if whole is None else Plan((heads, whole))


def _lean_step(facts: SegmentFacts, batched: bool | None, may_factor: bool, max_bytes: int | None) -> Step:
    """One segment, in the faster way; what is over ``max_bytes`` in the leaner one."""
    fast = facts.batches_well and facts.widest <= _BATCHED_BYTES and facts.tasks > 1
    factored = frozenset(
        k
        for k, leaf in enumerate(facts.leaves)
        if may_factor and _is_faster_factored(leaf, facts.tasks) and _factored_bytes(leaf) <= _formed_bytes(leaf)
    )
    formed = tuple(k for k in range(len(facts.leaves)) if k not in factored)
    step = Step(1, fast if batched is None else batched, factored, (formed,), facts)
    if max_bytes is None or step.bytes <= max_bytes:
        return step
    if batched is None:
        step = Step(1, False, factored, (formed,), facts)
    if step.bytes <= max_bytes:
        return step
    # Cotangents wait through all passes, so that forming these gradients as well, in a pass of theirs, may need less.
    unfactored = replace(step, factored=frozenset(), passes=(tuple(range(len(facts.leaves))),))
    return min((_in_passes(way, max_bytes) for way in (step, unfactored)), key=lambda way: way.bytes)


def _fast_step(step: Step, max_bytes: int) -> Step:
    """The step with further gradients factored, though that takes more memory, as far as ``max_bytes`` allow."""
    leaves = step.facts.leaves
    for k in sorted(step.passes[0], key=lambda k: -leaves[k].products):
        if len(step.passes) == 1 and _is_faster_factored(leaves[k], step.facts.tasks):
            passes = (tuple(other for other in step.passes[0] if other != k),)
            faster = replace(step, factored=step.factored | {k}, passes=passes)
            step = faster if faster.bytes <= max_bytes else step
    return step


def _in_passes(step: Step, max_bytes: int) -> Step:
    """The step with its formed leaves in groups, largest first, each as large as fits, or of one leaf."""
    facts, (formed,) = step.facts, step.passes
    sizes = {k: _formed_bytes(facts.leaves[k]) for k in formed}
    room = sum(sizes.values()) + (max_bytes - step.bytes) // facts.tasks
    groups: list[list[int]] = []
    left = 0
    for k in sorted(formed, key=lambda k: -sizes[k]):
        if not groups or sizes[k] > left:
            groups.append([])
            left = room
        groups[-1].append(k)
        left -= sizes[k]
    return replace(step, passes=tuple(tuple(group) for group in groups) or ((),))


def _joint_step(upper: Step, lower: Step) -> Step | None:
    """Both steps as one, where they are passed alike."""
    if upper.batched != lower.batched or len(upper.passes) > 1 or len(lower.passes) > 1:
        return None
    if upper.facts.tasks != lower.facts.tasks:
        return None
    shift = len(upper.facts.leaves)
    return Step(
        upper.segments + lower.segments,
        upper.batched,
        upper.factored | {k + shift for k in lower.factored},
        (upper.passes[0] + tuple(k + shift for k in lower.passes[0]),),
        upper.facts.joined(lower.facts),
    )


def takes_basis(tasks: int, rows: int, fan_in: int, fan_out: int) -> bool:
    """Whether gradients that stay factored are multiplied in an orthonormal basis of the inputs of their layer."""
    return rows < fan_in and _basis_operations(tasks, rows, fan_in, fan_out) < _linear_operations(
        tasks, rows, fan_in, fan_out
    )


def _is_faster_factored(leaf: LeafFacts, tasks: int) -> bool:
    if leaf.factors is None:
        return False
    rows, fan_in, fan_out = leaf.factors
    if takes_basis(tasks, rows, fan_in, fan_out):
        factored = _basis_operations(tasks, rows, fan_in, fan_out)
    else:
        factored = _linear_operations(tasks, rows, _padded(fan_in, _INPUTS), _padded(fan_out, _OUTPUTS))
    return _IN_CACHE_COST * factored < leaf.cost * _linear_operations(tasks, rows, fan_in, fan_out)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _formed_bytes(leaf: LeafFacts) -> int:
    return leaf.numel * leaf.itemsize


def _factored_bytes(leaf: LeafFacts) -> int:
    """Of the cotangents."""
    rows, _, fan_out = leaf.factors or (0, 0, 0)
    return 0 if leaf.enters else rows * fan_out * leaf.itemsize


def _formed_operations(leaf: LeafFacts, tasks: int) -> int:
    return tasks * leaf.products + tasks * (tasks + 1) // 2 * leaf.numel


def _factored_operations(leaf: LeafFacts, tasks: int) -> int:
    factors = leaf.factors or (0, 0, 0)
    return _basis_operations(tasks, *factors) if takes_basis(tasks, *factors) else _linear_operations(tasks, *factors)


def _linear_operations(tasks: int, rows: int, fan_in: int, fan_out: int) -> int:
    """Of ``ops.linear_gram``."""
    return (tasks * rows + tasks * (tasks + 1) // 2) * fan_in * fan_out


def _basis_operations(tasks: int, rows: int, fan_in: int, fan_out: int) -> int:
    return _QR_COST * 2 * rows * rows * fan_in + _linear_operations(tasks, rows, rows, fan_out)

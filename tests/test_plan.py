"""The cost model of a collection, a pure function of sizes, and how it shows in a collection."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracle import Heads, assert_gram, check, plain_gram
from torch import nn

import gradstats
from gradstats.collect import walk
from gradstats.collect.driver import _make_job
from gradstats.collect.plan import LeafFacts, Plan, SegmentFacts, make_plan
from gradstats.collect.walk import route

MIB = 2**20


def layer(rows: int, fan_in: int, fan_out: int) -> LeafFacts:
    return LeafFacts("w", fan_in * fan_out, 4, rows * fan_in * fan_out, (rows, fan_in, fan_out))


def segment(*leaves: LeafFacts, tasks: int = 8, width: int = 1 << 18, **changes: object) -> SegmentFacts:
    facts = SegmentFacts(tasks, 3, True, width, width, width, leaves)
    return dataclasses.replace(facts, **changes)


HEADS = segment(tasks=1, batches_well=False)


@pytest.mark.parametrize(
    ("facts", "batched"),
    [
        (segment(), True),
        (segment(width=4 * MIB), False),
        (segment(batches_well=False), False),
        (segment(tasks=1), False),
    ],
)
def test_thin_segments_are_batched_and_wide_ones_are_not(facts: SegmentFacts, batched: bool) -> None:
    assert make_plan([HEADS, facts]).steps[1].batched == batched
    for choice in (True, False):
        assert {step.batched for step in make_plan([HEADS, facts], batched=choice).steps} == {choice}


@pytest.mark.parametrize(
    ("rows", "tasks", "factored"),
    [(64, 32, True), (1, 2, True), (1000, 2, True), (1024, 32, True), (1400, 2, False), (2048, 32, False)],
)
def test_a_linear_layer_stays_factored_where_its_cotangents_are_no_larger(
    rows: int, tasks: int, factored: bool
) -> None:
    facts = [HEADS, segment(layer(rows, 1024, 1024), tasks=tasks)]
    plan = make_plan(facts)
    assert plan.steps[1].factored == (frozenset({0}) if factored else frozenset())
    formed = make_plan(facts, may_factor=False)
    assert formed.steps[1].factored == frozenset()
    assert plan.operations <= formed.operations
    assert plan.bytes <= formed.bytes


@pytest.mark.parametrize(("rows", "factored"), [(64, True), (200, True), (300, False), (2048, False)])
def test_where_matrix_products_are_cheap_gradients_are_formed_unless_rows_are_few(rows: int, factored: bool) -> None:
    low = dataclasses.replace(layer(rows, 1024, 1024), itemsize=2, cost=0.3)
    assert bool(make_plan([HEADS, segment(low)]).steps[1].factored) == factored


def test_a_linear_layer_too_narrow_for_the_kernel_is_formed() -> None:
    for fan_out, factored in ((8, {0}), (4, set()), (1, set())):
        assert make_plan([segment(layer(256, 256, fan_out))]).steps[0].factored == factored


def test_more_gradients_stay_factored_where_another_segment_needs_as_much_memory() -> None:
    tokens, large = segment(layer(512, 256, 256)), segment(LeafFacts("w", 10**6, 4, 10**9))
    assert make_plan([HEADS, tokens]).steps[1].factored == set()
    plan = make_plan([HEADS, tokens, large])
    assert plan.steps[1].factored == {0}
    assert plan.bytes == make_plan([HEADS, tokens, large], may_factor=False).bytes
    assert make_plan([HEADS, tokens, large], max_bytes=plan.bytes - 1).bytes < plan.bytes


def test_cotangents_that_enter_a_segment_count_once() -> None:
    entering = dataclasses.replace(layer(2048, 1024, 1024), enters=True)
    alone, below = segment(entering), segment(layer(8, 8, 8)).joined(segment(entering))
    assert make_plan([HEADS, alone]).steps[1].factored == {0}
    assert make_plan([HEADS, below]).steps[1].factored == set()


def test_what_is_no_linear_layer_is_formed() -> None:
    assert make_plan([segment(LeafFacts("norm", 64, 4, 64))]).steps[0].factored == frozenset()


def test_segments_are_joined_while_that_needs_no_more_memory() -> None:
    small, large = segment(LeafFacts("b", 100, 4, 100), width=1000), segment(LeafFacts("w", 10**6, 4, 10**9))
    plan = make_plan([HEADS, small, small, large, small, small])
    assert len(plan.steps) < 6
    assert plan.bytes <= max(make_plan([large]).bytes, MIB)
    assert [step.segments for step in make_plan([HEADS, large, large, large]).steps] == [1, 1, 1, 1]


def test_one_step_that_needs_little_more_memory_spares_cuts() -> None:
    upper, lower = (segment(LeafFacts("w", size, 4, 10**9), width=1000, batches_well=False) for size in (10**5, 10**6))
    assert [step.segments for step in make_plan([HEADS, upper, lower]).steps] == [1, 1, 1]
    plan = make_plan([HEADS, upper, lower], spare_cuts=True)
    assert [step.segments for step in plan.steps] == [1, 2]
    assert plan.bytes > make_plan([HEADS, upper, lower]).bytes
    # Not where it needs a lot more, or more than is allowed, nor where a cut costs no more for many tasks than for one.
    assert len(make_plan([HEADS, lower, lower], spare_cuts=True).steps) == 3
    assert len(make_plan([HEADS, upper, lower], spare_cuts=True, max_bytes=plan.bytes - 1).steps) == 3
    batched = [dataclasses.replace(facts, batches_well=True) for facts in (upper, lower)]
    assert len(make_plan([HEADS, *batched], spare_cuts=True).steps) == 3


facts = st.builds(
    segment,
    st.builds(layer, st.integers(1, 3000), st.integers(1, 2000), st.integers(1, 2000)),
    st.builds(LeafFacts, st.just("b"), st.integers(1, 10**6), st.sampled_from([2, 4, 8]), st.integers(1, 10**9)),
    tasks=st.integers(1, 40),
    width=st.integers(1, 10**7),
    batches_well=st.booleans(),
)


@given(st.lists(facts, min_size=1, max_size=8), st.integers(1, 10**9))
def test_a_plan_passes_every_leaf_once_within_its_budget(segments: list[SegmentFacts], max_bytes: int) -> None:
    free = make_plan(segments)
    for plan in (free, _within(segments, max_bytes)):
        if plan is None:
            continue
        assert sum(step.segments for step in plan.steps) == len(segments)
        first = 0
        for step in plan.steps:
            parts = segments[first : first + step.segments]
            first += step.segments
            assert step.facts.leaves == tuple(leaf for part in parts for leaf in part.leaves)
            formed = [k for group in step.passes for k in group]
            assert sorted([*formed, *step.factored]) == list(range(len(step.facts.leaves)))
        assert plan is free or plan.bytes <= max_bytes


def _within(segments: list[SegmentFacts], max_bytes: int) -> Plan | None:
    try:
        return make_plan(segments, max_bytes=max_bytes)
    except ValueError:
        return None


@given(st.lists(facts, min_size=1, max_size=6))
def test_the_leanest_plan_is_no_larger_than_the_free_one(segments: list[SegmentFacts]) -> None:
    free = make_plan(segments)
    assume(free.bytes > 1)
    assert make_plan(segments, max_bytes=free.bytes) == free
    with pytest.raises(ValueError, match="leanest plan") as raised:
        make_plan(segments, max_bytes=1)
    assert int(str(raised.value).split()[6]) <= free.bytes


def test_a_tight_budget_costs_passes_not_memory() -> None:
    leaves = [LeafFacts(f"w{i}", 10**6, 4, 10**8) for i in range(4)]
    plan = make_plan([HEADS, segment(*leaves)])
    assert len(plan.steps[1].passes) == 1
    tight = make_plan([HEADS, segment(*leaves)], max_bytes=plan.bytes // 2)
    assert len(tight.steps[1].passes) > 1
    assert tight.operations > plan.operations
    with pytest.raises(ValueError, match=r"max_bytes: the leanest plan needs about \d+ bytes, got 1000$"):
        make_plan([HEADS, segment(*leaves)], max_bytes=1000)


def test_under_a_tight_budget_gradients_are_formed_one_by_one_rather_than_all_cotangents_kept() -> None:
    facts = [HEADS, segment(layer(256, 256, 256), layer(256, 256, 256), width=1)]
    plan = make_plan(facts)
    assert plan.steps[1].factored == {0, 1}
    tight = make_plan(facts, max_bytes=int(0.6 * plan.bytes))
    assert tight.steps[1].factored == set()
    assert len(tight.steps[1].passes) == 2


# ---- in a collection -------------------------------------------------------------------------------------------------


def deep(tasks: int = 6) -> Heads:
    layers = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())]
    return Heads(nn.Sequential(*layers), 64, torch.randn(5, 64), tasks)


def test_explain_shows_the_plan() -> None:
    model = deep()
    losses = model()
    plan = gradstats.explain(losses, model.trunk)
    text = str(plan)
    assert "9.weight" in text
    assert "0.weight" in text
    assert f"peak {plan.bytes / MIB:.1f} MiB" in text
    assert len(text.splitlines()) == len(plan.steps) + 2
    assert not any(p.grad is not None for p in model.parameters())
    # It has computed nothing, so the graph is whole; and a metric needs the gradients themselves.
    gradstats.from_losses(losses, model.trunk, retain_graph=True)
    metric = [torch.ones_like(p) for p in model.trunk.parameters()]
    assert "*" not in str(gradstats.explain(losses, model.trunk, metric=metric)).partition("formed)")[2]
    with pytest.raises(ValueError, match="method: expected one of 'auto', 'batched', 'blockwise', which follow a plan"):
        gradstats.explain(losses, model.trunk, method="sequential")


@pytest.mark.parametrize("method", ["auto", "batched", "blockwise"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_budget_changes_the_way_and_not_the_result(method: str, fused: bool) -> None:
    model = deep()
    losses = model()
    params = list(model.trunk.parameters())
    want = plain_gram(losses.values(), params)
    grads = torch.autograd.grad(sum(losses.values()), params, retain_graph=True)
    free = gradstats.explain(losses, params, method=method)
    least = next(b for b in range(2000, free.bytes, 2000) if _fits(losses, params, method, b))
    assert least < free.bytes
    for budget in (least, (least + free.bytes) // 2):
        options = {"method": method, "max_bytes": budget, "retain_graph": True}
        model.zero_grad()
        if fused:
            stats = gradstats.backward(losses, torch.ones(len(losses)), params, **options)
            torch.testing.assert_close([p.grad for p in params], list(grads))
        else:
            stats = gradstats.from_losses(losses, params, **options)
        assert_gram(stats.gram, want)


def _fits(losses: dict[str, torch.Tensor], params: list[nn.Parameter], method: str, budget: int) -> bool:
    try:
        gradstats.explain(losses, params, method=method, max_bytes=budget)
    except ValueError:
        return False
    return True


class Tokens(nn.Module):
    """Layers that apply a weight in every way that keeps it factored, to more rows than their fan-in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(96, 200), nn.Linear(200, 96), nn.Linear(96, 150, bias=False)
        self.mixed, self.summed = (nn.Parameter(torch.randn(96, 96) / 10) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[N, tokens, 96]`` to ``[N, tokens, 150]``."""
        x = x + self.down(torch.relu(self.up(x)))
        x = torch.tanh(x @ self.mixed)
        return self.last(torch.tanh(torch.einsum("ntk,ko->nto", x, self.summed)))


@pytest.mark.parametrize("method", ["auto", "batched", "blockwise"])
def test_layers_on_more_rows_than_their_fan_in(method: str) -> None:
    model = Heads(Tokens(), 150, torch.randn(4, 60, 96), tasks=5)
    losses = model()
    plan = str(gradstats.explain(losses, model.trunk, method=method))
    for name, p in model.trunk.named_parameters():
        assert (f"{name}*" in plan) == (p.ndim == 2)
    check(model, losses, method, list(model.trunk.parameters()))


def test_what_a_plan_leaves_uncut_is_surveyed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "_uncut", set())
    trunk = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Tanh(), nn.Conv2d(20, 600, 3), nn.Flatten(2), nn.Tanh())
    model = Heads(nn.Sequential(trunk, nn.AdaptiveAvgPool1d(1), nn.Flatten()), 600, torch.randn(2, 3, 7, 7))
    assert len(gradstats.explain(model(), trunk, weights=torch.ones(3)).steps) == 2
    found = []
    for _ in range(2):
        model.zero_grad()
        stats = gradstats.backward(model(), torch.ones(3), trunk)
        found.append([stats.gram, *(p.grad for p in model.parameters())])
        monkeypatch.setattr(walk, "Survey", None)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert_gram(found[1][0], plain_gram(model().values(), list(trunk.parameters())))
    with pytest.raises(TypeError):  # the Gramian alone follows a leaner plan
        gradstats.from_losses(model(), trunk)


class Gated(nn.Linear):
    """Uses its output twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[*, i]`` to ``[*, o]``."""
        x = super().forward(x)
        return x + torch.relu(x)


@pytest.mark.parametrize(
    ("trunk", "entered"), [(Tokens(), {"last.weight", "down.weight"}), (Gated(96, 150, bias=False), set())]
)
def test_gradients_enter_a_segment_at_its_last_layer_and_beside_a_residual_connection(
    trunk: nn.Module, entered: set[str]
) -> None:
    losses = Heads(trunk, 150, torch.randn(4, 60, 96))()
    job = _make_job(list(losses.values()), trunk, None, None, None, None)
    facts = {leaf.name: leaf.enters for part in route(job, batched=False)[0].facts for leaf in part.leaves}
    assert {name for name, enters in facts.items() if enters} == entered

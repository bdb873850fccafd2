"""AutoScale beyond its closed forms: exploration, recording, diagnostics, hard losses, and resuming anywhere."""

import pytest
import torch
from torch import Tensor

from gradstats import GradStats
from gradstats.weighting import AutoScale, create

pytestmark = pytest.mark.usefixtures("one_thread")

SCALES = torch.tensor([1.0, 10.0, 1000.0], dtype=torch.float64)


def stats_of(jacobian: Tensor) -> GradStats:
    return GradStats(
        gram=jacobian @ jacobian.T,
        names=tuple(f"t{i}" for i in range(len(jacobian))),
        present=jacobian.abs().sum(1) > 0,
    )


def step_of(step: int, num_tasks: int = 3) -> tuple[Tensor, GradStats]:
    """The losses and statistics of one step, whatever came before."""
    generator = torch.Generator().manual_seed(step)
    scales = SCALES[:num_tasks]
    jacobian = scales[:, None] * torch.randn(num_tasks, 20, dtype=torch.float64, generator=generator)
    return scales * (0.5 + torch.rand(num_tasks, dtype=torch.float64, generator=generator)), stats_of(jacobian)


def drive(weighting, steps: range) -> list[Tensor]:
    """Take some steps; returns the weights of each."""
    found = []
    for step in steps:
        losses, stats = step_of(step, weighting.num_tasks)
        found.append(weighting(losses, stats if weighting.wants_stats() else None))
        if "after_step" in weighting.needs:
            weighting.after_step(0.9 * losses)
    return found


# ---- exploration by another weighting -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imtl_g", "famo", "pcgrad", "uw", "rlw", "dwa"])
def test_the_explorer_decides_in_phase_1_and_only_there(name):
    weighting = AutoScale(3, 200, explore_with=name, windows=2, samples_per_window=4)
    alone = create(name, 3)
    assert weighting.needs >= alone.needs | {"gramian"}
    found, expected = drive(weighting, range(40)), drive(alone, range(40))
    assert all(torch.equal(w, v) for w, v in zip(found, expected, strict=True))
    assert not weighting.exploring
    assert weighting.needs == frozenset()
    fixed = drive(weighting, range(40, 60))
    assert all(torch.equal(w, weighting.weights) for w in fixed)
    assert not torch.equal(weighting.weights, drive(alone, range(40, 41))[0])
    sized = weighting.weights * SCALES
    assert float(sized.max() / sized.min()) < 1.5


def test_windows_are_solved_as_without_an_explorer():
    """The steps here do not depend on the weights, so that the same windows are found."""
    plain = AutoScale(3, 200, windows=2, samples_per_window=4)
    explored = AutoScale(3, 200, windows=2, samples_per_window=4, explore_with="imtl_g")
    drive(plain, range(40))
    drive(explored, range(40))
    assert torch.equal(plain.window_weights, explored.window_weights)


def test_the_explorer_gets_a_gramian_where_it_wants_one_and_no_other():
    wanted = AutoScale(3, 200, explore_with="imtl_g", windows=2, samples_per_window=4)
    for step in range(40):
        assert wanted.wants_stats()
        drive(wanted, range(step, step + 1))
    assert not wanted.wants_stats()
    rare = AutoScale(3, 200, explore_with="famo", windows=2, samples_per_window=4)
    seen = []
    rare.explorer.register_forward_hook(lambda _module, given, _answer: seen.append(given[1]))
    drive(rare, range(40))
    assert seen == [None] * 40
    losses_only = AutoScale(3, 200, explore_with="imtl_g", cost="loss", normalize="sum")
    assert losses_only.needs == {"losses", "gramian"}
    assert losses_only.wants_stats()


def test_the_norm_of_the_aggregated_gradient_is_that_of_the_exploration():
    weighting = AutoScale(3, 100, explore_with=create("gradvac", 3, beta=0.2), windows=1, samples_per_window=5)
    squares, grams = [], []
    for step in range(20):
        losses, stats = step_of(step)
        weights = weighting(losses, stats)
        if step % 4 == 3:
            squares.append(weights @ stats.gram @ weights)
            grams.append(stats.gram)
    after = weighting.weights @ torch.stack(grams).mean(0) @ weighting.weights
    assert float(after) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-9)


def test_explorers_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"weighting: expected one of .*got 'nope'"):
        AutoScale(3, 100, explore_with="nope")
    with pytest.raises(ValueError, match="explore_with: expected one for 3 tasks, got one for 2"):
        AutoScale(3, 100, explore_with=create("slaw", 2))
    with pytest.raises(TypeError, match="explore_with: expected a name or a Weighting, got int"):
        AutoScale(3, 100, explore_with=1)
    with pytest.raises(TypeError, match="total_steps"):
        AutoScale(3, 100, explore_with="autoscale")


# ---- recording ------------------------------------------------------------------------------------------------------


def recorded(weighting: AutoScale, steps: int) -> list[int]:
    """The steps at which a Gramian is wanted."""
    found = []
    for step in range(steps):
        if weighting.wants_stats():
            found.append(step)
        drive(weighting, range(step, step + 1))
    return found


def test_a_random_schedule_records_as_many_steps_of_each_window():
    def steps(seed: int) -> list[int]:
        return recorded(AutoScale(3, 1000, windows=4, samples_per_window=5, schedule="random", seed=seed), 210)

    assert [step // 50 for step in steps(0)] == [window for window in range(4) for _ in range(5)]
    assert steps(0) == steps(0) != steps(1)
    assert len({step % 50 for step in steps(0)}) > 10  # every window has its own
    every = AutoScale(3, 100, windows=2, samples_per_window=20, schedule="random")
    assert recorded(every, 30) == list(range(20))


def test_a_random_step_that_could_not_be_recorded_is_made_up_for():
    weighting = AutoScale(3, 1000, windows=1, samples_per_window=3, schedule="random")
    first, *others = recorded(AutoScale(3, 1000, windows=1, samples_per_window=3, schedule="random"), 200)
    for step in range(200):
        losses, stats = step_of(step)
        assert weighting.wants_stats() == (step in (first, first + 1, *others))
        weighting(losses, None if step == first else stats)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "often"}, "schedule: expected one of even, random, got 'often'"),
        ({"schedule": "random", "seed": -1}, "seed: expected a non-negative integer, got -1"),
    ],
)
def test_schedules_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AutoScale(3, 100, **options)


# ---- resuming -------------------------------------------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "condition": {"cost": "condition", "predictor": "exponential"},
    "imtl_g": {"explore_with": "imtl_g"},
    "famo": {"explore_with": "famo", "cost": "loss"},
    "random": {"schedule": "random", "seed": 7},
    "gradvac": {"explore_with": "gradvac", "normalize": "sum"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("stop", [1, 17, 36, 59, 60, 65])
def test_a_run_resumes_in_the_middle_of_a_window_to_the_last_bit(options, stop, tmp_path):
    def fresh() -> AutoScale:
        return AutoScale(3, 300, windows=4, samples_per_window=5, **options)

    whole, first, second = fresh(), fresh(), fresh()
    expected = drive(whole, range(70))
    drive(first, range(stop))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    found = drive(second, range(stop, 70))
    assert all(torch.equal(w, v) for w, v in zip(found, expected[stop:], strict=True))
    assert torch.equal(second.get_extra_state(), whole.get_extra_state())
    assert {k: v.shape for k, v in fresh().state_dict().items()} == {k: v.shape for k, v in whole.state_dict().items()}

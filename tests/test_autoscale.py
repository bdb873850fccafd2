"""AutoScale beyond its closed forms: exploration, recording, diagnostics, hard losses, and resuming anywhere."""

import copy
import itertools
import logging

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from gradstats import GradStats, Scalarizer
from gradstats.weighting import AutoScale, create
from gradstats.weighting.autoscale import conditioning_log_weights, extrapolation_error, predict
from gradstats.weighting.condition import _Smoothed, least_condition

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
    found, expected = drive(weighting, range(20)), drive(alone, range(20))
    assert torch.equal(weighting.weights, alone.weights)  # at a window's end, too: accumulating loops go on with them
    found, expected = found + drive(weighting, range(20, 39)), expected + drive(alone, range(20, 39))
    assert all(torch.equal(w, v) for w, v in zip(found, expected, strict=True))
    drive(weighting, range(39, 40))
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


@pytest.mark.parametrize("name", ["imtl_g", "famo"])
def test_a_scalarizer_trains_and_resumes_with_an_explorer(name, tmp_path):
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 5), torch.randn(64, 2) * torch.tensor([1.0, 30.0])

    def train(model, scalarizer: Scalarizer, steps: int) -> int:
        """Some steps of gradient descent; how many of them recorded a Gramian."""
        optimizer, recorded = torch.optim.Adam(model.parameters(), lr=1e-2), 0
        for _ in range(steps):
            recorded += scalarizer.wants_stats()
            optimizer.zero_grad()
            errors = (model(inputs) - targets).square().mean(0)
            scalarizer(list(errors)).backward()
            optimizer.step()
            scalarizer.after_step(list((model(inputs) - targets).square().mean(0).detach()))
        return recorded

    def fresh() -> Scalarizer:
        return Scalarizer("autoscale", tasks=["a", "b"], total_steps=100, windows=2, explore_with=name)

    model, scalarizer = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)), fresh()
    early = train(model, scalarizer, 13)
    torch.save(scalarizer.state_dict(), tmp_path / "scalarizer.pt")
    resumed, same_model = fresh(), copy.deepcopy(model)
    resumed.load_state_dict(torch.load(tmp_path / "scalarizer.pt", weights_only=True))
    late = train(model, scalarizer, 12)
    train(same_model, resumed, 12)
    assert early + late == (20 if name == "imtl_g" else 2)
    assert torch.equal(resumed.weights, scalarizer.weights)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same_model.parameters(), strict=True))
    assert float(scalarizer.weights[0] / scalarizer.weights[1]) > 5


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


# ---- the weights of least condition number --------------------------------------------------------------------------


def problem(num_tasks: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Gramians ``[S, T, T]`` of correlated gradients whose norms span three decades, and log-weights of equal norms."""
    generator = np.random.default_rng((num_tasks, samples))
    scales = np.logspace(0, 3, num_tasks)
    common, own = (
        generator.standard_normal(4 * num_tasks),
        generator.standard_normal((samples, num_tasks, 4 * num_tasks)),
    )
    jacobians = scales[:, None] * (0.5 * common + own)
    grams = jacobians @ jacobians.transpose(0, 2, 1)
    return grams, -np.log(grams.diagonal(axis1=1, axis2=2)).mean(0) / 2


def log_condition(grams: np.ndarray, log_weights: np.ndarray) -> np.ndarray:
    """Mean of ``log κ`` over samples, at one point or at many."""
    weights = np.exp(log_weights)
    values = np.linalg.eigvalsh(weights[..., :, None] * grams * weights[..., None, :])
    return np.log(values[..., -1] / values[..., 0]).mean(-1) / 2


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("num_tasks", [2, 3, 4])
def test_no_grid_holds_better_weights(num_tasks, samples):
    """Brute force: grids of 7 points in each direction around the best point so far, ever finer."""
    grams, start = problem(num_tasks, samples)
    found, converged = least_condition(grams, start)
    grid = np.array(list(itertools.product(np.linspace(-1, 1, 7), repeat=num_tasks - 1)))
    best, radius = start, 1.0
    while radius > 1e-8:
        points = best + radius * np.pad(grid, ((0, 0), (0, 1)))
        best = points[log_condition(grams, points[:, None]).argmin()]
        radius *= 0.7
    assert converged
    assert log_condition(grams, found) == pytest.approx(log_condition(grams, best), abs=1e-6)


@pytest.mark.parametrize(("num_tasks", "samples"), [(4, 1), (8, 1), (8, 6), (16, 3), (32, 1), (64, 1)])
def test_a_generic_optimiser_finds_the_same(num_tasks, samples):
    """SciPy's BFGS on the smoothed cost in torch, whose gradient autograd derives."""
    grams, start = problem(num_tasks, samples)
    found, converged = least_condition(grams, start)
    best = start
    for temperature in (0.1, 0.01, 1e-3, 1e-4, 1e-5):

        def cost(point: np.ndarray, temperature: float = temperature) -> tuple[float, np.ndarray]:
            x = torch.tensor(point, requires_grad=True)
            logs = torch.linalg.eigvalsh(x.exp()[:, None] * torch.from_numpy(grams) * x.exp()).log() / temperature
            value = (temperature / 2) * (logs.logsumexp(1) + (-logs).logsumexp(1)).mean()
            value.backward()
            return value.item(), x.grad.numpy()

        options = {"gtol": 1e-7, "maxiter": 300}
        best = scipy.optimize.minimize(cost, best, jac=True, method="BFGS", options=options).x
    ours, theirs, before = (log_condition(grams, x) for x in (found, best, start))
    assert converged
    assert ours <= theirs + 1e-6
    assert theirs - ours < 0.01 * (before - ours)


def test_the_derivatives_of_the_smoothed_cost():
    grams, start = problem(5, 3)
    for temperature in (1.0, 0.1, 0.01):
        here = _Smoothed.at(grams, start, temperature)
        step = 1e-6
        around = [
            [_Smoothed.at(grams, start + sign * step * unit, temperature) for sign in (1, -1)] for unit in np.eye(5)
        ]
        slopes = [(up.value - down.value) / (2 * step) for up, down in around]
        bends = [(up.gradient() - down.gradient()) / (2 * step) for up, down in around]
        np.testing.assert_allclose(here.gradient(), slopes, atol=1e-8)
        np.testing.assert_allclose(here.hessian(), bends, atol=1e-6 / temperature)


def test_two_tasks_have_equal_norms():
    for seed in range(20):
        jacobian = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        gram = jacobian @ jacobian.T
        found, converged = least_condition(gram[None].numpy(), np.zeros(2))
        assert converged
        assert found[0] - found[1] == pytest.approx(0.5 * float((gram[1, 1] / gram[0, 0]).log()), abs=1e-9)


def test_what_has_no_least_condition_number():
    dependent = np.ones((2, 3, 3))
    start = np.array([1.0, 0.0, -1.0])
    found, converged = least_condition(dependent, start)
    assert not converged
    assert np.array_equal(found, start)
    # One sample of dependent gradients, and one that is not finite, beside a good one: only that one counts.
    grams, start = problem(3, 1)
    mixed = np.concatenate([dependent, grams, np.full((1, 3, 3), np.nan)])
    np.testing.assert_array_equal(least_condition(mixed, start)[0], least_condition(grams, start)[0])
    assert least_condition(np.ones((1, 1, 1)), np.zeros(1)) == (np.zeros(1), True)


@pytest.mark.parametrize("scale", [1e-130, 1e130])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    grams, start = problem(4, 2)
    found = least_condition(grams, start)[0] - np.log(scale)
    np.testing.assert_allclose(least_condition(scale * grams * scale, start - np.log(scale))[0], found, atol=1e-7)


def test_samples_that_lack_a_task_do_not_count_where_others_have_all():
    grams, _ = problem(3, 2)
    whole = torch.from_numpy(grams)
    lacking = whole[0].clone()
    lacking[1] = lacking[:, 1] = 0.0
    start = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(
        conditioning_log_weights(torch.stack([whole[1], lacking]), start), conditioning_log_weights(whole[1:], start)
    )
    # None has all: the means of the pairs that were seen. Never there: the others are as they would be without it.
    other = whole[0].clone()
    other[0] = other[:, 0] = 0.0
    mean = torch.where((lacking != 0) & (other != 0), (lacking + other) / 2, lacking + other)
    torch.testing.assert_close(
        conditioning_log_weights(torch.stack([lacking, other]), start), conditioning_log_weights(mean[None], start)
    )
    found, converged = conditioning_log_weights(lacking[None], start)
    pair, _ = conditioning_log_weights(whole[:1, ::2, ::2], start[::2])
    assert converged
    assert float(found[0] - found[2]) == pytest.approx(float(pair[0] - pair[1]))
    assert float(found[1]) == pytest.approx(float(found[0] + found[2]) / 2)


# ---- reports and doubts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["magnitude", "condition", "loss"])
def test_reports_say_what_the_metric_was_and_became(cost):
    weighting = AutoScale(3, 200, cost=cost, windows=2, samples_per_window=4)
    drive(weighting, range(40))
    assert [(report.step, report.samples, report.converged) for report in weighting.reports] == [
        (20, 4, True),
        (40, 4, True),
    ]
    given = [step_of(step) for step in (24, 29, 34, 39)]
    weights = weighting.window_weights[1]

    def condition(w: Tensor) -> float:
        return float(np.exp(np.mean([stats.weighted(w).condition_number.log() for _, stats in given])))

    def metric(w: Tensor) -> float:
        if cost == "condition":
            return condition(w)
        if cost == "magnitude":
            return float(np.mean([stats.weighted(w).mean_magnitude_similarity for _, stats in given]))
        return float(np.mean([(w * losses / (w * losses).sum()).var(correction=0) for losses, _ in given]))

    report = weighting.reports[1]
    assert report.before == pytest.approx(metric(torch.ones(3)))
    assert report.after == pytest.approx(metric(weights))
    assert report.condition_number == pytest.approx(condition(weights))
    assert report.after > 0.9 if cost == "magnitude" else report.after < report.before / 10


def test_a_report_of_dependent_gradients():
    weighting = AutoScale(2, 100, cost="condition", windows=1)
    jacobian = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    for _ in range(20):
        weighting(torch.ones(2), stats_of(jacobian))
    (report,) = weighting.reports
    assert not report.converged
    assert report.before == report.after == report.condition_number == float("inf")
    assert float(weighting.weights[0] / weighting.weights[1]) == pytest.approx(2)


def windows_of(log_weights: Tensor) -> Tensor:
    return torch.softmax(log_weights, 1) * log_weights.shape[1]


def test_the_error_of_an_extrapolation_is_that_of_repeated_trials():
    """The spread of the value read off lines through a known trend and known noise, and its mean estimate."""
    generator = torch.Generator().manual_seed(0)
    trend = 0.4 * torch.arange(5)[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64)
    noise = 0.3 * torch.randn(500, 5, 1, dtype=torch.float64, generator=generator) * torch.tensor([1.0, -1.0])
    predicted, errors, changes = [], [], []
    for trial in trend + noise:
        windows = windows_of(trial)
        logs = predict(windows, "linear").log()
        predicted.append(float(logs[0] - logs.mean()))
        error, change = extrapolation_error(windows)
        errors.append(error**2)
        changes.append(change)
    assert np.sqrt(np.mean(errors)) == pytest.approx(np.std(predicted), rel=0.1)
    assert np.mean(changes) == pytest.approx(0.4 * 2.5, rel=0.05)
    assert extrapolation_error(windows_of(trend[:2]))[0] == 0.0


@pytest.mark.parametrize(
    ("noise", "slope", "predictor", "warns"),
    [
        (1.0, 0.0, "linear", True),
        (1.0, 0.0, "exponential", True),
        (1.0, 0.0, "mean", False),
        (0.05, 0.0, "linear", False),
        (1.0, 1.0, "linear", False),
    ],
)
def test_windows_that_disagree_are_warned_about(noise, slope, predictor, warns, caplog):
    weighting = AutoScale(2, 200, windows=4, predictor=predictor)
    for step in range(40):
        window = step // 10
        log_norm = slope * window + noise * (-1) ** (window in (1, 2))
        norms = torch.tensor([1.0, np.exp(log_norm)], dtype=torch.float64)
        with caplog.at_level(logging.WARNING, logger="gradstats"):
            weighting(torch.ones(2), stats_of(norms.diag()))
    assert ("disagree too much to extrapolate" in caplog.text) == warns


# ---- hard losses and gradients --------------------------------------------------------------------------------------


def feed(weighting: AutoScale, losses: list[float], jacobian: list[list[float]], steps: int = 20) -> AutoScale:
    for _ in range(steps):
        weighting(torch.tensor(losses, dtype=torch.float64), stats_of(torch.tensor(jacobian, dtype=torch.float64)))
    return weighting


UNIT = [[2.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 8.0]]


@pytest.mark.parametrize("cost", ["magnitude", "condition"])
@pytest.mark.parametrize("losses", [[-1.0, 0.0, 5.0], [1e-30, 1e30, -1e30]])
def test_gradient_costs_do_not_look_at_losses(cost, losses, caplog):
    weighting = feed(AutoScale(3, 100, cost=cost, normalize="sum"), losses, UNIT)
    expected = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64) * 3 / 7
    torch.testing.assert_close(weighting.weights, expected, rtol=1e-9, atol=0)
    assert not caplog.records


@pytest.mark.parametrize("bad", [0.0, -3.0, float("nan"), float("inf")])
def test_losses_without_logarithm_leave_their_task_its_share(bad, caplog):
    weighting = feed(AutoScale(3, 100, cost="loss", normalize="sum"), [2.0, bad, 8.0], UNIT)
    weights = weighting.weights
    assert float(weights[0] / weights[2]) == pytest.approx(4)
    assert float(weights[1]) == pytest.approx(float((weights[0] * weights[2]).sqrt()))
    assert "tasks [1] had no loss that is positive in the window ending at step 10" in caplog.text
    assert weighting.reports[0].after == pytest.approx(0)


@pytest.mark.parametrize("cost", ["magnitude", "condition"])
def test_an_absent_task_keeps_its_share_and_the_others_are_as_without_it(cost, caplog):
    weighting = feed(AutoScale(3, 100, cost=cost), [2.0, float("nan"), 8.0], [UNIT[0], [0.0] * 3, UNIT[2]])
    weights = weighting.weights
    assert float(weights[0] / weights[2]) == pytest.approx(4)
    assert float(weights[1]) == pytest.approx(float((weights[0] * weights[2]).sqrt()))
    assert "tasks [1] had no gradient that is not zero in the window ending at step 10" in caplog.text
    assert weighting.reports[0].condition_number == pytest.approx(1)
    # Once it comes back it counts.
    weighting = AutoScale(3, 100, cost=cost, predictor="last", windows=2)
    feed(weighting, [2.0, float("nan"), 8.0], [UNIT[0], [0.0] * 3, UNIT[2]], steps=10)
    feed(weighting, [2.0, 4.0, 8.0], UNIT, steps=10)
    sized = weighting.weights * torch.tensor([2.0, 4.0, 8.0])
    torch.testing.assert_close(sized, sized.mean().expand(3), rtol=1e-9, atol=0)


@pytest.mark.parametrize("cost", ["magnitude", "condition"])
def test_gradients_that_vanish_leave_the_last_weights(cost):
    weighting = AutoScale(3, 100, cost=cost, predictor="last", windows=2)
    feed(weighting, [2.0, 4.0, 8.0], UNIT, steps=10)
    before = weighting.weights.clone()
    feed(weighting, [2.0, 4.0, 8.0], [[0.0] * 3] * 3, steps=10)
    assert not weighting.exploring
    torch.testing.assert_close(weighting.weights / weighting.weights.sum(), before / before.sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("scale", [1e-140, 1e-20, 1e20, 1e140])
@pytest.mark.parametrize("cost", ["magnitude", "condition"])
def test_the_scale_of_all_gradients_does_not_matter(cost, scale):
    small = [[scale * x for x in row] for row in UNIT]
    weighting = feed(AutoScale(3, 100, cost=cost), [1.0] * 3, small)
    torch.testing.assert_close(
        weighting.weights, feed(AutoScale(3, 100, cost=cost), [1.0] * 3, UNIT).weights, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("cost", ["magnitude", "condition", "loss"])
def test_wildly_different_scales_are_bounded(cost):
    scales = [1e-30, 1.0, 1e30]
    jacobian = [[scale * (i == j) for j in range(3)] for i, scale in enumerate(scales)]
    weights = feed(AutoScale(3, 100, cost=cost, normalize="sum"), scales, jacobian).weights
    assert float(weights.log().max() - weights.log().min()) == pytest.approx(2 * np.log(1e6))


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
    assert second.reports == whole.reports
    assert {k: v.shape for k, v in fresh().state_dict().items()} == {k: v.shape for k, v in whole.state_dict().items()}

"""Weightings against their definitions: closed forms, optimality, the authors' recurrences, and state."""

import logging
import math

import numpy as np
import pytest
import scipy.optimize
import torch
import torchjd.aggregation
import torchjd.scalarization
from torch import Tensor

from gradstats import GradStats
from gradstats.weighting import AutoScale, available, create
from gradstats.weighting.autoscale import balancing_log_weights, conditioning_log_weights, predict


def stats_of(jacobian: Tensor) -> GradStats:
    num_tasks = len(jacobian)
    return GradStats(
        gram=jacobian.double() @ jacobian.double().T,
        names=tuple(f"t{i}" for i in range(num_tasks)),
        present=torch.ones(num_tasks, dtype=torch.bool),
    )


def run(weighting, steps: int, num_tasks: int = 3, seed: int = 0, scales=None):
    """Drive a weighting with random gradients; returns what it was given and what it answered."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.ones(num_tasks, dtype=torch.float64) if scales is None else scales
    record = []
    for step in range(steps):
        jacobian = scales[:, None] * torch.randn(num_tasks, 20, dtype=torch.float64, generator=generator)
        losses = scales * (0.5 + torch.rand(num_tasks, dtype=torch.float64, generator=generator))
        stats = stats_of(jacobian) if weighting.wants_stats() else None
        weights = weighting(losses, stats)
        record.append(
            {"step": step, "gram": None if stats is None else stats.gram, "losses": losses, "weights": weights}
        )
    return record


# ---- names and constants --------------------------------------------------------------------------------------------


def test_create_knows_what_is_available():
    assert {"uniform", "fixed", "slaw", "autoscale"} <= set(available())
    options = {"fixed": {"weights": [1, 2, 3]}, "autoscale": {"total_steps": 100}}
    for name in available():
        weighting = create(name, 3, **options.get(name, {}))
        weights = weighting(torch.ones(3, dtype=torch.float64), None)
        assert weights.shape == (3,)
        assert weights.dtype == torch.float64
    with pytest.raises(ValueError, match=r"weighting: expected one of .*autoscale.*got 'nope'"):
        create("nope", 3)
    with pytest.raises(TypeError, match="bogus"):
        create("uniform", 3, bogus=1)
    with pytest.raises(ValueError, match="num_tasks: expected a positive integer, got 0"):
        create("uniform", 0)


def test_all_that_torchjd_has_is_here_under_some_name():
    """Whatever of it is a function of the Gramian or of the losses; what is new in it should be looked at."""
    names = {*torchjd.aggregation.__all__, *torchjd.scalarization.__all__}
    theirs = {name.removesuffix("Weighting").lower() for name in names}
    ours = {name.replace("_", "") for name in available()}
    as_others = {"mean", "sum", "constant", "random", "geometricmean"}  # uniform, fixed, rlw and gls
    bases = {"", "aggregator", "scalarizer", "weightedaggregator", "gramianweightedaggregator"}
    assert theirs - ours - as_others - bases == {"graddrop", "excessmtl", "trimmedmean"}  # made of single entries


def test_uniform_and_fixed():
    losses = torch.ones(2, dtype=torch.float64)
    assert create("uniform", 2)(losses).tolist() == [1, 1]
    fixed = create("fixed", 2, weights=[0.25, 3])
    assert fixed(losses).tolist() == [0.25, 3]
    assert not fixed.wants_stats()
    for bad in ([1.0], [1.0, math.nan], [1.0, -1.0]):
        with pytest.raises(ValueError, match="weights: expected 2 finite, non-negative numbers"):
            create("fixed", 2, weights=bad)


# ---- SLAW -----------------------------------------------------------------------------------------------------------


def test_slaw_follows_the_published_recurrence():
    """a ← second moment, b ← mean, s = max(1e-5, sqrt(a − b²)), w = (T/s)/Σ(1/s), as in the authors' code."""
    beta, num_tasks = 0.9, 3
    weighting = create("slaw", num_tasks, beta=beta)
    record = run(weighting, 60, num_tasks)
    a, b = np.zeros(num_tasks), np.zeros(num_tasks)
    for step, row in enumerate(record):
        losses = row["losses"].numpy()
        if step < round(1 / (1 - beta)):
            a, b = (a * step + losses**2) / (step + 1), (b * step + losses) / (step + 1)
        else:
            a, b = beta * a + (1 - beta) * losses**2, beta * b + (1 - beta) * losses
        std = np.maximum(1e-5, np.sqrt(np.maximum(a - b**2, 0)))
        expected = np.ones(num_tasks) if step == 0 else num_tasks / std / (1 / std).sum()
        np.testing.assert_allclose(row["weights"], expected, rtol=1e-8)


def test_slaw_does_not_cancel():
    """Losses of 1e6 with a spread of 1e-3: the published difference of moments has no digit left in float32."""
    weighting = create("slaw", 2, beta=0.9)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, 2, dtype=torch.float64, generator=generator) * torch.tensor([1e-3, 1e-2])
    for row in noise:
        weights = weighting(1e6 + row)
    assert float(weights[0] / weights[1]) == pytest.approx(10, rel=0.6)


def test_slaw_waits_for_two_losses_of_each_task_and_skips_missing_ones():
    weighting = create("slaw", 2)
    for losses in ([1.0, math.nan], [2.0, math.nan], [3.0, 1.0]):
        assert weighting(torch.tensor(losses, dtype=torch.float64)).tolist() == [1, 1]
    weights = weighting(torch.tensor([math.inf, 3.0], dtype=torch.float64))
    # standard deviations of (1, 2, 3) and of (1, 3)
    std = np.array([math.sqrt(2 / 3), 1.0])
    np.testing.assert_allclose(weights, 2 / std / (1 / std).sum())
    with pytest.raises(ValueError, match="beta"):
        create("slaw", 2, beta=1.0)


# ---- AutoScale: costs -----------------------------------------------------------------------------------------------


def test_magnitude_cost_is_the_closed_form_on_the_recorded_gramians():
    scales = torch.tensor([1.0, 10.0, 1000.0], dtype=torch.float64)
    weighting = AutoScale(3, 1000, windows=5, samples_per_window=7, explore=0.2)
    record = run(weighting, 200, scales=scales)
    for window in range(5):
        grams = [r["gram"] for r in record[40 * window : 40 * (window + 1)] if r["gram"] is not None]
        assert len(grams) == 7
        expected = torch.exp(-torch.stack([g.diagonal().sqrt().log() for g in grams]).mean(0))
        torch.testing.assert_close(weighting.window_weights[window], 3 * expected / expected.sum(), rtol=1e-12, atol=0)
    found = weighting.weights * scales
    assert float(found.max() / found.min()) < 1.3


@pytest.mark.parametrize(("steps", "samples"), [(60, (1,)), (100, (1, 1)), (1608, (3, 3, 2, 2, 2, 3, 3, 4, 5, 5))])
def test_few_steps_are_recorded_unless_said_otherwise(steps: int, samples: tuple[int, ...]) -> None:
    assert AutoScale(2, steps).samples == samples
    assert sum(samples) <= 0.02 * steps
    assert AutoScale(2, steps, samples_per_window=7).samples == (7,) * len(samples)
    assert sum(AutoScale(2, 10**5).samples) == 100


def test_each_window_records_its_share() -> None:
    weighting = AutoScale(3, 1608)
    run(weighting, weighting.explore_steps)
    assert tuple(report.samples for report in weighting.reports) == weighting.samples


def test_windows_that_count_more_in_the_prediction_are_recorded_more_often() -> None:
    assert AutoScale(2, 10**4, predictor="mean").samples == (10,) * 10
    assert AutoScale(2, 10**4, predictor="last").samples == (*(5,) * 9, 55)
    ema = AutoScale(2, 10**4, predictor="ema").samples
    assert ema == tuple(sorted(ema))
    # What a line through windows of equal length says of its end is a sum over the windows; its variance is this.
    middles = np.arange(10) + 0.5
    counts = np.linalg.pinv(np.stack([np.ones(10), middles], 1)).T @ [1.0, 10.0]
    for steps in (10**3, 10**4):
        samples = np.array(AutoScale(2, steps).samples)
        assert (counts**2 / samples).sum() < 0.87 * (counts**2).sum() * 10 / samples.sum()


def test_magnitude_cost_minimises_its_definition():
    """mean_t Σ_{i<j} (log w_i n_i − log w_j n_j)²: the gradient vanishes at the closed form."""
    norms = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    logs = balancing_log_weights(norms, torch.ones(4, dtype=torch.float64)).requires_grad_()
    sized = logs + norms.log()
    cost = (sized[:, :, None] - sized[:, None, :]).square().sum((1, 2)).mean() / 2
    (gradient,) = torch.autograd.grad(cost, logs)
    assert gradient.abs().max() < 1e-12


def test_loss_cost_is_the_closed_form_on_the_recorded_losses():
    weighting = AutoScale(3, 100, cost="loss", explore=0.1, windows=1, samples_per_window=4, normalize="sum")
    assert not weighting.wants_stats()
    record = run(weighting, 10)
    # Evenly spaced: the samples of a window of 10 are due at steps 2, 4, 7 and 9.
    expected = torch.exp(-torch.stack([record[s]["losses"].log() for s in (2, 4, 7, 9)]).mean(0))
    torch.testing.assert_close(weighting.weights, 3 * expected / expected.sum(), rtol=1e-12, atol=0)


def mean_log_condition(grams: Tensor, log_weights: np.ndarray) -> float:
    w = torch.as_tensor(np.exp(log_weights))
    values = torch.linalg.eigvalsh(w[:, None] * grams * w[None, :])
    return float((values[:, -1] / values[:, 0]).log().mean() / 2)


@pytest.mark.parametrize("num_tasks", [2, 3, 6])
@pytest.mark.parametrize("samples", [1, 8])
def test_condition_cost_is_optimal(num_tasks, samples):
    """No independent optimiser finds a better point, and no direction descends from ours (the cost is convex)."""
    generator = torch.Generator().manual_seed(num_tasks)
    scales = torch.logspace(0, 3, num_tasks, dtype=torch.float64)
    common = torch.randn(30, dtype=torch.float64, generator=generator)
    jacobians = common + torch.randn(samples, num_tasks, 30, dtype=torch.float64, generator=generator)
    grams = scales[:, None] * (jacobians @ jacobians.transpose(1, 2)) * scales
    start = balancing_log_weights(grams.diagonal(dim1=1, dim2=2).sqrt(), torch.ones(num_tasks, dtype=torch.float64))
    ours = conditioning_log_weights(grams, start)[0].numpy()
    best = mean_log_condition(grams, ours)
    assert best <= mean_log_condition(grams, start.numpy()) + 1e-9
    other = scipy.optimize.minimize(
        lambda x: mean_log_condition(grams, np.append(x, ours[-1])),
        start[:-1].numpy(),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True},
    )
    assert best <= other.fun + 1e-5
    for direction in torch.randn(50, num_tasks, dtype=torch.float64, generator=generator).numpy():
        assert mean_log_condition(grams, ours + 1e-3 * direction) >= best - 1e-6


def test_condition_cost_of_two_tasks_is_equal_magnitude():
    jacobian = torch.tensor([[3.0, 4.0], [100.0, 20.0]], dtype=torch.float64)
    gram = (jacobian @ jacobian.T)[None]
    logs, converged = conditioning_log_weights(gram, torch.zeros(2, dtype=torch.float64))
    expected = -jacobian.norm(dim=1).log()
    assert converged
    assert float(logs[0] - logs[1]) == pytest.approx(float(expected[0] - expected[1]), abs=1e-12)


@pytest.mark.parametrize("cost", ["magnitude", "condition", "loss"])
@pytest.mark.parametrize(
    "jacobian",
    [
        [[1.0, 2.0], [0.0, 0.0]],
        [[1.0, 2.0], [1.0, 2.0]],
        [[1.0, 2.0], [-1.0, -2.0]],
        [[1e12, 2.0], [1e-12, 1e-12]],
        [[0.0, 0.0], [0.0, 0.0]],
    ],
)
@pytest.mark.parametrize("normalize", ["sum", "gradient", "loss"])
def test_degenerate_gradients_give_finite_positive_weights(cost, jacobian, normalize):
    weighting = AutoScale(2, 100, cost=cost, normalize=normalize)
    for _ in range(20):
        weights = weighting(torch.tensor([1.0, 0.0], dtype=torch.float64), stats_of(torch.tensor(jacobian)))
    assert weighting.weights.isfinite().all()
    assert (weighting.weights > 0).all()
    assert (weights > 0).all()


def test_one_task():
    weighting = AutoScale(1, 50, cost="condition", normalize="sum")
    run(weighting, 10, num_tasks=1)
    assert weighting.weights.tolist() == [1.0]


def test_a_task_that_never_counts_keeps_its_share():
    sizes = torch.tensor([[2.0, 0.0, 4.0], [2.0, math.nan, 4.0]], dtype=torch.float64)
    previous = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    logs = balancing_log_weights(sizes, previous)
    weights = logs.exp()
    assert float(weights[0] / weights[2]) == pytest.approx(2)
    # The found weights are previous weights up to a factor: here exactly, so the share of the middle one follows.
    assert float(weights[1] / weights[0]) == pytest.approx(3.0)


# ---- AutoScale: predictors ------------------------------------------------------------------------------------------


def windows_of(logs: np.ndarray) -> Tensor:
    return torch.softmax(torch.as_tensor(logs), 1) * logs.shape[1]


def shares(weights: Tensor) -> np.ndarray:
    logs = weights.log().numpy()
    return logs - logs.mean()


def test_predictors_on_an_exact_line():
    slope, offset = np.array([0.3, -0.1, -0.2]), np.array([1.0, 0.0, -1.0])
    middles = np.arange(6) + 0.5
    windows = windows_of(offset + middles[:, None] * slope)
    logs = np.array([shares(w) for w in windows])
    for predictor, expected in {
        "last": logs[-1],
        "mean": logs.mean(0),
        "ema": np.average(logs, axis=0, weights=0.9 ** np.arange(5, -1, -1)),
        "linear": offset + 6 * slope - (offset + 6 * slope).mean(),
    }.items():
        found = predict(windows, predictor)
        np.testing.assert_allclose(shares(found), expected, atol=1e-10, err_msg=predictor)
        assert float(found.sum()) == pytest.approx(3)


def test_exponential_predictor_on_an_exact_exponential():
    tau = float(torch.logspace(-0.5, 2.0, 51, dtype=torch.float64)[25])
    middles = np.arange(8) + 0.5
    rise, level = np.array([1.0, -2.0, 1.0]), np.array([0.5, 0.0, -0.5])
    windows = windows_of(level + np.exp(-middles / tau)[:, None] * rise)
    expected = level + math.exp(-8 / tau) * rise
    np.testing.assert_allclose(shares(predict(windows, "exponential")), expected - expected.mean(), atol=1e-8)


@pytest.mark.parametrize("predictor", ["last", "mean", "ema", "linear", "exponential"])
@pytest.mark.parametrize("num_windows", [1, 2, 3, 10])
def test_constant_windows_predict_themselves(predictor, num_windows):
    weights = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(predict(weights.expand(num_windows, 3), predictor), weights, rtol=1e-9, atol=0)


def test_extrapolation_is_clamped():
    logs = np.zeros((3, 2))
    logs[:, 0] = [0, 20, 40]
    found = predict(windows_of(logs), "linear")
    assert float(found.log().max() - found.log().min()) == pytest.approx(2 * math.log(1e6))


# ---- AutoScale: schedule, scale, state ------------------------------------------------------------------------------


def test_schedule():
    weighting = AutoScale(3, 1000, explore=0.2, windows=4, samples_per_window=5)
    record = run(weighting, 300)
    recorded = [r["step"] for r in record if r["gram"] is not None]
    assert recorded == [50 * w + s for w in range(4) for s in (9, 19, 29, 39, 49)]
    # Weights change at the step after each window's end, and never in phase 2.
    changes = [s for s in range(1, 300) if not torch.equal(record[s]["weights"], record[s - 1]["weights"])]
    assert changes == [50, 100, 150, 200]
    assert not weighting.exploring
    assert weighting.needs == frozenset()


@pytest.mark.parametrize("total_steps", [1, 3, 7, 40, 55, 101])
def test_short_runs_shrink_windows_and_samples(total_steps):
    weighting = AutoScale(2, total_steps)
    record = run(weighting, total_steps + 5, num_tasks=2)
    recorded = [r["step"] for r in record if r["gram"] is not None]
    assert recorded
    assert max(recorded) < max(1, round(0.2 * total_steps))
    assert len(weighting.window_weights) == weighting.windows
    assert not torch.equal(weighting.weights, torch.ones(2, dtype=torch.float64))


def test_a_step_that_could_not_be_recorded_is_made_up_for(caplog):
    weighting = AutoScale(2, 100, windows=1, samples_per_window=4, normalize="sum")
    wanted, gram = [], stats_of(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
    for step in range(20):
        wanted.append(weighting.wants_stats())
        weighting(torch.ones(2, dtype=torch.float64), gram if wanted[-1] and step != 4 else None)
    assert [s for s, w in enumerate(wanted) if w] == [4, 5, 9, 14, 19]
    torch.testing.assert_close(weighting.weights, torch.tensor([1.6, 0.4], dtype=torch.float64))
    # A window without any sample keeps the weights and says so.
    weighting = AutoScale(2, 100, windows=1)
    with caplog.at_level(logging.WARNING, logger="gradstats"):
        for _ in range(20):
            weighting(torch.ones(2, dtype=torch.float64), None)
    assert weighting.weights.tolist() == [1, 1]
    assert "could be recorded" in caplog.text


@pytest.mark.parametrize("normalize", ["gradient", "loss"])
def test_what_normalisation_keeps(normalize):
    """The weighted sum of the losses, or the norm of the aggregated gradient, over the recorded steps of a window."""
    scales = torch.tensor([1.0, 10.0, 1000.0], dtype=torch.float64)
    weighting = AutoScale(3, 500, windows=4, samples_per_window=5, normalize=normalize)
    record = run(weighting, 120, scales=scales)
    for window in range(4):
        rows = [r for r in record[25 * window : 25 * (window + 1)] if r["gram"] is not None]
        gram, losses = (torch.stack([r[what] for r in rows]).mean(0) for what in ("gram", "losses"))
        before, after = rows[0]["weights"], record[25 * (window + 1)]["weights"]
        sizes = [float(w @ losses if normalize == "loss" else w @ gram @ w) for w in (before, after)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-9)
    plain = AutoScale(3, 500, windows=4, samples_per_window=5, normalize="sum")
    run(plain, 120, scales=scales)
    np.testing.assert_allclose(shares(plain.weights), shares(weighting.weights), atol=1e-9)
    assert float(plain.weights.sum()) == pytest.approx(3)


@pytest.mark.parametrize("name", ["slaw", "autoscale"])
@pytest.mark.parametrize("stop", [1, 17, 50, 130])
def test_state_continues_exactly(name, stop, tmp_path):
    def fresh():
        options = {"total_steps": 500, "windows": 4, "cost": "condition"} if name == "autoscale" else {}
        return create(name, 3, **options)

    whole = fresh()
    expected = run(whole, 150)
    first = fresh()
    run(first, stop)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = fresh()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    generator_steps = expected[stop:]
    for row in generator_steps:
        assert second.wants_stats() == (row["gram"] is not None)
        stats = None
        if row["gram"] is not None:
            stats = GradStats(gram=row["gram"], names=("a", "b", "c"), present=torch.ones(3, dtype=torch.bool))
        assert torch.equal(second(row["losses"], stats), row["weights"])
    assert torch.equal(second.weights, whole.weights)


def test_state_has_one_size_and_survives_a_cast(tmp_path):
    """Sharded checkpoints load into tensors of the same size; casting a model must not round the weights."""
    weighting = create("autoscale", 3, total_steps=500, windows=4)
    sizes = {weighting.state_dict()["_extra_state"].shape}
    for _ in range(12):
        run(weighting, 10)
        sizes.add(weighting.state_dict()["_extra_state"].shape)
    assert len(sizes) == 1
    expected = weighting.weights.clone()
    weighting.to(torch.bfloat16)
    assert torch.equal(weighting.weights, expected)
    for other in (create("autoscale", 2, total_steps=500, windows=4), create("autoscale", 3, total_steps=50)):
        with pytest.raises(ValueError, match="state: expected that of AutoScale"):
            other.load_state_dict(weighting.state_dict())


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        weighting = create("autoscale", 2, total_steps=100, windows=2, cost="condition", predictor="exponential")
        slaw = create("slaw", 2)
    for step in range(20):
        jacobian = torch.tensor([[3.0, 1.0 + step], [1.0, 20.0]], dtype=torch.float64)
        stats = stats_of(jacobian)
        with torch.device("meta"):
            weighting(jacobian[0], stats)
            slaw(jacobian[0])
    assert weighting.weights.device.type == "cpu"
    assert slaw.weights.device.type == "cpu"


def test_state_of_another_weighting_is_refused():
    with pytest.raises(ValueError, match="state: expected"):
        create("slaw", 2).load_state_dict(create("autoscale", 2, total_steps=10).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps: expected a positive integer"),
        ({"total_steps": 10, "explore": 0.0}, "explore"),
        ({"total_steps": 10, "windows": 0}, "windows"),
        ({"total_steps": 10, "samples_per_window": 1.5}, "samples_per_window"),
        ({"total_steps": 10, "cost": "gms"}, "cost: expected one of magnitude, condition, loss"),
        ({"total_steps": 10, "predictor": "quadratic"}, "predictor: expected one of linear"),
        ({"total_steps": 10, "normalize": "none"}, "normalize: expected one of gradient, loss, sum"),
    ],
)
def test_autoscale_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AutoScale(2, **options)

"""Gramians without the noise of the minibatch: exact, unbiased, with intervals that cover, and refused where wrong."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradstats
from gradstats import GradStats
from gradstats.collect.noise import u_statistic
from gradstats.weighting import AutoScale

pytestmark = pytest.mark.usefixtures("one_thread")

NORMAL_95 = 1.96
NAMES = ("a", "b", "c")


class Net(nn.Module):
    """A trunk with three heads, and the losses of the samples."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(8, 1, dtype=dtype) for _ in NAMES)

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        outs = [head(features).squeeze(1) for head in self.heads]
        return {name: (out - y[:, i]).square() for i, (name, out) in enumerate(zip(NAMES, outs, strict=True))}


def data(samples: int, dtype: torch.dtype = torch.float32, noise: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 6, generator=generator, dtype=dtype)
    y = torch.stack([x[:, 0], x[:, 0] / 2 + x[:, 1], -x[:, 0]], 1)
    return x, y + noise * torch.randn(samples, 3, generator=generator, dtype=dtype)


def means(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss.mean() for name, loss in losses.items()}


def sample_gradients(losses: dict[str, Tensor], module: nn.Module) -> Tensor:
    """The plain way: float64 ``[T, B, P]``."""
    parameters = list(module.parameters())
    return torch.stack(
        [
            torch.stack(
                [
                    torch.cat([g.flatten().double() for g in torch.autograd.grad(one, parameters, retain_graph=True)])
                    for one in loss
                ]
            )
            for loss in losses.values()
        ]
    )


def oracle(grads: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The mean product of different parts, pair by pair, and the trace of the noise of single samples."""
    of_parts = [grads[:, part].mean(1) for part in torch.arange(grads.shape[1]).tensor_split(parts)]
    products = [p @ q.T for a, p in enumerate(of_parts) for b, q in enumerate(of_parts) if a != b]
    return torch.stack(products).mean(0), grads.var(1, correction=1).sum(1)


# ---- the estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "batched", "blockwise", "sequential", "engine"])
@pytest.mark.parametrize(("samples", "parts"), [(12, 12), (12, 4), (11, 4), (16, None), (15, None)])
def test_mean_over_pairs_of_different_parts(method: str, samples: int, parts: int | None) -> None:
    net = Net(torch.float64)
    x, y = data(samples, torch.float64)
    expected, noise = oracle(sample_gradients(net.losses(x, y), net.trunk), parts or (samples if samples < 16 else 8))
    stats = gradstats.from_losses(net.losses(x, y), net.trunk, method=method, unbiased=True, parts=parts)
    torch.testing.assert_close(stats.gram, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(stats.gram, stats.gram.T)
    assert stats.names == NAMES
    assert stats.present.tolist() == [True] * 3
    assert stats.standard_error is not None
    assert (stats.standard_error > 0).all()
    assert stats.noise_trace is not None
    assert stats.noise_trace.shape == (3,)
    if parts == samples:  # with one sample in each part it is the variance itself
        torch.testing.assert_close(stats.noise_trace, noise, rtol=1e-9, atol=0)


def test_default_inputs_are_what_the_tasks_share_and_not_what_their_parts_do() -> None:
    net = Net(torch.float64)
    x, y = data(12, torch.float64)
    trunk = gradstats.from_losses(net.losses(x, y), net.trunk, unbiased=True)
    torch.testing.assert_close(gradstats.from_losses(net.losses(x, y), unbiased=True).gram, trunk.gram)
    stacked = torch.stack(list(net.losses(x, y).values()))
    found = gradstats.from_losses(stacked, net.trunk, unbiased=True)
    torch.testing.assert_close(found.gram, trunk.gram)
    assert found.names == ("task0", "task1", "task2")


def test_over_many_minibatches_unbiased_where_the_plain_gramian_is_not() -> None:
    net, (x, y) = Net(), data(300)
    full = gradstats.from_losses(means(net.losses(x, y)), net.trunk).gram
    noise = sample_gradients(net.losses(x, y), net.trunk).var(1, correction=0).sum(1)
    generator = torch.Generator().manual_seed(2)
    plain, found = [], []
    for _ in range(200):
        at = torch.randint(300, (32,), generator=generator)
        found.append(gradstats.from_losses(net.losses(x[at], y[at]), net.trunk, unbiased=True))
        plain.append(gradstats.from_losses(means(net.losses(x[at], y[at])), net.trunk).gram)
    grams, plains = torch.stack([s.gram for s in found]), torch.stack(plain)
    error_of_mean = grams.std(0) / math.sqrt(len(grams))
    assert ((grams.mean(0) - full).abs() < 3 * error_of_mean).all()
    assert (plains.mean(0).diagonal() > full.diagonal() + 5 * error_of_mean.diagonal()).all()
    # The plain one is too large by the noise that we state.
    mean = GradStats.mean(found)
    assert mean.noise_trace is not None
    assert mean.noise_scale is not None
    torch.testing.assert_close(mean.noise_trace, noise, rtol=0.1, atol=0)
    torch.testing.assert_close(plains.mean(0).diagonal(), full.diagonal() + noise / 32, rtol=0.2, atol=0)
    torch.testing.assert_close(mean.noise_scale, noise / full.diagonal(), rtol=0.4, atol=0)
    # The error that is stated for the mean is the one it has, on the safe side.
    assert mean.standard_error is not None
    ratio = mean.standard_error / error_of_mean
    assert (ratio > 0.9).all()
    assert (ratio < 1.6).all()


@pytest.mark.parametrize("noise", [0.3, 3.0, 10.0])
def test_intervals_cover_the_full_gramian(noise: float) -> None:
    net, (x, y) = Net(), data(300, noise=noise)
    full = gradstats.from_losses(means(net.losses(x, y)), net.trunk).gram
    generator = torch.Generator().manual_seed(3)
    hits = []
    for _ in range(150):
        at = torch.randint(300, (64,), generator=generator)
        stats = gradstats.from_losses(net.losses(x[at], y[at]), net.trunk, unbiased=True)
        assert stats.standard_error is not None
        hits.append((stats.gram - full).abs() <= NORMAL_95 * stats.standard_error)
    covered = torch.stack(hits).double().mean(0)
    assert 0.9 <= float(covered.mean()) <= 0.99
    assert covered.min() >= 0.85


@pytest.mark.parametrize("signal", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("parts", [4, 8, 32])
def test_stated_variance_is_the_variance(parts: int, signal: float) -> None:
    """For gradients that are normal: it is the variance times (m - 1) / (m - 3), in expectation."""
    generator = torch.Generator().manual_seed(4)
    estimates, variances = [], []
    for _ in range(1000):
        grads = torch.randn(2, parts, 50, generator=generator, dtype=torch.float64) + signal
        rows = grads.flatten(0, 1)
        estimate, error = u_statistic(rows @ rows.T, parts)
        estimates.append(estimate)
        variances.append(error.square() * (parts - 3) / (parts - 1))
    stated, true = torch.stack(variances).mean(0), torch.stack(estimates).var(0)
    ratio = stated / true
    # A negative variance is taken as 0: too much where there is no signal, the more the fewer the parts.
    most = {4: 2.8, 8: 1.8, 32: 1.4}[parts] if signal < 1.0 else 1.15
    assert (ratio > 0.85).all()
    assert (ratio < most).all()


# ---- options ---------------------------------------------------------------------------------------------------------


def test_groups_sum_to_the_total_and_scales_are_undone() -> None:
    net = Net(torch.float64)
    x, y = data(16, torch.float64)
    plain = gradstats.from_losses(net.losses(x, y), net.trunk, unbiased=True)
    scaled = {name: 128.0 * loss for name, loss in net.losses(x, y).items()}
    stats = gradstats.from_losses(scaled, net.trunk, unbiased=True, group_by="parameter", loss_scale=128.0)
    torch.testing.assert_close(stats.gram, plain.gram)
    torch.testing.assert_close(stats.standard_error, plain.standard_error)
    torch.testing.assert_close(sum(group.gram for group in stats.groups.values()), stats.gram)
    torch.testing.assert_close(sum(group.noise_trace for group in stats.groups.values()), stats.noise_trace)
    added = stats.groups["0.weight"] + stats.groups["0.bias"]  # the same samples are behind both
    assert (added.standard_error >= stats.standard_error * 0.999).all()
    torch.testing.assert_close(added.noise_trace, stats.noise_trace)
    diagonal = [torch.full_like(p, 2.0) for p in net.trunk.parameters()]
    twice = gradstats.from_losses(net.losses(x, y), net.trunk, unbiased=True, metric=diagonal)
    torch.testing.assert_close(twice.gram, 2.0 * plain.gram)


@pytest.mark.parametrize("samples", [16, 19])
@pytest.mark.parametrize("method", ["auto", "sequential"])
def test_backward_gives_the_gradient_of_the_weighted_means(method: str, samples: int) -> None:
    net = Net(torch.float64)
    x, y = data(samples, torch.float64)
    weights = {"a": 0.5, "b": 2.0, "c": 1.5}
    sum(w * net.losses(x, y)[name].mean() for name, w in weights.items()).backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    only = gradstats.from_losses(net.losses(x, y), net.trunk, unbiased=True)
    stats = gradstats.backward(net.losses(x, y), weights, net.trunk, method=method, unbiased=True)
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)
    torch.testing.assert_close(stats.gram, only.gram)


def test_gradients_stay_and_the_graph_as_asked() -> None:
    net, (x, y) = Net(), data(16)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    losses = net.losses(x, y)
    first = gradstats.from_losses(losses, unbiased=True, retain_graph=True)
    with torch.no_grad():
        second = gradstats.from_losses(losses, unbiased=True)
    torch.testing.assert_close(first.gram, second.gram)
    assert all((p.grad == 1.0).all() for p in net.parameters())
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        gradstats.from_losses(losses, unbiased=True)


def test_disjoint_tasks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x, y = data(40, torch.float64)
    owner = torch.arange(40) % 3 % 2  # 27 samples and 13
    out = (net(x).squeeze(1) - y[:, 0]).square()
    losses = [out[owner == 0], out[owner == 1]]
    owned = gradstats.from_losses(losses, net, owner=owner, unbiased=True, retain_graph=True)
    shared = []
    for loss in losses:
        grads = sample_gradients({"": loss}, net)[0]
        shared.append(torch.stack([part.mean(0) for part in grads.tensor_split(13)]))
    rows = torch.cat(shared)
    expected, error = u_statistic(rows @ rows.T, 13)
    assert owned.method == "disjoint"
    torch.testing.assert_close(owned.gram, expected)
    torch.testing.assert_close(owned.standard_error, error)
    with pytest.raises(ValueError, match=r"owner: expected 27 samples of task 0.*got 40"):
        gradstats.from_losses(losses, net, owner=torch.zeros(40, dtype=torch.int64), unbiased=True)
    with pytest.raises(ValueError, match=r"owner: expected integers \[B\]"):
        gradstats.from_losses(losses, net, owner=owner[:, None], unbiased=True)


def test_absent_and_non_finite_tasks_stay_in_their_rows() -> None:
    net, (x, y) = Net(), data(16)
    good = gradstats.from_losses(net.losses(x, y), net.trunk, unbiased=True)
    y[3, 1] = math.nan
    stats = gradstats.from_losses(net.losses(x, y), net.trunk, unbiased=True)
    assert stats.non_finite_names == ("b",)
    assert stats.gram[1].isnan().all()
    assert stats.standard_error[1].isnan().all()
    torch.testing.assert_close(stats.gram[::2, ::2], good.gram[::2, ::2])
    torch.testing.assert_close(stats.standard_error[::2, ::2], good.standard_error[::2, ::2])

    losses: dict[str, Tensor | None] = {**net.losses(x, y), "b": None}
    stats = gradstats.from_losses(losses, net.trunk, unbiased=True)
    assert stats.present.tolist() == [True, False, True]
    assert (stats.gram[1] == 0).all()
    assert float(stats.noise_scale[1]) == 0
    torch.testing.assert_close(stats.gram[::2, ::2], good.gram[::2, ::2])


# ---- where noise dominates -------------------------------------------------------------------------------------------


def noisy_stats() -> GradStats:
    gram = torch.tensor([[-1.0, 0.5], [0.5, 4.0]], dtype=torch.float64)
    return GradStats(
        gram,
        ("a", "b"),
        torch.tensor([True, True]),
        standard_error=torch.full((2, 2), 2.0, dtype=torch.float64),
        noise_trace=torch.tensor([30.0, 40.0], dtype=torch.float64),
    )


def test_a_negative_square_is_a_norm_of_zero(tmp_path) -> None:
    stats = noisy_stats()
    assert stats.norms.tolist() == [0.0, 2.0]
    assert float(stats.cosine[0, 1]) == 0
    assert stats.finite.all()
    assert math.isinf(float(stats.condition_number))
    assert stats.norm_standard_error[0].isnan()
    assert float(stats.norm_standard_error[1]) == 0.5
    assert stats.noise_scale.tolist() == [math.inf, 10.0]
    assert stats.weighted([1.0, 3.0]).noise_scale.tolist() == [math.inf, 10.0]
    assert stats.alignment([1.0, 1.0]).isfinite().all()
    assert stats.to_dict()["noise_scale/b"] == 10.0
    assert "b" in repr(stats)
    stats.save(tmp_path / "stats.pt")
    assert torch.equal(GradStats.load(tmp_path / "stats.pt").noise_trace, stats.noise_trace)
    both = GradStats.mean([stats, GradStats(5.0 * torch.eye(2).double(), stats.names, stats.present)])
    assert both.noise_trace is None
    assert both.gram[0, 0] == 2.0


@pytest.mark.parametrize("cost", ["magnitude", "condition"])
def test_autoscale_averages_negative_squares_as_they_are(cost: str) -> None:
    """Leaving them out would keep the too large ones alone."""
    policy = AutoScale(2, 10, cost=cost, explore=1.0, windows=1, samples_per_window=10, normalize="sum")
    stats = noisy_stats()
    squares = [-3.0, 5.0] * 5  # whose mean is 1
    for square in squares:
        gram = torch.diag(torch.tensor([square, 4.0], dtype=torch.float64))
        policy(torch.ones(2), GradStats(gram, stats.names, stats.present, standard_error=stats.standard_error))
    torch.testing.assert_close(policy.weights, torch.tensor([4.0, 2.0], dtype=torch.float64) / 3, rtol=1e-4, atol=0)


@pytest.mark.parametrize("cost", ["magnitude", "condition"])
def test_autoscale_keeps_weights_where_a_window_is_all_noise(cost: str) -> None:
    policy = AutoScale(2, 10, cost=cost, explore=1.0, windows=1, samples_per_window=10)
    stats = noisy_stats()
    for _ in range(10):
        gram = -torch.eye(2, dtype=torch.float64)
        policy(torch.ones(2), GradStats(gram, stats.names, stats.present, standard_error=stats.standard_error))
    assert policy.weights.tolist() == [1.0, 1.0]


# ---- refused ---------------------------------------------------------------------------------------------------------


def _with_batch_norm(x: Tensor) -> dict[str, Tensor]:
    out = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))(x)
    return {"a": out[:, 0], "b": out[:, 1].square()}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (means, {}, r"losses: expected with unbiased=True the losses \[B\].*'a'.*got shape \(\)"),
        (lambda losses: {**losses, "b": losses["b"][:15]}, {}, r"losses: expected the same samples.*'b': 15"),
        (lambda losses: {k: v[:1] for k, v in losses.items()}, {}, r"losses: expected at least 4 samples.*got 1"),
        (lambda losses: {**losses, "b": losses["b"][:, None]}, {}, r"losses: .*'b'.*got shape \(16, 1\)"),
        (lambda losses: losses["a"], {}, r"losses: expected a tensor \[T, B\].*\(16,\)"),
        (lambda losses: dict.fromkeys(losses), {}, r"losses: expected at least one task's losses"),
        (
            lambda losses: {k: v.detach() for k, v in losses.items()},
            {},
            r"losses: none of \['a', 'b', 'c'\] has a graph",
        ),
        (dict, {"parts": 3}, r"parts: expected an integer from 4 to 16 .* got 3"),
        (dict, {"parts": 17}, r"parts: expected an integer from 4 to 16 .* got 17"),
        (dict, {"parts": 8.0}, r"parts: expected an integer.* got 8\.0"),
        (dict, {"method": "sketch"}, r"method: expected an exact method with unbiased=True, got 'sketch'"),
        (dict, {"num_directions": 8}, r"num_directions: needs method='sketch'"),
        (dict, {"store_dtype": torch.bfloat16}, r"store_dtype: needs method='sequential'"),
        (dict, {"max_bytes": 1}, r"max_bytes: "),
        (means, {"unbiased": False, "parts": 8}, r"parts: needs unbiased=True, got parts=8"),
        (lambda losses: _with_batch_norm(torch.randn(16, 6)), {}, r"unbiased: .*BatchNorm layer in training mode"),
    ],
)
def test_what_cannot_be_is_refused(change: Callable, options: dict, message: str) -> None:
    net, (x, y) = Net(), data(16)
    losses = change(net.losses(x, y))
    with pytest.raises(ValueError, match=message):
        gradstats.from_losses(losses, **{"unbiased": True, **options})
    assert all(p.grad is None for p in net.parameters())


def test_wrong_types_are_refused() -> None:
    net, (x, y) = Net(), data(16)
    with pytest.raises(TypeError, match="losses: expected a floating-point tensor for task 'b', got float"):
        gradstats.from_losses({**net.losses(x, y), "b": 1.0}, unbiased=True)
    with pytest.raises(TypeError, match=r"losses: .*'b', got torch\.int64"):
        gradstats.from_losses({**net.losses(x, y), "b": torch.arange(16)}, unbiased=True)


# ---- in the Scalarizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_scalarizer_takes_the_losses_of_samples(fused: bool) -> None:
    net, (x, y) = Net(), data(16)
    for losses in (net.losses(x, y), torch.stack(list(net.losses(x, y).values()))):
        net.zero_grad()
        monitor = gradstats.Scalarizer("uniform", tasks=NAMES, inputs=net.trunk, record_every=2, unbiased=True)
        if fused:
            total = monitor.backward(losses)
        else:
            total = monitor(losses)
            total.backward()
        torch.testing.assert_close(total.detach(), sum(means(net.losses(x, y)).values()).detach())
        grads = [p.grad for p in net.parameters()]
        expected = torch.autograd.grad(sum(means(net.losses(x, y)).values()), list(net.parameters()))
        torch.testing.assert_close(grads, list(expected))
        found = gradstats.from_losses(net.losses(x, y), net.trunk, unbiased=True)
        torch.testing.assert_close(monitor.stats.gram, found.gram)
        torch.testing.assert_close(monitor.stats.noise_scale, found.noise_scale)
        assert not monitor.wants_stats()
        torch.testing.assert_close(monitor(net.losses(x, y)).detach(), total.detach())


def test_scalarizer_refuses_what_it_cannot_use() -> None:
    net, (x, y) = Net(), data(16)
    with pytest.raises(ValueError, match=r"method: expected an exact method with unbiased=True"):
        gradstats.Scalarizer("uniform", tasks=NAMES, method="sketch", unbiased=True)
    monitor = gradstats.Scalarizer("uniform", tasks=NAMES, unbiased=True)
    with pytest.raises(ValueError, match=r"losses: expected with unbiased=True the losses \[B\].*'a'.*got shape \(\)"):
        monitor(means(net.losses(x, y)))
    with pytest.raises(TypeError, match=r"a tensor \[T, B\], got shape \(16,\)"):
        monitor(net.losses(x, y)["a"])

"""Sketched Gramians: unbiased, with honest standard errors, reproducible, and refused where they would be wrong."""

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats import GradStats, Scalarizer
from gradstats.collect.driver import collect
from gradstats.collect.sketch import _strata
from gradstats.weighting import AutoScale

pytestmark = pytest.mark.usefixtures("one_thread")

NORMAL_95 = 1.96


class Heads(nn.Module):
    """A trunk with one linear head for each of ``T`` tasks, whose losses have very different scales."""

    def __init__(self, trunk: nn.Module, width: int, num_tasks: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x)
        target = torch.zeros(len(features))
        return {
            f"t{i}": 10.0**i * nn.functional.mse_loss(head(features).squeeze(1).float(), target + i)
            for i, head in enumerate(self.heads)
        }


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(11, 6), nn.LSTM(6, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.embedding(x))[0][:, -1]


class Tied(nn.Module):
    """One weight used twice, and once directly by its parent, with a checkpoint between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=False)
        return torch.tanh(self.inner(x) @ self.inner.weight)


def model_and_batch(kind: str, num_tasks: int = 4) -> tuple[Heads, Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        trunk = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8))
        return Heads(trunk, 8, num_tasks), torch.randn(16, 8)
    if kind == "convolution":
        trunk = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
        return Heads(trunk, 64, num_tasks), torch.randn(8, 2, 6, 6)
    if kind == "recurrent":
        return Heads(Recurrent(), 8, num_tasks), torch.randint(11, (8, 5))
    if kind == "attention":
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        return Heads(nn.Sequential(layer, nn.Flatten()), 24, num_tasks), torch.randn(6, 3, 8)
    return Heads(Tied(), 8, num_tasks), torch.randn(10, 8)


KINDS = ("mlp", "convolution", "recurrent", "attention", "tied")


@pytest.fixture(autouse=True)
def differentiable_attention():
    """The fused attention kernels cannot be differentiated twice."""
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        yield


def sketches(losses, inputs, count: int, **options) -> list[GradStats]:
    return [
        gradstats.from_losses(losses, inputs, method="sketch", seed=seed, retain_graph=True, **options)
        for seed in range(count)
    ]


# ---- the estimate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_with_standard_errors_that_cover(kind):
    model, x = model_and_batch(kind)
    losses = model.losses(x)
    exact = gradstats.from_losses(losses, model.trunk, method="sequential", retain_graph=True)
    draws = sketches(losses, model.trunk, 80)
    unit = torch.outer(exact.norms, exact.norms)
    upper = torch.triu_indices(4, 4)
    errors = torch.stack([(draw.gram - exact.gram) / unit for draw in draws])[:, upper[0], upper[1]]
    stated = torch.stack([draw.standard_error / unit for draw in draws])[:, upper[0], upper[1]]
    assert all(draw.method == "sketch" for draw in draws)
    assert all(torch.equal(draw.gram, draw.gram.T) for draw in draws)
    assert not any(draw.gram.requires_grad or draw.standard_error.requires_grad for draw in draws)
    # Unbiased: the mean of 80 is off by no more than its own error makes likely, and that is small.
    assert float((errors.mean(0).abs() / (errors.std(0) / math.sqrt(80))).max()) < 4
    assert float(errors.mean(0).abs().max()) < 0.12
    # The stated errors are those seen, or somewhat larger, and about those of 32 directions over all parameters.
    ratio = stated.square().mean(0).sqrt() / errors.std(0)
    assert float(ratio.min()) > 0.85
    assert float(ratio.median()) < 1.6
    assert float(errors.square().mean()) < 2 * 2 / 32
    covered = (errors.abs() < NORMAL_95 * stated).double().mean()
    assert 0.90 <= float(covered) <= 0.99


def test_a_mean_over_steps_covers_too_and_errors_fall_with_the_number_of_directions():
    model, x = model_and_batch("mlp")
    losses = model.losses(x)
    exact = gradstats.from_losses(losses, model.trunk, retain_graph=True)
    draws = sketches(losses, model.trunk, 160)
    means = [GradStats.mean(draws[i : i + 4]) for i in range(0, 160, 4)]
    covered = torch.stack([(m.gram - exact.gram).abs() < NORMAL_95 * m.standard_error for m in means]).double()
    assert 0.90 <= float(covered.mean()) <= 0.995
    many = gradstats.from_losses(losses, model.trunk, method="sketch", num_directions=3200, seed=0, retain_graph=True)
    relative = many.standard_error.diagonal() / many.gram.diagonal()
    expected = means[0].standard_error.diagonal() / means[0].gram.diagonal() / math.sqrt(25)
    torch.testing.assert_close(relative, expected, rtol=0.4, atol=0)
    torch.testing.assert_close(many.norms, exact.norms, rtol=0.06, atol=0)


def test_the_relative_error_does_not_depend_on_the_number_of_tasks_nor_does_the_number_of_backwards(monkeypatch):
    calls = []
    gradient = torch.autograd.grad

    def counted(*args, **kwargs):
        calls[-1] += 1
        return gradient(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    errors = []
    for num_tasks in (2, 64):
        calls.append(0)
        torch.manual_seed(0)
        trunk, head = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), nn.Linear(8, num_tasks)
        losses = head(trunk(torch.randn(16, 8))).square().mean(0)
        stats = gradstats.from_losses(losses, trunk, method="sketch", seed=0)
        errors.append(float((stats.norm_standard_error / stats.norms).mean()))
    assert abs(calls[0] - calls[1]) <= 2  # the strata may fall differently
    assert max(calls) < 20
    assert errors == pytest.approx([1 / math.sqrt(2 * 32)] * 2, rel=0.5)


def test_what_one_task_alone_reaches_is_exact():
    model, x = model_and_batch("mlp")
    exact = gradstats.from_losses(model.losses(x), model, group_by="module")
    stats = gradstats.from_losses(model.losses(x), model, group_by="module", method="sketch")
    assert stats.groups.keys() == exact.groups.keys()
    for name, group in stats.groups.items():
        if name.startswith("heads"):
            torch.testing.assert_close(group.gram, exact.groups[name].gram, rtol=1e-6, atol=1e-20)
            assert group.standard_error is None
        else:
            assert group.standard_error is not None
    total = sum(group.gram for group in stats.groups.values())
    torch.testing.assert_close(stats.gram, total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("group_by", ["parameter", "module"])
def test_groups_are_unbiased_and_sum_to_the_total(group_by):
    model, x = model_and_batch("mlp")
    losses = model.losses(x)
    exact = gradstats.from_losses(losses, model.trunk, group_by=group_by, retain_graph=True)
    draws = sketches(losses, model.trunk, 30, group_by=group_by)
    mean = GradStats.mean(draws)
    for name, group in mean.groups.items():
        assert float(((group.gram - exact.groups[name].gram).abs() / group.standard_error).max()) < 5
    torch.testing.assert_close(sum(g.gram for g in mean.groups.values()), mean.gram, rtol=1e-12, atol=0)
    squares = sum(g.standard_error.square() for g in draws[0].groups.values())
    torch.testing.assert_close(draws[0].standard_error, squares.sqrt())


def test_metric_loss_scale_and_absent_tasks():
    model, x = model_and_batch("mlp")
    parameters = list(model.trunk.parameters())
    metric = [torch.rand_like(p) * 10 ** (3 * k % 5) for k, p in enumerate(parameters)]
    losses: dict[str, Tensor | None] = dict(model.losses(x))
    losses["t1"] = None
    losses["absent"] = torch.tensor(1.0)
    exact = gradstats.from_losses(losses, parameters, metric=metric, retain_graph=True)
    scaled = {name: None if loss is None else 8.0 * loss for name, loss in losses.items()}
    mean = GradStats.mean(sketches(scaled, parameters, 40, metric=metric, loss_scale=8.0))
    assert mean.present.tolist() == exact.present.tolist() == [True, False, True, True, False]
    known = exact.present[:, None] & exact.present
    assert float(((mean.gram - exact.gram).abs() / mean.standard_error)[known].max()) < 5
    assert not mean.gram[~known].any()
    assert not mean.standard_error[~known].any()
    relative = (mean.norm_standard_error / mean.norms)[exact.present]
    assert float(relative.max()) < 0.05


def test_activations_as_inputs_and_gradients_that_cancel():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = torch.tanh(2 * x)
    losses = [hidden.sum(), -hidden.sum(), hidden[0].square().sum()]
    exact = gradstats.from_losses(losses, hidden, retain_graph=True)
    mean = GradStats.mean(sketches(losses, hidden, 40))
    torch.testing.assert_close(mean.gram, exact.gram, rtol=0, atol=6 * float(mean.standard_error.max()))
    zero = gradstats.from_losses([0.0 * hidden.sum(), 0.0 * hidden.sum()], hidden, method="sketch")
    assert not zero.gram.any()
    assert not zero.standard_error.any()


def test_a_task_that_is_not_finite_touches_its_own_row_and_column_alone():
    model, x = model_and_batch("mlp")
    losses = model.losses(x)
    losses["t2"] = losses["t2"] * torch.inf
    stats = gradstats.from_losses(losses, model.trunk, method="sketch")
    assert stats.non_finite_names == ("t2",)
    keep = [0, 1, 3]
    assert stats.gram[keep][:, keep].isfinite().all()
    assert stats.standard_error[keep][:, keep].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model, x = model_and_batch("mlp")
    model, x = model.to(dtype), x.to(dtype)
    losses = model.losses(x)
    exact = gradstats.from_losses(losses, model.trunk, retain_graph=True)
    mean = GradStats.mean(sketches(losses, model.trunk, 20))
    assert mean.gram.dtype == torch.float64
    torch.testing.assert_close(mean.norms, exact.norms, rtol=0.15, atol=0)


def test_autocast():
    model, x = model_and_batch("mlp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(x)
        exact = gradstats.from_losses(losses, model.trunk, retain_graph=True)
        mean = GradStats.mean(sketches(losses, model.trunk, 20))
    torch.testing.assert_close(mean.norms, exact.norms, rtol=0.12, atol=0)


@given(
    energies=st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 50.0]), min_size=1, max_size=30),
    directions=st.integers(8, 70),
)
def test_strata_hold_every_input_once_and_all_directions(energies, directions):
    strata = _strata(range(len(energies)), energies, directions)
    assert [k for members, _ in strata for k in members] == list(range(len(energies)))
    assert sum(count for _, count in strata) == directions
    assert min(count for _, count in strata) >= 8
    for members, count in strata:  # no stratum is much poorer than what it holds
        held = sum(energies[k] for k in members) / (sum(energies) or 1.0)
        assert count / directions > held - 1.2 / (directions // 8)


# ---- what it leaves behind -----------------------------------------------------------------------------------------


def test_seeds_reproduce_and_random_numbers_stay():
    model, x = model_and_batch("mlp")
    losses = model.losses(x)

    def sketch(seed):
        return gradstats.from_losses(losses, model.trunk, method="sketch", seed=seed, retain_graph=True).gram

    before = torch.get_rng_state()
    first = sketch(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sketch(None), first)
    assert torch.equal(sketch(7), sketch(7))
    assert not torch.equal(sketch(7), sketch(8))
    # Without a seed another step has other directions: its errors are not those of the step before.
    nudged = model.losses(x + 1e-6)
    other = gradstats.from_losses(nudged, model.trunk, method="sketch").gram
    assert float((other / first - 1).abs().max()) > 1e-3


def test_gradients_buffers_hooks_and_graph_stay():
    model, x = model_and_batch("convolution")
    losses = model.losses(x)
    parameters = list(model.parameters())
    kept = torch.ones_like(parameters[0])
    parameters[0].grad = kept
    buffers = [b.clone() for b in model.buffers()]
    fired = []
    handle = parameters[0].register_post_accumulate_grad_hook(fired.append)
    gradstats.from_losses(losses, model.trunk, method="sketch", retain_graph=True)
    assert parameters[0].grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert all(p.grad is None for p in parameters[1:])
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert not fired
    handle.remove()
    parameters[0].grad = None
    expected = torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True)
    gradstats.backward(losses, [1.0] * 4, model.trunk, method="sketch")
    for p, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    with pytest.raises(RuntimeError, match="second time"):
        gradstats.from_losses(losses, model.trunk, method="sketch")


def test_the_graph_is_freed_unless_kept():
    model, x = model_and_batch("mlp")
    losses = model.losses(x)
    gradstats.from_losses(losses, model.trunk, method="sketch")
    with pytest.raises(RuntimeError, match="second time"):
        sum(losses.values()).backward()


# ---- several processes ---------------------------------------------------------------------------------------------


class Ranks:
    """Means over threads, each of which stands for a rank."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60)
        self._values: dict[int, Tensor] = {}

    def mean(self, rank: int, value: Tensor) -> Tensor:
        self._values[rank] = value
        self._barrier.wait()
        mean = torch.stack([self._values[r] for r in sorted(self._values)]).double().mean(0).to(value.dtype)
        self._barrier.wait()
        return mean

    def run(self, work) -> list:
        results: dict[int, object] = {}
        threads = [
            threading.Thread(target=lambda r=r: results.__setitem__(r, work(r))) for r in range(self._barrier.parties)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[r] for r in range(len(threads))]


def test_ranks_agree_on_the_sketch_of_the_averaged_gradient():
    model, x = model_and_batch("mlp")
    shards = (x[:8], x[8:])
    exact = gradstats.from_losses(model.losses(x), model)  # mean over all rows = mean over ranks
    ranks = Ranks(2)

    def work(rank: int) -> GradStats:
        losses = model.losses(shards[rank])
        draws = [
            collect(
                list(losses),
                list(losses.values()),
                model,
                method="sketch",
                seed=seed,
                retain_graph=True,
                reduce=lambda value: ranks.mean(rank, value),
            )
            for seed in [None, *range(20)]
        ]
        return GradStats.mean(draws)

    first, second = ranks.run(work)
    assert torch.equal(first.gram, second.gram)
    error = (first.gram - exact.gram).abs()
    assert float((error / (first.standard_error + 1e-6 * torch.outer(exact.norms, exact.norms))).max()) < 5
    assert float((first.norms / exact.norms - 1).abs().max()) < 0.1


# ---- refusals ------------------------------------------------------------------------------------------------------


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class LeavesTheGraph(torch.autograd.Function):
    """A backward that autograd does not see, on a path beside which there is another."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient.detach()


class WithoutVmap(torch.autograd.Function):
    """Twice differentiable, but vmap has no rule for it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return Times.apply(gradient, 2 * x)


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(b)
        return a * b

    @staticmethod
    def backward(ctx, gradient):
        (b,) = ctx.saved_tensors
        assert gradient.storage_offset() == 0  # reads memory, which vmap has no place for
        gradient.data_ptr()
        return gradient * b, None


def linear_losses(middle) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    first, second, x = torch.randn(5, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True), torch.randn(7, 5)
    outputs = middle(x @ first) @ second
    return list(outputs.square().mean(0).unbind()), [first, second]


@pytest.mark.parametrize(
    "middle",
    [OnceDifferentiable.apply, LeavesTheGraph.apply, lambda h: h + LeavesTheGraph.apply(h)],
    ids=["once", "detached", "partly detached"],
)
def test_a_backward_that_cannot_be_differentiated_is_refused(middle):
    losses, inputs = linear_losses(middle)
    with pytest.raises(RuntimeError, match=r"method: 'sketch' .* use method='auto'"):
        gradstats.from_losses(losses, inputs, method="sketch", retain_graph=True)
    assert all(leaf.grad is None for leaf in inputs)
    gradstats.from_losses(losses, inputs, method="sequential")  # the graph is whole


def test_fused_attention_is_refused():
    model, _ = model_and_batch("attention")
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.FLASH_ATTENTION):
        q = model.trunk[0].self_attn.in_proj_weight
        h = (torch.randn(2, 2, 4, 8) @ q[:8]).contiguous()
        out = nn.functional.scaled_dot_product_attention(h, h, h)
    with pytest.raises(RuntimeError, match=r"method: 'sketch' .* use method='auto'.*attention"):
        gradstats.from_losses([out.sum(), out.square().sum()], [q], method="sketch")


def test_a_hook_that_is_not_linear_is_refused():
    losses, inputs = linear_losses(lambda h: h)
    inputs[0].register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    with pytest.raises(RuntimeError, match=r"method: 'sketch' .*not linear"):
        gradstats.from_losses(losses, inputs, method="sketch")


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(9, 4, sparse=True)
    out = embedding(torch.tensor([1, 2, 2]))
    with pytest.raises(RuntimeError, match=r"method: 'sketch' .*sparse"):
        gradstats.from_losses([out.sum(), out.square().sum()], embedding, method="sketch")


def test_what_vmap_refuses_goes_one_direction_at_a_time():
    losses, inputs = linear_losses(WithoutVmap.apply)
    reference, same = linear_losses(torch.square)
    got = gradstats.from_losses(losses, inputs, method="sketch", seed=3)
    expected = gradstats.from_losses(reference, same, method="sketch", seed=3)
    torch.testing.assert_close(got.gram, expected.gram, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sketch", "num_directions": 0}, "num_directions: expected an integer of at least 1, got 0"),
        ({"method": "sketch", "num_directions": 2.5}, "num_directions: expected an integer"),
        ({"method": "sketch", "seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"num_directions": 8}, "num_directions: needs method='sketch', got method='auto'"),
        ({"method": "batched", "seed": 8}, "seed: needs method='sketch', got method='batched'"),
        ({"method": "sketch", "store_dtype": torch.bfloat16}, "store_dtype: needs method='sequential'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    model, x = model_and_batch("mlp")
    with pytest.raises(ValueError, match=message):
        gradstats.from_losses(model.losses(x), model.trunk, **options)


# ---- deciding from sketches ----------------------------------------------------------------------------------------


def run_window(autoscale: AutoScale, steps: list[GradStats]) -> Tensor:
    for stats in steps:
        autoscale(torch.ones(stats.num_tasks, dtype=torch.float64), stats)
    return autoscale.window_weights[-1]


def test_autoscale_averages_sketches_before_it_derives_weights():
    model, x = model_and_batch("mlp")
    losses = model.losses(x)
    steps = sketches(losses, model.trunk, 10, num_directions=8)
    found = run_window(AutoScale(4, 50, windows=1, samples_per_window=10), steps)
    mean = GradStats.mean(steps)
    expected = 1 / mean.norms
    torch.testing.assert_close(found, 4 * expected / expected.sum(), rtol=1e-9, atol=0)
    exact = gradstats.from_losses(losses, model.trunk, retain_graph=True)
    off = (found * exact.norms).log()
    error = mean.norm_standard_error / mean.norms
    assert float(((off - off.mean()).abs() / error).max()) < 4


def test_averaged_sketches_give_the_condition_weights_that_single_ones_do_not():
    """With 6 directions for 4 tasks ``log κ`` of a single sketch is far off; that of a mean of 10 is near."""
    jacobian = torch.randn(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = jacobian + 2 * jacobian[0]
    gram, generator = jacobian @ jacobian.T, torch.Generator().manual_seed(1)

    def draw(directions: int) -> GradStats:
        rows = jacobian @ torch.randn(50, directions, dtype=torch.float64, generator=generator)
        estimate = rows @ rows.T / directions
        error = torch.ones_like(estimate)  # what it is does not matter here
        names, present = tuple("abcd"), torch.ones(4, dtype=torch.bool)
        return GradStats(estimate, names, present, method="sketch", standard_error=error)

    def distance(weights: Tensor) -> float:
        exact = run_window(AutoScale(4, 50, windows=1, samples_per_window=1, cost="condition"), [exact_stats] * 10)
        off = (weights / exact).log()
        return float((off - off.mean()).norm())

    exact_stats = GradStats(gram, tuple("abcd"), torch.ones(4, dtype=torch.bool))
    averaged, single = [], []
    for _ in range(10):
        steps = [draw(6) for _ in range(10)]
        averaged.append(
            distance(run_window(AutoScale(4, 50, windows=1, samples_per_window=10, cost="condition"), steps))
        )
        unsaid = [GradStats(s.gram, s.names, s.present) for s in steps]
        single.append(
            distance(run_window(AutoScale(4, 50, windows=1, samples_per_window=10, cost="condition"), unsaid))
        )
    assert sum(averaged) < 0.75 * sum(single)


def test_absent_tasks_do_not_lower_the_average():
    model, x = model_and_batch("mlp")
    losses = model.losses(x)
    steps = sketches(losses, model.trunk, 5)
    without = {**losses, "t1": None}
    steps += sketches(without, model.trunk, 5)
    found = run_window(AutoScale(4, 50, windows=1, samples_per_window=10), steps)
    expected = 1 / GradStats.mean(steps).norms
    torch.testing.assert_close(found, 4 * expected / expected.sum(), rtol=1e-9, atol=0)


def test_the_state_remembers_that_the_samples_are_estimates():
    model, x = model_and_batch("mlp")
    steps = sketches(model.losses(x), model.trunk, 10)
    options = {"windows": 1, "samples_per_window": 10}
    first, second = AutoScale(4, 50, **options), AutoScale(4, 50, **options)
    for stats in steps[:6]:
        first(torch.ones(4, dtype=torch.float64), stats)
    second.load_state_dict(first.state_dict())
    for stats in steps[6:]:
        # The rest are said to be exact: still an average.
        second(torch.ones(4, dtype=torch.float64), GradStats(stats.gram, stats.names, stats.present))
    expected = 1 / GradStats.mean(steps).norms
    torch.testing.assert_close(second.window_weights[-1], 4 * expected / expected.sum(), rtol=1e-9, atol=0)


def test_a_scalarizer_that_sketches_finds_the_weights_of_one_that_does_not():
    def found(**options) -> tuple[Tensor, GradStats]:
        model, _ = model_and_batch("mlp")
        optimizer = torch.optim.SGD(model.parameters(), 1e-6)  # so slow that both see the same gradients
        scalarizer = Scalarizer(
            "autoscale",
            tasks=[f"t{i}" for i in range(4)],
            inputs=model.trunk,
            total_steps=50,
            windows=1,
            samples_per_window=10,
            **options,
        )
        generator = torch.Generator().manual_seed(5)
        for _ in range(10):
            optimizer.zero_grad()
            scalarizer(model.losses(torch.randn(16, 8, generator=generator))).backward()
            optimizer.step()
        return scalarizer.weighting.window_weights[-1], scalarizer.stats

    exact, _ = found()
    sketched, stats = found(method="sketch", num_directions=32)
    assert stats.method == "sketch"
    off = (sketched / exact).log()
    # Ten sketches of 32 directions: 4 % each, and the same again for the mean of squares instead of logarithms.
    assert float((off - off.mean()).abs().max()) < 0.2
    with pytest.raises(ValueError, match="num_directions: needs method='sketch'"):
        Scalarizer("uniform", tasks=["a"], num_directions=8)

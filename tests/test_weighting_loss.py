"""Weightings made of losses: against definitions, closed forms, autograd with torch.optim.Adam, and TorchJD."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchjd.scalarization
from torch import Tensor, nn

import gradstats
from gradstats import GradStats, Scalarizer
from gradstats.data.digits import overlaid_digits
from gradstats.weighting import available, create
from gradstats.weighting.loss_based import group_means

NAMES = ("uw", "imtl_l", "imtl", "gradnorm", "famo", "dwa", "rlw", "gls", "stch", "cosmos", "pbi", "go4align", "db_mtl")
SIGNED = ("imtl", "cosmos", "pbi")  # whose weights may be negative
#: Small windows, fast learning: everything there is happens within a few steps.
OPTIONS = {
    "uw": {"lr": 0.05},
    "imtl_l": {"lr": 0.05},
    "imtl": {"lr": 0.05},
    "dwa": {"window": 4},
    "stch": {"warm_up": 5},
    "go4align": {"beta": 0.1},
    "pbi": {"theta": 0.5},
    "pcd": {"tau": 1.0},  # by default of little use to the task that comes second
    "krum": {"num_selected": 2},
    "fixed": {"weights": [1.0, 2.0]},
    "autoscale": {"total_steps": 50},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def stats_of(gram: Tensor) -> GradStats:
    num_tasks = len(gram)
    return GradStats(gram=gram, names=tuple("abcdefgh"[:num_tasks]), present=gram.diagonal() > 0)


def steps_of(num_tasks: int = 3, steps: int = 25, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Falling positive losses and Gramians of random gradients, of tasks that differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, 1, num_tasks, dtype=torch.float64)
    result = []
    for step in range(steps):
        noise = torch.rand(num_tasks, dtype=torch.float64, generator=generator)
        jacobian = scales[:, None] * torch.randn(num_tasks, 7, dtype=torch.float64, generator=generator)
        result.append((scales * (0.2 + noise) * 0.97**step, jacobian @ jacobian.T))
    return result


def weights_of(weighting, steps) -> list[Tensor]:
    return [weighting(losses, stats_of(gram) if weighting.wants_stats() else None) for losses, gram in steps]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual, expected, rtol=1e-10):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=rtol, atol=0)


# ---- functions of the losses: the weighted sum has the gradient of the function --------------------------------------


def gradient_of(function: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor:
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(function(losses), losses)[0]


def test_gls_is_the_gradient_of_the_geometric_mean():
    losses = vector(0.3, 2.0, 50.0)
    weights = create("gls", 3)(losses)
    assert_close(weights, gradient_of(lambda x: x.prod() ** (1 / 3), losses))
    assert_close(weights, gradient_of(torchjd.scalarization.GeometricMean(), losses))
    assert_close(weights * losses, losses.log().mean().exp().expand(3) / 3)


@pytest.mark.parametrize("mu", [0.01, 1.0])
def test_stch_is_the_gradient_of_the_smooth_maximum(mu):
    losses, preference, ideal = vector(0.3, 0.4, 0.1), vector(0.2, 0.3, 0.5), vector(0.1, -0.1, 0.0)
    weights = create("stch", 3, mu=mu, preference=preference.tolist(), ideal=ideal.tolist())(losses)
    assert_close(weights, gradient_of(lambda x: 3 * mu * torch.logsumexp(preference * (x - ideal) / mu, 0), losses))
    # The factor T is ours.
    assert_close(weights, 3 * gradient_of(torchjd.scalarization.STCH(mu, preference, ideal), losses))
    assert_close(create("stch", 3, mu=mu)(losses).sum(), vector(3.0)[0])


def test_stch_after_a_warm_up_works_on_relative_log_losses():
    steps, ideal = steps_of(), vector(0.0, -1.0, -2.0)
    weighting = create("stch", 3, mu=0.5, warm_up=5, ideal=ideal.tolist())
    found = weights_of(weighting, steps)
    mean = torch.stack([losses - ideal for losses, _ in steps[:5]]).mean(0)
    for step, (losses, _) in enumerate(steps):
        if step < 5:
            expected = gradient_of(lambda x: (x - ideal).log().sum(), losses)
        else:
            expected = gradient_of(lambda x: 3 * 0.5 * torch.logsumexp(((x - ideal) / mean).log() / 0.5, 0), losses)
        assert_close(found[step], expected)
        assert_close((found[step] * (losses - ideal)).sum(), vector(3.0)[0])


@pytest.mark.parametrize("preference", [None, [0.2, 3.0, 1.0]])
def test_cosmos_and_pbi_are_the_gradients_of_their_functions(preference):
    scalarization, wanted = torchjd.scalarization, vector(*(preference or [1.0, 1.0, 1.0]))
    for losses, _ in steps_of():
        cosmos = create("cosmos", 3, strength=2.0, preference=preference)
        assert_close(cosmos(losses), gradient_of(scalarization.COSMOS(2.0, wanted), losses))
        pbi = create("pbi", 3, preference=preference, ideal=[-1.0, 0.0, 0.1])
        reference = vector(-1.0, 0.0, 0.1)
        assert_close(pbi(losses), gradient_of(scalarization.PBI(5.0, wanted, reference), losses), rtol=1e-9)
    # In the preferred proportion there is nothing to turn, however small or large the losses.
    for scale in (1e-6, 1.0, 1e100):
        assert_close(create("cosmos", 3, preference=preference)(scale * wanted) / wanted, vector(1, 1, 1), rtol=1e-9)
        assert_close(create("pbi", 3, preference=preference)(scale * wanted), wanted / wanted.norm())


def test_db_mtl_equalises_the_gradients_of_the_log_losses():
    losses, gram = steps_of()[0]
    norms = gram.diagonal().sqrt()
    weights = create("db_mtl", 3)(losses, stats_of(gram))
    log_norms = norms / losses
    assert_close(weights, log_norms.max() / log_norms / losses)
    assert_close(weights * norms, log_norms.max().expand(3))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_dwa_follows_its_definition_and_torchjd():
    window, temperature = 4, 1.5
    steps = steps_of(steps=20)
    found = weights_of(create("dwa", 3, window=window, temperature=temperature), steps)
    losses = torch.stack([losses for losses, _ in steps])
    means = losses.reshape(5, window, 3).mean(1)
    theirs = torchjd.scalarization.DWA(temperature)
    for step in range(20):
        epoch = step // window
        rates = means[epoch - 1] / means[epoch - 2] if epoch >= 2 else torch.ones(3, dtype=torch.float64)
        assert_close(found[step], 3 * torch.softmax(rates / temperature, 0))
        assert_close(found[step], gradient_of(theirs, losses[step]))
        if (step + 1) % window == 0:
            theirs.step()


def test_dwa_takes_a_rate_for_one_where_it_has_no_meaning():
    weighting = create("dwa", 4, window=1)
    for losses in (vector(1.0, 0.0, 1.0, math.nan), vector(2.0, 1.0, -1.0, 3.0)):
        weighting(losses)
    # TorchJD would take -1 and inf for the second and third; a negative loss that falls has a rate above 1 there.
    assert_close(weighting.weights, 4 * torch.softmax(vector(2.0, 1.0, 1.0, 1.0) / 2, 0))


def test_a_window_without_a_loss_keeps_its_mean():
    weighting = create("dwa", 2, window=2)
    for losses in (vector(1, 8), vector(1, math.nan), vector(2, 4), vector(2, math.inf), vector(2, math.nan)):
        weighting(losses)
    assert_close(weighting.weights, 2 * torch.softmax(vector(2.0, 0.5) / 2, 0))
    weighting(vector(3, math.nan))
    assert_close(weighting.weights, 2 * torch.softmax(vector(1.25, 1.0) / 2, 0))
    for losses in (vector(5, 2), vector(5, 2)):
        weighting(losses)
    assert_close(weighting.weights, 2 * torch.softmax(vector(2.0, 0.5) / 2, 0))


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_rlw_draws_from_its_distribution(distribution):
    weighting = create("rlw", 4, distribution=distribution)
    drawn = torch.stack([weighting(torch.ones(4, dtype=torch.float64)) for _ in range(4000)])
    assert_close(drawn.sum(1), torch.full((4000,), 4.0, dtype=torch.float64))
    torch.manual_seed(0)
    if distribution == "normal":  # TorchJD's weights sum to 1
        theirs, first = torchjd.scalarization.Random(), vector(1, 0, 0, 0)
        expected = 4 * torch.stack([theirs(first) for _ in range(20_000)])
    else:  # normalised exponential numbers are uniform on the simplex
        exponential = -torch.rand(20_000, 4, dtype=torch.float64).log()
        expected = 4 * exponential[:, 0] / exponential.sum(1)
    shares = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for task in range(4):
        difference = drawn[:, task].quantile(shares) - expected.quantile(shares)
        assert difference.abs().max() < 0.15  # three standard errors of the highest quantile
    successive = torch.corrcoef(torch.stack([drawn[1:, 0], drawn[:-1, 0]]))[0, 1]
    assert successive.abs() < 0.06


def test_rlw_repeats_with_its_seed_alone():
    losses = torch.ones(3, dtype=torch.float64)
    first, second, other = (create("rlw", 3, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(0)
    draws = [first(losses) for _ in range(3)]
    assert torch.equal(torch.stack(draws), torch.stack([second(losses) for _ in range(3)]))
    assert not torch.equal(draws[0], other(losses))


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 1e12])
@pytest.mark.parametrize("seed", range(3, 7))  # 4 and 6: the sums of fourth powers have another optimum
def test_groups_are_the_best_of_all(num_groups, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(6, dtype=torch.float64, generator=generator)
    values[0] *= scale
    known = torch.tensor([True] * 5 + [seed != 3])
    x, kept = values.numpy(), known.numpy()
    best = math.inf
    for labels in itertools.product(range(num_groups), repeat=6):
        groups = [x[kept & (np.array(labels) == group)] for group in range(num_groups)]
        best = min(best, sum(float(((group - group.mean()) ** 2).sum()) for group in groups if len(group)))
    means = group_means(values, known, num_groups)
    assert float((values - means).square()[known].sum()) == pytest.approx(best, rel=1e-9, abs=1e-30)
    assert len(means[known].unique()) <= num_groups


def test_groups_of_equal_numbers():
    assert group_means(vector(2, 1, 2, 1, 1), torch.ones(5, dtype=torch.bool), 4).tolist() == [2, 1, 2, 1, 1]


def test_go4align_follows_its_definition():
    steps, beta = steps_of(num_tasks=4), 0.05
    found = weights_of(create("go4align", 4, num_groups=4, beta=beta), steps)
    shares = torch.full((4,), 0.25, dtype=torch.float64)
    for (losses, _), weights in zip(steps, found, strict=True):
        shares = shares * torch.exp(-beta * losses)
        shares = shares / shares.sum()
        assert_close(weights, shares * losses.sum() / losses)  # four groups of four tasks
    losses, _ = steps[0]
    one = create("go4align", 4, num_groups=1, beta=beta)(losses)
    assert_close(one, found[0].mean().expand(4))
    assert len(create("go4align", 4, beta=beta)(losses).unique()) == 2


# ---- learned: the trajectory of autograd and torch.optim.Adam --------------------------------------------------------


def adam(parameter: Tensor, lr: float, weight_decay: float = 0.0) -> torch.optim.Adam:
    return torch.optim.Adam([parameter], lr=lr, weight_decay=weight_decay)


def trajectory(steps, *, lr: float, weights_of: Callable, objective: Callable) -> list[Tensor]:
    """Weights of a parameter that Adam learns by descending on ``objective(parameter, losses, gram)``."""
    parameter = torch.zeros(len(steps[0][0]), dtype=torch.float64, requires_grad=True)
    optimizer = adam(parameter, lr)
    result = []
    for losses, gram in steps:
        result.append(weights_of(parameter).detach().clone())
        optimizer.zero_grad()
        objective(parameter, losses, gram).backward()
        optimizer.step()
    return result


def test_uw_is_learned_with_its_objective():
    steps = steps_of()
    expected = trajectory(
        steps,
        lr=0.03,
        weights_of=lambda s: 0.5 * torch.exp(-s),
        objective=lambda s, losses, _: (0.5 * torch.exp(-s) * losses + 0.5 * s).sum(),
    )
    assert_close(torch.stack(weights_of(create("uw", 3, lr=0.03), steps)), torch.stack(expected))


@pytest.mark.parametrize(("name", "theirs"), [("uw", "UW"), ("imtl_l", "IMTLL")])
def test_learned_jointly_with_a_network_as_torchjd_does(name, theirs):
    """TorchJD's parameters go to the optimizer of the network: the same weights and the same network."""
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        network = nn.Linear(5, 3).double()
        data, targets = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
        scalarizer = (
            Scalarizer(name, tasks=["a", "b", "c"], lr=0.01)
            if ours
            else getattr(torchjd.scalarization, theirs)(3).double()
        )
        parameters = [*network.parameters(), *scalarizer.parameters()]
        assert len(parameters) == (2 if ours else 3)
        optimizer = torch.optim.Adam(parameters, lr=0.01)
        for _ in range(30):
            optimizer.zero_grad()
            scalarizer((network(data) - targets).square().mean(0)).backward()
            optimizer.step()
        results.append(network.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)


def test_imtl_l_is_learned_with_its_objective_and_is_twice_uw():
    steps = steps_of()
    expected = trajectory(
        steps,
        lr=0.03,
        weights_of=torch.exp,
        objective=lambda s, losses, _: (torch.exp(s) * losses - s).sum(),
    )
    found = torch.stack(weights_of(create("imtl_l", 3, lr=0.03), steps))
    assert_close(found, torch.stack(expected))
    assert_close(found, 2 * torch.stack(weights_of(create("uw", 3, lr=0.03), steps)), rtol=1e-6)


@pytest.mark.parametrize(("name", "product"), [("uw", 0.5), ("imtl_l", 1.0)])
def test_equal_weighted_losses_are_the_fixed_point(name, product):
    losses = vector(0.2, 1.0, 30.0)
    weighting = create(name, 3, lr=0.05)
    for _ in range(600):
        weights = weighting(losses)
    assert_close(weights * losses, torch.full_like(losses, product), rtol=0.01)


def test_imtl_balances_projections_and_learns_its_scales():
    steps = steps_of()
    weighting, loss_balance = create("imtl", 3, lr=0.05), create("imtl_l", 3, lr=0.05)
    for (losses, gram), weights in zip(steps, weights_of(weighting, steps), strict=True):
        scales = loss_balance(losses)
        projections = gram @ weights / gram.diagonal().sqrt()
        assert_close(projections, projections[:1].expand(3), rtol=1e-8)
        assert_close((weights / scales).sum(), vector(1.0)[0])


def test_gradnorm_is_learned_with_its_objective():
    steps, alpha = steps_of(), 1.5
    first = steps[0][0]

    def objective(logits: Tensor, losses: Tensor, gram: Tensor) -> Tensor:
        norms = 3 * torch.softmax(logits, 0) * gram.diagonal().sqrt()
        mean = norms.mean().detach()
        rates = losses / first / (losses / first).mean()
        return (norms - mean * rates**alpha).abs().sum() / mean

    expected = trajectory(steps, lr=0.02, weights_of=lambda z: 3 * torch.softmax(z, 0), objective=objective)
    found = torch.stack(weights_of(create("gradnorm", 3, lr=0.02, alpha=alpha), steps))
    assert_close(found, torch.stack(expected))
    assert_close(found.sum(1), torch.full((len(steps),), 3.0, dtype=torch.float64))


def test_gradnorm_evens_out_norms_where_rates_are_equal():
    weighting = create("gradnorm", 3)
    norms = vector(1.0, 10.0, 100.0)
    for _ in range(500):
        weights = weighting(torch.ones(3, dtype=torch.float64), stats_of(torch.diag(norms**2)))
    sizes = weights * norms
    assert float(sizes.max() / sizes.min()) < 1.2


def famo_by_the_paper(steps, after, lr, weight_decay):
    """The published algorithm with explicit autograd: weights of the steps."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = adam(logits, lr, weight_decay)
    result = []
    for (losses, _), later in zip(steps, after, strict=True):
        network_losses = losses.clone().requires_grad_()
        shares = torch.softmax(logits, 0).detach()
        constant = 1 / (shares / losses).sum()
        result.append(torch.autograd.grad(constant * (shares * network_losses.log()).sum(), network_losses)[0])
        optimizer.zero_grad()
        (torch.softmax(logits, 0) * (losses.log() - later.log())).sum().backward()
        optimizer.step()
    return torch.stack(result)


def test_famo_follows_the_paper_and_torchjd():
    steps = steps_of()
    after = [losses * factor for (losses, _), factor in zip(steps, torch.rand(25, 3).double() + 0.5, strict=True)]
    expected = famo_by_the_paper(steps, after, 0.025, 1e-3)
    weighting, theirs = create("famo", 3), torchjd.scalarization.FAMO(3).double()
    for step, (losses, _) in enumerate(steps):
        weights = weighting(losses)
        assert_close(weights, expected[step])
        assert_close(weights, gradient_of(theirs, losses), rtol=1e-6)  # theirs adds 1e-8 to the losses
        weighting.after_step(after[step])
        theirs.update(after[step])
    assert_close(weights.sum(), vector(1.0)[0])


def test_famo_makes_do_with_the_next_losses():
    steps = steps_of()
    after = [losses for losses, _ in steps[1:]] + [steps[-1][0]]
    found = torch.stack(weights_of(create("famo", 3, lr=0.1, weight_decay=0.0), steps))
    assert_close(found, famo_by_the_paper(steps, after, 0.1, 0.0))


def test_famo_learns_once_a_step():
    weighting, twice = create("famo", 2), create("famo", 2)
    for one in (weighting, twice):
        one(vector(1, 2))
        one.after_step(vector(0.5, 1.9))
    twice.after_step(vector(3.0, 0.1))
    assert torch.equal(weighting(vector(4, 5)), twice(vector(4, 5)))


# ---- for all ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_task(name):
    weighting = create(name, 1, **OPTIONS.get(name, {}))
    for weights in weights_of(weighting, steps_of(num_tasks=1)):
        assert weights.shape == (1,)
        assert weights.isfinite().all()
        assert (weights > 0).all()
        if name in ("dwa", "rlw", "gradnorm", "famo", "go4align"):
            assert_close(weights, vector(1.0))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "rlw"])
def test_tasks_may_come_in_any_order(name):
    order = torch.tensor([2, 0, 3, 1])
    steps = steps_of(num_tasks=4)
    permuted = [(losses[order], gram[order][:, order]) for losses, gram in steps]
    expected = torch.stack(weights_of(create(name, 4, **OPTIONS.get(name, {})), steps))[:, order]
    found = torch.stack(weights_of(create(name, 4, **OPTIONS.get(name, {})), permuted))
    assert_close(found, expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["gls", "famo", "db_mtl", "imtl", "stch"])
def test_scaled_losses_give_the_same_direction(name):
    """A task in other units has its loss and gradient multiplied: the weighted gradient should not turn.

    That of IMTL may turn round: its coefficients sum to 1, also where the sum of the unscaled ones is negative.
    """
    units = vector(1e-6, 1.0, 1e9)
    steps = steps_of()
    scaled = [(units * losses, units[:, None] * gram * units) for losses, gram in steps]
    plain = torch.stack(weights_of(create(name, 3, **OPTIONS.get(name, {})), steps))
    found = torch.stack(weights_of(create(name, 3, **OPTIONS.get(name, {})), scaled)) * units
    assert_close(found / found[:, :1], plain / plain[:, :1], rtol=1e-6)


@pytest.mark.parametrize("name", ["dwa", "gradnorm"])
def test_rates_do_not_depend_on_units(name):
    units = vector(1e-6, 1.0, 1e9)
    steps = steps_of()
    scaled = [(units * losses, 1e12 * gram) for losses, gram in steps]
    plain, found = (torch.stack(weights_of(create(name, 3, **OPTIONS.get(name, {})), s)) for s in (steps, scaled))
    assert_close(found, plain, rtol=1e-7)


ODD_LOSSES = [
    (math.nan, 1.0, 2.0),
    (0.0, 1.0, 2.0),
    (-3.0, 1.0, 2.0),
    (math.inf, 1.0, 2.0),
    (math.nan, math.nan, math.nan),
    (0.0, 0.0, 0.0),
    (-1.0, -2.0, -3.0),
    (1e-300, 1.0, 1e300),
    (1e-12, 1.0, 1e12),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("odd", ODD_LOSSES)
def test_odd_losses_give_finite_weights_and_do_no_lasting_harm(name, odd):
    weighting = create(name, 3, **OPTIONS.get(name, {}))
    steps = steps_of(steps=40)
    for losses, gram in [*steps[:12], (vector(*odd), steps[0][1]), *steps[12:]]:
        weights = weighting(losses, stats_of(gram) if weighting.wants_stats() else None)
        assert weights.isfinite().all()
        assert name in SIGNED or (weights >= 0).all()
    assert (weights != 0).all()


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        *itertools.product(["gls", "go4align", "db_mtl", "famo"], [math.nan, 0.0, -3.0, math.inf]),
        *itertools.product(["stch", "cosmos", "pbi"], [math.nan, math.inf]),  # whose functions take any finite loss
    ],
)
def test_a_task_left_out_keeps_its_weight_and_leaves_the_others_alone(name, odd):
    weighting, without = create(name, 3), create(name, 2)
    before = weighting.weights[1]
    jacobian = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rest = torch.tensor([0, 2])
    weights = weighting(vector(2.0, odd, 3.0), stats_of(jacobian @ jacobian.T))
    assert_close(weights[rest], without(vector(2.0, 3.0), stats_of(jacobian[rest] @ jacobian[rest].T)))
    assert weights[1] == before


@pytest.mark.parametrize("name", ["uw", "imtl_l", "imtl", "famo", "gls", "stch", "cosmos", "pbi", "go4align", "db_mtl"])
def test_a_task_that_never_has_a_loss_changes_nothing_for_the_others(name):
    rest, others = torch.tensor([0, 2]), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    steps = steps_of()
    without = [(losses[rest], gram[rest][:, rest]) for losses, gram in steps]
    steps = [(losses / others * others, others[:, None] * gram * others) for losses, gram in steps]
    assert steps[0][0][1].isnan()
    found, expected = (
        torch.stack(weights_of(create(name, len(s[0][0]), **OPTIONS.get(name, {})), s)) for s in (steps, without)
    )
    assert_close(found[:, rest], expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["uw", "imtl_l", "gradnorm", "famo"])
def test_a_task_without_a_loss_takes_no_step(name):
    weighting = create(name, 3)
    state = ("learned", "first_moment", "second_moment", "count")
    for step, (losses, gram) in enumerate(steps_of()):
        before = {key: getattr(weighting, key).clone() for key in state}
        odd = (math.nan, 0.0, -1.0)[step % 3] if name != "gradnorm" else math.nan
        missing = step % 4 == 3
        losses = torch.where(torch.arange(3) == 1, odd, losses) if missing else losses
        weighting(losses, stats_of(gram))
        if name == "famo":
            weighting.after_step(losses / (1.0 + torch.arange(3)))
        for key in state:
            assert bool(getattr(weighting, key)[1] == before[key][1]) == missing, key
            assert getattr(weighting, key)[0] != before[key][0]


@pytest.mark.parametrize("name", ["imtl", "gradnorm", "db_mtl"])
def test_steps_without_a_gramian_and_zero_gradients(name):
    weighting = create(name, 3)
    steps = steps_of()
    weights_of(weighting, steps)
    before = weighting.weights.clone()
    weights = weighting(steps[0][0], None)
    if name == "imtl":  # its scales go on
        assert_close(weights, before, rtol=0.01)
    else:
        assert torch.equal(weights, before)
    for gram in (torch.zeros(3, 3), torch.diag(vector(1.0, 0.0, 2.0)), torch.ones(3, 3)):
        assert weighting(steps[0][0], stats_of(gram.double())).isfinite().all()
        assert weighting.weights.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [1, 9, 14])
def test_state_continues_exactly(name, stop, tmp_path):
    steps = steps_of()
    steps[6] = (vector(math.nan, 1.0, -1.0), steps[6][1])
    expected = weights_of(create(name, 3, **OPTIONS.get(name, {})), steps)
    first = create(name, 3, **OPTIONS.get(name, {}))
    empty = first.state_dict()["_extra_state"].shape
    weights_of(first, steps[:stop])
    assert first.state_dict()["_extra_state"].shape == empty
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = create(name, 3, **OPTIONS.get(name, {}))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(torch.stack(weights_of(second, steps[stop:])), torch.stack(expected[stop:]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rlw", {"distribution": "uniform"}, "distribution: expected one of normal, dirichlet, got 'uniform'"),
        ("rlw", {"seed": -1}, "seed: expected a non-negative integer, got -1"),
        ("dwa", {"window": 0}, "window: expected a positive integer, got 0"),
        ("dwa", {"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ("stch", {"mu": math.nan}, "mu: expected a positive number, got nan"),
        ("stch", {"preference": [1.0]}, "preference: expected 2 finite numbers"),
        ("stch", {"preference": [1.0, 0.0]}, "preference: expected 2 positive numbers"),
        ("stch", {"ideal": [0.0, math.inf]}, "ideal: expected 2 finite numbers"),
        ("stch", {"warm_up": 0}, "warm_up: expected a positive integer, got 0"),
        ("cosmos", {"strength": -1.0}, "strength: expected a finite number that is not negative, got -1.0"),
        ("cosmos", {"preference": [1.0, -1.0]}, "preference: expected 2 positive numbers"),
        ("pbi", {"theta": math.inf}, "theta: expected a finite number that is not negative, got inf"),
        ("pbi", {"ideal": [0.0]}, "ideal: expected 2 finite numbers"),
        ("go4align", {"num_groups": 3}, "num_groups: expected an integer from 1 to 2, got 3"),
        ("go4align", {"beta": -1.0}, "beta: expected a finite number that is not negative, got -1.0"),
        ("uw", {"lr": 0.0}, "lr: expected a positive number, got 0.0"),
        ("imtl_l", {"lr": -1.0}, "lr: expected a positive number"),
        ("imtl", {"lr": math.inf}, "lr: expected a positive number"),
        ("gradnorm", {"alpha": -0.5}, "alpha: expected a finite number that is not negative, got -0.5"),
        ("famo", {"weight_decay": -1.0}, "weight_decay: expected a finite number that is not negative"),
        ("famo", {"min_losses": [1.0, 2.0, 3.0]}, "min_losses: expected 2 finite numbers"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, 2, **options)


# ---- in the Scalarizer, on real data ---------------------------------------------------------------------------------


class TwoDigits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(121, 32), nn.ReLU())
        self.heads = nn.ModuleDict({"left": nn.Linear(32, 10), "right": nn.Linear(32, 10)})

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.body(batch["image"] / 16)
        return {task: nn.functional.cross_entropy(head(features), batch[task]) for task, head in self.heads.items()}


@pytest.fixture(scope="module")
def digits():
    return overlaid_digits(pairs_per_image=1)["train"]


class Training:
    def __init__(self, name: str, digits) -> None:
        torch.manual_seed(0)
        self.digits, self.model = digits, TwoDigits()
        self.scalarizer = Scalarizer(name, tasks=["left", "right"], **OPTIONS.get(name, {}))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)

    def step(self, number: int) -> None:
        batch = self.digits[[*range(64 * number % 1000, 64 * number % 1000 + 64)]]
        self.scalarizer(self.model.losses(batch)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.scalarizer.after_step(self.model.losses(batch))

    def state(self) -> dict:
        return {part: getattr(self, part).state_dict() for part in ("model", "optimizer", "scalarizer")}


@pytest.mark.parametrize("name", available())
def test_every_weighting_trains_a_network_and_resumes(name, digits, tmp_path):
    whole = Training(name, digits)
    with torch.no_grad():
        at_first = sum(float(loss) for loss in whole.model.losses(digits[:256]).values())
    for number in range(20):
        if number == 11:
            torch.save(whole.state(), tmp_path / "state.pt")
        whole.step(number)
        assert whole.scalarizer.weights.isfinite().all()
    with torch.no_grad():
        assert sum(float(loss) for loss in whole.model.losses(digits[:256]).values()) < 0.95 * at_first
    second = Training(name, digits)
    for part, state in torch.load(tmp_path / "state.pt", weights_only=True).items():
        getattr(second, part).load_state_dict(state)
    for number in range(11, 20):
        second.step(number)
    assert torch.equal(second.scalarizer.weights, whole.scalarizer.weights)
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_after_step_reaches_the_weighting_as_one_loss_a_task():
    heard = []

    class Listener(gradstats.weighting.Weighting):
        needs = frozenset({"after_step"})

        def forward(self, losses, stats=None):
            return self.weights

        def after_step(self, losses):
            heard.append(losses)

    scalarizer = Scalarizer(Listener(3), tasks=["a", "b", "c"])
    scalarizer.after_step({"c": torch.tensor(2.0, requires_grad=True), "a": torch.tensor(1.0)})
    torch.testing.assert_close(heard[0], vector(1.0, math.nan, 2.0), equal_nan=True)
    assert not heard[0].requires_grad
    with pytest.raises(ValueError, match="losses: expected tasks among"):
        scalarizer.after_step({"d": torch.tensor(1.0)})
    Scalarizer("uw", tasks=["a"]).after_step({"d": torch.tensor(1.0)})  # does not listen

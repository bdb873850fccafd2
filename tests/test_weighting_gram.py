"""Weightings that are functions of the Gramian: optimality, invariances, degenerate input, SciPy, NumPy and TorchJD."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
import torchjd.aggregation as jd
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchjd.autogram import Engine
from torchjd.linalg import QuadprogProjector

import gradstats
from gradstats import GradStats, Scalarizer
from gradstats.ops import dual_cone as compiled
from gradstats.weighting import available, create, facts, solvers
from gradstats.weighting.solvers import dual_cone, nonnegative_qp, positive_definite
from gradstats.weighting.two_batch import projected

#: How weights change when all gradients are multiplied by s: s^exponent.
EXPONENTS = {
    "exact_slw": 0.0,
    "mgda": 0.0,
    "pcgrad": 0.0,
    "gradvac": 0.0,
    "cagrad": 0.0,
    "imtl_g": 0.0,
    "nash_mtl": -1.0,
    "fairgrad": -4 / 3,
    "aligned_mtl": 0.0,
    "upgrad": 0.0,
    "dualproj": 0.0,
    "config": 0.0,
    "sdmgrad": 0.0,
    "pcd": 0.0,
    "krum": 0.0,
}
NAMES = (*EXPONENTS, "modo")
STATEFUL = ("pcgrad", "gradvac", "sdmgrad", "modo", "pcd")
KINDS = ("random", "agreeing", "conflicting", "scaled", "dependent", "square")

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(kind: str, num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    size = {"dependent": max(num_tasks // 2, 1), "square": num_tasks}.get(kind, 4 * num_tasks + 3)
    jacobian = randn(num_tasks, size)
    if kind == "agreeing":
        jacobian = jacobian + 2.0 * randn(size)
    elif kind == "conflicting":
        jacobian = jacobian - 0.8 * jacobian.mean(0)
        jacobian[1::2] -= 0.4 * jacobian[0]
    elif kind == "scaled":
        jacobian = jacobian * 10.0 ** (1.5 * randn(num_tasks, 1)).clamp(-3.0, 3.0)
    elif kind == "uneven":
        jacobian = jacobian * 10.0 ** torch.linspace(-1.0, 1.0, num_tasks, dtype=torch.float64)[:, None]
    return jacobian


def gram_of(kind: str, num_tasks: int, seed: int = 0) -> Tensor:
    jacobian = gradients(kind, num_tasks, seed)
    return jacobian @ jacobian.T


def stats_of(gram: Tensor, present: list[bool] | None = None) -> GradStats:
    num_tasks = len(gram)
    present = [True] * num_tasks if present is None else present
    return GradStats(gram=gram, names=tuple(f"t{i}" for i in range(num_tasks)), present=torch.tensor(present))


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unit_slopes(gram: Tensor, weights: Tensor) -> Tensor:
    """Products of the aggregated gradient with each unit gradient."""
    return gram @ weights / gram.diagonal().sqrt()


def length(gram: Tensor, weights: Tensor) -> float:
    return math.sqrt(max(float(weights @ gram @ weights), 0.0))


def angle(gram: Tensor, one: Tensor, other: Tensor) -> float:
    """Distance of the two aggregated gradients, scaled to unit length."""
    return length(gram, one / length(gram, one) - other / length(gram, other))


# ---- quadratic programs ---------------------------------------------------------------------------------------------


@given(
    kind=st.sampled_from(KINDS), num_tasks=st.integers(1, 24), problems=st.integers(1, 30), seed=st.integers(0, 10**6)
)
def test_nonnegative_qp_is_optimal(kind, num_tasks, problems, seed):
    jacobian = gradients(kind, num_tasks, seed)
    units = (jacobian / jacobian.norm(dim=1, keepdim=True)).numpy()
    targets = np.random.default_rng(seed).standard_normal((problems, units.shape[1]))
    matrix, linear = positive_definite(units @ units.T), targets @ units.T
    solution = nonnegative_qp(matrix, linear)
    slope = solution @ matrix - linear
    size = 1.0 + np.abs(solution).max()
    assert solution.min() >= 0.0
    assert slope.min() >= -1e-8 * size
    assert np.abs(slope * solution).max() <= 1e-8 * size**2
    for z, target in zip(solution[:3], targets, strict=False):
        residual = np.linalg.norm(units.T @ z - target)
        assert residual == pytest.approx(scipy.optimize.nnls(units.T, target)[1], rel=1e-7, abs=1e-7)


def test_nonnegative_qp_takes_a_wrong_guess_and_many_dependent_gradients():
    units = np.random.default_rng(0).standard_normal((96, 12))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    matrix, linear = positive_definite(units @ units.T), -(units @ units.T)[:4]
    expected = nonnegative_qp(matrix, linear) @ units
    for guess in (np.zeros((4, 96), bool), np.ones((4, 96), bool)):
        np.testing.assert_allclose(nonnegative_qp(matrix, linear, guess) @ units, expected, atol=1e-6)
        assert guess.min() == guess.max()  # not changed


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_nonnegative_qp_is_led_where_guesses_go_wrong(seed, monkeypatch):
    """Exchanging whatever is wrong, and then single entries, takes 41 to 48 rounds here."""
    rounds, solved_on = [], solvers._solved_on
    monkeypatch.setattr(solvers, "_solved_on", lambda *args: rounds.append(1) or solved_on(*args))
    units = np.random.default_rng(seed).standard_normal((48, 28))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    nonnegative_qp(positive_definite(units @ units.T), -units @ units.T)
    assert len(rounds) <= 30


def test_nonnegative_qp_ends_where_hardly_any_direction_agrees():
    """A cone of an angle of 1e-3 in which exchanges go round in circles: two of these problems take the slow way."""
    generator = torch.Generator().manual_seed(3)
    units = torch.nn.functional.normalize(torch.randn(128, 60, dtype=torch.float64, generator=generator)).numpy()
    rows = [0, 23, 48]
    matrix, linear = positive_definite(units @ units.T), -(units @ units.T)[rows]
    solution = nonnegative_qp(matrix, linear)
    slope = solution @ matrix - linear
    assert solution.min() >= 0.0
    assert slope.min() >= -1e-8
    assert np.abs(solution * slope).max() <= 1e-8
    if gradstats.backends()["cpu"].available:
        weights = compiled.weights(units @ units.T, each=True)
        assert (units @ (weights @ units)).min() >= -1e-8


def test_indefinite_estimates_are_replaced_by_the_nearest_semidefinite_matrix():
    estimate = DEGENERATE["indefinite"].numpy().astype(float)
    values, vectors = np.linalg.eigh(estimate)
    assert values[0] < -0.1
    np.testing.assert_allclose(positive_definite(estimate), vectors * values.clip(0) @ vectors.T, atol=1e-11)
    weights = create("mgda", 3).from_gram(DEGENERATE["indefinite"])
    assert sorted(weights.tolist()) == pytest.approx([0, 0.5, 0.5])  # the two that conflict


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 5, 17, 40])
def test_mgda_is_the_shortest_convex_combination(kind, num_tasks):
    gram = gram_of(kind, num_tasks)
    weights = create("mgda", num_tasks).from_gram(gram)
    assert float(weights.min()) >= 0.0
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    shortest = length(gram, weights)
    # No vertex of the simplex is a way down; the active ones are level (the conditions of Wolfe).
    scale = float(gram.diagonal().min().sqrt())
    least = shortest**2 / gram.diagonal().sqrt()
    assert float((unit_slopes(gram, weights) - least).min()) >= -1e-8 * scale
    used = weights > 1e-9
    assert float((unit_slopes(gram, weights) - least)[used].abs().max()) <= 1e-8 * scale


@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting"])
def test_mgda_against_scipy(kind):
    gram = gram_of(kind, 5)
    found = scipy.optimize.minimize(
        lambda w: w @ gram.numpy() @ w,
        np.full(5, 0.2),
        jac=lambda w: 2 * gram.numpy() @ w,
        bounds=[(0, None)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert length(gram, create("mgda", 5).from_gram(gram)) ** 2 == pytest.approx(found.fun, rel=1e-8)


@pytest.mark.parametrize("seed", range(6))
def test_mgda_of_two_tasks_is_the_closed_form(seed):
    gram = gram_of("random" if seed % 2 else "scaled", 2, seed)
    first = float(((gram[1, 1] - gram[0, 1]) / (gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])).clamp(0, 1))
    torch.testing.assert_close(create("mgda", 2).from_gram(gram), vector(first, 1 - first), rtol=1e-9, atol=1e-15)


def test_mgda_normalises():
    gram, losses = gram_of("scaled", 4), vector(0.5, -2.0, 3.0, 1e-3)
    norms = gram.diagonal().sqrt()
    plain = create("mgda", 4)
    for normalize, scale in {"l2": norms, "loss": losses.abs(), "loss+": losses.abs() * norms}.items():
        weighting = create("mgda", 4, normalize=normalize)
        assert weighting.needs == ({"gramian"} if normalize == "l2" else {"gramian", "losses"})
        expected = plain.from_gram(gram / scale[:, None] / scale)
        torch.testing.assert_close(weighting(losses, stats_of(gram)), expected)
        batch = weighting.from_gram(torch.stack([gram, gram]), torch.stack([losses, losses]))
        torch.testing.assert_close(batch, torch.stack([expected, expected]))
    with pytest.raises(ValueError, match="losses: expected with normalize='loss\\+', got None"):
        weighting.from_gram(gram)
    with pytest.raises(ValueError, match="normalize: expected one of none, l2, loss, loss\\+, got 'n'"):
        create("mgda", 4, normalize="n")


@pytest.mark.parametrize("normalize", ["none", "l2", "loss", "loss+"])
def test_mgda_normalises_degenerate_input(normalize):
    weighting = create("mgda", 3, normalize=normalize)
    gram = gram_of("random", 3)
    zero = gram * vector(1, 0, 1)[:, None] * vector(1, 0, 1)
    assert weighting(vector(1, 1, 1), stats_of(zero)).tolist() == [0, 1, 0]
    weights = weighting(vector(0, math.nan, 1), stats_of(gram))
    assert weights.isfinite().all()
    if normalize.startswith("loss"):
        assert weights.tolist() == [0, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 9, 30])
def test_dual_cone_weightings_are_optimal(kind, num_tasks):
    gram = gram_of(kind, num_tasks)
    norms = gram.diagonal().sqrt().numpy()
    units = gradients(kind, num_tasks).numpy() / norms[:, None]
    cosine = units @ units.T
    targets = np.vstack([np.eye(num_tasks), norms[None] / norms.max()])
    projected_ = dual_cone(cosine, targets)
    slopes = projected_ @ cosine
    size = 1.0 + np.abs(projected_).max()
    assert (projected_ - targets).min() >= 0.0
    assert slopes.min() >= -1e-8 * size
    assert np.abs(slopes * (projected_ - targets)).max() <= 1e-8 * size**2
    # Each is the sum that the definition says, and conflicts with no gradient.
    upgrad, dualproj = (create(name, num_tasks).from_gram(gram).numpy() for name in ("upgrad", "dualproj"))
    for weights, expected in ((upgrad, norms @ projected_[:-1]), (dualproj, norms.max() * projected_[-1])):
        difference = weights * norms - expected / num_tasks  # of coefficients, which dependent gradients leave open
        assert np.linalg.norm(difference @ units) <= 1e-7 * norms.max()
    for weights in (upgrad, dualproj):
        assert weights.min() >= 1 / num_tasks - 1e-12
        assert float(unit_slopes(gram, torch.from_numpy(weights)).min()) >= -1e-7 * norms.max()


def test_without_conflict_projections_change_nothing():
    gram = gram_of("agreeing", 6).abs()
    for name in ("upgrad", "dualproj"):
        torch.testing.assert_close(create(name, 6).from_gram(gram), torch.full((6,), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_projections_of_two_tasks_are_the_closed_form(seed):
    gram = gram_of("random", 2, seed)
    gram[0, 1] = gram[1, 0] = -gram[0, 1].abs()
    first, second = 1 - gram[0, 1] / gram[0, 0], 1 - gram[0, 1] / gram[1, 1]
    torch.testing.assert_close(create("upgrad", 2).from_gram(gram), torch.stack([first, second]) / 2)
    # g_1 + g_2 conflicts with at most one of them, the shorter one.
    expected = torch.maximum(vector(1, 1), -gram[0, 1] / gram.diagonal()) / 2
    torch.testing.assert_close(create("dualproj", 2).from_gram(gram), expected)
    torch.testing.assert_close(create("pcgrad", 2).from_gram(gram), torch.stack([first, second]))


@pytest.mark.parametrize("num_tasks", [6, 24])
def test_projections_of_gradients_that_no_direction_agrees_with(num_tasks):
    """A positive combination vanishes, so all projections do; the weights are those of the mean's."""
    jacobian = gradients("random", num_tasks)[:, : num_tasks // 4]
    jacobian[-1] = -jacobian[:-1].sum(0)
    gram = jacobian @ jacobian.T
    for weigh in (lambda name: create(name, num_tasks).from_gram(gram), lambda name: interpreted(name, gram)):
        upgrad, dualproj = weigh("upgrad"), weigh("dualproj")
        assert torch.equal(upgrad, dualproj)
        assert float((upgrad @ jacobian).norm()) <= 1e-9 * float(jacobian.norm())
        assert float(upgrad.min()) >= 1 / num_tasks
    beside_another = torch.block_diag(gram, torch.eye(1).double())
    assert not torch.equal(*(create(name, num_tasks + 1).from_gram(beside_another) for name in ("upgrad", "dualproj")))


# ---- projections, compiled ------------------------------------------------------------------------------------------

PROJECTIONS = {"upgrad": True, "dualproj": False}
needs_compiled = pytest.mark.skipif(not gradstats.backends()["cpu"].available, reason="needs the compiled CPU library")


def interpreted(name: str, gram: Tensor) -> Tensor:
    """The weights without the compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_available", False)
        return create(name, len(gram)).from_gram(gram)


@needs_compiled
@given(
    name=st.sampled_from(list(PROJECTIONS)),
    kind=st.sampled_from(("plain", "dependent", "duplicates", "opposite", "uneven")),
    num_tasks=st.integers(1, 20),
    scale=st.sampled_from((1e-12, 1.0, 1e12)),
    seed=st.integers(0, 10**6),
)
def test_compiled_projections_are_the_interpreted_ones(name, kind, num_tasks, scale, seed):
    generator = np.random.default_rng(seed)
    units = generator.standard_normal((num_tasks, max(num_tasks // 2, 1) if kind == "dependent" else num_tasks + 3))
    if kind in ("duplicates", "opposite"):
        units = units[generator.integers(0, num_tasks, num_tasks)]
    if kind == "opposite":
        units *= generator.choice([-1.0, 1.0], num_tasks)[:, None]
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    spread = 6 if kind == "uneven" else 1
    norms = scale * 10.0 ** generator.uniform(-spread, spread, num_tasks)
    gram = torch.from_numpy(norms[:, None] * (units @ units.T) * norms)
    weights = compiled.weights(gram.numpy(), each=PROJECTIONS[name])
    # Coefficients of the unit gradients; dependent ones leave them open, but not what they combine to.
    ours, theirs = (norms / norms.max() * np.asarray(w) for w in (weights, interpreted(name, gram)))
    size = 1.0 + np.abs(ours).max()
    if kind in ("plain", "uneven"):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7 * size)
    assert np.linalg.norm((ours - theirs) @ units) <= 1e-6 * size
    assert (weights >= 1 / num_tasks).all()
    assert (units @ units.T @ ours).min() >= -1e-6 * size


@needs_compiled
@pytest.mark.parametrize("num_tasks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(10))
def test_compiled_projections_are_the_shortest_of_all_faces(num_tasks, seed):
    gram = gram_of("conflicting" if seed % 2 else "random", num_tasks, seed).numpy()

    def projection(target: np.ndarray) -> np.ndarray:
        """The best of all choices of the entries that stay at the target."""
        found = []
        for size in range(num_tasks + 1):
            for free in map(list, itertools.combinations(range(num_tasks), size)):
                v = target.copy()
                v[free] -= np.linalg.solve(gram[np.ix_(free, free)], gram[free] @ target)
                if (v >= target - 1e-12).all():
                    found.append(v)
        return min(found, key=lambda v: v @ gram @ v)

    targets = np.eye(num_tasks) / num_tasks
    upgrad, dualproj = (compiled.weights(gram, each=each) for each in (True, False))
    np.testing.assert_allclose(upgrad, sum(projection(target) for target in targets), rtol=1e-9)
    np.testing.assert_allclose(dualproj, projection(targets.sum(0)), rtol=1e-9)


@needs_compiled
@pytest.mark.parametrize("each", [True, False])
def test_compiled_projections_of_many_dependent_gradients(each):
    """Guesses that are wrong for many rounds, with any number of threads."""
    jacobian = np.random.default_rng(0).standard_normal((64, 32))
    gram = jacobian @ jacobian.T
    weights = compiled.weights(gram, each=each)
    torch.set_num_threads(3)  # the fixture resets it
    np.testing.assert_array_equal(compiled.weights(gram, each=each), weights)
    size = weights.max() * np.abs(jacobian).max()
    assert (gram @ weights / gram.diagonal() ** 0.5).min() >= -1e-6 * size
    expected = interpreted("upgrad" if each else "dualproj", torch.from_numpy(gram)).numpy()
    np.testing.assert_allclose(weights @ jacobian, expected @ jacobian, atol=1e-6 * size)


@needs_compiled
def test_compiled_projections_decline_what_needs_care():
    careful = {"one zero", "two zeros", "no gradient at all", "NaN", "row of inf", "stray NaN", "nothing finite"}
    careful |= {"negative square", "indefinite"}
    declined = {case for case in DEGENERATE if compiled.weights(DEGENERATE[case].double().numpy(), each=True) is None}
    assert declined == careful
    for wrong in (torch.eye(2), torch.zeros(2, 3).double(), torch.zeros(0, 0).double(), torch.zeros(4).double()):
        with pytest.raises(RuntimeError, match=r"expected a float64 Gramian of shape \[T, T\]"):
            torch.ops.gradstats._dual_cone(wrong, True)


@needs_compiled
@pytest.mark.parametrize("name", PROJECTIONS)
def test_compiled_projections_take_any_strides(name):
    gram = gram_of("conflicting", 8)
    expected = create(name, 4).from_gram(gram[::2, ::2].clone())
    for view in (gram[::2, ::2], gram[::2, ::2].T, gram[::2, ::2].expand(2, 4, 4)):
        weights = create(name, 4).from_gram(view)
        assert torch.equal(weights, expected.expand_as(weights))


# ---- CAGrad ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 10, 30])
def test_cagrad_has_no_duality_gap(kind, num_tasks, c):
    gram = gram_of(kind, num_tasks)
    weights = create("cagrad", num_tasks, c=c).from_gram(gram)
    mean = torch.full_like(weights, 1 / num_tasks)
    step, radius = weights - mean, c * length(gram, mean)
    assert float(step.min()) >= -1e-12
    assert length(gram, step) <= radius * (1 + 1e-9)
    # The worst slope reached, and the bounds on it that convex combinations of the gradients prove.
    shares = [create("mgda", num_tasks).from_gram(gram)] + ([step / step.sum()] if float(step.sum()) > 0 else [])
    bound = min(float(share @ gram @ mean) + radius * length(gram, share) for share in shares)
    shortest = float(gram.diagonal().min().sqrt())
    assert bound - float((gram @ weights).min()) <= 1e-6 * shortest * length(gram, mean)


@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting"])
def test_cagrad_against_scipy(kind):
    """The authors' way: minimise wᵀGu + r sqrt(wᵀGw) over the simplex; weights u + r w / sqrt(wᵀGw)."""
    gram = gram_of(kind, 4).numpy()
    mean = np.full(4, 0.25)
    radius = 0.5 * math.sqrt(mean @ gram @ mean)
    found = scipy.optimize.minimize(
        lambda w: w @ gram @ mean + radius * math.sqrt(w @ gram @ w),
        mean,
        jac=lambda w: gram @ mean + radius * gram @ w / math.sqrt(w @ gram @ w),
        bounds=[(0, None)] * 4,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(4)},
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    expected = mean + radius * found / math.sqrt(found @ gram @ found)
    np.testing.assert_allclose(create("cagrad", 4).from_gram(torch.from_numpy(gram)), expected, atol=1e-4)


def test_cagrad_takes_the_nearest_of_equals():
    """A zero gradient, or opposite ones, leave nothing to gain for the worst task: no step but what ends conflict."""
    opposite = gram_of("random", 1).expand(2, 2) * vector(1, -1)[:, None] * vector(1, -1)
    assert create("cagrad", 2).from_gram(opposite).tolist() == [0.5, 0.5]
    jacobian = torch.tensor([[1.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    gram = jacobian @ jacobian.T
    aggregated = create("cagrad", 3, c=0.99).from_gram(gram) @ jacobian
    torch.testing.assert_close(aggregated, vector(0, 1 / 3, 0), rtol=0, atol=1e-9)
    aggregated = create("cagrad", 3, c=0.5).from_gram(gram) @ jacobian  # too short a radius to end the conflict
    assert length(gram, create("cagrad", 3, c=0.5).from_gram(gram) - 1 / 3) == pytest.approx(math.sqrt(2) / 6)
    assert -1 / 3 < float(aggregated[0]) < 0
    assert create("cagrad", 3, c=0.0).from_gram(gram).tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="c: expected a finite number that is not negative, got -1"):
        create("cagrad", 3, c=-1)


# ---- bargains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting", "scaled"])
@pytest.mark.parametrize("num_tasks", [1, 2, 6, 33])
def test_fairgrad_solves_its_equation(kind, num_tasks, alpha):
    gram = gram_of(kind, num_tasks)
    weights = create("fairgrad", num_tasks, alpha=alpha).from_gram(gram)
    assert float(weights.min()) > 0
    gains = weights ** (-1 / alpha)
    assert ((gram @ weights - gains).abs() <= 1e-9 * (gains + gram.abs() @ weights)).all()


@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting", "scaled"])
def test_nash_mtl_solves_its_equation(kind):
    gram = gram_of(kind, 7)
    weights = create("nash_mtl", 7).from_gram(gram)
    torch.testing.assert_close(gram @ weights * weights, torch.ones_like(weights), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(create("fairgrad", 7, alpha=1.0).from_gram(gram), weights, rtol=1e-9, atol=0)
    two = gram_of(kind, 2)
    cosine = two[0, 1] / two.diagonal().prod().sqrt()
    expected = 1 / (two.diagonal() * (1 + cosine)).sqrt()
    torch.testing.assert_close(create("nash_mtl", 2).from_gram(two), expected)


def test_bargains_against_scipy():
    gram = gram_of("conflicting", 5)
    for alpha in (0.5, 2.0):

        def residual(w, power=-1 / alpha):
            return gram.numpy() @ w - w**power

        found = scipy.optimize.least_squares(residual, [0.1] * 5, bounds=(1e-9, np.inf), xtol=1e-15, ftol=1e-15).x
        weights = create("fairgrad", 5, alpha=alpha).from_gram(gram)
        np.testing.assert_allclose(weights, found, rtol=1e-6)
    for alpha in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="alpha: expected a positive, finite number"):
            create("fairgrad", 5, alpha=alpha)


# ---- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting", "scaled"])
@pytest.mark.parametrize("num_tasks", [1, 2, 7])
def test_closed_forms_have_their_properties(kind, num_tasks):
    jacobian = gradients(kind, num_tasks)
    gram = jacobian @ jacobian.T
    norms = gram.diagonal().sqrt()
    exact = create("exact_slw", num_tasks).from_gram(gram)
    torch.testing.assert_close(exact * norms, (exact[0] * norms[0]).expand(num_tasks))
    assert float(exact.sum()) == pytest.approx(num_tasks)
    impartial = create("imtl_g", num_tasks).from_gram(gram)
    slopes = unit_slopes(gram, impartial)
    torch.testing.assert_close(slopes, slopes[:1].expand(num_tasks), rtol=1e-6, atol=0)
    assert float(impartial.sum()) == pytest.approx(1)
    config = create("config", num_tasks).from_gram(gram)
    slopes = unit_slopes(gram, config)
    torch.testing.assert_close(slopes, slopes[:1].expand(num_tasks), rtol=1e-6, atol=0)
    assert float(slopes.min()) > 0
    direction = config @ jacobian / length(gram, config)
    assert length(gram, config) == pytest.approx(float((jacobian @ direction).sum()))


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
def test_aligned_mtl_is_the_sum_of_orthogonal_gradients_of_equal_length(num_tasks, scale):
    """The polar factor of the gradients, from their singular value decomposition."""
    jacobian = gradients("conflicting", num_tasks)
    left, sizes, right = torch.linalg.svd(jacobian, full_matrices=False)
    eigenvalues = sizes.square()
    factor = {"min": eigenvalues.min(), "median": eigenvalues.median(), "rmse": eigenvalues.mean()}[scale].sqrt()
    weights = create("aligned_mtl", num_tasks, scale=scale).from_gram(jacobian @ jacobian.T)
    torch.testing.assert_close(weights @ jacobian, factor * (left @ right).sum(0))
    with pytest.raises(ValueError, match="scale: expected one of min, median, rmse, got 'mean'"):
        create("aligned_mtl", num_tasks, scale="mean")


# ---- surgery --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("kind", KINDS)
def test_surgery_follows_its_definition_on_gradients(name, kind, monkeypatch):
    """One vector after another, as the papers write it, in the order that the weighting has drawn."""
    jacobian = gradients(kind, 6, seed=1)
    weighting = create(name, 6, seed=3)
    orders = []
    draw = weighting._orders
    monkeypatch.setattr(weighting, "_orders", lambda count: orders.append(draw(count)) or orders[-1])
    targets = torch.zeros(6, 6, dtype=torch.float64)
    for _ in range(3):
        weights = weighting.from_gram(jacobian @ jacobian.T)
        total = torch.zeros_like(jacobian[0])
        for i, order in enumerate(orders[-1]):
            changed = jacobian[i].clone()
            for j in order.tolist():
                other = jacobian[j]
                if name == "pcgrad":
                    changed -= min(float(changed @ other), 0.0) / other.square().sum() * other
                    continue
                target = targets[i, j].clone()
                cosine = changed @ other / changed.norm() / other.norm()
                targets[i, j] = 0.5 * target + 0.5 * cosine
                if cosine < target:
                    sine, aimed = (1 - cosine**2).sqrt(), (1 - target**2).sqrt()
                    factor = changed.norm() * (target * sine - cosine * aimed) / (other.norm() * aimed)
                    changed += factor * other
            total += changed
        torch.testing.assert_close(weights @ jacobian, total, rtol=1e-9, atol=1e-9 * float(jacobian.abs().max()))
        jacobian = jacobian + 0.3 * gradients(kind, 6, seed=2)
    if name == "gradvac":
        torch.testing.assert_close(weighting.targets, targets, atol=1e-9, rtol=1e-9)
        assert targets.abs().max() > 0.01


def test_orders_are_random_and_follow_from_seed_and_step():
    drawn = [create("pcgrad", 5, seed=seed)._orders(5) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    weighting = create("pcgrad", 5)
    many = np.stack([weighting._orders(5) for _ in range(500)])
    for i in range(5):
        others = [j for j in range(5) if j != i]
        assert (np.sort(many[:, i], 1) == others).all()
        first = np.array([(many[:, i, 0] == j).mean() for j in others])
        assert np.abs(first - 0.25).max() < 0.08
    with pytest.raises(ValueError, match="seed: expected a non-negative integer, got -1"):
        create("pcgrad", 5, seed=-1)
    with pytest.raises(ValueError, match="beta: expected a number in \\[0, 1\\], got 2"):
        create("gradvac", 5, beta=2)


def test_gradvac_leaves_the_targets_of_absent_tasks():
    weighting, alone = create("gradvac", 3), create("gradvac", 2)
    gram = gram_of("conflicting", 3)
    gram[0] = gram[:, 0] = 0.0
    weighting(vector(1, 1, 1), stats_of(gram, [False, True, True]))
    alone.from_gram(gram[1:, 1:])
    assert alone.targets.abs().max() > 0.01
    torch.testing.assert_close(weighting.targets, nn.functional.pad(alone.targets, (1, 0, 1, 0)))


def test_gradvac_with_a_target_near_one_stays_bounded():
    weighting = create("gradvac", 2, beta=1.0)
    weighting.from_gram(torch.ones(2, 2, dtype=torch.float64))
    assert float(weighting.targets[0, 1]) == 1.0
    weights = weighting.from_gram(torch.eye(2, dtype=torch.float64))
    assert 100 < float(weights.max()) < 1e4


# ---- two batches ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e18, 1e18), min_size=1, max_size=9))
def test_projected_is_the_nearest_point_of_the_simplex(values):
    point = np.array(values)
    result = projected(point)
    assert result.min() >= 0
    assert result.sum() == pytest.approx(1)
    # No corner of the simplex lies towards the point.
    assert ((point - result) @ (np.eye(len(point)) - result).T).max() <= 1e-9 * (1 + np.abs(point).max())


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("modo", {}, jd.MoDoWeighting()),
        ("modo", {"gamma": 0.01, "rho": 0.0}, jd.MoDoWeighting(gamma=0.01, rho=0.0)),
        ("sdmgrad", {}, jd.SDMGradWeighting()),
        (
            "sdmgrad",
            {"strength": 0.6, "lr": 1.0, "momentum": 0.0, "num_steps": 3},
            jd.SDMGradWeighting(1.0, 0.0, 3, 0.6),
        ),
    ],
)
def test_two_batch_weightings_follow_torchjd(name, options, theirs):
    weighting = create(name, 5, **options)
    for seed in range(6):
        products = gradients("agreeing", 5, seed) @ gradients("agreeing", 5, seed + 100).T
        torch.testing.assert_close(weighting.from_gram(products), theirs(products), rtol=1e-7, atol=1e-9)
    assert float(weighting.point.sum()) == pytest.approx(1)


def test_two_batch_weightings_run_on_unbiased_gramians():
    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3).double(), torch.randn(32, 4, dtype=torch.float64)
    for name in ("modo", "sdmgrad"):
        scalarizer = Scalarizer(name, tasks=["a", "b", "c"], inputs=model, unbiased=True)
        scalarizer(list((model(batch) - vector(1, 2, 3)).square().T)).backward()
        assert scalarizer.stats.noise_trace is not None
        assert float(scalarizer.weights.sum()) == pytest.approx(1)
        assert scalarizer.weights.std() > 1e-4


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("modo", "gamma", 0.0),
        ("modo", "rho", -1.0),
        ("sdmgrad", "strength", -1.0),
        ("sdmgrad", "lr", 0.0),
        ("sdmgrad", "momentum", 1.0),
        ("sdmgrad", "num_steps", 0),
    ],
)
def test_two_batch_options_are_checked(name, option, value):
    with pytest.raises(ValueError, match=f"{option}: expected"):
        create(name, 2, **{option: value})


# ---- unequal gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 9, 30])
def test_pcd_is_the_nearest_direction_with_progress(kind, num_tasks):
    """KKT, on gradients divided by the roots of their mean squares: here, at the first step, by their norms."""
    jacobian, primary, tau = gradients(kind, num_tasks), num_tasks - 1, 0.1
    gram, units = jacobian @ jacobian.T, jacobian / jacobian.norm(dim=1, keepdim=True)
    weights = create("pcd", num_tasks, primary=primary, tau=tau).from_gram(gram)
    direction = weights @ jacobian
    assert float(direction.norm()) == pytest.approx(float(jacobian[primary].norm()))
    multipliers = weights * jacobian.norm(dim=1)
    if kind == "dependent" and (multipliers[:-1] == 0).all():  # no direction meets all constraints
        return
    size = float(direction.norm() / multipliers[primary] * units[primary].norm() ** 2)
    slack = units @ direction * float(1 / multipliers[primary]) - tau
    multipliers = multipliers / multipliers[primary]
    assert float(multipliers.min()) >= 0
    assert float(slack[:-1].min()) >= -1e-6 * size
    assert float((slack * multipliers)[:-1].abs().max()) <= 1e-6 * size * float(multipliers.max())


@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting", "uneven"])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.7])
def test_pcd_follows_torchjd(kind, tau):
    weighting, theirs = create("pcd", 6, tau=tau, beta=0.9), jd.PCDWeighting(tau, 0.9, 0.0)
    for seed in range(5):  # with the same moving averages
        gram = gram_of(kind, 6, seed)
        torch.testing.assert_close(weighting.from_gram(gram), theirs(gram), rtol=1e-6, atol=1e-9)


def test_pcd_where_there_is_no_such_direction():
    opposite = torch.tensor([[1.0, 0.5, -0.5], [0.5, 1.0, -1.0], [-0.5, -1.0, 1.0]], dtype=torch.float64)
    assert create("pcd", 3).from_gram(opposite).tolist() == [1, 0, 0]
    assert create("pcd", 3, primary=1).from_gram(DEGENERATE["one zero"]).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("num_byzantine", "num_selected"), [(0, 1), (1, 1), (2, 3)])
def test_krum_selects_the_gradients_nearest_to_others(num_byzantine, num_selected):
    for kind, seed in itertools.product(("random", "conflicting", "uneven"), range(4)):
        jacobian = gradients(kind, 7, seed)
        options = {"num_byzantine": num_byzantine, "num_selected": num_selected}
        weights = create("krum", 7, **options).from_gram(jacobian @ jacobian.T)
        nearest = torch.cdist(jacobian, jacobian).sort(1).values[:, 1 : 7 - num_byzantine - 1]
        assert set(weights.nonzero().flatten().tolist()) == set(nearest.sum(1).argsort()[:num_selected].tolist())
        assert set(weights.tolist()) == {0, 1 / num_selected}
        assert torch.equal(weights, jd.KrumWeighting(num_byzantine, num_selected)(jacobian @ jacobian.T))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("pcd", "primary", 3),
        ("pcd", "tau", 1.5),
        ("pcd", "beta", 1.0),
        ("krum", "num_byzantine", 3),
        ("krum", "num_selected", 0),
        ("cr_mogm", "alpha", 1.1),
    ],
)
def test_other_options_are_checked(name, option, value):
    with pytest.raises(ValueError, match=f"{option}: expected .* got {value}"):
        create(name, 3, **{option: value})


@pytest.mark.parametrize("name", ["upgrad", "famo"])
def test_cr_mogm_averages_the_weights_of_another(name):
    weighting, other = create("cr_mogm", 4, weighting=name, alpha=0.7), create(name, 4)
    theirs = jd.CRMOGMWeighting(jd.ConstantWeighting(torch.ones(4)), 0.7)
    assert weighting.needs == other.needs
    for seed in range(4):
        losses, stats = torch.rand(4).double() + 0.1, stats_of(gram_of("conflicting", 4, seed))
        theirs.weighting = jd.ConstantWeighting(other(losses, stats))
        torch.testing.assert_close(weighting(losses, stats), theirs(stats.gram))
        weighting.after_step(losses / 2)
        other.after_step(losses / 2)
    if weighting.wants_stats():
        assert torch.equal(weighting(losses, None), weighting.weights)
    with pytest.raises(TypeError, match="weighting: expected a name or a Weighting, got int"):
        create("cr_mogm", 4, weighting=3)


# ---- what all have in common ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_permuting_tasks_permutes_weights(name, monkeypatch):
    gram, order = gram_of("conflicting", 6), torch.tensor([3, 5, 0, 1, 4, 2])
    weighting, permuted = create(name, 6), create(name, 6)
    if name in ("pcgrad", "gradvac"):
        drawn = weighting._orders(6)
        back = order.argsort().numpy()
        monkeypatch.setattr(weighting, "_orders", lambda count: drawn)
        monkeypatch.setattr(permuted, "_orders", lambda count: back[drawn[order.numpy()]])
    if name == "pcd":
        permuted.primary = int(order.argsort()[weighting.primary])
    weights = weighting.from_gram(gram)
    torch.testing.assert_close(permuted.from_gram(gram[order][:, order]), weights[order], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-140, 1e-12, 1e-3, 1e12, 1e140])
@pytest.mark.parametrize("name", EXPONENTS)
def test_scale_of_all_gradients(name, scale):
    for kind in ("conflicting", "scaled"):
        gram = gram_of(kind, 5)
        scaled = create(name, 5).from_gram(gram * scale * scale)
        expected = create(name, 5).from_gram(gram) * scale ** EXPONENTS[name]
        torch.testing.assert_close(scaled, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dualproj", "nash_mtl", "fairgrad", "config"])
@pytest.mark.parametrize("kind", ["random", "conflicting", "scaled", "square"])
def test_no_conflict_where_that_is_claimed(name, kind):
    for num_tasks, seed in itertools.product((2, 5, 12), range(3)):
        gram = gram_of(kind, num_tasks, seed)
        weights = create(name, num_tasks).from_gram(gram)
        slopes = unit_slopes(gram, weights) / (weights.abs() * gram.diagonal().sqrt()).max()
        assert float(slopes.min()) >= -1e-9


@pytest.mark.parametrize("name", NAMES)
def test_many_gramians_at_once(name):
    grams = torch.stack([gram_of(kind, 4) for kind in ("random", "conflicting", "agreeing")])
    together, one_by_one = create(name, 4), create(name, 4)
    weights = together.from_gram(grams)
    assert weights.shape == (3, 4)
    for row, gram in zip(weights, grams, strict=True):
        assert torch.equal(row, one_by_one.from_gram(gram))
    assert create(name, 4).from_gram(grams[:0]).shape == (0, 4)
    single = create(name, 4).from_gram(grams[0].float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, weights[0], rtol=1e-3, atol=1e-4)
    for bad in (grams[0, :3], grams[0, 0], grams[None]):
        with pytest.raises(ValueError, match=r"gram: expected \[4, 4\] or \[B, 4, 4\], got shape"):
            create(name, 4).from_gram(bad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_gramians_on_a_gpu(name):
    gram = gram_of("conflicting", 4)
    weights = create(name, 4).from_gram(gram.cuda())
    assert weights.is_cuda
    torch.testing.assert_close(weights.cpu(), create(name, 4).from_gram(gram))
    weighting = create(name, 4)
    assert weighting(torch.ones(4).double().cuda(), stats_of(gram.cuda(), [True, True, False, True])).is_cuda


# ---- degenerate input -----------------------------------------------------------------------------------------------

NONE, NAN, INF = 0.0, math.nan, math.inf
DEGENERATE = {
    "no gradient at all": torch.zeros(3, 3),
    "one zero": gram_of("random", 3) * vector(1, 0, 1)[:, None] * vector(1, 0, 1),
    "two zeros": gram_of("random", 3) * vector(1, 0, 0)[:, None] * vector(1, 0, 0),
    "identical": torch.full((3, 3), 4.0),
    "parallel": vector(1, 2, 3)[:, None] * vector(1, 2, 3),
    "opposite": vector(1, -1, 1)[:, None] * vector(1, -1, 1),
    "opposite and one more": torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1]]),
    "nearly opposite": torch.tensor([[1.0, -1 + 1e-15, 0], [-1 + 1e-15, 1, 0], [0, 0, 1]]),
    "summing to zero": 3 * torch.eye(3) - 1,
    "tiny": 1e-290 * gram_of("conflicting", 3),
    "huge": 1e290 * gram_of("conflicting", 3),
    "far apart": vector(1e-100, 1, 1e100)[:, None] * gram_of("random", 3) * vector(1e-100, 1, 1e100),
    "NaN": gram_of("random", 3) + torch.diag(vector(0, NAN, 0)),
    "row of inf": torch.where(torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).bool(), INF, gram_of("random", 3)),
    "stray NaN": gram_of("random", 3) + torch.tensor([[0, NAN, 0], [NAN, 0, 0], [0, 0, 0.0]]),
    "nothing finite": torch.full((3, 3), NAN),
    "negative square": torch.tensor([[1.0, 0.1, 0.2], [0.1, -0.5, 0.1], [0.2, 0.1, 2.0]]),
    "indefinite": torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, -0.9], [0.9, -0.9, 1.0]]),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_input_has_a_finite_answer(name, case):
    gram = DEGENERATE[case].double()
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        weights = create(name, 3).from_gram(gram)
    assert weights.isfinite().all()
    weighting = create(name, 3)
    before = weighting.weights.clone()
    weights = weighting(vector(1, 1, 1), stats_of(gram))
    assert weights.isfinite().all()
    unknown = ~gram.diagonal().isfinite()
    assert torch.equal(weights[unknown], before[unknown])


ZERO_GRADIENT = {"exact_slw": 1, "pcgrad": 1, "gradvac": 1, "cagrad": 1 / 3, "upgrad": 1 / 3, "dualproj": 1 / 3}


@pytest.mark.parametrize("name", [name for name in EXPONENTS if name not in ("mgda", "sdmgrad", "krum")])
def test_a_zero_gradient_is_weighted_as_documented(name):
    gram = DEGENERATE["one zero"]
    weights, without = (create(name, n).from_gram(g) for n, g in ((3, gram), (2, gram[::2, ::2])))
    assert float(weights[1]) == ZERO_GRADIENT.get(name, 0)
    share = 2 / 3 if name in ("cagrad", "upgrad", "dualproj") else 1
    torch.testing.assert_close(weights[::2], share * without)
    none_moves = create(name, 3).from_gram(torch.zeros(3, 3))
    assert none_moves.tolist() == [ZERO_GRADIENT.get(name, 0)] * 3


def test_mgda_gives_all_weight_to_zero_gradients():
    weighting = create("mgda", 3)
    assert weighting.from_gram(DEGENERATE["two zeros"]).tolist() == [0, 0.5, 0.5]
    assert weighting.from_gram(torch.zeros(3, 3)).tolist() == [1 / 3] * 3


@pytest.mark.parametrize(
    ("name", "identical", "opposite"),
    [
        ("exact_slw", [1, 1], [1, 1]),
        ("mgda", [0.5, 0.5], [0.5, 0.5]),
        ("pcgrad", [1, 1], [2, 2]),
        ("gradvac", [1, 1], [2, 2]),
        ("cagrad", [0.75, 0.75], [0.5, 0.5]),
        ("imtl_g", [0.5, 0.5], [0, 0]),
        ("nash_mtl", [8**-0.5, 8**-0.5], None),
        ("fairgrad", [4 ** (-2 / 3) / 2 ** (2 / 3)] * 2, None),
        ("aligned_mtl", [2**0.5 / 2**0.5, 1], [0, 0]),
        ("upgrad", [0.5, 0.5], [0.5, 0.5]),
        ("dualproj", [0.5, 0.5], [0.5, 0.5]),
        ("config", [1, 1], [0, 0]),
        ("sdmgrad", [0.5, 0.5], [0.5, 0.5]),
        ("modo", [0.5, 0.5], [0.5, 0.5]),
    ],
)
def test_two_equal_and_two_opposite_gradients(name, identical, opposite):
    equal = torch.full((2, 2), 4.0, dtype=torch.float64)
    torch.testing.assert_close(create(name, 2).from_gram(equal), vector(*identical), rtol=1e-9, atol=1e-9)
    against = equal * vector(1, -1)[:, None] * vector(1, -1)
    weights = create(name, 2).from_gram(against)
    assert length(against, weights) <= 1e-5 * float(weights.max())
    if opposite is not None:
        torch.testing.assert_close(weights, vector(*opposite), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_one_task(name):
    expected = {"nash_mtl": 1 / 3, "fairgrad": 9 ** (-2 / 3), "cagrad": 1.5}.get(name, 1.0)
    torch.testing.assert_close(create(name, 1).from_gram(vector(9.0)[None]), vector(expected))


@pytest.mark.parametrize("name", NAMES)
def test_absent_tasks_do_not_count_and_keep_their_weight(name):
    weighting, losses = create(name, 4), vector(1, 1, 1, 1)
    gram = gram_of("conflicting", 4)
    before = weighting(losses, stats_of(gram)).clone()
    without = gram.clone()
    without[2] = without[:, 2] = 0.0
    weights = weighting(losses, stats_of(without, [True, True, False, True]))
    assert float(weights[2]) == float(before[2])
    if name not in STATEFUL:
        keep = [0, 1, 3]
        torch.testing.assert_close(weights[keep], create(name, 3).from_gram(gram[keep][:, keep]))
    assert torch.equal(weighting(losses, None), weights)  # no Gramian: the weights in force


# ---- state and loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_resuming_continues(name):
    grams, losses = [gram_of("conflicting", 4, seed) for seed in range(8)], torch.ones(4, dtype=torch.float64)
    whole, first, second = (create(name, 4) for _ in range(3))
    expected = [whole(losses, stats_of(gram)).clone() for gram in grams]
    for gram in grams[:3]:
        first(losses, stats_of(gram))
    second.load_state_dict(first.to(torch.bfloat16).state_dict())
    assert torch.equal(second.weights, first.weights)
    found = [second(losses, stats_of(gram)).clone() for gram in grams[3:]]
    assert all(torch.equal(a, b) for a, b in zip(found, expected[3:], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_training_step_descends_along_the_weighted_gradients(name):
    torch.manual_seed(0)
    model, batch = nn.Linear(5, 3).double(), torch.randn(16, 5, dtype=torch.float64)
    trunk = nn.Linear(5, 5).double()
    scalarizer = Scalarizer(name, tasks=["a", "b", "c"], inputs=trunk)

    def losses() -> dict[str, Tensor]:
        errors = (model(trunk(batch)) - vector(3, -20, 500)).square().mean(0)
        return dict(zip("abc", errors, strict=True))

    gram = gradstats.from_losses(losses(), trunk).gram
    scalarizer(losses()).backward()
    torch.testing.assert_close(scalarizer.weights, create(name, 3).from_gram(gram), rtol=1e-6, atol=1e-9)
    total = torch.stack(list(losses().values())) @ scalarizer.weights
    torch.testing.assert_close(trunk.weight.grad, torch.autograd.grad(total, trunk.weight)[0])


# ---- TorchJD --------------------------------------------------------------------------------------------------------

#: The same in TorchJD with the options that make it most exact, and how near it comes: to rounding where it has a
#: closed form; its projections add 1e-9 to the diagonal; the Frank-Wolfe steps of its MGDA converge like 1 / steps; the
#: solver of its CAGrad stops early, that of its Nash-MTL earlier. With gradients 1e6 times longer than others
#: ("scaled") all of these lose the short ones, being exact relative to the longest; ours are held to the definitions.
EXACT = QuadprogProjector(norm_eps=1e-12, reg_eps=1e-9)
THEIRS = {
    "mgda": (jd.MGDAWeighting(epsilon=1e-12, max_iters=10_000), 1e-2),
    "cagrad": (jd.CAGradWeighting(c=0.5, norm_eps=1e-9), 1e-2),
    "imtl_g": (jd.IMTLGWeighting(), 1e-6),
    "fairgrad": (jd.FairGradWeighting(alpha=2.0), 1e-6),
    "aligned_mtl": (jd.AlignedMTLWeighting(), 1e-6),
    "upgrad": (jd.UPGradWeighting(projector=EXACT), 1e-4),
    "dualproj": (jd.DualProjWeighting(projector=EXACT), 1e-4),
}


def assert_same(name: str, gram: Tensor, theirs: Tensor, tolerance: float) -> None:
    """The same aggregated gradient, in direction and length."""
    weights = create(name, len(gram)).from_gram(gram)
    assert angle(gram, weights, theirs) <= tolerance
    assert length(gram, weights) == pytest.approx(length(gram, theirs), rel=tolerance)


@pytest.mark.parametrize("num_tasks", [2, 5, 16])
@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting", "uneven"])
@pytest.mark.parametrize("name", THEIRS)
def test_agrees_with_torchjd(name, kind, num_tasks):
    theirs, tolerance = THEIRS[name]
    gram = gram_of(kind, num_tasks)
    # TorchJD's aligned gradients are averaged, where the authors add them up.
    assert_same(name, gram, theirs(gram) * (num_tasks if name == "aligned_mtl" else 1), tolerance)


@pytest.mark.parametrize("name", THEIRS)
def test_agrees_with_torchjd_on_a_large_gramian(name):
    theirs, tolerance = THEIRS[name]
    # On random gradients 30,000 Frank-Wolfe steps are not enough.
    gram = gram_of("agreeing" if name == "mgda" else "random", 64)
    assert_same(name, gram, theirs(gram) * (64 if name == "aligned_mtl" else 1), tolerance)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("upgrad", jd.UPGradWeighting()), ("dualproj", jd.DualProjWeighting()), ("cagrad", jd.CAGradWeighting(c=0.5))],
)
def test_agrees_with_torchjd_as_it_comes(name, theirs):
    """With its defaults, which add 1e-4 of the trace to the diagonal."""
    for kind in ("random", "agreeing", "conflicting"):
        gram = gram_of(kind, 6)
        assert angle(gram, create(name, 6).from_gram(gram), theirs(gram)) <= 1e-2


@pytest.mark.filterwarnings("ignore")  # of cvxpy
@pytest.mark.parametrize("num_tasks", [2, 5])
@pytest.mark.parametrize("kind", ["random", "agreeing", "conflicting"])
def test_nash_mtl_agrees_with_torchjd(kind, num_tasks):
    jacobian = gradients(kind, num_tasks)
    theirs = jd.NashMTL(num_tasks, max_norm=0.0, update_weights_every=1, optim_niter=100)
    assert_same("nash_mtl", jacobian @ jacobian.T, theirs.weighting(jacobian), 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_config_agrees_with_torchjd(kind):
    jacobian = gradients(kind, 6)
    aggregated = create("config", 6).from_gram(jacobian @ jacobian.T) @ jacobian
    torch.testing.assert_close(aggregated, jd.ConFIG()(jacobian), rtol=1e-6, atol=1e-6 * float(aggregated.abs().max()))


@pytest.mark.parametrize(
    ("name", "theirs"), [("pcgrad", jd.PCGradWeighting()), ("gradvac", jd.GradVacWeighting(eps=0.0))]
)
def test_surgery_agrees_with_torchjd_in_the_same_order(name, theirs, monkeypatch):
    monkeypatch.setattr(torch, "randperm", torch.arange)
    weighting = create(name, 5)
    ascending = np.array([[j for j in range(5) if j != i] for i in range(5)])
    monkeypatch.setattr(weighting, "_orders", lambda count: ascending)
    for seed in range(4):
        gram = gram_of("conflicting", 5, seed)
        torch.testing.assert_close(weighting.from_gram(gram), theirs(gram), rtol=1e-6, atol=1e-9)


def test_gramians_travel_between_torchjd_and_gradstats():
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(8, 4).double()

    def losses() -> Tensor:
        return (model(batch) - vector(1, -2, 3)).square().mean(0)

    # Ours into theirs.
    stats = gradstats.from_losses(losses(), model)
    their_weights = jd.UPGradWeighting()(stats.gram)
    losses().backward(their_weights)

    # Theirs into ours.
    gram = Engine(model, batch_dim=None).compute_gramian(losses())
    our_weights = create("upgrad", len(gram)).from_gram(gram)
    losses().backward(our_weights)

    torch.testing.assert_close(gram, stats.gram)
    torch.testing.assert_close(our_weights, their_weights, rtol=1e-2, atol=1e-2)


# ---- the table in the documentation ---------------------------------------------------------------------------------


def test_all_weightings_have_facts():
    assert len({facts(name).title for name in available()}) == len(available())


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_those_of_the_class(name):
    weighting, uses = create(name, 3), facts(name).uses
    assert ("gramian" in weighting.needs) == any(part in uses for part in ("G", "J₁J₂ᵀ"))
    assert ("state" in uses) == any(
        len(getattr(weighting, n).shape) for n in weighting.STATE if n in ("point", "targets", "squares")
    )
    assert ("random" in uses) == hasattr(weighting, "seed")
    weights = torch.cat([create(name, 4).from_gram(gram_of("conflicting", 4, seed)) for seed in range(8)])
    assert {"> 0": weights.min() > 0, "≥ 0": weights.min() >= 0, "any": True}[facts(name).sign]

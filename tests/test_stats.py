"""Every metric of GradStats against its definition on the task gradients themselves, in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradstats import GradStats, pairwise


def stats_of(jacobian: Tensor, **fields) -> GradStats:
    num_tasks = len(jacobian)
    names = tuple(f"t{i}" for i in range(num_tasks))
    present = torch.ones(num_tasks, dtype=torch.bool)
    gram = jacobian.double() @ jacobian.double().T
    return GradStats(**{"gram": gram, "names": names, "present": present, **fields})


def random_jacobian(num_tasks: int, seed: int = 0, size: int = 40) -> Tensor:
    return torch.randn(num_tasks, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(num_tasks=st.integers(1, 7), seed=st.integers(0, 10_000), exponent=st.integers(-140, 140))
@settings(max_examples=60, deadline=None)
def test_metrics_follow_their_definitions_at_any_scale(num_tasks, seed, exponent):
    plain = random_jacobian(num_tasks, seed)
    stats = stats_of(plain * 10.0**exponent)
    norms = plain.norm(dim=1)
    cosine = (plain / norms[:, None]) @ (plain / norms[:, None]).T
    similarity = 2 * norms[:, None] * norms[None, :] / (norms[:, None] ** 2 + norms[None, :] ** 2)
    singular = torch.linalg.svdvals(plain)
    torch.testing.assert_close(stats.norms, norms * 10.0**exponent, rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.cosine, cosine, rtol=0, atol=1e-12)
    torch.testing.assert_close(stats.magnitude_similarity, similarity, rtol=1e-12, atol=0)
    assert float(stats.condition_number) == pytest.approx(float(singular[0] / singular[-1]), rel=1e-8)
    if num_tasks > 1:
        upper = torch.triu_indices(num_tasks, num_tasks, 1)
        pairs = cosine[upper[0], upper[1]]
        assert float(stats.mean_cosine) == pytest.approx(float(pairs.mean()), abs=1e-12)
        assert float(stats.conflict_rate) == pytest.approx(float((pairs < 0).double().mean()))
        assert float(stats.mean_magnitude_similarity) == pytest.approx(float(similarity[upper[0], upper[1]].mean()))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e12), (torch.float32, 1e-12), (torch.float64, 1e140)])
def test_extreme_gradients_through_pairwise(dtype, scale):
    plain = random_jacobian(3)
    stats = pairwise((plain * scale).to(dtype))
    expected = pairwise(plain.to(dtype))
    torch.testing.assert_close(stats.cosine, expected.cosine, rtol=0, atol=1e-6)
    torch.testing.assert_close(stats.magnitude_similarity, expected.magnitude_similarity, rtol=1e-6, atol=0)
    assert float(stats.condition_number) == pytest.approx(float(expected.condition_number), rel=1e-5)


def test_one_task():
    stats = stats_of(torch.tensor([[3.0, 4.0]]))
    assert stats.norms.tolist() == [5.0]
    assert stats.cosine.tolist() == [[1.0]]
    assert stats.magnitude_similarity.tolist() == [[1.0]]
    assert float(stats.condition_number) == 1.0
    assert math.isnan(float(stats.mean_cosine))
    assert math.isnan(float(stats.conflict_rate))
    assert stats.alignment([2.0]).tolist() == [1.0]


def test_zero_gradients_have_zero_cosine_and_similarity():
    stats = stats_of(torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]))
    assert stats.cosine.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert stats.magnitude_similarity.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert math.isinf(float(stats.condition_number))
    assert float(stats.conflict_rate) == 0.0
    assert stats.alignment([1.0, 0.0, 1.0]).tolist() == [0, 0, 0]
    assert bool(stats.finite.all())


def test_identical_and_opposite_gradients():
    row = torch.tensor([0.3, -0.7, 0.1], dtype=torch.float64)
    stats = stats_of(torch.stack([row, row, -row]))
    np.testing.assert_allclose(stats.cosine, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-15)
    assert float(stats.conflict_rate) == pytest.approx(2 / 3)
    assert math.isinf(float(stats.condition_number))
    assert stats.alignment([1.0, 1.0, 2.0]).tolist() == [0, 0, 0]


def test_condition_number_is_exact_for_nearly_dependent_and_for_badly_scaled_tasks():
    angle = 1e-6
    nearly = stats_of(torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64))
    assert float(nearly.condition_number) == pytest.approx(1 / math.tan(angle / 2), rel=1e-3)
    scaled = stats_of(torch.tensor([[1e12, 0.0], [1e-12, 1e-12]], dtype=torch.float64))
    # svd([[a, 0], [b, b]]) with b << a: σ_max = a, σ_min = b.
    assert float(scaled.condition_number) == pytest.approx(1e24, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_task_touches_its_own_row_and_column_alone(bad):
    plain = random_jacobian(4)
    broken = plain.clone()
    broken[2, 5] = bad
    stats, reference = stats_of(broken, names=("a", "b", "c", "d")), stats_of(plain)
    assert stats.finite.tolist() == [True, True, False, True]
    assert stats.non_finite_names == ("c",)
    keep = [0, 1, 3]
    for metric in ("cosine", "magnitude_similarity"):
        got, expected = getattr(stats, metric), getattr(reference, metric)
        torch.testing.assert_close(got[keep][:, keep], expected[keep][:, keep])
        assert not torch.isfinite(got[2]).any() or metric == "magnitude_similarity"
    assert math.isnan(float(stats.condition_number))
    assert math.isnan(float(stats.mean_cosine))
    assert "not finite" in repr(stats)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_task_is_hidden_neither_by_a_zero_gradient_nor_by_a_ratio(bad):
    stats = stats_of(torch.tensor([[bad, 1.0], [0.0, 0.0], [1.0, 2.0]]))
    assert stats.finite.tolist() == [False, True, True]
    for metric in (stats.cosine, stats.magnitude_similarity):
        assert metric[0].isnan().all()
        assert metric[:, 0].isnan().all()
        assert metric[1:, 1:].isfinite().all()
    assert math.isnan(float(stats.mean_magnitude_similarity))


def test_pairwise_metrics_are_exactly_symmetric_with_a_diagonal_of_one():
    for seed in range(20):
        stats = stats_of(random_jacobian(6, seed))
        for metric in (stats.cosine, stats.magnitude_similarity):
            assert torch.equal(metric, metric.T)
            assert metric.diagonal().tolist() == [1.0] * 6


def test_condition_number_is_on_the_cpu_whatever_the_default_device():
    stats = stats_of(random_jacobian(3))
    with torch.device("meta"):
        assert stats.condition_number.device.type == "cpu"


def test_absent_tasks_do_not_count():
    plain = random_jacobian(3)
    with_absent = torch.cat([plain, torch.zeros(1, 40, dtype=torch.float64)])
    stats = stats_of(with_absent, present=torch.tensor([True, True, True, False]))
    reference = stats_of(plain)
    for metric in ("mean_cosine", "mean_magnitude_similarity", "conflict_rate", "condition_number"):
        assert float(getattr(stats, metric)) == pytest.approx(float(getattr(reference, metric)), rel=1e-9), metric
    assert "absent" in repr(stats)


def test_weighted_and_alignment_are_those_of_the_weighted_gradients():
    plain, weights = random_jacobian(4), torch.tensor([0.5, 2.0, -1.0, 0.0], dtype=torch.float64)
    stats = stats_of(plain, groups={"g": stats_of(plain[:, :7])})
    rows = weights[:, None] * plain
    torch.testing.assert_close(stats.weighted(weights).gram, rows @ rows.T)
    torch.testing.assert_close(stats.weighted(weights).groups["g"].gram, rows[:, :7] @ rows[:, :7].T)
    expected = torch.nn.functional.cosine_similarity(plain, (weights @ plain)[None], dim=1)
    torch.testing.assert_close(stats.alignment(weights), expected)
    huge = stats_of(plain * 1e140)
    torch.testing.assert_close(huge.alignment(weights.tolist()), expected)
    for bad in ([1.0, 2.0], None, "abcd"):
        with pytest.raises(ValueError, match="weights: expected 4 numbers"):
            stats.weighted(bad)


def test_addition_over_disjoint_parameters():
    plain = random_jacobian(3)
    left = stats_of(plain[:, :10], groups={"a": stats_of(plain[:, :10])})
    right = stats_of(plain[:, 10:], groups={"b": stats_of(plain[:, 10:])})
    total = left + right
    torch.testing.assert_close(total.gram, plain @ plain.T)
    assert set(total.groups) == {"a", "b"}
    with pytest.raises(ValueError, match="tasks differ"):
        left + stats_of(plain, names=("x", "y", "z"))


def test_mean_counts_pairs_that_were_present():
    first, second = random_jacobian(3, 1), random_jacobian(3, 2)
    second[2] = 0
    steps = [stats_of(first), stats_of(second, present=torch.tensor([True, True, False]))]
    mean = GradStats.mean(steps)
    expected = (first @ first.T + second @ second.T) / 2
    expected[2], expected[:, 2] = (first @ first.T)[2], (first @ first.T)[:, 2]
    torch.testing.assert_close(mean.gram, expected)
    assert mean.present.tolist() == [True, True, True]
    with pytest.raises(ValueError, match="steps: expected at least one"):
        GradStats.mean([])


def sketched(jacobian: Tensor, error: float, **fields) -> GradStats:
    """Statistics whose entries are said to be off by ``error``, in units of ``n_i n_j``."""
    norms = jacobian.double().norm(dim=1)
    return stats_of(jacobian, method="sketch", standard_error=error * torch.outer(norms, norms), **fields)


def test_independent_standard_errors_combine():
    first, second = sketched(random_jacobian(3, 1), 0.3), sketched(random_jacobian(3, 2), 0.4)
    root = (first.standard_error.square() + second.standard_error.square()).sqrt()
    torch.testing.assert_close(GradStats.mean([first, second]).standard_error, root / 2)
    torch.testing.assert_close((first + second).standard_error, root)
    exact = stats_of(random_jacobian(3, 3), method="batched")
    torch.testing.assert_close((first + exact).standard_error, first.standard_error)
    torch.testing.assert_close(GradStats.mean([exact, first]).standard_error, first.standard_error / 2)
    assert (first + exact).method == "sketch+batched"
    assert GradStats.mean([first, second]).method == "sketch"
    assert GradStats.mean([exact, exact]).standard_error is None


def test_the_standard_error_of_a_mean_counts_the_steps_in_which_a_pair_was_present():
    absent = sketched(random_jacobian(3, 2), 0.4, present=torch.tensor([True, True, False]))
    first = sketched(random_jacobian(3, 1), 0.3)
    error = GradStats.mean([first, absent]).standard_error
    torch.testing.assert_close(error[2], first.standard_error[2])
    torch.testing.assert_close(error[0, 1], torch.hypot(first.standard_error, absent.standard_error)[0, 1] / 2)


def test_standard_errors_of_mean_gramians_are_those_of_repeated_draws():
    """Means of 4 Wishart matrices of 16 degrees of freedom, of two parameter sets: stated and seen errors agree."""
    jacobian, generator = random_jacobian(3), torch.Generator().manual_seed(3)

    def draw(part: Tensor) -> GradStats:
        products = part @ torch.randn(part.shape[1], 16, generator=generator, dtype=torch.float64)
        gram = part @ part.T
        error = ((gram.square() + torch.outer(gram.diagonal(), gram.diagonal())) / 16).sqrt()
        return replace(stats_of(products / 4), standard_error=error, method="sketch")

    means = [
        GradStats.mean([draw(jacobian[:, :15]) + draw(jacobian[:, 15:]) for _ in range(4)]).weighted([1.0, -2.0, 3.0])
        for _ in range(400)
    ]
    seen = torch.stack([mean.gram for mean in means]).std(0)
    torch.testing.assert_close(means[0].standard_error, seen, rtol=0.15, atol=0)


def test_sketched_statistics_say_so_wherever_they_go(tmp_path):
    stats = sketched(random_jacobian(3), 0.25, groups={"g": sketched(random_jacobian(3, 1), 0.5)})
    assert "sketched, norms ± 12.5%" in repr(stats)
    values = stats.to_dict()
    assert values["norm_standard_error/t1"] == pytest.approx(0.125 * values["norm/t1"])
    assert len(values) == 2 * 3 + 2 * 3 + 4
    stats.save(tmp_path / "stats.pt")
    loaded = GradStats.load(tmp_path / "stats.pt")
    assert torch.equal(loaded.standard_error, stats.standard_error)
    assert torch.equal(loaded.groups["g"].standard_error, stats.groups["g"].standard_error)
    assert loaded.method == "sketch"
    assert "±" not in repr(stats_of(random_jacobian(3)))
    zero = sketched(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), 0.25)
    assert zero.norm_standard_error.tolist() == pytest.approx([0.0, 0.125 * math.sqrt(5)])
    assert "norms ± 12.5%" in repr(zero)


def test_to_dict_is_flat_and_complete():
    stats = stats_of(random_jacobian(3), names=("seg", "depth", "normal"))
    values = stats.to_dict()
    assert all(type(v) is float for v in values.values())
    assert values["norm/seg"] == float(stats.norms[0])
    assert values["cosine/seg/normal"] == float(stats.cosine[0, 2])
    assert values["condition_number"] == float(stats.condition_number)
    assert len(values) == 3 + 2 * 3 + 4


def test_save_and_load_round_trip(tmp_path):
    stats = stats_of(random_jacobian(3), groups={"g": stats_of(random_jacobian(3, 1))}, method="batched")
    stats.save(tmp_path / "stats.pt")
    loaded = GradStats.load(tmp_path / "stats.pt")
    assert torch.equal(loaded.gram, stats.gram)
    assert torch.equal(loaded.groups["g"].gram, stats.groups["g"].gram)
    assert loaded.names == stats.names
    assert loaded.method == "batched"
    assert [p.name for p in tmp_path.iterdir()] == ["stats.pt"]
    torch.save({"something": 1}, tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"not a file of torch's")
    for name in ("other.pt", "junk.pt"):
        with pytest.raises(ValueError, match=r"path: .*does not hold"):
            GradStats.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        GradStats.load(tmp_path / "missing.pt")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats.pt"
    stats_of(random_jacobian(2)).save(path)
    before = path.read_bytes()

    def fail(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        stats_of(random_jacobian(3)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["stats.pt"]


def test_immutable():
    stats = stats_of(random_jacobian(2))
    with pytest.raises(AttributeError):
        stats.gram = torch.zeros(2, 2)

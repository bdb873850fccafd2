"""pairwise in every accepted form against a float64 oracle, and every refusal."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradstats import PairwisePlan, pairwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def oracle(grads, metric=None) -> np.ndarray:
    """The Gramian from its definition: one long float64 row per task."""
    shapes = [next((g[k].shape for g in grads if g[k] is not None), None) for k in range(len(grads[0]))]
    rows = []
    for task in grads:
        parts = [
            np.zeros(int(np.prod(shape))) if g is None else g.detach().double().numpy().reshape(-1)
            for g, shape in zip(task, shapes, strict=True)
            if shape is not None
        ]
        rows.append(np.concatenate([np.zeros(0), *parts]))
    jacobian = np.stack(rows)
    scale = np.ones(jacobian.shape[1])
    if metric is not None:
        scale = np.concatenate([m.double().numpy().reshape(-1) for m in metric])
    return (jacobian * scale) @ jacobian.T


def assert_matches(stats, expected: np.ndarray) -> None:
    norms = np.sqrt(np.diag(expected))
    error = np.abs(stats.gram.numpy() - expected)
    assert stats.gram.dtype == torch.float64
    assert (error <= 1e-7 * np.outer(norms, norms)).all(), error.max()
    assert torch.equal(stats.gram, stats.gram.T)


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with another arrangement in memory."""
    if layout == "transposed" and tensor.ndim:
        return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))
    if layout == "channels_last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "row_stride" and tensor.ndim:
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if layout == "expanded" and tensor.ndim:
        return tensor[:1].expand(tensor.shape) if tensor.shape[0] else tensor
    return tensor.contiguous()


shapes = st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple), min_size=1, max_size=4)
layouts = st.sampled_from(["contiguous", "transposed", "channels_last", "row_stride", "expanded"])


@given(data=st.data(), num_tasks=st.integers(1, 9), shapes=shapes, seed=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_lists_of_any_shape_dtype_layout_and_missing_gradients(data, num_tasks, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in shapes]
    grads = [
        [
            None
            if data.draw(st.integers(0, 5)) == 0
            else lay_out(torch.randn(shape, generator=generator).to(dtype), data.draw(layouts))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        for _ in range(num_tasks)
    ]
    metric = None
    if data.draw(st.booleans()):
        metric = [lay_out(torch.rand(shape, generator=generator), data.draw(layouts)) for shape in shapes]
    if all(g is None for task in grads for g in task):
        with pytest.raises(ValueError, match="at least one gradient"):
            pairwise(grads)
        return
    kept = [k for k in range(len(shapes)) if any(task[k] is not None for task in grads)]
    expected = oracle([[task[k] for k in kept] for task in grads], metric and [metric[k] for k in kept])
    stats = pairwise(grads, metric=metric)
    assert_matches(stats, expected)
    assert torch.equal(PairwisePlan(grads, metric=metric)().gram, stats.gram)


@given(num_tasks=st.integers(1, 9), shapes=shapes, seed=st.integers(0, 10_000), layout=layouts, data=st.data())
@settings(max_examples=80, deadline=None)
def test_stacked_blocks(num_tasks, shapes, seed, layout, data):
    generator = torch.Generator().manual_seed(seed)
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in shapes]
    blocks = [
        lay_out(torch.randn((num_tasks, *shape), generator=generator).to(dtype), layout)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    grads = [[block[t] for block in blocks] for t in range(num_tasks)]
    stats = pairwise(blocks, stacked=True)
    assert_matches(stats, oracle(grads))
    assert_matches(pairwise([None, *blocks], stacked=True), oracle(grads))
    assert torch.equal(PairwisePlan(blocks, stacked=True)().gram, stats.gram)


def test_a_tensor_with_a_row_stride_is_one_row_per_task():
    wide = torch.randn(5, 100, generator=torch.Generator().manual_seed(0))
    rows = wide[:, 3:40]
    assert_matches(pairwise(rows), oracle([[row] for row in rows]))
    assert_matches(pairwise(rows.reshape(5, 37, 1)), oracle([[row] for row in rows]))
    assert_matches(pairwise(rows[:, 0]), oracle([[row] for row in rows[:, :1]]))


def test_forms_agree():
    generator = torch.Generator().manual_seed(0)
    params = [(4, 3), (7,), ()]
    blocks = [torch.randn(3, *shape, generator=generator) for shape in params]
    lists = [[block[t] for block in blocks] for t in range(3)]
    flat = torch.cat([block.reshape(3, -1) for block in blocks], 1)
    expected = oracle(lists)
    for form in (lists, tuple(map(tuple, lists)), flat, list(flat), {"a": lists[0], "b": lists[1], "c": lists[2]}):
        assert_matches(pairwise(form), expected)
    assert_matches(pairwise(dict(zip("abc", flat, strict=True))), expected)
    assert_matches(pairwise(blocks, stacked=True), expected)


def test_a_tensor_of_shape_0_stands_for_zeros():
    metric, empty = [torch.rand(2, 3), torch.rand(4)], torch.empty(0, dtype=torch.float64)
    grads = [[torch.randn(2, 3), empty], [torch.randn(2, 3), torch.randn(4)], [empty, None]]
    missing = [[None if g is empty else g for g in task] for task in grads]
    assert_matches(pairwise(grads), oracle(missing))
    assert_matches(pairwise(grads, metric=metric), oracle(missing, metric))


def test_metric_in_the_tensor_forms():
    generator = torch.Generator().manual_seed(0)
    rows, diagonal = torch.randn(4, 6, 5, generator=generator), torch.rand(6, 5, generator=generator)
    expected = oracle([[row] for row in rows], [diagonal])
    assert_matches(pairwise(rows, metric=diagonal), expected)
    assert_matches(pairwise(list(rows), metric=diagonal), expected)
    assert_matches(pairwise([[row] for row in rows], metric=[diagonal]), expected)
    assert_matches(pairwise([rows], stacked=True, metric=[diagonal.double().T.contiguous().T]), expected)


def test_gradients_of_a_model_as_autograd_returns_them():
    torch.manual_seed(0)
    trunk, heads = nn.Linear(5, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])
    features = trunk(torch.randn(8, 5)).tanh()
    losses = {f"task{i}": head(features).square().mean() for i, head in enumerate(heads)}
    params = [*trunk.parameters(), *heads.parameters()]
    grads = {
        name: torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for name, loss in losses.items()
    }
    stats = pairwise(grads)
    assert stats.names == ("task0", "task1")
    assert_matches(stats, oracle(list(grads.values())))


def test_gradients_that_require_grad_are_detached():
    rows = torch.randn(3, 5, requires_grad=True)
    assert not pairwise(rows).gram.requires_grad
    assert not pairwise([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))]).gram.requires_grad


def test_names():
    rows = torch.randn(2, 3)
    assert pairwise(rows).names == ("task0", "task1")
    assert pairwise(rows, names=["a", "b"]).names == ("a", "b")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_gradients_stay_in_their_row_also_beside_missing_ones(bad):
    generator = torch.Generator().manual_seed(0)
    grads = [[torch.randn(50, generator=generator), torch.randn(33, generator=generator)] for _ in range(4)]
    clean = pairwise([[*task] for task in grads]).gram
    grads[1][0][7] = bad
    grads[3][0] = None
    gram = pairwise(grads, names=list("abcd")).gram
    assert not torch.isfinite(gram[1]).any()
    assert not torch.isfinite(gram[:, 1]).any()
    assert torch.isfinite(gram[[0, 2, 3]][:, [0, 2, 3]]).all()
    torch.testing.assert_close(gram[0, 2], clean[0, 2])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inductor's own
def test_traces_as_one_graph(backend):
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(4, 3, generator=generator), torch.randn(7, generator=generator)] for _ in range(3)]
    lists[1][1] = None

    def listed(grads):
        return pairwise(grads, names=["a", "b", "c"]).gram

    def blocks(blocks):
        return pairwise(blocks, stacked=True).cosine

    compiled = torch.compile(listed, fullgraph=True, backend=backend)
    assert torch.equal(compiled(lists), listed(lists))
    stacked = [torch.randn(3, 5, generator=generator)]
    torch.testing.assert_close(torch.compile(blocks, fullgraph=True, backend=backend)(stacked), blocks(stacked))


def test_compiled_function_may_return_the_stats():
    rows = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    stats = torch.compile(lambda r: pairwise(r), fullgraph=True, backend="aot_eager")(rows)
    assert torch.equal(stats.gram, pairwise(rows).gram)
    assert stats.names == ("task0", "task1", "task2")


def rows(**options) -> Tensor:
    return torch.ones(2, **options)


def quantised() -> Tensor:
    return torch.quantize_per_tensor(rows(), 0.1, 0, torch.qint8)


REFUSALS = {
    "no task": (list, ValueError, "grads: expected at least one task"),
    "no row": (lambda: torch.ones(0, 3), ValueError, "grads: expected at least one task"),
    "no gradient": (lambda: [[None], [None]], ValueError, "grads: expected at least one gradient"),
    "no parameter": (lambda: [[], []], ValueError, "grads: expected at least one gradient"),
    "ragged": (lambda: [[rows()], [rows(), rows()]], ValueError, r"grads[1]: expected 1 parameter gradients"),
    "shape": (
        lambda: [rows(), torch.ones(3)],
        ValueError,
        r"grads[1][0]: expected shape (2,) as in grads[0][0]",
    ),
    "dtype": (lambda: [rows(), rows().double()], ValueError, r"grads[1][0]: expected dtype torch.float32"),
    "device": (lambda: [rows(), rows(device="meta")], ValueError, r"grads[1][0]: expected device cpu"),
    "device between parameters": (lambda: [[rows(), rows(device="meta")]], ValueError, r"expected device cpu"),
    "integer": (
        lambda: [rows(), rows().long()],
        TypeError,
        r"grads[1][0]: expected float32, bfloat16",
    ),
    "boolean": (lambda: rows().bool(), TypeError, r"grads[0]: expected float32"),
    "complex": (lambda: [rows().cfloat()], TypeError, r"grads[0][0]: expected float32"),
    "sparse": (lambda: [torch.eye(2).to_sparse()], TypeError, r"grads[0][0]: expected a dense tensor"),
    "quantised": (
        lambda: [torch.quantize_per_tensor(rows(), 0.1, 0, torch.qint8)],
        TypeError,
        r"grads[0][0]: expected float32",
    ),
    "scalar tensor": (lambda: torch.tensor(1.0), ValueError, r"expected a block [T, *param]"),
    "number": (lambda: 3.0, TypeError, "grads: expected a tensor or a sequence"),
    "list of numbers": (lambda: [[1.0, 2.0]], TypeError, r"grads[0][0]: expected a tensor, got float"),
    "a number among tensors": (lambda: [[rows()], [1.0]], TypeError, r"grads[1][0]: expected a tensor, got float"),
    "a number among blocks": (lambda: [[None], [1.0]], TypeError, r"grads[1][0]: expected a tensor, got float"),
    "mapping in a list": (
        lambda: [{"a": rows()}],
        TypeError,
        r"grads[0]: expected a tensor or a sequence",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_refusals(case):
    make, error, message = REFUSALS[case]
    grads = make()
    for function in (pairwise, PairwisePlan):
        with pytest.raises(error, match=re.escape(message)):
            function(grads)


def test_refusals_of_options():
    two = [rows(), rows()]
    for options, message in [
        ({"names": ["a"]}, "names: expected 2 names, one per task, got 1"),
        ({"names": ["a", "a"]}, "names: expected different names"),
        ({"metric": [rows(), rows()]}, "metric: expected 1 tensors, one per parameter, got 2"),
        ({"metric": torch.ones(3)}, "metric[0]: expected shape (2,)"),
        ({"metric": rows(device="meta")}, "metric[0]: expected device cpu"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            pairwise(two, **options)
    with pytest.raises(TypeError, match=re.escape("metric[0]: expected float32")):
        pairwise(two, metric=rows().long())
    for names in ("ab", {"a", "b"}, 5, [1, 2]):
        with pytest.raises(TypeError, match="names: expected a sequence of strings"):
            pairwise(two, names=names)
    with pytest.raises(TypeError, match="grads: expected a sequence of strings"):
        pairwise({1: rows(), 2: rows()})
    with pytest.raises(ValueError, match="stacked=True, got a mapping"):
        pairwise({"a": rows()}, stacked=True)
    with pytest.raises(ValueError, match="names: expected None where grads is a mapping"):
        pairwise({"a": rows()}, names=["a"])
    with pytest.raises(ValueError, match=re.escape("grads[1]: expected 2 tasks in the first dimension")):
        pairwise([torch.ones(2, 3), torch.ones(3, 3)], stacked=True)

"""The operators ``gradstats::combine`` and ``gradstats::gram_combine``: the reference kernels and the compiled ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradstats
from gradstats import ops
from gradstats.ops import reference

Combine = Callable[..., list[Tensor]]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
needs_compiled = pytest.mark.skipif(not gradstats.backends()["cpu"].available, reason="gradstats._C is not compiled")


def _reference(grads: Sequence[Tensor], num_tasks: int, weights: Tensor, stacked: bool = False) -> list[Tensor]:
    return reference.combine(grads, num_tasks, weights, stacked)


def _fused(grads: Sequence[Tensor], num_tasks: int, weights: Tensor, stacked: bool = False) -> list[Tensor]:
    return ops.gram_combine(grads, num_tasks, weights, [], stacked)[1]


KERNELS = [
    pytest.param(_reference, id="reference"),
    pytest.param(ops.combine, id="compiled", marks=needs_compiled),
    pytest.param(_fused, id="fused", marks=needs_compiled),
]


def flat(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [g for row in rows for g in row]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights_of(num_tasks: int, seed: int = 99) -> Tensor:
    return randn(num_tasks, seed=seed, dtype=torch.float64)


def assert_combination(actual: Tensor, rows: Sequence[Tensor], weights: Tensor) -> None:
    """Compare with plain float64 sums: the error of float32 sums, and of rounding once to the gradients' dtype."""
    present = [(w, g.double()) for w, g in zip(weights.double(), rows, strict=True) if g.numel()]
    if not present:
        assert actual.numel() == 0
        return
    exact = sum(w * g for w, g in present)
    size = sum((w * g).abs() for w, g in present)
    first = next(g for g in rows if g.numel())
    assert actual.shape == first.shape
    assert actual.dtype == first.dtype
    rounding = torch.finfo(actual.dtype)
    summing = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps * (len(rows) + 2)
    bound = exact.abs() * rounding.eps / 2 * (1 + 1e-6) + size * summing + rounding.smallest_normal * rounding.eps
    assert ((actual.double() - exact).abs() <= bound).all()


# ---- any shapes, layouts, dtypes -----------------------------------------------------------------------------


def _plain(x: Tensor) -> Tensor:
    return x.contiguous()


def _reversed_strides(x: Tensor) -> Tensor:
    backwards = list(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


def _every_other(x: Tensor) -> Tensor:
    whole = torch.full((*x.shape, 2), 7.0).to(x.dtype)
    whole[..., 0] = x
    return whole[..., 0]


def _inside_larger(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x
    whole = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0).to(x.dtype)
    whole[..., 1 : x.shape[-1] + 1] = x
    return whole[..., 1 : x.shape[-1] + 1]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.dim() else x


DENSE = [_plain, _reversed_strides]
LAYOUTS = [*DENSE, _every_other, _inside_larger, _expanded]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Tensor]], list[Tensor]]:
    num_tasks = draw(st.integers(1, 11))
    sizes = st.integers(1, 6) | st.sampled_from([7, 64, 130, 300])
    shapes = draw(st.lists(st.lists(sizes, max_size=3).map(tuple), min_size=1, max_size=4))
    shapes = [s for s in shapes if torch.Size(s).numel() < 20_000] or [(3,)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    columns = []
    for shape in shapes:
        dtype = draw(st.sampled_from(DTYPES))
        same = draw(st.booleans())
        layout = draw(st.sampled_from(LAYOUTS))
        layouts = [layout if same else draw(st.sampled_from(LAYOUTS)) for _ in range(num_tasks)]
        column = [at(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for at in layouts]
        missing = draw(st.sets(st.integers(0, num_tasks - 1), max_size=num_tasks))
        columns.append([g.new_empty(0) if t in missing else g for t, g in enumerate(column)])
    metric = [torch.rand(s, generator=generator) for s in shapes] if draw(st.booleans()) else []
    return [list(row) for row in zip(*columns, strict=True)], metric


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_lists_of_any_shape_and_layout(kernel: Combine, problem: tuple[list[list[Tensor]], list[Tensor]]) -> None:
    rows, _ = problem
    weights = weights_of(len(rows))
    combined = kernel(flat(rows), len(rows), weights)
    assert len(combined) == len(rows[0])
    for actual, column in zip(combined, zip(*rows, strict=True), strict=True):
        assert_combination(actual, column, weights)


@needs_compiled
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_both_in_one_pass_are_those_of_two_passes(problem: tuple[list[list[Tensor]], list[Tensor]]) -> None:
    rows, metric = problem
    grads, num_tasks, weights = flat(rows), len(rows), weights_of(len(rows))
    gram, combined = ops.gram_combine(grads, num_tasks, weights, metric)
    assert torch.equal(gram, ops.gram(grads, num_tasks, metric))
    for fused, alone in zip(combined, ops.combine(grads, num_tasks, weights), strict=True):
        assert torch.equal(fused, alone)
        assert fused.stride() == alone.stride()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_tasks", [1, 3, 8])
def test_stacked_blocks(
    kernel: Combine, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], num_tasks: int
) -> None:
    blocks = [layout(randn(num_tasks, 5, 67, dtype=dtype)), randn(num_tasks), randn(num_tasks, 2, 0)]
    weights = weights_of(num_tasks)
    combined = kernel(blocks, num_tasks, weights, True)
    assert combined[2].shape == (2, 0)
    for actual, block in zip(combined[:2], blocks, strict=False):
        assert_combination(actual, block.unbind(0), weights)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8, 17, 40])
def test_many_entries_in_one_pass(dtype: torch.dtype, num_tasks: int) -> None:
    # Long enough for several slots and several ranges of each, with small parameters between large ones.
    rows = [[randn(n, seed=100 * t + n, dtype=dtype) for n in (3, 40_003, 1, 129, 70_001)] for t in range(num_tasks)]
    weights = weights_of(num_tasks)
    gram, combined = ops.gram_combine(flat(rows), num_tasks, weights)
    assert torch.equal(gram, ops.gram(flat(rows), num_tasks))
    for fused, alone, column in zip(
        combined, ops.combine(flat(rows), num_tasks, weights), zip(*rows, strict=True), strict=True
    ):
        assert torch.equal(fused, alone)
        assert_combination(fused, column, weights)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("stacked", [False, True])
def test_keeps_the_layout_that_the_tasks_share(kernel: Combine, stacked: bool) -> None:
    last = [randn(4, 6, 3, 3, seed=t).contiguous(memory_format=torch.channels_last) for t in range(3)]
    turned = [randn(5, 7, seed=t).T for t in range(3)]
    strided = [randn(5, 7, 2, seed=t)[..., 0] for t in range(3)]
    columns = [last, turned, strided]
    if stacked:
        blocks = [torch.stack([g.permute(0, 2, 3, 1) for g in last]).permute(0, 1, 4, 2, 3)]
        grads = [*blocks, torch.stack([g.T for g in turned]).mT, torch.stack(strided).new_empty(3, 5, 7, 2)[..., 0]]
    else:
        grads = [column[t] for t in range(3) for column in columns]
    combined = kernel(grads, 3, weights_of(3), stacked)
    assert [c.stride() for c in combined] == [last[0].stride(), turned[0].stride(), (7, 1)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_layouts_that_differ_give_a_contiguous_result(kernel: Combine) -> None:
    rows = [torch.empty(0), randn(5, 7), randn(7, 5, seed=1).T]
    for grads in (rows, rows[::-1]):
        (combined,) = kernel(grads, 3, weights_of(3))
        assert combined.is_contiguous()
        assert_combination(combined, grads, weights_of(3))


@pytest.mark.parametrize("kernel", KERNELS)
def test_sides_of_length_one_do_not_decide_the_layout(kernel: Combine) -> None:
    x = [randn(6, 1, 5, seed=t).permute(2, 1, 0) for t in range(2)]
    x[1] = x[1].as_strided(x[1].shape, (1, 77, 5))
    (combined,) = kernel(x, 2, weights_of(2))
    assert (combined.stride(0), combined.stride(2)) == (1, 5)
    assert_combination(combined, x, weights_of(2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_parameter_that_no_task_reaches_has_no_combination(kernel: Combine) -> None:
    rows = [[torch.empty(0), randn(3, seed=t)] for t in range(2)]
    missing, present = kernel(flat(rows), 2, weights_of(2))
    assert missing.shape == (0,)
    assert present.shape == (3,)
    assert [c.shape for c in kernel([torch.empty(0), torch.empty(2, 0)] * 2, 2, weights_of(2))] == [(0,), (2, 0)]


# ---- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_nans_are_those_of_ieee_arithmetic(kernel: Combine, dtype: torch.dtype) -> None:
    rows = [randn(1003, seed=t, dtype=dtype) for t in range(4)]
    for t, bad in enumerate([torch.nan, torch.inf, -torch.inf]):
        rows[t][[t, 100 + t, 1000 + t]] = bad
    rows[3][[2, 1001]] = torch.inf
    weights = torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    (combined,) = kernel(rows, 4, weights)
    expected = sum(w * g.double() for w, g in zip(weights, rows, strict=True))
    assert torch.equal(combined.isnan(), expected.isnan())
    assert torch.equal(combined.isinf(), expected.isinf())
    finite = expected.isfinite()
    assert_combination(combined[finite], [g[finite] for g in rows], weights)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_shows_through_a_missing_gradient(kernel: Combine, bad: float) -> None:
    (combined,) = kernel([randn(70), torch.empty(0)], 2, torch.tensor([1.0, bad], dtype=torch.float64))
    assert combined.isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_kept(kernel: Combine, dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    (kept,) = kernel([values], 1, torch.ones(1, dtype=torch.float64))
    assert torch.equal(kept.isnan(), values.isnan())
    assert torch.equal(kept.nan_to_num(nan=7.0), values.nan_to_num(nan=7.0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_16_bits_as_torch_does(kernel: Combine, dtype: torch.dtype) -> None:
    # Halves of every value, and sums of neighbours: ties, subnormal numbers and both ends of the range.
    values = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    for a, b in [(0.5, 0.5), (0.75, 0.25), (1.0, 1.0), (-1.0, 0.25)]:
        (combined,) = kernel([values[1:], values[:-1]], 2, torch.tensor([a, b], dtype=torch.float64))
        exact = a * values[1:].float() + b * values[:-1].float()
        assert torch.equal(combined, exact.to(dtype))


# ---- exactness -----------------------------------------------------------------------------------------------


@needs_compiled
@pytest.mark.parametrize("num_tasks", [3, 20])
def test_bitwise_equal_for_any_number_of_threads(num_tasks: int) -> None:
    rows = [[randn(n, seed=t) for n in (300_000, 17, 99_999)] for t in range(num_tasks)]
    weights = weights_of(num_tasks)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            gram, combined = ops.gram_combine(flat(rows), num_tasks, weights)
            results.append([gram, *combined, *ops.combine(flat(rows), num_tasks, weights)])
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


_EVERY_ISA = """
import torch
from gradstats import ops
from gradstats.ops import reference
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for tasks in (1, 2, 3, 4, 5, 8, 12):
        grads = [torch.randn(n, generator=g).to(dtype) for _ in range(tasks) for n in (1, 1009, 64, 40000)]
        weights = torch.rand(tasks, generator=g, dtype=torch.float64)
        gram, fused = ops.gram_combine(grads, tasks, weights)
        assert torch.equal(gram, ops.gram(grads, tasks))
        alone = ops.combine(grads, tasks, weights)
        for a, b, c in zip(fused, alone, reference.combine(grads, tasks, weights, False)):
            assert torch.equal(a, b)
            step = torch.finfo(dtype).eps
            assert torch.allclose(b.double(), c.double(), rtol=step, atol=4e-6 * min(1, step * 1e7)), (dtype, tasks)
"""


@needs_compiled
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_lesser_instruction_sets(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _EVERY_ISA],
        env={**os.environ, "GRADSTATS_CPU_ISA": isa, "GRADSTATS_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


# ---- the dispatcher and its checks ---------------------------------------------------------------------------


def _operands(stacked: bool) -> list[Tensor]:
    return [randn(3, 4, 5).mT, randn(3, 7)] if stacked else [randn(4, 5, seed=s) for s in range(6)]


@pytest.mark.parametrize("stacked", [False, True])
def test_opcheck(stacked: bool) -> None:
    grads = _operands(stacked)
    metric = [torch.ones_like(g) for g in ([b[0] for b in grads] if stacked else grads[:2])]
    torch.library.opcheck(torch.ops.gradstats.combine.default, (grads, 3, weights_of(3), stacked))
    torch.library.opcheck(torch.ops.gradstats.gram_combine.default, (grads, 3, weights_of(3), metric, stacked))


@pytest.mark.parametrize("stacked", [False, True])
def test_compiles_without_graph_breaks(stacked: bool) -> None:
    def both(grads: list[Tensor], weights: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        gram, fused = ops.gram_combine(grads, 3, weights, [], stacked)
        return gram, [2 * c for c in fused], ops.combine(grads, 3, weights, stacked)

    grads, weights = _operands(stacked), weights_of(3)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(grads, weights)
    plain = both(grads, weights)
    assert torch.equal(compiled[0], plain[0])
    for a, b in zip([*compiled[1], *compiled[2]], [*plain[1], *plain[2]], strict=True):
        assert torch.equal(a, b)


@settings(max_examples=50, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_fake_tensors_have_the_layout_of_real_ones(problem: tuple[list[list[Tensor]], list[Tensor]]) -> None:
    rows, metric = problem
    weights = weights_of(len(rows))
    gram, combined = ops.gram_combine(flat(rows), len(rows), weights, metric)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in flat(rows)]
        fake_metric = [mode.from_tensor(x) for x in metric]
        fake_gram, fake = ops.gram_combine(fakes, len(rows), mode.from_tensor(weights), fake_metric)
    for real, other in zip([gram, *combined], [fake_gram, *fake], strict=True):
        assert (real.shape, real.stride(), real.dtype) == (other.shape, other.stride(), other.dtype)


@needs_compiled
@pytest.mark.parametrize(
    "weights",
    [torch.ones(2, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64), torch.ones(3)],
    ids=["too few", "a matrix", "float32"],
)
def test_the_raw_operators_reject_weights_that_they_could_not_read(weights: Tensor) -> None:
    grads = [torch.ones(4)] * 3
    for call in (
        lambda: torch.ops.gradstats.combine(grads, 3, weights, False),
        lambda: torch.ops.gradstats.gram_combine(grads, 3, weights, [], False),
    ):
        with pytest.raises(RuntimeError, match=r"expected float64 weights of shape \[3\]"):
            call()

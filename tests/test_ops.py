"""The operator ``gradstats::gram`` against a float64 oracle: the reference kernel and the compiled one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradstats
from gradstats import ops
from gradstats.ops import reference

Kernel = Callable[..., Tensor]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
COMPILED = gradstats.backends()["cpu"].available
needs_compiled = pytest.mark.skipif(not COMPILED, reason="gradstats._C is not compiled")


def _reference(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor] = (), stacked: bool = False) -> Tensor:
    return reference.gram(grads, num_tasks, metric, stacked)


KERNELS = [pytest.param(_reference, id="reference"), pytest.param(ops.gram, id="compiled", marks=needs_compiled)]


def oracle(rows: Sequence[Sequence[Tensor]], metric: Sequence[Tensor] = ()) -> np.ndarray:
    """Gramian of ``rows[task][parameter]`` by exact-product float64 sums in numpy; an empty tensor is zeros."""
    total = np.zeros((len(rows), len(rows)))
    for k in range(len(rows[0])):
        size = max(row[k].numel() for row in rows)
        if size == 0:
            continue
        columns = [row[k].double().contiguous().flatten().numpy() if row[k].numel() else np.zeros(size) for row in rows]
        scale = metric[k].double().contiguous().flatten().numpy() if metric else np.ones(size)
        with np.errstate(all="ignore"):
            for i, x in enumerate(columns):
                for j, y in enumerate(columns):
                    total[i, j] += np.sum(scale * x * y)
    return total


def flat(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [g for row in rows for g in row]


def error(actual: Tensor, expected: np.ndarray) -> float:
    """Largest error relative to the product of the norms."""
    norms = np.sqrt(np.diag(expected))
    norms = np.where(norms == 0, 1.0, norms)
    return float(np.abs((actual.numpy() - expected) / norms[:, None] / norms[None, :]).max(initial=0.0))


def tolerance(kernel: Kernel) -> float:
    """Of random gradients: the compiled kernel multiplies the runs of many tasks in float32."""
    return 1e-13 if kernel is _reference else 1e-7


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_compiled_library_is_there_where_it_must_be() -> None:
    if os.environ.get("GRADSTATS_REQUIRE_COMPILED") == "1":
        assert COMPILED, gradstats.backends()["cpu"].detail


# ---- any shapes, layouts, dtypes ---------------------------------------------------------------------------


def _plain(x: Tensor) -> Tensor:
    return x.contiguous()


def _reversed_strides(x: Tensor) -> Tensor:
    backwards = list(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


def _last_strides_swapped(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() >= 2 else x.contiguous()


def _inside_larger(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x
    whole = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0).to(x.dtype)
    whole[..., 1 : x.shape[-1] + 1] = x
    return whole[..., 1 : x.shape[-1] + 1]


def _every_other(x: Tensor) -> Tensor:
    whole = torch.full((*x.shape, 2), 7.0).to(x.dtype)
    whole[..., 0] = x
    return whole[..., 0]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand_as(x) if x.dim() else x


LAYOUTS = [_plain, _reversed_strides, _last_strides_swapped, _inside_larger, _every_other, _expanded]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Tensor]], list[Tensor]]:
    num_tasks = draw(st.integers(1, 11))
    sizes = st.integers(1, 6) | st.sampled_from([7, 64, 130, 300])
    shapes = draw(st.lists(st.lists(sizes, max_size=3).map(tuple), min_size=1, max_size=4))
    shapes = [s for s in shapes if int(np.prod(s)) < 20_000] or [(3,)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> Tensor:
        return layout(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))

    columns = []
    for shape in shapes:
        dtype = draw(st.sampled_from(DTYPES))
        same = draw(st.booleans())
        layout = draw(st.sampled_from(LAYOUTS))
        layouts = [layout if same else draw(st.sampled_from(LAYOUTS)) for _ in range(num_tasks)]
        column = [tensor(shape, dtype, at) for at in layouts]
        missing = draw(st.sets(st.integers(0, num_tasks - 1), max_size=num_tasks))
        columns.append([g.new_empty(0) if t in missing else g for t, g in enumerate(column)])
    metric = []
    if draw(st.booleans()):
        metric = [tensor(s, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))).abs() for s in shapes]
    return [list(row) for row in zip(*columns, strict=True)], metric


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_lists_of_any_shape_and_layout(kernel: Kernel, problem: tuple[list[list[Tensor]], list[Tensor]]) -> None:
    rows, metric = problem
    gram = kernel(flat(rows), len(rows), metric)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    assert error(gram, oracle(rows, metric)) < tolerance(kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    num_tasks=st.integers(1, 11),
    shape=st.lists(st.sampled_from([1, 2, 5, 17, 64]), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    with_metric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_stacked_blocks(
    kernel: Kernel,
    num_tasks: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    with_metric: bool,
    seed: int,
) -> None:
    blocks = [layout(randn(num_tasks, *shape, seed=seed, dtype=dtype)), randn(num_tasks, 9, seed=seed + 1)]
    metric = [randn(*shape, seed=seed + 2).abs(), randn(9, seed=seed + 3).abs()] if with_metric else []
    rows = [[block[t] for block in blocks] for t in range(num_tasks)]
    assert error(kernel(blocks, num_tasks, metric, True), oracle(rows, metric)) < tolerance(kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 9, 16, 31, 33, 64, 65])
def test_many_tasks_and_entries(kernel: Kernel, num_tasks: int) -> None:
    # Long enough for several slots, with small parameters between large ones.
    rows = [[randn(n, seed=100 * t + n) for n in (3, 40_000, 1, 129, 30_001)] for t in range(num_tasks)]
    assert error(kernel(flat(rows), num_tasks), oracle(rows)) < tolerance(kernel)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_hundreds_of_tasks(dtype: torch.dtype) -> None:
    rows = randn(203, 2113, dtype=dtype)
    gram = ops.gram(list(rows), 203)
    assert torch.equal(gram, gram.T)
    assert error(gram, (rows.double() @ rows.double().T).numpy()) < 1e-7


@pytest.mark.parametrize("kernel", KERNELS)
def test_channels_last_and_mixed_memory_formats(kernel: Kernel) -> None:
    x = [randn(8, 16, 3, 3, seed=t) for t in range(3)]
    formats = [torch.channels_last, torch.contiguous_format, torch.channels_last]
    same = [[g.contiguous(memory_format=torch.channels_last)] for g in x]
    mixed = [[g.contiguous(memory_format=f)] for g, f in zip(x, formats, strict=True)]
    assert error(kernel(flat(same), 3), oracle(same)) < 1e-13
    assert error(kernel(flat(mixed), 3), oracle(mixed)) < 1e-13


@pytest.mark.parametrize("kernel", KERNELS)
def test_views_that_overlap(kernel: Kernel) -> None:
    rows = [[randn(22, seed=t).as_strided((9, 6), (2, 1))] for t in range(3)]
    assert error(kernel(flat(rows), 3), oracle(rows)) < 1e-13


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_but_missing_gradients(kernel: Kernel) -> None:
    assert torch.equal(kernel([torch.empty(0)] * 6, 3), torch.zeros(3, 3, dtype=torch.float64))


# ---- numerics contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants(kernel: Kernel, dtype: torch.dtype) -> None:
    n = 1_000_003
    x = torch.full((n,), 0.1).to(dtype)
    value = float(x[0])
    gram = kernel([x, -x, 3 * x], 3)
    assert abs(gram[0, 0].item() / (n * value * value) - 1) < 1e-11
    assert gram[0, 1] == -gram[0, 0]


@needs_compiled
def test_near_parallel_and_near_orthogonal_gradients_of_1e7_entries() -> None:
    n = 10_000_000
    a, b = randn(n, seed=1), randn(n, seed=2)
    rows = [[a], [a + 1e-4 * b], [b - a * (a.double() @ b.double() / (a.double() @ a.double())).float()]]
    gram = ops.gram(flat(rows), 3)
    expected = oracle(rows)
    assert error(gram, expected) < 1e-12
    # What is small beside the norms is still right: 1 - cosine of the parallel pair is 5e-9, known to 1e-4 of it.
    cosine = gram / gram.diagonal().sqrt()[:, None] / gram.diagonal().sqrt()[None]
    true = expected / np.sqrt(np.diag(expected))[:, None] / np.sqrt(np.diag(expected))[None]
    assert 1 - true[0, 1] < 1e-8
    assert abs((1 - cosine[0, 1].item()) / (1 - true[0, 1]) - 1) < 1e-4


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tasks", "n"), [(6, 10_000_000), (12, 1_000_000), (70, 100_000)])
def test_constants_of_many_tasks_and_entries(dtype: torch.dtype, num_tasks: int, n: int) -> None:
    # 1.7 squared loses more than most constants where float32 adds many of them.
    x = torch.full((n,), 1.7).to(dtype)
    expected = n * float(x[0]) ** 2
    gram = ops.gram([x.expand(num_tasks, n)], num_tasks, [], True)
    assert ((gram / expected - 1).abs() <= 3e-7).all()


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tasks", [6, 12, 20])
def test_terms_that_vanish_beside_a_large_one(dtype: torch.dtype, num_tasks: int) -> None:
    """A chunk begins with 1 in one or each lane of the sums; all that comes to it on the way is just rounded away."""
    # Entries of a vector, and those that a lane takes of it: of bfloat16 two. Terms of a lane in a step; steps; lanes.
    for (entries, each), terms, steps, in_each in itertools.product(
        ((4, 1), (8, 1), (16, 1), (32, 2)), (4, 8, 12, 16), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48), (False, True)
    ):
        step = terms * entries // each
        at = torch.arange(steps * step)
        counts = torch.tensor(in_each) | (at % entries < each)
        begins = counts & (at % step < entries) & (at % each == 0)
        x = torch.where(counts & (at < step) | begins, 2.0**-12, 0.0)  # the terms of a step, sums of steps
        x[[each * 2**bit for bit in range(4) if each * 2**bit < entries]] = 2.0**-12  # lanes that are added up
        x[begins & (at < step)] = 1.0
        row = x.repeat(4).to(dtype)  # few enough to be one range
        gram = ops.gram([row.expand(num_tasks, -1)], num_tasks, [], True)
        error = abs(gram[0, -1].item() / float(row.double() @ row.double()) - 1)
        assert error <= 1e-6, (entries, terms, steps, in_each)


@needs_compiled
@pytest.mark.parametrize("num_tasks", [5, 8, 9])
def test_pairs_of_many_constants(num_tasks: int) -> None:
    """Which pair loses most depends on how its terms are grouped, so many are tried."""
    n = 1 << 14
    for seed in range(200):
        values = 0.5 + torch.rand(num_tasks, 1, generator=torch.Generator().manual_seed(seed))
        gram = ops.gram([values.expand(num_tasks, n).contiguous()], num_tasks, [], True)
        assert ((gram / (n * values.double() @ values.double().T) - 1).abs() <= 3e-7).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_at_both_ends_of_its_range(kernel: Kernel) -> None:
    ends = [65504.0, -65504.0, 6e-8, -6e-8, 6.1e-5, 6.09e-5, 1.0, 0.0]
    rows = [[torch.tensor(ends * 999, dtype=torch.float16)], [torch.tensor([65504.0] * 7992, dtype=torch.float16)]]
    gram, expected = kernel(flat(rows), 2), oracle(rows)
    assert expected[1, 1] > 3e13
    assert error(gram, expected) < 1e-13
    small = [[torch.tensor([6e-8] * 100, dtype=torch.float16)]]
    np.testing.assert_allclose(kernel(flat(small), 1).numpy(), oracle(small), rtol=1e-13)


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 32], ids=["scalar", "vector"])
def test_every_16_bit_value_is_read_exactly(dtype: torch.dtype, columns: int) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for part in values.split(1024):
        # The last task averages `columns` copies of each value, exactly: its column of the Gramian is the values.
        average = torch.full((1, columns), 1 / columns, dtype=dtype)
        block = torch.cat([part[:, None].expand(-1, columns), average])
        read = ops.gram([block], 1025, [], True)[:-1, -1]
        assert torch.equal(read.nan_to_num(nan=7.0), part.double().nan_to_num(nan=7.0))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, s) for s in (1e-30, 1e-12, 1e12, 1e30)]
    + [(torch.bfloat16, s) for s in (1e-30, 1e30)]
    + [(torch.float64, s) for s in (1e-140, 1e140)],
)
def test_scales_whose_products_leave_the_input_type(kernel: Kernel, dtype: torch.dtype, scale: float) -> None:
    rows = [[(randn(50_000, seed=t, dtype=torch.float64) * scale).to(dtype)] for t in range(3)]
    expected = oracle(rows)
    assert np.isfinite(expected).all()
    assert (np.diag(expected) > 0).all()
    assert error(kernel(flat(rows), 3), expected) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_tasks_of_very_different_scale(kernel: Kernel) -> None:
    rows = [[randn(9_999, seed=t) * 10.0**e] for t, e in enumerate((-30, -12, 0, 12, 30))]
    assert error(kernel(flat(rows), 5), oracle(rows)) < 1e-12


def _ranges(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Rows of 5000 entries whose products overflow or underflow float32 somewhere, or that are subnormal."""
    plain = [randn(5000, seed=t, dtype=torch.float64) for t in range(6)]
    spread = 10.0 ** torch.linspace(-30, 30, 5000, dtype=torch.float64)
    chunk = torch.ones(5000, dtype=torch.float64)
    chunk[700] = 1e25
    rows = {
        "tiny": [x * 1e-30 for x in plain],
        "huge": [x * 1e30 for x in plain],
        "mixed rows": [x * 10.0**e for x, e in zip(plain, (-30, 30, 0, -18, 18, -25), strict=True)],
        "within rows": [x * spread for x in plain],
        "one huge entry": [plain[0] * chunk, *plain[1:]],
        "zeros": [plain[0] * 0, plain[1] * 1e-30, plain[2] * -0.0, *plain[3:]],
        "subnormal row": [*plain[:5], plain[5] * 1e-39],
        "subnormal entries": [x * torch.where(x > 0, 1e-13, 1e-39) for x in plain],
        "limits": [x.sign() * s for x, s in zip(plain, (1e-15, 1e15, 1e-14, 1e14, 1, 1e-15), strict=True)],
    }
    return {name: [x.to(dtype) for x in xs] for name, xs in rows.items()}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", _ranges(torch.float32))
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_chunks_that_leave_the_range_of_float32(kernel: Kernel, dtype: torch.dtype, name: str, copies: int) -> None:
    rows = [[x] for x in _ranges(dtype)[name] * copies]
    expected = oracle(rows)
    gram = kernel(flat(rows), len(rows))
    assert error(gram, expected) < tolerance(kernel)
    assert (gram[torch.from_numpy(expected) != 0] != 0).all()
    order = [3, 0, 5, 1, 4, 2, *range(6, len(rows))]
    permuted = kernel(flat([rows[t] for t in order]), len(rows))
    assert torch.equal(permuted, gram[order][:, order]) or kernel is _reference


# ---- non-finite entries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 63, 1000, 4098])
@pytest.mark.parametrize("num_tasks", [6, 18])
def test_a_broken_task_shows_in_its_row_and_column_alone(
    kernel: Kernel, dtype: torch.dtype, bad: float, at: int, num_tasks: int
) -> None:
    broken = 2
    rows = [[randn(4099, seed=t, dtype=dtype), randn(5, seed=t)] for t in range(num_tasks)]
    rows[4][0] = torch.empty(0, dtype=dtype)  # no gradient: zeros, and 0 * inf is NaN
    rows[broken][0][at] = bad
    gram, expected = kernel(flat(rows), num_tasks), oracle(rows)
    assert not torch.isfinite(gram[broken]).any()
    assert torch.isnan(gram[broken, 4])
    np.testing.assert_array_equal(np.isnan(gram.numpy()), np.isnan(expected))
    kept = [t for t in range(num_tasks) if t != broken]
    assert error(gram[kept][:, kept], expected[np.ix_(kept, kept)]) < 1e-13


# ---- exactness ---------------------------------------------------------------------------------------------


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8, 13, 17, 70])
def test_permuting_tasks_permutes_the_result_exactly(dtype: torch.dtype, num_tasks: int) -> None:
    rows = [[randn(40_001, seed=t, dtype=dtype), randn(7, 3, seed=t).T, randn(1, seed=t)] for t in range(num_tasks)]
    rows[0][1] = rows[0][1].contiguous()  # one layout that differs
    rows[1][2] = torch.empty(0)
    gram = ops.gram(flat(rows), num_tasks)
    for seed in range(3):
        order = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(seed))
        permuted = ops.gram(flat([rows[t] for t in order.tolist()]), num_tasks)
        assert torch.equal(permuted, gram[order][:, order])


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tasks", [3, 6, 20, 100])
def test_bitwise_equal_for_any_number_of_threads(dtype: torch.dtype, num_tasks: int) -> None:
    scale = 20 if num_tasks == 100 else 1
    rows = [[randn(n // scale, seed=t, dtype=dtype) for n in (300_000, 17, 99_999)] for t in range(num_tasks)]
    before = torch.get_num_threads()
    try:
        grams = []
        for threads in (1, 2, 3, 7, 1):
            torch.set_num_threads(threads)
            grams.append(ops.gram(flat(rows), num_tasks))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(grams[0], gram) for gram in grams)


@needs_compiled
def test_positions_on_the_diagonal_are_never_negative() -> None:
    rows = [[randn(1000, seed=t) * 1e-20] for t in range(5)]
    assert (ops.gram(flat(rows), 5).diagonal() >= 0).all()


_EVERY_ISA = """
import sys, torch
from gradstats import ops
from gradstats.ops import reference
g = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for tasks in (1, 2, 3, 4, 5, 6, 7, 8, 12, 33, 70):
        grads = [torch.randn(n, generator=g).to(dtype) for _ in range(tasks) for n in (1, 1009, 64, 40000)]
        a, b = ops.gram(grads, tasks), reference.gram(grads, tasks, [], False)
        assert torch.equal(a, a.T)
        n = b.diagonal().sqrt()
        bound = 1e-13 if tasks <= 3 or dtype == torch.float64 else 1e-7
        assert ((a - b).abs() / n[:, None] / n[None]).max() < bound, (dtype, tasks)
        flipped = ops.gram([g for t in reversed(range(tasks)) for g in grads[t * 4 : t * 4 + 4]], tasks)
        assert torch.equal(flipped, a.flip(0, 1)), (dtype, tasks)
    if dtype != torch.float16:
        for exponents in ((-30,) * 6, (18,) * 6, (-30, 18, 0, -18, 12, -12)):
            grads = [(torch.randn(5000, generator=g).double() * 10.0**e).to(dtype) for e in exponents]
            a, b = ops.gram(grads, 6), reference.gram(grads, 6, [], False)
            n = b.diagonal().sqrt()
            assert (n > 0).all() and ((a - b).abs() / n[:, None] / n[None]).max() < 1e-7, (dtype, exponents)
    x = torch.full((100_003,), 0.1).to(dtype)
    a = ops.gram([x] * 6, 6) / (x.numel() * float(x[0]) ** 2)
    assert ((a - 1).abs() <= 3e-7).all(), dtype
"""


@needs_compiled
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "best"])
def test_every_instruction_set(isa: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _EVERY_ISA],
        env={**os.environ, "GRADSTATS_CPU_ISA": isa, "GRADSTATS_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


# ---- the dispatcher and its checks -------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("with_metric", [False, True])
def test_opcheck(stacked: bool, with_metric: bool) -> None:
    grads = [randn(3, 4, 5), randn(3, 7)] if stacked else [randn(4, 5, seed=s) for s in range(6)]
    metric = [] if not with_metric else [randn(4, 5).abs(), randn(7).abs() if stacked else randn(4, 5).abs()]
    torch.library.opcheck(torch.ops.gradstats.gram.default, (grads, 3, metric, stacked))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("grads", "num_tasks", "metric", "stacked", "message"),
    [
        ([torch.ones(2)] * 3, 2, [], False, "not a multiple"),
        ([torch.ones(2)] * 2, 0, [], False, "at least one task"),
        ([torch.ones(2), torch.ones(3)], 2, [], False, "differ in shape"),
        ([torch.ones(2, 3), torch.ones(6)], 2, [], False, "differ in shape"),
        ([torch.ones(2, 3), torch.ones(0, 3)], 2, [], False, "differ in shape"),
        ([torch.ones(0, 3), torch.ones(0, 4)], 2, [], False, "differ in shape"),
        ([torch.ones(2), torch.ones(2).double()], 2, [], False, "differ in dtype"),
        ([torch.ones(2).int()] * 2, 2, [], False, "expected float32"),
        ([torch.ones(2)] * 2, 2, [torch.ones(3)], False, "differ in shape"),
        ([torch.ones(2)] * 2, 2, [torch.empty(0)], False, "differ in shape"),
        ([torch.ones(2)] * 2, 2, [torch.ones(2)] * 2, False, "expected a metric of 1"),
        ([torch.ones(3, 2)], 2, [], True, "stacked blocks"),
        ([torch.tensor(1.0)], 1, [], True, "stacked blocks"),
    ],
)
def test_the_raw_operator_rejects_what_it_could_not_read(
    kernel: Kernel, grads: list[Tensor], num_tasks: int, metric: list[Tensor], stacked: bool, message: str
) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        kernel(grads, num_tasks, metric, stacked)


@needs_compiled
def test_a_tensor_whose_memory_is_gone_is_no_gradient_of_zeros() -> None:
    gone = torch.ones(3)
    gone.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage is empty"):
        ops.gram([torch.ones(3), gone], 2)

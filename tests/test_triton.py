"""The Triton kernels: numerics on a GPU or in Triton's interpreter, and the code that they compile to.

Triton interprets all kernels of a process or none. So one test runs this file anew with the interpreter, on tensors on
the CPU, and what can only run there or on a GPU is skipped outside.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradstats.ops import backends, reference

triton = pytest.importorskip("triton", reason="needs triton", exc_type=ImportError)
triton_gram = pytest.importorskip("gradstats.ops.triton_gram")
triton_linear = pytest.importorskip("gradstats.ops.triton_linear")
triton_kernels = triton_gram.triton_kernels

INTERPRETED = triton.knobs.runtime.interpret
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

runs = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU, or runs in test_in_the_interpreter"),
]
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU")]
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="runs with the interpreter, or on the GPU, already")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-10_000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 50, run.stdout


# ---- numerics --------------------------------------------------------------------------------------------------------


def triton_gram_of(
    grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor] = (), stacked: bool = False
) -> Tensor:
    with np.errstate(all="ignore"):  # which the interpreter's numpy would warn of
        gram = triton_gram.gram([g.to(DEVICE) for g in grads], num_tasks, [d.to(DEVICE) for d in metric], stacked)
    assert gram.device.type == DEVICE
    assert gram.dtype == torch.float64
    assert torch.equal(gram.nan_to_num(7.0), gram.T.nan_to_num(7.0))
    return gram.cpu()


def error(gram: Tensor, grads: Sequence[Tensor], metric: Sequence[Tensor] = (), stacked: bool = False) -> float:
    """Largest error relative to the product of the norms."""
    expected = reference.gram(grads, len(gram), metric, stacked)
    norms = expected.diagonal().sqrt()
    norms = torch.where(norms == 0, 1.0, norms)
    return float(((gram - expected).abs() / norms[:, None] / norms[None, :]).max())


def tolerance(dtype: torch.dtype, metric: object = ()) -> float:
    """Of random gradients, relative to the norms."""
    return 1e-13 if dtype == torch.float64 or metric else 3e-7


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


#: Both kernels, each size of tile and more than one tile.
NUM_TASKS = [1, 2, 5, 8, 9, 17, 33, 70]


def problem(num_tasks: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Blocks of odd and even sizes and a metric, in several slots; small ones for the interpreter, which is slow."""
    several_slots = (1023, 133) if ON_GPU else (29, 83) if num_tasks <= 8 else (5, 41)
    shapes = [several_slots, (), (7,), (64,)]
    blocks = [randn(num_tasks, *shape, seed=k, dtype=dtype) for k, shape in enumerate(shapes)]
    return blocks, [randn(*shape, seed=9).abs() for shape in shapes]


class TestNumerics:
    pytestmark = runs

    @pytest.mark.parametrize("num_tasks", NUM_TASKS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_lists_with_missing_gradients(self, num_tasks: int, dtype: torch.dtype) -> None:
        if INTERPRETED and num_tasks > 17 and dtype != torch.float32:
            pytest.skip("takes the interpreter long")
        blocks, _ = problem(num_tasks, dtype)
        grads = [block[t] for t in range(num_tasks) for block in blocks]
        grads[-1] = grads[-1].new_empty(0)
        if num_tasks > 1:
            grads[0] = torch.empty(0, dtype=torch.float64)  # whatever its dtype
        assert error(triton_gram_of(grads, num_tasks), grads) < tolerance(dtype)

    @pytest.mark.parametrize("num_tasks", [3, 10])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("with_metric", [False, True])
    def test_stacked_blocks(self, num_tasks: int, dtype: torch.dtype, with_metric: bool) -> None:
        blocks, metric = problem(num_tasks, dtype)
        metric = metric if with_metric else []
        gram = triton_gram_of(blocks, num_tasks, metric, stacked=True)
        assert error(gram, blocks, metric, stacked=True) < tolerance(dtype, metric)

    @pytest.mark.parametrize("num_tasks", [3, 10])
    def test_any_layout_and_mixed_dtypes(self, num_tasks: int) -> None:
        x = randn(num_tasks, 6, 5, 4)
        formats = [torch.channels_last, torch.contiguous_format]
        image = [randn(2, 4, 3, 5, seed=t) for t in range(num_tasks)]
        columns = [
            [x[t].transpose(0, 1) for t in range(num_tasks)],
            [x[t, ::2] for t in range(num_tasks)],
            [g.contiguous(memory_format=torch.channels_last) for g in image],
            [g.contiguous(memory_format=formats[t % 2]) for t, g in enumerate(image)],
            [randn(1, seed=t).expand(40) for t in range(num_tasks)],
            [randn(41, seed=t)[1:] for t in range(num_tasks)],
            [randn(300, seed=t, dtype=torch.bfloat16) for t in range(num_tasks)],
            [torch.empty(0)] * num_tasks,
        ]
        grads = [column[t] for t in range(num_tasks) for column in columns]
        assert error(triton_gram_of(grads, num_tasks), grads) < tolerance(torch.float32)
        metric = [(column[0] if column[0].numel() else torch.empty(0)).abs() + 0.1 for column in columns]
        assert error(triton_gram_of(grads, num_tasks, metric), grads, metric) < 1e-13
        blocks = [x.transpose(2, 3), x[:, ::2], x[:1].expand(num_tasks, -1, -1, -1)]
        assert error(triton_gram_of(blocks, num_tasks, stacked=True), blocks, stacked=True) < tolerance(torch.float32)

    @pytest.mark.parametrize("num_tasks", [2, 9])
    def test_nothing_but_missing_gradients(self, num_tasks: int) -> None:
        gram = triton_gram_of([torch.empty(0)] * 2 * num_tasks, num_tasks)
        assert torch.equal(gram, torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

    @pytest.mark.parametrize("num_tasks", [2, 9])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_constants(self, num_tasks: int, dtype: torch.dtype) -> None:
        n = 10_000_019 if ON_GPU else 2_003
        block = torch.full((1, n), 0.1).to(dtype).expand(num_tasks, n)
        gram = triton_gram_of([block], num_tasks, stacked=True)
        assert ((gram / (n * float(block[0, 0]) ** 2) - 1).abs() <= 3e-7).all()

    @pytest.mark.parametrize("num_tasks", [6, 9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_products_that_leave_float32(self, num_tasks: int, dtype: torch.dtype) -> None:
        n = 5000 if ON_GPU else 600
        plain = [randn(n, seed=t, dtype=torch.float64) for t in range(num_tasks)]
        exponents = [-30, 30, 0, -18, 18, -25, 0, 15, -15][:num_tasks]
        one_huge = torch.ones(n, dtype=torch.float64)
        one_huge[500] = 1e25
        for rows in (
            [x * 10.0**e for x, e in zip(plain, exponents, strict=True)],
            [x * 10.0 ** torch.linspace(-30, 30, n, dtype=torch.float64) for x in plain],
            [plain[0] * one_huge, 0 * plain[1], 1e-30 * plain[2], *plain[3:]],
            [plain[0] * 0, *(1e-28 * x for x in plain[1:])],
        ):
            grads = [x.to(dtype) for x in rows]
            gram = triton_gram_of(grads, num_tasks)
            assert error(gram, grads) < tolerance(dtype)
            assert torch.equal(gram != 0, reference.gram(grads, num_tasks, [], False) != 0)

    @pytest.mark.parametrize("num_tasks", [6, 9])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_broken_task_shows_in_its_row_and_column_alone(
        self, num_tasks: int, dtype: torch.dtype, bad: float
    ) -> None:
        grads = [randn(n, seed=t, dtype=dtype) for t in range(num_tasks) for n in (600, 5)]
        grads[2 * 4] = torch.empty(0, dtype=dtype)  # no gradient: zeros, and 0 * inf is NaN
        grads[2 * 2][500] = bad
        gram, expected = triton_gram_of(grads, num_tasks), reference.gram(grads, num_tasks, [], False)
        assert not gram[2].isfinite().any()
        assert torch.equal(gram.isnan(), expected.isnan())
        keep = [t for t in range(num_tasks) if t != 2]
        norms = expected.diagonal()[keep].sqrt()
        errors = (gram - expected)[keep][:, keep].abs() / norms[:, None] / norms[None, :]
        assert errors.max() < tolerance(dtype)

    # The register kernel, and tiles on and off the diagonal.
    @pytest.mark.parametrize(("num_tasks", "metric_dtype"), [*((3, dtype) for dtype in DTYPES), (70, torch.float16)])
    def test_a_metric_of_any_dtype(self, num_tasks: int, metric_dtype: torch.dtype) -> None:
        block, metric = randn(num_tasks, 45), randn(45, seed=9).abs().to(metric_dtype)
        gram = triton_gram_of([block], num_tasks, [metric], stacked=True)
        assert error(gram, [block], [metric], stacked=True) < 1e-13

    @pytest.mark.parametrize("num_tasks", [2, 9])
    def test_a_negative_metric_is_nan(self, num_tasks: int) -> None:
        gram = triton_gram_of([torch.ones(num_tasks, 40)], num_tasks, [torch.full((40,), -1.0)], stacked=True)
        assert gram.isnan().all()

    @pytest.mark.parametrize("num_tasks", [5, 18, 70])
    def test_permuting_tasks_permutes_the_result_exactly(self, num_tasks: int) -> None:
        if INTERPRETED and num_tasks > 8:
            pytest.skip("products of matrices by numpy depend on the order of rows")
        block = randn(num_tasks, 2222)
        gram = triton_gram_of([block], num_tasks, stacked=True)
        order = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(1))
        assert torch.equal(triton_gram_of([block[order]], num_tasks, stacked=True), gram[order][:, order])

    def test_small_gradients_do_not_decide_how_large_ones_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launcher, tuned = triton_gram.launcher, []
        monkeypatch.setattr(
            triton_gram, "launcher", lambda *args, tune: tuned.append(tune) or launcher(*args, tune=tune)
        )
        block = randn(9, 640)
        for least in (0, 9 * 640 * 4, 9 * 640 * 8):
            monkeypatch.setattr(triton_gram, "_MIN_TUNED", least)
            assert error(triton_gram_of([block], 9, stacked=True), [block], stacked=True) < 3e-7
        assert tuned == [True, False, True, False, False, False]  # the second each time is for what leaves float32

    def test_a_table_of_kernel_arguments(self) -> None:
        # Addresses take up to 57 bits: what a CUDA graph keeps of them must be exact.
        table = np.array([[2**57 - 1, 0, -1], [3, 2**53 + 1, 7]])
        assert torch.equal(triton_gram._from_arguments(table, torch.device(DEVICE)).cpu(), torch.from_numpy(table))

    @pytest.mark.parametrize(
        ("grads", "num_tasks", "metric", "stacked", "message"),
        [
            ([torch.ones(2)] * 3, 2, [], False, "3 tensors are not a multiple of num_tasks = 2"),
            ([torch.ones(2), torch.ones(3)], 2, [], False, "differ in shape or dtype"),
            ([torch.ones(2, 3), torch.ones(0, 3)], 2, [], False, "differ in shape or dtype"),
            ([torch.ones(2), torch.ones(2).double()], 2, [], False, "differ in shape or dtype"),
            ([torch.ones(2), torch.ones(2)], 2, [torch.ones(3)], False, "a metric of the gradients' shapes"),
            ([torch.ones(2), torch.ones(2)], 2, [torch.ones(2)] * 2, False, "a metric of 1 tensors, got 2"),
            ([torch.ones(3, 2)], 2, [], True, "stacked blocks"),
            ([torch.ones(2, 2, dtype=torch.int32)], 2, [], True, "expected float32"),
            ([], 2, [], True, "at least one task and one tensor"),
        ],
    )
    def test_direct_calls_are_checked(self, grads, num_tasks, metric, stacked, message) -> None:
        with pytest.raises(ValueError, match=message):
            triton_gram_of(grads, num_tasks, metric, stacked)


# ---- weighted sums ---------------------------------------------------------------------------------------------------


def assert_combined(
    grads: Sequence[Tensor], num_tasks: int, stacked: bool = False, weights: Tensor | None = None
) -> list[Tensor]:
    """Combine, and compare with the reference; returns the sums."""
    if weights is None:
        weights = randn(num_tasks, seed=5, dtype=torch.float64)
    with np.errstate(all="ignore"):
        combined = triton_gram.combine([g.to(DEVICE) for g in grads], num_tasks, weights.to(DEVICE), stacked)
    for actual, expected in zip(combined, reference.combine(grads, num_tasks, weights, stacked), strict=True):
        summing = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
        assert actual.stride() == expected.stride()
        rounding = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual.cpu(), expected, rtol=rounding, atol=50 * summing, equal_nan=True)
    return [c.cpu() for c in combined]


class TestCombinations:
    pytestmark = runs

    @pytest.mark.parametrize("num_tasks", [1, 4, 9])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("stacked", [False, True])
    def test_agree_with_the_reference(self, num_tasks: int, dtype: torch.dtype, stacked: bool) -> None:
        blocks, _ = problem(num_tasks, dtype)
        grads = blocks if stacked else [block[t] for t in range(num_tasks) for block in blocks]
        if not stacked and num_tasks > 1:
            grads[-1] = grads[-1].new_empty(0)
            grads[0] = torch.empty(0, dtype=torch.float64)  # whatever its dtype
        assert_combined(grads, num_tasks, stacked)

    def test_keep_the_layout_that_the_tasks_share(self) -> None:
        last = [randn(2, 4, 3, 5, seed=t).contiguous(memory_format=torch.channels_last) for t in range(2)]
        columns = [
            last,
            [last[0], last[1].contiguous()],
            [randn(5, 7, seed=t).T for t in range(2)],
            [randn(5, 7, 2, seed=t)[..., 0] for t in range(2)],
            [randn(1, seed=t).expand(40) for t in range(2)],
            [randn(41, seed=t)[1:] for t in range(2)],
            [randn(6, 1, 5), randn(6, 1, 5, seed=1).as_strided((6, 1, 5), (5, 77, 1))],
            [torch.empty(0)] * 2,
            [randn(300, seed=t, dtype=torch.bfloat16) for t in range(2)],
        ]
        assert_combined([column[t] for t in range(2) for column in columns], 2)
        assert_combined([randn(2, 6, 5, 4).transpose(2, 3), randn(2, 6, 5, 4)[:, ::2]], 2, stacked=True)

    def test_what_is_not_finite_shows_where_it_is(self) -> None:
        grads = [randn(300, dtype=torch.float16), randn(300, seed=1, dtype=torch.float16), torch.empty(0)]
        grads[0][7] = torch.inf
        (combined,) = assert_combined(grads, 3, weights=torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
        assert combined.isnan().nonzero().tolist() == [[7]]
        (combined,) = assert_combined(grads, 3, weights=torch.tensor([1.0, 1.0, torch.nan], dtype=torch.float64))
        assert combined.isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_round_to_nearest(self, dtype: torch.dtype) -> None:
        if INTERPRETED and dtype == torch.bfloat16:
            pytest.skip("the interpreter cuts bits off; TestCode looks at the instruction")
        values = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[values.isfinite()]
        weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
        (combined,) = assert_combined([values[1:], values[:-1]], 2, weights=weights)
        assert torch.equal(combined, (0.5 * values[1:].float() + 0.5 * values[:-1].float()).to(dtype))

    @pytest.mark.parametrize(
        ("grads", "num_tasks", "weights", "message"),
        [
            ([torch.ones(2)] * 3, 2, torch.ones(2).double(), "3 tensors are not a multiple of num_tasks = 2"),
            ([torch.ones(2)] * 2, 2, torch.ones(2), "expected float64 weights"),
            ([torch.ones(2)] * 2, 2, torch.ones(3).double(), "expected float64 weights of shape .2."),
        ],
    )
    def test_direct_calls_are_checked(self, grads, num_tasks, weights, message) -> None:
        with pytest.raises(ValueError, match=message):
            triton_gram.combine([g.to(DEVICE) for g in grads], num_tasks, weights.to(DEVICE), False)


# ---- linear layers ---------------------------------------------------------------------------------------------------


def check_linear(inputs: Tensor, cotangents: Sequence[Tensor], weights: Tensor | None = None) -> Tensor:
    """The Gramian, after it and the weighted sum have been compared with float64."""
    if weights is None:
        weights = randn(len(cotangents), seed=99, dtype=torch.float64)
    on_device = inputs.to(DEVICE), [rows.to(DEVICE) for rows in cotangents]
    with np.errstate(all="ignore"):
        gram, combined = triton_linear.linear_gram_combine(*on_device, weights.to(DEVICE))
        assert torch.equal(gram.nan_to_num(7.0), triton_linear.linear_gram(*on_device).nan_to_num(7.0))
    grads = torch.stack([rows.double().T @ inputs.double() for rows in cotangents])
    assert torch.equal(gram.nan_to_num(7.0), gram.T.nan_to_num(7.0))
    assert not error(gram.cpu(), [grads], stacked=True) > 1e-6  # also if NaN
    sizes = torch.stack([rows.double().abs().T @ inputs.double().abs() for rows in cotangents])
    exact, size = (torch.tensordot(w, g, 1) for w, g in ((weights, grads), (weights.abs(), sizes)))
    assert combined.dtype == cotangents[0].dtype
    bound = 5e-7 * size + torch.finfo(combined.dtype).eps * exact.abs()
    assert not ((combined.cpu().double() - exact).abs() > bound).any()
    return gram.cpu()


def layer(
    tasks: int, rows: int, fan_in: int, fan_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor]]:
    cotangents = [randn(rows, fan_out, seed=t + 1, dtype=dtype) for t in range(tasks)]
    return randn(rows, fan_in, dtype=dtype), cotangents


class TestLinearLayers:
    pytestmark = runs

    #: Within a tile of the weight and across several, as many tasks as a tile is for and fewer.
    @pytest.mark.parametrize("size", [(1, 5, 3, 4), (2, 70, 130, 140), (3, 33, 7, 65), (16, 40, 130, 10)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_against_the_definition(self, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        if INTERPRETED and size[0] == 16 and dtype != torch.float32:
            pytest.skip("takes the interpreter long")
        inputs, cotangents = layer(*size, dtype)
        gram = check_linear(inputs, cotangents)
        grads = torch.stack([rows.double().T @ inputs.double() for rows in cotangents])
        assert error(gram, [grads], stacked=True) < 2e-7

    def test_any_layout(self) -> None:
        inputs, cotangents = layer(3, 40, 20, 18)
        check_linear(inputs.T.contiguous().T, [rows.T.contiguous().T for rows in cotangents])
        check_linear(inputs[:, 1:], [rows[:, 2:] for rows in cotangents])
        check_linear(inputs[:1].expand_as(inputs), [cotangents[0], cotangents[1][:1].expand(40, 18), cotangents[2]])

    def test_what_goes_by_parts(self) -> None:
        assert torch.equal(check_linear(*layer(2, 0, 3, 4)), torch.zeros(2, 2, dtype=torch.float64))
        inputs, cotangents = layer(17, 5, 3, 2)
        check_linear(inputs, cotangents)
        check_linear(inputs, [cotangents[0], cotangents[1].double()])

    @pytest.mark.parametrize("dtype", DTYPES[:3])
    def test_constants_of_many_rows(self, dtype: torch.dtype) -> None:
        rows = 300_000 if ON_GPU else 2_000
        inputs = torch.full((rows, 8), 1 / 3).to(dtype)
        check_linear(inputs, [torch.full((rows, 4), 0.7).to(dtype)])

    def test_products_of_gradients_that_leave_float32(self) -> None:
        inputs, cotangents = layer(3, 20, 9, 5)
        check_linear(inputs * 1e10, [cotangents[0] * 1e15, cotangents[1] * 1e-35, cotangents[2]])

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_broken_task_shows_in_its_row_and_column_alone(self, bad: float) -> None:
        inputs, cotangents = layer(3, 40, 20, 18)
        cotangents[1][7, 3] = bad
        gram = check_linear(inputs, cotangents)
        assert not gram[1].isfinite().any()
        assert gram[[0, 2]][:, [0, 2]].isfinite().all()

    @pytest.mark.parametrize(
        ("inputs", "cotangents", "weights", "message"),
        [
            (torch.ones(3, 2), [], torch.ones(1), "expected inputs .N, k., and cotangents"),
            (torch.ones(3), [torch.ones(3, 2)], torch.ones(1), "expected inputs .N, k., and cotangents"),
            (torch.ones(3, 2), [torch.ones(4, 2)], torch.ones(1), "expected cotangents .N, o. of one shape"),
            (torch.ones(3, 2), [torch.ones(3, 2), torch.ones(3, 1)], torch.ones(2), "of one shape"),
            (torch.ones(3, 2), [torch.ones(3, 2)], torch.ones(1), "expected float64 weights of shape .1."),
        ],
    )
    def test_direct_calls_are_checked(self, inputs, cotangents, weights, message) -> None:
        with pytest.raises(ValueError, match=message):
            triton_linear.linear_gram_combine(inputs, cotangents, weights)


# ---- what a GPU alone can show ---------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("num_tasks", [8, 16, 32, 64, 128])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_configuration_changes_a_bit(
        self, num_tasks: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block = randn(num_tasks, 100_003, dtype=dtype).cuda()
        gram = triton_gram.gram([block], num_tasks, [], True)
        kernel = triton_kernels.tile_kernel
        monkeypatch.setattr(triton_gram, "_MIN_TUNED", 0)
        for config in kernel.configs:
            monkeypatch.setattr(kernel, "early_config_prune", lambda *_, config=config, **__: [config])
            monkeypatch.setattr(kernel, "cache", {})
            assert torch.equal(triton_gram.gram([block], num_tasks, [], True), gram), config

    @pytest.mark.parametrize("num_tasks", [4, 20])
    def test_runs_on_the_callers_stream_without_synchronising(self, num_tasks: int) -> None:
        grads = [randn(50_000, seed=t).cuda() for t in range(num_tasks)]
        expected = triton_gram.gram(grads, num_tasks, [], False)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                gram = triton_gram.gram(grads, num_tasks, [], False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream.synchronize()
        assert torch.equal(gram, expected)

    @pytest.mark.parametrize("num_tasks", [4, 20])
    def test_is_captured_by_a_cuda_graph(self, num_tasks: int) -> None:
        grads = [randn(n, seed=t).cuda() for t in range(num_tasks) for n in (50_000, 77)]
        weights = randn(num_tasks, dtype=torch.float64).cuda()
        triton_gram.gram(grads, num_tasks, [], False)
        triton_gram.combine(grads, num_tasks, weights, False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gram = triton_gram.gram(grads, num_tasks, [], False)
            combined = triton_gram.combine(grads, num_tasks, weights, False)
        for grad in grads:
            grad.copy_(torch.randn_like(grad))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(gram, triton_gram.gram(grads, num_tasks, [], False))
        again = triton_gram.combine(grads, num_tasks, weights, False)
        assert all(torch.equal(a, b) for a, b in zip(combined, again, strict=True))

    @pytest.mark.parametrize("dtype", DTYPES[:3])
    def test_linear_layers_give_the_same_bits_in_any_run_order_and_graph(self, dtype: torch.dtype) -> None:
        inputs, cotangents = layer(8, 500, 300, 200, dtype)
        inputs, cotangents = inputs.cuda(), [rows.cuda() for rows in cotangents]
        gram = triton_linear.linear_gram(inputs, cotangents)
        runs = torch.stack([triton_linear.linear_gram(inputs, cotangents) for _ in range(1000)])
        assert torch.equal(runs, gram.expand_as(runs))
        assert torch.equal(triton_linear.linear_gram(inputs, cotangents[::-1]), gram.flip(0, 1))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = triton_linear.linear_gram(inputs, cotangents)
        inputs.copy_(torch.randn_like(inputs))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(replayed, triton_linear.linear_gram(inputs, cotangents))


# ---- the choice of the backend ---------------------------------------------------------------------------------------


@compiles
def test_registers_without_importing_triton() -> None:
    code = """
import sys, torch
torch.version.cuda = "13.0"
sys.modules["gradstats._C_cuda"] = None
import gradstats
assert gradstats.backends()["triton"].available, gradstats.backends()
for name in ("gram", "combine", "linear_gram", "linear_gram_combine"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gradstats::{name}", "CUDA")
assert "triton" not in sys.modules
"""
    env = {**os.environ, "GRADSTATS_BACKEND": ""}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("forced", "cuda", "compiled", "installed", "detail"),
    [
        ("", "13.0", False, True, "compiled on first use"),
        ("triton", "13.0", True, True, "compiled on first use"),
        ("cpu", "13.0", False, True, "GRADSTATS_BACKEND=cpu"),
        ("", None, False, True, "this torch is built without CUDA"),
        ("", "13.0", True, True, "for linear layers; else CUDA is preferred"),
        ("", "13.0", False, False, "triton is not installed"),
    ],
)
def test_is_chosen_on_gpus_without_the_cuda_library(
    monkeypatch: pytest.MonkeyPatch, forced: str, cuda: str | None, compiled: bool, installed: bool, detail: str
) -> None:
    registered: list[str] = []
    monkeypatch.setenv("GRADSTATS_BACKEND", forced)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(backends, "_load", lambda module: (module == "_C" or compiled, "its file"))
    monkeypatch.setattr(backends, "_triton_library", SimpleNamespace(impl=lambda name, *_: registered.append(name)))
    if not installed:
        monkeypatch.setitem(sys.modules, "triton", None)
    found = backends.load_backends()["triton"]
    assert found.detail == detail
    everything = ["gram", "combine", "linear_gram", "linear_gram_combine"]
    expected = {"compiled on first use": everything, "for linear layers; else CUDA is preferred": everything[2:]}
    assert registered == expected.get(detail, [])
    assert found.available == bool(registered)


# ---- the code --------------------------------------------------------------------------------------------------------


class Compiled:
    """A kernel compiled for an architecture. All pointers are multiples of 16, and ``multiples`` of the integers."""

    def __init__(
        self,
        kernel: Any,
        arch: int,
        signature: dict[str, str],
        constants: dict[str, Any],
        num_warps: int,
        multiples: Sequence[str] = (),
    ) -> None:
        signature = signature | dict.fromkeys(constants, "constexpr")
        arguments = {name: signature[name] for name in kernel.arg_names}
        aligned = {
            (k,): [["tt.divisibility", 16]]
            for k, (name, kind) in enumerate(arguments.items())
            if kind.startswith("*") or name in multiples
        }
        source = triton.compiler.ASTSource(kernel, arguments, constants, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": 3})
        self.ptx: str = compiled.asm["ptx"]
        self.sass: str = compiled.asm["sass"]

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    @property
    def spills(self) -> list[str]:
        """Instructions that use local memory."""
        return re.findall(r"(?:LDL|STL)\S*", self.sass)


def compiled_gram(num_tasks: int, kind: triton_gram.Kind, arch: int, **extra: object) -> Compiled:
    """The kernel of :func:`triton_gram.gram` for a number of tasks and a kind."""
    tiling = triton_gram.Tiling.of(num_tasks)
    chunk = tiling.chunk(kind)
    signature = {"table": "*i64", "partial": "*fp64", "fits": "*i32", "num_segments": "i32", "num_rows": "i32"}
    constants = {"WIDE": kind.wide, **kind.constants(), **extra}
    if kind.wide:
        constants["fits"] = None
    if tiling.tile:
        constants = {"SAME": True, **constants, "TILE": tiling.tile, "CHUNK": chunk}
        return Compiled(triton_kernels.tile_kernel.fn, arch, signature, constants, tiling.tile // 8)
    constants |= {"NUM_ROWS": num_tasks, "LANES": 128, "VECTOR": chunk // 128}
    return Compiled(triton_kernels.register_kernel.fn, arch, signature, constants, 4)


def compiled_combine(dtype: torch.dtype, arch: int, aligned: bool = True) -> Compiled:
    """The kernel of :func:`triton_gram.combine`."""
    signature = {"table": "*i64", "weights": "*fp64", "num_segments": "i32", "num_rows": "i32"}
    constants = {"DTYPE": triton_gram.TRITON_DTYPES[dtype], "ALIGNED": aligned}
    constants |= {"LANES": 128, "VECTOR": kind(dtype, None, aligned).vector}
    return Compiled(triton_kernels.combine_kernel, arch, signature, constants, 4)


def compiled_linear(num_tasks: int, dtype: torch.dtype, arch: int) -> Compiled:
    """The kernel of :func:`triton_linear.linear_gram_combine`."""
    entry = "*" + {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    signature = {"table": "*i64", "inputs": entry, "weights": "*fp64", "combined": entry, "partial": "*fp64"}
    sizes = ["num_rows", "fan_in", "fan_out", "input_stride", "cotangent_stride"]
    signature |= dict.fromkeys(sizes, "i32")
    constants = {"DTYPE": triton_gram.TRITON_DTYPES[dtype], "ALIGNED": True, "AS_FLOAT32": False, "COMBINE": True}
    constants |= triton_linear.tiling(num_tasks, dtype)
    return Compiled(triton_kernels.linear_kernel.fn, arch, signature, constants, 8, sizes[1:])


def kind(dtype: torch.dtype, metric_dtype: torch.dtype | None = None, aligned: bool = True) -> triton_gram.Kind:
    return triton_gram.Kind(dtype, metric_dtype, aligned)


@compiles
class TestCode:
    @pytest.mark.parametrize(
        ("arch", "dtype"), [(80, torch.float32), (100, torch.float32), *((90, dtype) for dtype in DTYPES)]
    )
    def test_few_tasks_stay_in_registers(self, arch: int, dtype: torch.dtype) -> None:
        code = compiled_gram(3, kind(dtype), arch)
        assert code.count(r"ld\.global\S*\.(v4\.b32|v2\.b64)") == 3, "one read of 16 bytes of each row"
        assert ("DFMA" in code.sass) == (dtype == torch.float64), "float32 is multiplied in float32"
        assert not code.spills

    def test_tiles_off_the_diagonal_fit_in_registers(self) -> None:
        assert not compiled_gram(70, kind(torch.float32), 80, SAME=False).spills

    @pytest.mark.parametrize(("dtype", "aligned"), [(torch.float32, True), (torch.bfloat16, False)])
    def test_eight_tasks_fit_in_registers(self, dtype: torch.dtype, aligned: bool) -> None:
        assert not compiled_gram(8, kind(dtype, aligned=aligned), 90).spills

    def test_unaligned_rows_are_not_read_by_16_bytes(self) -> None:
        assert compiled_gram(3, kind(torch.float32, aligned=False), 90).count(r"ld\.global\S*\.v[24]") == 0

    @pytest.mark.parametrize(
        ("arch", "num_tasks", "dtype", "instruction"),
        [
            (80, 16, torch.float32, r"mma\.sync\S*\.m16n8k8\S*\.tf32\.tf32"),
            (80, 64, torch.float32, r"mma\.sync\S*\.m16n8k8\S*\.tf32\.tf32"),
            (90, 32, torch.float32, r"mma\.sync\S*\.m16n8k8\S*\.tf32\.tf32"),
            (90, 64, torch.float32, r"wgmma\S*\.m64n32k8\S*\.tf32\.tf32"),
            (90, 16, torch.float64, r"mma\.sync\S*\.f64\.f64"),
            (100, 64, torch.bfloat16, r"tcgen05\.mma\S*tf32"),
        ],
    )
    def test_many_tasks_go_to_tensor_cores(
        self, arch: int, num_tasks: int, dtype: torch.dtype, instruction: str
    ) -> None:
        code = compiled_gram(num_tasks, kind(dtype), arch)
        assert code.count(instruction)
        assert re.search(r"cp\.async\.cg\S* \[[^]]*\], \[[^]]*\], (0x10|16)", code.ptx), "no copies of 16 bytes"
        assert not code.spills

    @pytest.mark.parametrize(
        ("dtype", "metric_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    )
    def test_a_metric_is_multiplied_in_float64(self, dtype: torch.dtype, metric_dtype: torch.dtype) -> None:
        code = compiled_gram(16, kind(dtype, metric_dtype), 90)
        assert code.count(r"mma\.sync\S*\.f64\.f64")
        assert not code.count("tf32")

    @pytest.mark.parametrize(
        ("arch", "dtype"), [(80, torch.float32), (100, torch.float32), *((90, dtype) for dtype in DTYPES)]
    )
    def test_weighted_sums_move_16_bytes_at_a_time(self, arch: int, dtype: torch.dtype) -> None:
        code = compiled_combine(dtype, arch)
        at_once = triton_kernels.AT_ONCE.value
        assert code.count(r"ld\.global\S*\.(v4\.b32|v2\.b64)") == at_once, "one read of 16 bytes of each row"
        assert code.count(r"st\.global\S*\.(v4\.b32|v2\.b64)")
        assert ("DFMA" in code.sass) == (dtype == torch.float64), "float32 is multiplied in float32"
        assert dtype != torch.bfloat16 or code.count(r"cvt\.rn\S*\.bf16"), "rounded to nearest"
        assert not code.spills

    def test_weighted_sums_of_unaligned_rows(self) -> None:
        assert compiled_combine(torch.float32, 90, aligned=False).count(r"(ld|st)\.global\S*\.v[24]") == 0

    @pytest.mark.parametrize(
        ("arch", "dtype", "instruction"),
        [
            (80, torch.float32, r"mma\.sync\S*\.m16n8k8\S*\.tf32\.tf32"),
            (90, torch.float32, r"wgmma\S*\.m64n128k8\S*\.tf32\.tf32"),
            (90, torch.bfloat16, r"wgmma\S*\.m64n128k16\S*\.bf16\.bf16"),
            (100, torch.bfloat16, r"tcgen05\.mma\S*f16"),
        ],
    )
    def test_linear_layers_go_to_tensor_cores(self, arch: int, dtype: torch.dtype, instruction: str) -> None:
        code = compiled_linear(4, dtype, arch)
        assert code.count(instruction)
        assert re.search(r"cp\.async\.cg\S* \[[^]]*\], \[[^]]*\], (0x10|16)", code.ptx), "no copies of 16 bytes"
        assert "DFMA" in code.sass, "gradients are multiplied in float64"
        assert arch != 90 or not code.spills  # elsewhere a few words wait in local memory

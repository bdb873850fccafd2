"""The operators ``gradstats::linear_gram`` and ``linear_gram_combine``: compiled, and by parts on another backend."""

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

Kernel = Callable[[Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
needs_compiled = pytest.mark.skipif(not gradstats.backends()["cpu"].available, reason="gradstats._C is not compiled")
KERNELS = [
    pytest.param(ops._linear_gram_combine_by_parts, id="by parts"),
    pytest.param(ops.linear_gram_combine, id="compiled", marks=needs_compiled),
]
#: Tasks, rows, fan-in and fan-out: less than a block of sums, and more than a patch in every direction.
SIZES = [(1, 1, 1, 1), (3, 40, 5, 7), (3, 300, 270, 140), (9, 129, 300, 41), (40, 130, 264, 50), (130, 20, 40, 17)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(
    tasks: int, rows: int, fan_in: int, fan_out: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], Tensor]:
    cotangents = [randn(rows, fan_out, seed=1 + t, dtype=dtype) for t in range(tasks)]
    return randn(rows, fan_in, dtype=dtype), cotangents, randn(tasks, seed=999, dtype=torch.float64)


def gradients(inputs: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
    """``[T, o, k]`` in float64, from the definition."""
    return torch.stack([rows.double().T @ inputs.double() for rows in cotangents])


def error(gram: Tensor, inputs: Tensor, cotangents: Sequence[Tensor]) -> float:
    """Largest error relative to the product of the norms."""
    rows = gradients(inputs, cotangents).flatten(1)
    norms = rows.norm(dim=1)
    norms = torch.where(norms == 0, 1, norms)
    return float(((gram - rows @ rows.T).abs() / norms[:, None] / norms).max())


def check(kernel: Kernel, inputs: Tensor, cotangents: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The Gramian, after it and the weighted sum have been compared with float64."""
    gram, combined = kernel(inputs, cotangents, weights)
    assert gram.dtype == torch.float64
    assert torch.equal(gram, gram.T)
    rel = 1e-6 if kernel is ops.linear_gram_combine else 1e-5  # as torch's matrix product, which adds in long chains
    assert error(gram, inputs, cotangents) < rel
    exact = torch.tensordot(weights, gradients(inputs, cotangents), 1)
    size = torch.tensordot(weights.abs(), gradients(inputs.abs(), [rows.abs() for rows in cotangents]), 1)
    assert (combined.dtype, combined.is_contiguous()) == (cotangents[0].dtype, True)
    assert ((combined.double() - exact).abs() <= rel * size + torch.finfo(combined.dtype).eps * exact.abs()).all()
    return gram


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_definition(kernel: Kernel, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs, cotangents, weights = operands(*size, dtype)
    gram = check(kernel, inputs, cotangents, weights)
    assert error(gram, inputs, cotangents) < (1e-13 if dtype == torch.float64 else 2e-7)


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def _strided(x: Tensor) -> Tensor:
    whole = torch.full((len(x), x.shape[1] + 1, 2), 7.0).to(x.dtype)
    whole[:, 1:, 1] = x
    return whole[:, 1:, 1]


def _repeated(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


LAYOUTS = [torch.clone, _transposed, _strided, _repeated]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    rows, fan_in, fan_out = (draw(st.integers(0, 9) | st.sampled_from([17, 33, 130])) for _ in range(3))
    matrices = [(fan_in, 0), *((fan_out, seed) for seed in range(draw(st.integers(1, 6))))]
    inputs, *cotangents = [
        draw(st.sampled_from(LAYOUTS))(randn(rows, width, seed=seed, dtype=draw(st.sampled_from(DTYPES))))
        for width, seed in matrices
    ]
    return inputs, cotangents


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_any_shapes_layouts_and_dtypes(kernel: Kernel, problem: tuple[Tensor, list[Tensor]]) -> None:
    inputs, cotangents = problem
    weights = randn(len(cotangents), seed=999, dtype=torch.float64)
    gram = check(kernel, inputs, cotangents, weights)
    if kernel is ops.linear_gram_combine:
        assert torch.equal(gram, ops.linear_gram(inputs, cotangents))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", SIZES[:3])
def test_fake_tensors_have_the_layout_of_real_ones(kernel: Kernel, size: tuple[int, int, int, int]) -> None:
    inputs, cotangents, weights = operands(*size, torch.bfloat16)
    cotangents = [_transposed(rows) for rows in cotangents]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in cotangents]
        fake = ops.linear_gram_combine(mode.from_tensor(inputs), fakes, mode.from_tensor(weights))
    for real, other in zip(kernel(inputs, cotangents, weights), fake, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (other.shape, other.stride(), other.dtype)


@needs_compiled
@pytest.mark.parametrize("value", [1.0, 0.1, 1 / 3])
@pytest.mark.parametrize("rows", [64, 1000, 20_000])
def test_errors_of_constants_do_not_grow_with_rows(value: float, rows: int) -> None:
    inputs, cotangents = torch.full((rows, 33), value), [torch.full((rows, 5), 0.3 + t) for t in range(6)]
    assert error(ops.linear_gram(inputs, cotangents), inputs, cotangents) <= 1e-6


@needs_compiled
@pytest.mark.parametrize("scale", [1e-18, 1e17])
def test_gradients_whose_products_leave_float32(scale: float) -> None:
    inputs, cotangents, _ = operands(6, 50, 40, 30)
    cotangents = [rows * scale for rows in cotangents]
    assert error(ops.linear_gram(inputs, cotangents), inputs, cotangents) < 2e-7


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tasks", [3, 7])
def test_a_broken_task_shows_in_its_row_and_column_alone(kernel: Kernel, bad: float, tasks: int) -> None:
    inputs, cotangents, weights = operands(tasks, 40, 35, 9)
    before, _ = kernel(inputs, cotangents, weights)
    cotangents[1][17, 3] = bad
    gram, combined = kernel(inputs, cotangents, weights)
    kept = [t for t in range(tasks) if t != 1]
    assert not gram[1].isfinite().any()
    assert error(gram[kept][:, kept], inputs, [cotangents[t] for t in kept]) < 2e-7
    assert not combined[3].isfinite().any()
    assert combined[:3].isfinite().all()
    assert before.isfinite().all()


@needs_compiled
def test_permuting_tasks_permutes_the_result_exactly() -> None:
    inputs, cotangents, _ = operands(21, 150, 70, 30)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    permuted = ops.linear_gram(inputs, [cotangents[t] for t in order.tolist()])
    assert torch.equal(permuted, ops.linear_gram(inputs, cotangents)[order][:, order])


@needs_compiled
@pytest.mark.parametrize("tasks", [3, 20])
def test_bitwise_equal_for_any_number_of_threads(tasks: int) -> None:
    inputs, cotangents, weights = operands(tasks, 200, 600, 300)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.linear_gram_combine(inputs, cotangents, weights))
    finally:
        torch.set_num_threads(before)
    for gram, combined in results:
        assert torch.equal(gram, results[0][0])
        assert torch.equal(combined, results[0][1])


@needs_compiled
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets(isa: str) -> None:
    chosen = "against_the_definition and not parts"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={**os.environ, "GRADSTATS_CPU_ISA": isa, "GRADSTATS_BACKEND": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


def test_parts_cover_the_gradients_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_BLOCK_ENTRIES", 3 * 5 * 2)
    inputs, cotangents, weights = operands(3, 40, 5, 7)
    assert [block.shape for block in reference.weight_gradients(inputs, cotangents)] == [
        (3, 2, 5),
        (3, 2, 5),
        (3, 2, 5),
        (3, 1, 5),
    ]
    check(ops._linear_gram_combine_by_parts, inputs, cotangents, weights)
    assert error(ops._linear_gram_by_parts(inputs, cotangents), inputs, cotangents) < 2e-7


def test_opcheck() -> None:
    inputs, cotangents, weights = operands(3, 6, 5, 4)
    torch.library.opcheck(torch.ops.gradstats.linear_gram.default, (inputs, cotangents))
    torch.library.opcheck(
        torch.ops.gradstats.linear_gram_combine.default, (inputs.T.contiguous().T, cotangents, weights)
    )


@needs_compiled
@pytest.mark.parametrize(
    ("inputs", "cotangents", "weights"),
    [
        (torch.ones(4, 3), [torch.ones(4, 2), torch.ones(4, 3)], 2),
        (torch.ones(4, 3), [torch.ones(5, 2)], 1),
        (torch.ones(4), [torch.ones(4, 2)], 1),
        (torch.ones(4, 3), [torch.ones(4, 2, dtype=torch.int64)], 1),
        (torch.ones(4, 3), [], 0),
        (torch.ones(4, 3), [torch.ones(4, 2)], 2),
    ],
    ids=["outputs differ", "rows differ", "no matrix", "integers", "no task", "weights"],
)
def test_the_raw_operator_rejects_what_it_could_not_read(
    inputs: Tensor, cotangents: list[Tensor], weights: int
) -> None:
    with pytest.raises(RuntimeError, match="gradstats: expected"):
        torch.ops.gradstats.linear_gram_combine(inputs, cotangents, torch.ones(weights, dtype=torch.float64))

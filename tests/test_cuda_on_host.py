"""The CUDA kernels, run on the CPU by ``cuda_on_host.cpp``, against a float64 oracle: the algorithm, not the GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
# As the enum DType of csrc/float_types.h.
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None or not (HERE.parent / "csrc").is_dir():
        pytest.skip("needs g++ and the sources")
    target = tmp_path_factory.mktemp("cuda_on_host") / "library.so"
    command = [compiler, "-std=c++20", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, "-o", str(target), str(HERE / "cuda_on_host.cpp")], check=True)
    return ctypes.CDLL(str(target))


def run(library: ctypes.CDLL, rows: list[list[Tensor | None]], metric: list[Tensor] | None) -> tuple[np.ndarray, int]:
    """Gramian of ``rows[task][parameter]`` (1-d, contiguous, or None) and the number of kernel launches it took."""
    num_tasks, num_params = len(rows), len(rows[0])
    present = [next(row[k] for row in rows if row[k] is not None) for k in range(num_params)]
    pointers = [0 if rows[t][k] is None else rows[t][k].data_ptr() for k in range(num_params) for t in range(num_tasks)]
    gram = np.full((num_tasks, num_tasks), np.nan)
    launches = library.gram_on_host(
        num_tasks,
        num_params,
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * num_params)(*(g.numel() for g in present)),
        (ctypes.c_uint8 * num_params)(*(CODES[g.dtype] for g in present)),
        (ctypes.c_void_p * num_params)(*(d.data_ptr() for d in metric)) if metric else None,
        gram.ctypes.data_as(ctypes.c_void_p),
    )
    return gram, launches


def oracle(rows: list[list[Tensor | None]], metric: list[Tensor] | None) -> np.ndarray:
    total = np.zeros((len(rows), len(rows)))
    for k in range(len(rows[0])):
        size = next(row[k].numel() for row in rows if row[k] is not None)
        block = np.stack([np.zeros(size) if row[k] is None else row[k].double().numpy() for row in rows])
        scale = metric[k].double().numpy() if metric else np.ones(size)
        with np.errstate(all="ignore"):
            total += np.einsum("ip,jp,p->ij", block, block, scale)
    return total


def make(num_tasks: int, sizes: list[int], dtypes: list[torch.dtype], seed: int = 0) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = list(zip(sizes, dtypes, strict=True))
    return [[torch.randn(n, generator=generator).to(dtype) for n, dtype in shapes] for _ in range(num_tasks)]


def worst_error(gram: np.ndarray, expected: np.ndarray) -> float:
    norms = np.sqrt(np.diag(expected))
    return float(np.abs((gram - expected) / norms[:, None] / norms[None]).max())


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 15, 16, 17, 31, 33, 40])
@pytest.mark.parametrize("with_metric", [False, True])
def test_gramian(library: ctypes.CDLL, num_tasks: int, with_metric: bool) -> None:
    sizes = [1, 63, 64, 65, 7, 1500, 2]
    rows = make(num_tasks, sizes, [torch.float32, torch.bfloat16, torch.float16, torch.float64] + [torch.float32] * 3)
    metric = [g.float().abs() for g in make(1, sizes, [torch.float32] * 7, seed=9)[0]] if with_metric else None
    if num_tasks > 2:
        rows[1][5] = rows[0][2] = None
    gram, launches = run(library, rows, metric)
    assert launches == 1
    np.testing.assert_array_equal(gram, gram.T)
    assert worst_error(gram, oracle(rows, metric)) < 1e-14


def test_more_parameters_than_one_launch_holds(library: ctypes.CDLL) -> None:
    rows = make(3, [5] * 100, [torch.float32] * 100)
    gram, launches = run(library, rows, None)
    assert launches == 3
    assert worst_error(gram, oracle(rows, None)) < 1e-14


def test_more_tasks_than_one_launch_holds(library: ctypes.CDLL) -> None:
    rows = make(200, [40, 30], [torch.float32, torch.bfloat16])
    gram, launches = run(library, rows, None)
    assert launches == 6  # two parameters, one a launch, and three pairs of task groups
    np.testing.assert_array_equal(gram, gram.T)
    assert worst_error(gram, oracle(rows, None)) < 1e-14


def test_a_broken_task_shows_in_its_row_and_column_alone(library: ctypes.CDLL) -> None:
    rows = make(5, [130], [torch.float16])
    rows[1][0][77], rows[3][0] = float("inf"), None
    gram, _ = run(library, rows, None)
    np.testing.assert_array_equal(np.isnan(gram), np.isnan(oracle(rows, None)))
    assert not np.isfinite(gram[1]).any()
    assert np.isfinite(np.delete(np.delete(gram, 1, 0), 1, 1)).all()


def test_permuting_tasks_permutes_the_result_exactly(library: ctypes.CDLL) -> None:
    rows = make(20, [2000, 33], [torch.float32, torch.float64])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    gram, _ = run(library, rows, None)
    permuted, _ = run(library, [rows[t] for t in order], None)
    np.testing.assert_array_equal(permuted, gram[np.ix_(order, order)])

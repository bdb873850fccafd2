"""The CUDA kernels and their planning, on the CPU (``cuda_on_host.cpp``): algorithm and rounding, not the GPU."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from gradstats.ops import reference

HERE = Path(__file__).parent
# As the enum DType of csrc/float_types.h.
CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
NARROW = (torch.float32, torch.bfloat16, torch.float16)
# Products added at a time and extra bits: of an A100, and of an H100, H200 and B200.
TENSOR_CORES = {"sm_80": (8, 1), "sm_90": (16, 2)}

Rows = list[list[Tensor | None]]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    compiler = shutil.which("g++")
    if compiler is None or not (HERE.parent / "csrc").is_dir():
        pytest.skip("needs g++ and the sources")
    target = tmp_path_factory.mktemp("cuda_on_host") / f"cuda_on_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]  # torch brings pybind11
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += [option for path in includes for option in ("-isystem", str(path))]
    subprocess.run([*command, "-o", str(target), str(HERE / "cuda_on_host.cpp")], check=True)
    spec = importlib.util.spec_from_file_location("cuda_on_host", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def kernels(compiled: ModuleType) -> Iterator[ModuleType]:
    compiled.set_tensor_core(*TENSOR_CORES["sm_90"])
    return compiled


def parameters(rows: Rows, beside: list[Tensor] | None = None) -> list[tuple[list[int], int, int, int]]:
    """What the module takes, of ``rows[task][parameter]`` (1-d, contiguous, or None) and what is beside them."""
    result = []
    for k in range(len(rows[0])):
        gradients = [row[k] for row in rows]
        present = next(g for g in gradients if g is not None)
        last = [beside[k]] if beside else []
        pointers = [0 if g is None else g.data_ptr() for g in (*gradients, *last)]
        result.append((pointers, present.numel(), CODES[present.dtype], CODES[(*last, present)[0].dtype]))
    return result


def run(kernels: ModuleType, rows: Rows, metric: list[Tensor] | None = None) -> np.ndarray:
    beside = kernels.Beside.metric if metric else kernels.Beside.nothing
    gram = kernels.gram(len(rows), parameters(rows, metric), beside, [])
    return np.array(gram).reshape(len(rows), len(rows))


def oracle(rows: Rows, metric: list[Tensor] | None = None) -> np.ndarray:
    total = np.zeros((len(rows), len(rows)))
    for k in range(len(rows[0])):
        size = next(row[k].numel() for row in rows if row[k] is not None)
        block = np.stack([np.zeros(size) if row[k] is None else row[k].double().numpy() for row in rows])
        scale = metric[k].double().numpy() if metric else np.ones(size)
        with np.errstate(all="ignore"):
            total += np.einsum("ip,jp,p->ij", block, block, scale)
    return total


def make(num_tasks: int, sizes: list[int], dtypes: list[torch.dtype], seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    shapes = list(zip(sizes, dtypes, strict=True))
    return [[torch.randn(n, generator=generator).to(dtype) for n, dtype in shapes] for _ in range(num_tasks)]


def worst_error(gram: np.ndarray, expected: np.ndarray) -> float:
    norms = np.sqrt(np.diag(expected))
    norms[norms == 0] = 1
    return float(np.abs((gram - expected) / norms[:, None] / norms[None]).max())


# ---- planning -------------------------------------------------------------------------------------------------------


def plan(kernels, num_tasks, sizes, dtype=torch.float32, beside="nothing"):
    rows = num_tasks + (beside != "nothing")
    described = [([16] * rows, size, CODES[dtype], CODES[dtype]) for size in sizes]
    return kernels.plan(num_tasks, described, getattr(kernels.Beside, beside))


@pytest.mark.parametrize(
    ("num_tasks", "dtype", "dense", "metric", "kernel"),
    [
        (1, torch.float32, True, None, "registers"),
        (8, torch.float64, True, None, "registers"),
        (8, torch.bfloat16, True, None, "registers"),
        (9, torch.float32, True, None, "fragments"),
        (9, torch.float64, True, None, "wide"),
        (33, torch.float64, True, None, "general"),
        (256, torch.float16, True, None, "fragments"),
        (2999, torch.float32, True, None, "fragments"),
        (3000, torch.float32, True, None, "general"),
        (4, torch.float32, False, None, "general"),
        (8, torch.float32, True, torch.float32, "registers"),
        (8, torch.bfloat16, True, torch.bfloat16, "registers"),
        (8, torch.bfloat16, True, torch.float32, "general"),
        (32, torch.float32, True, torch.float32, "wide"),
        (32, torch.float32, True, torch.float64, "general"),
        (33, torch.float32, True, torch.float32, "general"),
        (4, torch.float32, False, torch.float32, "general"),
    ],
)
def test_choice_of_kernel(kernels, num_tasks, dtype, dense, metric, kernel):
    beside = kernels.Beside.metric if metric else kernels.Beside.nothing
    assert kernels.choose_kernel(CODES[dtype], num_tasks, dense, beside, CODES[metric or dtype]) == kernel


@pytest.mark.parametrize("beside", ["metric", "combination"])
def test_what_is_beside_the_gradients_does_not_change_the_launches(kernels, beside):
    for sizes in ([1000] * 39, [1000] * 40, [1000] * 900):
        assert plan(kernels, 8, sizes, beside=beside) == plan(kernels, 8, sizes)


@pytest.mark.parametrize(
    ("num_tasks", "kernel", "blocks", "threads"),
    [(2, "registers", 1, 128), (16, "fragments", 1, 128), (32, "fragments", 1, 128), (33, "fragments", 1, 96),
     (96, "fragments", 1, 192), (128, "fragments", 2, 160), (256, "fragments", 6, 192)],
)  # fmt: skip
def test_blocks_cover_all_pairs_of_tasks(kernels, num_tasks, kernel, blocks, threads):
    launches, _ = plan(kernels, num_tasks, [1000])
    assert launches == [(kernel, "small", 1, blocks, threads)]


def test_a_long_list_goes_into_few_launches(kernels):
    resnet = [1000] * 62
    assert [launch[:3] for launch in plan(kernels, 8, resnet)[0]] == [("registers", "large", 62)]
    assert [launch[2] for launch in plan(kernels, 8, [1000] * 900)[0]] == [333, 333, 234]
    assert [launch[2] for launch in plan(kernels, 256, [1000] * 30)[0]] == [11, 11, 8]


@pytest.mark.parametrize("num_tasks", [2, 8, 16, 64, 256, 1024])
def test_slots_grow_with_the_work_up_to_a_bound(kernels, num_tasks):
    slots = [plan(kernels, num_tasks, [10**k])[1] for k in range(1, 11)]
    assert slots[0] == 1
    assert slots == sorted(slots)
    assert slots[-1] <= 2112
    assert slots[-1] * num_tasks * (num_tasks + 1) // 2 * 8 < 64 << 20  # bytes of workspace
    assert plan(kernels, num_tasks, [10**5] * 10)[1] == plan(kernels, num_tasks, [10**6])[1]


@pytest.mark.parametrize(
    ("num_tasks", "dtype", "at_a_time"),
    [*((tasks, torch.float32, n) for tasks, n in ((2, 12), (3, 5), (6, 4), (8, 3), (16, 5), (32, 3), (64, 4))),
     (16, torch.float64, 6)],
)  # fmt: skip
def test_large_problems_fill_an_h200_in_whole_rounds(kernels, num_tasks, dtype, at_a_time):
    """Each of its 132 multiprocessors takes as many blocks as the registers in ``make cuda-check`` leave room for."""
    (launch,), slots = plan(kernels, num_tasks, [10**9], dtype)
    blocks = slots * launch[3]
    assert blocks % (132 * at_a_time) == 0
    assert blocks >= 8 * 132


# ---- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 3, 16, 33])
@pytest.mark.parametrize("with_metric", [False, True])
def test_all_dtypes_together(kernels, num_tasks, with_metric):
    sizes = [1, 63, 64, 65, 7, 1500, 2]
    rows = make(num_tasks, sizes, [torch.float32, torch.bfloat16, torch.float16, torch.float64] + [torch.float32] * 3)
    metric = [g.float().abs() for g in make(1, sizes, [torch.float32] * 7, seed=9)[0]] if with_metric else None
    if num_tasks > 2:
        rows[1][5] = rows[0][2] = None
    gram = run(kernels, rows, metric)
    np.testing.assert_array_equal(gram, gram.T)
    assert worst_error(gram, oracle(rows, metric)) < (1e-14 if with_metric else 1e-7)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("num_tasks", [2, 4, 5, 8, 9, 20])
def test_chunks_segments_and_what_does_not_fit_them(kernels, num_tasks, dtype):
    """Whole chunks, the rest of one, vectors that are not full, rows off their boundaries, and missing ones."""
    rows = make(num_tasks, [2 * 2048 + 64, 259, 5, 301], [dtype] * 4)
    for row in rows:
        row[3] = row[3][1:]
    rows[0][1] = rows[1][0] = None
    gram = run(kernels, rows)
    np.testing.assert_array_equal(gram, gram.T)
    assert worst_error(gram, oracle(rows)) < (1e-14 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("num_tasks", [2, 5, 8, 13, 20])
def test_a_metric_beside_the_gradients(kernels, num_tasks, dtype):
    """Rows as above; entries whose products leave float32, and a metric that spans its range and has zeros."""
    rows = make(num_tasks, [2048 + 64, 259, 5, 301], [dtype] * 4)
    metric = make(1, [2048 + 64, 259, 5, 302], [dtype] * 4, seed=9)[0]
    metric = [m.abs() for m in metric[:3]] + [metric[3].abs()[1:]]
    if dtype != torch.float16:
        rows[0][0] *= 1e-20
        metric[0] *= 10 ** torch.linspace(-15, 15, metric[0].numel()).to(dtype)
    metric[0][7::5] = 0
    rows[0][1] = rows[-1][2] = None
    gram = run(kernels, rows, metric)
    np.testing.assert_array_equal(gram, gram.T)
    assert worst_error(gram, oracle(rows, metric)) < 1e-14
    backwards = run(kernels, rows[::-1], metric)
    np.testing.assert_array_equal(backwards, gram[::-1, ::-1])
    metric[2][3] = -1
    assert np.isnan(run(kernels, rows, metric)[:-1, :-1]).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_pairs_of_sides(kernels, dtype):
    rows = make(70, [140], [dtype])
    gram = run(kernels, rows)
    np.testing.assert_array_equal(gram, gram.T)
    assert worst_error(gram, oracle(rows)) < 3e-7


def test_more_parameters_than_one_launch_holds(kernels):
    assert len(plan(kernels, 2, [5] * 700)[0]) == 2
    rows = make(2, [5] * 700, [torch.float32] * 700)
    assert worst_error(run(kernels, rows), oracle(rows)) < 1e-7


@pytest.mark.slow
def test_more_tasks_than_one_launch_holds(kernels):
    rows = make(200, [40, 30], [torch.float64] * 2)
    assert len(plan(kernels, 200, [40, 30], torch.float64)[0]) == 6  # one parameter each, three pairs of task groups
    gram = run(kernels, rows)
    np.testing.assert_array_equal(gram, gram.T)
    assert worst_error(gram, oracle(rows)) < 1e-14


# ---- numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [8, 9])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("core", TENSOR_CORES)
def test_constants_and_random_numbers_stay_within_the_contract(kernels, num_tasks, dtype, core):
    kernels.set_tensor_core(*TENSOR_CORES[core])
    levels = 1 + torch.rand(num_tasks, generator=torch.Generator().manual_seed(3))
    constants: Rows = [[torch.full((4096,), float(level)).to(dtype)] for level in levels]
    assert worst_error(run(kernels, constants), oracle(constants)) < 3e-7
    random = make(num_tasks, [8192], [dtype])
    gram, expected = run(kernels, random), oracle(random)
    assert worst_error(gram, expected) < 1e-7
    assert np.abs(np.diag(gram) / np.diag(expected) - 1).mean() < 1e-7


@pytest.mark.parametrize("num_tasks", [4, 12, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_whose_products_leave_float32(kernels, num_tasks, dtype):
    rows = make(num_tasks, [256], [dtype])
    for task, scale in ((0, 1e-25), (1, 1e30), (2, 0.0)):
        rows[task][0] = (rows[task][0].double() * scale).to(dtype)
    assert worst_error(run(kernels, rows), oracle(rows)) < 3e-7


@pytest.mark.parametrize("num_tasks", [5, 11])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_broken_task_shows_in_its_row_and_column_alone(kernels, num_tasks, dtype, bad):
    rows = make(num_tasks, [144], [dtype])
    rows[1][0][77], rows[3][0] = bad, None
    gram = run(kernels, rows)
    assert not np.isfinite(gram[1]).any()
    assert np.isfinite(np.delete(np.delete(gram, 1, 0), 1, 1)).all()


@pytest.mark.parametrize(("num_tasks", "sizes"), [(7, [3000, 33]), (20, [1000, 33]), (40, [130, 9])])
@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_permuting_tasks_permutes_the_result_exactly(kernels, num_tasks, sizes, scale):
    rows = make(num_tasks, sizes, [torch.float32, torch.float64])
    rows[0][0] = rows[0][0] * scale
    order = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(1)).tolist()
    permuted = run(kernels, [rows[t] for t in order])
    np.testing.assert_array_equal(permuted, run(kernels, rows)[np.ix_(order, order)])


# ---- weighted sums --------------------------------------------------------------------------------------------------


def combine(kernels: ModuleType, rows: Rows, weights: Tensor) -> tuple[list[Tensor], int]:
    """The weighted sums and the number of kernel launches that they took."""
    combined = [torch.full_like(g, torch.nan) for g in rows[0] if g is not None]
    return combined, kernels.combine(len(rows), parameters(rows, combined), weights.tolist())


def assert_combined(combined: list[Tensor], rows: Rows, weights: Tensor) -> None:
    grads = [torch.empty(0) if g is None else g for row in rows for g in row]
    for actual, expected in zip(combined, reference.combine(grads, len(rows), weights, False), strict=True):
        sums = torch.promote_types(actual.dtype, torch.float32)
        rounding, summing = torch.finfo(actual.dtype).eps, torch.finfo(sums).eps
        torch.testing.assert_close(actual, expected, rtol=rounding, atol=50 * summing)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 5, 8, 33])
def test_combinations(kernels, num_tasks):
    sizes = [1, 63, 4096, 65, 7, 3000, 4100, 2]
    rows = make(num_tasks, sizes, [torch.float32, torch.bfloat16, torch.float16, torch.float64] * 2)
    rows[0][6] = torch.cat([rows[0][6][:1], rows[0][6]])[1:]  # not at a 16-byte boundary
    if num_tasks > 2:
        rows[1][5] = rows[2][2] = None
    weights = torch.randn(num_tasks, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    combined, launches = combine(kernels, rows, weights)
    assert launches == 4  # one a dtype
    assert_combined(combined, rows, weights)


@pytest.mark.parametrize(("num_tasks", "num_params", "launches"), [(3, 100, 1), (400, 8, 2), (2999, 2, 2)])
def test_combinations_of_more_than_one_launch_holds(kernels, num_tasks, num_params, launches):
    rows = make(num_tasks, [5] * num_params, [torch.float32] * num_params)
    weights = torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64)
    combined, taken = combine(kernels, rows, weights)
    assert taken == launches
    assert_combined(combined, rows, weights)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("num_tasks", [1, 4, 5, 8, 9, 20])
def test_one_pass_gives_the_bits_of_two(kernels, num_tasks, dtype):
    rows = make(num_tasks, [2 * 2048 + 64, 259, 5, 301], [dtype] * 4)
    for row in rows:
        row[3] = row[3][1:]
    if dtype != torch.float16:
        rows[0][0] *= 1e-25  # whose products leave float32
    if num_tasks > 1:
        rows[-1][1] = rows[1][0] = None
    weights = torch.randn(num_tasks, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone, _ = combine(kernels, rows, weights)
    fused = [torch.full_like(a, torch.nan) for a in alone]
    gram = kernels.gram(num_tasks, parameters(rows, fused), kernels.Beside.combination, weights.tolist())
    np.testing.assert_array_equal(np.array(gram).reshape(num_tasks, num_tasks), run(kernels, rows))
    assert all(torch.equal(a, b) for a, b in zip(fused, alone, strict=True))


def test_a_weight_of_zero_keeps_nothing_out(kernels):
    rows = make(3, [100], [torch.float16])
    rows[0][0][7], rows[2][0] = float("inf"), None
    combined, _ = combine(kernels, rows, torch.tensor([0.0, 1.0, 1.0]))
    assert combined[0].isnan().nonzero().tolist() == [[7]]
    combined, _ = combine(kernels, rows, torch.tensor([1.0, 1.0, torch.nan]))
    assert combined[0].isnan().all()

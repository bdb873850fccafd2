"""The kernels on a GPU, against the reference on the CPU: ``make gpu`` runs this file where there is one.

It tests the CUDA kernels, or those of another backend that ``GRADSTATS_BACKEND`` names.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_ops import problems

import gradstats
from gradstats import ops
from gradstats.ops import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TASKS = (2, 7, 13, 30, 70)  # for each kernel
BACKEND = os.environ.get("GRADSTATS_BACKEND") or "cuda"
TOLERANCE = 1e-7 if BACKEND == "cuda" else 3e-7


@pytest.fixture(autouse=True)
def compiled():
    """A GPU and a CUDA torch do not make a CUDA toolkit: only `make gpu` and CI insist on the kernels."""
    backend = gradstats.backends()[BACKEND]
    if not backend.available and os.environ.get("GRADSTATS_REQUIRE_COMPILED") != "1":
        pytest.skip(f"no {BACKEND} kernels: {backend.detail}")
    assert backend.available, backend


def problem(num_tasks: int, dtype: torch.dtype, *, stacked: bool, missing: bool, seed: int = 0):
    """Operands on the CPU, with odd sizes, one transposed parameter and one gradient missing."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1023, 33), (), (7,), (257, 64)]
    blocks = [torch.randn((num_tasks, *shape), generator=generator).to(dtype) for shape in shapes]
    blocks[3] = blocks[3].transpose(1, 2).contiguous().transpose(1, 2)
    metric = [torch.rand(shape, generator=generator) for shape in shapes]
    if stacked:
        return blocks, metric
    grads = [block[t] for t in range(num_tasks) for block in blocks]
    if missing:
        grads[0] = grads[0].new_empty(0)
    return grads, metric


def in_place(tensor: torch.Tensor) -> torch.Tensor:
    """The same on the GPU, which lies there as it does here."""
    storage = tensor.untyped_storage().to(device="cuda")
    empty = torch.empty(0, dtype=tensor.dtype, device="cuda")
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def assert_same(gram: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    norms = expected.diagonal().sqrt()
    assert ((gram.cpu() - expected).abs() <= tolerance * norms[:, None] * norms[None, :]).all()
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6, 8, 9, 16, 32, 33, 70, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["stacked", "listed", "missing"])
@pytest.mark.parametrize("weighed", ["", "metric in float32", "metric in the same dtype"])
def test_agrees_with_the_reference(num_tasks, dtype, form, weighed):
    grads, metric = problem(num_tasks, dtype, stacked=form == "stacked", missing=form == "missing")
    if "same" in weighed:
        metric = [m.to(dtype) for m in metric]
    operands = (num_tasks, metric if weighed else [], form == "stacked")
    expected = reference.gram(grads, *operands)
    on_gpu = [m.cuda() for m in operands[1]]
    gram = ops.gram([g.cuda() for g in grads], num_tasks, on_gpu, operands[2])
    assert gram.is_cuda
    assert_same(gram, expected)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_lists_of_any_shape_and_layout(problem):
    rows, metric = problem
    grads = [g for row in rows for g in row]
    gram = ops.gram([in_place(g) for g in grads], len(rows), [in_place(m) for m in metric])
    expected = reference.gram(grads, len(rows), metric, False)
    norms = torch.where(expected.diagonal() == 0, 1.0, expected.diagonal().sqrt())
    assert ((gram.cpu() - expected).abs() <= 3e-7 * norms[:, None] * norms[None, :]).all()  # of few entries
    weights = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    fused = ops.gram_combine([in_place(g) for g in grads], len(rows), weights.cuda(), [])[1]
    for actual, wanted in zip(fused, reference.combine(grads, len(rows), weights, False), strict=True):
        assert actual.stride() == wanted.stride()
        torch.testing.assert_close(actual.cpu(), wanted, rtol=torch.finfo(wanted.dtype).eps, atol=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_opcheck(stacked):
    grads = [torch.randn(3, 4, 5, device="cuda"), torch.randn(3, 7, device="cuda")]
    if not stacked:
        grads = [grads[0][t] for t in range(3)]
    metric = [torch.rand(4, 5, device="cuda"), torch.rand(7, device="cuda")][: len(grads) if stacked else 1]
    weights = torch.rand(3, dtype=torch.float64, device="cuda")
    torch.library.opcheck(torch.ops.gradstats.gram.default, (grads, 3, metric, stacked))
    torch.library.opcheck(torch.ops.gradstats.combine.default, (grads, 3, weights, stacked))
    torch.library.opcheck(torch.ops.gradstats.gram_combine.default, (grads, 3, weights, metric, stacked))


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 13, 32, 33])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["stacked", "listed", "missing"])
def test_combinations_agree_with_the_reference(num_tasks, dtype, form):
    grads, metric = problem(num_tasks, dtype, stacked=form == "stacked", missing=form == "missing")
    stacked = form == "stacked"
    weights = torch.randn(num_tasks, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    on_gpu = [g.cuda() for g in grads]
    combined = ops.combine(on_gpu, num_tasks, weights.cuda(), stacked)
    for actual, expected in zip(combined, reference.combine(grads, num_tasks, weights, stacked), strict=True):
        assert actual.stride() == expected.stride()
        summing = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(actual.cpu(), expected, rtol=torch.finfo(dtype).eps, atol=50 * summing)
    for beside in ([], [m.cuda() for m in metric]):
        gram, fused = ops.gram_combine(on_gpu, num_tasks, weights.cuda(), beside, stacked)
        assert torch.equal(gram, ops.gram(on_gpu, num_tasks, beside, stacked))
        assert all(torch.equal(a, b) for a, b in zip(fused, combined, strict=True))


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_problems(num_tasks, dtype):
    """All kernels, in little time: what `make gpu` runs under compute-sanitizer."""
    shapes = [(2, 2048), (301,), (5,), (33, 64)]
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.randn((num_tasks, *shape), generator=generator).to(dtype) for shape in shapes]
    blocks[1] = blocks[1][:, 1:]  # off 16-byte boundaries
    on_gpu = [b.cuda() for b in blocks]
    assert_same(ops.gram(on_gpu, num_tasks, stacked=True), reference.gram(blocks, num_tasks, [], True))
    metric = [torch.rand(shape, generator=generator).to(dtype) for shape in shapes[:1]]
    gram = ops.gram(on_gpu[:1], num_tasks, [m.cuda() for m in metric], stacked=True)
    assert_same(gram, reference.gram(blocks[:1], num_tasks, metric, True))
    weights = torch.rand(num_tasks, dtype=torch.float64, device="cuda")
    gram, fused = ops.gram_combine(on_gpu, num_tasks, weights, stacked=True)
    assert torch.equal(gram, ops.gram(on_gpu, num_tasks, stacked=True))
    alone = ops.combine(on_gpu, num_tasks, weights, stacked=True)
    assert all(torch.equal(a, b) for a, b in zip(fused, alone, strict=True))


@pytest.mark.parametrize("num_tasks", [2, 7, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_linear_layers(num_tasks, dtype):
    if not gradstats.backends()["triton"].available:
        pytest.skip("no Triton kernel")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 133, generator=generator).to(dtype)
    cotangents = torch.randn(num_tasks, 200, 77, generator=generator).to(dtype)
    weights = torch.rand(num_tasks, generator=generator, dtype=torch.float64)
    gram, combined = ops.linear_gram_combine(inputs.cuda(), [c.cuda() for c in cotangents], weights.cuda())
    grads = cotangents.double().mT @ inputs.double()
    assert_same(gram, reference.gram([grads], num_tasks, [], True), 1e-6)
    exact = torch.tensordot(weights, grads, 1)
    torch.testing.assert_close(combined.cpu().double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_permuting_tasks_permutes_the_result_exactly(num_tasks, dtype):
    grads, _ = problem(num_tasks, dtype, stacked=True, missing=False)
    blocks = [g.cuda() for g in grads]
    gram = gradstats.pairwise(blocks, stacked=True).gram
    order = torch.randperm(num_tasks, generator=torch.Generator().manual_seed(1)).cuda()
    permuted = gradstats.pairwise([b[order] for b in blocks], stacked=True).gram
    assert torch.equal(permuted, gram[order][:, order])


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("with_metric", [False, True])
def test_a_thousand_runs_give_the_same_bits(num_tasks, with_metric):
    sizes = (200_003, 77, 1 << 16)
    blocks = [torch.randn(num_tasks, size, device="cuda") for size in sizes]
    metric = [torch.rand(size, device="cuda") for size in sizes] if with_metric else []
    gram = ops.gram(blocks, num_tasks, metric, stacked=True)
    runs = torch.stack([ops.gram(blocks, num_tasks, metric, stacked=True) for _ in range(1000)])
    assert torch.equal(runs, gram.expand_as(runs))


@pytest.mark.parametrize(("num_tasks", "num_params"), [(2, 900), (8, 400), (40, 100)])
def test_reads_long_lists_in_place(num_tasks, num_params):
    sizes = [1 + 37 * k % 3000 for k in range(num_params)]
    grads = [torch.randn(size, device="cuda") for _ in range(num_tasks) for size in sizes]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gram = ops.gram(grads, num_tasks)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20
    assert_same(gram, reference.gram([g.cpu() for g in grads], num_tasks, [], False))


@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_constants_stay_within_the_contract(num_tasks, dtype):
    """The worst case for sums that round: all errors point the same way."""
    levels = 1 + torch.rand(num_tasks, 1, generator=torch.Generator().manual_seed(3))
    block = levels.expand(-1, 1 << 20).to(dtype).cuda()
    gram = ops.gram([block], num_tasks, stacked=True)
    level = block[:, 0].double()
    assert ((gram / level / level[:, None] / (1 << 20) - 1).abs() <= 3e-7).all()


@pytest.mark.parametrize("num_tasks", [4, 9, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_whose_products_leave_float32(num_tasks, dtype):
    block = torch.randn(num_tasks, 5000, generator=torch.Generator().manual_seed(4)).double()
    block[0] *= 1e-25
    block[1] *= 1e30
    block[2] = 0
    block = block.to(dtype)
    gram, expected = (
        ops.gram([block.cuda()], num_tasks, stacked=True).cpu(),
        reference.gram([block], num_tasks, [], True),
    )
    norms = expected.diagonal().sqrt()
    assert ((gram - expected).abs() <= TOLERANCE * norms[:, None] * norms[None, :]).all()


@pytest.mark.parametrize("num_tasks", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_many_entries_are_not_biased(num_tasks, dtype):
    block = torch.randn(num_tasks, 1 << 24, device="cuda").to(dtype)
    squares = sum(part.double().square().sum(1) for part in block.split(1 << 20, dim=1))
    bias = (ops.gram([block], num_tasks, stacked=True).diagonal() / squares - 1).mean()
    assert bias.abs() <= TOLERANCE


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_task_shows_in_its_row_and_column_alone(bad):
    grads, _ = problem(5, torch.float32, stacked=False, missing=True)
    grads = [g.cuda() for g in grads]
    grads[2 * 4][3, 3] = bad
    gram = ops.gram(grads, 5)
    keep = [0, 1, 3, 4]
    assert not gram[2].isfinite().any()
    assert gram[keep][:, keep].isfinite().all()


def test_runs_on_the_callers_stream_without_synchronising():
    blocks = [torch.randn(4, 1 << 20, device="cuda")]
    expected = gradstats.pairwise(blocks, stacked=True).gram
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            gram = ops.gram(blocks, 4, stacked=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(gram, expected)


@pytest.mark.parametrize("num_tasks", TASKS)
def test_is_captured_by_a_cuda_graph(num_tasks):
    block = torch.randn(num_tasks, 100_003, device="cuda")
    weights = torch.rand(num_tasks, dtype=torch.float64, device="cuda")
    ops.gram_combine([block], num_tasks, weights, stacked=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram, (combined,) = ops.gram_combine([block], num_tasks, weights, stacked=True)
    block.copy_(torch.randn_like(block))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(gram, ops.gram([block], num_tasks, stacked=True))
    assert torch.equal(combined, ops.combine([block], num_tasks, weights, stacked=True)[0])


@pytest.mark.parametrize("num_tasks", TASKS)
def test_plans_give_what_pairwise_gives(num_tasks):
    grads = [[torch.randn(300, 7, device="cuda"), torch.randn(5, 6, device="cuda").T] for _ in range(num_tasks)]
    grads[0][1] = grads[0][1].contiguous()  # so that the others must be copied at each call
    plan = gradstats.PairwisePlan(grads)
    for change in (grads[0][0].neg_, grads[1][1].zero_, lambda: setattr(grads[1][0], "data", grads[0][0].clone())):
        change()
        assert torch.equal(plan().gram, gradstats.pairwise(grads).gram)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram = plan().gram
    grads[0][0].fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(gram, gradstats.pairwise(grads).gram)


def test_results_never_require_grad():
    rows, weights = list(torch.ones(2, 3, 4, device="cuda", requires_grad=True)), torch.ones(2, device="cuda").double()
    gram, combined = ops.gram_combine(rows, 2, weights)
    linear, linear_combined = ops.linear_gram_combine(rows[0], rows, weights)
    results = [gram, *combined, ops.gram(rows, 2), *ops.combine(rows, 2, weights), linear, linear_combined]
    assert not any(result.requires_grad for result in results)


def test_collects_during_backward():
    torch.manual_seed(0)
    trunk = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32)).cuda()
    heads = [torch.nn.Linear(32, 1).cuda() for _ in range(3)]
    features = trunk(torch.randn(16, 64, device="cuda"))
    losses = [head(features).square().mean() for head in heads]
    stats = gradstats.from_losses(losses, trunk, method="batched", retain_graph=True)
    grads = [torch.autograd.grad(loss, trunk.parameters(), retain_graph=True) for loss in losses]
    expected = reference.gram([g.cpu() for task in grads for g in task], 3, [], False)
    norms = expected.diagonal().sqrt()
    assert ((stats.gram.cpu() - expected).abs() <= 1e-5 * norms[:, None] * norms[None, :]).all()

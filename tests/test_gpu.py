"""The CUDA kernels on a GPU, against the reference on the CPU: ``make gpu`` runs this file where there is one."""

import os

import pytest
import torch

import gradstats
from gradstats import ops
from gradstats.ops import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def compiled():
    """A GPU and a CUDA torch do not make a CUDA toolkit: only `make gpu` and CI insist on the kernels."""
    backend = gradstats.backends()["cuda"]
    if not backend.available and os.environ.get("GRADSTATS_REQUIRE_COMPILED") != "1":
        pytest.skip(f"no CUDA kernels: {backend.detail}")
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


def assert_same(gram: torch.Tensor, expected: torch.Tensor) -> None:
    norms = expected.diagonal().sqrt()
    assert ((gram.cpu() - expected).abs() <= 1e-7 * norms[:, None] * norms[None, :]).all()
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 13, 16, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["stacked", "listed", "missing"])
@pytest.mark.parametrize("with_metric", [False, True])
def test_agrees_with_the_reference(num_tasks, dtype, form, with_metric):
    grads, metric = problem(num_tasks, dtype, stacked=form == "stacked", missing=form == "missing")
    operands = (num_tasks, metric if with_metric else [], form == "stacked")
    expected = reference.gram(grads, *operands)
    on_gpu = [m.cuda() for m in operands[1]]
    gram = ops.gram([g.cuda() for g in grads], num_tasks, on_gpu, operands[2])
    assert gram.is_cuda
    assert_same(gram, expected)


@pytest.mark.parametrize("num_tasks", [1, 2, 8, 33])
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
    gram, fused = ops.gram_combine(on_gpu, num_tasks, weights.cuda(), [m.cuda() for m in metric], stacked)
    assert torch.equal(gram, ops.gram(on_gpu, num_tasks, [m.cuda() for m in metric], stacked))
    assert all(torch.equal(a, b) for a, b in zip(fused, combined, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_reproducible_to_the_bit_and_permutes(dtype):
    grads, _ = problem(8, dtype, stacked=True, missing=False)
    blocks = [g.cuda() for g in grads]
    gram = gradstats.pairwise(blocks, stacked=True).gram
    assert torch.equal(gradstats.pairwise(blocks, stacked=True).gram, gram)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1)).cuda()
    permuted = gradstats.pairwise([b[order] for b in blocks], stacked=True).gram
    assert torch.equal(permuted, gram[order][:, order])


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


def test_is_captured_by_a_cuda_graph():
    block = torch.randn(4, 100_003, device="cuda")
    weights = torch.rand(4, dtype=torch.float64, device="cuda")
    ops.gram_combine([block], 4, weights, stacked=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram, (combined,) = ops.gram_combine([block], 4, weights, stacked=True)
    block.copy_(torch.randn_like(block))
    weights.copy_(torch.rand_like(weights))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(gram, ops.gram([block], 4, stacked=True))
    assert torch.equal(combined, ops.combine([block], 4, weights, stacked=True)[0])


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

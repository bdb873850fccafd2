"""Data-parallel and sharded models on 1, 2 and 4 processes on gloo, started once for all tests.

Four processes start; the first two, and then the first alone, meet again in smaller groups.
"""

import contextlib
import logging
import math
import runpy
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradstats
import gradstats.scalarizer

WORLDS = (4, 2, 1)
# Into how many parts the batch is cut, and into how many each layer.
MESHES = [(4, 1), (2, 2), (1, 4), (2, 1), (1, 2), (1, 1)]
EXACT = ("auto", "batched", "blockwise", "sequential")
STATEFUL = ("famo", "gradnorm", "rlw")
TASKS = ("a", "b", "c")
EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT = 240  # seconds for all that the processes do
STEPS = 30


class Model(nn.Module):
    """An encoder without BatchNorm, so that the parts of a batch compute what the whole does, and a head a task."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(8, 1) for name in TASKS})

    def forward(self, x: Tensor, tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        features = self.encoder(x)
        return {name: self.heads[name](features) for name in tasks}


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 1, generator=generator)


def all_batches(step: int, world: int) -> tuple[Tensor, Tensor]:
    x, y = zip(*(batch(rank, step) for rank in range(world)), strict=True)
    return torch.cat(x), torch.cat(y)


def losses_of(outputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {name: 10.0 ** TASKS.index(name) * (out - y).square().mean() for name, out in outputs.items()}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def grads_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]


# ---- what each process does; results go to the tests through files ------------------------------------------------


@contextlib.contextmanager
def logged_messages() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("gradstats")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def autoscale(rank: int) -> dict:
    """A whole training in both phases, with different data on each rank."""
    model = DistributedDataParallel(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scalarizer = gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=STEPS, explore=0.7, samples_per_window=4)
    recorded = []
    for step in range(STEPS):
        before = scalarizer.stats
        x, y = batch(rank, step)
        scalarizer(losses_of(model(x), y)).backward()
        if scalarizer.stats is not before:
            recorded.append(step)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "recorded": recorded,
        "weights": scalarizer.weights,
        "windows": scalarizer.weighting.window_weights,
        "parameters": [p.detach() for p in model.parameters()],
    }


def first_step(rank: int, method: str) -> dict:
    """Statistics and gradients of one step, and the gradients that DDP alone gives."""
    x, y = batch(rank, 0)
    plain = DistributedDataParallel(build())
    sum(losses_of(plain(x), y).values()).backward()
    model = DistributedDataParallel(build())
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, method=method)
    scalarizer(losses_of(model(x), y)).backward()
    fused = DistributedDataParallel(build())
    scalarizer_of_fused = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, method=method)
    scalarizer_of_fused.backward(losses_of(fused(x), y))
    return {
        "gram": scalarizer.stats.gram,
        "method": scalarizer.stats.method,
        "gram_of_fused": scalarizer_of_fused.stats.gram,
        "grads": grads_of(model),
        "grads_of_fused": grads_of(fused),
        "grads_of_ddp": grads_of(plain),
    }


def sketched(rank: int) -> dict:
    """Statistics of one step, estimated."""
    x, y = batch(rank, 0)
    model = DistributedDataParallel(build())
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, method="sketch", num_directions=512)
    scalarizer(losses_of(model(x), y)).backward()
    return {"gram": scalarizer.stats.gram, "standard_error": scalarizer.stats.standard_error, "grads": grads_of(model)}


def sample_losses(outputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    """Those of `losses_of`, before the mean."""
    return {name: 10.0 ** TASKS.index(name) * (out - y).square().squeeze(1) for name, out in outputs.items()}


def variant(rank: int, *, unbiased: bool, local: bool) -> dict:
    """Statistics of one step without noise, or without sending gradients."""
    x, y = batch(rank, 0)
    model = DistributedDataParallel(build())
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, unbiased=unbiased, local=local)
    scalarizer((sample_losses if unbiased else losses_of)(model(x), y)).backward()
    stats = scalarizer.stats
    return {
        "gram": stats.gram,
        "method": stats.method,
        "standard_error": stats.standard_error,
        "noise_trace": stats.noise_trace,
        "grads": grads_of(model),
    }


def train(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], method: str, inputs: object = None) -> dict:
    """Four steps with weights that the Gramians of the first decide."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scalarizer = gradstats.Scalarizer(
        "autoscale", tasks=TASKS, inputs=inputs, total_steps=4, explore=0.5, samples_per_window=2, method=method
    )
    weights = []
    for x, y in batches:
        scalarizer(losses_of(model(x), y)).backward()
        weights.append(scalarizer.weights)
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": torch.stack(weights), "parameters": [whole(p.detach()) for p in model.parameters()]}


def stateful(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], weighting: str) -> Tensor:
    """The weights of some steps with a weighting that learns from losses before and after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scalarizer = gradstats.Scalarizer(weighting, tasks=TASKS)
    weights = []
    for x, y in batches:
        scalarizer(losses_of(model(x), y)).backward()
        weights.append(scalarizer.weights)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            scalarizer.after_step(losses_of(model(x), y))
    return torch.stack(weights)


def build_sharded(data: int, tensor: int) -> nn.Module:
    """The same model with parts of the batch on ``data`` ranks (FSDP2) and parts of each layer on ``tensor`` ranks."""
    model = build()
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    if tensor > 1:
        parallelize_module(model, mesh["tensor"], {"encoder.0": ColwiseParallel(), "encoder.2": RowwiseParallel()})
    if data > 1 or tensor == 1:
        for module in (model.encoder[0], model.encoder[2], model):
            fully_shard(module, mesh=mesh["data"])
    return model


def sharded(rank: int, data: int, tensor: int) -> dict:
    """Statistics and gradients of one step of a model of which each rank holds a part."""
    model = build_sharded(data, tensor)
    x, y = batch(rank // tensor, 0)
    losses = losses_of(model(x), y)
    stats = gradstats.from_losses(losses, model, group_by="module", retain_graph=True)
    sum(losses.values()).backward()
    return {
        "method": stats.method,
        "encoder": sum(group.gram for name, group in stats.groups.items() if name.startswith("encoder")),
        "heads": sum(group.gram for name, group in stats.groups.items() if name.startswith("heads")),
        "grads": [whole(p.grad) for p in model.parameters()],
    }


def missing_task(rank: int) -> dict:
    """Task "b" has no loss on rank 1 at steps 0 and 3, "a" none on any rank at steps 5 and 6."""
    model = DistributedDataParallel(build(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scalarizer = gradstats.Scalarizer("slaw", tasks=TASKS, record_every=3)
    recorded, weights = [], []
    with logged_messages() as messages:
        for step in range(8):
            x, y = batch(rank, step)
            tasks = ("a", "c") if rank == 1 and step in (0, 3) else ("b", "c") if step in (5, 6) else TASKS
            before = scalarizer.stats
            scalarizer(losses_of(model(x, tasks), y)).backward()
            if scalarizer.stats is not before:
                recorded.append((step, scalarizer.stats.present.tolist()))
            weights.append(scalarizer.weights)
            optimizer.step()
            optimizer.zero_grad()
    return {
        "recorded": recorded,
        "messages": messages,
        "weights": weights,
        "parameters": [p.detach() for p in model.parameters()],
    }


def not_finite_on_one_rank(rank: int) -> dict:
    """Task "c" is infinite on rank 1 alone at step 0."""
    model = DistributedDataParallel(build())
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=10)
    recorded = []
    with logged_messages() as messages:
        for step in range(4):
            x, y = batch(rank, step)
            losses = losses_of(model(x), y)
            losses["c"] = losses["c"] * (torch.inf if rank == 1 and step == 0 else 1.0)
            before = scalarizer.stats
            scalarizer(losses).backward()
            if scalarizer.stats is not before:
                recorded.append(step)
    return {"recorded": recorded, "messages": messages}


def accumulation(rank: int) -> dict:
    """Two micro-steps a step, the first of them without DDP's communication."""
    model = DistributedDataParallel(build())
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, accumulate=2)
    x, y = batch(rank, 0)
    with model.no_sync():
        (scalarizer(losses_of(model(x), y)) / 2).backward()
    x, y = batch(rank, 1)
    (scalarizer(losses_of(model(x), y)) / 2).backward()
    return {"gram": scalarizer.stats.gram, "grads": grads_of(model)}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    for world in WORLDS[: sum(rank < world for world in WORLDS)]:
        # Through a file: a port found free may be taken by the time it is used.
        meeting = f"file://{folder}/store of {world}"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT / 2)
        )
        results = {method: first_step(rank, method) for method in EXACT}
        results["sketch"] = sketched(rank)
        for unbiased, local in ((False, True), (True, False), (True, True)):
            results[f"variant {unbiased} {local}"] = variant(rank, unbiased=unbiased, local=local)
        for method in ("auto", "blockwise", "sketch"):
            batches = (batch(rank, step) for step in range(4))
            results[f"train {method}"] = train(DistributedDataParallel(build()), batches, method)
        for mesh in (mesh for mesh in MESHES if math.prod(mesh) == world):
            results[f"sharded {mesh}"] = sharded(rank, *mesh)
            model = build_sharded(*mesh)
            batches = (batch(rank // mesh[1], step) for step in range(4))
            results[f"train sharded {mesh}"] = train(model, batches, "auto", inputs=model)
        if world == 2:
            for weighting in STATEFUL:
                batches = (batch(rank, step) for step in range(4))
                results[weighting] = stateful(DistributedDataParallel(build()), batches, weighting)
            results["autoscale"] = autoscale(rank)
            results["missing"] = missing_task(rank)
            results["not_finite"] = not_finite_on_one_rank(rank)
            results["accumulation"] = accumulation(rank)
            results["example"] = runpy.run_path(str(EXAMPLES / "ddp.py"))["main"]()
        dist.destroy_process_group()
        torch.save(results, Path(folder) / f"{rank} of {world}.pt")


# ---- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results_by_world(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What each rank has found, for each number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.spawn(worker, (str(folder),), max(WORLDS), join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                pytest.fail(f"the processes did not end within {TIMEOUT} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return {
        world: [torch.load(folder / f"{rank} of {world}.pt", weights_only=True) for rank in range(world)]
        for world in WORLDS
    }


@pytest.fixture(scope="module")
def results(results_by_world: dict[int, list[dict]]) -> list[dict]:
    """What each of two ranks has found."""
    return results_by_world[2]


def single_process(step: int = 0, world: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Float64 Gramians of encoder and heads, and the summed gradients, on the batches of all ranks together."""
    model = build()
    x, y = all_batches(step, world)
    losses = losses_of(model(x), y)
    grams = []
    for part in (model.encoder, model.heads):
        rows = [
            torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, materialize_grads=True)
            for loss in losses.values()
        ]
        jacobian = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in rows])
        grams.append(jacobian @ jacobian.T)
    sum(losses.values()).backward()
    return *grams, grads_of(model)


def assert_gram(found: Tensor, expected: Tensor) -> None:
    norms = expected.diagonal().sqrt()
    assert ((found - expected).abs() <= 1e-6 * norms[:, None] * norms[None, :]).all(), f"{found}\n{expected}"


def test_autoscale_is_the_same_on_both_ranks(results: list[dict]) -> None:
    first, second = (r["autoscale"] for r in results)
    assert first["recorded"] == second["recorded"]
    assert len(first["recorded"]) == 8
    assert max(first["recorded"]) < 21  # phase 2 records nothing
    assert len(first["windows"]) == 2
    assert torch.equal(first["windows"], second["windows"])
    assert torch.equal(first["weights"], second["weights"])
    assert first["weights"][0] > 10 * first["weights"][2]
    assert all(torch.equal(p, q) for p, q in zip(first["parameters"], second["parameters"], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(first["parameters"], build().parameters(), strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", EXACT)
def test_gramian_is_that_of_the_averaged_gradients(
    results_by_world: dict[int, list[dict]], method: str, world: int
) -> None:
    expected, _, _ = single_process(world=world)
    first, *others = (r[method] for r in results_by_world[world])
    assert first["method"] in (("batched", "blockwise") if method == "auto" else (method,))
    assert_gram(first["gram"], expected)
    assert_gram(first["gram_of_fused"], expected)
    assert all(torch.equal(other["gram"], first["gram"]) for other in others)


@pytest.mark.parametrize("world", WORLDS)
def test_sketch_estimates_the_gramian_of_the_averaged_gradients(
    results_by_world: dict[int, list[dict]], world: int
) -> None:
    expected, _, grads = single_process(world=world)
    first, *others = (r["sketch"] for r in results_by_world[world])
    norms = expected.diagonal().sqrt()
    assert (first["standard_error"] < 0.15 * torch.outer(norms, norms)).all()
    assert ((first["gram"] - expected).abs() < 5 * first["standard_error"]).all()
    for other in others:
        assert torch.equal(other["gram"], first["gram"])
        assert torch.equal(other["standard_error"], first["standard_error"])
    for found, single in zip(first["grads"], grads, strict=True):
        torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5)


def single_rank(rank: int, *, unbiased: bool) -> gradstats.GradStats:
    model = build()
    x, y = batch(rank, 0)
    losses = (sample_losses if unbiased else losses_of)(model(x), y)
    return gradstats.from_losses(losses, model.encoder, unbiased=unbiased)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_local_gramian_is_the_mean_of_the_ranks(
    results_by_world: dict[int, list[dict]], unbiased: bool, world: int
) -> None:
    first, *others = (r[f"variant {unbiased} True"] for r in results_by_world[world])
    singles = [single_rank(rank, unbiased=unbiased) for rank in range(world)]
    torch.testing.assert_close(first["gram"], torch.stack([s.gram for s in singles]).mean(0), rtol=1e-6, atol=0)
    assert ("local" in first["method"]) == (world > 1)
    assert all(torch.equal(other["gram"], first["gram"]) for other in others)
    if unbiased:
        errors = torch.stack([s.standard_error for s in singles])
        torch.testing.assert_close(first["standard_error"], errors.norm(dim=0) / world, rtol=1e-5, atol=0)
        noise = torch.stack([s.noise_trace for s in singles]).mean(0)
        torch.testing.assert_close(first["noise_trace"], noise, rtol=1e-5, atol=0)
    else:  # squared norms keep the noise that averaging takes away
        exact, _, _ = single_process(world=world)
        assert (first["gram"].diagonal() >= exact.diagonal() * (1 - 1e-6)).all()
    for found, single in zip(first["grads"], single_process(world=world)[2], strict=True):
        torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_unbiased_gramian_is_that_of_parts_spread_over_ranks(
    results_by_world: dict[int, list[dict]], world: int
) -> None:
    first, *others = (r["variant True False"] for r in results_by_world[world])
    # In one process: with the samples in such an order that its parts are those that the ranks hold together.
    batches = [batch(rank, 0) for rank in range(world)]
    x, y = (torch.stack(tensors, 1).flatten(0, 1) for tensors in zip(*batches, strict=True))
    model = build()
    expected = gradstats.from_losses(sample_losses(model(x), y), model.encoder, unbiased=True, parts=8)
    torch.testing.assert_close(first["gram"], expected.gram, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(first["standard_error"], expected.standard_error, rtol=1e-4, atol=0)
    torch.testing.assert_close(first["noise_trace"], expected.noise_trace, rtol=1e-4, atol=0)
    assert all(torch.equal(other["gram"], first["gram"]) for other in others)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", ["auto", "blockwise", "sketch"])
def test_ranks_agree_on_weights_from_gramians(results_by_world: dict[int, list[dict]], method: str, world: int) -> None:
    first, *others = (r[f"train {method}"] for r in results_by_world[world])
    assert not torch.equal(first["weights"][0], first["weights"][-1])
    for other in others:
        assert torch.equal(other["weights"], first["weights"])
        assert all(torch.equal(p, q) for p, q in zip(other["parameters"], first["parameters"], strict=True))
    if method != "sketch":
        single = train(build(), (all_batches(step, world) for step in range(4)), method)
        torch.testing.assert_close(first["weights"], single["weights"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(first["parameters"], single["parameters"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weighting", STATEFUL)
def test_ranks_agree_on_weights_that_are_learned(results: list[dict], weighting: str) -> None:
    first, second = (r[weighting] for r in results)
    assert torch.equal(first, second)
    assert (first[1:] != first[:-1]).all()
    torch.testing.assert_close(
        first, stateful(build(), (all_batches(step, 2) for step in range(4)), weighting), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_gramian_is_that_of_the_averaged_gradients(
    results_by_world: dict[int, list[dict]], mesh: tuple[int, int]
) -> None:
    encoder, heads, grads = single_process(world=mesh[0])
    first, *others = (r[f"sharded {mesh}"] for r in results_by_world[math.prod(mesh)])
    assert first["method"] == "engine"
    assert_gram(first["encoder"], encoder)
    assert_gram(first["heads"], heads)
    for other in others:
        assert torch.equal(other["encoder"], first["encoder"])
        assert torch.equal(other["heads"], first["heads"])
    for found, single in zip(first["grads"], grads, strict=True):
        torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_of_a_sharded_model_agree_on_weights(
    results_by_world: dict[int, list[dict]], mesh: tuple[int, int]
) -> None:
    model = build()
    single = train(model, (all_batches(step, mesh[0]) for step in range(4)), "auto", inputs=model)
    first, *others = (r[f"train sharded {mesh}"] for r in results_by_world[math.prod(mesh)])
    assert not torch.equal(first["weights"][0], first["weights"][-1])
    torch.testing.assert_close(first["weights"], single["weights"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(first["parameters"], single["parameters"], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(other["weights"], first["weights"]) for other in others)


@pytest.mark.parametrize("world", [4, 2])
@pytest.mark.parametrize("method", EXACT)
def test_gradient_averaging_of_ddp_is_intact(results_by_world: dict[int, list[dict]], method: str, world: int) -> None:
    _, _, expected = single_process(world=world)
    for result in (r[method] for r in results_by_world[world]):
        for found, fused, plain, single in zip(
            result["grads"], result["grads_of_fused"], result["grads_of_ddp"], expected, strict=True
        ):
            assert torch.equal(found, plain)
            assert torch.equal(fused, plain)
            torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5)


def test_task_that_one_rank_misses_is_recorded_later(results: list[dict]) -> None:
    first, second = (r["missing"] for r in results)
    # Due at 0, 3 and 6; at 0 and 3 the ranks differ. At 6 no rank has "a", and that is recorded.
    assert first["recorded"] == [(1, [True] * 3), (4, [True] * 3), (6, [False, True, True])]
    assert second["recorded"] == first["recorded"]
    for result in (first, second):
        assert [message.split(":")[0] for message in result["messages"]] == ["step 0", "step 3"]
        assert all("graphs differ" in message for message in result["messages"])
    assert all(torch.equal(p, q) for p, q in zip(first["parameters"], second["parameters"], strict=True))
    assert all(torch.equal(w, v) for w, v in zip(first["weights"], second["weights"], strict=True))
    assert not torch.equal(first["weights"][2], first["weights"][-1])


def test_infinite_gradient_on_one_rank_is_discarded_on_both(results: list[dict]) -> None:
    for result in (r["not_finite"] for r in results):
        assert result["recorded"] == [1]
        assert len(result["messages"]) == 1
        assert "step 0: the gradient of c is" in result["messages"][0]


def test_gradient_accumulation_without_communication(results: list[dict]) -> None:
    (gram_0, _, grads_0), (gram_1, _, grads_1) = single_process(0), single_process(1)
    for result in (r["accumulation"] for r in results):
        assert_gram(result["gram"], (gram_0 + gram_1) / 2)
        for found, g, h in zip(result["grads"], grads_0, grads_1, strict=True):
            torch.testing.assert_close(found, (g + h) / 2, rtol=1e-5, atol=1e-5)


def test_example(results: list[dict]) -> None:
    first, second = (r["example"] for r in results)
    assert first == second
    assert first["metres"] > 100 * first["millimetres"]

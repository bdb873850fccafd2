"""The noise of minibatches in Gramians, and what ``unbiased=True`` makes of it, on overlaid digits.

A small network learns from batches of 64 which digit lies left, which lies right (that loss counts tenfold) and which
of the two is larger. Along the training

* ``gramian``: minibatch Gramians against the one of all training data: squared norms as a multiple of it, cosines, how
  often intervals of 1.96 standard errors hold the exact entry, the noise scale, CPU time;
* ``weights``: the weights of one AutoScale window (10 recorded steps) from plain and from unbiased Gramians against
  those from the Gramian of all training data: error of the logarithm, root mean square over windows and of their mean;
* ``accuracy`` on test data after whole trainings with unit weights and with AutoScale, plain and unbiased.

    python benchmarks/noise.py --out benchmarks/results/noise.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradstats
from gradstats import GradStats
from gradstats.bench.machine import describe
from gradstats.data.digits import OverlaidDigits, overlaid_digits
from gradstats.report import write_file
from gradstats.weighting.autoscale import balancing_log_weights, mean_of_known

BATCH = 64
TASKS = {"left": 10, "right": 10, "larger": 2}
SCALES = {"left": 1.0, "right": 10.0, "larger": 1.0}


class Network(nn.Module):
    """A multi-layer perceptron with a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(121, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(64, classes) for task, classes in TASKS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The logits ``[B, classes]`` of each task."""
        features = self.trunk(images / 16.0)
        return {task: head(features) for task, head in self.heads.items()}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses ``[B]`` of the samples."""
        logits, targets = self(batch["image"]), labels(batch)
        return {
            task: SCALES[task] * functional.cross_entropy(logits[task], targets[task], reduction="none")
            for task in TASKS
        }


def labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The classes of each task."""
    return {"left": batch["left"], "right": batch["right"], "larger": (batch["left"] > batch["right"]).long()}


def means(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The losses of the tasks."""
    return {task: loss.mean() for task, loss in losses.items()}


def batches(data: OverlaidDigits, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Independent batches without end."""
    while True:
        yield data[torch.randint(len(data), (BATCH,), generator=generator)]


def exact(network: Network, data: OverlaidDigits) -> Tensor:
    """The Gramian ``[T, T]`` of all data."""
    return gradstats.from_losses(means(network.losses(data[:])), network.trunk).gram


def cosines(gram: Tensor) -> list[float]:
    """Those of all pairs."""
    stats = GradStats(gram, tuple(TASKS), torch.ones(len(TASKS), dtype=torch.bool))
    return [float(stats.cosine[i, j]) for i in range(len(TASKS)) for j in range(i + 1, len(TASKS))]


def gramian(network: Network, data: OverlaidDigits, draws: int, seed: int) -> dict[str, Any]:
    """Minibatch Gramians at one point of the training."""
    full = exact(network, data)
    stream = batches(data, torch.Generator().manual_seed(seed))
    plain, unbiased, hits = [], [], []
    seconds: dict[str, list[float]] = {"plain": [], "unbiased": []}
    for _ in range(draws):
        batch = next(stream)
        losses = network.losses(batch)
        start = time.process_time()
        plain.append(gradstats.from_losses(means(losses), network.trunk).gram)
        seconds["plain"].append(time.process_time() - start)
        losses = network.losses(batch)
        start = time.process_time()
        stats = gradstats.from_losses(losses, network.trunk, unbiased=True)
        seconds["unbiased"].append(time.process_time() - start)
        unbiased.append(stats)
        assert stats.standard_error is not None
        hits.append((stats.gram - full).abs() <= 1.96 * stats.standard_error)
    plains, mean = torch.stack(plain), GradStats.mean(unbiased)
    assert mean.noise_scale is not None
    spread = torch.stack([s.gram for s in unbiased]).diagonal(dim1=1, dim2=2).std(0) / full.diagonal()
    return {
        "squared norm over exact": {
            "plain": (plains.mean(0).diagonal() / full.diagonal()).tolist(),
            "unbiased": (mean.gram.diagonal() / full.diagonal()).tolist(),
            "unbiased, standard error of one step": spread.tolist(),
            "unbiased, standard error of this mean": (spread / draws**0.5).tolist(),
        },
        "cosine": {
            "exact": cosines(full),
            "plain, mean of steps": torch.tensor([cosines(gram) for gram in plain]).mean(0).tolist(),
            "plain, of the mean Gramian": cosines(plains.mean(0)),
            "unbiased, of the mean Gramian": cosines(mean.gram),
        },
        "cover": float(torch.stack(hits).double().mean()),
        "noise scale": mean.noise_scale.tolist(),
        "milliseconds": {how: 1e3 * statistics.median(times) for how, times in seconds.items()},
    }


def weights(network: Network, data: OverlaidDigits, windows: int, seed: int) -> dict[str, dict[str, float]]:
    """AutoScale's weights by equal magnitude, from windows of 10 steps at one point of the training."""
    reference = balancing_log_weights(exact(network, data).diagonal().sqrt()[None], torch.ones(len(TASKS)))
    stream = batches(data, torch.Generator().manual_seed(seed))
    errors: dict[str, list[Tensor]] = {"plain": [], "unbiased": []}
    for _ in range(windows):
        grams: dict[str, list[Tensor]] = {"plain": [], "unbiased": []}
        for _ in range(10):
            losses = network.losses(next(stream))
            grams["unbiased"].append(
                gradstats.from_losses(losses, network.trunk, unbiased=True, retain_graph=True).gram
            )
            grams["plain"].append(gradstats.from_losses(means(losses), network.trunk).gram)
        for how, found in grams.items():
            samples = torch.stack(found)
            decisive = mean_of_known(samples)[None] if how == "unbiased" else samples
            norms = decisive.diagonal(dim1=1, dim2=2).sqrt()
            off = balancing_log_weights(norms, torch.ones(len(TASKS))) - reference
            errors[how].append(off - off.mean())
    return {
        how: {
            "one window": float(torch.stack(found).square().mean().sqrt()),
            "mean of windows": float(torch.stack(found).mean(0).square().mean().sqrt()),
        }
        for how, found in errors.items()
    }


def accuracy(data: dict[str, OverlaidDigits], arm: str, steps: int, seed: int) -> dict[str, Any]:
    """A whole training."""
    torch.manual_seed(seed)
    network = Network()
    options: dict[str, Any] = {} if arm == "unit weights" else {"total_steps": steps}
    scalarizer = gradstats.Scalarizer(
        "autoscale" if options else "uniform",
        tasks=list(TASKS),
        inputs=network.trunk,
        unbiased=arm == "AutoScale, unbiased",
        **options,
    )
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    stream = batches(data["train"], torch.Generator().manual_seed(100 + seed))
    for _ in range(steps):
        losses = network.losses(next(stream))
        scalarizer(losses if scalarizer.unbiased else means(losses)).backward()
        optimizer.step()
        optimizer.zero_grad()
    test = data["test"][:]
    with torch.no_grad():
        logits, targets = network(test["image"]), labels(test)
    right = [float((logits[task].argmax(1) == targets[task]).double().mean()) for task in TASKS]
    final = scalarizer.weights
    return {"accuracy": right, "weights": (final / final.mean()).tolist()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the records as JSON to this file")
    parser.add_argument("--draws", type=int, default=200, help="minibatches at each point of the training")
    parser.add_argument("--steps", type=int, default=2000, help="steps of a whole training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    machine = describe()
    data = overlaid_digits()
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    stream = batches(data["train"], torch.Generator().manual_seed(0))
    points, done = [], 0
    for point in (0, 100, 500, 2000):
        for _ in range(point - done):
            torch.stack(list(means(network.losses(next(stream))).values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        done = point
        record = {
            "step": point,
            "gramian": gramian(network, data["train"], arguments.draws, seed=1000 + point),
            "weights": weights(network, data["train"], max(1, arguments.draws // 10), seed=9000 + point),
        }
        points.append(record)
        print(json.dumps(record), flush=True)
    trainings = {}
    for arm in ("unit weights", "AutoScale", "AutoScale, unbiased"):
        trainings[arm] = [accuracy(data, arm, arguments.steps, seed) for seed in range(arguments.seeds)]
        print(arm, json.dumps(trainings[arm]), flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        records = {"machine": machine, "tasks": list(TASKS), "points": points, "trainings": trainings}
        write_file(arguments.out, json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Sketched Gramians (``method="sketch"``) against exact ones: error, cover, AutoScale's weights and CPU time.

Three multi-task networks: Tox21 (12 assays with missing labels, a file given by ``--data``), and synthetic regressions
of 100 and 600 tasks whose targets lie two orders of magnitude apart and which have a head each. Each is trained a
little first. Then

* ``cover``: many sketches of one step; are they unbiased, are errors as stated, how often do intervals of 1.96 standard
  errors hold the exact entry;
* ``weights``: one AutoScale window along the training, from exact and from sketched Gramians of the same steps;
* ``time``: CPU seconds on one thread, medians of interleaved rounds, each with a fresh forward that is not counted;
* ``estimators``: the same error bought in other ways. ``cost of 10 %`` is CPU time times variance over 0.01: what it
  takes to know squared norms to 10 % (root mean square over tasks).

    python benchmarks/sketch.py --data data/tox21.npz --out benchmarks/results/sketch.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradstats
from gradstats import GradStats
from gradstats.bench.machine import describe
from gradstats.report import write_file
from gradstats.weighting import AutoScale


@dataclass
class Problem:
    """A network, its data and its losses."""

    name: str
    trunk: nn.Module
    head: nn.Module
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    task_losses: Callable[[Tensor, Tensor], list[Tensor]]

    def losses(self, generator: torch.Generator) -> list[Tensor]:
        """Those of a fresh batch."""
        x, y = self.batch(generator)
        return self.task_losses(self.trunk(x), y)

    def train(self, steps: int, seed: int) -> Iterator[list[Tensor]]:
        """Train with uniform weights; yields every step's losses before its backward."""
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam([*self.trunk.parameters(), *self.head.parameters()], 1e-3)
        for _ in range(steps):
            losses = self.losses(generator)
            yield losses
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()


def tox21(path: Path) -> Problem:
    """Fingerprints to 12 assays; binary cross-entropy over the labels that are there."""
    with np.load(path) as data:
        rows = np.flatnonzero(data["split_random"] == 0)
        inputs = torch.tensor(np.unpackbits(data["fp2048"], axis=1)[rows], dtype=torch.float32)
        labels = torch.tensor(data["y"][rows])
    trunk = nn.Sequential(nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU())
    head = nn.Linear(128, labels.shape[1])

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(inputs), (256,), generator=generator)
        return inputs[chosen], labels[chosen]

    def losses(features: Tensor, y: Tensor) -> list[Tensor]:
        known = ~y.isnan()
        loss = functional.binary_cross_entropy_with_logits(head(features), y.nan_to_num(), reduction="none")
        return list(((loss * known).sum(0) / known.sum(0).clamp_min(1)).unbind())

    return Problem("tox21", trunk, head, batch, losses)


def regression(num_tasks: int, width: int, rows: int) -> Problem:
    """Noisy targets of a random network, from 0.1 to 10 in size; six hidden layers and a head for each task."""
    layers = [nn.Linear(256, width), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Linear(width, width), nn.ReLU()]
    heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_tasks))
    teacher = nn.Sequential(nn.Linear(256, 64), nn.Tanh()).requires_grad_(False)
    sizes = torch.logspace(-1, 1, num_tasks)[torch.randperm(num_tasks)]
    mixing = torch.randn(num_tasks, 64) / 8 * sizes[:, None]

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, 256, generator=generator)
        y = teacher(x) @ mixing.T
        return x, y + 0.5 * y.std(0) * torch.randn(y.shape, generator=generator)

    def losses(features: Tensor, y: Tensor) -> list[Tensor]:
        return [functional.mse_loss(head(features).squeeze(1), y[:, t]) for t, head in enumerate(heads)]

    return Problem(f"regression of {num_tasks}", nn.Sequential(*layers), heads, batch, losses)


# ---- error and cover ------------------------------------------------------------------------------------------------


def cover(problem: Problem, directions: int, draws: int) -> dict[str, Any]:
    """Sketches of one step with different seeds against its exact Gramian; entries in units of ``n_i n_j``."""
    losses = problem.losses(torch.Generator().manual_seed(5))
    exact = gradstats.from_losses(losses, problem.trunk, method="sequential", retain_graph=True)
    sketches = [sketch(problem, losses, directions, seed) for seed in range(draws)]
    unit = torch.outer(exact.norms, exact.norms)
    diagonal = torch.eye(exact.num_tasks, dtype=torch.bool)

    def seen(estimates: list[GradStats], where: Tensor) -> dict[str, float]:
        errors = torch.stack([((e.gram - exact.gram) / unit)[where] for e in estimates])
        stated = torch.stack([(e.standard_error / unit)[where] for e in estimates])
        return {
            "bias": float(errors.mean()),
            "bias_standard_error": float(errors.mean(1).std()) / math.sqrt(len(estimates)),
            "error": float(errors.square().mean().sqrt()),
            "stated_error": float(stated.square().mean().sqrt()),
            "cover": float((errors.abs() < 1.96 * stated).double().mean()),
        }

    means = [GradStats.mean(sketches[i : i + 10]) for i in range(0, draws, 10)]
    return {
        "directions": directions,
        "draws": draws,
        "squared_norms": seen(sketches, diagonal),
        "products": seen(sketches, ~diagonal),
        "squared_norms_mean_of_10": seen(means, diagonal),
        "products_mean_of_10": seen(means, ~diagonal),
        "mean_squared_cosine": float(exact.cosine[~diagonal].square().mean()),
    }


def sketch(problem: Problem, losses: list[Tensor], directions: int, seed: int) -> GradStats:
    """One sketch; the graph is kept."""
    return gradstats.from_losses(
        losses, problem.trunk, method="sketch", num_directions=directions, seed=seed, retain_graph=True
    )


# ---- weights --------------------------------------------------------------------------------------------------------


def weights(problem: Problem, directions: int, samples: int, spacing: int) -> dict[str, Any]:
    """Weights of one AutoScale window (equal magnitudes) from exact and from sketched Gramians of the same steps."""
    exact, sketched = [], []
    for step, losses in enumerate(problem.train(samples * spacing, seed=2)):
        if step % spacing == spacing - 1:
            exact.append(gradstats.from_losses(losses, problem.trunk, method="sequential", retain_graph=True))
            sketched.append(sketch(problem, losses, directions, seed=step))
    mean, mean_exact = GradStats.mean(sketched), GradStats.mean(exact)
    found, closed_form = window_weights(sketched), window_weights(exact)
    stated = mean.norm_standard_error / mean.norms

    def off(reference: Tensor) -> dict[str, float]:
        distance = (found / reference).log()
        distance = distance - distance.mean()
        return {
            "error": float(distance.square().mean().sqrt()),
            "largest": float(distance.abs().max()),
            "cover": float((distance.abs() < 1.96 * stated).double().mean()),
        }

    return {
        "directions": directions,
        "samples": samples,
        "stated_error": float(stated.square().mean().sqrt()),
        "spread_of_weights": float(closed_form.max() / closed_form.min()),
        "against_mean_gramian": off(1 / mean_exact.norms),
        "against_closed_form": off(closed_form),
    }


def window_weights(steps: list[GradStats]) -> Tensor:
    """What AutoScale makes of one window of these steps."""
    count = len(steps)
    autoscale = AutoScale(steps[0].num_tasks, count, explore=1.0, windows=1, samples_per_window=count)
    for stats in steps:
        autoscale(torch.ones(stats.num_tasks, dtype=torch.float64), stats)
    return autoscale.window_weights[-1]


# ---- time -----------------------------------------------------------------------------------------------------------


def timed(problem: Problem, rounds: int, directions: list[int]) -> dict[str, float]:
    """Median CPU seconds of each way, from interleaved rounds."""
    parameters = list(problem.trunk.parameters())

    def plain(losses: list[Tensor]) -> None:
        torch.autograd.grad(torch.stack(losses).sum(), parameters)

    def every_task(losses: list[Tensor]) -> None:
        for loss in losses:
            torch.autograd.grad(loss, parameters, retain_graph=True)

    ways: dict[str, Callable[[list[Tensor]], Any]] = {"plain backward": plain, "T plain backwards": every_task}
    ways["exact, auto"] = lambda losses: gradstats.from_losses(losses, problem.trunk)
    for k in directions:
        ways[f"sketch of {k}"] = lambda losses, k=k: gradstats.from_losses(
            losses, problem.trunk, method="sketch", num_directions=k
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            losses = problem.losses(torch.Generator().manual_seed(round_))
            start = time.process_time()
            way(losses)
            if round_:  # the first warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# ---- other estimators -----------------------------------------------------------------------------------------------


def estimators(problem: Problem, directions: int, draws: int) -> dict[str, Any]:
    """Relative error of squared norms and CPU time of one draw of each, graph included."""
    losses = problem.losses(torch.Generator().manual_seed(5))
    exact = gradstats.from_losses(losses, problem.trunk, method="sequential", retain_graph=True)
    linear = Linear(losses, list(problem.trunk.parameters()))
    ways: dict[str, Callable[[int], Tensor]] = {
        "strata (method='sketch')": lambda seed: sketch(problem, losses, directions, seed).gram,
        "directions over all inputs": lambda seed: linear.joint(directions, seed),
        "the same, gradients' span exact": lambda seed: linear.deflated(4, directions - 4, seed),
        "Gramian-vector products": lambda seed: linear.gramian_products(directions // 2, 1 / exact.norms, seed),
    }
    found = {}
    for name, way in ways.items():
        start = time.process_time()
        grams = [way(seed) for seed in range(draws)]
        seconds = (time.process_time() - start) / draws
        errors = torch.stack([gram.diagonal() / exact.gram.diagonal() - 1 for gram in grams])
        variance = float(errors.square().mean())
        found[name] = {
            "seconds": seconds,
            "error": math.sqrt(variance),
            "cost_of_10_percent": seconds * variance / 0.01,
        }
    return found


class Linear:
    """``J`` as a linear map both ways, from losses."""

    def __init__(self, losses: list[Tensor], parameters: list[Tensor]) -> None:
        self.losses, self.parameters = losses, parameters

    def build(self) -> None:
        """Make ``J v`` possible; paid in every draw."""
        self.u = torch.ones(len(self.losses), requires_grad=True)
        self.gradients = torch.autograd.grad(self.losses, self.parameters, list(self.u.unbind()), create_graph=True)

    def forward(self, direction: list[Tensor]) -> Tensor:
        """``J v``, float64 ``[T]``."""
        return torch.autograd.grad(self.gradients, self.u, direction, retain_graph=True)[0].detach().double()

    def transposed(self, r: Tensor) -> list[Tensor]:
        """``Jᵀ r``."""
        return list(torch.autograd.grad(self.losses, self.parameters, list(r.float().unbind()), retain_graph=True))

    def normal(self, generator: torch.Generator) -> list[Tensor]:
        """A Gaussian direction."""
        return [torch.randn(p.shape, generator=generator) for p in self.parameters]

    def joint(self, k: int, seed: int) -> Tensor:
        """``k`` directions over all parameters at once."""
        self.build()
        generator = torch.Generator().manual_seed(seed)
        rows = torch.stack([self.forward(self.normal(generator)) for _ in range(k)])
        return rows.T @ rows / k

    def deflated(self, m: int, k: int, seed: int) -> Tensor:
        """Exact on the span of ``Jᵀ R`` with ``m`` random ``r``, ``k`` directions for the rest: Hutch++ on gradients.

        ``m / 2`` of the directions pay for ``Jᵀ R``.
        """
        self.build()
        generator = torch.Generator().manual_seed(seed)
        span = [self.transposed(torch.randn(len(self.losses), generator=generator)) for _ in range(m // 2)]
        basis = torch.linalg.qr(torch.stack([torch.cat([g.flatten() for g in v]) for v in span], 1))[0]
        sizes = [p.numel() for p in self.parameters]

        def shaped(vector: Tensor) -> list[Tensor]:
            parts = vector.split(sizes)
            return [part.reshape(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

        gram = torch.zeros(len(self.losses), len(self.losses), dtype=torch.float64)
        for column in basis.T:
            row = self.forward(shaped(column))
            gram += torch.outer(row, row)
        for _ in range(k):
            flat = torch.cat([v.flatten() for v in self.normal(generator)])
            row = self.forward(shaped(flat - basis @ (basis.T @ flat)))
            gram += torch.outer(row, row) / k
        return gram

    def gramian_products(self, m: int, scales: Tensor, seed: int) -> Tensor:
        """``G r rᵀ`` with random signs in ``m`` vectors ``r``; ``scales`` are the inverse norms, here simply known."""
        self.build()
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros(len(self.losses), len(self.losses), dtype=torch.float64)
        for _ in range(m):
            r = scales * (torch.randint(2, scales.shape, generator=generator) * 2 - 1)
            total += torch.outer(self.forward(self.transposed(r)), r / scales**2) / m
        return (total + total.T) / 2


# ---- command line ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/tox21.npz"), help="Tox21 as packed fingerprints")
    parser.add_argument("--out", type=Path, help="write the records as JSON to this file")
    parser.add_argument("--warm-up", type=int, default=50, help="training steps before anything is measured")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    machine = describe()
    print(json.dumps(machine, indent=2))
    records = []
    makers: list[tuple[Callable[[], Problem], int]] = [
        (lambda: tox21(arguments.data), 10),
        (lambda: regression(100, width=512, rows=256), 10),
        (lambda: regression(600, width=256, rows=128), 5),
    ]
    for make, samples in makers:
        torch.manual_seed(0)
        problem = make()
        for _ in problem.train(arguments.warm_up, seed=1):
            pass
        record = {
            "problem": problem.name,
            "parameters": sum(p.numel() for p in problem.trunk.parameters()),
            "time": timed(problem, 3, [8, 16, 32]),
            "cover": cover(problem, 32, 40),
            "estimators": estimators(problem, 32, 6),
            "weights": weights(problem, 32, samples, 5),
        }
        records.append(record)
        print(json.dumps(record, indent=1), flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(arguments.out, json.dumps({"machine": machine, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()

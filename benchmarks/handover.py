"""How new weights are handed over to an optimizer that remembers the old ones, on tasks of badly different scale.

A small network learns from overlaid digits which digit lies left, which lies right, which of the two is larger, and to
draw the image again; the losses, alike in scale by themselves, are multiplied by 1, 10, 100 and 1000. When AutoScale
finds weights that undo this, the gradients' scale may change by as much, and Adam's second moments remember the old one
for some 1 / (1 - 0.999) steps. Compared are ways to hand the weights over: how they are scaled, and what becomes of the
optimizer's state. Each has its own learning rate, the one of a few that gives the best validation score with a seed of
its own, so that none is judged by the scale of another.

    OMP_NUM_THREADS=1 python benchmarks/handover.py --out benchmarks/results/handover.json
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

import gradstats
from gradstats.bench.machine import describe
from gradstats.data import OverlaidDigits, overlaid_digits
from gradstats.report import write_file

OUTPUTS = {"left": 10, "larger": 2, "right": 10, "image": 121}
FACTORS = {"left": 1.0, "larger": 10.0, "right": 100.0, "image": 1000.0}
TASKS = list(OUTPUTS)
NAMING = TASKS[:-1]
BATCH = 64
PILOT_SEED = 1000
#: Optimizers and the learning rates to choose from; those of SGD span what the ways' different scales ask for.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], list[float]]] = {
    "SGD": (lambda parameters, lr: SGD(parameters, lr, momentum=0.9), [10 ** (k / 2) for k in range(-13, -2)]),
    "Adam": (Adam, [3e-3, 1e-2, 3e-2]),
    "AdamW": (AdamW, [3e-3, 1e-2, 3e-2]),
}


class Network(nn.Module):
    """A multilayer perceptron with a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(121, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(64, outputs) for task, outputs in OUTPUTS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits ``[N, classes]``, and pixels ``[N, 121]`` from 0 to 1."""
        features = self.trunk(images / 16.0)
        return {task: head(features) for task, head in self.heads.items()}


def targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the network's outputs should be."""
    larger = (batch["left"] > batch["right"]).long()
    return {"left": batch["left"], "right": batch["right"], "larger": larger, "image": batch["image"].flatten(1) / 16.0}


def losses(network: Network, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropies, and squared errors summed over pixels, multiplied by the factors."""
    outputs, wanted = network(batch["image"]), targets(batch)
    found = {task: functional.cross_entropy(outputs[task], wanted[task]) for task in NAMING}
    found["image"] = (outputs["image"] - wanted["image"]).square().sum(1).mean()
    return {task: factor * found[task] for task, factor in FACTORS.items()}


@torch.no_grad()
def errors(network: Network, data: OverlaidDigits) -> dict[str, float]:
    """For each task what should be small: the share of wrong answers, the root mean squared error of pixels."""
    outputs, wanted = network(data.images), targets(data[:])
    found = {task: float((outputs[task].argmax(1) != wanted[task]).double().mean()) for task in NAMING}
    return found | {"image": float((outputs["image"] - wanted["image"]).square().mean().sqrt())}


# ---- ways to hand over -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """The weights that were, those that follow, and the last Gramian recorded."""

    old: Tensor
    new: Tensor
    gram: Tensor


@dataclass(frozen=True)
class Way:
    """A training.

    Attributes:
        title: For tables.
        weights: ``"uniform"``, ``"ideal"`` (the inverse factors), ``"autoscale"`` or ``"found"`` (those that a training
            with the default has ended with, at its own learning rate and from the same initialisation).
        normalize: As for AutoScale.
        hand_over: What becomes of the optimizer's state when the weights change.
        when: Whether at every change, or only at the end of AutoScale's first phase.
    """

    title: str
    weights: Literal["uniform", "ideal", "autoscale", "found"] = "autoscale"
    normalize: Literal["gradient", "loss", "sum"] = "gradient"
    hand_over: Callable[[Optimizer, Network, Change], None] | None = None
    when: Literal["every change", "end"] = "every change"


def clear(optimizer: Optimizer, network: Network, change: Change) -> None:
    """Forget everything."""
    optimizer.state.clear()


def rescale(optimizer: Optimizer, network: Network, change: Change) -> None:
    """Multiply moments as the change multiplies the gradients: the aggregated one of the trunk, and each head's own."""
    squares = [weights @ change.gram @ weights for weights in (change.old, change.new)]
    multiply(optimizer, network.trunk, float((squares[1] / squares[0]).sqrt()))
    rescale_heads(optimizer, network, change)


def rescale_heads(optimizer: Optimizer, network: Network, change: Change) -> None:
    """The same for the heads alone."""
    for task, ratio in zip(OUTPUTS, (change.new / change.old).tolist(), strict=True):
        multiply(optimizer, network.heads[task], ratio)


def multiply(optimizer: Optimizer, module: nn.Module, ratio: float) -> None:
    """What the moments would be had the gradients of ``module`` been ``ratio`` times as long."""
    for parameter in module.parameters():
        for name, value in optimizer.state[parameter].items():
            if name != "step" and value is not None:
                value.mul_(ratio**2 if name == "exp_avg_sq" else ratio)


DEFAULT = Way("gradient norm kept")
WAYS = [
    Way("uniform", "uniform"),
    Way("ideal fixed weights", "ideal"),
    Way("retrained from scratch with the weights found", "found"),
    Way("sum(w) = T", normalize="sum"),
    Way("sum(w) = T, state cleared at the end of phase 1", normalize="sum", hand_over=clear, when="end"),
    Way("sum(w) = T, state cleared at every change", normalize="sum", hand_over=clear),
    Way("sum(w) = T, moments rescaled", normalize="sum", hand_over=rescale),
    DEFAULT,
    Way("gradient norm kept, state cleared at every change", hand_over=clear),
    Way("gradient norm kept, moments of heads rescaled", hand_over=rescale_heads),
    Way("weighted sum of losses kept", normalize="loss"),
    Way("weighted sum of losses kept, moments rescaled", normalize="loss", hand_over=rescale),
]


# ---- training --------------------------------------------------------------------------------------------------------


def train(
    data: OverlaidDigits,
    way: Way,
    make_optimizer: Callable[..., Optimizer],
    *,
    lr: float,
    steps: int,
    seed: int,
    found: Tensor | None = None,
) -> tuple[Network, Tensor]:
    """A training, from which the network and its last weights come; ``found`` are the weights of ``"found"``."""
    scalarizer = make_scalarizer(way, steps, found)
    torch.manual_seed(seed)
    network = Network()
    optimizer = make_optimizer(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        old = scalarizer.weights
        loss = scalarizer(losses(network, data[torch.randint(len(data), (BATCH,))]))
        if not loss.isfinite():
            break  # the learning rate is too high
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        changed = not torch.equal(old, scalarizer.weights)
        due = changed and (way.when == "every change" or not scalarizer.weighting.needs)
        if due and way.hand_over is not None and scalarizer.stats is not None:
            way.hand_over(optimizer, network, Change(old, scalarizer.weights, scalarizer.stats.gram))
    return network, scalarizer.weights


def make_scalarizer(way: Way, steps: int, found: Tensor | None) -> gradstats.Scalarizer:
    """That of a training of so many steps."""
    if way.weights == "autoscale":
        return gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=steps, normalize=way.normalize)
    if found is not None:
        return gradstats.Scalarizer("fixed", tasks=TASKS, weights=(len(TASKS) * found / found.sum()).tolist())
    weights = {task: 1.0 if way.weights == "uniform" else 1 / factor for task, factor in FACTORS.items()}
    return gradstats.Scalarizer("fixed", tasks=TASKS, weights=weights)


def score(found: dict[str, float]) -> float:
    """What the best learning rate minimises: the mean logarithm of the errors."""
    logs = [math.log(max(error, 1e-6)) for error in found.values()]
    return math.fsum(logs) if all(map(math.isfinite, logs)) else math.inf


def compare(data: dict[str, OverlaidDigits], way: Way, optimizer: str, steps: int, seeds: int) -> dict[str, Any]:
    """The record of a way with an optimizer: its learning rate, and the errors of each seed."""
    make_optimizer, lrs = OPTIMIZERS[optimizer]

    def run(way: Way, lr: float, seed: int, found: Tensor | None) -> tuple[Network, Tensor]:
        return train(data["train"], way, make_optimizer, lr=lr, steps=steps, seed=seed, found=found)

    def best_lr(way: Way, found: Tensor | None) -> float:
        return min(lrs, key=lambda lr: score(errors(run(way, lr, PILOT_SEED, found)[0], data["valid"])))

    found: dict[int, Tensor | None] = dict.fromkeys([PILOT_SEED, *range(seeds)])
    if way.weights == "found":
        lr = best_lr(DEFAULT, None)
        found = {seed: run(DEFAULT, lr, seed, None)[1] for seed in found}
    lr = best_lr(way, found[PILOT_SEED])
    measured = [errors(run(way, lr, seed, found[seed])[0], data["test"]) for seed in range(seeds)]
    return {"optimizer": optimizer, "way": way.title, "lr": lr, "errors": measured}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results; what it has is not repeated")
    parser.add_argument("--steps", type=int, default=1000, help="steps of each training (1000)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind (5)")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": describe(), "steps": options.steps, "records": []}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    done = [(record["optimizer"], record["way"]) for record in results["records"]]
    missing = [(o, way) for o in options.optimizers for way in WAYS if (o, way.title) not in done]
    data = overlaid_digits()
    for optimizer, way in track(missing, description="ways"):
        results["records"].append(compare(data, way, optimizer, options.steps, options.seeds))
        write_file(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    logging.getLogger("gradstats").setLevel(logging.ERROR)  # too high learning rates are tried, too
    main()

"""What gradient statistics, and AutoScale, add to the time of training.

Every training is run without gradstats (the plain sum of the losses) and with each variant, all of them step by step
in turn, in a random order, so that whatever else the machine does hits all of them, and none always follows the same
one, whose data fill the caches. Compared is the CPU time of all steps (one thread): forward pass, collection, backward
and optimizer. The whole is repeated, with other initial weights and batches; given are the median ratio and the range.

* Statistics: 8 tasks on the MLP and the Transformer of ``cases.py``; exact Gramians every 100 steps, sketched ones
  of 8 directions (norms to a quarter each, so to be averaged) every 50. The steps between are compared apart.
* AutoScale: the demo's network (``examples/digits.py``) with 2 and 3 tasks, and a small autoencoder of the same images
  with 40 tasks, each to draw one pixel; as many steps as the demo takes. Other weights make another network, and some
  operators take longer on that (max pooling, whose branches depend on values, by a quarter). So one more training sums
  the losses by hand with the weights that AutoScale has at that step; beside it there is only what AutoScale does.

    python benchmarks/overhead.py --out benchmarks/results/overhead.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from cases import MODELS, build_case
from collect import describe, reason, stamp
from render import number
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import gradstats
from gradstats.compare.digits import OUTPUTS, Digits, compute_losses
from gradstats.data import OverlaidDigits, overlaid_digits
from gradstats.report import write_file

DEMO_STEPS, BATCH_SIZE = 1608, 64
PIXELS = 40

#: The losses of the next step.
NextLosses: TypeAlias = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Training:
    """What is trained.

    Attributes:
        title: For tables.
        tasks: Names of the tasks.
        steps: Number of steps.
        make: A fresh model's parameters, and its losses; of a seed.
    """

    title: str
    tasks: tuple[str, ...]
    steps: int
    make: Callable[[int], tuple[list[nn.Parameter], NextLosses]]


@dataclass(frozen=True)
class Variant:
    """What is added to it.

    Attributes:
        title: For tables.
        limit: The largest ratio that is good, or None.
        scalarizer: Makes it for a training; None stands for the plain sum.
        fused: Whether ``scalarizer.backward(losses)`` is called in place of ``scalarizer(losses).backward()``.
        by_hand: Whether the losses are summed without gradstats, but with the weights of the first scalarizer.
    """

    title: str
    limit: float | None = None
    scalarizer: Callable[[Training], gradstats.Scalarizer] | None = None
    fused: bool = False
    by_hand: bool = False


# ---- trainings -------------------------------------------------------------------------------------------------------


def fixed_batch(model: str, num_tasks: int, _seed: int) -> tuple[list[nn.Parameter], NextLosses]:
    """A model of ``cases.py`` on its one batch, whatever the seed."""
    case = build_case(model, num_tasks, "shared")

    def losses() -> dict[str, Tensor]:
        return {f"task{t}": loss for t, loss in enumerate(case.forward()[1])}

    return [*case.parameters, *case.heads.parameters()], losses


def random_batches(data: OverlaidDigits, seed: int) -> Iterator[dict[str, Tensor]]:
    """The same batches at every call with one seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield data[torch.randint(len(data), (BATCH_SIZE,), generator=generator)]


def digits(data: OverlaidDigits, tasks: tuple[str, ...], seed: int) -> tuple[list[nn.Parameter], NextLosses]:
    """The demo's network."""
    torch.manual_seed(seed)
    model, batches = Digits(tasks), random_batches(data, seed)
    return list(model.parameters()), lambda: compute_losses(model, next(batches), reconstruction="sum")


def pixels(data: OverlaidDigits, seed: int) -> tuple[list[nn.Parameter], NextLosses]:
    """An autoencoder whose tasks are to draw a pixel each; the losses' scales are those of the pixels."""
    torch.manual_seed(seed)
    size = data.images[0].numel()
    encoder = nn.Sequential(nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    heads = nn.ModuleList([nn.Linear(64, 1) for _ in range(PIXELS)])
    batches = random_batches(data, seed)

    def losses() -> dict[str, Tensor]:
        flat = next(batches)["image"].flatten(1)
        code = encoder(flat / 16.0).relu()
        # From the middle of the canvas, where every pixel varies.
        targets = flat[:, (size - PIXELS) // 2 :].unbind(1)
        return {
            f"pixel{i}": (head(code)[:, 0] - target).square().mean()
            for i, (head, target) in enumerate(zip(heads, targets, strict=False))
        }

    return [*encoder.parameters(), *heads.parameters()], losses


# ---- measuring -------------------------------------------------------------------------------------------------------


class Trainee:
    """One training with one variant, taken step by step.

    Attributes:
        seconds: CPU time of each step.
        recorded: Whether each step recorded statistics.
    """

    def __init__(self, training: Training, variant: Variant, seed: int = 0) -> None:
        parameters, self.losses = training.make(seed)
        self.optimizer = torch.optim.AdamW(parameters, 1e-3)
        self.scalarizer = variant.scalarizer(training) if variant.scalarizer is not None else None
        self.fused, self.by_hand = variant.fused, variant.by_hand
        self.seconds: list[float] = []
        self.recorded: list[bool] = []

    def step(self, weights: Tensor) -> None:
        """Take one step, by hand with ``weights`` ``[T]``, and its time."""
        self.recorded.append(self.scalarizer is not None and self.scalarizer.wants_stats())
        start = time.process_time()
        losses = self.losses()
        if self.by_hand:
            torch.dot(torch.stack(list(losses.values())), weights).backward()
        elif self.scalarizer is None:
            torch.stack(list(losses.values())).sum().backward()
        elif self.fused:
            self.scalarizer.backward(losses)
        else:
            self.scalarizer(losses).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.process_time() - start)

    def median_seconds(self, recorded: bool) -> float | None:
        """That of the steps that recorded, or of the others."""
        chosen = [s for s, r in zip(self.seconds, self.recorded, strict=True) if r == recorded]
        return statistics.median(chosen) if chosen else None


def failure(training: Training, variant: Variant) -> Exception | None:
    """Take a few steps, which also warms up, and return what was raised."""
    try:
        trainee = Trainee(training, variant)
        for _ in range(3):
            trainee.step(torch.ones(len(training.tasks)))
    except Exception as error:  # what cannot be done is a result
        return error
    return None


def spread(ratios: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def compare(training: Training, variants: list[Variant], repeats: int) -> list[dict[str, Any]]:
    """One record for each variant but the plain sum."""
    plain = Variant("plain sum")
    failed = {v.title: error for v in variants if (error := failure(training, v)) is not None}
    running = [plain, *(v for v in variants if v.title not in failed)]
    by_hand = next((v.title for v in running if v.by_hand), None)
    totals: dict[str, list[float]] = {v.title: [] for v in running}
    by_kind: dict[str, dict[bool, list[float]]] = {v.title: {False: [], True: []} for v in running}
    counts = dict.fromkeys(totals, 0)
    for seed in range(repeats):
        trainees = {v.title: Trainee(training, v, seed) for v in running}
        order, generator = list(trainees.values()), random.Random(0)
        leader = next(trainee.scalarizer for trainee in order if trainee.scalarizer is not None)
        for _ in track(range(training.steps), description=training.title):
            weights = leader.weights.float()
            generator.shuffle(order)
            for trainee in order:
                trainee.step(weights)
        base = trainees[plain.title]
        for name, trainee in trainees.items():
            totals[name].append(sum(trainee.seconds))
            for recorded, found in by_kind[name].items():
                if (seconds := trainee.median_seconds(recorded)) is not None:
                    found.append(seconds / statistics.median(base.seconds))
            counts[name] = sum(trainee.recorded)
    records = []
    for variant in variants:
        record: dict[str, Any] = {
            "training": training.title,
            "num_tasks": len(training.tasks),
            "steps": training.steps,
            "variant": variant.title,
            "limit": variant.limit,
        }
        name = variant.title
        if name in failed:
            record |= reason(failed[name])
        else:
            ratio = {
                key: spread([mine / other for mine, other in zip(totals[name], totals[beside], strict=True)])
                for key, beside in (("ratio", plain.title), ("ratio_by_hand", by_hand))
                if beside is not None
            }
            record |= {"repeats": repeats, "recorded_steps": counts[name], **ratio}
            for recorded, key in ((True, "recorded_step_ratio"), (False, "other_step_ratio")):
                found = by_kind[name][recorded]
                record[key] = statistics.median(found) if found else None
        records.append(record)
    return records


def monitor(training: Training, **options: Any) -> gradstats.Scalarizer:
    """Unitary weights, with statistics."""
    return gradstats.Scalarizer("uniform", tasks=training.tasks, **options)


def autoscale(training: Training) -> gradstats.Scalarizer:
    """AutoScale over the whole training."""
    return gradstats.Scalarizer("autoscale", tasks=training.tasks, total_steps=training.steps)


STATISTICS = [
    Variant("a Scalarizer that records nothing", None, monitor),
    Variant("exact statistics every 100 steps", 1.05, partial(monitor, record_every=100)),
    Variant("the same, fused", 1.05, partial(monitor, record_every=100), fused=True),
    Variant(
        "sketches of 8 directions every 50 steps",
        1.05,
        partial(monitor, record_every=50, method="sketch", num_directions=8),
    ),
]


def comparisons(steps: int | None) -> list[tuple[Training, list[Variant]]]:
    """All trainings with their variants."""
    names = tuple(f"task{t}" for t in range(8))
    data = overlaid_digits()["train"]
    chosen: list[tuple[Training, list[Variant]]] = [
        (Training(f"{MODELS[model].title}, 8 heads", names, steps or 200, partial(fixed_batch, model, 8)), STATISTICS)
        for model in ("mlp", "transformer")
    ]
    trainings = [
        Training(f"digits demo, {' and '.join(tasks)}", tasks, steps or DEMO_STEPS, partial(digits, data, tasks))
        for tasks in (tuple(OUTPUTS)[:2], tuple(OUTPUTS))
    ]
    pixel_names = tuple(f"pixel{i}" for i in range(PIXELS))
    trainings.append(Training("pixels of digits", pixel_names, steps or DEMO_STEPS, partial(pixels, data)))
    for training in trainings:
        limit = 1.05 if len(training.tasks) <= 3 else 1.15
        variants = [
            Variant("AutoScale", limit, autoscale),
            Variant("AutoScale, fused", limit, autoscale, fused=True),
            Variant("the same weights by hand", by_hand=True),
        ]
        chosen.append((training, variants))
    return chosen


def show(records: list[dict[str, Any]]) -> Table:
    """All records."""
    shown = Table(
        "training", "T", "with", "time / without", "/ by hand", "limit", "recorded", "a recorded step", "another"
    )
    for r in records:
        ratio, limit = r.get("ratio"), r["limit"]
        missed = ratio is not None and limit is not None and ratio["median"] > limit
        shown.add_row(
            r["training"],
            str(r["num_tasks"]),
            r["variant"],
            escape(r["absent"]) if ratio is None else "{median:.3f} ({lowest:.3f} to {highest:.3f})".format(**ratio),
            number(r.get("ratio_by_hand", {}).get("median"), 4),
            "" if limit is None else f"{limit:g}",
            "" if ratio is None else f"{r['recorded_steps']} of {r['steps']}",
            *(number(r.get(key), 3) for key in ("recorded_step_ratio", "other_step_ratio")),
            style="bold red" if missed else None,
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--only", default="", help="trainings whose title holds this; the file keeps others")
    parser.add_argument("--steps", type=int, help="steps of every training (200, and for AutoScale 1608)")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each kind (3)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"machine": describe() | stamp(), "records": []}
    if options.only and options.out.exists():
        found = json.loads(options.out.read_text())["records"]
        results["records"] = [record for record in found if options.only not in record["training"]]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for training, variants in comparisons(options.steps):
        if options.only in training.title:
            results["records"] += compare(training, variants, options.repeats)
            write_file(options.out, json.dumps(results, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 140).print(show(results["records"]))


if __name__ == "__main__":
    main()

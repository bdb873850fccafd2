"""How many steps AutoScale has to record, and in which windows, for weights that hardly depend on the batches it saw.

The demo's network (``examples/digits.py``) is trained through the first phase with the Gramian of every step recorded,
with several seeds. From these, the weights are predicted as if only some steps of each window had been recorded, drawn
at random many times. For each way to lay out the records: how far the log-weights lie from those of all steps, and how
much they vary between seeds and draws, both root mean squares over tasks. 0.1 is about 10 % of a weight.

    OMP_NUM_THREADS=1 python benchmarks/records.py --out benchmarks/results/records.json
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from collect import stamp
from overhead import BATCH_SIZE, DEMO_STEPS
from rich.progress import track
from torch import Tensor

from gradstats import Scalarizer
from gradstats.bench.machine import describe
from gradstats.compare.digits import OUTPUTS, Digits, compute_losses
from gradstats.data import OverlaidDigits, overlaid_digits
from gradstats.report import write_file
from gradstats.weighting.autoscale import AutoScale, balancing_log_weights, predict

WINDOWS = 10
#: Draws of the recorded steps for each training.
DRAWS = 100


def norms_of_all_steps(data: OverlaidDigits, tasks: Sequence[str], seed: int, steps: int) -> Tensor:
    """Norms of the tasks' gradients at each step of AutoScale's first phase, float64 ``[steps, T]``."""
    torch.manual_seed(seed)
    model = Digits(tasks)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scalarizer = Scalarizer("autoscale", tasks=tasks, total_steps=steps, record_every=1)
    found = []
    while scalarizer.weighting.exploring:
        batch = data[torch.randint(len(data), (BATCH_SIZE,))]
        scalarizer.backward(compute_losses(model, batch, reconstruction="sum"))
        optimizer.step()
        optimizer.zero_grad()
        found.append(scalarizer.stats.norms)
    return torch.stack(found)


def predicted(norms: Tensor, samples: Sequence[int] | None, generator: torch.Generator) -> Tensor:
    """Centred log-weights ``[T]`` of phase 2, from a step of each of so many parts of a window; from all if None."""
    logs = []
    for i, window in enumerate(norms.tensor_split(WINDOWS)):
        if samples is not None:
            parts = window.tensor_split(samples[i])
            window = torch.stack([part[torch.randint(len(part), (), generator=generator)] for part in parts])
        logs.append(balancing_log_weights(window, torch.ones_like(window[0])))
    log_weights = predict(torch.stack(logs).exp(), "linear").log()
    return log_weights - log_weights.mean()


def measure(norms: list[Tensor], samples: Sequence[int] | None) -> dict[str, Any]:
    """The record of one way to lay out the recorded steps."""
    generator = torch.Generator().manual_seed(0)
    all_steps = torch.stack([predicted(seed, None, generator) for seed in norms])
    draws = torch.stack(
        [torch.stack([predicted(seed, samples, generator) for seed in norms]) for _ in range(DRAWS if samples else 1)]
    )
    return {
        "samples": samples,
        "from_all_steps": float((draws - all_steps).square().mean().sqrt()),
        "between_trainings": float((draws - draws.mean((0, 1))).square().mean().sqrt()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--seeds", type=int, default=40, help="trainings (40)")
    parser.add_argument("--steps", type=int, default=DEMO_STEPS, help=f"steps of a whole training ({DEMO_STEPS})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = overlaid_digits()["train"]
    default = AutoScale(2, options.steps, windows=WINDOWS).samples
    layouts = [None, *((count,) * WINDOWS for count in (2, 3, 4, 5)), default]
    records = []
    for tasks in (tuple(OUTPUTS)[:2], tuple(OUTPUTS)):
        seeds = track(range(options.seeds), description=", ".join(tasks))
        norms = [norms_of_all_steps(data, tasks, seed, options.steps) for seed in seeds]
        records += [{"tasks": tasks} | measure(norms, samples) for samples in layouts]
    results = {"machine": describe() | stamp(), "steps": options.steps, "seeds": options.seeds, "records": records}
    write_file(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    logging.getLogger("gradstats").setLevel(logging.ERROR)  # windows of short trainings disagree
    main()

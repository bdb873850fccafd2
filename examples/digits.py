"""Three tasks of very different loss scale on overlaid handwritten digits: which loss weights serve all of them?

Each image holds two digits, one over the other. The tasks are to name the left digit, to name the right digit
(cross-entropy), and to draw the image again from 64 numbers (squared error). Their losses are in different units, a
few nats and hundreds of squared intensities, so a plain sum trains the drawing and neglects the naming.

Trained for each seed: a single-task reference for each task, then one network for all three with unitary
scalarization (the plain sum), SLAW and AutoScale. Same data, network, optimizer, learning rate and number of steps
for all; the learning rate is the one of 1e-3, 3e-3, 1e-2 that was best for the plain sum on the validation pairs
(``--lr 1e-3 --evaluate-on valid`` repeats that). The model after the last step is evaluated, so nothing else is chosen
by any result.

The runs with the first seed record their gradients all along, for the pictures. Recording changes no gradient, but it
takes time, so times come from a pass of their own: one more training of each method, without recording, in which the
methods take their steps in turn, so that whatever else the machine does slows all of them alike.

    python examples/digits.py --help
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import logging
import math
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import gradstats
from gradstats import report
from gradstats.compare.digits import Digits, compute_losses, metric_values
from gradstats.data import OverlaidDigits, batches, overlaid_digits
from gradstats.train import History, Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping

TASKS = ("left", "right", "image")
METHODS = {"unitary": "uniform", "SLAW": "slaw", "AutoScale": "autoscale"}
SINGLE = "single-task"
HIGHER_IS_BETTER = {"left": True, "right": True, "image": False}
LABELS = {"left": "left accuracy (%)", "right": "right accuracy (%)", "image": "image error (RMSE, 0–16)"}
DROP = "Δm (%), lower is better"
NOTES = """
All numbers are those of the model after the last step: none is chosen by its results.
±: 95 % t-interval of the mean over seeds. Δm: mean relative drop against the single-task networks of the same seed.
CPU time: that of all optimizer steps relative to unitary, with the methods' steps interleaved and nothing recorded but
what the method needs. weights: those in force at the end, mean over seeds, scaled to sum 3.
"""


@dataclass
class Run:
    """What one training leaves behind."""

    metrics: dict[str, float]
    weights: list[float]
    history: History


def build(
    weighting: str, tasks: tuple[str, ...], steps: int, lr: float, *, record_every: int | None = None
) -> tuple[Digits, torch.optim.AdamW, gradstats.Scalarizer]:
    """A fresh network with its optimizer and the scalarizer for a training of so many steps."""
    model = Digits(tasks)
    options: dict[str, Any] = {"total_steps": steps} if weighting == "autoscale" else {}
    scalarizer = gradstats.Scalarizer(weighting, tasks=tasks, record_every=record_every, **options)
    return model, torch.optim.AdamW(model.parameters(), lr), scalarizer


def train(
    label: str,
    weighting: str,
    tasks: tuple[str, ...],
    data: Mapping[str, OverlaidDigits],
    seed: int,
    options: argparse.Namespace,
    *,
    record_every: int | None = None,
) -> Run:
    """Train one network on ``tasks`` and evaluate it."""
    loader = batches(data["train"], options.batch_size, shuffle=True)
    steps = options.epochs * len(loader)
    torch.manual_seed(seed)
    model, optimizer, scalarizer = build(weighting, tasks, steps, options.lr, record_every=record_every)
    trainer = Trainer(
        model,
        lambda model, batch: compute_losses(model, batch, reconstruction=options.reconstruction),
        optimizer,
        scalarizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        scheduler_interval="step",
        max_epochs=options.epochs,
        seed=seed,
        progress=False,
        accelerator="cpu",
    )
    with tqdm(total=steps, desc=f"seed {seed}, {label}", unit="step") as bar:
        optimizer.register_step_post_hook(lambda *_: bar.update())
        history = trainer.fit(loader)
    model.eval()
    with torch.no_grad():
        metrics = metric_values(model, data[options.evaluate_on][:])
    return Run(metrics, scalarizer.weights.tolist(), history)


def measure_cpu_seconds(data: OverlaidDigits, options: argparse.Namespace) -> dict[str, float]:
    """CPU time of all optimizer steps of one training by each method, the methods taking their steps in turn."""
    loader = batches(data, options.batch_size, shuffle=True)
    steps = options.epochs * len(loader)
    built = {method: build(weighting, TASKS, steps, options.lr) for method, weighting in METHODS.items()}
    seconds = dict.fromkeys(METHODS, 0.0)
    with tqdm(total=steps, desc="all methods in turn, timed", unit="step") as bar:
        for batch in itertools.chain.from_iterable(loader for _ in range(options.epochs)):
            for method, (model, optimizer, scalarizer) in built.items():
                start = time.process_time()
                scalarizer(compute_losses(model, batch, reconstruction=options.reconstruction)).backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds[method] += time.process_time() - start
            bar.update()
    return seconds


# ---- all runs, and what they say -----------------------------------------------------------------------------------


@dataclass
class Results:
    """All runs of the demo.

    Attributes:
        single: Metrics of the single-task references, for each seed.
        runs: Runs of each method, for each seed; the first with its gradients recorded all along.
        cpu_seconds: CPU time of all optimizer steps of a training by each method.
    """

    single: list[dict[str, float]]
    runs: dict[str, list[Run]]
    cpu_seconds: dict[str, float]

    def drops(self, method: str) -> list[float]:
        """Δm of each seed, against the single-task references of the same seed."""
        return [
            report.relative_drop(run.metrics, single, higher_is_better=HIGHER_IS_BETTER)
            for run, single in zip(self.runs[method], self.single, strict=True)
        ]

    def weights(self, method: str) -> list[float]:
        """Mean over seeds of the weights after training, scaled to ``sum(w) = T``."""
        return [
            statistics.fmean(column) for column in zip(*(scaled(run.weights) for run in self.runs[method]), strict=True)
        ]

    def intervals(self) -> dict[str, dict[str, report.Interval]]:
        """Each metric, and Δm, of each method and of the single-task references."""
        metrics = {SINGLE: self.single, **{method: [run.metrics for run in self.runs[method]] for method in METHODS}}
        table = {
            method: {LABELS[task]: report.interval(row[task] for row in rows) for task in TASKS}
            for method, rows in metrics.items()
        }
        for method in METHODS:
            table[method][DROP] = report.interval(self.drops(method))
        return table


def run_all(options: argparse.Namespace) -> Results:
    """Train everything."""
    data = overlaid_digits(pairs_per_image=options.pairs_per_image)
    single: list[dict[str, float]] = []
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        references = {task: train(f"{SINGLE} {task}", "uniform", (task,), data, seed, options) for task in TASKS}
        single.append({task: run.metrics[task] for task, run in references.items()})
        for method, weighting in METHODS.items():
            record_every = options.record_every if seed == 0 else None
            runs[method].append(train(method, weighting, TASKS, data, seed, options, record_every=record_every))
    return Results(single, runs, measure_cpu_seconds(data["train"], options))


def results_table(results: Results, *, markdown: bool) -> str:
    """Metrics, Δm, relative time and weights of each method."""
    header = ["method", *LABELS.values(), DROP, "CPU time", "weights left : right : image"]
    rows = []
    for method, intervals in results.intervals().items():
        cells = [f"{intervals[label]:{'.2f' if label == LABELS['image'] else '.1f'}}" for label in LABELS.values()]
        if method == SINGLE:
            rows.append([method, *cells, "0", "", ""])
        else:
            weights = " : ".join(f"{weight:.2g}" for weight in results.weights(method))
            time_ratio = results.cpu_seconds[method] / results.cpu_seconds["unitary"]
            rows.append([method, *cells, f"{intervals[DROP]:.1f}", f"{time_ratio:.2f}", weights])
    return report.table(header, rows, markdown=markdown)


def verdicts(results: Results) -> list[str]:
    """For AutoScale against each other method: better, worse, or not told apart; by the difference within seeds."""
    lines = []
    for other in (method for method in METHODS if method != "AutoScale"):
        pairs = zip(results.drops("AutoScale"), results.drops(other), strict=True)
        difference = report.interval(ours - theirs for ours, theirs in pairs)
        if math.isnan(difference.half_width):
            verdict = "one seed tells nothing of the spread"
        elif abs(difference.mean) <= difference.half_width:
            verdict = "no winner: the interval of the difference holds 0"
        else:
            verdict = "AutoScale wins" if difference.mean < 0 else "AutoScale loses"
        lines.append(f"Δm of AutoScale minus Δm of {other}: {difference:.1f} points; {verdict}.")
    return lines


def recorded_stats(row: Mapping[str, float]) -> gradstats.GradStats:
    """The Gramian behind one row of the history."""
    norms = torch.tensor([row[f"gradient/norm/{task}"] for task in TASKS], dtype=torch.float64)
    cosine = torch.eye(len(TASKS), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(TASKS)), 2):
        cosine[i, j] = cosine[j, i] = row[f"gradient/cosine/{TASKS[i]}/{TASKS[j]}"]
    gram = norms[:, None] * cosine * norms[None, :]
    return gradstats.GradStats(gram=gram, names=TASKS, present=torch.ones(len(TASKS), dtype=torch.bool))


def binned_similarity(rows: list[dict[str, float]], weights: list[list[float]]) -> tuple[list[float], list[float]]:
    """Magnitude similarity of the weighted gradients, with Gramians averaged over each of 20 bins of the steps.

    A single batch's gradients are noisy, and a mean over ratios of noisy norms is biased, so Gramians are averaged.
    """
    width = rows[-1]["step"] / 20
    bins: dict[int, list[tuple[float, gradstats.GradStats]]] = {}
    for row, in_force in zip(rows, weights, strict=True):
        bins.setdefault(int((row["step"] - 1) / width), []).append(
            (row["step"], recorded_stats(row).weighted(in_force))
        )
    steps = [statistics.fmean(step for step, _ in members) for members in bins.values()]
    means = [gradstats.GradStats.mean([stats for _, stats in members]) for members in bins.values()]
    return steps, [float(stats.mean_magnitude_similarity) for stats in means]


def scaled(weights: list[float]) -> list[float]:
    """Weights scaled to ``sum(w) = T``: their ratios are what methods can be compared by."""
    return [len(weights) * weight / sum(weights) for weight in weights]


def pictures(results: Results) -> dict[str, Any]:
    """Figures by file name; those of weights and gradients show the first seed."""
    weights, similarity, mean = {}, {}, {}
    for method, runs in results.runs.items():
        rows = [row for row in runs[0].history.steps if "gradient/mean_cosine" in row]
        in_force = [[row[f"weight/{task}"] for task in TASKS] for row in rows]
        weights[method] = ([row["step"] for row in rows], [scaled(w) for w in in_force])
        similarity[method] = binned_similarity(rows, in_force)
        mean[method] = gradstats.GradStats.mean([recorded_stats(row) for row in rows])
    return {
        "results.png": report.plot_intervals(results.intervals(), reference=SINGLE),
        "weights.png": report.plot_weights(weights, TASKS, ylabel="task weight, scaled to sum 3"),
        "magnitude_similarity.png": report.plot_curves(
            similarity, ylabel="magnitude similarity of\nweighted gradients (1: equal)", ylim=(0, 1.02)
        ),
        "cosine.png": report.plot_stats(mean["unitary"]),
    }


def write_results(results: Results, options: argparse.Namespace, minutes: float) -> None:
    """Tables, numbers and pictures into the results folder, each file written atomically."""
    folder = options.results_dir
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "method": method,
            "seed": seed,
            **run.metrics,
            "delta_m_percent": drop,
            **{f"weight_{task}": weight for task, weight in zip(TASKS, run.weights, strict=True)},
        }
        for method in METHODS
        for seed, (run, drop) in enumerate(zip(results.runs[method], results.drops(method), strict=True))
    ]
    rows += [{"method": SINGLE, "seed": seed, **metrics} for seed, metrics in enumerate(results.single)]
    columns = io.StringIO()
    writer = csv.DictWriter(columns, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    report.write_file(folder / "results.csv", columns.getvalue())

    summary = {
        "options": {**vars(options), "results_dir": str(folder)},
        "versions": {
            "gradstats": gradstats.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "minutes": minutes,
        "runs": rows,
        "summary": {
            method: {
                label: {"mean": i.mean, "half_width": i.half_width if math.isfinite(i.half_width) else None}
                for label, i in row.items()
            }
            for method, row in results.intervals().items()
        },
        "cpu_seconds": results.cpu_seconds,
        "verdicts": verdicts(results),
    }
    report.write_file(folder / "results.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    report.write_file(folder / "results.md", results_table(results, markdown=True) + "\n")
    for name, figure in pictures(results).items():
        report.save_figure(figure, folder / name)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (3)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each training (12)")
    parser.add_argument("--pairs-per-image", type=int, default=8, help="pairs in which each digit is the left one (8)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs in a batch (64)")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's learning rate, cosine decay to 0 (3e-3)")
    parser.add_argument(
        "--reconstruction",
        choices=("sum", "mean"),
        default="sum",
        help="squared error summed (as in autoencoders with a Gaussian likelihood) or averaged over pixels",
    )
    parser.add_argument("--record-every", type=int, default=10, help="steps between records with the first seed (10)")
    parser.add_argument(
        "--evaluate-on", choices=("test", "valid"), default="test", help="pairs that the metrics are measured on (test)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch (1: the network is so small that more only wait for each other)",
    )
    parser.add_argument(
        "--results-dir", type=Path, default=Path("demo-results"), help="where results go (demo-results)"
    )
    options = parser.parse_args(arguments)
    for name in ("seeds", "epochs", "pairs_per_image", "batch_size", "record_every", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the demo."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning").setLevel(logging.WARNING)
    start = time.perf_counter()
    results = run_all(options)
    minutes = (time.perf_counter() - start) / 60
    write_results(results, options, minutes)
    print(f"\nOverlaid digits, {options.evaluate_on} pairs; seeds: {options.seeds}; {minutes:.1f} minutes.\n")
    print(results_table(results, markdown=False))
    print(NOTES)
    print("\n".join(verdicts(results)))
    print(f"\nTables and pictures are in {options.results_dir}/.")


if __name__ == "__main__":
    main()

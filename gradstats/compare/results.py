"""What finished runs say: one tidy table of all numbers, a summary with intervals, and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gradstats import report
from gradstats.compare.experiment import Metric
from gradstats.compare.runs import SINGLE, UNITARY, Run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

DROP, RANK, TIME, MEMORY = "Δm (%), lower is better", "mean rank", "time", "memory"
_MOST_COLUMNS = 6  # of metrics in a table; more are averaged over tasks that are measured alike
NOTES = """\
±: 95 % t-interval of the mean over seeds. Δm: mean relative drop against the single-task models of the same seed.
Mean rank: of the means over seeds, averaged over metrics; 1 is best. Time and memory: relative to unitary scalarization
(uniform), of the optimizer steps alone and of the growth of the peak. Every model is that of its best validation epoch.
Differences to unitary are those within seeds; of twenty methods that are no different, one is told apart by chance.
"""


@dataclass(frozen=True)
class Trained:
    """A finished run: what was run, and what its file holds."""

    run: Run
    content: Mapping[str, Any]

    @cached_property
    def metrics(self) -> dict[Metric, float]:
        """Value of each metric on the test data."""
        return {Metric(m["task"], m["name"], m["higher_is_better"]): m["value"] for m in self.content["metrics"]}


def read(runs: Sequence[Run], folder: Path) -> list[Trained]:
    """The runs with their files."""
    return [Trained(run, json.loads((folder / run.file).read_text(encoding="utf-8"))) for run in runs]


class Results:
    """The numbers of a comparison.

    Args:
        trained: All finished runs, single-task references among them.
        metrics: The metrics, in the order of the experiment.

    Attributes:
        trained: As given.
        metrics: As given.
        methods: Weightings with at least one finished run, in the order of the runs.
    """

    def __init__(self, trained: Sequence[Trained], metrics: Sequence[Metric]) -> None:
        self.trained, self.metrics = list(trained), list(metrics)
        self._single: dict[int, dict[Metric, float]] = {}
        self._by_method: dict[str, list[Trained]] = {}
        for one in trained:
            if len(one.run.tasks) == 1:
                self._single.setdefault(one.run.seed, {}).update(one.metrics)
            else:
                self._by_method.setdefault(one.run.weighting, []).append(one)
        self.methods = list(self._by_method)

    def drops(self, method: str) -> dict[int, float]:
        """Δm in percent for each seed whose single-task models are all there."""
        return {
            one.run.seed: report.relative_drop(
                {str(m): one.metrics[m] for m in self.metrics},
                {str(m): self._single[one.run.seed][m] for m in self.metrics},
                higher_is_better={str(m): m.higher_is_better for m in self.metrics},
            )
            for one in self._by_method[method]
            if len(self._single.get(one.run.seed, {})) == len(self.metrics)
        }

    def mean_ranks(self) -> dict[str, float]:
        """For each method the mean over metrics of its rank by the mean over seeds; equal means share a rank."""
        ranks: dict[str, list[float]] = {method: [] for method in self.methods}
        for metric in self.metrics:
            sign = -1.0 if metric.higher_is_better else 1.0
            means = {
                method: sign * statistics.fmean(one.metrics[metric] for one in ones)
                for method, ones in self._by_method.items()
            }
            for method, mean in means.items():
                better = sum(other < mean for other in means.values())
                equal = sum(other == mean for other in means.values())
                ranks[method].append(better + (1 + equal) / 2)
        return {method: statistics.fmean(values) for method, values in ranks.items()}

    def relative(self, what: str) -> dict[str, float]:
        """Mean ``"seconds"`` or ``"memory"`` of each method over that of unitary; NaN where not measured."""
        means = {
            method: statistics.fmean(math.nan if one.content[what] is None else one.content[what] for one in ones)
            for method, ones in self._by_method.items()
        }
        unitary = means.get(UNITARY, math.nan)
        return {method: mean / unitary if unitary else math.nan for method, mean in means.items()}

    def intervals(self) -> dict[str, dict[str, report.Interval]]:
        """For each method, and the single-task models, each column of metrics and Δm."""
        rows = {method: [one.metrics for one in ones] for method, ones in self._by_method.items()}
        complete = [metrics for metrics in self._single.values() if len(metrics) == len(self.metrics)]
        if complete:
            rows = {SINGLE: complete, **rows}
        table = {
            method: {
                label: report.interval(statistics.fmean(values[m] for m in members) for values in by_seed)
                for label, members in self._columns().items()
            }
            for method, by_seed in rows.items()
        }
        for method in self.methods:
            if drops := self.drops(method):
                table[method][DROP] = report.interval(drops.values())
        return table

    def _columns(self) -> dict[str, list[Metric]]:
        """The metrics that each column of the table averages: one, or, of many, all that are measured alike."""
        if len(self.metrics) <= _MOST_COLUMNS:
            return {str(metric): [metric] for metric in self.metrics}
        alike: dict[str, list[Metric]] = {}
        for metric in self.metrics:
            alike.setdefault(metric.name, []).append(metric)
        return {f"{name}, mean of {len(members)}": members for name, members in alike.items()}

    # ---- what is written ----------------------------------------------------------------------------------------

    def table(self, *, markdown: bool = False) -> str:
        """A row a method, best Δm first."""
        intervals, ranks = self.intervals(), self.mean_ranks()
        seconds, memory = self.relative("seconds"), self.relative("memory")
        columns = {
            label: _cells({m: row.get(label) for m, row in intervals.items()}) for label in (*self._columns(), DROP)
        }

        def cells(method: str) -> list[str]:
            row = [column[method] for column in columns.values()]
            if method == SINGLE:
                return [method, *row[:-1], "0", "", "", ""]
            return [method, *row, f"{ranks[method]:.1f}", *(f"{x[method]:.2f}" for x in (seconds, memory))]

        def place(method: str) -> float:
            drop = intervals[method].get(DROP)
            return -math.inf if method == SINGLE else math.inf if drop is None else drop.mean

        rows = [cells(method) for method in sorted(intervals, key=place)]
        return report.table(["method", *columns, RANK, TIME, MEMORY], rows, markdown=markdown)

    def verdicts(self) -> list[str]:
        """Each method against unitary by the difference of Δm within seeds: better, worse, or not told apart."""
        if UNITARY not in self.methods:
            return []
        unitary, lines = self.drops(UNITARY), []
        for method in self.methods:
            shared = {seed: drop - unitary[seed] for seed, drop in self.drops(method).items() if seed in unitary}
            if method != UNITARY and shared:
                lines.append(f"{method} minus unitary, Δm: {_verdict(report.interval(shared.values()))}")
        return lines

    def tidy(self) -> str:
        """CSV with a row for each run and metric."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(
            [
                "method",
                "seed",
                "task",
                "metric",
                "higher_is_better",
                "value",
                "weight",
                "best_epoch",
                "seconds",
                "memory",
            ]
        )
        for one in self.trained:
            content = one.content
            for metric, value in one.metrics.items():
                writer.writerow(
                    [
                        SINGLE if len(one.run.tasks) == 1 else one.run.weighting,
                        one.run.seed,
                        metric.task,
                        metric.name,
                        metric.higher_is_better,
                        value,
                        content["weights"][metric.task][-1],
                        content["best_epoch"],
                        content["seconds"],
                        content["memory"],
                    ]
                )
        return text.getvalue()

    def pictures(self) -> dict[str, Any]:
        """Figures by file name; the weights are those of the first seed."""
        weights = {}
        for method, ones in self._by_method.items():
            logged = ones[0].content["weights"]
            steps, *columns = logged.values()
            weights[method] = (steps, list(zip(*columns, strict=True)))
        intervals = self.intervals()
        tasks = list(dict.fromkeys(metric.task for metric in self.metrics))
        reference = SINGLE if SINGLE in intervals else None
        return {
            "results.png": report.plot_intervals(intervals, reference=reference),
            "weights.png": report.plot_weights(weights, tasks),
        }

    def _provenance(self) -> str:
        """What the numbers come from."""
        first = self.trained[0].content
        versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        seeds = len({one.run.seed for one in self.trained})
        data = [] if self.trained[0].run.source.data is None else ["--data", "FOLDER"]
        command = ["gradstats", "compare", first["identity"]["experiment"], *data, "--out", "FOLDER"]
        command += ["--seeds", str(seeds)]
        command += ["--weightings", *self.methods]
        command += ["--set", *(f"{name}={value}" for name, value in first["identity"]["settings"].items())]
        return f"Made on {first['device']} with {versions} by\n\n    {shlex.join(command)}"

    def write(self, folder: Path) -> None:
        """``results.csv``, ``results.md`` and the pictures into ``folder``, each file atomically."""
        report.write_file(folder / "results.csv", self.tidy())
        verdicts = "\n".join(f"- {line}" for line in self.verdicts())
        parts = [self.table(markdown=True), NOTES, verdicts, self._provenance()]
        report.write_file(folder / "results.md", "\n\n".join(part.strip() for part in parts) + "\n")
        for name, figure in self.pictures().items():
            report.save_figure(figure, folder / name)


def _cells(column: Mapping[str, report.Interval | None]) -> dict[str, str]:
    """Means with their half widths, all with so many decimals that the largest mean has three significant digits."""
    largest = max((abs(interval.mean) for interval in column.values() if interval is not None), default=0.0)
    decimals = min(max(2 - math.floor(math.log10(largest)), 0), 4) if largest else 2
    return {
        method: "–" if interval is None else format(interval, f".{decimals}f") for method, interval in column.items()
    }


def _verdict(difference: report.Interval) -> str:
    if math.isnan(difference.half_width):
        return f"{difference:.2f} points; one seed tells nothing of the spread"
    if abs(difference.mean) <= difference.half_width:
        return f"{difference:.2f} points; not told apart: the interval holds 0"
    return f"{difference:.2f} points; {'better' if difference.mean < 0 else 'worse'}"

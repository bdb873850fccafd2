"""Results of experiments: relative drop, intervals, tables, and pictures in one style.

Plot functions take plain data and return a ``matplotlib.figure.Figure`` that belongs to no window and no global state;
:func:`save_figure` writes it. They need the extra ``plot`` (matplotlib); everything else here does not.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

from gradstats._files import written_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from gradstats.stats import GradStats

P = ParamSpec("P")

# Okabe & Ito's palette, which colour-blind readers can tell apart, without its yellow, too pale for thin lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)), (0, (1, 3)))
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_MUTED = "#666666"
_DPI = 160
_MOST_ANNOTATED = 12  # columns; beyond, numbers in the cells of a heat map are too small to read
_MOST_LABELLED = 30  # rows or columns; beyond, names would overlap
_OVER_PAIRS = {  # for each metric its title and its lowest value; the highest is 1
    "mean_cosine": ("mean cosine", -1),
    "conflict_rate": ("conflict rate", 0),
    "mean_magnitude_similarity": ("magnitude\nsimilarity", 0),
}


# ---- numbers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """Mean of a few runs with Student's t-interval, for runs that are independent and roughly normal.

    ``str`` and f-strings give ``mean ± half width``; a format such as ``{interval:.1f}`` holds for both numbers.

    Attributes:
        mean: Mean of the values.
        half_width: Half the width of the interval; NaN with fewer than two values.
        values: The values themselves.
        confidence: Coverage of the interval, such as 0.95.
    """

    mean: float
    half_width: float
    values: tuple[float, ...]
    confidence: float = 0.95

    def __format__(self, spec: str) -> str:
        if math.isnan(self.half_width):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} ± {self.half_width:{spec}}"

    def __str__(self) -> str:
        return format(self, ".3g")


def interval(values: Iterable[float], *, confidence: float = 0.95) -> Interval:
    """Mean of ``values`` with the two-sided t-interval ``mean ± t s / sqrt(n)``, ``s`` with ``n - 1`` in the divisor.

    Args:
        values: At least one finite number, such as one result for each seed.
        confidence: Coverage, in (0, 1).

    Raises:
        ValueError: If there is no value, one is not finite, or ``confidence`` is outside (0, 1).
    """
    numbers = tuple(float(value) for value in values)
    if not numbers or not all(math.isfinite(value) for value in numbers):
        raise ValueError(f"values: expected at least one number, all finite, got {list(numbers)}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: expected a number in (0, 1), got {confidence!r}")
    count = len(numbers)
    mean = math.fsum(numbers) / count
    if count == 1:
        return Interval(mean, math.nan, numbers, confidence)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in numbers) / (count - 1))
    return Interval(mean, _t_quantile(confidence, count - 1) * deviation / math.sqrt(count), numbers, confidence)


def _t_quantile(confidence: float, freedom: int) -> float:
    """``t`` with ``P(|X| < t) = confidence`` for Student's X, by bisection on ``atan(t / sqrt(freedom))``."""
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_coverage(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _t_coverage(angle: float, freedom: int) -> float:
    """``P(|X| < sqrt(freedom) tan(angle))``: the finite sums 26.7.3 and 26.7.4 of Abramowitz & Stegun (1964)."""
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k - 1 + odd) / (2 * k + odd)
    return (2 / math.pi) * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def relative_drop(
    metrics: Mapping[str, float], reference: Mapping[str, float], *, higher_is_better: Mapping[str, bool]
) -> float:
    """Mean relative drop Δm against a reference, in percent; negative where the method beats the reference.

    The mean over metrics of ``(reference - metric) / reference`` where higher is better and of
    ``(metric - reference) / reference`` where lower is (Maninis et al., 2019), usually against single-task models.

    Args:
        metrics: Value of each metric.
        reference: Value of each metric for the reference; positive.
        higher_is_better: For each metric, whether larger values are better.

    Raises:
        ValueError: If the three do not name the same metrics, none is given, or a reference is not positive.
    """
    if not metrics or not (set(metrics) == set(reference) == set(higher_is_better)):
        raise ValueError(
            "metrics, reference and higher_is_better: expected the same names, at least one, "
            f"got {sorted(metrics)}, {sorted(reference)} and {sorted(higher_is_better)}"
        )
    for name, value in reference.items():
        if not value > 0:
            raise ValueError(f"reference: expected a positive value for {name!r}, got {value!r}")
    drops = [
        (reference[name] - value if higher_is_better[name] else value - reference[name]) / reference[name]
        for name, value in metrics.items()
    ]
    return 100.0 * math.fsum(drops) / len(drops)


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """A table of text: first column to the left, the others to the right.

    Args:
        header: One title for each column.
        rows: Cells of each row, as many as there are titles.
        markdown: Markdown (GitHub's tables) instead of fixed-width text with a rule under the header.

    Raises:
        ValueError: If there is no column, or a row has another number of cells than the header.
    """
    if not header:
        raise ValueError("header: expected at least one column, got none")
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"rows: expected {len(header)} cells in row {number}, got {len(row)}: {list(row)}")
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    if markdown:
        widths = [max(width, 3) for width in widths]
    padded = [
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    if not markdown:
        padded.insert(1, ["-" * width for width in widths])
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# ---- pictures -------------------------------------------------------------------------------------------------------


def _styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a plot function in our style, which holds for what it creates and for nothing else."""

    @functools.wraps(plot)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'gradstats[plot]'") from error
        with rc_context(_STYLE):
            return plot(*args, **kwargs)

    return styled


@_styled
def plot_stats(stats: GradStats) -> Figure:
    """Heat map of the cosines between task gradients, with the gradient norms beside it.

    Args:
        stats: Any :class:`GradStats`. Absent tasks, and cosines that are not finite, are left grey.

    Raises:
        ImportError: If matplotlib is not installed (extra ``plot``).
    """
    size = max(2.4, 0.55 * stats.num_tasks if stats.num_tasks <= _MOST_ANNOTATED else 6.0)
    figure, (left, right) = _figure(1, 2, width=2 * size + 2.2, height=size + 0.9, ratios=(1.25, 1), share_y=False)
    image = _cosines(left, _known_cosine(stats), stats.names, aspect="equal")
    left.set_yticks(range(stats.num_tasks), stats.names)
    figure.colorbar(image, ax=left, ticks=(-1, 0, 1), shrink=0.85, pad=0.03).outline.set_visible(False)
    _norms(right, [norm if there else None for norm, there in zip(stats.norms.tolist(), stats.present, strict=True)])
    return figure


def _known_cosine(stats: GradStats) -> list[list[float]]:
    """Cosines ``[T, T]``, NaN for absent tasks."""
    present = stats.present.cpu()
    known = present[:, None] & present[None, :]
    cosine: list[list[float]] = stats.cosine.cpu().masked_fill(~known, math.nan).tolist()
    return cosine


def _cosines(
    panel: Axes, cosine: Sequence[Sequence[float]], columns: Sequence[str], *, aspect: Literal["equal", "auto"]
) -> AxesImage:
    """Heat map of cosines, with numbers and names of the columns where there is room for them."""
    image = panel.imshow(cosine, cmap="RdBu_r", vmin=-1, vmax=1, aspect=aspect)
    panel.set_title("cosine of task gradients")
    _bare(panel)
    panel.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 3 else 90)
    if len(columns) <= _MOST_ANNOTATED and len(cosine) <= _MOST_LABELLED:
        for i, row in enumerate(cosine):
            for j, value in enumerate(row):
                text = "–" if math.isnan(value) else f"{value:.2f}".replace("-", "−")
                panel.text(j, i, text, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    return image


def _bare(panel: Axes) -> None:
    """A panel filled with colours: grey where there is no number, without lines around them."""
    panel.set_facecolor("#D9D9D9")
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def _norms(panel: Axes, norms: Sequence[float | None]) -> None:
    """A dot for each norm on a logarithmic axis, with the numbers to the right; None stands for an absent task."""
    drawn = {row: norm for row, norm in enumerate(norms) if norm is not None and math.isfinite(norm) and norm > 0}
    panel.plot(list(drawn.values()), list(drawn), "o", color=COLOURS[0])
    panel.set_title("gradient norm")
    panel.set_xscale("log")
    decades = [math.log10(norm) for norm in drawn.values()] or [0.0]
    panel.set_xlim(10.0 ** math.floor(min(decades) - 0.1), 10.0 ** (math.floor(max(decades) + 0.1) + 1))
    panel.set_ylim(len(norms) - 0.5, -0.5)
    panel.yaxis.tick_right()
    panel.set_yticks(range(len(norms)), ["absent" if norm is None else f"{norm:.4g}" for norm in norms])
    panel.tick_params(axis="y", length=0)


@_styled
def conflict_by_group(stats: GradStats) -> Figure:
    """Where in the network tasks conflict: cosines of all pairs of tasks by group, and the means over pairs beside.

    Rows are the groups in the order in which they were collected, for a module the order of its parameters, with the
    whole Gramian as the last row, "all". A task without a gradient in a group is left out of that row (its metrics
    count pairs of the other tasks), and what is not known is left grey or blank.

    Args:
        stats: Statistics with groups, as collected with ``group_by``, of at least two tasks.

    Raises:
        ImportError: If matplotlib is not installed (extra ``plot``).
        ValueError: If ``stats`` has no groups or fewer than two tasks.
    """
    _check_groups(stats, "stats")
    rows = [_reached(group) for group in (*stats.groups.values(), stats)]
    pairs = list(itertools.combinations(range(stats.num_tasks), 2))
    names = [f"{stats.names[i]}\n{stats.names[j]}" for i, j in pairs]
    labelled = len(pairs) <= _MOST_LABELLED
    width = max(2.0, 0.5 * len(pairs)) if labelled else 7.0
    figure, (left, *others) = _figure(
        1, 4, width=width + 6.2, height=_height_of_groups(len(rows)), ratios=(width, 1.5, 1.5, 1.5)
    )
    cosines = [[cosine[i][j] for i, j in pairs] for cosine in map(_known_cosine, rows)]
    _cosines(left, cosines, names if labelled else [], aspect="auto")
    if not labelled:
        left.set_xlabel(f"{len(pairs)} pairs of tasks")
    _label_groups(left, [*stats.groups, "all"])
    left.axhline(len(rows) - 1.5, color="white", linewidth=3.0)
    for panel, (metric, (title, lowest)) in zip(others, _OVER_PAIRS.items(), strict=True):
        panel.plot([float(getattr(row, metric)) for row in rows], range(len(rows)), "o", color=COLOURS[0])
        panel.set_title(title)
        panel.set_xlim(lowest - 0.06, 1.06)
        panel.set_xticks((lowest, 0, 1) if lowest else (0, 0.5, 1))
        panel.tick_params(axis="y", length=0)
    return figure


@_styled
def conflict_over_time(steps: Mapping[int, GradStats] | Iterable[tuple[int, GradStats]]) -> Figure:
    """Mean cosine of the task gradients by group and step; a cell reaches half-way to the neighbouring steps.

    The mean is over pairs of tasks that have a gradient in the group; grey is where there is none, or it is not finite.
    Single batches make noisy cosines: to see trends, give means over a few steps (:meth:`GradStats.mean`).

    Args:
        steps: Statistics with the same groups for at least one step: a mapping from step, or pairs, in any order.

    Raises:
        ImportError: If matplotlib is not installed (extra ``plot``).
        ValueError: If there is no step or one comes twice, if one has no groups or fewer than two tasks, or if groups
            differ between steps.
    """
    listed = list(steps.items() if isinstance(steps, Mapping) else steps)
    by_step = dict(sorted(listed, key=lambda pair: pair[0]))
    if not listed:
        raise ValueError("steps: expected at least one, got none")
    if len(by_step) < len(listed):
        raise ValueError(f"steps: expected different ones, got {[step for step, _ in listed]}")
    first, *_ = by_step
    groups = list(by_step[first].groups)
    for step, stats in by_step.items():
        _check_groups(stats, f"steps: step {step}")
        if stats.groups.keys() != by_step[first].groups.keys():
            raise ValueError(
                f"steps: expected the same groups at each, got {groups} at step {first} "
                f"and {list(stats.groups)} at step {step}"
            )
    values = [[float(_reached(stats.groups[group]).mean_cosine) for stats in by_step.values()] for group in groups]
    limit = max((abs(value) for row in values for value in row if not math.isnan(value)), default=0.0) or 1.0
    figure, (panel,) = _figure(1, 1, width=7.4, height=_height_of_groups(len(groups)))
    rows = [row - 0.5 for row in range(len(groups) + 1)]
    image = panel.pcolormesh(_edges(list(by_step)), rows, values, cmap="RdBu_r", vmin=-limit, vmax=limit)
    _bare(panel)
    _label_groups(panel, groups)
    panel.tick_params(axis="x", length=3)
    panel.set_xlabel("optimizer step")
    bar = figure.colorbar(image, ax=panel, pad=0.02, label="mean cosine of task pairs")
    bar.outline.set_visible(False)
    return figure


def _check_groups(stats: GradStats, argument: str) -> None:
    if not stats.groups:
        raise ValueError(
            f"{argument}: expected statistics by group, as collected with group_by='module', got no groups"
        )
    if stats.num_tasks < 2:
        raise ValueError(f"{argument}: expected at least two tasks, got {stats.num_tasks}")


def _reached(stats: GradStats) -> GradStats:
    """The same statistics with tasks that have no gradient there as absent, instead of at cosine 0 to all others."""
    return replace(stats, present=stats.present & (stats.norms != 0))


def _height_of_groups(count: int) -> float:
    return 1.1 + 0.3 * min(max(count, 4), _MOST_LABELLED)


def _label_groups(panel: Axes, groups: Sequence[str]) -> None:
    """Names from the top; of very many, every k-th and the last. The model itself has an empty name."""
    every = math.ceil(len(groups) / _MOST_LABELLED)
    rows = range((len(groups) - 1) % every, len(groups), every)
    panel.set_yticks(rows, [groups[row] or "(model)" for row in rows])
    panel.set_ylim(len(groups) - 0.5, -0.5)


def _edges(centres: Sequence[float]) -> list[float]:
    """Ends of cells around ``centres`` that meet half-way; the outer two lie symmetrically."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(centres)]
    if not middles:
        return [centres[0] - 0.5, centres[0] + 0.5]
    return [2 * centres[0] - middles[0], *middles, 2 * centres[-1] - middles[-1]]


@_styled
def plot_weights(
    runs: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]],
    names: Sequence[str],
    *,
    ylabel: str = "task weight",
) -> Figure:
    """Task weights over time, one panel a method; a logarithmic axis where all weights are positive.

    Args:
        runs: For each method, the steps ``[S]`` and the weights in force at them ``[S, T]``.
        names: Names of the ``T`` tasks.
        ylabel: What is shown, such as how the weights are scaled.

    Raises:
        ImportError: If matplotlib is not installed (extra ``plot``).
        ValueError: If there is no run, or one has no step, or weights of another shape than ``[S, T]``.
    """
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    for method, (steps, weights) in runs.items():
        if not len(steps) or len(steps) != len(weights) or any(len(row) != len(names) for row in weights):
            raise ValueError(
                f"runs: expected {len(names)} weights at each of {len(steps)} > 0 steps for {method!r}, "
                f"got rows of {sorted({len(row) for row in weights})} at {len(weights)}"
            )
    columns = min(len(runs), 4)
    rows = math.ceil(len(runs) / columns)
    figure, panels = _figure(rows, columns, width=max(4.2, 1.2 + 3.1 * columns), height=0.5 + 2.8 * rows)
    for panel, (method, (steps, weights)) in zip(panels, runs.items(), strict=False):
        for task, name in enumerate(names):
            _line(panel, steps, [float(row[task]) for row in weights], name, task)
        panel.set_title(method)
        panel.set_xlabel("optimizer step")
    for panel in panels[::columns]:
        panel.set_ylabel(ylabel)
    for panel in panels[len(runs) :]:
        panel.set_visible(False)
    if all(float(weight) > 0 for _, weights in runs.values() for row in weights for weight in row):
        panels[0].set_yscale("log")
    _legend_above(figure, panels[0])
    return figure


@_styled
def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    ylabel: str,
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """One metric over time for several methods.

    Args:
        curves: For each method, the steps and the metric's value at them.
        ylabel: What the metric is, with its unit.
        ylim: Ends of the vertical axis, such as (0, 1); None to fit the data.

    Raises:
        ImportError: If matplotlib is not installed (extra ``plot``).
        ValueError: If there is no curve, or one is empty or has steps and values of different number.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    for method, (steps, values) in curves.items():
        if not len(steps) or len(steps) != len(values):
            raise ValueError(
                f"curves: expected one value a step for {method!r}, got {len(values)} for {len(steps)} steps"
            )
    figure, (panel,) = _figure(1, 1, width=7.0, height=3.4)
    for position, (method, curve) in enumerate(curves.items()):
        _line(panel, *curve, method, position)
    panel.set_xlabel("optimizer step")
    panel.set_ylabel(ylabel)
    if ylim is not None:
        panel.set_ylim(*ylim)
    _legend_above(figure, panel)
    return figure


@_styled
def plot_intervals(results: Mapping[str, Mapping[str, Interval]], *, reference: str | None = None) -> Figure:
    """Results of several methods: one panel a metric, a mean with its interval for each method, single runs as dots.

    Args:
        results: For each method, the interval of each metric. Keys of the metrics are the panels' labels, so name
            the unit there. A method may lack metrics.
        reference: Method whose mean is drawn as a dashed line through each panel.

    Raises:
        ImportError: If matplotlib is not installed (extra ``plot``).
        ValueError: If there is no method or no metric, or ``reference`` is not among the methods.
    """
    metrics = list(dict.fromkeys(metric for row in results.values() for metric in row))
    if not metrics:
        raise ValueError("results: expected at least one method with at least one metric, got none")
    if reference is not None and reference not in results:
        raise ValueError(f"reference: expected one of {list(results)}, got {reference!r}")
    # The reference stays neutral, so that the others have the colours that they have in the other pictures.
    others = [method for method in results if method != reference]
    colours = {method: COLOURS[position % len(COLOURS)] for position, method in enumerate(others)}
    if reference is not None:
        colours[reference] = _MUTED
    columns = min(len(metrics), 4)
    rows = math.ceil(len(metrics) / columns)
    height = rows * (0.95 + 0.33 * len(results))
    figure, panels = _figure(rows, columns, width=1.3 + 2.1 * columns, height=height)
    for panel, metric in zip(panels, metrics, strict=False):
        for position, (method, row) in enumerate(results.items()):
            if metric in row:
                _interval(panel, position, row[metric], colours[method])
            if method == reference and metric in row:
                panel.axvline(row[metric].mean, color=_MUTED, linewidth=1.0, linestyle="--", zorder=1)
        panel.set_yticks(range(len(results)), list(results))
        panel.set_ylim(len(results) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.grid(visible=False, axis="y")
        panel.margins(x=0.12)
        panel.locator_params(axis="x", nbins=4)
        panel.set_xlabel(metric)
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    return figure


@dataclass(frozen=True)
class Roofline:
    """What a machine can do at most, and what ways to a Gramian did.

    Attributes:
        read: Bandwidth of memory, GB/s.
        peak: Rate of multiplications and additions, GFLOP/s.
        bytes_per_entry: Size of a gradient's entry.
        methods: For each way, GFLOP/s by number of tasks, with ``T (T + 1)`` operations an entry.
    """

    read: float
    peak: float
    bytes_per_entry: int
    methods: Mapping[str, Mapping[int, float]]


@_styled
def plot_roofline(rooflines: Mapping[str, Roofline]) -> Figure:
    """Rates of ways to a Gramian under the limits that memory and arithmetic set, on logarithmic axes.

    Each entry of the ``T`` gradients is read once for ``T + 1`` operations, so few tasks are bound by memory (the
    slope) and many by arithmetic (the level).

    Args:
        rooflines: A panel for each, with its title.

    Raises:
        ImportError: If matplotlib is not installed (extra ``plot``).
        ValueError: If there is no panel.
    """
    if not rooflines:
        raise ValueError("rooflines: expected at least one, got none")
    figure, panels = _figure(1, len(rooflines), width=max(8.5, 4.2 * len(rooflines)), height=4.2)
    names = list(dict.fromkeys(name for roofline in rooflines.values() for name in roofline.methods))
    for panel, (title, roofline) in zip(panels, rooflines.items(), strict=True):
        panel.set_title(f"{title}: {roofline.read:.0f} GB/s, {roofline.peak:.0f} GFLOP/s")
        _draw_roofline(panel, roofline, names)
    panels[0].set_ylabel("GFLOP/s")
    _legend_above(figure, panels[0], columns=4)
    return figure


def _draw_roofline(panel: Axes, roofline: Roofline, names: Sequence[str]) -> None:
    tasks = sorted({num_tasks for rates in roofline.methods.values() for num_tasks in rates})
    at = {num_tasks: (num_tasks + 1) / roofline.bytes_per_entry for num_tasks in tasks}
    low, ridge, high = at[tasks[0]] / 1.3, roofline.peak / roofline.read, at[tasks[-1]] * 1.3
    corners = [low, min(max(low, ridge), high), high]
    limit = [min(roofline.peak, roofline.read * corner) for corner in corners]
    panel.plot(corners, limit, color=_MUTED, linewidth=2.6, label="limit")
    for position, name in enumerate(names):
        rates = roofline.methods.get(name, {})
        _line(panel, [at[num_tasks] for num_tasks in rates], list(rates.values()), name, position)
    for line in panel.lines[1:]:
        line.set(marker="o", markersize=4)
    panel.set(xscale="log", yscale="log", xlabel=f"tasks T, at (T + 1) / {roofline.bytes_per_entry} operations a byte")
    panel.set_xticks(list(at.values()), [str(num_tasks) for num_tasks in tasks])
    panel.set_xticks([], minor=True)


def _interval(panel: Axes, position: int, result: Interval, colour: str) -> None:
    spread = 0.0 if math.isnan(result.half_width) else result.half_width
    panel.errorbar(result.mean, position, xerr=spread, fmt="o", color=colour, capsize=3, markersize=6, zorder=3)
    panel.scatter(result.values, [position + 0.24] * len(result.values), s=9, color=colour, alpha=0.55, linewidths=0)


def _line(panel: Axes, steps: Sequence[float], values: Sequence[float], label: str, position: int) -> None:
    """One line in the colour and dashes of its position, so that neither colour nor print is needed to tell."""
    style: Any = DASHES[(position + position // len(COLOURS)) % len(DASHES)]  # another one when colours come again
    panel.plot(steps, values, label=label, color=COLOURS[position % len(COLOURS)], linestyle=style)


def _legend_above(figure: Figure, panel: Axes, *, columns: int = 5) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), columns), handlelength=2.6)


def _figure(
    rows: int,
    columns: int,
    *,
    width: float,
    height: float,
    ratios: Sequence[float] | None = None,
    share_y: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure in our style with its panels row by row; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI)
    figure.set_layout_engine("constrained", w_pad=0.1)  # inches; keeps tick labels of neighbours apart
    panels = figure.subplots(rows, columns, sharey=share_y, squeeze=False, width_ratios=ratios)
    return figure, list(panels.flat)


# ---- files ----------------------------------------------------------------------------------------------------------


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` atomically, in the format of the ending of ``path`` (``.png``, ``.svg``, ``.pdf``)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png")
    write_file(path, buffer.getvalue())


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes so that ``path`` holds the old content or the whole new one, never a part."""
    with written_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)

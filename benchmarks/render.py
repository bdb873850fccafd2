"""What the committed results say: tables in the documentation, a picture, and whether the targets are met.

    python benchmarks/render.py            # rewrites what stands between <!-- table: NAME --> and <!-- end -->
    python benchmarks/render.py --check    # only says whether anything would change

No number in those tables is typed by hand.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cases import MODELS
from methods import APART, FUSED, METHODS, OURS, PLAIN, TASK_BACKWARDS

from gradstats import weighting
from gradstats.report import COLOURS, interval, relative_drop, save_figure, table, write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PICTURE = "docs/images/collect.png"

SLOWER, FATTER = 1.10, 1.02  # a peer must be better by more than noise to count as better
WRONG = 1e-5  # relative error; float32 forward and backward passes leave about 1e-6
LABELS = {
    OURS: "gradstats",
    "loop-stack": "T × grad, stack, matmul",
    "loop": "T × grad, by parameter",
    "vmap-cat": "is_grads_batched, cat, matmul",
    "vmap": "is_grads_batched, by parameter",
    "func": "torch.func",
    "autogram": "TorchJD autogram",
    "autojac": "TorchJD autojac",
    "autojac-loop": "TorchJD autojac, one by one",
    "mtl-backward": "TorchJD mtl_backward",
    "opacus": "Opacus",
    "backpack": "BackPACK",
}
DRAWN = (OURS, "loop-stack", "loop", "vmap", "autogram", "autojac", "mtl-backward")

Cell = Mapping[str, Any]
Results = Mapping[str, Any]

# ---- verdicts on a run of collect.py --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One comparison.

    Attributes:
        what: What is compared.
        value: A ratio, or a number in the unit that ``what`` names.
        limit: The largest value that is good.
    """

    what: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the value is good."""
        return self.value <= self.limit


def find(results: Results, **size: Any) -> Any:
    """The cell of that model, sharing and num_tasks, or None."""
    return next((c for c in results["cells"] if all(c[key] == value for key, value in size.items())), None)


def median(cell: Cell | None, what: str, method: str) -> float | None:
    """Milliseconds or MiB, or None if there is no such number."""
    found = {} if cell is None else cell.get(what, {}).get("methods", {}).get(method, {})
    return found.get("median")


def title(cell: Cell) -> str:
    """A cell in words."""
    return f"{MODELS[cell['model']].title}, {cell['sharing']}, T = {cell['num_tasks']}"


def against_peers(results: Results) -> list[Verdict]:
    """Ours against the best exact peer, in time and memory of every cell; and that ours is right."""
    verdicts = []
    for cell in results["cells"]:
        error = cell.get("time", {}).get("methods", {}).get(OURS, {}).get("error")
        if error is not None and not MODELS[cell["model"]].autocast:  # which rounds gradients far more
            verdicts.append(Verdict(f"{title(cell)}: error", error, WRONG))
        for what, limit in (("time", SLOWER), ("memory", FATTER)):
            peers = {name: median(cell, what, name) for name, method in METHODS.items() if method.kind == "peer"}
            known = {name: value for name, value in peers.items() if value is not None}
            ours = median(cell, what, OURS)
            best = min(known, key=lambda name: known[name], default=None)
            if best is not None and known[best] and ours is not None:
                verdicts.append(Verdict(f"{title(cell)}: {what} / {LABELS[best]}", ours / known[best], limit))
    return verdicts


def targets(results: Results) -> list[Verdict]:
    """What the project set itself beyond that, as far as it has been measured."""
    verdicts = []

    def ratio(cell: Cell | None, what: str, method: str, other: str, limit: float) -> None:
        value, reference = median(cell, what, method), median(cell, what, other)
        if cell is not None and value is not None and reference is not None:
            verdicts.append(Verdict(f"{title(cell)}: {what}, {method} / {other}", value / reference, limit))

    for model in ("cnn", "transformer", "nn-transformer"):
        cell = find(results, model=model, sharing="shared", num_tasks=32)
        ratio(cell, "time", OURS, "autogram", 0.75)
        ratio(cell, "memory", OURS, "autogram", 0.55)
    cell = find(results, model="mlp", sharing="shared", num_tasks=32)
    ratio(cell, "time", OURS, "autogram", 0.22)
    mebibytes = median(cell, "memory", OURS)
    if mebibytes is not None:
        verdicts.append(Verdict(f"{title(cell)}: MiB", mebibytes, 120.0))
    for cell in results["cells"]:
        ratio(cell, "time", FUSED, TASK_BACKWARDS, 1.05)
        ratio(cell, "time", FUSED, APART, 1.0)
    return verdicts


# ---- tables ---------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    """A few significant digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 10 ** (digits - 1) else f"{value:#.{digits}g}"


def errors(cell: Cell, kind: str) -> str:
    """Relative errors of methods of a kind: the largest, or the range."""
    methods = cell.get("time", {}).get("methods", {})
    found = [m["error"] for name, m in methods.items() if METHODS[name].kind == kind and m.get("error") is not None]
    if not found:
        return "–"
    low, high = f"{min(found):.0e}", f"{max(found):.0e}"
    return low if low == high else f"{low} … {high}"


def collect_table(what: str, sharing: str) -> str:
    """Time as a multiple of a plain backward, or peak memory in MiB, of every method in every cell."""
    results = load("collect")
    chosen = [cell for cell in results["cells"] if cell["sharing"] == sharing and what in cell]
    shown = [name for name in LABELS if any(median(cell, what, name) for cell in chosen)]
    unit = "ms" if what == "time" else "MiB"
    header = ["model", "T", f"plain backward ({unit})", *[LABELS[name] for name in shown]]
    rows = []
    for cell in chosen:
        plain = median(cell, what, PLAIN)
        values = [median(cell, what, name) for name in shown]
        if what == "time":
            values = [None if v is None or plain is None else v / plain for v in values]
        best = min((v for v in values if v is not None), default=None)
        cells = [f"**{number(v)}**" if v is not None and v == best else number(v) for v in values]
        row = [MODELS[cell["model"]].title, str(cell["num_tasks"]), number(plain), *cells]
        if what == "time":
            of_gradients = cell["time"].get("gradients_error")
            row += [errors(cell, "ours"), errors(cell, "peer"), "–" if of_gradients is None else f"{of_gradients:.0e}"]
        rows.append(row)
    if what == "time":
        header += ["error, ours", "error, the others", "error of gradients"]
    return table(header, rows, markdown=True)


def targets_table() -> str:
    """Every target with what was measured."""
    verdicts = targets(load("collect"))
    rows = [[v.what, number(v.value, 3), f"≤ {v.limit:g}", "yes" if v.holds else "**no**"] for v in verdicts]
    return table(["target", "measured", "limit", "met"], rows, markdown=True)


def bench_table(run: str, dtype: str, kind: str) -> str:
    """``gradstats bench`` on flat gradients or on lists of models: milliseconds, shares, memory and errors."""
    by_hand = {
        "stack(cat) @ .T": "`stack(cat) @ .T`",
        "stack + mm by parameter": "by parameter",
        "mm, ready-made": "ready-made `mm`",
        "mm, ready-made, TF32": "ready-made, TF32",
    }
    chosen = [
        case
        for case in bench_cases(run)
        if (ours := case["pairwise"])["dtype"] == dtype
        and "milliseconds" in ours
        and (ours["list"] == "flat") == (kind == "flat")
    ]
    shown = [name for name in by_hand if any(name in case for case in chosen)]
    header = ["gradients", "T", "entries a task", "reading (ms)", "`pairwise` (ms)", "% of reading", "% of peak"]
    header += [f"{by_hand[name]} (ms)" for name in shown] + ["extra MiB", "of `stack(cat)`", "error", "of `mm`"]
    rows = []
    for case in chosen:
        ours, usual = case["pairwise"], case["stack(cat) @ .T"]
        reading = [taken(case, name) for name in ("read", "read ahead") if name in case]
        times = [min(reading, default=None), taken(case, "pairwise")]
        shares = [ours.get("percent_of_read"), ours.get("percent_of_peak")]
        others = [taken(case, name) for name in shown]
        extra = [None if r.get("extra_bytes") is None else r["extra_bytes"] / 2**20 for r in (ours, usual)]
        wrong = [case[name].get("error") for name in ("pairwise", "mm, ready-made")]
        rows.append(
            [
                ours["list"],
                str(ours["num_tasks"]),
                f"{ours['entries']:,}",
                *[number(value, 3) for value in times],
                *["–" if value is None else f"{value:.0f}" for value in shares],
                *[number(value, 3) for value in others],
                *["–" if value is None else f"{value:.1f}" for value in extra],
                *["–" if value is None else f"{value:.0e}" for value in wrong],
            ]
        )
    return table(header, rows, markdown=True)


#: Where ``bench`` has run on one CPU thread, by machine.
CPU_RUNS = {"Zen 5": "cpu", "Emerald Rapids": "cpu_intel"}


@dataclass(frozen=True)
class CpuTarget:
    """What ``pairwise`` should reach on one CPU thread.

    Attributes:
        what: The quantity and the cases that count.
        least: The smallest value that is good.
        counts: Whether a record of ``pairwise`` is one of these cases.
        value: The quantity, from a case's records by method.
    """

    what: str
    least: float
    counts: Callable[[Cell], bool]
    value: Callable[[Mapping[str, Cell]], float]


def _of_read(case: Mapping[str, Cell]) -> float:
    return float(case["pairwise"]["percent_of_read"])


def _of_peak(case: Mapping[str, Cell]) -> float:
    return float(case["pairwise"]["percent_of_peak"])


def _beside_mm(case: Mapping[str, Cell]) -> float:
    return float(case["mm, ready-made"]["milliseconds"] / case["pairwise"]["milliseconds"])


def _is_large(record: Cell, dtype: str = "float32") -> bool:
    return bool(record["dtype"] == dtype and record["entries"] >= 1e7)


CPU_TARGETS = (
    CpuTarget("% of reading, float32, T ≤ 8, P ≥ 10⁷", 90, lambda r: _is_large(r) and r["num_tasks"] <= 8, _of_read),
    CpuTarget("% of reading, float32, T = 16, P ≥ 10⁷", 75, lambda r: _is_large(r) and r["num_tasks"] == 16, _of_read),
    CpuTarget(
        "% of peak, float32, T = 32 and 64, P ≥ 10⁶",
        50,
        lambda r: r["dtype"] == "float32" and r["entries"] >= 1e6 and r["num_tasks"] in (32, 64),
        _of_peak,
    ),
    CpuTarget(
        "% of reading, bfloat16, T ≤ 8, P ≥ 10⁷",
        70,
        lambda r: _is_large(r, "bfloat16") and r["num_tasks"] <= 8,
        _of_read,
    ),
    CpuTarget(
        "ready-made `mm` / `pairwise`, T ≥ 4, P ≥ 10⁶",
        1,
        lambda r: r["entries"] >= 1e6 and r["num_tasks"] >= 4,
        _beside_mm,
    ),
    CpuTarget("ready-made `mm` / `pairwise`, P = 10⁴", 0.5, lambda r: r["entries"] == 10_000, _beside_mm),
)


def bench_targets_table() -> str:
    """Every target of ``pairwise`` on one CPU thread with the worst and the best case of each machine's run."""
    rows = []
    for target in CPU_TARGETS:
        row = [target.what, f"≥ {target.least:g}"]
        for run in CPU_RUNS.values():
            timed = [case for case in bench_cases(run) if "milliseconds" in case["pairwise"]]
            values = [target.value(case) for case in timed if target.counts(case["pairwise"])]
            shown = f"{number(min(values))} … {number(max(values))}"
            row.append(shown if min(values) >= target.least else f"**{shown}**")
        rows.append(row)
    return table(["target", "limit", *CPU_RUNS], rows, markdown=True)


def taken(case: dict[str, Any], method: str) -> float | None:
    """Milliseconds; on a GPU of the replay of a graph, where there is one."""
    record = case.get(method, {})
    return record.get("graph_milliseconds", record.get("milliseconds"))


def host_table(run: str) -> str:
    """Microseconds of a call with as many tensors of one entry: ``pairwise`` of lists, planned, and of blocks."""
    forms = ("pairwise", "pairwise, planned", "pairwise, stacked")
    cases = [case for case in bench_cases(run) if case["pairwise"]["dtype"] == "float32"]
    costs = {(case["pairwise"]["list"], case["pairwise"]["num_tasks"]): case for case in cases}
    tasks = sorted({num_tasks for _, num_tasks in costs})
    rows = []
    for name, tensors in {case["pairwise"]["list"]: case["pairwise"]["tensors"] for case in cases}.items():
        cells = []
        for num_tasks in tasks:
            case = costs[name, num_tasks]
            costs_by_form = [case[form]["host_microseconds"] for form in forms if form in case]
            cells.append(" / ".join(number(value, 3) for value in costs_by_form))
        rows.append([name, str(tensors), *cells])
    return table(["gradients", "tensors a task", *[f"T = {n}" for n in tasks]], rows, markdown=True)


def bench_cases(run: str) -> list[dict[str, Any]]:
    """The records of each case by method, with most threads."""
    records = load(f"bench_{run}")["records"]
    most = max(r["threads"] for r in records)
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in records:
        if r["threads"] == most:
            case = tuple(r[key] for key in ("dtype", "list", "entries", "num_tasks"))
            cases.setdefault(case, {})[r["method"]] = r
    return list(cases.values())


def overhead_table() -> str:
    """CPU time of training with statistics or AutoScale, relative to training without."""

    def shown(ratio: dict[str, float] | None) -> str:
        return "–" if ratio is None else "{median:.3f} ({lowest:.3f} to {highest:.3f})".format(**ratio)

    rows = []
    for record in load("overhead")["records"]:
        whole = [shown(record.get(key)) for key in ("ratio", "ratio_by_hand")]
        steps = [number(record.get(key), 3) for key in ("recorded_step_ratio", "other_step_ratio")]
        rows.append([record["training"], str(record["num_tasks"]), record["variant"], *whole, *steps])
    header = [
        "training",
        "T",
        "with",
        "time / without",
        "/ the same weights by hand",
        "a recorded step",
        "another step",
    ]
    return table(header, rows, markdown=True)


def plan_table() -> str:
    """What plans predict beside what collections take."""
    rows = []
    for record in load("plan")["records"]:
        if "absent" in record:
            continue
        sizes, work = record["mebibytes"], record["million_operations"]
        mebibytes = [f"{sizes[key]:.1f}" for key in ("predicted", "tensors", "process")]
        operations = [f"{work[key]:.0f}" for key in ("predicted", "counted")]
        budget = "–" if record["share"] == 1 else f"{record['share']:.0%}"
        rows.append([MODELS[record["model"]].title, str(record["num_tasks"]), budget, *mebibytes, *operations])
    header = ["model", "T", "budget", "MiB predicted", "tensors", "process", "10⁶ operations predicted", "counted"]
    return table(header, rows, markdown=True)


def compare_table(experiment: str) -> str:
    """What ``gradstats compare`` has written of an experiment: a row for each method."""
    return (RESULTS / experiment / "results.md").read_text().split("\n\n")[0]


def handover_table() -> str:
    """Mean increase of the tasks' errors in percent over those with the ideal fixed weights, of the same seed."""
    records = load("handover")["records"]
    errors = {(r["way"], r["optimizer"]): r["errors"] for r in records}
    ways, optimizers = (list(dict.fromkeys(r[key] for r in records)) for key in ("way", "optimizer"))

    def cell(way: str, optimizer: str) -> str:
        pairs = zip(errors[way, optimizer], errors["ideal fixed weights", optimizer], strict=True)
        drops = [relative_drop(own, ideal, higher_is_better=dict.fromkeys(own, False)) for own, ideal in pairs]
        return f"{interval(drops):.1f}" if all(map(math.isfinite, drops)) else "diverges"

    rows = [[way, *(cell(way, optimizer) for optimizer in optimizers)] for way in ways]
    return table(["Δ (%), lower is better", *optimizers], rows, markdown=True)


def records_table() -> str:
    """How far AutoScale's weights depend on which steps are recorded."""
    results = load("records")
    by_layout: dict[str, list[str]] = {}
    for record in results["records"]:
        samples = record["samples"]
        layout, count = "every step", ""
        if samples is not None:
            layout = f"{samples[0]} in each window" if len(set(samples)) == 1 else ", ".join(map(str, samples))
            count = str(sum(samples))
        cells = by_layout.setdefault(layout, [count])
        cells += ["" if samples is None else f"{record['from_all_steps']:.3f}", f"{record['between_trainings']:.3f}"]
    titles = [f"{what}, T = {tasks}" for tasks in (2, 3) for what in ("from all steps", "between trainings")]
    rows = [[layout, *cells] for layout, cells in by_layout.items()]
    return table(["recorded", "steps", *titles], rows, markdown=True)


def weightings_table() -> str:
    """What there is to know of every weighting."""
    rows = []
    for name in weighting.available():
        facts = weighting.facts(name)
        rows.append([f"`{name}`", facts.title, facts.paper, facts.uses, facts.cost, facts.sign, facts.tested])
    return table(["name", "method", "paper", "needs", "cost", "weights", "tested against"], rows, markdown=True)


HARDEST = "dependent"  # the kind of gradients that weightings.py times programs on besides


def weighting_times_table() -> str:
    """µs of our weightings and of TorchJD's, on the kind of Gramians where ours do worst beside theirs."""
    records = load("weightings")["records"]
    sizes = sorted({r["num_tasks"] for r in records})
    rows = []
    for name, hardest in dict.fromkeys((r["name"], r["kind"] == HARDEST) for r in records):
        cells = []
        for size in sizes:
            kinds = [r for r in records if (r["name"], r["kind"] == HARDEST, r["num_tasks"]) == (name, hardest, size)]
            worst = min(kinds, key=lambda r: (r.get("torchjd", 0.0) / r["gradstats"], -r["gradstats"]))
            cells += [number(worst["gradstats"]), number(worst.get("torchjd"))]
        title = weighting.facts(name).title
        rows.append([f"{title}, {HARDEST}" if hardest else title, *cells])
    header = [title for size in sizes for title in (f"T = {size}", "TorchJD")]
    return table(["µs of CPU time", *header], rows, markdown=True)


def linear_table(device: str) -> str:
    """``linear_gram``, and with the weighted gradient, beside a batched product and the Gramian of what it gives."""
    rows = []
    for record in load(f"linear_{device}")["records"]:
        ways = list(record["ways"].values())  # at once, apart; then both with the weighted gradient
        cells = [number(facts["milliseconds"]) for facts in ways] + [
            number(facts["extra_mebibytes"]) for facts in ways[:2]
        ]
        rows.append([record["layer"], str(record["tasks"]), record["dtype"], *cells, f"{ways[0]['error']:.0e}"])
    titles = ["at once (ms)", "apart", "with weighted gradient", "apart", "extra MiB", "apart", "error"]
    return table(["rows, inputs, outputs", "T", "dtype", *titles], rows, markdown=True)


TABLES: dict[str, Callable[[], str]] = {
    "weightings": weightings_table,
    "weighting times": weighting_times_table,
    "handover": handover_table,
    "records": records_table,
    "overhead": overhead_table,
    "plan": plan_table,
    "collect targets": targets_table,
} | {
    f"collect {what} {sharing}": functools.partial(collect_table, what, sharing)
    for what in ("time", "memory")
    for sharing in ("shared", "disjoint", "per-sample")
}
for _experiment in ("tox21", "nyuv2"):
    TABLES[f"compare {_experiment}"] = functools.partial(compare_table, _experiment)
for _run in ("cpu", "cuda"):
    TABLES[f"linear {_run}"] = functools.partial(linear_table, _run)
TABLES["bench cpu targets"] = bench_targets_table
for _run in ("cpu", "cpu_intel", "cpu_threads", "cuda"):
    TABLES[f"bench {_run} host"] = functools.partial(host_table, _run)
    for _dtype, _kind in itertools.product(("float32", "bfloat16"), ("flat", "lists")):
        TABLES[f"bench {_run} {_dtype} {_kind}"] = functools.partial(bench_table, _run, _dtype, _kind)


def load(name: str) -> Any:
    """Results committed under that name."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rendered(text: str, tables: Mapping[str, Callable[[], str]] | None = None) -> str:
    """``text`` with the tables between its markers made anew.

    Raises:
        ValueError: If a marker names no known table.
    """
    known = TABLES if tables is None else tables

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            raise ValueError(f"marker: expected one of {', '.join(known)}, got {name!r}")
        return f"<!-- table: {name} -->\n\n{known[name]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (?P<name>[^>]*?) -->.*?<!-- end -->", replace, text, flags=re.DOTALL)


# ---- the picture ----------------------------------------------------------------------------------------------------


def collect_picture(results: Results, sharings: Sequence[str] = ("shared", "disjoint")) -> Figure:
    """Time and memory of ours and of the peers, one dot for each method in each cell."""
    from matplotlib.figure import Figure

    by_sharing = {s: [c for c in results["cells"] if c["sharing"] == s] for s in sharings}
    by_sharing = {s: found for s, found in by_sharing.items() if found}
    heights = [len(found) + 1 for found in by_sharing.values()]
    figure = Figure(figsize=(10, 1.6 + 0.24 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(by_sharing), 2, squeeze=False, sharex="col", gridspec_kw={"height_ratios": heights})
    for row, (sharing, found) in zip(panels, by_sharing.items(), strict=True):
        for panel, what in zip(row, ("time", "memory"), strict=True):
            _dots(panel, found, what)
        row[1].tick_params(labelleft=False)
        row[0].set_title(f"Tasks with {sharing} samples", loc="left", fontsize=10)
    panels[-1][0].set_xlabel("CPU time / plain backward")
    panels[-1][1].set_xlabel("peak memory over model and data (MiB)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return figure


def _dots(panel: Axes, cells: Sequence[Cell], what: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for colour, name in zip(COLOURS, DRAWN, strict=True):
        points = []
        for y, cell in enumerate(cells):
            value, plain = median(cell, what, name), median(cell, what, PLAIN)
            if value and plain:
                points.append((value / plain if what == "time" else value, y))
        ours = name == OURS
        panel.scatter(
            [x for x, _ in points],
            [y for _, y in points],
            s=70 if ours else 28,
            color=colour,
            marker="D" if ours else "o",
            label=LABELS[name],
            zorder=3 if ours else 2,
            alpha=1.0 if ours else 0.8,
        )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_yticks(range(len(cells)), [f"{MODELS[c['model']].title}, T = {c['num_tasks']}" for c in cells])
    panel.set_ylim(len(cells) - 0.5, -0.5)
    panel.grid(color="#E3E3E3", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a table is out of date")
    options = parser.parse_args(arguments)
    for document in DOCUMENTS:
        old = document.read_text()
        new = rendered(old)
        if new != old and options.check:
            raise SystemExit(f"{document.relative_to(ROOT)} is out of date: run python benchmarks/render.py")
        if new != old:
            write_file(document, new)
    if not options.check and (RESULTS / "collect.json").exists():
        save_figure(collect_picture(load("collect")), ROOT / PICTURE)


if __name__ == "__main__":
    main()

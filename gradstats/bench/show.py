"""Records for people: a table of each case, and which of them make the roofline picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from gradstats.bench.measure import LIMITS, MULTIPLY, READ, READ_AHEAD
from gradstats.bench.methods import OURS
from gradstats.report import Roofline

if TYPE_CHECKING:
    from rich.table import Table

Record: TypeAlias = Mapping[str, Any]

_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ms": ("milliseconds", lambda v: f"{v:.3f}"),
    "graph ms": ("graph_milliseconds", lambda v: f"{v:.3f}"),
    "GB/s": ("gigabytes_per_second", lambda v: f"{v:.1f}"),
    "% of read": ("percent_of_read", lambda v: f"{v:.0f}"),
    "GFLOP/s": ("gigaflops_per_second", lambda v: f"{v:.1f}"),
    "% of peak": ("percent_of_peak", lambda v: f"{v:.0f}"),
    "extra MiB": ("extra_bytes", lambda v: f"{v / 2**20:.1f}"),
    "host µs": ("host_microseconds", lambda v: f"{v:.0f}"),
    "error": ("error", lambda v: f"{v:.0e}"),
}


def _where(record: Record) -> str:
    threads = record["threads"]
    return "GPU" if record["device"] == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"


def case_table(records: Sequence[Record]) -> Table:
    """Everything that the records of one case say; columns that none of them fills are left out."""
    from rich.markup import escape
    from rich.table import Table

    shown = {
        header: column for header, column in _COLUMNS.items() if any(r.get(column[0]) is not None for r in records)
    }
    case = records[0]
    title = f"{case['dtype']}, T = {case['num_tasks']}, {case['list']}: {case['entries']:,} entries a task"
    title += f" in {case['tensors']} tensors, {_where(case)}" if case["tensors"] > 1 else f", {_where(case)}"
    if not any("milliseconds" in r for r in records):
        title += "; host cost alone, since it does not fit in --memory"
    table = Table("method", title=title, title_justify="left")
    for header in shown:
        table.add_column(header, justify="right", no_wrap=True)
    for record in records:
        values = [(record.get(key), form) for key, form in shown.values()]
        cells = ["" if value is None else form(value) for value, form in values]
        name = escape(record["method"])
        if "absent" in record:
            name += f"\n[red]{escape(record['absent'])}"
        style = "bold" if record["method"] == OURS else "dim" if record["method"] in LIMITS else None
        table.add_row(name, *cells, style=style)
    return table


def rooflines(records: Sequence[Record]) -> dict[str, Roofline]:
    """For each dtype, the largest flat gradients that were timed with each number of tasks, with most threads.

    Raises:
        ValueError: If none were timed together with the limits.
    """
    timed = [r for r in records if r["list"] == "flat" and "milliseconds" in r]
    if not any(r["method"] == MULTIPLY for r in timed):
        raise ValueError("records: expected flat gradients with times and limits, which a compiled library measures")
    threads = max(r["threads"] for r in timed)
    timed = sorted((r for r in timed if r["threads"] == threads), key=lambda r: r["entries"])
    largest = {(r["dtype"], r["num_tasks"]): r["entries"] for r in timed}
    panels: dict[str, list[Record]] = {}
    for r in timed:
        if r["entries"] == largest[r["dtype"], r["num_tasks"]]:
            panels.setdefault(f"{r['dtype']}, {_where(r)}", []).append(r)
    return {title: _roofline(chosen) for title, chosen in panels.items()}


def _roofline(records: Sequence[Record]) -> Roofline:
    methods: dict[str, dict[int, float]] = {}
    for r in sorted(records, key=lambda r: r["num_tasks"]):
        if r["method"] not in LIMITS:
            methods.setdefault(r["method"], {})[r["num_tasks"]] = r["gigaflops_per_second"]
    return Roofline(
        read=max(r["gigabytes_per_second"] for r in records if r["method"] in (READ, READ_AHEAD)),
        peak=max(r["gigaflops_per_second"] for r in records if r["method"] == MULTIPLY),
        bytes_per_entry=records[0]["bytes"] // (records[0]["entries"] * records[0]["num_tasks"]),
        methods=methods,
    )

"""``gradstats bench``: what the Gramian of gradients costs here, beside other ways to it and what the hardware can do.

:mod:`~gradstats.bench.measure` says how it is measured, :mod:`~gradstats.bench.methods` and
:mod:`~gradstats.bench.shapes` what.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gradstats import ops
from gradstats.bench.machine import available_bytes, describe
from gradstats.bench.measure import Case, Record, measure_case
from gradstats.bench.methods import METHODS, Method
from gradstats.bench.shapes import MODELS
from gradstats.bench.show import case_table, rooflines
from gradstats.ops import limits
from gradstats.report import plot_roofline, save_figure, write_file

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ops.DTYPES}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"tasks": [2, 8, 32, 128], "entries": [10**4, 10**6, 10**7], "memory": 3.0},
    "cuda": {"tasks": [2, 4, 8, 16, 32, 64, 128, 256], "entries": [10**n for n in (4, 6, 7, 8, 9)], "memory": 1e3},
}
_USUAL: dict[str, Any] = {"lists": list(MODELS), "seconds": 2.0}
_QUICK: dict[str, Any] = {"tasks": [2, 8], "entries": [10**4, 10**6], "lists": [], "seconds": 0.2}
_LEGEND = """\
Times are medians of interleaved rounds with cold caches. "read" only reads the same tensors, "multiply-add" only
multiplies and adds; "% of read" and "% of peak" are shares of these, on a GPU of graph ms. GFLOP/s count T (T + 1)
operations an entry. extra MiB: growth of the peak of memory over a call.
host µs: a call with as many tensors of one entry. error: largest |G_ij - exact_ij| / (n_i n_j)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``gradstats bench``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--tasks", type=_count, nargs="+", metavar="T", help="numbers of tasks")
    parser.add_argument("--entries", type=_count, nargs="*", metavar="P", help="entries of flat gradients, such as 1e6")
    parser.add_argument("--lists", nargs="*", choices=MODELS, help="models whose gradients to take (all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=_DEFAULTS, default=device)
    parser.add_argument("--threads", type=_count, nargs="+", default=[torch.get_num_threads()], help="of the CPU (all)")
    parser.add_argument("--memory", type=float, metavar="GB", help="what needs more is not timed")
    parser.add_argument("--seconds", type=float, help="for the rounds of a case; five at least (2)")
    usual = [name for name, method in METHODS.items() if not method.compiled]
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=usual, help="what to time (all but compiled)")
    parser.add_argument("--compile", action="store_true", help="what torch.compile makes of loops, too (slow)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all records as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw rooflines as .png, .svg or .pdf")
    parser.add_argument("--quick", action="store_true", help="a first look: fewer sizes and rounds")


def run(options: argparse.Namespace) -> str:
    """Measure what the options ask for, print tables and write files on the way, and return what the columns mean.

    Raises:
        ImportError: If rich is not installed (extra ``bench``), or matplotlib for a picture (extra ``plot``).
        ValueError: If the device is not there, none of the methods belongs to a case, or what a picture needs is not
            measured.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError("tables need rich: pip install 'gradstats[bench]'") from error
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, since torch finds no GPU, got cuda")
    for name, value in (_DEFAULTS[options.device] | _USUAL | (_QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.picture is not None and not (options.entries and limits.available(options.device)):
        raise ValueError("--picture: expected flat gradients (--entries) and compiled kernels, whose limits it shows")
    methods = {n: m for n, m in METHODS.items() if n in options.methods or (options.compile and m.compiled)}
    every = list(cases(options))
    if every and not any(m.belongs(c.num_tasks, c.dtype, c.device) for m in methods.values() for c in every):
        got = ", ".join(options.methods)
        raise ValueError(f"--methods: expected one for these tasks, dtypes and device, got {got}")

    console = Console(width=None if sys.stdout.isatty() else 140)
    results: dict[str, Any] = {"machine": describe(), "records": []}
    console.print_json(data=results["machine"])
    room = min(1e9 * options.memory, 0.9 * available_bytes(torch.device(options.device)))
    for case in every:
        records = _measured(case, methods, options.seconds, fits=case.bytes_needed <= room)
        if not records:
            continue
        console.print(case_table(records))
        results["records"] += records
        if options.out is not None:  # after each case, since a run may be stopped
            write_file(options.out, json.dumps(results, indent=1) + "\n")
    if options.picture is not None:
        save_figure(plot_roofline(rooflines(results["records"])), options.picture)
    return _LEGEND


def _measured(case: Case, methods: Mapping[str, Method], seconds: float, fits: bool) -> list[Record]:
    """The records of a case; if the memory of a GPU does not do after all, those of what does not fit."""
    with contextlib.suppress(torch.OutOfMemoryError):
        return measure_case(case, methods, seconds=seconds, fits=fits)
    return measure_case(case, methods, seconds=seconds, fits=False)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All combinations: flat gradients by size, then the models' lists."""
    device = torch.device(options.device)
    lists = [("flat", [(entries,)]) for entries in options.entries] + [(name, MODELS[name]()) for name in options.lists]
    for threads in options.threads if device.type == "cpu" else [torch.get_num_threads()]:
        for dtype in options.dtypes:
            for name, shapes in lists:
                for num_tasks in options.tasks:
                    yield Case(device, threads, DTYPES[dtype], num_tasks, name, shapes)


def _count(text: str) -> int:
    """A positive whole number, which may be written as ``1e6``."""
    value = float(text)
    if value < 1 or value != int(value):
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(value)

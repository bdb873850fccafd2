"""Time and memory of task Gramians: ``gradstats.from_losses`` and ``backward`` against plain torch and libraries.

A cell is a model, a number of tasks and the way in which tasks share samples (``cases.py``); its methods are those of
``methods.py``.

* Time is CPU time of one thread, without the forward pass, which is run anew before every call. All methods of a cell
  take turns in one process, in an order that rotates from round to round, so that whatever else the machine does hits
  all of them; given are medians and quartiles over rounds, after one round to warm up.
* Memory is the growth of the peak resident set over model and data, forward pass included, in a fresh process for each
  method; the median of some such processes. Imports and the one-off costs of ``torch.vmap`` and of the method itself
  are paid on a tiny model before.
* Error is ``||G - G64|| / ||G64||`` (Frobenius) against gradients that model and data in float64 give; of the first
  32 tasks where there are more. No method can do without the error of the float32 gradients themselves, which is given
  too; it is large where the input of a ReLU is so near to zero that it has another sign in float64.

A method that raises is recorded as absent, with what it raised. Results are written after every cell, so a run may be
stopped and gone on with:

    pip install -e '.[benchmark]'
    pip install --no-deps backpack-for-pytorch einops unfoldNd
    python benchmarks/collect.py --out benchmarks/results/collect.json --resume

BackPACK asks for torchvision without using it here, and one that does not fit torch breaks other packages; hence the
second line. ``--again`` measures anew; times of the peers of a cell with it, since only those from one process compare.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from cases import MODELS, SHARINGS, Case, build_case
from methods import METHODS, OURS, PLAIN, Run
from render import Verdict, against_peers, find, median, number, targets, title
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from gradstats.bench.machine import describe as describe_machine
from gradstats.bench.machine import stamp
from gradstats.report import write_file

CHECKED_TASKS = 32  # the error is that of so many
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
PEERS = ("torchjd", "opacus", "backpack-for-pytorch")
#: Batch sizes with per-sample losses; those beyond CHECKED_TASKS are for ours and the mark alone, on the MLP.
BATCHES = (8, 32, 512, 4096)


# ---- one process: the methods of one cell ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured on."""

    model: str
    sharing: str
    num_tasks: int

    def methods(self, wanted: Iterable[str]) -> list[str]:
        """Those of ``wanted`` that belong here."""
        large = self.num_tasks > CHECKED_TASKS
        return [
            name
            for name in wanted
            if self.sharing in METHODS[name].sharings and not (large and METHODS[name].kind == "peer")
        ]


def exact_gram(case: Case) -> Tensor:
    """Gramian of the first tasks' gradients, in the case's dtype, with products in float64."""
    _, losses = case.forward()
    rows = [torch.autograd.grad(loss, case.parameters, retain_graph=True) for loss in losses[:CHECKED_TASKS]]
    blocks = (torch.stack([g.flatten().double() for g in grads]) for grads in zip(*rows, strict=True))
    return torch.stack([block @ block.T for block in blocks]).sum(0)


def relative_error(gram: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference, relative."""
    n = len(exact)
    return float((gram.detach()[:n, :n].double() - exact).norm() / exact.norm())


def reason(error: Exception) -> dict[str, str]:
    """Why there is no number."""
    first_line = (str(error).splitlines() or [""])[0]
    return {"absent": f"{type(error).__name__}: {first_line}"[:200]}


def timed_call(case: Case, run: Run) -> tuple[float, Tensor | None]:
    """Milliseconds of CPU time of one call after a fresh forward pass, and the Gramian."""
    for p in [*case.parameters, *case.heads.parameters()]:
        p.grad = None
    features, losses = case.forward()
    start = time.process_time()
    gram = run(features, losses)
    return (time.process_time() - start) * 1e3, gram


def measure_time(cell: Cell, names: list[str], seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Interleaved times of the methods, which get so many ``seconds`` each on average."""
    exact = exact_gram(build_case(**dataclasses.asdict(cell)).double())
    common = build_case(**dataclasses.asdict(cell))
    of_gradients = relative_error(exact_gram(common), exact)
    prepared: dict[str, tuple[Case, Run]] = {}
    found: dict[str, Any] = {}
    start = time.perf_counter()
    for name in names:
        say(f"warming up {name}")
        try:
            case = build_case(**dataclasses.asdict(cell)) if METHODS[name].own_model else common
            run = METHODS[name].prepare(case)
            _, gram = timed_call(case, run)
        except Exception as error:  # what a method cannot do is a result
            found[name] = reason(error)
            continue
        prepared[name] = (case, run)
        found[name] = {"error": None if gram is None else relative_error(gram, exact)}
    one_round = time.perf_counter() - start
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, int(seconds * len(prepared) / one_round)))
    gc.collect()
    gc.freeze()  # so that what the garbage collector does in a round is little
    order = list(prepared)
    times: dict[str, list[float]] = {name: [] for name in order}
    for i in range(rounds):
        say(f"round {i + 1} of {rounds}")
        turn = i % len(order)
        for name in order[turn:] + order[:turn]:
            times[name].append(timed_call(*prepared[name])[0])
    gc.unfreeze()
    for name, milliseconds in times.items():
        found[name] |= summary(milliseconds)
    return {"rounds": rounds, "gradients_error": of_gradients, "methods": found}


def summary(values: list[float]) -> dict[str, Any]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


def peak_mebibytes() -> float:
    """Largest resident set of this process so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1024


def measure_memory(cell: Cell, name: str, _: Callable[[str], None]) -> dict[str, Any]:
    """Growth of the peak in one call; to be run in a fresh process."""
    torch.vmap(lambda x: 2 * x)(torch.ones(2))
    try:
        tiny = build_case("tiny", 2, cell.sharing)
        METHODS[name].prepare(tiny)(*tiny.forward())
        del tiny
        case = build_case(**dataclasses.asdict(cell))
        run = METHODS[name].prepare(case)
        gc.collect()
        with contextlib.suppress(OSError):  # lets the peak start again from the present size, where permitted
            Path("/proc/self/clear_refs").write_text("5")
        base = peak_mebibytes()
        run(*case.forward())
        return {"mebibytes": peak_mebibytes() - base}
    except Exception as error:  # what a method cannot do is a result
        return reason(error)


def work(measure: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], pipe: Connection) -> None:
    """Measure in this process, and send progress as strings and then the result."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    pipe.send(measure(*arguments, pipe.send))


# ---- on the terminal ------------------------------------------------------------------------------------------------


def cell_table(record: dict[str, Any]) -> Table:
    """Everything known of one cell."""
    shown = Table("method", "ms", "quartiles", "/ plain", "MiB", "error", title=title(record), title_justify="left")
    times, sizes = (record.get(what, {}).get("methods", {}) for what in ("time", "memory"))
    plain = median(record, "time", PLAIN)
    for name in METHODS:
        if name not in times and name not in sizes:
            continue
        taken, size = times.get(name, {}), sizes.get(name, {})
        absent = taken.get("absent")
        milliseconds = taken.get("median")
        style = "bold" if name == OURS else "dim" if METHODS[name].kind == "mark" else None
        shown.add_row(
            name,
            f"[red]{escape(absent)}" if absent else number(milliseconds, 3),
            " – ".join(number(q, 3) for q in taken.get("quartiles", [])),
            number(milliseconds / plain, 3) if milliseconds and plain else "",
            escape(size["absent"]) if "absent" in size and not absent else number(size.get("median"), 3),
            "" if taken.get("error") is None else f"{taken['error']:.0e}",
            style=style,
        )
    return shown


def verdict_table(heading: str, verdicts: list[Verdict]) -> Table:
    """One line for each verdict."""
    failed = sum(not v.holds for v in verdicts)
    shown = Table(heading, "value", "limit", title=f"{len(verdicts) - failed} of {len(verdicts)} hold")
    for v in verdicts:
        shown.add_row(escape(v.what), f"{v.value:.3g}", f"{v.limit:g}", style=None if v.holds else "bold red")
    return shown


# ---- the driver -----------------------------------------------------------------------------------------------------


def in_fresh_process(
    measure: Callable[..., dict[str, Any]], *arguments: Any, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """What ``measure(*arguments)`` returns, or ``{"absent": reason}`` if its process dies."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(measure, arguments, sender))
    process.start()
    sender.close()  # so that the end of the process ends the messages
    message: Any = None
    with contextlib.suppress(EOFError):
        while isinstance(message := receiver.recv(), str):
            say(message)
    process.join()
    return message if isinstance(message, dict) else {"absent": f"the process ended with {process.exitcode}"}


def time_cell(cell: Cell, names: list[str], seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """The ``time`` part of a cell's record."""
    result = in_fresh_process(measure_time, cell, names, seconds, say=say)
    if "absent" in result:
        result = {"rounds": 0, "methods": dict.fromkeys(names, result)}
    return stamp() | result


def memory_cell(cell: Cell, names: list[str], runs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The ``memory`` part of a cell's record; processes run side by side, which does not change their sizes."""

    def measure(name: str) -> dict[str, Any]:
        results = [in_fresh_process(measure_memory, cell, name) for _ in range(runs)]
        say(f"memory of {name}")
        absent = next((result for result in results if "absent" in result), None)
        return absent or summary([result["mebibytes"] for result in results])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return stamp() | {"runs": runs, "methods": dict(zip(names, pool.map(measure, names), strict=True))}


def run_part(
    cell: Cell, record: dict[str, Any], what: str, options: argparse.Namespace, say: Callable[[str], None]
) -> bool:
    """Measure what ``record`` lacks of its time or memory, or all that is wanted again; whether there was anything."""
    wanted = cell.methods(options.methods)
    old = record.get(what, {"methods": {}})["methods"]
    missing = wanted if options.again else [name for name in wanted if name not in old]
    if not missing:
        return False
    if what == "time":  # times from different processes do not compare, so all are measured again
        names = [name for name in METHODS if name in old or name in missing]
        record["time"] = time_cell(cell, names, options.seconds, say)
    else:
        part = memory_cell(cell, missing, options.memory_runs, say)
        methods = old | part["methods"]
        record["memory"] = part | {"methods": {name: methods[name] for name in METHODS if name in methods}}
    return True


def new_record(cell: Cell) -> dict[str, Any]:
    """A cell that nothing is known of but its size."""
    case = build_case(**dataclasses.asdict(cell))
    parameters = sum(p.numel() for p in case.parameters)
    return dataclasses.asdict(cell) | {"parameters": parameters, "samples": len(case.samples)}


def in_order(record: dict[str, Any]) -> tuple[int, int, int]:
    """Where a cell stands in tables."""
    return SHARINGS.index(record["sharing"]), list(MODELS).index(record["model"]), record["num_tasks"]


def cells(options: argparse.Namespace) -> list[Cell]:
    """Those that the options ask for."""
    chosen = []
    for sharing in options.sharing:
        for model in options.models:
            if sharing != "per-sample":
                counts = options.tasks or (2, 8, 32)
            else:
                counts = [n for n in options.tasks or BATCHES if n <= CHECKED_TASKS or model == "mlp"]
            chosen += [Cell(model, sharing, n) for n in counts]
    return chosen


def describe() -> dict[str, Any]:
    """Machine and versions."""
    versions = {}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return describe_machine() | versions | {"threads": 1}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="measure only what the file lacks")
    existing.add_argument("--again", action="store_true", help="measure these methods anew and keep the file's others")
    models = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models)
    parser.add_argument("--tasks", type=int, nargs="+", help="numbers of tasks (2 8 32; per sample 8 32 512 4096)")
    parser.add_argument("--sharing", nargs="+", choices=SHARINGS, default=SHARINGS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--what", nargs="+", choices=("time", "memory"), default=("time", "memory"))
    parser.add_argument("--seconds", type=float, default=15.0, help="for a method's times in a cell, on average (15)")
    parser.add_argument("--memory-runs", type=int, default=3, help="processes for each number on memory (3)")
    parser.add_argument("--quick", action="store_true", help="a fast look: --seconds 0 --memory-runs 1")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds, options.memory_runs = 0.0, 1
    if options.out.exists() and not (options.resume or options.again):
        parser.error(f"--out: {options.out} exists; go on with --resume, measure anew with --again, or remove it")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parse(arguments)
    results: dict[str, Any] = {"machine": describe(), "cells": []}
    if options.out.exists():
        results["cells"] = json.loads(options.out.read_text())["cells"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    chosen = cells(options)
    columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(chosen) * len(options.what))
        for cell in chosen:
            record = find(results, **dataclasses.asdict(cell))
            if record is None:
                record = new_record(cell)
                results["cells"].append(record)
                results["cells"].sort(key=in_order)
            news = False
            for what in options.what:
                name = title(record)
                news |= run_part(
                    cell, record, what, options, lambda text, n=name: progress.update(bar, description=f"{n}: {text}")
                )
                write_file(options.out, json.dumps(results, indent=1) + "\n")
                progress.advance(bar)
            if news:
                console.print(cell_table(record))
    console.print(verdict_table("ours / best exact peer", against_peers(results)))
    console.print(verdict_table("targets", targets(results)))


if __name__ == "__main__":
    main()

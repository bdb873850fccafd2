"""Time ``gradstats.pairwise`` on the CPU against what people write by hand and against the memory itself.

Each case is one list of gradients. Its methods run in interleaved rounds, so that a busy moment hits all of them, and
medians are compared. ``read limit`` reads the same tensors once with the same number of threads and does nothing else;
a method at 100 % of it takes no time beyond reading its input. ``read loop, no prefetch`` is the same without asking
for memory ahead, the usual measure of read bandwidth. ``multiply-add limit`` does as many float32 multiply-adds as
there are products of entries, in registers; from some T on this is the larger limit.
``mm, ready-made`` starts from a matrix that already holds all gradients, which nobody has; the others start from the
list. ``error`` is the largest ``|G_ij - exact_ij| / (n_i n_j)`` with the exact sums in float64.

    python benchmarks/pairwise_cpu.py --out benchmarks/results/pairwise_cpu.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradstats
from gradstats.ops import limits, reference
from gradstats.report import write_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_PARAMETERS = 62  # as in ResNet-18


def parameter_sizes(entries: int, count: int) -> list[int]:
    """``count`` uneven sizes, a few large and many small, that add up to about ``entries``."""
    shares = torch.rand(count, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-4
    return [int(n) + 1 for n in (shares / shares.sum() * entries).tolist()]


AHEAD = 4096  # bytes; 2 to 8 KiB read faster than 1 or 16 KiB where this was written


def stack_cat(rows: list[list[Tensor]]) -> Tensor:
    """The usual way: flatten and concatenate everything, then multiply."""
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return matrix @ matrix.T


def by_parameter(rows: list[list[Tensor]]) -> Tensor:
    """Stack and multiply one parameter at a time, and add."""
    total = None
    for grads in zip(*rows, strict=True):
        block = torch.stack([g.flatten() for g in grads])
        gram = block @ block.T
        total = gram if total is None else total + gram
    assert total is not None
    return total


def worst_error(gram: Tensor, exact: Tensor) -> float:
    """Largest error relative to the product of the norms."""
    norms = exact.diagonal().sqrt()
    return float(((gram.double() - exact) / norms[:, None] / norms[None, :]).abs().max())


def run_case(dtype: str, num_tasks: int, sizes: list[int], threads: int, rounds: int) -> list[dict[str, Any]]:
    """Time all methods on one list of gradients; one record per method."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randn(n, generator=generator).to(DTYPES[dtype]) for n in sizes] for _ in range(num_tasks)]
    tensors = [g for row in rows for g in row]
    ready = torch.stack([torch.cat(row) for row in rows])
    exact = reference.gram(tensors, num_tasks, [], False)
    products = num_tasks * (num_tasks + 1) // 2 * sum(sizes)
    bounds: dict[str, Callable[[], Tensor]] = {
        "read limit": lambda: limits.read(tensors, ahead=AHEAD),
        "read loop, no prefetch": lambda: limits.read(tensors),
        "multiply-add limit": lambda: limits.multiply_add(torch.empty(()), products),
    }
    methods: dict[str, Callable[[], Tensor]] = {
        "gradstats.pairwise": lambda: gradstats.pairwise(rows).gram,
        "stack(cat) @ .T": lambda: stack_cat(rows),
        "mm, ready-made": lambda: torch.mm(ready, ready.T),
        "stack + mm by parameter": lambda: by_parameter(rows),
    }
    errors = {name: worst_error(method(), exact) for name, method in methods.items()}  # warms up too
    counted = {name: bound() for name, bound in bounds.items()}
    times: dict[str, list[float]] = {name: [] for name in (*bounds, *methods)}
    for _ in range(rounds):
        for name, method in (*bounds.items(), *methods.items()):
            start = time.perf_counter()
            method()
            times[name].append(time.perf_counter() - start)
    # Multiply-adds are done in large pieces: at least so many.
    share = products / float(counted["multiply-add limit"])
    times["multiply-add limit"] = [seconds * share for seconds in times["multiply-add limit"]]
    size = sum(x.numel() * x.element_size() for x in tensors)
    read = statistics.median(times["read limit"])
    multiply_add = statistics.median(times["multiply-add limit"])
    return [
        {
            "method": name,
            "dtype": dtype,
            "num_tasks": num_tasks,
            "entries": sum(sizes),
            "num_tensors": len(tensors),
            "threads": threads,
            "milliseconds": statistics.median(seconds) * 1e3,
            "best_milliseconds": min(seconds) * 1e3,
            "gigabytes_per_second": size / statistics.median(seconds) / 1e9,
            "percent_of_read_limit": 100 * read / statistics.median(seconds),
            "percent_of_multiply_add_limit": 100 * multiply_add / statistics.median(seconds),
            "error": errors.get(name),
            "rounds": rounds,
        }
        for name, seconds in times.items()
    ]


def describe_machine() -> dict[str, Any]:
    """Where the numbers come from."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if "model name" in s), model)
    return {
        "cpu": model,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "torch": torch.__version__,
        "gradstats": gradstats.__version__,
        "backends": [name for name, backend in gradstats.backends().items() if backend.available],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def print_case(records: list[dict[str, Any]]) -> None:
    """One table of all methods."""
    first = records[0]
    title = "{dtype}, T = {num_tasks}, {entries:,} entries in {num_tensors} tensors, {threads} thread(s)"
    print("\n" + title.format(**first))
    for r in records:
        error = "" if r["error"] is None else f"{r['error']:.1e}"
        shares = (r["percent_of_read_limit"], r["percent_of_multiply_add_limit"])
        print(
            f"  {r['method']:24} {r['milliseconds']:10.3f} ms {r['gigabytes_per_second']:7.1f} GB/s "
            f"{shares[0]:6.0f} % of reading {shares[1]:6.0f} % of multiplying {error:>9}",
            flush=True,
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the records as JSON to this file")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--entries", type=int, nargs="+", default=[20_000_000, 10_000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max-reads", type=int, default=320_000_000, help="bound on tasks times entries, for memory")
    arguments = parser.parse_args()

    machine = describe_machine()
    print(json.dumps(machine, indent=2))
    records = []
    for threads in arguments.threads:
        for wanted in arguments.entries:
            for dtype in arguments.dtypes:
                for num_tasks in arguments.tasks:
                    entries = min(wanted, arguments.max_reads // num_tasks)
                    sizes = parameter_sizes(entries, NUM_PARAMETERS)
                    rounds = arguments.rounds if entries > 100_000 else 20 * arguments.rounds
                    case = run_case(dtype, num_tasks, sizes, threads, rounds)
                    print_case(case)
                    records += case
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(arguments.out, json.dumps({"machine": machine, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A linear layer's weight: its gradients formed and multiplied at once, beside a batched product and then the Gramian.

For the layer's inputs and the tasks' cotangents it times ``linear_gram``, and ``linear_gram_combine``, which gives the
weighted gradient too, beside ``gram`` (``gram_combine``) of ``cotangents.mT @ inputs``: all in turn, with cold caches,
medians (:mod:`gradstats.bench.measure`). It also shows how far the peak of memory grows over one call.

    python benchmarks/linear.py --out benchmarks/results/linear_cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gradstats import ops
from gradstats.bench.machine import describe
from gradstats.bench.measure import Call, extra_bytes, interleaved, worst_error
from gradstats.ops import reference
from gradstats.report import write_file

#: Rows, fan-in and fan-out: a small layer, one of a vision transformer and one of a language model's.
LAYERS = {"cpu": ["512x256x1024"], "cuda": ["512x256x1024", "6304x768x3072", "4096x4096x4096"]}
FUSED, PARTS = "at once", "batched product, Gramian"


def ways(inputs: torch.Tensor, cotangents: torch.Tensor, weights: torch.Tensor) -> dict[str, Call]:
    """What is timed; each gives the Gramian, or that and the weighted gradient."""
    tasks, apart = len(cotangents), list(cotangents)
    return {
        FUSED: lambda: ops.linear_gram(inputs, apart),
        PARTS: lambda: ops.gram([cotangents.mT @ inputs], tasks, stacked=True),
        f"{FUSED}, combined": lambda: ops.linear_gram_combine(inputs, apart, weights),
        f"{PARTS}, combined": lambda: ops.gram_combine([cotangents.mT @ inputs], tasks, weights, stacked=True),
    }


def measure(layer: str, tasks: int, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    """Times, memory and errors of all ways for one layer."""
    rows, fan_in, fan_out = map(int, layer.split("x"))
    torch.manual_seed(0)
    inputs = torch.randn(rows, fan_in, device=device).to(dtype)
    cotangents = torch.randn(tasks, rows, fan_out, device=device).to(dtype)
    calls = ways(inputs, cotangents, torch.rand(tasks, dtype=torch.float64, device=device))
    results = {name: call() for name, call in calls.items()}  # compiles, too
    exact = torch.zeros(tasks, tasks, dtype=torch.float64, device=device)
    for block in reference.weight_gradients(inputs.double(), [c.double() for c in cotangents]):
        exact += reference.gram([block], tasks, [], True)
    times = interleaved(calls, {}, device, seconds)
    found = {}
    for name, call in calls.items():
        gram = results[name] if isinstance(results[name], torch.Tensor) else results[name][0]
        found[name] = {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "extra_mebibytes": (grown := extra_bytes(call, device)) and grown / 2**20,
            "error": worst_error(gram, exact),
        }
    return {"layer": layer, "tasks": tasks, "dtype": str(dtype).removeprefix("torch."), "ways": found}


def table(records: Sequence[dict[str, Any]]) -> Table:
    """The records, a line for each way."""
    shown = Table("layer", "T", "dtype", "way", "ms", "extra MiB", "error")
    for record in records:
        for name, facts in record["ways"].items():
            grown = "-" if facts["extra_mebibytes"] is None else f"{facts['extra_mebibytes']:.1f}"
            cells = (f"{facts['milliseconds']:.3g}", grown, f"{facts['error']:.1e}")
            shown.add_row(record["layer"], str(record["tasks"]), record["dtype"], name, *cells)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, show, and write a file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", nargs="+", metavar="ROWSxINxOUT")
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 8, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer, number of tasks and dtype")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    cases = list(product(options.layers or LAYERS[device.type], options.tasks, options.dtypes))
    records = [
        measure(layer, tasks, getattr(torch, dtype), device, options.seconds)
        for layer, tasks, dtype in track(cases, "layers")
    ]
    Console().print(table(records))
    if options.out:
        write_file(options.out, json.dumps({"machine": describe(), "records": records}, indent=1))


if __name__ == "__main__":
    main()

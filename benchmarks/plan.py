"""What ``gradstats.explain`` predicts beside what a collection then takes: bytes and operations.

Every plan is made and followed in a fresh process, on the models of ``cases.py`` with shared samples: the plan that is
chosen freely, and one under a budget (``max_bytes``) of a share of its predicted peak. The graph is kept, so that what
the backward frees hides nothing. ``tensors`` is the peak of what tensors take, from the memory events of torch's
profiler; ``process`` the growth of the resident set, with the scratch memory of libraries and the holes in the heap.
Operations are the multiply-adds of the matrix products and convolutions that torch's FLOP counter sees, and those of
the Gram products; what it does not see (QR decompositions, elementwise work, attention on the CPU) is missing there.

    python benchmarks/plan.py --out benchmarks/results/plan.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import MODELS, build_case
from collect import in_fresh_process, peak_mebibytes
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import gradstats
from gradstats.bench.machine import describe
from gradstats.report import write_file


def gram_flops(grads: list[torch.Size], num_tasks: int, *_: Any, **__: Any) -> int:
    """Of one call of the operator, from the shapes of its arguments."""
    entries = sum(shape.numel() for shape in grads) // num_tasks
    return num_tasks * (num_tasks + 1) * entries


def linear_gram_flops(inputs: torch.Size, cotangents: list[torch.Size], *_: Any, **__: Any) -> int:
    """The same of ``linear_gram``, which forms the gradients."""
    gradient = torch.Size((cotangents[0][1], inputs[1]))
    return 2 * len(cotangents) * inputs[0] * gradient.numel() + gram_flops(
        [gradient] * len(cotangents), len(cotangents)
    )


def peak_of_tensors(seen: profile) -> int:
    """Most bytes that the tensors made under the profiler have taken at once."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in changes), default=0)


def follow_plan(model: str, num_tasks: int, share: float, _: Callable[[str], None]) -> dict[str, Any]:
    """Predicted and measured MiB and 10⁶ operations; to be run in a fresh process."""
    tiny = build_case("tiny", 2, "shared")
    gradstats.from_losses(tiny.forward()[1], tiny.parameters)
    torch.vmap(lambda x: 2 * x)(torch.ones(2))
    torch.linalg.qr(torch.randn(8, 4, dtype=torch.float64))
    case = build_case(model, num_tasks, "shared")
    losses = case.forward()[1]
    free = gradstats.explain(losses, case.parameters)
    budget = None if share == 1 else int(share * free.bytes)
    try:
        plan = gradstats.explain(losses, case.parameters, max_bytes=budget)
    except ValueError as error:
        return {"absent": str(error)}
    gc.collect()
    with contextlib.suppress(OSError):  # lets the peak start again from the present size, where permitted
        Path("/proc/self/clear_refs").write_text("5")
    base = peak_mebibytes()
    start = time.process_time()
    gradstats.from_losses(losses, case.parameters, max_bytes=budget, retain_graph=True)
    seconds = time.process_time() - start
    grown = peak_mebibytes() - base
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        gradstats.from_losses(losses, case.parameters, max_bytes=budget, retain_graph=True)
    flops = {torch.ops.gradstats.gram: gram_flops, torch.ops.gradstats.linear_gram: linear_gram_flops}
    with FlopCounterMode(display=False, custom_mapping=flops) as counter:
        gradstats.from_losses(losses, case.parameters, max_bytes=budget)
    return {
        "mebibytes": {"predicted": plan.bytes / 2**20, "tensors": peak_of_tensors(seen) / 2**20, "process": grown},
        "million_operations": {"predicted": plan.operations / 1e6, "counted": counter.get_total_flops() / 2e6},
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]]) -> Table:
    """One line for each plan."""
    shown = Table("model", "T", "budget", "MiB: predicted", "tensors", "process", "10⁶ op.: predicted", "counted", "s")
    for r in records:
        start = [r["model"], str(r["num_tasks"]), f"{r['share']:.0%}"]
        if "absent" in r:
            shown.add_row(*start, r["absent"])
            continue
        sizes, work = r["mebibytes"], r["million_operations"]
        pairs = [f"{pair[key]:.{digits}f}" for pair, digits in ((sizes, 1), (work, 0)) for key in pair]
        shown.add_row(*start, *pairs, f"{r['seconds']:.2f}")
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    models = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=models)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.8], help="of the free plan's bytes")
    options = parser.parse_args(arguments)

    records = []
    for model in options.models:
        for num_tasks in options.tasks:
            for share in options.shares:
                found = in_fresh_process(follow_plan, model, num_tasks, share)
                records.append({"model": model, "num_tasks": num_tasks, "share": share} | found)
    Console(width=120).print(table(records))
    if options.out is not None:
        results = {"machine": describe(), "records": records}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

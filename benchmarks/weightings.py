"""Time the weightings beside TorchJD's, on the same Gramians or losses, on one thread.

Blocks of calls (5 ms of them, or one call) alternate between the libraries, so that a busy moment hits both, and the
medians of the blocks' CPU times are compared. TorchJD keeps to its defaults.

For functions of the Gramian a call is from Gramian to weights. Gradients are of three kinds: independent, of which half
the pairs conflict; such that agree with one another; and such that conflict, being of norms from 1 to 10 and for or
against a common direction in turn. Quadratic programs are also timed where they are hardest: independent gradients,
twice as many as there are dimensions. TorchJD's Nash-MTL and ConFIG start from the gradients, here 1,000 entries long,
and the former from the solution of the call before. AutoScale's call is the one that takes longest: the weights of
least condition number for the ten Gramians of a window.

For those made of losses a call is a step: from the losses to the gradient of the scalar that is minimised with respect
to them, since TorchJD gives the scalar where we give weights, and whatever the method learns. What TorchJD leaves to
the network's optimizer is learned by ``torch.optim.Adam``, and its DWA is told of an epoch every 100 steps, as ours
takes it by default.

    OMP_NUM_THREADS=1 python benchmarks/weightings.py --out benchmarks/results/weightings.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchjd.aggregation as jd
import torchjd.scalarization
from collect import describe, stamp
from render import HARDEST
from rich.progress import track
from torch import Tensor

from gradstats.report import write_file
from gradstats.weighting import create
from gradstats.weighting.condition import least_condition

SIZES = (2, 8, 32, 128)
KINDS = ("independent", "agreeing", "conflicting")
PROGRAMS = ("mgda", "cagrad", "upgrad", "dualproj", "pcd")
ENTRIES = 1000
WINDOW = "autoscale"
BLOCK_SECONDS = 0.005
Call = Callable[[], object]
#: From the gradients and their Gramian to weights or, for ConFIG, the aggregated gradient.
Weigh = Callable[[Tensor, Tensor], Tensor]


def on_gramian(weighting: Callable[[Tensor], Tensor]) -> Weigh:
    """What needs the Gramian alone."""
    return lambda jacobian, gram: weighting(gram)


#: TorchJD's functions of the Gramian, by our names, for a number of tasks; None where it has none.
THEIRS: dict[str, Callable[[int], Weigh | None]] = {
    "exact_slw": lambda num_tasks: None,
    "mgda": lambda num_tasks: on_gramian(jd.MGDAWeighting()),
    "pcgrad": lambda num_tasks: on_gramian(jd.PCGradWeighting()),
    "gradvac": lambda num_tasks: on_gramian(jd.GradVacWeighting()),
    "cagrad": lambda num_tasks: on_gramian(jd.CAGradWeighting(c=0.5)),
    "imtl_g": lambda num_tasks: on_gramian(jd.IMTLGWeighting()),
    "nash_mtl": lambda num_tasks: nash_mtl(num_tasks),
    "fairgrad": lambda num_tasks: on_gramian(jd.FairGradWeighting(alpha=2.0)),
    "aligned_mtl": lambda num_tasks: on_gramian(jd.AlignedMTLWeighting()),
    "upgrad": lambda num_tasks: on_gramian(jd.UPGradWeighting()),
    "dualproj": lambda num_tasks: on_gramian(jd.DualProjWeighting()),
    "config": lambda num_tasks: lambda jacobian, gram: jd.ConFIG()(jacobian),
    "sdmgrad": lambda num_tasks: on_gramian(jd.SDMGradWeighting()),
    "modo": lambda num_tasks: on_gramian(jd.MoDoWeighting()),
    "pcd": lambda num_tasks: on_gramian(jd.PCDWeighting()),
    "krum": lambda num_tasks: on_gramian(jd.KrumWeighting(n_byzantine=0)) if num_tasks > 2 else None,
}


#: TorchJD's functions of the losses, by our names, for a number of tasks.
SCALARIZERS: dict[str, Callable[[int], torch.nn.Module]] = {
    "uw": lambda num_tasks: torchjd.scalarization.UW(num_tasks).double(),
    "dwa": lambda num_tasks: torchjd.scalarization.DWA(),
    "rlw": lambda num_tasks: torchjd.scalarization.Random(),
    "gls": lambda num_tasks: torchjd.scalarization.GeometricMean(),
    "famo": lambda num_tasks: torchjd.scalarization.FAMO(num_tasks).double(),
    "stch": lambda num_tasks: torchjd.scalarization.STCH(1.0),
    "cosmos": lambda num_tasks: torchjd.scalarization.COSMOS(1.0, torch.ones(num_tasks).double()),
    "pbi": lambda num_tasks: torchjd.scalarization.PBI(5.0, torch.ones(num_tasks).double()),
    "imtl_l": lambda num_tasks: torchjd.scalarization.IMTLL(num_tasks).double(),
}


def nash_mtl(num_tasks: int) -> Weigh:
    """Nash-MTL with the settings of its authors."""
    weighting = jd.NashMTL(num_tasks, max_norm=1.0, update_weights_every=1, optim_niter=20).weighting
    return lambda jacobian, gram: weighting(jacobian)


def gradients(kind: str, num_tasks: int, sample: int = 0) -> Tensor:
    """Gradients ``[T, ENTRIES]`` of a kind."""
    generator = torch.Generator().manual_seed(1000 * sample + num_tasks)
    jacobian = torch.randn(num_tasks, ENTRIES, dtype=torch.float64, generator=generator)
    if kind == HARDEST:
        jacobian[:, num_tasks // 2 :] = 0.0
    common = torch.randn(ENTRIES, dtype=torch.float64, generator=generator)
    if kind == "agreeing":
        return jacobian + common
    if kind == "conflicting":
        signs = 1.0 - 2.0 * (torch.arange(num_tasks) % 2)
        norms = torch.logspace(0.0, 1.0, num_tasks, dtype=torch.float64)
        return norms[:, None] * (jacobian + signs[:, None] * common)
    return jacobian


def gramian_calls(name: str, kind: str, num_tasks: int) -> dict[str, Call]:
    """From a Gramian to weights, by library."""
    jacobian = gradients(kind, num_tasks)
    gram = jacobian @ jacobian.T
    weighting, theirs = create(name, num_tasks), THEIRS[name](num_tasks)
    calls: dict[str, Call] = {"gradstats": lambda: weighting.from_gram(gram)}
    if theirs is not None:
        calls["torchjd"] = functools.partial(theirs, jacobian, gram)
    return calls


def window_calls(kind: str, num_tasks: int) -> dict[str, Call]:
    """The weights of a window of AutoScale."""
    jacobians = torch.stack([gradients(kind, num_tasks, sample) for sample in range(10)])
    grams = (jacobians @ jacobians.mT).numpy()
    equal_norms = -np.log(grams.diagonal(axis1=1, axis2=2)).mean(0) / 2.0
    return {"gradstats": lambda: least_condition(grams, equal_norms)}


def loss_calls(name: str, losses: Tensor) -> dict[str, Call]:
    """From losses, a leaf ``[T]``, to their gradients and what is learned, by library."""
    weighting, theirs = create(name, len(losses)), SCALARIZERS[name](len(losses))
    # FAMO's parameter has an optimizer of its own.
    parameters = [] if name == "famo" else list(theirs.parameters())
    optimizer = torch.optim.Adam(parameters) if parameters else None
    steps, learns = itertools.count(1), "after_step" in weighting.needs

    def ours() -> None:
        losses.grad = None
        torch.dot(losses, weighting(losses.detach())).backward()
        if learns:
            weighting.after_step(losses.detach())

    def torchjd_step() -> None:
        losses.grad = None
        theirs(losses).backward()
        if isinstance(theirs, torchjd.scalarization.FAMO):
            theirs.update(losses.detach())
        elif isinstance(theirs, torchjd.scalarization.DWA) and next(steps) % 100 == 0:
            theirs.step()
        elif optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return {"gradstats": ours, "torchjd": torchjd_step}


def time_block(call: Call) -> float:
    """Seconds of CPU time of a call, in a block of them."""
    start, count = time.process_time(), 0
    while not count or time.process_time() - start < BLOCK_SECONDS:
        call()
        count += 1
    return (time.process_time() - start) / count


def measure(name: str, kind: str, num_tasks: int, seconds: float) -> dict[str, Any]:
    """One record: the medians of alternating blocks, in µs of CPU time a call."""
    losses = torch.linspace(0.1, 1.0, num_tasks, dtype=torch.float64, requires_grad=True)
    if kind == "losses":
        calls = loss_calls(name, losses)
    else:
        calls = window_calls(kind, num_tasks) if name == WINDOW else gramian_calls(name, kind, num_tasks)
    times: dict[str, list[float]] = {library: [] for library in calls}
    begin = time.perf_counter()
    while len(times["gradstats"]) < 5 or time.perf_counter() - begin < seconds:
        for library, call in calls.items():
            times[library].append(time_block(call))
    medians = {library: round(statistics.median(values) * 1e6, 1) for library, values in times.items()}
    return {"name": name, "kind": kind, "num_tasks": num_tasks, "rounds": len(times["gradstats"])} | medians


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    names = [*THEIRS, *SCALARIZERS, WINDOW]
    parser.add_argument("--names", nargs="+", choices=names, default=names)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each comparison, at least (0.5)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of TorchJD's solvers
    kinds = {name: ("losses",) if name in SCALARIZERS else KINDS for name in options.names}
    kinds |= {name: (*KINDS, HARDEST) for name in PROGRAMS if name in kinds}
    cases = [(name, kind, size) for size in options.sizes for name in options.names for kind in kinds[name]]
    records = [measure(*case, options.seconds) for case in track(cases, "weightings", transient=True)]
    write_file(options.out, json.dumps(describe() | stamp() | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()

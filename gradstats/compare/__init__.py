"""Compare weightings on an experiment: any number of them and of seeds, in parallel, resumable."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Not imported here: Lightning takes seconds, and the runs alone need it.
if any(importlib.util.find_spec(name) is None for name in ("lightning", "matplotlib", "tqdm")):
    raise ImportError(
        "gradstats.compare needs Lightning Fabric, tqdm and matplotlib; install them with: "
        'pip install "gradstats[train,plot]"'
    )

from gradstats.compare.experiment import BUILT_IN, Experiment, Metric, Source, moved, score
from gradstats.compare.results import NOTES, Results, read
from gradstats.compare.runs import UNITARY, Run, finished, make_weighting, train_all, without_required_options

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

__all__ = ["BUILT_IN", "NOTES", "Experiment", "Metric", "Results", "Source", "compare", "moved", "score"]


def compare(
    experiment: str,
    *,
    out: str | os.PathLike[str],
    weightings: Sequence[str] | None = None,
    seeds: int = 3,
    data: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    jobs: int = 1,
    threads: int = 1,
    progress: bool = True,
) -> Results:
    """Train every weighting with every seed, and the single-task references, and write what came of it.

    Each run has a process of its own and, once it is done, a file in ``out/runs``, so that killing this loses at most
    the runs in progress; called again it trains only what is missing. ``out`` then has ``results.csv`` (a row for each
    run and metric), ``results.md`` (a row for each method) and pictures.

    Call it from under ``if __name__ == "__main__":`` in scripts, as ``multiprocessing`` asks for.

    Args:
        experiment: Name of a built-in experiment ("digits", "tox21", "nyuv2") or path of a Python file that defines
            one subclass of :class:`Experiment`.
        out: Folder for the results.
        weightings: Weightings by name, with options in brackets where needed, such as ``"autoscale(cost=condition)"``;
            None for all that need no options. "uniform" is always among them, since times are relative to it.
        seeds: Number of seeds; they count from 0.
        data: Folder with the experiment's data.
        settings: Settings of the experiment that differ from its defaults, such as ``{"epochs": 5}``.
        jobs: Runs at a time.
        threads: Threads of torch in each.
        progress: Whether to show a progress bar.

    Returns:
        The results of the runs that are there.

    Raises:
        ValueError: If an argument is out of its range, a name is unknown, or ``out`` holds a run of other settings.
        FileNotFoundError: If a file of the data is missing.
        RuntimeError: If runs failed; says which and why, with tracebacks in the log. The others' results are written.
    """
    for name, value in {"seeds": seeds, "jobs": jobs, "threads": threads}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    source = Source(experiment, None if data is None else Path(data), dict(settings or {}))
    loaded = source.load()
    names = list(dict.fromkeys([UNITARY, *(without_required_options() if weightings is None else weightings)]))
    for name in names:
        make_weighting(name, len(loaded.tasks), total_steps=1000)  # so that a wrong one fails before anything runs
    tasks = tuple(loaded.tasks)
    runs = [Run(source, UNITARY, (task,), seed, threads) for seed in range(seeds) for task in tasks]
    runs += [Run(source, name, tasks, seed, threads) for seed in range(seeds) for name in names]

    folder = Path(out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    done = finished(runs, folder, loaded.settings())
    failures = train_all([run for run in runs if run not in done], folder, jobs=jobs, progress=progress)
    failed = [run for run, _ in failures]
    results = Results(read([run for run in runs if run not in failed], folder), loaded.metrics)
    if results.methods:
        results.write(Path(out))
    if failures:
        listed = "\n".join(f"{run.method}, seed {run.seed}: {why.splitlines()[-1]}" for run, why in failures)
        raise RuntimeError(f"{len(failures)} of {len(runs)} runs failed; the others are in {out}\n{listed}")
    return results

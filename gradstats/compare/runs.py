"""Single trainings, and many of them in parallel processes: each leaves one JSON file once it is done."""

from __future__ import annotations

import ast
import json
import logging
import math
import multiprocessing
import platform
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

import gradstats
from gradstats.compare.experiment import Source, score
from gradstats.report import write_file
from gradstats.weighting import Weighting, available, create, options

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor, nn

logger = logging.getLogger(__name__)

SINGLE, UNITARY = "single-task", "uniform"
_LOGGED = 100  # times that the weights of a run are written down


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        source: The experiment.
        weighting: A weighting as :func:`make_weighting` reads it.
        tasks: The tasks trained together: all, or one as a reference.
        seed: Seed of the model, of the batches and of whatever else is random.
        threads: Threads of torch.
    """

    source: Source
    weighting: str
    tasks: tuple[str, ...]
    seed: int
    threads: int = 1

    @property
    def method(self) -> str:
        """The weighting, or "single-task" with the task's name."""
        return self.weighting if len(self.tasks) > 1 else f"{SINGLE} {self.tasks[0]}"

    @property
    def file(self) -> str:
        """Name of the run's file."""
        return f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', self.method).strip('-')}-seed{self.seed}.json"

    def identity(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What another run must share to count as this one, in types of JSON; ``settings`` are all the experiment's."""
        identity: dict[str, Any] = {
            "experiment": self.source.name,
            "fingerprint": self.source.fingerprint(),
            "settings": settings,
            "weighting": self.weighting,
            "tasks": self.tasks,
            "seed": self.seed,
            "threads": self.threads,
        }
        in_json: dict[str, Any] = json.loads(json.dumps(identity))
        return in_json


def make_weighting(text: str, num_tasks: int, **context: int) -> Weighting:
    """The weighting that ``text`` describes: a name, with options in brackets where needed.

    For example ``slaw``, ``autoscale(cost=condition)`` or ``fixed(weights=[1,2.5])``.

    Args:
        text: The description.
        num_tasks: Number of tasks ``T``.
        context: What the training is, by the options that ask for it (``total_steps``; ``seed``; ``window``, the steps
            of an epoch). Those that the weighting has, and ``text`` does not give, are added.

    Raises:
        ValueError: If the text cannot be read, or names no weighting.
        TypeError: If the weighting has no such option, or a required one is missing.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        name, keywords = (call.func, call.keywords) if isinstance(call, ast.Call) and not call.args else (call, [])
        assert isinstance(name, ast.Name)
        given = {
            str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value) for k in keywords
        }
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"weighting: expected a name or name(option=value, ...), got {text!r}") from error
    known = options(name.id) if name.id in available() else ()
    return create(name.id, num_tasks, **{k: v for k, v in context.items() if k in known} | given)


def without_required_options() -> list[str]:
    """The weightings that need to be told nothing but the number of tasks and steps."""
    return [
        name
        for name in available()
        if all(p.default is not p.empty for option, p in options(name).items() if option != "total_steps")
    ]


# ---- one run --------------------------------------------------------------------------------------------------------


def train(run: Run) -> dict[str, Any]:
    """Train and evaluate; returns what the run's file holds.

    The model of the epoch that scored best on the validation data is evaluated on the test data. Seconds are those of
    the optimizer steps alone (forward, weighting, backward, update), processor time on a CPU and wall time elsewhere;
    memory is the growth of the peak over what was in use before the first step, None where it cannot be measured.

    Raises:
        ValueError: If a metric is not finite.
        FloatingPointError: If a loss is not.
    """
    from gradstats.train import Trainer  # here, because importing Lightning takes seconds that only this needs

    torch.set_num_threads(run.threads)
    experiment = run.source.load()
    torch.manual_seed(run.seed)
    model = experiment.make_model(run.tasks)
    loader = experiment.train_loader()
    steps = experiment.epochs * len(loader)
    optimizer, scheduler = experiment.make_optimizer(model, steps)
    weighting = make_weighting(run.weighting, len(run.tasks), total_steps=steps, seed=run.seed, window=len(loader))
    clock = _StepClock()

    def compute_losses(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        clock.start()
        losses = experiment.compute_losses(model, batch)
        if not torch.is_grad_enabled():  # once more after a step, for weightings that ask what it has achieved
            clock.stop()
        return losses

    def evaluate(model: nn.Module) -> dict[str, float]:
        metrics = experiment.evaluate(model, "valid")
        return {"score": score(metrics), **{str(metric): value for metric, value in metrics.items()}}

    log_every = math.ceil(steps / _LOGGED)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            compute_losses,
            optimizer,
            gradstats.Scalarizer(weighting, tasks=run.tasks),
            evaluate=evaluate,
            scheduler=scheduler,
            scheduler_interval="step",
            max_epochs=experiment.epochs,
            monitor="val/score",
            mode="max",
            restore_best=True,
            directory=folder,
            loggers=[],
            log_every=log_every,
            seed=run.seed,
            progress=False,
        )
        optimizer.register_step_post_hook(clock.stop)
        memory = _Memory(trainer.fabric.device)
        history = trainer.fit(loader)
        grown = memory.growth()
    model.eval()
    with torch.no_grad():
        metrics = experiment.evaluate(model, "test")
    broken = [f"{metric} is {value}" for metric, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"the test metrics of {run.method}, seed {run.seed}: {', '.join(broken)}")
    rows = [row for row in history.steps if row["step"] % log_every == 0]
    return {
        "identity": run.identity(experiment.settings()),
        "versions": {
            "gradstats": gradstats.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": str(trainer.fabric.device),
        "metrics": [{**vars(metric), "value": value} for metric, value in metrics.items()],
        "best_epoch": max(history.epochs, key=lambda row: row["val/score"])["epoch"],
        "seconds": clock.seconds,
        "memory": grown,
        "weights": {
            "step": [row["step"] for row in rows],
            **{task: [row[f"weight/{task}"] for row in rows] for task in run.tasks},
        },
    }


class _StepClock:
    """Seconds spent between the start of the losses and the end of the optimizer's step."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    def start(self) -> None:
        self._began = self._now()

    def stop(self, *_: Any) -> None:
        self.seconds += self._now() - self._began

    @staticmethod
    def _now() -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


class _Memory:
    """Growth of the peak memory since it was made, in bytes: of the process on Linux, of the allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is in use now
        self._before = self._peak()

    def growth(self) -> int | None:
        after = self._peak()
        return None if after is None or self._before is None else after - self._before

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        status = Path("/proc/self/status")
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        return None if found is None else 1024 * int(found[1])


# ---- many runs ------------------------------------------------------------------------------------------------------


def finished(runs: Sequence[Run], folder: Path, settings: Mapping[str, Any]) -> list[Run]:
    """Those of ``runs`` whose files are in ``folder``.

    Raises:
        ValueError: If a file there holds a run of other settings; names it and the differences.
    """
    done = []
    for run in runs:
        path = folder / run.file
        if not path.exists():
            continue
        there, here = json.loads(path.read_text(encoding="utf-8"))["identity"], run.identity(settings)
        differences = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
        if differences:
            raise ValueError(
                f"out: {path} holds a run of other settings ({'; '.join(differences)}); "
                "choose another folder, or remove the file"
            )
        done.append(run)
    return done


def train_all(runs: Sequence[Run], folder: Path, *, jobs: int, progress: bool) -> list[tuple[Run, str]]:
    """Train every run in a process of its own, ``jobs`` at a time; each writes its file into ``folder`` at its end.

    Returns:
        The runs that failed, each with the reason.
    """
    failures = []
    context = _context()
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit="run", disable=not (progress and runs)) as bar:
        futures = {pool.submit(_train_apart, context, run, folder / run.file): run for run in runs}
        try:
            for future in as_completed(futures):
                run, error = futures[future], future.result()
                if error is not None:
                    failures.append((run, error))
                    logger.error("%s, seed %d failed: %s", run.method, run.seed, error)
                bar.set_postfix_str(f"{run.method}, seed {run.seed}", refresh=False)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def _context() -> Any:
    """Fresh processes; where the system can fork, they share the imports, which take seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "gradstats.train"])
    return context


# Starting a process also asks for the exit codes of all others that have ended, and where two threads ask for one at
# once, one of them gets a wrong answer.
_processes = threading.Lock()


def _train_apart(context: Any, run: Run, path: Path) -> str | None:
    """Train in a new process; returns why it failed, or None."""
    receiver, sender = context.Pipe(duplex=False)
    code = _run_apart(context, _train_to_file, run, path, sender)
    sender.close()
    if code == 0:
        return None
    try:
        return str(receiver.recv())
    except EOFError:
        return f"its process ended with exit code {code}"


def _run_apart(context: Any, function: Callable[..., object], *arguments: object) -> int:
    """Call a function in a new process; returns its exit code."""
    process = context.Process(target=function, args=arguments, daemon=True)
    with _processes:
        process.start()
    wait([process.sentinel])
    with _processes:
        process.join()
    return int(process.exitcode)


def _train_to_file(run: Run, path: Path, errors: Connection) -> None:
    """What the new process does."""
    logging.getLogger("lightning").setLevel(logging.WARNING)
    try:
        write_file(path, json.dumps(train(run), indent=1) + "\n")
    except Exception:
        errors.send(traceback.format_exc())
        raise SystemExit(1) from None

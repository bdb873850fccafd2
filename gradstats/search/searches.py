"""Population-based training, random search and grid search over fixed weights, with one interface.

Royer et al. (arXiv 2310.08910, "Scalarization for Multi-Task and Multi-Domain Learning at Scale") search the weights
by population-based training (Jaderberg et al., 2017). Their settings are not public; those here are Ray's defaults and,
where it says so, our choice.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from gradstats.report import table, write_file
from gradstats.search.trial import SCHEDULE, train_trial
from gradstats.train import History
from gradstats.train.trainer import LAST

if TYPE_CHECKING:
    import os

    from torch.utils.data import DataLoader

    from gradstats.train import Trainer

logger = logging.getLogger(__name__)

Weights = dict[str, float]
_WIDEST = 10.0  # first weights are drawn from 1 / _WIDEST to _WIDEST, before they are scaled to their sum


class MakeTrainer(Protocol):
    """How to train with given weights: the caller's function."""

    def __call__(self, weights: Weights, **options: Any) -> tuple[Trainer, DataLoader[Any], DataLoader[Any] | None]:
        """A fresh trainer with a fixed weighting, its training loader and its validation loader, if it has one.

        Args:
            weights: Weight of each task, for ``Scalarizer("fixed", tasks=tasks, weights=weights)``.
            **options: To be handed on to the :class:`gradstats.train.Trainer`: folder, loggers, progress bar.
        """


@dataclass(frozen=True)
class Found:
    """What a search has found; ``print`` gives a table of all trials.

    Attributes:
        weights: The best weights: those in force at the end of the best trial, scaled to ``sum(w) = T``.
        value: The metric at the end of the best trial.
        schedule: For each epoch that led to the best trial's final model, the epoch and the weights in force; with
            population-based training the epochs before an exploitation are those of the trial that was copied.
        history: Of a training with ``weights`` fixed; of the best trial, where population-based training retrains none.
        trials: For each trial, best first, the metric's last value, its epochs and its last weights.
        metric: Name of the metric.
    """

    weights: Weights
    value: float
    schedule: list[tuple[int, Weights]]
    history: History
    trials: list[tuple[float, int, Weights]]
    metric: str

    def __str__(self) -> str:
        rows = [
            [str(place), f"{value:.5g}", str(epochs), *(f"{weight:.4g}" for weight in weights.values())]
            for place, (value, epochs, weights) in enumerate(self.trials, start=1)
        ]
        return table(["trial", self.metric, "epochs", *(f"weight of {task}" for task in self.weights)], rows)


def population_based_training(
    make_trainer: MakeTrainer,
    tasks: Sequence[str],
    *,
    directory: str | os.PathLike[str],
    metric: str,
    mode: Literal["min", "max"],
    population: int = 8,
    interval: int = 1,
    seed: int = 0,
    retrain: bool = True,
    resources: Mapping[str, float] | None = None,
    max_failures: int = 2,
    progress: bool = True,
) -> Found:
    """Train a population of models whose weights adapt: those behind copy those ahead and change their weights.

    Every ``interval`` epochs a trial of the worst quarter copies model, optimizer and weights of one of the best
    quarter. Each of its weights is then multiplied by 0.8 or 1.2 (a step in log-weights) or, with probability 0.25,
    drawn anew, and all are scaled to ``sum(w) = T``. These shares, factors and probabilities are the defaults of Ray's
    ``PopulationBasedTraining``, which does the work. The first trial starts from equal weights, the others from
    weights drawn log-uniformly from 0.1 to 10 and scaled (our choice).

    Trials run in parallel as Ray has resources for them, here or on the cluster that ``RAY_ADDRESS`` names, where
    ``directory`` must be one that all nodes share. A trial whose process dies goes on from its last epoch. Called
    again with the same ``directory``, an interrupted search is resumed and a finished one is not repeated.

    Args:
        make_trainer: See :class:`MakeTrainer`. Ray sends it to other processes, so it should hold no large data.
        tasks: Names of the tasks.
        directory: Folder for checkpoints and results. Every epoch of every trial keeps a checkpoint.
        metric: Column of ``history.epochs`` that decides, such as ``"val/accuracy"``.
        mode: Whether ``"min"`` or ``"max"`` of it is best.
        population: Number of trials, at least 2.
        interval: Epochs between exploitations.
        seed: Seed of the first weights. (What Ray draws later, and the order in which trials end, it does not cover.)
        retrain: Whether to train once more from scratch, in this process, with the best final weights fixed.
        resources: Of each trial, such as ``{"cpu": 4, "gpu": 1}``; None for one CPU.
        max_failures: How often a trial may fail before it is given up.
        progress: Whether Ray reports on the trials as they run.

    Raises:
        ValueError: If an argument is out of its range.
        RuntimeError: If no trial came to an end.
    """
    _check_positive(interval=interval)
    if not isinstance(population, int) or population < 2:
        raise ValueError(f"population: expected an integer of at least 2, got {population!r}")
    first = [dict.fromkeys(tasks, 1.0), *_drawn(tasks, population - 1, seed)]
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=interval,
        hyperparam_mutations={"weights": {task: tune.loguniform(1 / _WIDEST, _WIDEST) for task in tasks}},
        custom_explore_fn=_rescaled,
    )
    search = _Search(make_trainer, tasks, Path(directory), metric, mode, resources, max_failures, progress)
    return search.run(first, scheduler, retrain=retrain)


def random_search(
    make_trainer: MakeTrainer,
    tasks: Sequence[str],
    *,
    directory: str | os.PathLike[str],
    metric: str,
    mode: Literal["min", "max"],
    samples: int = 20,
    seed: int = 0,
    resources: Mapping[str, float] | None = None,
    max_failures: int = 2,
    progress: bool = True,
) -> Found:
    """Train with each of ``samples`` weights drawn uniformly from the simplex ``sum(w) = T``.

    Weights that differ a thousandfold are rare among them: bring losses of very different scale to one scale first.

    Args:
        make_trainer: As for :func:`population_based_training`, as are all others that are not listed here.
        tasks: Names of the tasks.
        directory: Folder for checkpoints and results.
        metric: Column of ``history.epochs`` that decides.
        mode: Whether ``"min"`` or ``"max"`` of it is best.
        samples: Number of weights.
        seed: Seed of the weights.
        resources: Of each trial.
        max_failures: How often a trial may fail.
        progress: Whether Ray reports.

    Raises:
        ValueError: If an argument is out of its range.
        RuntimeError: If no trial came to an end.
    """
    _check_positive(samples=samples)
    drawn = np.random.default_rng(seed).dirichlet(np.ones(len(tasks)), samples) * len(tasks)
    candidates = [dict(zip(tasks, row, strict=True)) for row in drawn.tolist()]
    search = _Search(make_trainer, tasks, Path(directory), metric, mode, resources, max_failures, progress)
    return search.run(candidates)


def grid_search(
    make_trainer: MakeTrainer,
    tasks: Sequence[str],
    *,
    directory: str | os.PathLike[str],
    metric: str,
    mode: Literal["min", "max"],
    divisions: int = 10,
    resources: Mapping[str, float] | None = None,
    max_failures: int = 2,
    progress: bool = True,
) -> Found:
    """Train with all positive weights on the simplex that are multiples of ``T / divisions``.

    That is ``binomial(divisions - 1, T - 1)`` trainings: 9 for two tasks and ten divisions, 36 for three.

    Args:
        make_trainer: As for :func:`population_based_training`, as are all others that are not listed here.
        tasks: Names of the tasks.
        directory: Folder for checkpoints and results.
        metric: Column of ``history.epochs`` that decides.
        mode: Whether ``"min"`` or ``"max"`` of it is best.
        divisions: Parts into which the simplex is divided along each task; at least ``T``.
        resources: Of each trial.
        max_failures: How often a trial may fail.
        progress: Whether Ray reports.

    Raises:
        ValueError: If an argument is out of its range.
        RuntimeError: If no trial came to an end.
    """
    if not isinstance(divisions, int) or divisions < len(tasks):
        raise ValueError(
            f"divisions: expected an integer of at least {len(tasks)}, the number of tasks, got {divisions!r}"
        )
    # Positive integers of the sum `divisions` are the gaps between T - 1 different cuts.
    cuts = itertools.combinations(range(1, divisions), len(tasks) - 1)
    parts = [[b - a for a, b in itertools.pairwise((0, *cut, divisions))] for cut in cuts]
    candidates = [{task: len(tasks) * part / divisions for task, part in zip(tasks, row, strict=True)} for row in parts]
    search = _Search(make_trainer, tasks, Path(directory), metric, mode, resources, max_failures, progress)
    return search.run(candidates)


@dataclass(frozen=True)
class _Search:
    """What the three searches share."""

    make_trainer: MakeTrainer
    tasks: Sequence[str]
    directory: Path
    metric: str
    mode: Literal["min", "max"]
    resources: Mapping[str, float] | None
    max_failures: int
    progress: bool

    def __post_init__(self) -> None:
        if len(self.tasks) < 2 or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks: expected at least two different names, got {list(self.tasks)}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode: expected 'min' or 'max', got {self.mode!r}")

    def run(self, candidates: list[Weights], scheduler: Any = None, *, retrain: bool = False) -> Found:
        """Train from each candidate, or go on with that."""
        folder = self.directory.absolute()
        self._check_settings(folder / "settings.json", candidates)
        trainable = tune.with_resources(
            tune.with_parameters(train_trial, make_trainer=self.make_trainer), dict(self.resources or {"cpu": 1})
        )
        space = {"weights": tune.grid_search(candidates)}
        if tune.Tuner.can_restore(str(folder / "trials")):
            # The space is for a search killed before Ray's first note of where its trials stand: it starts afresh.
            tuner = tune.Tuner.restore(
                str(folder / "trials"), trainable, param_space=space, resume_unfinished=True, restart_errored=True
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=space,
                # One process after the other would import everything anew: they are kept, and given other trials.
                tune_config=tune.TuneConfig(metric=self.metric, mode=self.mode, scheduler=scheduler, reuse_actors=True),
                run_config=tune.RunConfig(
                    name="trials",
                    storage_path=str(folder),
                    failure_config=tune.FailureConfig(max_failures=self.max_failures),
                    verbose=1 if self.progress else 0,
                ),
            )
        results = tuner.fit()
        trials = [_Trial.of(results[i], self.metric) for i in range(len(results))]
        ended = sorted((trial for trial in trials if trial is not None), key=self._place)
        if not ended:
            raise RuntimeError(f"no trial reported {self.metric!r}; Ray's reports in {folder} say why")
        best = ended[0]
        with best.checkpoint.as_directory() as checkpoint:
            schedule = json.loads(Path(checkpoint, SCHEDULE).read_text(encoding="utf-8"))
            state = torch.load(Path(checkpoint, LAST), weights_only=True)["history"]
        history = History()
        history.load_state_dict(state)
        if retrain:
            options = {"directory": folder / "retrained", "progress": self.progress}
            trainer, train_loader, val_loader = self.make_trainer(best.weights, **options)
            history = trainer.fit(train_loader, val_loader, resume=True)
        return Found(
            weights=best.weights,
            value=best.value,
            schedule=[(epoch, weights) for epoch, weights in schedule],
            history=history,
            trials=[(trial.value, trial.epochs, trial.weights) for trial in ended],
            metric=self.metric,
        )

    def _place(self, trial: _Trial) -> float:
        return math.inf if math.isnan(trial.value) else trial.value if self.mode == "min" else -trial.value

    def _check_settings(self, path: Path, candidates: list[Weights]) -> None:
        """Write down what is searched, or refuse a folder in which something else was."""
        own = {"first weights": candidates, "metric": self.metric, "mode": self.mode}
        if path.exists() and (there := json.loads(path.read_text(encoding="utf-8"))) != own:
            differences = ", ".join(key for key in own if own[key] != there.get(key))
            raise ValueError(f"directory: {path.parent} holds a search that differs in {differences}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(own, indent=1) + "\n")


@dataclass(frozen=True)
class _Trial:
    """Where a trial stands at its end."""

    value: float
    epochs: int
    weights: Weights
    checkpoint: tune.Checkpoint

    @classmethod
    def of(cls, result: tune.Result, metric: str) -> _Trial | None:
        """None for a trial that failed."""
        if result.error is not None or not result.metrics or metric not in result.metrics or result.checkpoint is None:
            logger.warning("a trial failed; see %s", result.path)
            return None
        config = result.metrics["config"]
        return cls(result.metrics[metric], int(result.metrics["epoch"]), config["weights"], result.checkpoint)


def _drawn(tasks: Sequence[str], count: int, seed: int) -> list[Weights]:
    """Log-uniform weights, scaled."""
    logs = np.random.default_rng(seed).uniform(-math.log(_WIDEST), math.log(_WIDEST), (count, len(tasks)))
    return [_scaled(dict(zip(tasks, row, strict=True))) for row in np.exp(logs).tolist()]


def _scaled(weights: Mapping[str, float]) -> Weights:
    """The same ratios with ``sum(w) = T``."""
    factor = len(weights) / math.fsum(weights.values())
    return {task: factor * weight for task, weight in weights.items()}


def _rescaled(config: dict[str, Any]) -> dict[str, Any]:
    """A trial's configuration after Ray has multiplied its weights, or drawn them anew."""
    return {**config, "weights": _scaled(config["weights"])}


def _check_positive(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")

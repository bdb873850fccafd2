"""What an experiment is: tasks, data, a model, losses, metrics and how the model is trained."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader

BUILT_IN = {"digits": "DigitsExperiment", "tox21": "Tox21Experiment", "nyuv2": "NYUv2Experiment"}
_SMALLEST = 1e-12  # a metric of 0, such as the accuracy of a class that is never named, must not decide alone


@dataclass(frozen=True)
class Metric:
    """One number that says how well one task is done.

    Attributes:
        task: The task.
        name: What is measured, such as ``"accuracy (%)"``; the same for all tasks that are measured alike.
        higher_is_better: Whether larger values are better.
    """

    task: str
    name: str
    higher_is_better: bool = True

    def __str__(self) -> str:
        return f"{self.task} {self.name}"


@dataclass
class Experiment(ABC):
    """Tasks to train one model on, with everything that stays the same whichever way the losses are weighed.

    Subclasses are dataclasses too: their fields are the settings, which ``gradstats compare --set name=value`` can
    change and which tell results of different settings apart. They load their data in ``__post_init__`` from the
    folder ``data``, and set ``tasks`` and ``metrics`` there or in the class. ``gradstats/compare/digits.py`` is an
    example of fewer than a hundred lines.

    The defaults make plain "unitary" scalarization the strong baseline that Kurin et al. (arXiv 2201.04122) found it
    to be: ℓ2 regularisation (and dropout, in the model) and a decaying learning rate here, and the model that is best
    on the validation data taken by ``gradstats.compare``.

    Attributes:
        data: Folder with the data; None for experiments that need none.
        epochs: Passes over the training data.
        lr: Adam's learning rate, which decays to 0 along a cosine.
        weight_decay: Strength of the ℓ2 regularisation.
        tasks: Names of the tasks.
        metrics: What is measured, at least one metric for each task.
    """

    data: Path | None = field(default=None, kw_only=True)
    epochs: int = field(default=20, kw_only=True)
    lr: float = field(default=1e-3, kw_only=True)
    weight_decay: float = field(default=1e-5, kw_only=True)

    tasks: Sequence[str] = field(init=False, repr=False)
    metrics: Sequence[Metric] = field(init=False, repr=False)

    @abstractmethod
    def make_model(self, tasks: Sequence[str]) -> nn.Module:
        """A fresh model for ``tasks``, all of them or one; torch is seeded before."""

    @abstractmethod
    def train_loader(self) -> DataLoader[Any]:
        """Loader of the training batches, shuffled."""

    @abstractmethod
    def compute_losses(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """The scalar loss of each of the model's tasks; a task without labels in the batch may be missing."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: Literal["valid", "test"]) -> Mapping[Metric, float]:
        """The metrics of the model's tasks over all of ``split``; the model is in eval mode, without gradients.

        Batches are to be moved to the model's device (:func:`moved`).
        """

    def make_optimizer(self, model: nn.Module, total_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Optimizer and a scheduler that steps with it, ``total_steps`` times."""
        optimizer = torch.optim.Adam(model.parameters(), self.lr, weight_decay=self.weight_decay)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)

    def settings(self) -> dict[str, Any]:
        """All settings by name; not the folder of the data, which may move."""
        return {name: getattr(self, name) for name in _setting_names(type(self))}


def _setting_names(kind: type[Experiment]) -> list[str]:
    return [f.name for f in fields(kind) if f.init and f.name != "data"]


def score(metrics: Mapping[Metric, float]) -> float:
    """By what the best epoch is chosen: mean of ``±log(metric)``, with + where higher is better.

    Differences of it are, to first order, mean relative gains, as Δm measures them against single-task models, but no
    reference is needed (our choice).
    """
    logs = [math.log(max(value, _SMALLEST)) for value in metrics.values()]
    return math.fsum(x if m.higher_is_better else -x for m, x in zip(metrics, logs, strict=True)) / len(logs)


def moved(batch: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``batch`` on the device of the model's parameters."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Source:
    """Where an experiment comes from, so that every process can make its own.

    Attributes:
        name: Name of a built-in experiment, or path of a Python file that defines one subclass of ``Experiment``.
        data: Folder with the data.
        settings: Settings that differ from the experiment's defaults.
    """

    name: str
    data: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Experiment:
        """Make the experiment and load its data.

        Raises:
            ValueError: If there is no such experiment, it has no such setting, or it misses a task or a metric.
            FileNotFoundError: If a file of the data is missing.
        """
        kind = self._class()
        known = _setting_names(kind)
        unknown = [name for name in self.settings if name not in known]
        if unknown:
            raise ValueError(f"settings: {self.name} has {', '.join(known)}; got {', '.join(unknown)}")
        experiment = kind(data=self.data, **self.settings)
        tasks, metrics = getattr(experiment, "tasks", ()), getattr(experiment, "metrics", ())
        if len(tasks) < 2 or {m.task for m in metrics} != set(tasks):
            raise ValueError(
                f"experiment: expected at least two tasks, and metrics for each of them, from {kind.__name__}; "
                f"got tasks {list(tasks)} and metrics {[str(m) for m in metrics]}"
            )
        return experiment

    def fingerprint(self) -> str | None:
        """Hash of a user's file; None for built-in experiments, which change with the package."""
        path = Path(self.name)
        return None if self.name in BUILT_IN else hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def _class(self) -> type[Experiment]:
        if self.name in BUILT_IN:
            found: type[Experiment] = getattr(
                importlib.import_module(f"gradstats.compare.{self.name}"), BUILT_IN[self.name]
            )
            return found
        path = Path(self.name)
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"experiment: expected one of {', '.join(BUILT_IN)} or a Python file, got {self.name!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # where dataclasses look their module up
        spec.loader.exec_module(module)
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Experiment) and value.__module__ == path.stem
        ]
        if len(own) != 1:
            raise ValueError(
                f"experiment: expected one subclass of Experiment in {path}, got {[kind.__name__ for kind in own]}"
            )
        return own[0]

"""One trial of a search: a training that reports to Ray after every epoch and goes on from Ray's checkpoints."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.loggers.logger import Logger
from ray import tune
from typing_extensions import override

from gradstats.report import write_file

if TYPE_CHECKING:
    from gradstats.search.searches import MakeTrainer

SCHEDULE = "schedule.json"  # beside the trainer's checkpoint: the weights of each epoch that led to it


def train_trial(config: dict[str, Any], make_trainer: MakeTrainer) -> None:
    """Train with ``config["weights"]``; Ray stops it when the weights change, and calls it again with a checkpoint."""
    with tempfile.TemporaryDirectory(dir=".") as folder:  # in the folder that Ray gives a trial, and removes
        checkpoint = tune.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as saved:
                shutil.copytree(saved, folder, dirs_exist_ok=True)
        reporter = Reporter(Path(folder), config["weights"])
        trainer, train_loader, val_loader = make_trainer(
            config["weights"], directory=folder, loggers=[reporter], progress=False
        )
        trainer.fit(train_loader, val_loader, resume=True)


class Reporter(Logger):
    """Tells Ray each epoch's numbers and hands over the folder with the trainer's checkpoint.

    The trainer calls :meth:`save` at the end of an epoch, after it has written its checkpoint.

    Args:
        folder: The trainer's folder.
        weights: The weights in force.
    """

    def __init__(self, folder: Path, weights: dict[str, float]) -> None:
        super().__init__()
        self._path, self._weights = folder / SCHEDULE, weights
        self._schedule = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else []
        self._row: dict[str, float] = {}

    @property
    @override
    def name(self) -> str:
        return "ray"

    @property
    @override
    def version(self) -> None:
        return None

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Ray has them."""

    @override
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Remember the last row, which at the end of an epoch is the epoch's."""
        self._row = metrics

    @override
    def save(self) -> None:
        """Report the epoch."""
        self._schedule.append((self._row["epoch"], self._weights))
        write_file(self._path, json.dumps(self._schedule))
        tune.report(self._row, checkpoint=tune.Checkpoint.from_directory(self._path.parent))

"""The loop: a reference trainer for several losses on Lightning Fabric."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.fabric import Fabric, wrappers
from lightning.fabric.loggers.csv_logs import CSVLogger
from torch import Tensor, nn
from tqdm import tqdm

from gradstats.train.checkpoint import AtomicCheckpointIO, RandomState, check_same_setup
from gradstats.train.history import History, Means, batch_size

if TYPE_CHECKING:
    import os

    from lightning.fabric.loggers.logger import Logger
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader

    from gradstats.scalarizer import Scalarizer

logger = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        epoch: Complete epochs.
        step: Optimizer steps.
        epoch_step: Optimizer steps of the epoch that has begun.
        best: Best value of the monitored metric so far; None before the first.
        waited: Epochs since then.
    """

    epoch: int = 0
    step: int = 0
    epoch_step: int = 0
    best: float | None = None
    waited: int = 0


class Trainer:
    """Trains a model on several losses that a :class:`gradstats.Scalarizer` weighs.

    Devices, precision, processes and loggers are Lightning Fabric's. A whole call of ``compute_losses`` runs as one
    forward of the model, under autocast and inside DDP, so it may call any method or submodule of the plain model.

    ``last.ckpt`` is written after every epoch and every ``checkpoint_every`` steps, ``best.ckpt`` after an epoch that
    improved ``monitor``; both atomically, so a run killed at any time, or stopped by an exception or Ctrl-C, resumes
    from the last one and continues bit for bit: a run resumed in mid-epoch loads the batches that were done once more
    and drops them. (Not covered: generators of your own outside the loaders, and ``persistent_workers``' own states.)
    ``torch.load(path)["model"]`` is the state of the plain model.

    Example::

        scalarizer = gradstats.Scalarizer("autoscale", tasks=["seg", "depth"], total_steps=20 * len(train_loader))
        trainer = Trainer(model, compute_losses, optimizer, scalarizer, max_epochs=20, directory="run", seed=0)
        history = trainer.fit(train_loader, val_loader, resume=True)
        plt.plot(*history.series("weight/depth"))

    The plain sum of the losses is a strong baseline where training is regularised as that of a single task would be.
    What Kurin et al. (arXiv 2201.04122) found to matter: dropout in the model, ℓ2 regularisation, which is the
    ``weight_decay`` of ``Adam`` (that of ``AdamW`` is another thing), a learning rate that falls, and the choice of the
    epoch on validation data::

        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
        trainer = Trainer(
            model, compute_losses, optimizer, gradstats.Scalarizer("uniform", tasks=["seg", "depth"]),
            compute_metrics=compute_metrics, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95),
            monitor="val/accuracy", mode="max", patience=10, restore_best=True, max_epochs=100, directory="run",
        )

    With a weighting that learns from what a step has achieved (FAMO) each step computes its losses once more.

    Args:
        model: The model; moved to the device.
        compute_losses: ``(model, batch) -> {task: scalar loss}``, means over the batch; a task may be missing.
        optimizer: Optimizer of the model's parameters.
        scalarizer: Weighs the losses. Its ``accumulate`` says how many batches make an optimizer step; gradients are
            averaged over them, and batches left over at the end of an epoch are dropped.
        compute_metrics: ``(model, batch) -> {name: tensor}`` for validation: either ``[N]`` values, one per sample
            (or pixel, token...), whose mean over the whole validation set is exact, or a scalar mean over the batch.
        evaluate: ``(model) -> {name: number}`` for metrics of the whole validation set that are no means over it, such
            as an area under a curve; called after every epoch, in eval mode, without gradients and with the plain
            model. With several processes the first one's numbers count.
        scheduler: Learning-rate scheduler of ``optimizer`` whose ``step()`` takes no argument.
        scheduler_interval: Whether the scheduler steps after each ``"epoch"`` or each optimizer ``"step"``.
        max_epochs: Epochs to train; None for no limit.
        max_steps: Optimizer steps to train; None for no limit. The last epoch may be cut short by it.
        clip_norm: Largest norm of the whole gradient; None for no clipping.
        monitor: Column of ``history.epochs`` that decides what is best, such as ``"val/accuracy"``.
        mode: Whether ``"min"`` or ``"max"`` of it is best.
        patience: Stop after this many epochs in a row without improvement; None for never.
        restore_best: Whether the model ends as it was in the best epoch instead of the last; takes ``directory``.
        directory: Folder for checkpoints and, unless ``loggers`` are given, CSV logs; None for neither.
        checkpoint_every: Steps between checkpoints within an epoch; None for none.
        log_every: Steps between rows of losses and weights; a step that records a Gramian always has its row.
        seed: Seeds Python, numpy and torch at the start of ``fit`` (not the model, which exists by then).
        progress: Whether to show a progress bar.
        loggers: Fabric loggers.
        accelerator: As for ``Fabric``.
        devices: As for ``Fabric``.
        strategy: As for ``Fabric``.
        precision: As for ``Fabric``. The "true" ones leave the batch to you: cast it in ``compute_losses``.

    Attributes:
        fabric: The ``Fabric`` in use.
        history: Losses, weights, gradient metrics and validation results so far.
        progress: Counters of epochs and steps, and the best monitored value.

    Raises:
        ValueError: If an argument is out of its range, or neither ``max_epochs`` nor ``max_steps`` is given.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_losses: Callable[[Any, Any], Mapping[str, Tensor]],
        optimizer: Optimizer,
        scalarizer: Scalarizer,
        *,
        compute_metrics: Callable[[Any, Any], Mapping[str, Tensor]] | None = None,
        evaluate: Callable[[Any], Mapping[str, float]] | None = None,
        scheduler: LRScheduler | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        max_epochs: int | None = None,
        max_steps: int | None = None,
        clip_norm: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int | None = None,
        restore_best: bool = False,
        directory: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        log_every: int = 50,
        seed: int | None = None,
        progress: bool = True,
        loggers: Logger | list[Logger] | None = None,
        accelerator: str = "auto",
        devices: int | str | list[int] = 1,
        strategy: str = "auto",
        precision: Any = None,
    ) -> None:
        counts = {"max_epochs": max_epochs, "max_steps": max_steps, "patience": patience, "log_every": log_every}
        for name, value in {**counts, "checkpoint_every": checkpoint_every}.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if max_epochs is None and max_steps is None:
            raise ValueError("max_epochs, max_steps: expected at least one of them, got neither")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: expected a positive number, got {clip_norm!r}")
        for name, text, choices in (
            ("mode", mode, ("min", "max")),
            ("scheduler_interval", scheduler_interval, ("epoch", "step")),
        ):
            if text not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {text!r}")
        if (patience is not None or restore_best) and monitor is None:
            raise ValueError("monitor: expected the name of a metric that decides what is best, got None")
        if (checkpoint_every is not None or restore_best) and directory is None:
            raise ValueError("directory: expected a folder for the checkpoints, got None")
        self.model, self.scalarizer, self.scheduler = model, scalarizer, scheduler
        self.history, self.progress = History(), Progress()
        self._compute_losses, self._compute_metrics, self._evaluate = compute_losses, compute_metrics, evaluate
        self._scheduler_interval, self._clip_norm = scheduler_interval, clip_norm
        self._max_epochs, self._max_steps = max_epochs, max_steps
        self._monitor, self._mode, self._patience, self._restore_best = monitor, mode, patience, restore_best
        self._directory, self._checkpoint_every = Path(directory) if directory is not None else None, checkpoint_every
        self._log_every, self._seed, self._show_progress = log_every, seed, progress

        if loggers is None and directory is not None:
            loggers = CSVLogger(Path(directory), name="logs")
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            precision=precision,
            plugins=[AtomicCheckpointIO()],
            loggers=loggers,
        )
        self.fabric.launch()
        # Recorded float16 gradients have to be scaled like those of the backward.
        scalarizer.grad_scaler = self._grad_scaler or scalarizer.grad_scaler
        self._whole, self._optimizer = self.fabric.setup(_Whole(model), optimizer)
        self.fabric.to_device(scalarizer)

    # ---- the loop -------------------------------------------------------------------------------------------------

    def fit(
        self,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any] | None = None,
        *,
        resume: bool | str | os.PathLike[str] = False,
    ) -> History:
        """Train, and validate after every epoch.

        A run that ``max_steps`` ended in mid-epoch counts that epoch as done, so with a larger ``max_steps`` it goes
        on with the next one. A second call without ``resume`` starts counters and history anew but not the model, the
        optimizer or the scalarizer, whose exploration is over by then: make new ones to train again from scratch.

        Args:
            train_loader: ``DataLoader`` of the training batches.
            val_loader: ``DataLoader`` of the validation batches. Losses are averaged over samples, whose number in a
                batch is the leading dimension of its first tensor. With several processes Fabric's sampler may repeat
                a few samples to give each the same number.
            resume: True continues from the last checkpoint in ``directory`` if there is one, a path from that file.

        Returns:
            ``self.history``.

        Raises:
            ValueError: If a checkpoint of a different set-up is to be resumed, or ``monitor`` names no column.
            FileNotFoundError: If ``resume`` is a path where there is no file.
            FloatingPointError: If a training loss is NaN or infinite, on any process; names the task. The parameters
                stay as they were before that step.
            RuntimeError: If a gradient is not finite and ``clip_norm`` is given.
        """
        if resume is True and self._directory is None:
            raise ValueError("directory: expected the folder to resume from, got None")
        if val_loader is None and self._evaluate is None and (self._monitor or "").startswith("val/"):
            raise ValueError(f"val_loader: expected a loader, because {self._monitor!r} is monitored, got None")
        if self._seed is not None:
            self.fabric.seed_everything(self._seed, workers=True, verbose=False)
        train = self.fabric.setup_dataloaders(train_loader)
        val = None if val_loader is None else self.fabric.setup_dataloaders(val_loader)
        self.history, self.progress = History(), Progress()
        self._random = RandomState(self.fabric.device, (train, val))
        self._epoch_start: dict[str, Any] = {}
        self._train_means = Means()
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
        if path := self._checkpoint_to_resume(resume):
            self._load(path)
        while self.progress.epoch_step or not self._is_done():
            self._train_epoch(train)
            self._end_epoch(self._validate(val))
        if self._restore_best and self._directory is not None and self.progress.best is not None:
            best = self.fabric.load(self._directory / BEST, weights_only=True)
            self.model.load_state_dict(best["model"])
        return self.history

    def _is_done(self) -> bool:
        progress = self.progress
        limits = (
            (progress.epoch, self._max_epochs),
            (progress.step, self._max_steps),
            (progress.waited, self._patience),
        )
        return any(limit is not None and value >= limit for value, limit in limits)

    def _train_epoch(self, loader: Any) -> None:
        self._whole.train()
        self.scalarizer.train()
        with self._progress_bar(loader) as bar:
            for batches in self._remaining_steps(loader):
                losses = self._train_step(batches)
                bar.set_postfix({task: f"{value:.3g}" for task, value in losses.items()}, refresh=False)
                bar.update()
                if self._checkpoint_every and self.progress.step % self._checkpoint_every == 0:
                    self._save(LAST)
        if self.progress.epoch_step == 0:
            raise ValueError(f"train_loader: expected at least {self.scalarizer.accumulate} batches, got fewer")

    def _remaining_steps(self, loader: Any) -> Iterator[list[Any]]:
        """The batches of each optimizer step that this epoch still has to take."""
        loader._num_iter_calls = self.progress.epoch  # Fabric hands it to the sampler's set_epoch: it fixes the order
        steps = _grouped(loader, self.scalarizer.accumulate)
        if self.progress.epoch_step == 0:
            self._epoch_start = self._random.get()
            self._train_means = Means(self.scalarizer.tasks)
        else:  # resumed: go through this epoch once more up to the step after which the checkpoint was written
            now = self._random.get()
            self._random.set(self._epoch_start)
            next(islice(steps, self.progress.epoch_step - 1, None), None)
            self._random.set(now)
        return islice(steps, None if self._max_steps is None else self._max_steps - self.progress.step)

    def _train_step(self, batches: list[Any]) -> dict[str, float]:
        """One optimizer step; returns its losses."""
        last_recorded = self.scalarizer.stats
        means = Means()
        for i, batch in enumerate(batches):
            with self.fabric.no_backward_sync(self._whole, enabled=i + 1 < len(batches)):
                losses = self._forward(self._compute_losses, batch)
                for task, value in self._finite_values(losses).items():
                    means.add(task, value)
                    self._train_means.add(task, value)
                with _gradients_before_backward():
                    loss = self.scalarizer(losses)
                self.fabric.backward(loss / len(batches))
        if self._clip_norm is not None:
            # A gradient scaler skips a step that overflowed; without one a non-finite gradient is an error.
            self.fabric.clip_gradients(
                self._whole, self._optimizer, max_norm=self._clip_norm, error_if_nonfinite=self._grad_scaler is None
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        if "after_step" in self.scalarizer.weighting.needs:
            self._look_back(batches)
        self.progress.step += 1
        self.progress.epoch_step += 1
        self._log_step(means.values(), recorded=self.scalarizer.stats is not last_recorded)
        if self.scheduler is not None and self._scheduler_interval == "step":
            self.scheduler.step()
        return means.values()

    @torch.no_grad()
    def _look_back(self, batches: list[Any]) -> None:
        """Show the weighting the losses of the step's batches once more, after the step."""
        means = Means()
        for batch in batches:
            for task, value in _values(self._forward(self._compute_losses, batch)).items():
                means.add(task, value)
        self.scalarizer.after_step(
            {
                task: torch.tensor(value, dtype=torch.float64, device=self.fabric.device)
                for task, value in means.values().items()
            }
        )

    @property
    def _grad_scaler(self) -> Any:
        """The scaler of float16 mixed precision, which Fabric owns; None otherwise."""
        return getattr(self.fabric.strategy.precision, "scaler", None)

    def _forward(self, function: Callable[[Any, Any], Mapping[str, Tensor]], batch: Any) -> Mapping[str, Tensor]:
        # The batch goes in a closure: given as an argument, Fabric would round it, targets and all, to half precision.
        return self._whole(lambda model: function(model, batch))  # type: ignore[no-any-return]

    def _finite_values(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        values = _values(losses)
        broken = [f"the loss of task {task!r} is {value}" for task, value in values.items() if not math.isfinite(value)]
        if self._on_any_process(bool(broken)):
            what = ", ".join(broken) or "a loss on another process is not finite"
            raise FloatingPointError(f"{what} at step {self.progress.step + 1}")
        return values

    def _on_any_process(self, flag: bool) -> bool:
        """Whether ``flag`` is set on one of them, so that none is left waiting for one that has stopped."""
        if self.fabric.world_size == 1:
            return flag
        total = self.fabric.all_reduce(torch.tensor(float(flag), device=self.fabric.device), reduce_op="sum")
        return bool(cast("Tensor", total))

    @torch.no_grad()
    def _validate(self, loader: Any) -> dict[str, float]:
        """Mean losses and metrics over the validation samples, and what ``evaluate`` says."""
        self._whole.eval()
        losses, metrics = Means(self.scalarizer.tasks), Means()
        for batch in () if loader is None else loader:
            samples = batch_size(batch)
            if samples is None:
                raise ValueError(f"val_loader: expected batches that hold a tensor, got {type(batch).__name__}")
            for task, value in _values(self._forward(self._compute_losses, batch)).items():
                losses.add(task, value, samples)
            if self._compute_metrics is not None:
                for name, result in self._forward(self._compute_metrics, batch).items():
                    values = torch.as_tensor(result, dtype=torch.float64, device="cpu")
                    metrics.add(name, float(values.mean()), len(values) if values.ndim else samples)
        whole = {} if self._evaluate is None else self.fabric.broadcast(dict(self._whole(self._evaluate)))
        return {
            **_prefixed("val/loss", losses.over_ranks(self.fabric).values()),
            **_prefixed("val", metrics.over_ranks(self.fabric).values()),
            **_prefixed("val", whole),
        }

    def _end_epoch(self, validation: Mapping[str, float]) -> None:
        progress = self.progress
        progress.epoch += 1
        progress.epoch_step = 0
        row = {
            "epoch": progress.epoch,
            "lr": float(self._optimizer.param_groups[0]["lr"]),
            **_prefixed("train/loss", self._train_means.over_ranks(self.fabric).values()),
            **validation,
        }
        self._record(self.history.epochs, row)
        logger.info("epoch %d, step %d: %s", progress.epoch, progress.step, row)
        if self.scheduler is not None and self._scheduler_interval == "epoch":
            self.scheduler.step()
        if self._improves(row):
            self._save(BEST)
        self._save(LAST)
        for one in self.fabric.loggers:
            one.save()

    def _improves(self, row: Mapping[str, float]) -> bool:
        """Whether the monitored value is the best so far; counts the epochs since the best."""
        if self._monitor is None:
            return False
        if self._monitor not in row:
            raise ValueError(f"monitor: expected one of {sorted(row)}, got {self._monitor!r}")
        value, best = row[self._monitor], self.progress.best
        improves = not math.isnan(value) and (best is None or (value < best if self._mode == "min" else value > best))
        self.progress.best = value if improves else best
        self.progress.waited = 0 if improves else self.progress.waited + 1
        return improves

    # ---- what is seen and kept ------------------------------------------------------------------------------------

    def _log_step(self, losses: Mapping[str, float], *, recorded: bool) -> None:
        if not recorded and self.progress.step % self._log_every != 0:
            return
        weights = dict(zip(self.scalarizer.tasks, self.scalarizer.weights.tolist(), strict=True))
        row = {**_prefixed("loss", losses), **_prefixed("weight", weights)}
        if recorded and self.scalarizer.stats is not None:
            row |= _prefixed("gradient", self.scalarizer.stats.to_dict())
        self._record(self.history.steps, row)

    def _record(self, rows: list[dict[str, float]], row: dict[str, float]) -> None:
        rows.append({"step": self.progress.step, **row})
        self.fabric.log_dict(row, step=self.progress.step)

    def _progress_bar(self, loader: Any) -> tqdm[Any]:
        return tqdm(
            desc=f"epoch {self.progress.epoch + 1}",
            total=length_hint(loader) // self.scalarizer.accumulate or None,  # None: a loader that has no length
            initial=self.progress.epoch_step,
            disable=not (self._show_progress and self.fabric.is_global_zero),
        )

    def _setup(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes from it."""
        return {
            "tasks": list(self.scalarizer.tasks),
            "weighting": type(self.scalarizer.weighting).__name__,
            "optimizer": type(self._optimizer.optimizer).__name__,
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "processes": self.fabric.world_size,
            "parameters": {name: list(p.shape) for name, p in self.model.named_parameters()},
        }

    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint saves the ``state_dict`` of."""
        parts = {
            "model": self.model,
            "optimizer": self._optimizer,
            "scheduler": self.scheduler,
            "scalarizer": self.scalarizer,
            "precision": self.fabric.strategy.precision,
            "history": self.history,
            "train_means": self._train_means,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _save(self, name: str) -> None:
        if self._directory is None:
            return
        own = {"now": self._random.get(), "epoch_start": self._epoch_start}
        ranks = [self.fabric.broadcast(own, src=rank) for rank in range(self.fabric.world_size)]
        plain = {"setup": self._setup(), "progress": asdict(self.progress), "random": ranks}
        self.fabric.save(self._directory / name, {**plain, **self._stateful()})

    def _checkpoint_to_resume(self, resume: bool | str | os.PathLike[str]) -> Path | None:
        if not isinstance(resume, bool):
            return Path(resume)
        path = self._directory / LAST if resume and self._directory is not None else None
        return path if path is not None and path.exists() else None

    def _load(self, path: Path) -> None:
        checkpoint = self.fabric.load(path, weights_only=True)
        check_same_setup(path, checkpoint.get("setup"), self._setup())
        for name, part in self._stateful().items():
            part.load_state_dict(checkpoint[name])
        self.progress = Progress(**checkpoint["progress"])
        own = checkpoint["random"][self.fabric.global_rank]
        self._epoch_start = own["epoch_start"]
        self._random.set(own["now"])


class _Whole(nn.Module):
    """A model whose forward is any function of it: wrapping this puts the whole function under autocast and DDP."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return function(self.model)


@contextmanager
def _gradients_before_backward() -> Iterator[None]:
    """Let the scalarizer collect gradients: under mixed precision Fabric takes any outside of its backward for a slip.

    Its guard is a flag without a public switch. Should the flag be renamed, mixed precision fails loudly.
    """
    wrappers._in_fabric_backward = True
    try:
        yield
    finally:
        wrappers._in_fabric_backward = False


def _grouped(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Batches in groups of ``size``; an incomplete last group is dropped."""
    batches = iter(loader)
    while len(group := list(islice(batches, size))) == size:
        yield group


def _values(losses: Mapping[str, Tensor | None]) -> dict[str, float]:
    """The losses of the tasks that have one, as floats, in one transfer from the device."""
    if not isinstance(losses, Mapping):
        raise TypeError(f"compute_losses: expected a mapping from task to scalar loss, got {type(losses).__name__}")
    given = {task: loss for task, loss in losses.items() if loss is not None}
    for task, loss in given.items():
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"compute_losses: expected a scalar tensor for task {task!r}, got {got}")
    if not given:
        return {}
    return dict(zip(given, torch.stack([loss.detach().reshape(()) for loss in given.values()]).tolist(), strict=True))


def _prefixed(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}

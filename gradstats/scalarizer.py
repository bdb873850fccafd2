"""The driver: losses in, weighted scalar out; decides when to collect, keeps ranks agreed and holds the state."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradstats.collect.driver import check_method, collect, signature
from gradstats.collect.noise import collect_unbiased
from gradstats.stats import GradStats, check_names
from gradstats.weighting import Weighting, create
from gradstats.weighting.base import packed, unpacked

logger = logging.getLogger(__name__)

_LATER = "a later step is recorded"


@dataclass
class _Progress:
    """Where a training is; apart, as what is set on a module at every step passes many checks.

    Attributes:
        step: Steps taken.
        monitored: Multiples of ``record_every`` that are done with.
        losses: Of the micro-steps since.
        stats: Of those among them that were recorded.
    """

    step: int = 0
    monitored: int = -1
    losses: list[Tensor] = field(default_factory=list)
    stats: list[GradStats] = field(default_factory=list)


class Scalarizer(nn.Module):
    """Weighted sum of task losses with weights that a weighting policy chooses.

    Put ``loss = scalarizer(losses)`` before your own ``loss.backward()``; accumulation, gradient scalers, DDP and
    trainers keep working, because this returns an ordinary scalar. A call in training mode with gradients enabled is
    one micro-step, ``accumulate`` of them make a step; otherwise nothing is recorded or counted. A step that needs no
    Gramian costs the weighted sum alone. A recorded step whose gradients are not finite is discarded, logged by task,
    and recorded again at the next step.

    With ``accumulate > 1`` a recorded step averages the Gramians and losses of its micro-steps (each is that of a
    micro-batch, not of the accumulated gradient), and the weights that they decide apply from the next step on.

    With several processes in the default ``torch.distributed`` group every rank must call with the same tasks:
    gradients are averaged over ranks before the Gramian is formed and losses before they decide, so all ranks hold
    the same weights to the last bit. A step at which ranks differ in their graphs is recorded at a later one.

    Args:
        weighting: Name of a weighting (see :func:`gradstats.weighting.available`) or a ``Weighting``.
        tasks: Names of the tasks, in the order of the weights.
        inputs: Where gradients are measured, as for :func:`gradstats.from_losses`; None for the shared parameters,
            which show at steps with the losses of at least two tasks: only these are recorded then.
        record_every: Also record the statistics at every ``record_every``-th step, whatever the weighting: a monitor.
        accumulate: Micro-steps (calls) in an optimizer step. Every optimizer step must have that many: a loop that
            steps early at the end of an epoch should drop the incomplete group.
        method: How Gramians are collected, as for :func:`gradstats.from_losses`.
        num_directions: With ``method="sketch"``, how many directions are drawn in a collection.
        unbiased: Whether Gramians are recorded without the noise of the minibatch, as by :func:`gradstats.from_losses`.
            The losses of all calls are then those of the samples, ``[B]``, whose means are what is weighted and
            summed; as many on each rank.
        local: With several processes, record the mean of the Gramians of the ranks' own gradients, which sends ``T²``
            numbers and no gradients. It approximates the Gramian of the averaged gradients: squared norms come out
            larger by the noise that averaging takes away, except with ``unbiased``.
        grad_scaler: The ``GradScaler`` of a float16 loop, so that recorded gradients are scaled like the user's own.
        **options: Options of the weighting, where it is given by name. For ``"fixed"``, ``weights`` may be a mapping
            from task name to number.

    Attributes:
        tasks: Names of the tasks.
        weighting: The policy.
        stats: The last recorded :class:`GradStats`; None before the first.
        grad_scaler: As given; may be set later by who owns the scaler.

    Raises:
        ValueError: If an argument is out of its range or a name unknown.
        TypeError: If an option does not belong to the weighting.
    """

    def __init__(
        self,
        weighting: str | Weighting,
        *,
        tasks: Sequence[str],
        inputs: Any = None,
        record_every: int | None = None,
        accumulate: int = 1,
        method: str = "auto",
        num_directions: int | None = None,
        unbiased: bool = False,
        local: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(tasks, Sequence) or not tasks:
            raise TypeError(f"tasks: expected a sequence of strings, at least one, got {tasks!r}")
        self.tasks = check_names(tasks, len(tasks), "tasks")
        check_method(method, num_directions=num_directions)
        if unbiased and method == "sketch":
            raise ValueError("method: expected an exact method with unbiased=True, got 'sketch'")
        for name, value in (("record_every", record_every), ("accumulate", accumulate)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        self.weighting = _weighting(weighting, self.tasks, options)
        # Found there at once; a module keeps its submodules elsewhere, and looks there last.
        self.__dict__["weighting"] = self.weighting
        self.record_every, self.accumulate, self.method = record_every, accumulate, method
        self.num_directions, self.unbiased, self.local = num_directions, unbiased, local
        self.stats: GradStats | None = None
        self._inputs = (inputs,)  # in a tuple, so that a module given as inputs does not become a submodule
        self.grad_scaler = grad_scaler
        self._progress = _Progress()
        # The weights, and as the last losses needed them: to begin with nothing, so that the first losses are checked.
        self._cast = (self.weighting.weights, self.weighting.weights.new_empty(0))

    @property
    def weights(self) -> Tensor:
        """The weights in force, float64 ``[T]``, in the order of ``tasks``."""
        return self.weighting.weights

    def wants_stats(self) -> bool:
        """Whether the next training call will collect a Gramian."""
        return self.weighting.wants_stats() or self._monitor_is_due()

    def _monitor_is_due(self) -> bool:
        # Due from each multiple of record_every until one succeeds.
        return self.record_every is not None and self._progress.step // self.record_every > self._progress.monitored

    # ---- one step ---------------------------------------------------------------------------------------------------

    def forward(
        self, losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor, *, owner: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of the losses, with its graph.

        Args:
            losses: Scalars by task name (a task may be missing or None), or ``T`` of them in the order of ``tasks``;
                with ``unbiased`` vectors ``[B]``.
            owner: Task of each sample ``[B]``, where every sample belongs to one (multi-domain training): a Gramian
                then costs little more than a backward, as by :func:`gradstats.from_losses`.

        Returns:
            Scalar tensor, at least float32; differentiable where the losses are.

        Raises:
            ValueError: If a task is unknown, the number of losses is wrong, none is given or one is not a scalar.
            TypeError: If a loss is not a tensor.
        """
        total = self._sum_of_skipped(losses)
        return self._sum(*self._read(losses), owner) if total is None else total

    def backward(
        self, losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor, *, owner: Tensor | None = None
    ) -> Tensor:
        """``loss = self(losses); loss.backward()`` in one: at a recorded step one collection gives both.

        A recorded step uses the weights in force before its own statistics.

        Args:
            losses: As for :meth:`forward`.
            owner: As for :meth:`forward`.

        Returns:
            The weighted sum, detached. With a ``grad_scaler`` the gradients are those of the scaled sum.
        """
        total = self._sum_of_skipped(losses)
        if total is None:
            listed, means = self._read(losses)
            if self.training and self.wants_stats() and self._inputs_show(listed) and not _distributed():
                weights = self.weights
                self._count(means, listed, self._collect(listed, weights, owner=owner))
                return self._weighted_sum(means, weights).detach()
            total = self._sum(listed, means, owner)
        torch.autograd.backward(total if self.grad_scaler is None else self.grad_scaler.scale(total))
        return total.detach()

    def after_step(self, losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> None:
        """Tell a weighting whose ``needs`` has ``"after_step"`` (FAMO) what the optimizer step has achieved.

        Call it after ``optimizer.step()`` with the losses of the same batch, computed once more under
        ``torch.no_grad()``; with ``accumulate > 1`` their means over the micro-batches. For others it does nothing.

        Args:
            losses: As for :meth:`forward`.
        """
        if "after_step" not in self.weighting.needs:
            return
        listed, means = self._read(losses)
        values = _known(means, listed)
        self.weighting.after_step(_mean_of_known_over_ranks(values) if _distributed() else values)

    def _read(self, losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> tuple[list[Tensor | None], Tensor]:
        """One loss or None for each task, checked, and their means ``[T]`` with their graph."""
        if isinstance(losses, (dict, Mapping)):  # "is it a Mapping?" alone takes longer than the rest
            unknown = [name for name in losses if name not in self.tasks]
            if unknown:
                raise ValueError(f"losses: expected tasks among {list(self.tasks)}, got {unknown}")
            listed = [losses.get(name) for name in self.tasks]
        else:
            is_tensor, dims = isinstance(losses, Tensor), "[T, B]" if self.unbiased else "[T]"
            if not isinstance(losses, Sequence) and not (is_tensor and losses.ndim == 1 + self.unbiased):
                got = f"shape {tuple(losses.shape)}" if is_tensor else type(losses).__name__
                raise TypeError(f"losses: expected a mapping, a sequence or a tensor {dims}, got {got}")
            listed = list(losses)
            if len(listed) != len(self.tasks):
                raise ValueError(f"losses: expected {len(self.tasks)}, one per task, got {len(listed)}")
        means = None if self.unbiased else _joined(listed)
        if means is None:
            self._check(listed)
            means = _stacked(self._means(listed))
        return listed, means

    def _check(self, listed: list[Tensor | None]) -> None:
        """Refuse losses that cannot be weighted."""
        for name, loss in zip(self.tasks, listed, strict=True):
            if loss is None:
                continue
            if not isinstance(loss, Tensor) or not loss.is_floating_point():
                got = str(loss.dtype) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"losses: expected a floating-point tensor for task {name!r}, got {got}")
            if self.unbiased and (loss.ndim != 1 or not len(loss)):
                raise ValueError(
                    f"losses: expected with unbiased=True the losses [B] of the samples for task {name!r}, "
                    f"got shape {tuple(loss.shape)}"
                )
            if not self.unbiased and loss.numel() != 1:
                raise ValueError(f"losses: expected a scalar for task {name!r}, got shape {tuple(loss.shape)}")
        if all(loss is None for loss in listed):
            raise ValueError("losses: expected at least one task's loss, got none")

    def _sum(self, listed: list[Tensor | None], means: Tensor, owner: Tensor | None) -> Tensor:
        """The weighted sum, and the step that it is part of."""
        if not (self.training and torch.is_grad_enabled()):
            return self._weighted_sum(means, self.weights)
        stats = self._collect(listed, owner=owner) if self.wants_stats() else None
        return self._weighted_sum(means, self._count(means, listed, stats))

    def _sum_of_skipped(self, losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> Tensor | None:
        """The weighted sum at a step that only counts; None, and nothing done, at others.

        Most steps of most trainings are such: on small networks all that is spared here shows.
        """
        if not (self.training and self.accumulate == 1 and torch.is_grad_enabled()):
            return None
        if self.record_every is not None and self._monitor_is_due():
            return None
        weighting = self.weighting
        if type(weighting).skip is Weighting.skip:  # it never does
            return None
        total = self._sum_of_usual(losses, weighting.weights)
        if total is None:
            total = self._weighted_sum(self._read(losses)[1], weighting.weights)
        if not weighting.skip():
            return None
        self._progress.step += 1
        return total

    def _sum_of_usual(self, losses: Mapping[str, Tensor] | Sequence[Tensor] | Tensor, weights: Tensor) -> Tensor | None:
        """The weighted sum of losses as most are; None for others. It takes longer to look which they are."""
        known, cast = self._cast
        if known is not weights:
            cast = weights.to(cast)
            self._cast = (weights, cast)
        try:
            listed: Any = [losses[name] for name in self.tasks] if isinstance(losses, dict) else losses
            return torch.dot(torch.stack(listed), cast) if len(losses) == len(self.tasks) else None
        except (LookupError, TypeError, RuntimeError):
            return None

    def _weighted_sum(self, losses: Tensor, weights: Tensor) -> Tensor:
        self._cast = (weights, weights.to(losses))
        return torch.dot(losses, self._cast[1])  # not ``@``, which autocast would do in 16 bits

    def _means(self, listed: list[Tensor | None]) -> list[Tensor | None]:
        return [None if loss is None else loss.mean() for loss in listed] if self.unbiased else listed

    def _inputs_show(self, listed: list[Tensor | None]) -> bool:
        """Whether it is known at this step where to measure: what is shared shows in the graph of two tasks."""
        with_graph = sum(loss is not None and loss.requires_grad for loss in listed)
        return self._inputs[0] is not None or with_graph > 1 or len(listed) == 1

    def _collect(
        self, listed: list[Tensor | None], weights: Tensor | None = None, *, owner: Tensor | None = None
    ) -> GradStats | None:
        """This micro-step's Gramian, and with ``weights`` the weighted ``.grad``; None where it cannot be used."""
        scale, scaled = 1.0, listed
        if self.grad_scaler is not None:
            scaled = [None if loss is None else self.grad_scaler.scale(loss) for loss in listed]
            scale = self.grad_scaler.get_scale()
        distributed = _distributed()
        if distributed and not _same_on_all_ranks(self._signature(listed), _device(listed)):
            logger.warning("step %d: the ranks' graphs differ; %s", self._progress.step, _LATER)
            return None
        if not self._inputs_show(listed):
            logger.warning(
                "step %d: one task alone does not show what is shared (pass inputs); %s", self._progress.step, _LATER
            )
            return None
        averaged = distributed and not self.local
        run = functools.partial(collect_unbiased, num_ranks=dist.get_world_size() if averaged else 1)
        stats = (run if self.unbiased else collect)(
            self.tasks,
            scaled,
            self._inputs[0],
            owner=owner,
            method=self.method,
            num_directions=self.num_directions,
            weights=weights,
            loss_scale=scale,
            retain_graph=weights is None,
            reduce=_mean_over_ranks if averaged else None,
        )
        if distributed and self.local:
            stats = _mean_of_ranks(stats)
        if stats.non_finite_names:
            names = ", ".join(stats.non_finite_names)
            logger.warning("step %d: the gradient of %s is not finite; %s", self._progress.step, names, _LATER)
            return None
        return stats

    def _signature(self, listed: list[Tensor | None]) -> int:
        """A number that ranks share only where they have the same graph and, with ``unbiased``, as many samples."""
        sizes = [0 if loss is None else loss.numel() for loss in listed]
        return signature(self.tasks, self._means(listed), self._inputs[0], sizes)

    def _count(self, means: Tensor, listed: list[Tensor | None], stats: GradStats | None) -> Tensor:
        """Count a micro-step and return its weights; the last one of a step lets the weighting decide."""
        losses = _known(means, listed) if self.weighting.needs else means.detach()
        if self.accumulate == 1:
            return self._decide(losses, stats)
        weights, progress = self.weights, self._progress
        progress.losses.append(losses)
        if stats is not None:
            progress.stats.append(stats)
        if len(progress.losses) == self.accumulate:
            losses = torch.stack(progress.losses).nanmean(0)
            stats = GradStats.mean(progress.stats) if progress.stats else None
            progress.losses.clear()
            progress.stats.clear()
            self._decide(losses, stats)
        return weights

    def _decide(self, losses: Tensor, stats: GradStats | None) -> Tensor:
        """Count a step, whose weights the weighting chooses."""
        weighting, progress = self.weighting, self._progress
        if weighting.needs and _distributed():
            losses = _mean_of_known_over_ranks(losses)
        if stats is not None:
            self.stats = stats
            if self.record_every is not None:
                progress.monitored = progress.step // self.record_every
            stats = stats if weighting.wants_stats() else None
        progress.step += 1
        weights: Tensor = weighting(losses, stats)
        return weights

    # ---- state ------------------------------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """Step counters for ``state_dict``, to be saved between steps; the weighting adds its own state."""
        return packed([self._tasks_id(), self._progress.step, self._progress.monitored])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned.

        Raises:
            ValueError: If the state belongs to other tasks.
        """
        values = unpacked(state, [0, 0, 0])
        if values is None or values[0] != self._tasks_id():
            raise ValueError(f"state: expected tasks {list(self.tasks)}, got the state of a Scalarizer for others")
        self._progress = _Progress(int(values[1]), int(values[2]))

    def _tasks_id(self) -> int:
        """A number that other task names do not have; below 2^53, exact in float64."""
        return int.from_bytes(hashlib.sha256(repr(self.tasks).encode()).digest()[:6], "big")


def _weighting(weighting: str | Weighting, tasks: tuple[str, ...], options: dict[str, Any]) -> Weighting:
    if isinstance(weighting, str):
        if isinstance(options.get("weights"), Mapping):
            by_name = options["weights"]
            if set(by_name) != set(tasks):
                raise ValueError(f"weights: expected one for each of {list(tasks)}, got {list(by_name)}")
            options = {**options, "weights": [by_name[name] for name in tasks]}
        return create(weighting, len(tasks), **options)
    if not isinstance(weighting, Weighting):
        raise TypeError(f"weighting: expected a name or a Weighting, got {type(weighting).__name__}")
    if options:
        raise TypeError(f"{', '.join(options)}: options go with a weighting given by name")
    if weighting.num_tasks != len(tasks):
        raise ValueError(f"weighting: expected one for {len(tasks)} tasks, got one for {weighting.num_tasks}")
    return weighting


def _joined(listed: list[Tensor | None]) -> Tensor | None:
    """The losses ``[T]`` with their graph, if they are as most are, so that it takes no more than that."""
    given = [loss for loss in listed if type(loss) is Tensor and loss.ndim == 0 and loss.dtype == torch.float32]
    return torch.stack(given) if len(given) == len(listed) else None


def _stacked(listed: list[Tensor | None]) -> Tensor:
    """The losses ``[T]`` with their graph, at least float32, zero where there is none."""
    given = [loss for loss in listed if loss is not None]
    dtype = functools.reduce(torch.promote_types, (loss.dtype for loss in given), torch.float32)
    zero = given[0].new_zeros((), dtype=dtype)
    return torch.stack([zero if loss is None else loss.reshape(()).to(dtype) for loss in listed])


def _device(listed: list[Tensor | None]) -> torch.device:
    return next(loss.device for loss in listed if loss is not None)


def _known(stacked: Tensor, listed: list[Tensor | None]) -> Tensor:
    """The losses' values, float64 ``[T]``; NaN where they are not finite or not there."""
    values = stacked.detach().double().nan_to_num(torch.nan, torch.nan, torch.nan)
    absent = [t for t, loss in enumerate(listed) if loss is None]
    if absent:
        values[absent] = torch.nan
    return values


# ---- several processes: what decides is agreed before it decides ---------------------------------------------------


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    """Mean over ranks, at least in float32; a new tensor, since blocks may be expanded views."""
    total = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total.div_(dist.get_world_size())


def _mean_of_ranks(stats: GradStats) -> GradStats:
    """The mean of the statistics of all ranks, the same on each to the last bit."""
    ranks = range(dist.get_world_size())

    def gathered(values: Tensor | None) -> list[Tensor] | list[None]:
        if values is None:
            return [None for _ in ranks]
        found = [torch.empty_like(values) for _ in ranks]
        dist.all_gather(found, values.contiguous())
        return found

    fields = (gathered(values) for values in (stats.gram, stats.standard_error, stats.noise_trace))
    return GradStats.mean(
        [
            replace(stats, gram=gram, standard_error=error, noise_trace=noise, method=f"{stats.method}, local")
            for gram, error, noise in zip(*fields, strict=True)
        ]
    )


def _mean_of_known_over_ranks(losses: Tensor) -> Tensor:
    known = losses.isfinite()
    sums = torch.stack([torch.where(known, losses, 0.0), known.double()])
    dist.all_reduce(sums)
    return torch.where(sums[1] > 0, sums[0] / sums[1], torch.nan)


def _same_on_all_ranks(value: int, device: torch.device) -> bool:
    """Whether all ranks hold the same 62-bit number."""
    bounds = torch.tensor([value, -value], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    return int(bounds[0]) == -int(bounds[1])

"""AutoScale: fixed weights from the gradient statistics of a short exploration phase."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gradstats.stats import GradStats, condition_number
from gradstats.weighting.base import Facts, Weighting, checked_weighting
from gradstats.weighting.condition import least_condition

logger = logging.getLogger(__name__)

Cost = Literal["magnitude", "condition", "loss"]
Predictor = Literal["linear", "last", "mean", "ema", "exponential"]
Normalize = Literal["gradient", "loss", "sum"]
Schedule = Literal["even", "random"]

_EMA_BETA = 0.9
_SHORTEST_WINDOW = 10  # steps
_MOST_SAMPLES = 10  # of a window on average, if not said otherwise
#: Share of all steps that is recorded at most, if not said otherwise: a recorded step costs two to three plain ones.
_RECORDED_SHARE = 0.02
_TOLERABLE_ERROR = 0.1  # of an extrapolated log-weight
#: Bound on each weight relative to the geometric mean of all.
WEIGHT_RANGE = 1e6


@dataclass(frozen=True)
class WindowReport:
    """What one window of :class:`AutoScale` has found.

    ``before`` and ``after`` are means over the window's samples of the metric that the cost improves. For
    ``"magnitude"`` it is the mean magnitude similarity of all pairs, which should rise to 1; for ``"condition"`` the
    condition number (geometric mean) and for ``"loss"`` the variance of the tasks' shares in the sum of the losses,
    which should fall. Absent tasks, and losses that are not positive, do not count; NaN where nothing does.

    Attributes:
        step: How many steps had been taken at the window's end.
        samples: How many of them were recorded.
        before: The metric without weights.
        after: The metric under the window's weights.
        condition_number: Geometric mean of the condition number under the window's weights, whatever the cost, over
            the samples where it is finite; inf if it is nowhere, NaN if no Gramian was recorded.
        converged: Whether the weights are a minimum of the cost; always so for those in closed form.
    """

    step: int
    samples: int
    before: float
    after: float
    condition_number: float
    converged: bool


class AutoScale(Weighting):
    """Weights that make gradient metrics good during an exploration phase, fixed afterwards (arXiv 2508.13979, 2025).

    Phase 1, the first ``explore`` of all steps, is cut into windows. In each, the network trains with the weights of
    the window before (all ones at first) while ``samples_per_window`` steps record the Gramian and the losses; at its
    end the weights that minimise ``cost`` over those samples follow. Phase 2 trains the remaining steps with the one
    weight vector that ``predictor`` makes of the windows' weights, and records nothing.

    With ``explore_with`` another weighting's weights are in force during phase 1 instead, as in the paper's earlier
    version; windows are recorded and solved as before. A weighting that needs a Gramian at every step then makes every
    step of phase 1 a recorded one.

    The paper publishes the phases, the metrics, ``explore = 0.2``, the constraint ``sum(w) = T`` and that linear
    extrapolation predicts best. The forms of the costs and their solutions, the windows, the first weights, the
    predictors' details and ``normalize`` are our choice:

    * ``cost="magnitude"``: equal norms of the weighted gradients, ``w_i ∝ exp(-mean_t log n_i(t))``.
    * ``cost="condition"``: least mean over samples of ``log κ(diag(w) G_t diag(w))``, a convex problem in ``log w``;
      where the gradients are linearly dependent no weights help and those of ``"magnitude"`` are taken. Of two tasks
      the solution for one sample is equal norms. Samples that lack a task do not count where others have all.
    * ``cost="loss"``: equal weighted losses, ``w_i ∝ exp(-mean_t log L_i(t))``; needs positive losses.
    * ``predictor`` works on the logarithms of the windows' weights, at the end of phase 1: ``"last"`` window,
      ``"mean"``, ``"ema"`` (window ``i`` of ``n`` counts ``0.9^(n-i)``), ``"linear"`` least squares, and
      ``"exponential"``, least squares of ``a + b exp(-x/τ)`` with ``τ`` shared between tasks.
    * ``normalize="gradient"`` scales every new vector so that the mean square of the aggregated gradient, ``wᵀ G w``
      over the samples of the window just recorded, does not change. Adam's second moments remember old gradient scales
      for thousands of steps, so with badly scaled tasks a jump ruins the training that the weights should help.
      ``"loss"`` keeps the mean of ``Σ w_i |L_i|`` instead, for SGD at a learning rate that suits the plain sum: where a
      task that dominated is learned first, a gradient as long as its small one makes a much larger objective, and SGD
      diverges. ``"sum"`` is ``sum(w) = T``.

    Gramians that are estimates (``stats.standard_error`` is not None, as with ``method="sketch"`` and
    ``unbiased=True``) are averaged over the window before anything is derived from them, so that ``"magnitude"`` takes
    ``w_i ∝ 1 / sqrt(mean_t G_ii(t))``: the mean of a logarithm over noisy Gramians is biased, that of ``log κ`` badly.
    ``"condition"`` then needs more directions in a window than tasks, or else the mean is singular. A task whose mean
    square is not positive keeps the weight that it had.

    Each weight stays within a factor 1e6 of the geometric mean of all. A task whose gradient (or loss) was zero or
    absent in every sample of a window keeps its share: its weight, relative to the geometric mean of the others, is
    that of the window before, and is 1 in the first. A warning names it.

    At the end of phase 1 the predictors ``"linear"`` and ``"exponential"`` log a warning where the windows disagree too
    much to extrapolate (our choice): where the standard error of the log-weights read off a line, from its residual, is
    above 0.1 and above the change from the windows' mean that the line predicts (:func:`extrapolation_error`), so that
    ``"mean"`` would be as good a guess. At least 3 windows are needed to tell.

    Args:
        num_tasks: Number of tasks ``T``.
        total_steps: Optimizer steps of the whole training.
        cost: What the weights of a window optimise.
        predictor: How the fixed weights follow from the windows' weights.
        explore: Share of the steps that is phase 1, in (0, 1].
        windows: Number of windows; fewer in short runs, where each has at least 10 steps.
        samples_per_window: Recorded steps in a window, at most its length. None: 10 on average, or fewer in short runs,
            so that no more than 2 % of all steps are recorded; half of them evenly, half by how much a window counts in
            the prediction (of a line the last ones most, and hardly those in the third tenth); at least one in each.
        normalize: How weight vectors are scaled.
        explore_with: Name of another weighting, or one with its options (see :func:`gradstats.weighting.create`), whose
            weights are in force during phase 1. None: those of the last window.
        schedule: Which steps of a window are recorded: ``"even"`` spacing, or ``"random"`` ones without repetition,
            which no period in the data can mislead. They depend on ``seed`` and the window alone, so that ranks agree
            and a resumed run continues.
        seed: Of the random schedule, a non-negative integer.

    Attributes:
        samples: Steps to record in each window.
        explorer: The other weighting; None without one.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If ``explore_with`` is neither a name nor a weighting, or one with options that it must be given.
    """

    FACTS = Facts(
        title="AutoScale",
        paper="arXiv 2508.13979",
        uses="G, L, state in phase 1",
        cost="O(T³) a window, then O(1)",
        sign="> 0",
        tested="closed forms; SciPy",
    )

    STATE = (
        "step",
        "weights",
        "_num_found",
        "_reports",
        "_window_weights",
        "_window_gram",
        "_window_losses",
        "_window_size",
        "_num_samples",
        "_num_estimates",
        "_grams",
        "_losses",
        "_sizes",
    )

    def __init__(
        self,
        num_tasks: int,
        total_steps: int,
        *,
        cost: Cost = "magnitude",
        predictor: Predictor = "linear",
        explore: float = 0.2,
        windows: int = 10,
        samples_per_window: int | None = None,
        normalize: Normalize = "gradient",
        explore_with: str | Weighting | None = None,
        schedule: Schedule = "even",
        seed: int = 0,
    ) -> None:
        super().__init__(num_tasks)
        counts = {"total_steps": total_steps, "windows": windows, "samples_per_window": samples_per_window}
        for name, count in counts.items():
            if name == "samples_per_window" and count is None:
                continue
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: expected a positive integer, got {count!r}")
        if not 0.0 < explore <= 1.0:
            raise ValueError(f"explore: expected a number in (0, 1], got {explore!r}")
        for name, choice, choices in (
            ("cost", cost, get_args(Cost)),
            ("predictor", predictor, get_args(Predictor)),
            ("normalize", normalize, get_args(Normalize)),
            ("schedule", schedule, get_args(Schedule)),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {choice!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed!r}")
        self.cost, self.predictor, self.normalize = cost, predictor, normalize
        self.schedule, self.seed = schedule, seed
        self.explore_steps = max(1, round(explore * total_steps))
        self.windows = min(windows, max(1, self.explore_steps // _SHORTEST_WINDOW))
        if samples_per_window is None:
            affordable = min(_MOST_SAMPLES * self.windows, int(_RECORDED_SHARE * total_steps))
            self.samples = _shared_out(affordable, _coefficients(self.windows, predictor))
        else:
            self.samples = (samples_per_window,) * self.windows
        gramian, losses_too = cost != "loss" or normalize == "gradient", "loss" in (cost, normalize)
        self._records = frozenset({"gramian"} if gramian else ()) | frozenset({"losses"} if losses_too else ())
        self.explorer = None if explore_with is None else checked_weighting("explore_with", explore_with, num_tasks)
        if self.explorer is not None:
            self.weights = self.explorer.weights
        self.step = 0
        # Everything recorded is on the CPU, where the small problems are solved, and has its full size from the start.
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device="cpu")
        self._num_found = 0
        self._reports = zeros(self.windows, len(fields(WindowReport)))
        self._window_weights = zeros(self.windows, num_tasks)
        self._window_gram = zeros(num_tasks, num_tasks)  # means over the last window with samples
        self._window_losses = zeros(num_tasks)
        self._window_size = zeros(())
        self._num_samples = 0
        self._num_estimates = 0  # samples whose Gramian is one
        most = max(self.samples)
        self._grams = zeros(most, num_tasks, num_tasks)
        self._losses = zeros(most, num_tasks)
        self._sizes = zeros(most)  # of what ``normalize`` keeps

    @property
    def window_weights(self) -> Tensor:
        """Weights found by the windows so far, each with ``sum(w) = T``: float64 ``[windows so far, T]``."""
        return self._window_weights[: self._num_found]

    @property
    def reports(self) -> tuple[WindowReport, ...]:
        """What the windows so far have found, one report for each row of ``window_weights``."""
        return tuple(
            WindowReport(int(step), int(samples), before, after, condition, bool(converged))
            for step, samples, before, after, condition, converged in self._reports[: self._num_found].tolist()
        )

    @property
    def exploring(self) -> bool:
        """Whether phase 1 is still going on."""
        return self.step < self.explore_steps

    @property
    def needs(self) -> frozenset[str]:
        """What is left to record, and what the explorer needs: nothing any more in phase 2."""
        if not self.exploring:
            return frozenset()
        return self._records if self.explorer is None else self._records | self.explorer.needs

    def wants_stats(self) -> bool:
        """Whether the step about to be taken is one to record, or one whose Gramian the explorer wants."""
        if not self.exploring:
            return False
        sampled = "gramian" in self._records and self._sample_is_due(*self._window())
        return sampled or (self.explorer is not None and self.explorer.wants_stats())

    def _window(self) -> tuple[int, int, int]:
        """The window that ``step`` lies in: its index, first step and length."""
        windows, steps = self.windows, self.explore_steps
        index = ((self.step + 1) * windows - 1) // steps
        start = index * steps // windows
        return index, start, (index + 1) * steps // windows - start

    def _sample_is_due(self, index: int, start: int, length: int) -> bool:
        # A sample that could not be taken stays due, so the next step takes it.
        samples, steps = min(self.samples[index], length), self.step - start + 1
        if self.schedule == "even":
            return self._num_samples < steps * samples // length
        chosen = np.random.default_rng((self.seed, index)).permutation(length)[:samples]
        return self._num_samples < int((chosen < steps).sum())

    def skip(self) -> bool:
        """Count a step of phase 1 that is not recorded and ends no window; those of phase 2 are not counted."""
        if self.step >= self.explore_steps:  # faster than the property, at every step
            return True
        _, start, length = window = self._window()
        if self.explorer is not None or self.step + 1 == start + length or self._sample_is_due(*window):
            return False
        self.step += 1
        return True

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Record the step if it is due and return the weights in force; the last step of a window prepares the next."""
        if self.weights.device != losses.device:
            self.weights = self.weights.to(losses.device)
        weights = self.weights
        if not self.exploring:
            return weights
        if self.explorer is not None:
            weights = self.explorer(losses, stats if self.explorer.wants_stats() else None)
            self.weights = self.explorer.weights  # some prepare those of the next step
        _, start, length = window = self._window()
        if (stats is not None or "gramian" not in self._records) and self._sample_is_due(*window):
            self._record(losses, stats, weights.cpu())
        self.step += 1
        if self.step == start + length:
            self._close_window()
        return weights

    def after_step(self, losses: Tensor) -> None:
        """Tell the explorer what the step has achieved."""
        if self.exploring and self.explorer is not None:
            self.explorer.after_step(losses)

    def _record(self, losses: Tensor, stats: GradStats | None, weights: Tensor) -> None:
        gram = torch.zeros_like(self._window_gram) if stats is None else stats.gram.detach().cpu()
        self._losses[self._num_samples] = losses.detach()
        self._grams[self._num_samples] = gram
        self._sizes[self._num_samples] = self._size(weights, gram, self._losses[self._num_samples])
        self._num_estimates += stats is not None and stats.standard_error is not None
        self._num_samples += 1

    def _close_window(self) -> None:
        count = self._num_samples
        if count:
            self._find(self._grams[:count], self._losses[:count])
            self._window_gram, self._window_size = self._grams[:count].mean(0), self._sizes[:count].mean()
            self._window_losses = _magnitudes(self._losses[:count]).mean(0)
            if self.explorer is None:
                self.weights = self._scaled(self.window_weights[-1])
        else:
            logger.warning("AutoScale: no step of the window ending at step %d could be recorded", self.step)
        if self._num_found and not self.exploring:
            self._doubt()
            self.weights = self._scaled(predict(self.window_weights, self.predictor))
        self._num_samples = self._num_estimates = 0

    def _find(self, grams: Tensor, losses: Tensor) -> None:
        """Add the weights and the report of the window just recorded."""
        decisive = mean_of_known(grams)[None] if self._num_estimates else grams
        sizes = losses if self.cost == "loss" else decisive.diagonal(dim1=1, dim2=2).sqrt()
        unknown = (~_usable(sizes).any(0)).nonzero().flatten().tolist()
        if unknown:
            what = "loss that is positive" if self.cost == "loss" else "gradient that is not zero"
            message = "AutoScale: tasks %s had no %s in the window ending at step %d, and keep their share"
            logger.warning(message, unknown, what, self.step)
        previous = self.window_weights[-1] if self._num_found else torch.ones_like(sizes[0])
        log_weights, converged = balancing_log_weights(sizes, previous), True
        if self.cost == "condition":
            log_weights, converged = conditioning_log_weights(decisive, log_weights)
        weights = _normalized(log_weights)
        before, after = _metrics(self.cost, decisive, losses, torch.stack([torch.ones_like(weights), weights]))
        condition = after if self.cost == "condition" else _condition_number(decisive, weights)
        report = [self.step, len(losses), before, after, condition, converged]
        self._reports[self._num_found] = torch.tensor(report, dtype=torch.float64, device="cpu")
        self._window_weights[self._num_found] = weights
        self._num_found += 1

    def _doubt(self) -> None:
        """Warn where an extrapolation from the windows says nothing."""
        if self.predictor not in ("linear", "exponential"):
            return
        error, change = extrapolation_error(self.window_weights)
        if error > max(_TOLERABLE_ERROR, change):
            logger.warning(
                "AutoScale: the windows disagree too much to extrapolate: log-weights change by %.2g, with an error of "
                '%.2g; more samples_per_window, or predictor="mean", would be safer',
                change,
                error,
            )

    def _scaled(self, weights: Tensor) -> Tensor:
        """``weights`` on the scale of those that the last window's samples were taken with."""
        before, after = self._window_size, self._size(weights, self._window_gram, self._window_losses)
        if self.normalize == "sum" or not (before > 0 and after > 0):
            return weights
        ratio = before / after
        return weights * (ratio if self.normalize == "loss" else ratio.sqrt())

    def _size(self, weights: Tensor, gram: Tensor, losses: Tensor) -> Tensor:
        """The weighted sum of the losses, or the square of the aggregated gradient's norm."""
        if self.normalize == "loss":
            return weights.abs() @ _magnitudes(losses)
        return weights @ gram @ weights


def mean_of_known(grams: Tensor) -> Tensor:
    """Mean Gramian ``[T, T]`` of samples ``[S, T, T]``; each pair's over those in which both gradients are known.

    A gradient is known if its squared norm is finite and not 0: an absent task has a row of zeros. Unbiased estimates
    of a square may be negative; without those the mean would be too large.
    """
    known = _known(grams)
    pairs = known[:, :, None] & known[:, None, :]
    return torch.where(pairs, grams, 0.0).sum(0) / pairs.sum(0).clamp_min(1)


def _known(grams: Tensor) -> Tensor:
    squares = grams.diagonal(dim1=1, dim2=2)
    return squares.isfinite() & (squares != 0)


def _magnitudes(losses: Tensor) -> Tensor:
    """Absolute values; 0 where there is no loss."""
    return losses.abs().nan_to_num(0.0, posinf=0.0)


def _usable(sizes: Tensor) -> Tensor:
    return sizes.isfinite() & (sizes > 0)


def _metrics(cost: Cost, grams: Tensor, losses: Tensor, weights: Tensor) -> list[float]:
    """The metric that a cost improves, as :class:`WindowReport` has it, under each of the ``weights`` ``[N, T]``."""
    if cost == "condition":
        return [_condition_number(grams, w) for w in weights]
    if cost == "loss":
        parts = torch.where(_usable(losses), weights[:, None] * losses, torch.nan)
        shares = parts / parts.nansum(2, keepdim=True)
        found = (shares - shares.nanmean(2, keepdim=True)).square()
    else:
        norms = weights[:, None] * grams.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
        ratios = norms[..., None] / norms[..., None, :]
        similarity = (2.0 / (ratios + 1.0 / ratios)).nan_to_num(0.0)  # of two that are 0
        known = _known(grams)
        pairs = (known[:, :, None] & known[:, None, :]).triu(1)
        found = torch.where(pairs, similarity, torch.nan).flatten(2).nanmean(2)
    means: list[float] = found.flatten(1).nanmean(1).tolist()
    return means


def _condition_number(grams: Tensor, weights: Tensor) -> float:
    """Geometric mean of the samples' condition number under ``weights``, of those that are finite if any is."""
    weighted = (weights[:, None] * grams * weights).numpy()
    samples = zip(weighted, _known(grams).numpy(), strict=True)
    found = [condition_number(gram[known][:, known]) for gram, known in samples if known.any()]
    finite = [number for number in found if number < math.inf]
    return math.exp(np.log(finite or found or [math.nan]).mean())


def balancing_log_weights(sizes: Tensor, previous: Tensor) -> Tensor:
    """``-mean_t log sizes_i(t)``: the weights that make ``w_i sizes_i`` equal, least squares in the logarithm.

    Args:
        sizes: Gradient norms or losses of the samples, float64 ``[S, T]``; entries that are not positive and finite
            do not count.
        previous: Weights found before, float64 ``[T]``: a task that never counts keeps its share among those that do.

    Returns:
        Float64 tensor ``[T]``, defined up to a common constant.
    """
    known = _usable(sizes)
    logs = torch.where(known, sizes, 1.0).log()
    result = -logs.sum(0) / known.sum(0).clamp_min(1)
    found = known.any(0)
    if found.all():
        return result
    offset = (result - previous.log())[found].mean() if found.any() else 0.0
    return torch.where(found, result, previous.log() + offset)


def conditioning_log_weights(grams: Tensor, start: Tensor) -> tuple[Tensor, bool]:
    """The weights of least condition number over the samples that have a gradient of every task.

    Where no sample has all, their mean by :func:`mean_of_known` takes their place. Tasks without any gradient are left
    out, and keep their share.

    Args:
        grams: Gramians of the samples, float64 ``[S, T, T]``.
        start: Log-weights of equal norms, float64 ``[T]``.

    Returns:
        Float64 tensor ``[T]``, defined up to a common constant, and whether it is a minimum; ``start`` and False where
        the gradients are linearly dependent in every sample.
    """
    known = _known(grams)
    seen = known.any(0)
    if not seen.any():
        return start, False
    complete = known[:, seen].all(1)
    grams = grams[complete] if complete.any() else mean_of_known(grams)[None]
    found, converged = least_condition(grams[:, seen][:, :, seen].numpy(), start[seen].numpy())
    result = start.clone()
    shift = torch.from_numpy(found) - start[seen]
    result[seen] += shift - shift.mean()
    return result, converged


def predict(window_weights: Tensor, predictor: Predictor) -> Tensor:
    """The fixed weights of phase 2 from the windows' weights.

    Args:
        window_weights: Positive weights of ``n`` windows of equal length, float64 ``[n, T]``.
        predictor: As described at :class:`AutoScale`; the trend is read off at the end of the last window.

    Returns:
        Float64 tensor ``[T]`` with ``sum(w) = T``.
    """
    logs, middles = _trend(window_weights)
    if predictor == "exponential" and len(logs) > 2:
        return _normalized(_exponential(middles, logs))
    return _normalized(_coefficients(len(logs), predictor).to(logs) @ logs)


def _coefficients(num: int, predictor: Predictor) -> Tensor:
    """What the log-weights of ``num`` windows count in the prediction; those of a line for ``"exponential"``."""
    middles = _middles(num)
    centred = middles - middles.mean()
    if predictor == "last" or num == 1:
        return (middles == middles[-1]).double()
    if predictor == "mean":
        return torch.full_like(middles, 1 / num)
    if predictor == "ema":
        shares = _EMA_BETA ** (num - 0.5 - middles)
        return shares / shares.sum()
    return 1 / num + (num - middles.mean()) * centred / centred.square().sum()


def _shared_out(total: int, coefficients: Tensor) -> tuple[int, ...]:
    """About ``total`` samples in windows that count so much: half evenly, half in proportion, at least one in each.

    In proportion alone the prediction would vary least, if windows varied alike; but phase 1 trains with the weights of
    each, and another kind of trend than the one assumed should show.
    """
    counts = coefficients.abs()
    ends = total * (1 / len(counts) + counts / counts.sum()).cumsum(0) / 2
    return tuple(max(1, round(number)) for number in ends.round().diff(prepend=ends.new_zeros(1)).tolist())


def extrapolation_error(window_weights: Tensor) -> tuple[float, float]:
    """How far a line through the windows' log-weights can be trusted at the end of the last window.

    Args:
        window_weights: As for :func:`predict`.

    Returns:
        The standard error of the value there, from the line's residual, and the change to it from the mean of the
        windows: root mean squares over tasks. The error is 0 for fewer than 3 windows, which always lie on a line.
    """
    logs, middles = _trend(window_weights)
    num, end = len(logs), middles.new_tensor(len(logs))
    if num < 3:
        return 0.0, 0.0
    predicted, residual = _fitted(middles, end, logs)
    spread = (middles - middles.mean()).square().sum()
    leverage = 1 / num + (end - middles.mean()).square() / spread
    error = (residual / logs.numel() * num / (num - 2) * leverage).sqrt()
    return float(error), float((predicted - logs.mean(0)).square().mean().sqrt())


def _trend(window_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Centred log-weights ``[n, T]``, as only ratios carry information, and the middles of the windows ``[n]``."""
    logs = window_weights.log()
    return logs - logs.mean(1, keepdim=True), _middles(len(logs)).to(logs.device)


def _middles(num: int) -> Tensor:
    return torch.arange(num, dtype=torch.float64, device="cpu") + 0.5


def _fitted(feature: Tensor, at: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of ``a + b feature`` for every task: its value ``[T]`` at ``at``, and the squared residual."""
    mean, centred = logs.mean(0), feature - feature.mean()
    slope = centred @ (logs - mean) / centred.square().sum()
    residual = (mean + centred[:, None] * slope - logs).square().sum()
    return mean + slope * (at - feature.mean()), residual


def _exponential(middles: Tensor, logs: Tensor) -> Tensor:
    """``a + b exp(-x/τ)`` at the end of phase 1, with the τ (in windows, on a grid) of least squared residual."""
    end = middles.new_tensor(len(middles))
    decay_times = torch.logspace(-0.5, 2.0, 51, dtype=torch.float64, device=logs.device)
    fits = [_fitted(torch.exp(-middles / tau), torch.exp(-end / tau), logs) for tau in decay_times]
    return min(fits, key=lambda fit: float(fit[1]))[0]


def _normalized(log_weights: Tensor) -> Tensor:
    """``exp`` of the clamped logarithms, scaled to ``sum(w) = T``."""
    bound = math.log(WEIGHT_RANGE)
    centred = (log_weights - log_weights.mean()).clamp(-bound, bound)
    return len(log_weights) * torch.softmax(centred, 0)

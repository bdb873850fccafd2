"""Weightings that are functions of the losses and a little memory (DB-MTL: and of the gradients' norms).

What they share, and is our choice: a loss must be finite and, where a method takes its logarithm or divides by it,
positive. A task whose loss is not, or that has none at this step, is left out: the others get the weights that they
would have without it, and its own weight stays what it was.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gradstats.weighting.base import Facts, Weighting, checked_numbers, checked_positive

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstats.stats import GradStats

Distribution = Literal["normal", "dirichlet"]

_SQUARABLE = 1e150
_ROUNDING = 1e-28  # square of what unit vectors differ by in it
_AHEAD = 64  # steps whose random weights are drawn together, which takes hardly longer than those of one


class _LossBased(Weighting):
    """Weights that follow from the losses of every step."""

    STATE: ClassVar[tuple[str, ...]] = ("weights",)

    @property
    def needs(self) -> frozenset[str]:
        """Losses, at every step."""
        return frozenset({"losses"})

    def _renewed(self, weights: Tensor, known: Tensor) -> Tensor:
        """Take over the weights of the tasks that are known; those of the others stay."""
        self.weights = torch.where(known & (weights.abs() < torch.inf), weights, self.weights)  # NaN is not
        return self.weights


class RLW(Weighting):
    """Random loss weighting (Lin, Ye, Zhang & Tsang, arXiv 2111.10603): new weights at every step.

    ``w = T softmax(z)`` with ``z`` standard normal, or ``w / T`` uniform on the simplex, a Dirichlet distribution with
    all parameters 1. The paper's weights sum to 1, ours to ``T``. They depend on ``seed`` and the step alone, so that
    ranks agree and a resumed run continues (our choice); give each repetition of an experiment its own seed.

    Args:
        num_tasks: Number of tasks ``T``.
        distribution: ``"normal"`` or ``"dirichlet"``.
        seed: A non-negative integer.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="RLW",
        paper="arXiv 2111.10603",
        uses="random",
        cost="O(T)",
        sign="≥ 0",
        tested="its two distributions' quantiles; TorchJD",
    )

    STATE = ("step", "weights")

    def __init__(self, num_tasks: int, *, distribution: Distribution = "normal", seed: int = 0) -> None:
        super().__init__(num_tasks)
        if distribution not in get_args(Distribution):
            raise ValueError(f"distribution: expected one of {', '.join(get_args(Distribution))}, got {distribution!r}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed!r}")
        self.distribution, self.seed = distribution, seed
        self.step = 0
        self._block, self._drawn = -1, self.weights[None]  # which steps, and their weights

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Draw the weights of this step."""
        block, row = divmod(self.step, _AHEAD)
        if self._block != block:  # also where the state of another step was loaded
            drawn = self._draw(np.random.default_rng((self.seed, block)))
            self._block, self._drawn = block, drawn.to(losses.device, non_blocking=True)
        self.step += 1
        self.weights = self._drawn[row].to(losses.device)
        return self.weights

    def _draw(self, generator: np.random.Generator) -> Tensor:
        """Weights of some steps, ``[_AHEAD, T]``."""
        if self.distribution == "dirichlet":
            return self.num_tasks * torch.from_numpy(generator.dirichlet(np.ones(self.num_tasks), _AHEAD))
        return self.num_tasks * torch.softmax(torch.from_numpy(generator.standard_normal((_AHEAD, self.num_tasks))), 1)


class DWA(_LossBased):
    """Dynamic weight average (Liu, Johns & Davison, arXiv 1803.10704): more weight where a loss falls more slowly.

    ``w = T softmax(r / temperature)``, so ``sum(w) = T``, with ``r_i`` the mean loss in the last epoch over that in the
    one before; all weights are 1 in the first two. Weightings count steps and know no epochs, so an epoch is ``window``
    steps: pass the number of optimizer steps in yours for the paper's method. Our choice: means are over the finite
    losses of a task, a task without any in a window keeps its mean, and ``r_i = 1`` where both means are not positive.

    Args:
        num_tasks: Number of tasks ``T``.
        window: Steps that a mean is over, a positive integer.
        temperature: Positive; 2 in the paper. The larger, the more even the weights.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="DWA",
        paper="arXiv 1803.10704",
        uses="L, state",
        cost="O(T)",
        sign="> 0",
        tested="TorchJD",
    )

    STATE = ("step", "sums", "counts", "older", "newer", "weights")

    def __init__(self, num_tasks: int, *, window: int = 100, temperature: float = 2.0) -> None:
        super().__init__(num_tasks)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window: expected a positive integer, got {window!r}")
        self.window, self.temperature = window, checked_positive("temperature", temperature)
        self.step = 0
        self.sums, self.counts = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.older, self.newer = (torch.full_like(self.weights, torch.nan) for _ in range(2))

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Return the weights in force; the last step of a window prepares the next."""
        self._move_state(losses.device)
        weights = self.weights
        self.sums = self.sums + losses.nan_to_num(0.0, 0.0, 0.0)
        self.counts = self.counts + losses.isfinite()
        self.step += 1
        if self.step % self.window == 0:
            self._close_window()
        return weights

    def _close_window(self) -> None:
        mean = torch.where(self.counts > 0, self.sums / self.counts, self.newer)
        self.older, self.newer = self.newer, mean
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        rates = self.newer / self.older
        usable = (self.newer > 0) & (self.older > 0) & rates.isfinite()
        self.weights = self.num_tasks * torch.softmax(torch.where(usable, rates, 1.0) / self.temperature, 0)


class GLS(_LossBased):
    """Geometric loss strategy (Chennupati et al., arXiv 1904.08492): minimises the geometric mean of the losses.

    The gradient of ``(Π_j L_j)^(1/T)`` is the weighted sum with ``w_i = (Π_j L_j)^(1/T) / (T L_i)``, and these are the
    weights here. The scale is the method's own: all ``w_i L_i`` are a ``T``-th of the geometric mean.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="GLS",
        paper="arXiv 1904.08492",
        uses="L",
        cost="O(T)",
        sign="> 0",
        tested="TorchJD; autograd of the geometric mean",
    )

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """The weights of the current losses."""
        self._move_state(losses.device)
        logs = losses.log().nan_to_num_(torch.nan, torch.nan, torch.nan)
        known = logs == logs  # faster than isfinite(); NaN equals nothing
        count = known.count_nonzero()
        weights = (logs.nansum() / count - logs).exp_().div_(count)
        self.weights = torch.where(known, weights, self.weights)
        return self.weights


class STCH(_LossBased):
    """Smooth Tchebycheff scalarization (Lin et al., arXiv 2402.19078): minimises a smooth maximum of the losses.

    The gradient of ``T μ log Σ_i exp(λ_i f_i / μ)`` with ``f_i = L_i - ideal_i`` is the weighted sum with
    ``w_i = T λ_i softmax(λ f / μ)_i``, and these are the weights here. The paper's function has no factor ``T``; with
    it, and ``λ_i = 1``, ``sum(w) = T``.

    With ``warm_up`` steps it is what the authors do in their multi-task experiments, where losses differ in scale:
    ``f_i = log((L_i - ideal_i) / m_i)`` with ``m_i`` the mean of ``L_i - ideal_i`` over the warm-up, in which the sum
    of the logarithms is minimised, ``w_i = 1 / (L_i - ideal_i)``. (Their mean is over one epoch at the end of it.)
    After it ``Σ w_i (L_i - ideal_i) = T`` with ``λ_i = 1``.

    Args:
        num_tasks: Number of tasks ``T``.
        mu: Smoothing ``μ``, positive; towards 0 the maximum is exact. The paper tries 0.01 to 1.
        preference: ``λ``, ``T`` positive numbers; None for ones.
        ideal: ``T`` finite numbers that the losses cannot go below; None for zeros.
        warm_up: Steps of the warm-up; None for the function of the losses themselves.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="STCH",
        paper="arXiv 2402.19078",
        uses="L, state",
        cost="O(T)",
        sign="≥ 0",
        tested="TorchJD; autograd of its function",
    )

    STATE = ("step", "sums", "counts", "weights")

    def __init__(
        self,
        num_tasks: int,
        *,
        mu: float = 1.0,
        preference: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
        warm_up: int | None = None,
    ) -> None:
        super().__init__(num_tasks)
        if warm_up is not None and (not isinstance(warm_up, int) or warm_up < 1):
            raise ValueError(f"warm_up: expected a positive integer, got {warm_up!r}")
        self.mu, self.warm_up = checked_positive("mu", mu), warm_up
        self.preference = _preference(preference, num_tasks)
        self.ideal = checked_numbers("ideal", ideal, num_tasks, default=0.0)
        self.step = 0
        self.sums, self.counts = torch.zeros_like(self.weights), torch.zeros_like(self.weights)

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """The weights of the current losses."""
        self._move_state(losses.device)
        self.preference, self.ideal = self.preference.to(losses.device), self.ideal.to(losses.device)
        gaps = losses - self.ideal
        known = gaps.isfinite()
        if self.warm_up is None:
            return self._renewed(self._smooth_maximum(gaps, known), known)
        known &= gaps > 0
        if self.step < self.warm_up:
            self.step += 1
            self.sums = self.sums + torch.where(known, gaps, 0.0)
            self.counts = self.counts + known
            return self._renewed(1.0 / gaps, known)
        known &= self.counts > 0
        relative = torch.where(known, gaps * self.counts / self.sums, 1.0)
        return self._renewed(self._smooth_maximum(relative.log(), known) / gaps, known)

    def _smooth_maximum(self, objectives: Tensor, known: Tensor) -> Tensor:
        """Derivatives ``T λ softmax(λ f / μ)`` over the known tasks, float64 ``[T]``; ``T`` is their number."""
        exponents = torch.where(known, self.preference * objectives / self.mu, -torch.inf)
        return known.sum() * self.preference * torch.softmax(exponents, 0)


class COSMOS(_LossBased):
    """COSMOS (Ruchte & Grabocka, arXiv 2103.13392): the weighted sum of the losses, in a preferred proportion.

    The gradient of ``Σ_i r_i L_i - strength · cos(r, L)`` with the preference ``r`` is the weighted sum with
    ``w_i = r_i - strength · ∂cos/∂L_i``, and these are the weights here; they may be negative. The paper draws new
    preferences at every step and hands them to the network, too: that is the caller's part, who may set the attribute.

    Args:
        num_tasks: Number of tasks ``T``.
        strength: ``λ``, not negative; 0.01 to 8 in the paper. 1 is our default.
        preference: ``r``, ``T`` positive numbers; None for ones.

    Attributes:
        preference: Float64 ``[T]``.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="COSMOS",
        paper="arXiv 2103.13392",
        uses="L",
        cost="O(T)",
        sign="any",
        tested="TorchJD",
    )

    def __init__(self, num_tasks: int, *, strength: float = 1.0, preference: Sequence[float] | None = None) -> None:
        super().__init__(num_tasks)
        if not 0.0 <= strength < math.inf:
            raise ValueError(f"strength: expected a finite number that is not negative, got {strength!r}")
        self.strength, self.preference = strength, _preference(preference, num_tasks)

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """The weights of the current losses."""
        self._move_state(losses.device)
        self.preference = self.preference.to(losses.device)
        known, losses, preferred = _comparable(losses, self.preference)
        square = losses.dot(losses)
        aside = torch.addcmul(preferred, losses.dot(preferred) / square, losses, value=-1.0)
        slope = torch.where(square > 0, aside / (square * preferred.dot(preferred)).sqrt(), 0.0)  # of the cosine
        self.weights = torch.where(known, torch.sub(preferred, slope, alpha=self.strength), self.weights)
        return self.weights


class PBI(_LossBased):
    """Penalty-based boundary intersection (Zhang & Li, 2007, doi 10.1109/TEVC.2007.892759).

    With ``f = L - ideal`` and the unit vector ``r̂`` of the preference ``r`` it minimises ``d₁ + theta d₂``, where
    ``d₁ = f·r̂`` is the length along the preferred proportion and ``d₂ = ‖f - d₁ r̂‖`` the distance from it. The gradient
    is the weighted sum with ``w = r̂ + theta (f - d₁ r̂) / d₂``, ``r̂`` where ``d₂`` is lost in rounding; these are the
    weights here, and may be negative.

    Args:
        num_tasks: Number of tasks ``T``.
        theta: Penalty, not negative; 5 in the paper.
        preference: ``r``, ``T`` positive numbers; None for ones.
        ideal: ``T`` finite numbers that the losses cannot go below; None for zeros.

    Attributes:
        preference: Float64 ``[T]``.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="PBI",
        paper="doi 10.1109/TEVC.2007.892759",
        uses="L",
        cost="O(T)",
        sign="any",
        tested="TorchJD",
    )

    def __init__(
        self,
        num_tasks: int,
        *,
        theta: float = 5.0,
        preference: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_tasks)
        if not 0.0 <= theta < math.inf:
            raise ValueError(f"theta: expected a finite number that is not negative, got {theta!r}")
        self.theta, self.preference = theta, _preference(preference, num_tasks)
        self.ideal = checked_numbers("ideal", ideal, num_tasks, default=0.0)

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """The weights of the current losses."""
        self._move_state(losses.device)
        self.preference, self.ideal = self.preference.to(losses.device), self.ideal.to(losses.device)
        known, gaps, preferred = _comparable(losses - self.ideal, self.preference)
        square = preferred.dot(preferred)
        aside = torch.addcmul(gaps, gaps.dot(preferred) / square, preferred, value=-1.0)
        distance = aside.dot(aside)  # its square
        inverse = torch.where(distance > _ROUNDING * gaps.dot(gaps), distance.rsqrt(), 0.0)
        weights = torch.addcmul(preferred * square.rsqrt(), inverse, aside, value=self.theta)
        self.weights = torch.where(known, weights, self.weights)
        return self.weights


class GO4Align(_LossBased):
    """Group optimization for multi-task alignment (Shen et al., arXiv 2404.06486): one weight per group of tasks.

    Each task has an indicator ``γ_i = p_i Σ_j L_j / L_i``, with shares ``p_i ∝ p_i exp(-beta L_i)`` updated at every
    step, all ``1/T`` at first; k-means groups the indicators, and the weight of a task is the mean of its group. The
    scale is the method's own: about ``sum(w) = T`` where losses are alike. The authors' k-means starts at random; on
    numbers the best grouping can be found exactly, and that is what is done here (our choice).

    Args:
        num_tasks: Number of tasks ``T``.
        num_groups: Groups, at most ``T``; 2 (or 1 for one task) is our default.
        beta: Step size of the shares, not negative; 1e-4 in the authors' code.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="GO4Align",
        paper="arXiv 2404.06486",
        uses="L, state",
        cost="O(K T²) for K groups",
        sign="≥ 0",
        tested="all groupings",
    )

    STATE = ("log_shares", "weights")

    def __init__(self, num_tasks: int, *, num_groups: int | None = None, beta: float = 1e-4) -> None:
        super().__init__(num_tasks)
        self.num_groups = min(2, num_tasks) if num_groups is None else num_groups
        if not isinstance(self.num_groups, int) or not 1 <= self.num_groups <= num_tasks:
            raise ValueError(f"num_groups: expected an integer from 1 to {num_tasks}, got {num_groups!r}")
        if not 0.0 <= beta < math.inf:
            raise ValueError(f"beta: expected a finite number that is not negative, got {beta!r}")
        self.beta = beta
        self.log_shares = torch.zeros_like(self.weights)

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Update the shares with the current losses and return the weights that follow."""
        self._move_state(losses.device)
        known = (losses > 0) & losses.isfinite()
        losses = torch.where(known, losses, 0.0)
        self.log_shares = self.log_shares - self.beta * losses
        shares = torch.softmax(torch.where(known, self.log_shares, -torch.inf), 0)
        indicators = torch.where(known, shares * losses.sum() / losses, 0.0)
        return self._renewed(group_means(indicators, known, self.num_groups), known)


class DBMTL(_LossBased):
    """Dual-balancing (Lin et al., arXiv 2308.12029) without its moving average: equal gradients of the log losses.

    The gradients of ``log L_i`` are scaled to the norm of the largest, so that ``w_i n_i = max_j(n_j / L_j)`` for all:
    ``w_i = max_j(n_j / L_j) / n_i``. The scale is the method's own. The paper also averages the gradients over steps
    with a coefficient that falls to 0, which is no function of the Gramian, and leaves the parameters of single tasks
    with the gradients of ``log L_i``; here the weights are those of all parameters, as everywhere in this library.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="DB-MTL",
        paper="arXiv 2308.12029",
        uses="diag G, L",
        cost="O(T)",
        sign="> 0",
        tested="its definition",
    )

    @property
    def needs(self) -> frozenset[str]:
        """Losses and Gramian, at every step."""
        return frozenset({"losses", "gramian"})

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """The weights of the current losses and gradients; those in force where there is no Gramian."""
        self._move_state(losses.device)
        if stats is None:
            return self.weights
        norms = stats.norms
        known = (losses > 0) & losses.isfinite() & (norms > 0) & norms.isfinite()
        largest = torch.where(known, norms / losses, 0.0).max()
        return self._renewed(largest / norms, known)


def _preference(preference: Sequence[float] | None, num_tasks: int) -> Tensor:
    numbers = checked_numbers("preference", preference, num_tasks, default=1.0)
    if not (numbers > 0).all():
        raise ValueError(f"preference: expected {num_tasks} positive numbers, got {preference}")
    return numbers


def _comparable(losses: Tensor, preference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which losses are such that they and their squares are finite, and both vectors with zeros elsewhere, ``[T]``."""
    known = losses.abs() < _SQUARABLE
    return known, torch.where(known, losses, 0.0), torch.where(known, preference, 0.0)


def group_means(values: Tensor, known: Tensor, num_groups: int) -> Tensor:
    """Replace each number by the mean of its group, for the grouping with the least sum of squared deviations.

    On a line groups are intervals, so dynamic programming over the sorted numbers finds the best grouping exactly.
    Nothing synchronises with the host.

    Args:
        values: Float64 ``[T]``.
        known: Bool ``[T]``; the other numbers do not count.
        num_groups: Most groups to make, positive.

    Returns:
        Float64 ``[T]``; without meaning where ``known`` is False.
    """
    order = torch.where(known, values, torch.inf).argsort()
    x, mass = torch.where(known, values, 0.0)[order], known[order].to(values)
    # [start, stop]: of the numbers from start up to stop, Σ_{a<b} (x_a - x_b)² divided by how many they are. These are
    # sums of what is not negative; differences of cumulated squares would cancel.
    pairs = ((x[:, None] - x[None, :]).square() * mass[:, None] * mass[None, :]).triu()
    squares = pad(pairs.cumsum(1).flip(0).cumsum(0).flip(0), (1, 0, 0, 1))
    stops = pad(mass.cumsum(0), (1, 0))
    costs = squares / (stops[None, :] - stops[:, None]).clamp_min(1.0)
    costs = torch.where(torch.ones_like(costs).triu().bool(), costs, torch.inf)
    best, cuts = costs[0], []  # best[stop]: least cost of the numbers up to stop
    for _ in range(num_groups - 1):
        best, cut = (best[:, None] + costs).min(0)
        cuts.append(cut)
    position = torch.arange(len(x), device=x.device)
    group, start = torch.zeros_like(position), torch.full((1,), len(x), device=x.device)
    for cut in reversed(cuts):
        start = cut[start]
        group = group + (position >= start)
    members = (position[:num_groups, None] == group) * mass
    means = members @ x / members.sum(1)
    return torch.empty_like(values).scatter(0, order, means[group])

"""The weights of least condition number: a smooth convex problem in ``log w``, by Newton's method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradstats.weighting.solvers import EPS

if TYPE_CHECKING:
    from gradstats.weighting.solvers import Array

_WARMEST, _COLDEST, _COOLING = 0.1, 1e-7, 4.0  # temperatures
_ENOUGH = 0.1  # what a further step may promise on the way, relative to the temperature
_NEGLIGIBLE = 1e-6  # shares of an eigenvalue that do not matter in the Hessian
_LONGEST = 2.0  # step, in any log-weight
_CONVERGED = 1e-9  # what a further step may promise at a minimum, where rounding does not hide more


def least_condition(grams: Array, start: Array) -> tuple[Array, bool]:
    """Minimise the mean of ``log κ(diag(w) G_s diag(w))`` over ``log w``, where ``κ = sqrt(λ_max / λ_min)``.

    Both ``log λ_max`` and ``-log λ_min`` are convex in ``log w``, so any minimum is global. Where eigenvalues coincide,
    as they like to do at the minimum, both have kinks. So the maximum is replaced by ``τ log Σ_k λ_k^(1/τ)``, the
    minimum alike, which differ by at most ``τ log T``, at temperatures ``τ`` that fall from 0.1 to 1e-7; gradient and
    Hessian are those of the eigenvalues. The mean of ``log κ`` ends within ``τ log T`` of its least value. Where ``κ``
    is above 700, rounding of the small eigenvalues stops ``τ`` earlier, at ``1e3 κ²`` epsilons.

    Args:
        grams: Gramians of ``S`` samples, ``[S, T, T]``. Samples of linearly dependent gradients are left out: their
            condition number is infinite whatever the weights.
        start: Starting point, ``[T]``, such as equal norms, which are within ``√T`` of the optimum.

    Returns:
        ``log w``, ``[T]``, defined up to a common constant, and whether it is a minimum; ``start`` and False if every
        sample is left out.
    """
    # On a starting point with equal norms the problem is well scaled, whatever the scale of the tasks.
    scaled = np.exp(start)[:, None] * grams * np.exp(start)
    scaled = scaled[np.isfinite(scaled).all((1, 2))]
    scaled = scaled / np.abs(scaled.diagonal(axis1=1, axis2=2)).mean(1).clip(np.finfo(float).tiny)[:, None, None]
    values = np.linalg.eigvalsh(scaled)
    independent = values[:, 0] > len(start) * EPS * values[:, -1]
    scaled, values = scaled[independent], values[independent]
    if len(start) == 1 or not len(scaled):
        return start, len(scaled) > 0
    rounding = EPS * float((values[:, -1] / values[:, 0]).max())
    coldest, tolerance = max(_COLDEST, 1e3 * rounding), max(_CONVERGED, 10.0 * rounding)
    shift, temperature = np.zeros_like(start), _WARMEST
    while temperature > coldest:
        shift, _ = _minimised(scaled, shift, temperature, _ENOUGH * temperature)
        temperature /= _COOLING
    shift, gain = _minimised(scaled, shift, coldest, 0.0)
    return start + shift, gain <= tolerance


def _minimised(grams: Array, shift: Array, temperature: float, enough: float) -> tuple[Array, float]:
    """The minimum at one temperature, by Newton's method with a line search, and what a further step would gain.

    It ends where that is ``enough``, or lost in rounding: the last step is good all the same.
    """
    here = _Smoothed.at(grams, shift, temperature)
    for _ in range(50):
        gradient, hessian = here.gradient(), here.hessian()
        # Along the vector of ones nothing changes; tasks far from both ends of the spectrum hardly change anything.
        size = float(hessian.trace()) / len(shift)
        move = -np.linalg.solve(hessian + size * (1.0 + 1e-12 * np.eye(len(shift))), gradient)
        gain = -float(gradient @ move)
        if gain <= max(enough, EPS * (1.0 + here.value)):
            return shift + move, gain
        move *= min(1.0, _LONGEST / float(np.abs(move).max()))
        slope, fraction = float(gradient @ move), 1.0
        while fraction > 1e-8:
            there = _Smoothed.at(grams, shift + fraction * move, temperature)
            if there.value <= here.value + 1e-4 * fraction * slope:
                break
            fraction /= 2.0
        else:
            break
        shift, here = shift + fraction * move, there
    return shift, gain


@dataclass(frozen=True)
class _Smoothed:
    """The smoothed mean of ``log κ`` at one point.

    Attributes:
        value: Its value.
        logs: Logarithms of the eigenvalues, ``[S, T]``.
        vectors: Eigenvectors in columns, ``[S, T, T]``.
        upper: Shares of the eigenvalues in the smoothed maximum, ``[S, T]``.
        lower: Those in the smoothed minimum.
        temperature: ``τ``.
    """

    value: float
    logs: Array
    vectors: Array
    upper: Array
    lower: Array
    temperature: float

    @classmethod
    def at(cls, grams: Array, log_weights: Array, temperature: float) -> _Smoothed:
        weights = np.exp(log_weights)
        values, vectors = np.linalg.eigh(weights[:, None] * grams * weights)
        logs = np.log(values.clip(np.finfo(float).tiny))
        above = np.exp((logs - logs[:, -1:]) / temperature)
        below = np.exp((logs[:, :1] - logs) / temperature)
        above_sum, below_sum = above.sum(1, keepdims=True), below.sum(1, keepdims=True)
        spread = logs[:, -1] - logs[:, 0] + temperature * np.log(above_sum * below_sum)[:, 0]
        return cls(float(spread.mean()) / 2.0, logs, vectors, above / above_sum, below / below_sum, temperature)

    def gradient(self) -> Array:
        """``[T]``, from ``∂ log λ_k / ∂ log w_i = 2 v_ik²``."""
        result: Array = np.einsum("sik,sk->i", self.vectors**2, self.upper - self.lower) / len(self.logs)
        return result

    def hessian(self) -> Array:
        """``[T, T]``."""
        samples = zip(self.logs, self.vectors, self.upper, self.lower, strict=True)
        result: Array = np.sum([self._hessian_of(*sample) for sample in samples], 0) / len(self.logs)
        return result

    def _hessian_of(self, logs: Array, vectors: Array, upper: Array, lower: Array) -> Array:
        """The Hessian of one sample: how the shares change, and how the eigenvectors turn.

        With ``r = upper - lower``, ``h = log λ`` and ``y_kl = Σ_i x_i v_ik v_il`` the second part is
        ``xᵀ H x = Σ_{k≠l} (r_k - r_l) coth((h_k - h_l) / 2) y_kl²``, of which only eigenvalues with a share matter.
        """
        squares = vectors**2
        shares = np.diag(upper + lower) - np.outer(upper, upper) - np.outer(lower, lower)
        changing = 2.0 / self.temperature * squares @ shares @ squares.T
        active = upper + lower > _NEGLIGIBLE
        ends = np.flatnonzero(active)
        gaps = logs[ends, None] - logs
        equal = np.abs(gaps) < 1e-2 * self.temperature  # there the limit, whose relative error is as small
        ratios = (upper - lower)[ends, None] - (upper - lower)
        limits = (2.0 / self.temperature) * (upper + lower)[ends, None]
        turns = np.where(equal, limits, ratios / np.tanh(np.where(equal, 1.0, gaps) / 2.0))
        turns[:, ~active] *= 2.0  # these pairs come once, those of two active ones twice
        turns[np.arange(len(ends)), ends] = 0.0
        pairs = (vectors[:, ends, None] * vectors[:, None, :]).reshape(len(logs), -1)
        result: Array = changing + (pairs * turns.reshape(-1)) @ pairs.T
        return result

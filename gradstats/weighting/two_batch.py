"""Weightings on the products of gradients from two batches, ``J_1 J_2ᵀ``: SDMGrad and MoDo.

Both take stochastic gradient steps of the weights, which need a matrix whose expectation is the Gramian of the exact
gradients. That of one minibatch is not: its diagonal holds the noise. Two independent batches give it, as the upper
right block of ``pairwise`` of both batches' gradients, for ``from_gram``; and so does ``unbiased=True`` of the
Scalarizer, from the samples of one batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch

from gradstats.weighting.base import Facts
from gradstats.weighting.gram_based import GramianWeighting

if TYPE_CHECKING:
    from gradstats.weighting.solvers import Array


class _TwoBatch(GramianWeighting):
    """A point on the simplex that moves by projected steps. What is absent or not finite counts as zero."""

    STATE = ("weights", "point")

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks)
        self.point = torch.full((num_tasks,), 1.0 / num_tasks, dtype=torch.float64, device="cpu")

    def _weigh(self, gram: Array) -> Array:
        point, weights = self._moved(np.where(np.isfinite(gram), gram, 0.0), self.point.numpy())
        self.point = torch.from_numpy(point)
        return weights

    @abstractmethod
    def _moved(self, products: Array, point: Array) -> tuple[Array, Array]:
        """The next point and the weights, ``[T]`` each."""


class MoDo(_TwoBatch):
    """MoDo (Chen, Fernando, Ying & Chen, arXiv 2305.20057): one projected step of the weights for each of the model.

    ``w ← Π(w - gamma (J_1 J_2ᵀ w + rho w))`` with the projection onto the simplex, from ``1/T``; ``sum(w) = 1``. The
    step is not scaled: gradients twice as large want a quarter of ``gamma``.

    Args:
        num_tasks: Number of tasks ``T``.
        gamma: Length of the steps, positive.
        rho: Pull to equal weights, not negative.

    Attributes:
        point: The weights, float64 ``[T]``, on the CPU.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="MoDo",
        paper="arXiv 2305.20057",
        uses="J₁J₂ᵀ, state",
        cost="O(T²)",
        sign="≥ 0",
        tested="TorchJD",
    )

    def __init__(self, num_tasks: int, *, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__(num_tasks)
        if not 0.0 < gamma < math.inf:
            raise ValueError(f"gamma: expected a positive, finite number, got {gamma!r}")
        if not 0.0 <= rho < math.inf:
            raise ValueError(f"rho: expected a finite number that is not negative, got {rho!r}")
        self.gamma, self.rho = gamma, rho

    def _moved(self, products: Array, point: Array) -> tuple[Array, Array]:
        point = projected(point - self.gamma * (products @ point + self.rho * point))
        return point, point.copy()


class SDMGrad(_TwoBatch):
    """Stochastic direction-oriented multi-gradient descent (Xiao, Ban & Ji, arXiv 2305.18409).

    Some projected steps with momentum on ``½ ‖J^T (w + strength · 1/T)‖²``, from where the last call ended, on
    ``J_1 J_2ᵀ`` divided by the square of the mean norm, as in the authors' code. The weights are
    ``(w + strength / T) / (1 + strength)``, so ``sum = 1``.

    Args:
        num_tasks: Number of tasks ``T``.
        strength: ``λ``, the pull to the mean gradient, not negative; 0.3 in the authors' experiments.
        lr: Length of the steps, positive.
        momentum: In [0, 1).
        num_steps: How many steps at a call.

    Attributes:
        point: ``w``, float64 ``[T]``, on the CPU.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="SDMGrad",
        paper="arXiv 2305.18409",
        uses="J₁J₂ᵀ, state",
        cost="O(T²)",
        sign="≥ 0",
        tested="TorchJD",
    )

    def __init__(
        self, num_tasks: int, *, strength: float = 0.3, lr: float = 10.0, momentum: float = 0.5, num_steps: int = 20
    ) -> None:
        super().__init__(num_tasks)
        if not 0.0 <= strength < math.inf:
            raise ValueError(f"strength: expected a finite number that is not negative, got {strength!r}")
        if not 0.0 < lr < math.inf:
            raise ValueError(f"lr: expected a positive, finite number, got {lr!r}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum!r}")
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps: expected a positive integer, got {num_steps!r}")
        self.strength, self.lr, self.momentum, self.num_steps = strength, lr, momentum, num_steps

    def _moved(self, products: Array, point: Array) -> tuple[Array, Array]:
        mean_norm = float(np.sqrt(products.diagonal().clip(0.0)).mean())
        scaled = products / mean_norm / mean_norm if mean_norm > 0.0 else np.zeros_like(products)
        pull = self.strength / len(point)
        velocity = np.zeros_like(point)
        for _ in range(self.num_steps):
            velocity = self.momentum * velocity + scaled @ (point + pull)
            point = projected(point - self.lr * velocity)
        return point, (point + pull) / (1.0 + self.strength)


def projected(point: Array) -> Array:
    """The nearest point of the simplex (Held, Wolfe & Crowder, 1974).

    Args:
        point: ``[T]``.

    Returns:
        ``[T]``, not negative, of sum 1.
    """
    point = point - point.max()  # which moves all to the same point; no digit of large numbers is lost below
    descending = -np.sort(-point)
    levels = (descending.cumsum() - 1.0) / np.arange(1, len(point) + 1)
    level = levels[np.flatnonzero(descending > levels)[-1]]
    result: Array = np.maximum(point - level, 0.0)
    return result

"""Weightings that change each gradient by the others, one after another: PCGrad and GradVac.

Both take the other tasks in a random order for each gradient, and change all gradients at once, each by its own next
task: ``T`` steps on matrices instead of ``T²`` on vectors.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from gradstats.weighting.base import Facts
from gradstats.weighting.gram_based import DirectionWeighting, Gradients

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gradstats.weighting.solvers import Array

_LEAST_SINE = 1e-3  # of the angle that GradVac aims at


class _Surgery(DirectionWeighting):
    """Every gradient plus multiples of the others, summed. A zero gradient has weight 1.

    The orders depend on ``seed`` and the number of the decision alone, so that ranks agree and a resumed run continues
    (our choice); give each repetition of an experiment its own seed.
    """

    STATE: ClassVar[tuple[str, ...]] = ("step", "weights")

    def __init__(self, num_tasks: int, *, seed: int = 0) -> None:
        super().__init__(num_tasks)
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed: expected a non-negative integer, got {seed!r}")
        self.seed = seed
        self.step = 0

    def _idle(self, num_known: int) -> float:
        return 1.0

    def _solve(self, gradients: Gradients) -> Array:
        units = np.eye(len(gradients.norms))  # rows: the changed gradients, of unit length at first, in unit gradients
        rows = np.arange(len(units))
        for others in self._orders(len(units)).T:
            towards = gradients.cosine[others]
            slopes = (units * towards).sum(1)
            units[rows, others] += self._change(gradients, units, others, slopes)
        lengths = gradients.lengths
        weights: Array = (lengths @ units) / lengths
        return weights

    def _orders(self, count: int) -> NDArray[np.intp]:
        """For each task the others in random order, ``[M, M - 1]``."""
        self.step += 1
        if count == 2:  # there is but one
            return np.array([[1], [0]])
        keys = np.random.default_rng((self.seed, self.step)).random((count, count))
        np.fill_diagonal(keys, 2.0)  # itself comes last
        return keys.argsort(1)[:, :-1]

    @abstractmethod
    def _change(self, gradients: Gradients, units: Array, others: NDArray[np.intp], slopes: Array) -> Array:
        """How much of the unit gradient ``others[i]`` is added to the changed gradient ``i``, ``[M]``.

        Args:
            gradients: Those given.
            units: Coefficients of the changed gradients so far, ``[M, M]``.
            others: Which task is next for each, ``[M]``.
            slopes: Products of each changed gradient with the unit gradient that is next, ``[M]``.
        """


class PCGrad(_Surgery):
    """Projecting conflicting gradients (Yu et al., arXiv 2001.06782).

    From each gradient, taking the others in random order, what is against another is taken out, and all are summed: the
    scale is that of the sum. Without conflict all weights are 1, as is that of a zero gradient.

    Args:
        num_tasks: Number of tasks ``T``.
        seed: Of the random orders, a non-negative integer.

    Raises:
        ValueError: If ``seed`` is no such number.
    """

    FACTS = Facts(
        title="PCGrad",
        paper="arXiv 2001.06782",
        uses="G, random",
        cost="O(T³)",
        sign="> 0",
        tested="its definition on gradients; TorchJD",
    )

    def _change(self, gradients: Gradients, units: Array, others: NDArray[np.intp], slopes: Array) -> Array:
        return -np.minimum(slopes, 0.0)


class GradVac(_Surgery):
    """Gradient vaccine (Wang et al., arXiv 2010.05874).

    As :class:`PCGrad`, but the cosine of each changed gradient to each other task's is raised to a target ``φ_ij``,
    where it is below, and the targets follow the cosines met: ``φ ← (1 - beta) φ + beta cos``, 0 at first. The scale is
    that of the sum; a zero gradient has weight 1, and its cosines are 0. Targets of tasks that are absent stay. A
    target near 1 would ask for unbounded changes: the sine of its angle counts as 1e-3 at least (our choice).

    Args:
        num_tasks: Number of tasks ``T``.
        beta: How fast targets follow, in [0, 1].
        seed: Of the random orders, a non-negative integer.

    Attributes:
        targets: ``φ``, float64 ``[T, T]``, on the CPU.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="GradVac",
        paper="arXiv 2010.05874",
        uses="G, random, state",
        cost="O(T³)",
        sign="any",
        tested="its definition on gradients; TorchJD",
    )

    STATE = ("step", "weights", "targets")

    def __init__(self, num_tasks: int, *, beta: float = 0.5, seed: int = 0) -> None:
        super().__init__(num_tasks, seed=seed)
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}")
        self.beta = beta
        self.targets = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device="cpu")

    def _change(self, gradients: Gradients, units: Array, others: NDArray[np.intp], slopes: Array) -> Array:
        lengths = np.sqrt((units @ gradients.cosine * units).sum(1).clip(0.0))
        cosines = np.divide(slopes, lengths, out=np.zeros_like(slopes), where=lengths > 0.0).clip(-1.0, 1.0)
        pairs = (gradients.tasks, gradients.tasks[others])
        all_targets = self.targets.numpy()
        targets = all_targets[pairs]
        all_targets[pairs] = (1.0 - self.beta) * targets + self.beta * cosines
        sines = np.sqrt(1.0 - targets**2).clip(_LEAST_SINE)
        missing = targets * np.sqrt(1.0 - cosines**2) / sines - cosines
        change: Array = lengths * np.where(cosines < targets, missing, 0.0)
        return change

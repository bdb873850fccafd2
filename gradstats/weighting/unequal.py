"""Weightings that do not take all gradients for equally good: PCD, with one task before the others, and Krum."""

from __future__ import annotations

import math

import numpy as np
import torch

from gradstats.weighting import solvers
from gradstats.weighting.base import Facts
from gradstats.weighting.gram_based import DirectionWeighting, Gradients, GramianWeighting, known_tasks
from gradstats.weighting.solvers import Array

_VIOLATED = 1e-6  # by how much a constraint on unit gradients is, where no direction meets all of them


class PCD(DirectionWeighting):
    """Priority-constrained descent (Varam & AlHajri, arXiv 2606.29521): the primary task's gradient, if others agree.

    The direction is the nearest to ``g̃_p``, the primary task's gradient, with ``g̃_j·d ≥ tau ‖g̃_j‖²`` for all others;
    its length is that of ``g_p``. The gradients ``g̃`` are divided by the root of a moving average of their squared
    norms, of which we leave out the small constant: the scale of no task matters. All weights are 0 where ``g_p`` is
    zero or its task is absent, and where the direction is zero; where no direction meets all constraints, only the
    primary task counts. A zero gradient has weight 0.

    Args:
        num_tasks: Number of tasks ``T``.
        primary: Index of the primary task.
        tau: Progress asked for the other tasks, in [0, 1]: 1 is that of a step along their own gradient.
        beta: Of the moving average, in [0, 1).

    Attributes:
        squares: Moving average of the squared norms, from zero, float64 ``[T]``, on the CPU.
        counts: How many norms it is made of, float64 ``[T]``, on the CPU.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="PCD",
        paper="arXiv 2606.29521",
        uses="G, state",
        cost="O(T³), active set",
        sign="≥ 0",
        tested="KKT; TorchJD",
    )

    STATE = ("weights", "squares", "counts")

    def __init__(self, num_tasks: int, *, primary: int = 0, tau: float = 0.02, beta: float = 0.999) -> None:
        super().__init__(num_tasks)
        if not isinstance(primary, int) or not 0 <= primary < num_tasks:
            raise ValueError(f"primary: expected a task from 0 to {num_tasks - 1}, got {primary!r}")
        if not 0.0 <= tau <= 1.0:
            raise ValueError(f"tau: expected a number in [0, 1], got {tau!r}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta: expected a number in [0, 1), got {beta!r}")
        self.primary, self.tau, self.beta = primary, tau, beta
        self.squares, self.counts = (torch.zeros(num_tasks, dtype=torch.float64, device="cpu") for _ in range(2))

    def _solve(self, gradients: Gradients) -> Array:
        lengths = self._normalized(gradients)
        places = np.flatnonzero(gradients.tasks == self.primary)
        if not len(places):
            return np.zeros_like(lengths)
        primary, cosine = int(places[0]), gradients.cosine
        units = np.zeros_like(lengths)  # coefficients of the unit gradients
        units[primary] = lengths[primary]
        wanted = self.tau * lengths - lengths[primary] * cosine[primary]
        wanted[primary] = 0.0
        if wanted.max() > 0.0:
            units = self._constrained(cosine, wanted, units)
        if solvers.vanishes(cosine, units):
            return np.zeros_like(lengths)
        length = math.sqrt(units @ cosine @ units)
        weights: Array = units * (gradients.norms[primary] / gradients.norms) / length
        return weights

    def _constrained(self, cosine: Array, wanted: Array, units: Array) -> Array:
        """The coefficients with the least addition that meets the constraints; unchanged where nothing meets them."""
        others = np.flatnonzero(units == 0.0)
        matrix = cosine[others[:, None], others]
        added = solvers.nonnegative_qp(solvers.positive_definite(matrix), wanted[others][None])[0]
        if (wanted[others] - matrix @ added).max() <= _VIOLATED:
            units[others] = added
        return units

    def _normalized(self, gradients: Gradients) -> Array:
        """Norms relative to their moving average, after taking them into that, ``[M]``."""
        squares, counts, tasks = self.squares.numpy().copy(), self.counts.numpy().copy(), gradients.tasks
        counts[tasks] += 1.0
        squares[tasks] += (1.0 - self.beta) * (gradients.norms**2 - squares[tasks])
        self.squares, self.counts = torch.from_numpy(squares), torch.from_numpy(counts)
        means: Array = squares[tasks] / (1.0 - self.beta ** counts[tasks])
        return gradients.norms / np.sqrt(means)


class Krum(GramianWeighting):
    """Multi-Krum (Blanchard et al., NeurIPS 2017): the gradients nearest to others, for tasks some of which may be bad.

    A gradient's score is the sum of its distances to the ``T - num_byzantine - 2`` others nearest to it (at least one:
    our choice for few tasks); the ``num_selected`` gradients of lowest score, the first ones among equals, have weight
    ``1 / num_selected``, all others 0. The paper sums squared distances; we sum distances, as TorchJD does. A zero
    gradient is as good as any.

    Args:
        num_tasks: Number of tasks ``T``.
        num_byzantine: How many tasks may be bad, from 0 to ``T - 1``.
        num_selected: How many gradients to select, from 1 to ``T``; all that count if fewer do.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="Krum",
        paper="NeurIPS 2017, Blanchard et al.",
        uses="G",
        cost="O(T² log T)",
        sign="≥ 0",
        tested="its definition; TorchJD",
    )

    def __init__(self, num_tasks: int, *, num_byzantine: int = 0, num_selected: int = 1) -> None:
        super().__init__(num_tasks)
        if not isinstance(num_byzantine, int) or not 0 <= num_byzantine < num_tasks:
            raise ValueError(f"num_byzantine: expected an integer from 0 to {num_tasks - 1}, got {num_byzantine!r}")
        if not isinstance(num_selected, int) or not 1 <= num_selected <= num_tasks:
            raise ValueError(f"num_selected: expected an integer from 1 to {num_tasks}, got {num_selected!r}")
        self.num_byzantine, self.num_selected = num_byzantine, num_selected

    def _weigh(self, gram: Array) -> Array:
        tasks = np.flatnonzero(known_tasks(gram))
        weights = np.zeros(len(gram))
        if not len(tasks):
            return weights
        known = gram[np.ix_(tasks, tasks)]
        products = known / (np.abs(known).max() or 1.0)
        squares = products.diagonal()
        distances = np.sqrt((squares[:, None] + squares - 2.0 * products).clip(0.0))
        nearest = max(1, len(tasks) - self.num_byzantine - 2)
        scores = np.sort(distances, 1)[:, 1 : 1 + nearest].sum(1)  # without the distance to itself
        selected = tasks[scores.argsort(kind="stable")[: self.num_selected]]
        weights[selected] = 1.0 / len(selected)
        return weights

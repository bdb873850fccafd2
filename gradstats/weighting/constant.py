"""Weights that never change: unitary scalarization and weights found elsewhere."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradstats.weighting.base import Facts, Weighting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstats.stats import GradStats


class Fixed(Weighting):
    """Fixed weights, used as they are given.

    Args:
        num_tasks: Number of tasks ``T``.
        weights: ``T`` finite, non-negative numbers.

    Raises:
        ValueError: If ``weights`` does not hold ``T`` finite, non-negative numbers.
    """

    FACTS = Facts(title="Fixed weights", paper="–", uses="–", cost="O(1)", sign="≥ 0", tested="its definition")

    def __init__(self, num_tasks: int, weights: Sequence[float] | Tensor) -> None:
        super().__init__(num_tasks)
        try:
            values = [float(w) for w in weights]
        except (TypeError, ValueError) as error:
            raise ValueError(f"weights: expected {num_tasks} numbers, got {weights!r}") from error
        if len(values) != num_tasks or not all(math.isfinite(w) and w >= 0 for w in values):
            raise ValueError(f"weights: expected {num_tasks} finite, non-negative numbers, got {values}")
        self.weights = torch.tensor(values, dtype=torch.float64, device="cpu")

    def skip(self) -> bool:
        """Every step."""
        return True

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Return the fixed weights."""
        if self.weights.device != losses.device:
            self.weights = self.weights.to(losses.device)
        return self.weights


class Uniform(Fixed):
    """All weights 1: unitary scalarization (Kurin et al., arXiv 2201.04122).

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="Unitary scalarization",
        paper="arXiv 2201.04122",
        uses="–",
        cost="O(1)",
        sign="> 0",
        tested="its definition",
    )

    def __init__(self, num_tasks: int) -> None:
        super().__init__(num_tasks, [1.0] * num_tasks)

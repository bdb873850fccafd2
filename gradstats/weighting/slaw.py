"""SLAW: weights from the standard deviation of the losses over time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradstats.weighting.base import Facts, Weighting

if TYPE_CHECKING:
    from gradstats.stats import GradStats

_SMALLEST_STD = 1e-5  # floor of the authors' code


class SLAW(Weighting):
    """Scaled loss approximate weighting (Crawshaw & Košecká, arXiv 2109.08218).

    ``w_i = (T / s_i) / Σ_j (1 / s_j)`` with ``s_i`` the running standard deviation of loss ``i``, which to first order
    is proportional to its gradient norm. Both moments are arithmetic means over the first ``round(1 / (1 - beta))``
    steps and exponential means after that, as in the authors' code. They are updated in Welford's form, where the
    published difference of second moment and squared mean cancels. Weights stay 1 until every task has two losses.
    A step without a task's loss, or with one that is not finite, leaves that task's moments as they were.

    Args:
        num_tasks: Number of tasks ``T``.
        beta: Decay of the exponential means, in (0, 1).

    Raises:
        ValueError: If ``beta`` is not in (0, 1).
    """

    FACTS = Facts(
        title="SLAW",
        paper="arXiv 2109.08218",
        uses="L, state",
        cost="O(T)",
        sign="> 0",
        tested="the authors' recurrence",
    )

    STATE = ("count", "mean", "variance", "weights")

    def __init__(self, num_tasks: int, *, beta: float = 0.99) -> None:
        super().__init__(num_tasks)
        if not 0.0 < beta < 1.0:
            raise ValueError(f"beta: expected a number in (0, 1), got {beta!r}")
        self.beta = beta
        self.count = torch.zeros(num_tasks, dtype=torch.float64, device="cpu")
        self.mean = torch.zeros(num_tasks, dtype=torch.float64, device="cpu")
        self.variance = torch.zeros(num_tasks, dtype=torch.float64, device="cpu")

    @property
    def needs(self) -> frozenset[str]:
        """Losses, at every step."""
        return frozenset({"losses"})

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Update the moments with the current losses and return the weights that follow; never synchronises."""
        self._move_state(losses.device)
        known = losses.isfinite()
        self.count = self.count + known
        warm_up = round(1.0 / (1.0 - self.beta))
        rate = torch.where(self.count <= warm_up, 1.0 / self.count.clamp_min(1.0), 1.0 - self.beta)
        rate = torch.where(known, rate, 0.0)
        deviation = torch.where(known, losses, 0.0) - self.mean
        self.mean = self.mean + rate * deviation
        self.variance = (1.0 - rate) * (self.variance + rate * deviation.square())
        std = self.variance.sqrt().clamp_min(_SMALLEST_STD)
        ready = (self.count >= 2).all() & std.isfinite().all()
        self.weights = torch.where(ready, (self.num_tasks / std) / (1.0 / std).sum(), self.weights)
        return self.weights

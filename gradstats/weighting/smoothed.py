"""Another weighting's weights, averaged over steps: CR-MOGM."""

from __future__ import annotations

import torch
from torch import Tensor

from gradstats.stats import GradStats
from gradstats.weighting.base import Facts, Weighting, checked_weighting


class CRMOGM(Weighting):
    """CR-MOGM (Zhou et al., NeurIPS 2022, "On the Convergence of Stochastic Multi-Objective Gradient Manipulation").

    ``w ← alpha w + (1 - alpha) ŵ`` with the weights ``ŵ`` of another weighting, from the first ones: what one noisy
    Gramian does to the weights is averaged away. The paper lets ``alpha`` rise to 1 as the learning rate falls; for
    that, set the attribute between steps.

    Args:
        num_tasks: Number of tasks ``T``.
        weighting: The other weighting's name, or itself with its options.
        alpha: Share of the old weights, in [0, 1]; 0.9 is our default.

    Attributes:
        weighting: The other weighting.
        alpha: As given.

    Raises:
        ValueError: If an option is out of its range.
        TypeError: If ``weighting`` is neither a name nor a weighting.
    """

    FACTS = Facts(
        title="CR-MOGM",
        paper="NeurIPS 2022, Zhou et al.",
        uses="as another, state",
        cost="as the other",
        sign="any",
        tested="TorchJD",
    )

    STATE = ("started", "weights")

    def __init__(self, num_tasks: int, *, weighting: str | Weighting = "mgda", alpha: float = 0.9) -> None:
        super().__init__(num_tasks)
        self.weighting = checked_weighting("weighting", weighting, num_tasks)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a number in [0, 1], got {alpha!r}")
        self.alpha = alpha
        self.started = 0

    @property
    def needs(self) -> frozenset[str]:
        """What the other weighting needs."""
        return self.weighting.needs

    def wants_stats(self) -> bool:
        """Whether the other weighting does."""
        return self.weighting.wants_stats()

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Average in the other's weights of this step; those in force stay where a Gramian it wanted is missing."""
        self._move_state(losses.device)
        missing = stats is None and self.weighting.wants_stats()
        weights = self.weighting(losses, stats)
        if not missing:
            self.weights = torch.lerp(weights, self.weights, self.alpha) if self.started else weights
            self.started = 1
        return self.weights

    def after_step(self, losses: Tensor) -> None:
        """Tell the other what the step has achieved."""
        self.weighting.after_step(losses)

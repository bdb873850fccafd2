"""Weightings that learn parameters of their own, one a task, beside the network: UW, IMTL, GradNorm, FAMO.

What they share, and is our choice: the parameters are learned by an Adam of their own, not by the network's optimizer,
so that any training loop will do. A task takes no step where its gradient is undefined, for want of a loss or because
a method cannot use a loss that is not positive; its parameter and moments stay as they were.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from gradstats.weighting.base import Facts, Weighting, checked_numbers, checked_positive
from gradstats.weighting.gram_based import IMTLG

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstats.stats import GradStats

_BETAS, _EPS = (0.9, 0.999), 1e-8  # as torch.optim.Adam has them


class _Learned(Weighting):
    """One learned number a task, zero at first, and the Adam that learns it (Kingma & Ba, arXiv 1412.6980).

    Not ``torch.optim.Adam``: that would move every number at every step, and its state comes into being on the way,
    which sharded checkpoints cannot load.
    """

    STATE: ClassVar[tuple[str, ...]] = ("learned", "first_moment", "second_moment", "count", "weights")

    def __init__(self, num_tasks: int, *, lr: float) -> None:
        super().__init__(num_tasks)
        self.lr = checked_positive("lr", lr)
        self.learned = torch.zeros_like(self.weights)
        self.first_moment, self.second_moment = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self.count = torch.zeros_like(self.weights)  # steps that each task has taken

    @property
    def needs(self) -> frozenset[str]:
        """Losses, at every step."""
        return frozenset({"losses"})

    def _learn(self, gradient: Tensor) -> None:
        """One step down ``gradient``, float64 ``[T]``, of the tasks where it is finite."""
        square = gradient.square()
        known = square < torch.inf  # NaN is not
        count = self.count + 1.0
        first = torch.lerp(gradient, self.first_moment, _BETAS[0])
        second = torch.lerp(square, self.second_moment, _BETAS[1])
        so_far = [-torch.expm1(count * math.log(beta)) for beta in _BETAS]  # 1 - beta^count, as moments start from zero
        step = (first / so_far[0]) / ((second / so_far[1]).sqrt() + _EPS)
        learned = torch.sub(self.learned, step, alpha=self.lr)
        after = {"learned": learned, "first_moment": first, "second_moment": second, "count": count}
        for name, value in after.items():
            setattr(self, name, torch.where(known, value, getattr(self, name)))


class UW(_Learned):
    """Uncertainty weighting (Kendall, Gal & Cipolla, arXiv 1705.07115).

    Minimises ``Σ_i ½ exp(-s_i) L_i + ½ s_i`` over the network and the log variances ``s``, 0 at first, together:
    ``w_i = ½ exp(-s_i)``, which strives for ``1 / (2 L_i)``. The scale is the method's own, ``w_i = ½`` at first. The
    paper has another constant for classification, and learns ``s`` with the network's optimizer.

    Args:
        num_tasks: Number of tasks ``T``.
        lr: Learning rate of ``s``. The default is Adam's; take the network's for the paper's method.

    Raises:
        ValueError: If ``lr`` is not positive.
    """

    FACTS = Facts(
        title="UW",
        paper="arXiv 1705.07115",
        uses="L, state",
        cost="O(T)",
        sign="> 0",
        tested="autograd and torch.optim.Adam; TorchJD",
    )

    def __init__(self, num_tasks: int, *, lr: float = 1e-3) -> None:
        super().__init__(num_tasks, lr=lr)
        self.weights = 0.5 * torch.ones_like(self.weights)

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Return the weights in force and take a step that prepares the next."""
        self._move_state(losses.device)
        weights = self.weights
        self._learn(0.5 - weights * _positive(losses))
        self.weights = 0.5 * torch.exp(-self.learned)
        return weights


class IMTLL(_Learned):
    """The loss balance of impartial multi-task learning, IMTL-L (Liu et al., ICLR 2021, openreview IMPnRXEWpvr).

    Minimises ``Σ_i exp(s_i) L_i - s_i`` over the network and the log scales ``s``, 0 at first, together:
    ``w_i = exp(s_i)``, which strives for ``1 / L_i``. The scale is the method's own, ``w_i = 1`` at first. With Adam
    the weights are twice those of :class:`UW`. The paper learns ``s`` with the network's optimizer.

    Args:
        num_tasks: Number of tasks ``T``.
        lr: Learning rate of ``s``. The default is Adam's; take the network's for the paper's method.

    Raises:
        ValueError: If ``lr`` is not positive.
    """

    FACTS = Facts(
        title="IMTL-L",
        paper="ICLR 2021, openreview IMPnRXEWpvr",
        uses="L, state",
        cost="O(T)",
        sign="> 0",
        tested="autograd and torch.optim.Adam; TorchJD",
    )

    def __init__(self, num_tasks: int, *, lr: float = 1e-3) -> None:
        super().__init__(num_tasks, lr=lr)

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Return the weights in force and take a step that prepares the next."""
        self._move_state(losses.device)
        weights = self.weights
        self._learn(weights * _positive(losses) - 1.0)
        self.weights = torch.exp(self.learned)
        return weights


class IMTL(IMTLL):
    """Impartial multi-task learning, both balances together (Liu et al., ICLR 2021, openreview IMPnRXEWpvr).

    The losses are scaled as in :class:`IMTLL`, and the scaled gradients ``exp(s_i) g_i`` are combined with the
    coefficients ``α`` of :class:`IMTLG`, which sum to 1: ``w_i = α_i exp(s_i)``, so that ``Σ_i w_i exp(-s_i) = 1``.
    The line that the shared parameters move on is that of IMTL-G whatever ``s`` is; ``s`` decides how far. In the paper
    the parameters of a single task see its scaled loss without ``α``; here the weights are those of all parameters, as
    everywhere in this library. Weights may be negative. Without a Gramian ``α`` stays what it was, ones at first.

    Args:
        num_tasks: Number of tasks ``T``.
        lr: Learning rate of ``s``. The default is Adam's; take the network's for the paper's method.

    Raises:
        ValueError: If ``lr`` is not positive.
    """

    FACTS = Facts(
        title="IMTL",
        paper="ICLR 2021, openreview IMPnRXEWpvr",
        uses="G, L, state",
        cost="O(T³)",
        sign="any",
        tested="autograd and torch.optim.Adam; equal projections",
    )

    def __init__(self, num_tasks: int, *, lr: float = 1e-3) -> None:
        super().__init__(num_tasks, lr=lr)
        self.gradient_balance = IMTLG(num_tasks)  # its weights are α

    @property
    def needs(self) -> frozenset[str]:
        """Losses and Gramian, at every step."""
        return frozenset({"losses", "gramian"})

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """The weights of the current gradients; takes a step that prepares the next scales."""
        self._move_state(losses.device)
        scales = torch.exp(self.learned)
        self._learn(scales * _positive(losses) - 1.0)
        if stats is not None:
            stats = replace(stats, gram=scales[:, None] * stats.gram * scales[None, :])
        self.weights = scales * self.gradient_balance(losses, stats)
        return self.weights


class GradNorm(_Learned):
    """Gradient normalization (Chen, Badrinarayanan, Lee & Rabinovich, arXiv 1711.02257): tasks that learn evenly.

    Learns weights that minimise ``Σ_i |w_i n_i - n̄ r_i^alpha|``, where ``n̄``, the mean of all ``w_j n_j``, counts as a
    constant, and ``r_i`` is ``L_i`` relative to task ``i``'s first loss, divided by the mean of that over tasks. The
    paper measures the norms at the last shared layer alone: give that as ``inputs`` of the Scalarizer.

    Our choice: ``w = T softmax(learned)`` keeps weights positive and ``sum(w) = T``, where the paper learns ``w`` and
    rescales it; the sum is divided by ``n̄``, so that the scale of the gradients does not matter at all. A task whose
    loss is negative or gradient zero does not count at that step.

    Args:
        num_tasks: Number of tasks ``T``.
        alpha: How strongly tasks are pulled to a common rate, not negative; 1.5 in the paper's experiments on NYUv2.
        lr: Learning rate of the logits.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="GradNorm",
        paper="arXiv 1711.02257",
        uses="diag G, L, state",
        cost="O(T)",
        sign="> 0",
        tested="autograd and torch.optim.Adam",
    )

    STATE = (*_Learned.STATE, "first_losses")

    def __init__(self, num_tasks: int, *, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__(num_tasks, lr=lr)
        if not 0.0 <= alpha < math.inf:
            raise ValueError(f"alpha: expected a finite number that is not negative, got {alpha!r}")
        self.alpha = alpha
        self.first_losses = torch.full_like(self.weights, torch.nan)

    @property
    def needs(self) -> frozenset[str]:
        """Losses and Gramian, at every step."""
        return frozenset({"losses", "gramian"})

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Return the weights in force and, where there is a Gramian, take a step that prepares the next."""
        self._move_state(losses.device)
        weights = self.weights
        self.first_losses = torch.where(self.first_losses.isnan(), _positive(losses), self.first_losses)
        if stats is not None:
            self._learn(self._gradient(losses, stats.norms))
            self.weights = self.num_tasks * torch.softmax(self.learned, 0)
        return weights

    def _gradient(self, losses: Tensor, norms: Tensor) -> Tensor:
        rates = losses / self.first_losses
        known = (rates >= 0) & rates.isfinite() & (norms > 0) & norms.isfinite()
        norms = norms / torch.where(known, self.weights * norms, torch.nan).nanmean()
        rates = rates / torch.where(known, rates, torch.nan).nanmean()
        slopes = norms * torch.sign(self.weights * norms - rates**self.alpha)  # with respect to the weights
        mean_slope = (self.weights * torch.where(known, slopes, 0.0)).sum() / self.num_tasks
        return torch.where(known, self.weights * (slopes - mean_slope), torch.nan)


class FAMO(_Learned):
    """Fast adaptive multitask optimization (Liu, Feng, Stone & Liu, arXiv 2306.03792): losses that fall at one rate.

    With ``z = softmax(learned)`` and ``D_i = L_i - min_losses_i`` the network descends on ``c Σ_i z_i log D_i``,
    ``c = 1 / Σ_j (z_j / D_j)`` taken for a constant: ``w_i = c z_i / D_i``, so ``sum(w) = 1``, the method's own scale.
    After the step the logits descend on ``Σ_i z_i δ_i``, where ``δ_i`` is how much ``log D_i`` fell on the same batch.

    :meth:`after_step` takes the losses that this needs; ``gradstats.train.Trainer`` computes them, in other loops call
    :meth:`gradstats.Scalarizer.after_step`. Where a loop does not, the losses of the next batch take their place, which
    costs no forward pass and is noisier (our choice). A task whose ``D_i`` is not positive or finite is left out; its
    weight and logit stay what they were. (The authors add 1e-8 to ``D_i``; we do not.)

    Args:
        num_tasks: Number of tasks ``T``.
        lr: Learning rate of the logits; 0.025 in the paper.
        weight_decay: Pull of the logits towards 0, ``γ`` in the paper; 1e-3 in its Algorithm 2.
        min_losses: ``T`` finite numbers that the losses cannot go below; None for zeros.

    Raises:
        ValueError: If an option is out of its range.
    """

    FACTS = Facts(
        title="FAMO",
        paper="arXiv 2306.03792",
        uses="L, state",
        cost="O(T)",
        sign="> 0",
        tested="autograd and torch.optim.Adam; TorchJD",
    )

    STATE = (*_Learned.STATE, "before", "pending")

    def __init__(
        self,
        num_tasks: int,
        *,
        lr: float = 0.025,
        weight_decay: float = 1e-3,
        min_losses: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_tasks, lr=lr)
        if not 0.0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a finite number that is not negative, got {weight_decay!r}")
        self.weight_decay = weight_decay
        self.min_losses = checked_numbers("min_losses", min_losses, num_tasks, default=0.0)
        self.weights = torch.full_like(self.weights, 1.0 / num_tasks)
        self.before = torch.zeros_like(self.weights)  # log D at the last step
        self.pending = 0  # whether its effect is still to be learned from

    @property
    def needs(self) -> frozenset[str]:
        """Losses at every step, and after it."""
        return frozenset({"losses", "after_step"})

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """The weights of the current losses; learns from them first, unless ``after_step`` was called."""
        self.after_step(losses)
        self.before, self.pending = self._log_gaps(losses), 1
        known = self.before.isfinite()
        logs = torch.where(known, torch.log_softmax(self.learned, 0) - self.before, -torch.inf)
        self.weights = torch.where(known, torch.softmax(logs, 0), self.weights)
        return self.weights

    def after_step(self, losses: Tensor) -> None:
        """Learn from the losses of the last step's batch after that step; only the first call counts."""
        self._move_state(losses.device)
        if not self.pending:
            return
        self.pending = 0
        falls = self.before - self._log_gaps(losses)
        shares = torch.softmax(torch.where(falls.isfinite(), self.learned, -torch.inf), 0)
        mean_fall = (shares * falls).nansum()  # those left out are NaN
        self._learn(shares * (falls - mean_fall) + self.weight_decay * self.learned)

    def _log_gaps(self, losses: Tensor) -> Tensor:
        """``log D``, finite where a task counts."""
        self.min_losses = self.min_losses.to(losses.device)
        return torch.log(losses - self.min_losses)


def _positive(losses: Tensor) -> Tensor:
    """The losses that are positive; NaN for the others, and so no step for their tasks."""
    return torch.where(losses > 0, losses, torch.nan)

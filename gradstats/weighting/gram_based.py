"""Weightings that are functions of the Gramian: what they share, closed forms, quadratic programs and bargains.

Every one is the few lines of its ``_solve``; the problems behind them are in ``solvers.py``. Weights are decided on the
CPU in float64: a Gramian on a GPU is copied once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstats.ops import dual_cone
from gradstats.weighting import solvers
from gradstats.weighting.base import Facts, Weighting

if TYPE_CHECKING:
    from gradstats.stats import GradStats
    from gradstats.weighting.solvers import Array

Normalize = Literal["none", "l2", "loss", "loss+"]
Scale = Literal["min", "median", "rmse"]


class GramianWeighting(Weighting):
    """A weighting that is a function of the Gramian: :meth:`from_gram`.

    A task that is absent, or whose gradient is not finite, does not count; its own weight is 0 from ``from_gram`` and
    the one it had from ``forward``.
    """

    STATE: ClassVar[tuple[str, ...]] = ("weights",)

    @property
    def needs(self) -> frozenset[str]:
        """The Gramian, at every step."""
        return frozenset({"gramian"})

    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Return the weights that follow from this step's Gramian; those in force where there is none."""
        self.weights = self.weights.to(losses.device)
        if stats is not None:
            known = stats.present & stats.finite
            gram = stats.gram.masked_fill(~(known[:, None] & known[None, :]), torch.nan)
            self.weights = torch.where(known, self._from_gram(gram, losses), self.weights)
        return self.weights

    def _from_gram(self, gram: Tensor, losses: Tensor) -> Tensor:
        """For those that want the losses, too."""
        return self.from_gram(gram)

    def from_gram(self, gram: Tensor) -> Tensor:
        """The weights of one Gramian, or of many. Where there is a state (see the class), each one advances it.

        Args:
            gram: ``[T, T]`` or ``[B, T, T]``, of any floating-point dtype, such as TorchJD computes it.

        Returns:
            Float64 tensor ``[T]`` or ``[B, T]``, finite, on the device of ``gram``.

        Raises:
            ValueError: If the shape is another.
        """
        size = self.num_tasks
        if gram.ndim not in (2, 3) or gram.shape[-2:] != (size, size):
            raise ValueError(f"gram: expected [{size}, {size}] or [B, {size}, {size}], got shape {tuple(gram.shape)}")
        grams = gram.detach().to("cpu", torch.float64).numpy()
        if gram.ndim == 2:
            weights = self._weigh(grams)
        else:
            weights = np.stack([self._weigh(one) for one in grams]) if len(grams) else np.zeros(gram.shape[:2])
        return torch.from_numpy(weights).to(gram.device)

    @abstractmethod
    def _weigh(self, gram: Array) -> Array:
        """The weights ``[T]`` of one Gramian ``[T, T]``; NaN or inf in the rows and columns of tasks not to count."""


@dataclass(frozen=True)
class Gradients:
    """The gradients that a weighting decides on: those that count and are not zero, ``M`` of ``T``.

    Attributes:
        norms: Their norms, ``[M]``.
        cosine: Their cosines, ``[M, M]``.
        tasks: Their indices among all tasks, ``[M]``.
        num_known: How many gradients count, those that are zero included.
    """

    norms: Array
    cosine: Array
    tasks: NDArray[np.intp]
    num_known: int

    @property
    def longest(self) -> float:
        """The largest norm."""
        return float(self.norms.max())

    @property
    def lengths(self) -> Array:
        """Norms relative to the largest, ``[M]``."""
        return self.norms / self.longest


class DirectionWeighting(GramianWeighting):
    """A weighting that is solved on norms and cosines, so that gradients of 1e±140 are weighted as those of 1.

    A zero gradient moves nothing whatever its weight: the others are weighted without it, and its own weight is said at
    each method. Negative squares, which estimates may hold (``unbiased=True``), count as zero gradients.
    """

    def _weigh(self, gram: Array) -> Array:
        squares = gram.diagonal()
        if math.isfinite(gram.sum()) and squares.min() > 0.0:
            return self._solve(_gradients(gram, np.arange(len(gram)), len(gram)))
        known = known_tasks(gram)
        moving = np.flatnonzero(known & (squares > 0.0))
        num_known = int(known.sum())
        weights: Array = np.where(known, self._idle(num_known), 0.0)
        if len(moving):
            weights[moving] = self._solve(_gradients(gram[np.ix_(moving, moving)], moving, num_known))
        return weights

    def _idle(self, num_known: int) -> float:
        """The weight of a zero gradient."""
        return 0.0

    @abstractmethod
    def _solve(self, gradients: Gradients) -> Array:
        """The weights ``[M]`` of the gradients."""


def known_tasks(gram: Array) -> NDArray[np.bool_]:
    """Which tasks count, ``[T]``: those with finite products among each other."""
    known = np.isfinite(gram.diagonal())
    return np.asarray(known & np.isfinite(gram[:, known]).all(1))


def _gradients(gram: Array, tasks: NDArray[np.intp], num_known: int) -> Gradients:
    norms = np.sqrt(gram.diagonal())
    return Gradients(norms, gram / norms[:, None] / norms, tasks, num_known)


# ---- closed forms ---------------------------------------------------------------------------------------------------


class ExactSLW(DirectionWeighting):
    """Equal norms of the weighted gradients, ``w_i ∝ 1 / n_i`` and ``sum(w) = T``: what SLAW estimates from losses.

    The name is ours, the method that of Crawshaw & Košecká (arXiv 2109.08218), with exact norms. A zero gradient has
    weight 1, and the others' weights sum to their number.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="ExactSLW",
        paper="arXiv 2109.08218",
        uses="diag G",
        cost="O(T)",
        sign="> 0",
        tested="closed form",
    )

    def _idle(self, num_known: int) -> float:
        return 1.0

    def _solve(self, gradients: Gradients) -> Array:
        inverse = float(gradients.norms.min()) / gradients.norms
        return inverse * (len(inverse) / float(inverse.sum()))


class IMTLG(DirectionWeighting):
    """Impartial multi-task learning, the gradient balance IMTL-G (Liu et al., ICLR 2021, openreview IMPnRXEWpvr).

    The aggregated gradient has equal projections on all gradients, ``(G w)_i ∝ n_i``, and ``sum(w) = 1``; weights may
    be negative. Our choice where gradients are dependent: the projections are equal in the least-squares sense, and the
    coefficients of the unit gradients those of least norm. (``G⁺ n``, which other libraries take, is the same where G
    has full rank, and forgets tasks whose gradients are 1e7 times smaller than others.) All weights are 0 where no
    direction has equal, positive projections, as with opposite gradients. A zero gradient has weight 0.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="IMTL-G",
        paper="ICLR 2021, openreview IMPnRXEWpvr",
        uses="G",
        cost="O(T³), eigenvalues",
        sign="any",
        tested="equal projections; TorchJD",
    )

    def _solve(self, gradients: Gradients) -> Array:
        weights = solvers.equal_slopes(gradients.cosine) * (float(gradients.norms.min()) / gradients.norms)
        total = float(weights.sum())
        cancelled = abs(total) <= len(weights) * solvers.EPS * float(np.abs(weights).sum())
        return np.zeros_like(weights) if cancelled else weights / total


class ConFIG(DirectionWeighting):
    """Conflict-free inverse gradients (Liu, Chu & Thuerey, arXiv 2408.11104).

    The direction ``d̂`` has equal cosines to all gradients (it is that of :class:`IMTLG`), and the length is the sum of
    the projections, ``Σ_i g_i·d̂``. Where gradients are dependent, cosines are equal in the least-squares sense, as in
    the authors' code. All weights are 0 where no direction has equal, positive cosines. A zero gradient has weight 0.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="ConFIG",
        paper="arXiv 2408.11104",
        uses="G",
        cost="O(T³), eigenvalues",
        sign="any",
        tested="equal cosines; TorchJD",
    )

    def _solve(self, gradients: Gradients) -> Array:
        units = solvers.equal_slopes(gradients.cosine)
        slopes = gradients.cosine @ units
        square = float(units @ slopes)
        length = float(gradients.lengths @ slopes) / square if square > 0.0 else 0.0
        return length * units / gradients.lengths


class AlignedMTL(DirectionWeighting):
    """Aligned-MTL (Senushkin et al., arXiv 2305.19000): the sum of the nearest gradients that are orthogonal and equal.

    ``w = √λ G^(-1/2) 1``, where eigenvalues of ``G`` below ``T`` epsilons of the largest are dropped, as in the
    authors' code, whose sum this is. (With the pre-set preferences ``1/T`` of other libraries, weights are ``T`` times
    smaller.) Weights may be negative. A zero gradient has weight 0.

    Args:
        num_tasks: Number of tasks ``T``.
        scale: Which eigenvalue ``λ`` of those kept gives the length of the aligned gradients: the least, ``"min"``, the
            lower ``"median"``, or ``"rmse"``, their mean.

    Raises:
        ValueError: If ``scale`` is none of these.
    """

    FACTS = Facts(
        title="Aligned-MTL",
        paper="arXiv 2305.19000",
        uses="G",
        cost="O(T³), eigenvalues",
        sign="any",
        tested="orthogonality; TorchJD",
    )

    def __init__(self, num_tasks: int, *, scale: Scale = "min") -> None:
        super().__init__(num_tasks)
        if scale not in get_args(Scale):
            raise ValueError(f"scale: expected one of {', '.join(get_args(Scale))}, got {scale!r}")
        self.scale = scale

    def _solve(self, gradients: Gradients) -> Array:
        lengths = gradients.lengths
        values, vectors = np.linalg.eigh(lengths[:, None] * gradients.cosine * lengths)
        used = values > len(values) * solvers.EPS * values[-1]
        values, vectors = values[used], vectors[:, used]
        scale = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[self.scale]
        weights: Array = vectors @ (vectors.sum(0) * np.sqrt(scale / values))
        return weights


# ---- quadratic programs ---------------------------------------------------------------------------------------------


class MGDA(DirectionWeighting):
    """Multiple-gradient descent (Désidéri, 2012; Sener & Koltun, arXiv 1810.04650): the shortest convex combination.

    ``argmin wᵀ G w`` over ``w ≥ 0``, ``sum(w) = 1``, exactly. Where there are zero gradients, they share all weight
    equally: the shortest combination is zero, and training stands still, as the method has it.

    The gradients may be divided by ``s_i`` before; as in Sener & Koltun's code, the weights are then used for the
    gradients as they are. A task whose loss cannot be divided by, being 0 or not finite, has weight 0.

    Args:
        num_tasks: Number of tasks ``T``.
        normalize: ``s_i``: 1 for ``"none"``, ``n_i`` for ``"l2"``, ``|L_i|`` for ``"loss"``, their product for
            ``"loss+"``.

    Raises:
        ValueError: If ``normalize`` is none of these.
    """

    FACTS = Facts(
        title="MGDA",
        paper="arXiv 1810.04650",
        uses="G (L)",
        cost="O(T³), active set",
        sign="≥ 0",
        tested="KKT; SciPy; TorchJD",
    )

    def __init__(self, num_tasks: int, *, normalize: Normalize = "none") -> None:
        super().__init__(num_tasks)
        if normalize not in get_args(Normalize):
            raise ValueError(f"normalize: expected one of {', '.join(get_args(Normalize))}, got {normalize!r}")
        self.normalize = normalize

    @property
    def needs(self) -> frozenset[str]:
        """The Gramian, at every step, and the losses where these normalise."""
        return frozenset({"gramian", "losses"} if self.normalize.startswith("loss") else {"gramian"})

    def _from_gram(self, gram: Tensor, losses: Tensor) -> Tensor:
        return self.from_gram(gram, losses)

    def from_gram(self, gram: Tensor, losses: Tensor | None = None) -> Tensor:
        """The weights of one Gramian, or of many.

        Args:
            gram: ``[T, T]`` or ``[B, T, T]``.
            losses: ``[T]`` or ``[B, T]``, for ``normalize="loss"`` and ``"loss+"``.

        Returns:
            Float64 tensor ``[T]`` or ``[B, T]`` on the device of ``gram``.

        Raises:
            ValueError: If the shape is another, or losses are missing.
        """
        gram = gram.double()
        if self.normalize in ("l2", "loss+"):
            squares = gram.diagonal(dim1=-2, dim2=-1)
            gram = _divided(gram, torch.where(squares > 0, squares, 1.0).sqrt())
        if self.normalize.startswith("loss"):
            if losses is None:
                raise ValueError(f"losses: expected with normalize={self.normalize!r}, got None")
            sizes = losses.abs().to(gram)
            gram = _divided(gram, torch.where((sizes > 0) & sizes.isfinite(), sizes, torch.nan))
        return super().from_gram(gram)

    def _weigh(self, gram: Array) -> Array:
        zero = gram.diagonal() <= 0.0
        return zero / float(zero.sum()) if zero.any() else super()._weigh(gram)

    def _solve(self, gradients: Gradients) -> Array:
        return solvers.shortest(gradients.norms, gradients.cosine)


def _divided(gram: Tensor, scale: Tensor) -> Tensor:
    return gram / scale[..., :, None] / scale[..., None, :]


class _AroundTheMean(DirectionWeighting):
    """What starts from the mean gradient: weights ``1/T``, also that of a zero gradient."""

    def _idle(self, num_known: int) -> float:
        return 1.0 / max(num_known, 1)


class _Projection(_AroundTheMean):
    """A projection onto the cone of directions that conflict with no gradient: compiled, where that will do."""

    EACH: ClassVar[bool]  # whether every gradient is projected, or the mean alone

    def _weigh(self, gram: Array) -> Array:
        weights = dual_cone.weights(gram, each=self.EACH)
        return super()._weigh(gram) if weights is None else weights


class UPGrad(_Projection):
    """UPGrad (Quinton & Rey, arXiv 2406.16232): the mean of the gradients, each made to agree with all.

    Every ``g_i / T`` is projected onto the cone of directions that conflict with no gradient, and the projections are
    added, so ``G w ≥ 0``: ``w = Σ_i argmin vᵀ G v`` over ``v ≥ e_i / T``. Without conflict all weights are ``1/T``, as
    is that of a zero gradient. Where a positive combination of the gradients vanishes every projection is zero, and we
    take the weights of :class:`DualProj`, whose combination vanishes too and which are smaller.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="UPGrad",
        paper="arXiv 2406.16232",
        uses="G",
        cost="O(T⁴), active sets",
        sign="> 0",
        tested="KKT; SciPy; TorchJD",
    )

    EACH = True

    def _solve(self, gradients: Gradients) -> Array:
        cosine, lengths = gradients.cosine, gradients.lengths
        units = solvers.dual_cone(cosine, lengths[None])[0]  # those of the mean's projection
        if not solvers.vanishes(cosine, units):
            each = solvers.dual_cone(cosine, np.eye(len(lengths)))  # of unit gradients, as the cone has no scale
            units = lengths @ each
        weights: Array = units / lengths
        return weights / gradients.num_known


class DualProj(_Projection):
    """The mean gradient, made to agree with all (Lopez-Paz & Ranzato, arXiv 1706.08840, for continual learning).

    The projection of ``Σ g_i / T`` onto the cone of directions that conflict with no gradient, so ``G w ≥ 0``:
    ``argmin wᵀ G w`` over ``w ≥ 1/T``; the name is TorchJD's. Without conflict all weights are ``1/T``, as is that of a
    zero gradient.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="DualProj",
        paper="arXiv 1706.08840",
        uses="G",
        cost="O(T³), active set",
        sign="> 0",
        tested="KKT; SciPy; TorchJD",
    )

    EACH = False

    def _solve(self, gradients: Gradients) -> Array:
        lengths = gradients.lengths
        weights: Array = solvers.dual_cone(gradients.cosine, lengths[None])[0] / lengths
        return weights / gradients.num_known


class CAGrad(_AroundTheMean):
    """Conflict-averse gradient descent (Liu et al., arXiv 2110.14048): the best for the worst task near the mean.

    ``argmax_d min_i g_i·d`` over ``‖d - ḡ‖ ≤ c ‖ḡ‖``, where ``ḡ = Σ g_i / T``: weights ``1/T`` and something on top.
    Where a convex combination of the gradients vanishes, that ``d`` is not unique and we take the one nearest ``ḡ``; a
    zero gradient is left out of the minimum (which it would hold at 0) and has weight ``1/T``. The authors' code
    divides all by ``1 + c²`` unless told otherwise; the paper and we do not.

    Args:
        num_tasks: Number of tasks ``T``.
        c: Radius relative to the mean gradient, not negative. The paper has it in [0, 1).

    Raises:
        ValueError: If ``c`` is negative or not finite.
    """

    FACTS = Facts(
        title="CAGrad",
        paper="arXiv 2110.14048",
        uses="G",
        cost="O(T³), active sets",
        sign="> 0",
        tested="duality; SciPy; TorchJD",
    )

    def __init__(self, num_tasks: int, *, c: float = 0.5) -> None:
        super().__init__(num_tasks)
        if not 0.0 <= c < math.inf:
            raise ValueError(f"c: expected a finite number that is not negative, got {c!r}")
        self.c = c

    def _solve(self, gradients: Gradients) -> Array:
        lengths = gradients.lengths
        step = solvers.worst_case_step(lengths, gradients.cosine, lengths, self.c)
        return (1.0 + step / lengths) / gradients.num_known


# ---- bargains -------------------------------------------------------------------------------------------------------


class FairGrad(DirectionWeighting):
    """FairGrad (Ban & Ji, arXiv 2402.15638): α-fair shares of the descent, ``w > 0`` with ``(G w)_i = w_i^(-1/α)``.

    ``alpha=1`` is proportional fairness as in :class:`NashMTL`; the larger, the nearer to max-min fairness. The scale
    is the equation's own, in which gradients ``s`` times as large have weights ``s^(-2α/(1+α))`` times as large. Where
    a convex combination of the gradients vanishes there is no solution; weights are then finite, but large (up to 1e6
    times), and their combination is nearly zero. A zero gradient has weight 0.

    Args:
        num_tasks: Number of tasks ``T``.
        alpha: ``α``, positive; the authors' scripts use 2.

    Raises:
        ValueError: If ``alpha`` is not positive and finite.
    """

    FACTS = Facts(
        title="FairGrad",
        paper="arXiv 2402.15638",
        uses="G",
        cost="O(T³), Newton",
        sign="> 0",
        tested="its equation; SciPy; TorchJD",
    )

    def __init__(self, num_tasks: int, *, alpha: float = 2.0) -> None:
        super().__init__(num_tasks)
        if not 0.0 < alpha < math.inf:
            raise ValueError(f"alpha: expected a positive, finite number, got {alpha!r}")
        self.alpha = alpha

    def _solve(self, gradients: Gradients) -> Array:
        lengths, power = gradients.lengths, 1.0 / self.alpha
        units = solvers.bargain(gradients.cosine, lengths ** (power - 1.0), power)
        return units / lengths * float(gradients.longest ** (-2.0 / (1.0 + power)))


class NashMTL(DirectionWeighting):
    """Nash-MTL (Navon et al., arXiv 2202.01017): the bargain in which each task's gain is its inverse weight.

    ``w > 0`` with ``(G w)_i = 1 / w_i``. The scale is the equation's own: the norm of the aggregated gradient is
    ``√T`` always, and the authors clip it to 1; do that in your loop. (Dividing ``G`` by its norm in their code only
    conditions the solver.) Where a convex combination of the gradients vanishes there is no bargain; weights are then
    finite, but large (up to 1e6 times), and their combination is nearly zero. A zero gradient has weight 0.

    Args:
        num_tasks: Number of tasks ``T``.
    """

    FACTS = Facts(
        title="Nash-MTL",
        paper="arXiv 2202.01017",
        uses="G",
        cost="O(T³), Newton",
        sign="> 0",
        tested="its equation; SciPy; TorchJD",
    )

    def _solve(self, gradients: Gradients) -> Array:
        return solvers.bargain(gradients.cosine, np.ones_like(gradients.norms), power=1.0) / gradients.norms

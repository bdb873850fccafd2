"""``GradStats``: a Gramian of task gradients with names, and every metric derived from it."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gradstats._files import written_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class GradStats:
    """The Gramian ``G = J Jᵀ`` of ``T`` task gradients (the rows of ``J``) and the metrics that follow from it.

    Immutable; tensors stay on the device they were computed on. Pairwise metrics follow PCGrad (Yu et al., 2020)
    and Aligned-MTL (Senushkin et al., 2023). Ratios are formed as ``(G_ij / n_i) / n_j``, so gradients as small as
    1e-140 or as large as 1e140 are measured correctly. A zero gradient has cosine and similarity 0 with every task.
    A task whose gradient holds NaN or inf has non-finite entries in its own row and column alone.

    Attributes:
        gram: Float64 tensor ``[T, T]``, exactly symmetric.
        names: Names of the ``T`` tasks.
        present: Bool tensor ``[T]``; False for a task that had no loss at this step (its row is zero). Scalar metrics
            and means over steps count pairs of present tasks only.
        groups: Gramians of disjoint groups of parameters by group name, whose sum is ``gram``; empty unless asked for.
        method: How the Gramian was obtained, such as ``"pairwise"``, ``"batched"`` or ``"sketch"``.
        standard_error: Float64 ``[T, T]``, the standard error of each entry of ``gram`` where they are estimates (those
            of different steps independent); None where they are exact.
        noise_trace: Float64 ``[T]``, an unbiased estimate of the trace of the covariance of the gradients of single
            samples, where ``unbiased=True`` has found it; None elsewhere.
    """

    gram: Tensor
    names: tuple[str, ...]
    present: Tensor
    groups: Mapping[str, GradStats] = field(default_factory=dict)
    method: str = "pairwise"
    standard_error: Tensor | None = None
    noise_trace: Tensor | None = None

    # ---- shape ------------------------------------------------------------------------------------------------------

    @property
    def num_tasks(self) -> int:
        """Number of tasks ``T``."""
        return self.gram.shape[0]

    @property
    def finite(self) -> Tensor:
        """Bool tensor ``[T]``: whether the task's gradient has a finite norm."""
        return torch.isfinite(self.gram.diagonal())

    @property
    def non_finite_names(self) -> tuple[str, ...]:
        """Names of the tasks whose gradients hold NaN or inf."""
        squares = self.gram.diagonal().tolist()
        return tuple(name for name, square in zip(self.names, squares, strict=True) if not math.isfinite(square))

    # ---- metrics of single tasks and of pairs -----------------------------------------------------------------------

    @property
    def norms(self) -> Tensor:
        """Gradient norms ``n_i``, float64 ``[T]``; 0 where an unbiased estimate of the square is negative."""
        return self.gram.diagonal().clamp_min(0.0).sqrt()

    @property
    def cosine(self) -> Tensor:
        """Cosines ``C_ij = G_ij / (n_i n_j)``, float64 ``[T, T]``, in [-1, 1]; 0 with a zero gradient."""
        norms = self.norms
        safe = torch.where(norms == 0, 1.0, norms)
        cosine = (self.gram / safe[:, None] / safe[None, :]).clamp(-1.0, 1.0)
        # An estimate may have products with a gradient whose norm is 0.
        zero = (norms == 0)[:, None] | (norms == 0)[None, :]
        cosine = torch.where(zero & self.gram.isfinite(), 0.0, cosine)
        return _symmetric(cosine, torch.where(norms.isfinite(), (norms > 0).double(), torch.nan))

    @property
    def magnitude_similarity(self) -> Tensor:
        """``2 n_i n_j / (n_i² + n_j²)``, float64 ``[T, T]``, in [0, 1]; 0 with a zero gradient (Yu et al., 2020)."""
        norms = self.norms
        ratio = norms[:, None] / norms[None, :]
        similarity = 2.0 / (ratio + 1.0 / ratio)
        zero = (norms == 0)[:, None] | (norms == 0)[None, :]
        finite = norms.isfinite()[:, None] & norms.isfinite()[None, :]
        similarity = torch.where(finite, torch.where(zero, 0.0, similarity), torch.nan)
        return _symmetric(similarity, similarity.diagonal())

    @property
    def norm_standard_error(self) -> Tensor | None:
        """Standard error of ``norms`` to first order, ``se_ii / 2 n_i``, float64 ``[T]``; None where they are exact.

        NaN where the square's estimate is not positive, which says nothing of the norm but that it is small.
        """
        if self.standard_error is None:
            return None
        errors = self.standard_error.diagonal()
        unknown = torch.where(errors == 0, 0.0, torch.nan)
        return torch.where(self.norms == 0, unknown, errors / (2.0 * self.norms))

    @property
    def noise_scale(self) -> Tensor | None:
        """Gradient noise scale ``tr Σ_i / n_i²`` in samples, float64 ``[T]``; None where the noise was not measured.

        At that batch size the gradient and its noise are of equal size (McCandlish et al., 2018, arXiv 1812.06162, the
        "simple" noise scale). The ratio of two estimates: average over steps first (:meth:`mean`), as there. It is
        inf where the estimate of ``n_i²`` is not positive, and 0 for a zero gradient without noise.
        """
        if self.noise_trace is None:
            return None
        squares = self.gram.diagonal()
        without = torch.where(self.noise_trace == 0, 0.0, torch.inf)
        return torch.where(squares <= 0, without, self.noise_trace / squares)

    # ---- scalars ----------------------------------------------------------------------------------------------------

    @property
    def mean_cosine(self) -> Tensor:
        """Mean cosine over pairs ``i < j`` of present tasks, float64 scalar; NaN where there is no pair."""
        return self._mean_over_pairs(self.cosine)

    @property
    def mean_magnitude_similarity(self) -> Tensor:
        """Mean magnitude similarity over pairs ``i < j`` of present tasks, float64 scalar; NaN without a pair."""
        return self._mean_over_pairs(self.magnitude_similarity)

    @property
    def conflict_rate(self) -> Tensor:
        """Share of pairs ``i < j`` of present tasks with negative cosine, float64 scalar; NaN without a pair."""
        cosine = self.cosine
        return self._mean_over_pairs(torch.where(cosine.isnan(), cosine, (cosine < 0).double()))

    def _mean_over_pairs(self, values: Tensor) -> Tensor:
        counted = (self.present[:, None] & self.present[None, :]).triu(1)
        return torch.where(counted, values, 0.0).sum() / counted.sum()

    @property
    def condition_number(self) -> Tensor:
        """``σ_max / σ_min`` of ``J`` over the present tasks, float64 scalar on the CPU; computed when read.

        It is inf when the gradients are linearly dependent to working precision (the smallest eigenvalue of the
        cosine matrix is below ``T`` float64 epsilons of the largest) or one of them is zero, and NaN when one is not
        finite or no task is present. The extreme singular values come from ``G`` and from its inverse, both formed
        on the cosine matrix, so tasks of very different scale do not count as dependent.
        """
        keep = self.present.cpu()
        gram = self.gram.detach().cpu()[keep][:, keep]
        return torch.tensor(condition_number(gram.numpy()), dtype=torch.float64, device="cpu")

    # ---- under weights ----------------------------------------------------------------------------------------------

    def weighted(self, weights: Tensor | Sequence[float]) -> GradStats:
        """Statistics of the weighted gradients ``w_i g_i``: the Gramian ``diag(w) G diag(w)``.

        Args:
            weights: ``T`` numbers.

        Raises:
            ValueError: If ``weights`` does not hold ``T`` numbers.
        """
        w = self._as_weights(weights)
        groups = {name: stats.weighted(w) for name, stats in self.groups.items()}
        error = self.standard_error
        return replace(
            self,
            gram=w[:, None] * self.gram * w[None, :],
            groups=groups,
            standard_error=None if error is None else w.abs()[:, None] * error * w.abs()[None, :],
            noise_trace=None if self.noise_trace is None else w.square() * self.noise_trace,
        )

    def alignment(self, weights: Tensor | Sequence[float]) -> Tensor:
        """Cosine of each task gradient to the weighted sum ``Σ_j w_j g_j``, float64 ``[T]``; 0 where either is zero.

        Args:
            weights: ``T`` numbers.

        Raises:
            ValueError: If ``weights`` does not hold ``T`` numbers.
        """
        scaled = self._as_weights(weights) * self.norms
        largest = scaled.abs().max()
        scaled = scaled / torch.where(largest == 0, 1.0, largest)
        projections = self.cosine @ scaled
        length = (scaled @ projections).clamp_min(0.0).sqrt()
        # A sum that cancels to rounding has no direction.
        noise = math.sqrt(self.num_tasks * torch.finfo(torch.float64).eps) * scaled.abs().sum()
        return torch.where(length <= noise, 0.0, projections / length).clamp(-1.0, 1.0)

    def _as_weights(self, weights: Tensor | Sequence[float]) -> Tensor:
        try:
            w = torch.as_tensor(weights, dtype=torch.float64, device=self.gram.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"weights: expected {self.num_tasks} numbers, one per task, got {weights!r}") from error
        if w.shape != (self.num_tasks,):
            raise ValueError(f"weights: expected {self.num_tasks} numbers, one per task, got shape {tuple(w.shape)}")
        return w

    # ---- combination ------------------------------------------------------------------------------------------------

    def __add__(self, other: GradStats) -> GradStats:
        """Statistics over the union of two disjoint parameter sets: Gramians add.

        Standard errors are taken as independent, but for those of ``unbiased=True``: the same samples are behind both,
        so that they are added up, which bounds the error of the sum.

        Raises:
            ValueError: If the two do not name the same tasks in the same order.
        """
        if not isinstance(other, GradStats):
            return NotImplemented
        self._check_same_tasks(other)
        both = self.groups.keys() & other.groups.keys()
        errors, noise = [self.standard_error, other.standard_error], None
        if self.noise_trace is not None and other.noise_trace is not None:
            noise = self.noise_trace + other.noise_trace
        groups = {**self.groups, **other.groups, **{name: self.groups[name] + other.groups[name] for name in both}}
        return replace(
            self,
            gram=self.gram + other.gram,
            present=self.present | other.present,
            groups=groups,
            method=_joined([self.method, other.method]),
            standard_error=root_sum_of_squares(errors) if noise is None else _sum_of_known(errors),
            noise_trace=noise,
        )

    @staticmethod
    def mean(steps: Sequence[GradStats]) -> GradStats:
        """Mean Gramian over steps; each pair is averaged over the steps in which both of its tasks were present.

        Average first and derive metrics afterwards: a mean of metrics over noisy Gramians is biased.

        Args:
            steps: At least one ``GradStats``, all of the same tasks.

        Raises:
            ValueError: If ``steps`` is empty or its members do not name the same tasks in the same order.
        """
        steps = list(steps)
        if not steps:
            raise ValueError("steps: expected at least one GradStats, got none")
        first = steps[0]
        for other in steps[1:]:
            first._check_same_tasks(other)
        pairs = torch.stack([s.present[:, None] & s.present[None, :] for s in steps])
        grams = torch.stack([s.gram for s in steps])
        total, count = torch.where(pairs, grams, 0.0).sum(0), pairs.sum(0).clamp_min(1)
        # Independent errors average out: that of a mean of n is the root of their sum of squares over n.
        error = root_sum_of_squares(
            [
                None if s.standard_error is None else torch.where(pair, s.standard_error, 0.0)
                for s, pair in zip(steps, pairs, strict=True)
            ]
        )
        noises, noise = [s.noise_trace for s in steps if s.noise_trace is not None], None
        if len(noises) == len(steps):
            present = torch.stack([s.present for s in steps])
            noise = torch.where(present, torch.stack(noises), 0.0).sum(0) / present.sum(0).clamp_min(1)
        shared_groups = set(first.groups).intersection(*(s.groups for s in steps))
        return replace(
            first,
            gram=total / count,
            present=torch.stack([s.present for s in steps]).any(0),
            groups={k: GradStats.mean([s.groups[k] for s in steps]) for k in first.groups if k in shared_groups},
            method=_joined([s.method for s in steps]),
            standard_error=None if error is None else error / count,
            noise_trace=noise,
        )

    def _check_same_tasks(self, other: GradStats) -> None:
        if self.names != other.names:
            raise ValueError(f"tasks differ: {list(self.names)} and {list(other.names)}")

    # ---- out of the process -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, float]:
        """All metrics as flat floats for a logger, such as ``norm/seg``, ``cosine/seg/depth`` and ``mean_cosine``.

        Where the Gramian is an estimate, ``norm_standard_error/seg`` says how good one; where the noise was measured,
        there is ``noise_scale/seg``.
        """
        norms, cosine, similarity = self.norms.tolist(), self.cosine.tolist(), self.magnitude_similarity.tolist()
        out = {f"norm/{name}": norms[i] for i, name in enumerate(self.names)}
        if (errors := self.norm_standard_error) is not None:
            out.update(zip((f"norm_standard_error/{name}" for name in self.names), errors.tolist(), strict=True))
        if (scales := self.noise_scale) is not None:
            out.update(zip((f"noise_scale/{name}" for name in self.names), scales.tolist(), strict=True))
        for i, a in enumerate(self.names):
            for j in range(i + 1, self.num_tasks):
                out[f"cosine/{a}/{self.names[j]}"] = cosine[i][j]
                out[f"magnitude_similarity/{a}/{self.names[j]}"] = similarity[i][j]
        for metric in ("mean_cosine", "mean_magnitude_similarity", "conflict_rate", "condition_number"):
            out[metric] = float(getattr(self, metric))
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` atomically; :meth:`load` reads it back."""
        with written_atomically(path) as file:
            torch.save(self._state(), file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GradStats:
        """Read what :meth:`save` wrote; tensors come back on the CPU.

        Raises:
            ValueError: If the file does not hold a saved ``GradStats``.
            OSError: If it cannot be read.
        """
        try:
            return cls._from_state(torch.load(path, map_location="cpu", weights_only=True))
        except OSError:
            raise
        except Exception as error:  # whatever the unpickler makes of a file of another kind
            raise ValueError(f"path: {os.fspath(path)!r} does not hold a saved GradStats") from error

    def _state(self) -> dict[str, Any]:
        state = {k: getattr(self, k) for k in ("gram", "names", "present", "method", "standard_error", "noise_trace")}
        return {**state, "groups": {name: stats._state() for name, stats in self.groups.items()}}

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> GradStats:
        groups = {name: cls._from_state(s) for name, s in state["groups"].items()}
        return cls(**{**state, "names": tuple(state["names"]), "groups": groups})

    def plot(self) -> Figure:
        """Heat map of the cosines with the gradient norms beside it; needs the extra ``plot`` (matplotlib).

        :func:`gradstats.report.conflict_by_group` shows the groups.
        """
        from gradstats.report import plot_stats

        return plot_stats(self)

    def __repr__(self) -> str:
        width = max(len(name) for name in self.names)
        norms, cosine = self.norms.tolist(), self.cosine.tolist()
        finite, present = self.finite.tolist(), self.present.tolist()
        how = self.method.replace("sketch", "sketched")
        if (errors := self.norm_standard_error) is not None:
            known = self.present & (self.norms > 0)
            how += f", norms ± {float((errors / self.norms)[known].mean()):.1%}"
        lines = [f"GradStats of {self.num_tasks} tasks ({how})", f"{'':{width}}  {'norm':>10}  cosine"]
        for i, name in enumerate(self.names):
            note = "" if finite[i] else "  not finite"
            note = note if present[i] else "  absent"
            row = " ".join(f"{c:6.3f}" for c in cosine[i])
            lines.append(f"{name:{width}}  {norms[i]:10.4g}  {row}{note}")
        summary = {
            "mean cosine": self.mean_cosine,
            "conflict rate": self.conflict_rate,
            "mean magnitude similarity": self.mean_magnitude_similarity,
            "condition number": self.condition_number,
        }
        lines.append(", ".join(f"{label} {float(value):.4g}" for label, value in summary.items()))
        return "\n".join(lines)


def check_names(names: Sequence[str] | None, num_tasks: int, argument: str = "names") -> tuple[str, ...]:
    """``names`` as a tuple of ``num_tasks`` different strings, or the default names where None.

    Raises:
        ValueError: If their number is wrong or two are equal.
        TypeError: If it is not a sequence (sets have no order) of strings.
    """
    if names is None:
        return tuple([f"task{t}" for t in range(num_tasks)])
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}: expected a sequence of strings, one per task, got {names!r}")
    if len(names) != num_tasks:
        raise ValueError(f"{argument}: expected {num_tasks} names, one per task, got {len(names)}")
    if len(set(names)) != num_tasks:
        raise ValueError(f"{argument}: expected different names, got {list(names)}")
    return tuple(names)


def _symmetric(values: Tensor, diagonal: Tensor) -> Tensor:
    """The upper triangle on both sides: rounding differs between ``(x / a) / b`` and ``(x / b) / a``."""
    upper = values.triu(1)
    return upper + upper.T + torch.diag(diagonal)


def _joined(methods: Sequence[str]) -> str:
    """The different methods, as in ``"batched+sketch"``."""
    return "+".join(dict.fromkeys(methods))


def root_sum_of_squares(errors: Sequence[Tensor | None]) -> Tensor | None:
    """Standard error of a sum from those of its independent terms; None stands for an exact one."""
    given = [error for error in errors if error is not None]
    return functools.reduce(torch.hypot, given) if given else None  # hypot: no square leaves the range of float64


def _sum_of_known(errors: Sequence[Tensor | None]) -> Tensor | None:
    given = [error for error in errors if error is not None]
    return torch.stack(given).sum(0) if given else None


def condition_number(gram: np.ndarray[Any, Any]) -> float:
    """``sqrt(λ_max(G) λ_max(G⁻¹))`` with ``G = D C D``: extreme eigenvalues of graded matrices stay accurate.

    In NumPy, whose calls take less than torch's where there are a few numbers.
    """
    if not len(gram) or not np.isfinite(gram).all():
        return math.nan
    norms = np.sqrt(gram.diagonal().clip(0.0))
    if not norms.all():
        return math.inf
    cosine = gram / norms[:, None] / norms
    eigenvalues = np.linalg.eigvalsh(cosine)
    if eigenvalues[0] <= len(gram) * np.finfo(np.float64).eps * eigenvalues[-1]:
        return math.inf
    # Scaled by the largest and the smallest norm, so that neither product leaves the range of float64.
    down, up = norms / norms.max(), norms.min() / norms
    largest = np.linalg.eigvalsh(down[:, None] * cosine * down)[-1]
    inverse = np.linalg.inv(cosine)
    inverse_largest = np.linalg.eigvalsh(up[:, None] * ((inverse + inverse.T) / 2) * up)[-1]
    return float(np.sqrt(largest * inverse_largest) * (norms.max() / norms.min()))

"""An unbiased estimate of the Gramian from random forward-mode products, at a cost that does not grow with ``T``.

The product ``J v`` of the tasks' gradients with a direction ``v`` in the space of the inputs is the derivative of all
losses along ``v``. There are only losses with a graph here, no function to run forwards, so it comes from the backward:
``g(u) = Jᵀ u`` is linear in ``u`` and differentiable, and ``J v`` is the gradient of ``<g(u), v>`` by ``u``. With
independent random signs in ``v``, ``E[J v (J v)ᵀ] = J Jᵀ``. The mean of ``k`` such products has the variance
``(G_ij² + G_ii G_jj - 2 Σ_p J_ip² J_jp²) / k``, of which we state the first two terms (those of Gaussian directions).
The relative error of a norm is about ``1 / sqrt(2 k)``, whatever the number of tasks, their scales and their angles.

The inputs are cut by depth into strata of about equal gradient energy, and every direction lies in one stratum (our
choice). Strata add up in ``G``, so directions spread over them have about the variance of as many directions over all
inputs; but a direction costs only the part of the network between its stratum and the losses, and gradients are often
largest near the losses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstats.collect.fold import Fold, is_dtensor
from gradstats.collect.graph import edge_of
from gradstats.collect.job import Job

#: Directions where the caller does not say how many: norms to 12 %.
DEFAULT_DIRECTIONS = 32
#: Directions in a stratum. Fewer would lie higher up and so cost less, but a task that has most of its gradient where
#: others have little would be known badly.
_STRATUM = 8
#: Directions carried at once, each with a copy of its stratum's inputs.
_CHUNK = 8
#: Share of the products that may be missing before we refuse: more than the rounding of bfloat16.
_TOLERANCE = 0.05


def collect_sketch(job: Job, *, num_directions: int | None, seed: int | None, retain_graph: bool) -> Fold:
    """Estimate the Gramian and its standard errors; ``job.weights`` is ignored.

    The gradients of inputs that one task alone reaches have no products with others: their part is exact and free.
    With a reduction (a mean over data-parallel ranks) the products are reduced, in which the gradients are linear; all
    ranks draw the same directions.

    Args:
        job: What to collect.
        num_directions: About how many directions are drawn in all, 32 if None. Strata do not cross groups of inputs,
            and a group has at least 8 directions.
        seed: Seeds the directions; None derives one from the gradients, so that steps draw anew and a run repeats.
        retain_graph: Whether the graph is kept.

    Raises:
        RuntimeError: If the backward cannot be differentiated.
        ValueError: If an input is a DTensor.
    """
    if any(is_dtensor(tensor) for tensor in job.inputs):
        raise ValueError("inputs: expected ordinary tensors with method='sketch', got a DTensor; use method='engine'")
    fold = job.new_fold()
    u, gradients = _differentiable_gradients(job, retain_graph)
    if any(gradient.layout != torch.strided for gradient in gradients):
        raise RuntimeError(_refusal("a gradient is sparse"))
    shared = []
    for k, (tensor, gradient) in enumerate(zip(job.inputs, gradients, strict=True)):
        tasks = job.graph.tasks_reaching(tensor)
        if tasks.bit_count() > 1:
            shared.append(k)
        elif tasks:
            task = tasks.bit_length() - 1
            fold.add_row(k, task, gradient.detach() / u[task].detach())
    energies = _energies(gradients, fold)
    products = _Products(u, gradients, fold, _generator(u.device, energies, seed))
    if not 0 < sum(energies[k] for k in shared) < math.inf:  # they cancel or are not finite: nothing to go by
        energies = [float(tensor.numel()) for tensor in job.inputs]
    total = sum(energies[k] for k in shared)
    for group in fold.grams:
        members = _by_depth([k for k in shared if fold.groups[k] == group], job)
        share = sum(energies[k] for k in members) / total if members else 0.0
        directions = max(_STRATUM, round(share * (num_directions or DEFAULT_DIRECTIONS)))
        for stratum, count in _strata(members, energies, directions):
            rows = products.draw(stratum, count)
            gram = rows.T @ rows / count
            gram = (gram + gram.T) / 2  # exactly symmetric, in whatever order the product was summed
            norms = gram.diagonal().sqrt()
            # Over ``count - 1``, our choice, on the safe side: estimates are skewed, and intervals of two standard
            # errors would cover too little.
            fold.add_estimate(group, gram, torch.hypot(gram, torch.outer(norms, norms)) / math.sqrt(count - 1))
    return fold


def _differentiable_gradients(job: Job, retain_graph: bool) -> tuple[Tensor, list[Tensor]]:
    """``u`` and ``Jᵀ u``, one tensor for each input, as a function of ``u``.

    The value of ``u`` matters only for where directions go: random signs, so that the expected square of ``Jᵀ u`` is a
    trace, over the losses' sizes, so that a task given in large units does not decide alone. The largest is 1, so that
    gradients are no larger than in an ordinary backward and a loss scale keeps its use.
    """
    device = job.losses[0].device
    sizes = torch.stack([loss.detach().reshape(()).abs().to(device, torch.float64) for loss in job.losses])
    known = sizes.isfinite() & (sizes > 0)
    smallest = torch.where(known, sizes, torch.inf).min()
    signs = _signs(sizes.shape, torch.Generator(device).manual_seed(0), torch.float64)
    u = torch.where(known, signs * (smallest / sizes), signs).requires_grad_()
    cotangents = [one.to(loss).expand(loss.shape) for one, loss in zip(u.unbind(), job.losses, strict=True)]
    gradients = torch.autograd.grad(
        job.losses, job.inputs, cotangents, create_graph=True, retain_graph=retain_graph, materialize_grads=True
    )
    return u, list(gradients)


def _energies(gradients: Sequence[Tensor], fold: Fold) -> list[float]:
    """Squared norms of ``Jᵀ u`` by input, the same on all ranks."""
    squares = [gradient.detach().double().square() for gradient in gradients]
    if fold.metric:
        squares = [d * square for d, square in zip(fold.metric, squares, strict=True)]
    sums = torch.stack([square.sum() for square in squares])
    energies: list[float] = (sums if fold.reduce is None else fold.reduce(sums)).tolist()
    return energies


def _generator(device: torch.device, energies: Sequence[float], seed: int | None) -> torch.Generator:
    if seed is None:
        digest = hashlib.sha256(repr(energies).encode()).digest()
        seed = int.from_bytes(digest[:6], "big")
    return torch.Generator(device).manual_seed(seed)


def _by_depth(members: Sequence[int], job: Job) -> list[int]:
    """Inputs near the losses first, by the longest path."""
    depths = dict.fromkeys(job.graph.children, 0)
    for node, edges in job.graph.children.items():  # parents first
        for child, _ in edges:
            depths[child] = max(depths[child], depths[node] + 1)
    return sorted(members, key=lambda k: depths[edge_of(job.inputs[k])[0]])


def _strata(members: Sequence[int], energies: Sequence[float], directions: int) -> list[tuple[list[int], int]]:
    """Cut ``members``, in their order, into strata; each with its share of ``directions``, at least 8.

    A stratum ends where the energy so far reaches another multiple of what 8 directions stand for.
    """
    total, quanta = sum(energies[k] for k in members), directions // _STRATUM
    strata: list[tuple[list[int], int]] = []
    waiting: list[int] = []
    so_far, given = 0.0, 0
    for k in members:
        waiting.append(k)
        so_far += energies[k]
        reached = directions * int(quanta * so_far / total + 1e-9) // quanta if total else 0
        if reached > given:
            strata.append((waiting, reached - given))
            waiting, given = [], reached
    if waiting and strata:  # what is left has no energy to speak of
        last, count = strata.pop()
        strata.append((last + waiting, count))
    elif waiting:
        strata.append((waiting, directions))
    return strata


@dataclass(frozen=True)
class _Products:
    """Products ``J v`` with random directions."""

    u: Tensor
    gradients: Sequence[Tensor]
    fold: Fold
    generator: torch.Generator

    def draw(self, members: Sequence[int], count: int) -> Tensor:
        """``count`` products with directions among the inputs ``members``, float64 ``[count, T]``."""
        chunks = [self._chunk(members, min(_CHUNK, count - done)) for done in range(0, count, _CHUNK)]
        rows = torch.cat(chunks)
        return rows if self.fold.reduce is None else self.fold.reduce(rows)

    def _chunk(self, members: Sequence[int], count: int) -> Tensor:
        outputs, directions = [], []
        for k in members:
            gradient = self.gradients[k]
            direction = _signs((count, *gradient.shape), self.generator, gradient.dtype)
            if self.fold.metric:
                direction = direction * self.fold.metric[k].sqrt()
            if gradient.requires_grad:
                outputs.append(gradient)
                directions.append(direction)
            elif gradient.any():
                raise RuntimeError(_refusal("its backward hides what it does from autograd"))
        if not outputs:
            return self.u.new_zeros(count, len(self.u))
        rows = _vector_products(outputs, self.u, directions)
        self._check(rows, outputs, directions)
        return rows

    def _check(self, rows: Tensor, outputs: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
        """Refuse products of which parts are missing, because some backward left the graph or is not linear.

        ``g`` is linear in ``u``, so ``<u, J v>`` must equal ``<g(u), v>``, which does not need the graph.
        """
        expected = torch.zeros_like(rows[:, 0])
        for v, gradient in zip(directions, outputs, strict=True):
            wide = torch.promote_types(v.dtype, torch.float32)
            expected += v.flatten(1).to(wide) @ gradient.detach().flatten().to(wide)
        missing = (rows @ self.u.detach() - expected).norm()
        if missing > _TOLERANCE * (rows.norm() + expected.norm()):
            raise RuntimeError(_refusal("a backward or a hook in it is not linear, or hides from autograd"))


def _vector_products(outputs: Sequence[Tensor], u: Tensor, directions: Sequence[Tensor]) -> Tensor:
    """Gradients of ``<outputs, v>`` by ``u`` for each ``v`` of ``directions``, which are stacked: ``[k, T]``."""
    try:
        # Vectorised, so that what is small (many heads) is walked once for all directions.
        return torch.autograd.grad(outputs, u, directions, retain_graph=True, is_grads_batched=True)[0]
    except torch.OutOfMemoryError:
        raise
    except Exception:  # vmap refuses; one at a time
        try:
            each = zip(*directions, strict=True)
            return torch.stack([torch.autograd.grad(outputs, u, v, retain_graph=True)[0] for v in each])
        except RuntimeError as error:
            raise RuntimeError(_refusal(str(error).partition("\n")[0])) from error


def _refusal(reason: str) -> str:
    return (
        "method: 'sketch' differentiates the backward once more, which this graph does not allow; use method='auto', "
        f"'batched' or 'sequential'. The reason: {reason}"
    )


def _signs(shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random signs, +1 or -1; a fourth of the time of Gaussian numbers."""
    size = math.prod(shape)
    words = torch.empty(-(-size // 31), dtype=torch.int32, device=generator.device).random_(generator=generator)
    # One after the other, the 31 random bits of a word become the sign bit of the float32 number 1.0.
    places = torch.arange(1, 32, dtype=torch.int32, device=generator.device)
    bits = (words[:, None] << places).bitwise_and_(-(2**31)).bitwise_or_(0x3F800000)
    return bits.view(torch.float32).flatten()[:size].reshape(tuple(shape)).to(dtype)

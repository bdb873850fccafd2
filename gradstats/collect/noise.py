"""The Gramian of the expected gradients, without the noise of the minibatch, from the losses of single samples.

The gradient of a task over a minibatch is ``ḡ_i = g_i + ε_i``, with noise ``ε`` that falls as ``1 / B``. Products of
minibatch gradients keep the noise's covariance, ``E <ḡ_i, ḡ_j> = <g_i, g_j> + E <ε_i, ε_j>``: squared norms come out
too large and, where tasks do not share their noise, cosines too small. Parts of the batch have independent noise. So
the samples are split into ``m`` parts, and with ``g_i^a`` the gradient of the mean loss of task ``i`` over part ``a``,
the mean of ``<g_i^a, g_j^b>`` over all ``a != b`` is unbiased: a U-statistic of degree 2 (Hoeffding, 1948).

The losses of the parts are collected as ``T m`` tasks by the ways there are, at the cost of as many tasks.

Standard errors come from the parts as well. With ``h_ab`` the mean of ``<g_i^a, g_j^b>`` and ``<g_i^b, g_j^a>``,
Hoeffding's decomposition ``h_ab = h + φ_a + φ_b + ψ_ab`` has uncorrelated terms, so that the variance of the estimate
is ``4 var φ / m + 2 var ψ / (m (m - 1))``. Both variances are estimated without bias by the analysis of variance of a
diallel table without its diagonal (Griffing, 1956, method 4); a negative ``var φ`` is taken as 0, our choice. The
jackknife would double ``var ψ``, which is what there is where noise dominates. Few parts do not tell the variance well,
so we state it larger by ``(m - 1) / (m - 3)``, the variance of Student's t with ``m - 1`` degrees of freedom (our
choice): 1.96 standard errors on both sides then cover about 95 %.

Without bias is not without error: on overlaid digits (benchmarks/noise.py) one batch of 64 leaves squared norms
uncertain by about their own size and more, so average over many steps. AutoScale needs norms up to a common factor
alone, which noise is to a large part: there one of its windows of 10 steps gave weights that were closer to the exact
ones with plain Gramians than with unbiased ones, at four points of four.

The spread of the parts also gives the trace of the covariance of the gradients of single samples, ``tr Σ_i``, and with
it the gradient noise scale ``tr Σ_i / |g_i|²`` (McCandlish et al., 2018, arXiv 1812.06162, "simple noise scale").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradstats.collect import arguments as args
from gradstats.collect.arguments import Inputs, Weights
from gradstats.collect.driver import collect
from gradstats.collect.graph import Graph
from gradstats.stats import GradStats

#: Parts where the caller does not say how many; fewer than twice as many samples are parts by themselves.
DEFAULT_PARTS = 8
#: With fewer parts the residual of the analysis of variance has no degree of freedom left.
_FEWEST_PARTS = 4


def collect_unbiased(
    names: Sequence[str],
    losses: Sequence[Tensor | None],
    inputs: Inputs = None,
    *,
    parts: int | None = None,
    method: str = "auto",
    owner: Tensor | None = None,
    weights: Weights | None = None,
    num_ranks: int = 1,
    **options: Any,
) -> GradStats:
    """What :func:`~gradstats.collect.driver.collect` does, for losses of single samples and without their noise.

    Args:
        names: Names of the ``T`` tasks.
        losses: For each task the losses ``[B]`` of the samples, None for an absent task.
        inputs: As for :func:`gradstats.from_losses`.
        parts: Number ``m`` of parts; None for 8, or ``B`` if that is below 16.
        method: As for :func:`gradstats.from_losses`, but not "sketch".
        owner: As for :func:`gradstats.from_losses`, integers ``[B]``; then the losses of a task are those of its own
            samples, in their order.
        weights: As for :func:`gradstats.backward`, of the mean losses.
        num_ranks: Processes over which ``reduce`` averages gradients, each with as many samples.
        options: The other options of :func:`~gradstats.collect.driver.collect`.

    Raises:
        TypeError: If a loss has a wrong type.
        ValueError: If losses are not vectors of as many samples, there are too few, or an option does not fit.
    """
    if method == "sketch":
        raise ValueError("method: expected an exact method with unbiased=True, got 'sketch'")
    _check_vectors(names, losses, same_length=owner is None)
    with torch.enable_grad():  # as a caller who collects under no_grad has losses with a graph all the same
        first = [None if loss is None else loss[0] for loss in losses]
        present = args.present_losses(names, first)
        num_parts = _num_parts(parts, min(len(loss) for loss in losses if loss is not None))
        split = [None if loss is None else loss.tensor_split(num_parts) for loss in losses]
        of_parts = [None if own is None else own[a].mean() for own in split for a in range(num_parts)]
    graph = Graph(list(present.values()))
    _refuse_batch_norm(graph)
    if inputs is None and not graph.hides_parameters:
        inputs = args.normal_inputs(None, graph).tensors  # below, the parts of one task share its head
    # Absent tasks have a size as well, for which nothing is ever found.
    sizes = [[1] * num_parts if own is None else [len(part) for part in own] for own in split]
    shares: Tensor | None = None
    if weights is not None:
        counts = torch.tensor(sizes, dtype=torch.float64)
        device = next(iter(present.values())).device
        w = args.normal_weights(weights, names, device)
        shares = (w[:, None] * (counts / counts.sum(1, keepdim=True)).to(device)).flatten()
    stats = collect(
        [f"{name}/{a}" for name in names for a in range(num_parts)],
        of_parts,
        inputs,
        method=method,
        owner=None if owner is None else _part_owner(owner, losses, num_parts),
        weights=shares,
        **options,
    )
    samples = torch.tensor(sizes, dtype=torch.float64, device=stats.gram.device) * num_ranks
    return _without_noise(stats, tuple(names), samples)


# ---- the estimates ---------------------------------------------------------------------------------------------------


def _without_noise(stats: GradStats, names: tuple[str, ...], sizes: Tensor) -> GradStats:
    """The statistics of ``T`` tasks from those of their parts, which have ``sizes [T, m]`` samples."""
    estimate, standard_error = u_statistic(stats.gram, sizes.shape[1])
    # Within a part the noise is still there: tr Σ / b of it, for a part of b samples.
    excess = stats.gram.diagonal().view(sizes.shape) - estimate.diagonal()[:, None]
    return replace(
        stats,
        gram=estimate,
        names=names,
        present=stats.present.view(sizes.shape)[:, 0],
        groups={name: _without_noise(group, names, sizes) for name, group in stats.groups.items()},
        standard_error=standard_error,
        noise_trace=excess.sum(1) / sizes.reciprocal().sum(1),
    )


def u_statistic(gram: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Mean of the products of different parts, and its standard error.

    Args:
        gram: The Gramian of the gradients of the parts, float64 ``[T m, T m]``, the parts of a task in a row.
        parts: The number ``m`` of parts of a task, at least 4.

    Returns:
        Two float64 tensors ``[T, T]``.
    """
    m = parts
    products = gram.view(len(gram) // m, m, -1, m).transpose(1, 2)  # [T, T, m, m]
    different = ~torch.eye(m, dtype=torch.bool, device=gram.device)
    h = torch.where(different, (products + products.mT) / 2, 0.0)
    of_part = h.sum(3) / (m - 1)
    estimate = of_part.mean(2)

    phi = (of_part - estimate[:, :, None]) * ((m - 1) / (m - 2))
    psi = torch.where(different, h - estimate[:, :, None, None] - phi[:, :, :, None] - phi[:, :, None, :], 0.0)
    var_psi = psi.square().sum((2, 3)) / (m * (m - 3))
    var_phi = phi.square().sum(2) / (m - 1) - var_psi / (m - 2)
    variance = 4 * var_phi.clamp_min(0.0) / m + 2 * var_psi / (m * (m - 1))
    return estimate, (variance * (m - 1) / (m - 3)).sqrt()


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_vectors(names: Sequence[str], losses: Sequence[Tensor | None], *, same_length: bool) -> None:
    lengths = {}
    for name, loss in zip(names, losses, strict=True):
        if loss is None:
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"losses: expected a floating-point tensor for task {name!r}, got {type(loss).__name__}")
        if loss.ndim != 1:
            raise ValueError(
                f"losses: expected with unbiased=True the losses [B] of the samples for task {name!r} "
                f"(reduction='none', averaged over all other dimensions), got shape {tuple(loss.shape)}"
            )
        if len(loss) < _FEWEST_PARTS:
            raise ValueError(
                f"losses: expected at least {_FEWEST_PARTS} samples with unbiased=True, got {len(loss)} for {name!r}"
            )
        lengths[name] = len(loss)
    if same_length and len(set(lengths.values())) > 1:
        raise ValueError(f"losses: expected the same samples in all tasks with unbiased=True, got {lengths}")
    if not lengths:
        raise ValueError("losses: expected at least one task's losses, got None alone")


def _num_parts(parts: int | None, samples: int) -> int:
    if parts is None:
        return DEFAULT_PARTS if samples >= 2 * DEFAULT_PARTS else samples
    if not isinstance(parts, int) or not _FEWEST_PARTS <= parts <= samples:
        raise ValueError(f"parts: expected an integer from {_FEWEST_PARTS} to {samples} (samples), got {parts!r}")
    return parts


def _refuse_batch_norm(graph: Graph) -> None:
    for node in graph.children:
        if "BatchNorm" in node.name() and getattr(node, "_saved_training", True):
            raise ValueError(
                f"unbiased: expected a model that treats samples one by one, but it holds a BatchNorm layer in "
                f"training mode ({node.name()}), whose statistics mix them: put it into eval mode"
            )


def _part_owner(owner: Tensor, losses: Sequence[Tensor | None], parts: int) -> Tensor:
    """Which of the ``T m`` part losses each sample belongs to."""
    if not isinstance(owner, Tensor) or owner.ndim != 1:
        got = tuple(owner.shape) if isinstance(owner, Tensor) else type(owner).__name__
        raise ValueError(f"owner: expected integers [B], the task of each sample, with unbiased=True, got {got}")
    found = owner * parts
    for task, loss in enumerate(losses):
        own = (owner == task).nonzero().squeeze(1)
        if loss is None:
            continue
        if len(own) != len(loss):
            raise ValueError(
                f"owner: expected {len(loss)} samples of task {task}, as many as it has losses, got {len(own)}"
            )
        for a, part in enumerate(own.tensor_split(parts)):
            found[part] += a
    return found

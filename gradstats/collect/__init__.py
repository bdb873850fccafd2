"""Losses -> :class:`~gradstats.stats.GradStats` during backward.

``from_losses`` and ``backward`` are the public functions; :mod:`~gradstats.collect.driver` runs a collection, with one
file for each method; :mod:`~gradstats.collect.graph` reads the autograd graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradstats.collect import arguments as args
from gradstats.collect import driver
from gradstats.collect.arguments import GroupBy, Inputs, Losses, Metric, Weights
from gradstats.collect.driver import collect, signature
from gradstats.collect.graph import Graph
from gradstats.collect.noise import collect_unbiased
from gradstats.collect.plan import Plan
from gradstats.stats import GradStats

__all__ = ["Plan", "backward", "collect", "explain", "from_losses", "shared_parameters", "signature"]


def from_losses(
    losses: Losses,
    inputs: Inputs = None,
    *,
    method: str = "auto",
    owner: Tensor | None = None,
    group_by: GroupBy | None = None,
    metric: Metric | None = None,
    loss_scale: float | Tensor | None = None,
    max_bytes: int | None = None,
    num_directions: int | None = None,
    seed: int | None = None,
    store_dtype: torch.dtype | None = None,
    unbiased: bool = False,
    parts: int | None = None,
    retain_graph: bool = False,
) -> GradStats:
    """The Gramian of the gradients of several losses, computed during one backward.

    Gradients are folded into the Gramian as they appear and freed at once. ``.grad``, buffers, random-number state and
    hooks stay as they were, and so does the graph with ``retain_graph``. Models need no change. The exceptions: torch
    writes the gradient of an activation that retains it in every backward, so call ``retain_grad`` after collecting;
    and hooks on nodes of the graph (``Node.register_hook``, not those on tensors and modules) count with
    ``method="sequential"`` and ``"engine"`` alone.

    Args:
        losses: A mapping from task name to loss, a sequence of losses, or a tensor ``[T]``. A loss is one number. A
            task without a loss at this step may be given as None; it, or a task whose loss has no graph while
            another's has, gets a zero row and ``stats.present[t]`` False.
        inputs: What to differentiate with respect to: tensors (parameters or activations), ``(name, tensor)`` pairs,
            a mapping, or a module (its parameters that require grad). A tensor given twice counts once. None stands
            for the leaves that at least two losses reach; where there are none, as with a single loss or losses that
            share nothing, for all leaves that a loss reaches (our choice), which makes the Gramian diagonal. The graph
            cannot tell heads from shared parameters where losses come as one tensor ``[T]`` or a whole model is
            compiled as one region: pass ``inputs`` there.
        method: How to collect:

            * ``"auto"``: segment by segment: the graph below the losses is cut where every path passes one node, and
              only one segment's gradients live at a time. For each segment a cost model chooses between all tasks at
              once (``torch.vmap``) and one after the other, and for each linear layer whether the ``T`` gradients of
              its weight are formed at all; :func:`explain` shows the choice. ``stats.method`` is "batched" if all
              shared segments were passed at once, else "blockwise". "engine" instead if an input is a DTensor;
            * ``"batched"``: the same, with all tasks at once in every segment below the heads that allows it;
            * ``"blockwise"``: the same, with one task after the other in every segment;
            * ``"sequential"``: ``T`` calls of ``torch.autograd.grad``; holds all ``T`` gradients;
            * ``"engine"``: ``T`` backwards through the leaves' accumulation, which run every hook there, with
              ``.grad`` put back afterwards; for FSDP2, whose parameters ``torch.autograd.grad`` cannot see;
            * ``"sketch"``: an unbiased estimate at a cost that does not grow with ``T``, from products ``J v`` with
              random directions; ``stats.standard_error`` says how good it is. Differentiates the backward once more.
              It pays from some tens of tasks on (benchmarks/sketch.py).
        owner: Where every task owns samples of its own (multi-domain training, packed sequences, one loss for each
            sample), whose they are: integers ``[B]`` for the samples, or ``[B, S]`` or ``[tokens]`` for the tokens, of
            a batch, each the position of a task among the losses. Then one backward of all losses holds the gradients
            of all tasks, so that this costs little more than an ordinary backward, for any ``T``
            (``stats.method`` is "disjoint"). The losses must come from one forward whose samples do not meet: models
            that mix them, as BatchNorm does in training mode, and an ``owner`` that does not fit the losses are
            refused. The first step on a model takes two more backwards, which find out how samples lie in it; whether
            ``owner`` fits the losses is checked at every step, but what a mask of attention keeps apart only then.
            :mod:`gradstats.collect.rules` says how to make layers of your own cheap. Not for ``max_bytes``.
        group_by: ``"parameter"``, ``"module"`` (the name up to its last dot) or a function of the name. Fills
            ``stats.groups`` with statistics by group, whose Gramians sum to the total. Needs named inputs.
        metric: Positive diagonal ``d``, one tensor in the shape of each input: a sequence in the order of the inputs
            or a mapping from their names. The result is the Gramian ``J diag(d) Jᵀ``.
        loss_scale: A factor that the losses carry already, such as a gradient scaler's, undone in the Gramian; a
            positive number, or a tensor of one, which is not waited for if it is on a device.
        max_bytes: Bound on the memory, in bytes, that a collection is predicted to hold at once above the graph, the
            parameters and their ``.grad``; not for "sequential" and "engine". Within it the fastest plan is followed;
            a segment whose ``T`` gradients do not fit is passed several times for a few of its parameters each.
        num_directions: With ``method="sketch"``, about how many random directions are drawn (at least 8 in every
            group); 32 if None. The relative standard error of the norms is about ``1 / sqrt(2 num_directions)``.
        seed: With ``method="sketch"``, a non-negative integer that seeds the directions; None derives it from the
            gradients, so that every step draws anew and a run repeats. The default generator is not touched.
        store_dtype: With ``method="sequential"``, the dtype that gradients are kept in until all are there; bfloat16
            halves the memory of float32 at a relative error of 2^-9 in each entry.
        unbiased: Whether to leave the noise of the minibatch out: the Gramian is then an unbiased estimate of that of
            the expected gradients, for samples that were drawn independently. A plain one holds the noise's covariance
            as well, which inflates norms and shrinks cosines. Each loss is the vector ``[B]`` of the losses of the
            samples (``reduction="none"``, averaged over all other dimensions), of the same samples in all tasks and
            each of its own sample alone; the task's loss is their mean. With ``owner`` ``[B]`` the losses of a task are
            those of its own samples, in their order. Fills ``stats.standard_error`` and ``stats.noise_trace``, from
            which ``stats.noise_scale`` follows. Where noise dominates, the estimate of a squared norm may be negative:
            ``stats.gram`` has it as it is, norm and cosines are 0. Average over steps (``GradStats.mean``), then
            derive. It costs as much as ``T * parts`` tasks. Not for "sketch", nor for BatchNorm in training mode.
        parts: With ``unbiased``, in how many parts of consecutive samples the batch is split, from 4 to ``B``; None
            for 8, or ``B`` if that is below 16. More parts give better estimates: with noise alone their standard
            errors fall as ``sqrt(parts / (parts - 1))`` does.
        retain_graph: Whether the graph is kept for another backward. Otherwise heads and segments that are passed task
            by task free it as they go, and the rest goes with the losses.

    Returns:
        The statistics; ``stats.method`` says which method was used.

    Raises:
        TypeError: If a loss, an input or a metric has a wrong type.
        ValueError: If a loss is not one number, no loss has a graph or none reaches any input, or an option does not
            fit, as its message says.
        RuntimeError: If ``method="batched"`` cannot carry this backward, or the graph has been freed.
    """
    names, tensors = args.normal_losses(losses, per_sample=unbiased)
    return _collector(unbiased, parts)(
        names,
        tensors,
        inputs,
        method=method,
        owner=owner,
        group_by=group_by,
        metric=metric,
        loss_scale=loss_scale,
        store_dtype=store_dtype,
        max_bytes=max_bytes,
        num_directions=num_directions,
        seed=seed,
        retain_graph=retain_graph,
    )


def backward(
    losses: Losses,
    weights: Weights,
    inputs: Inputs = None,
    *,
    method: str = "auto",
    owner: Tensor | None = None,
    group_by: GroupBy | None = None,
    metric: Metric | None = None,
    loss_scale: float | Tensor | None = None,
    max_bytes: int | None = None,
    num_directions: int | None = None,
    seed: int | None = None,
    store_dtype: torch.dtype | None = None,
    unbiased: bool = False,
    parts: int | None = None,
    retain_graph: bool = False,
) -> GradStats:
    """:func:`from_losses` and ``(Σ_t w_t L_t).backward()`` in one backward.

    ``.grad`` of every leaf of the graph, shared or not, an input or not, receives the weighted gradient as from an
    ordinary backward: it accumulates, and hooks on the accumulation fire once ("engine" fires them once for each task
    as well). Hooks on activations see the gradients of single tasks and so must be linear. "sequential" and "engine",
    and leaves with hooks of their own, take a second, ordinary backward.

    Args:
        losses: As for :func:`from_losses`.
        weights: ``T`` numbers, or a mapping from task name to number. Those of absent tasks do not count.
        inputs: What the Gramian is taken of, as for :func:`from_losses`.
        method: As for :func:`from_losses`.
        owner: As for :func:`from_losses`.
        group_by: As for :func:`from_losses`.
        metric: As for :func:`from_losses`.
        loss_scale: As for :func:`from_losses`; the weighted gradients keep the factor.
        max_bytes: As for :func:`from_losses`.
        num_directions: As for :func:`from_losses`.
        seed: As for :func:`from_losses`.
        store_dtype: As for :func:`from_losses`.
        unbiased: As for :func:`from_losses`; the weighted gradients are those of the mean losses.
        parts: As for :func:`from_losses`.
        retain_graph: As for :func:`from_losses`.

    Returns:
        The statistics of the unweighted gradients.

    Raises:
        TypeError: As :func:`from_losses`, or if ``weights`` is None.
        ValueError: As :func:`from_losses`, or if ``weights`` does not hold one number for each task.
        RuntimeError: As :func:`from_losses`.
    """
    if weights is None:  # which stands for no backward, one layer below
        raise TypeError("weights: expected one number per task, got None")
    names, tensors = args.normal_losses(losses, per_sample=unbiased)
    return _collector(unbiased, parts)(
        names,
        tensors,
        inputs,
        weights=weights,
        method=method,
        owner=owner,
        group_by=group_by,
        metric=metric,
        loss_scale=loss_scale,
        store_dtype=store_dtype,
        max_bytes=max_bytes,
        num_directions=num_directions,
        seed=seed,
        retain_graph=retain_graph,
    )


def _collector(unbiased: bool, parts: int | None) -> Callable[..., GradStats]:
    if unbiased:
        return functools.partial(collect_unbiased, parts=parts)
    if parts is not None:
        raise ValueError(f"parts: needs unbiased=True, got parts={parts!r}")
    return collect


def explain(
    losses: Losses,
    inputs: Inputs = None,
    *,
    method: str = "auto",
    weights: Weights | None = None,
    metric: Metric | None = None,
    max_bytes: int | None = None,
) -> Plan:
    """The plan that :func:`from_losses` would follow, or with ``weights`` :func:`backward`; nothing is computed.

    ``print(gradstats.explain(losses))`` shows it as a table: the segments from the losses downwards, whether all tasks
    pass them at once, the leaves whose gradients are taken there, and the predicted bytes and operations.

    Args:
        losses: As for :func:`from_losses`.
        inputs: As for :func:`from_losses`.
        method: "auto", "batched" or "blockwise".
        weights: As for :func:`backward`; their values do not matter.
        metric: As for :func:`from_losses`.
        max_bytes: As for :func:`from_losses`.

    Returns:
        The plan, with ``steps``, ``bytes`` and ``operations``.

    Raises:
        TypeError: As :func:`from_losses`.
        ValueError: As :func:`from_losses`, or if ``method`` is another one.
    """
    names, tensors = args.normal_losses(losses)
    present = args.present_losses(names, tensors)
    w = None if weights is None else args.normal_weights(weights, names, next(iter(present.values())).device)
    return driver.explain(
        list(present.values()),
        inputs,
        method=method,
        weights=None if w is None else w[list(present)],
        metric=metric,
        max_bytes=max_bytes,
    )


def shared_parameters(losses: Losses, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that at least two losses reach, read off the autograd graph without a backward.

    Args:
        losses: As for :func:`from_losses`.
        model: The module whose parameters are looked for.

    Returns:
        Name and parameter, in the order of ``model.named_parameters()``; empty where the losses share none.

    Raises:
        TypeError: If a loss has a wrong type.
        ValueError: If a loss is not one number or no loss has a graph.
    """
    graph = Graph(list(args.present_losses(*args.normal_losses(losses)).values()))
    named = model.named_parameters()
    return {name: p for name, p in named if p.requires_grad and graph.tasks_reaching(p).bit_count() > 1}

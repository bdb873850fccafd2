"""One collection from start to end: checks, the choice of a method, and falling back where ``vmap`` refuses."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradstats import ops
from gradstats.collect import arguments as args
from gradstats.collect.arguments import GroupBy, Inputs, Metric, Weights
from gradstats.collect.batched import collect_batched
from gradstats.collect.engine import collect_with_engine
from gradstats.collect.fold import Fold, Reduce, is_dtensor
from gradstats.collect.graph import Graph
from gradstats.collect.job import Job
from gradstats.collect.sequential import collect_sequentially
from gradstats.stats import GradStats

_log = logging.getLogger(__name__)

_METHODS = ("auto", "batched", "sequential", "engine")
_LATER_METHODS = ("blockwise", "sketch")

#: A Gramian, and the weighted gradient of each leaf where the same backward has given it.
Collected: TypeAlias = tuple[Fold, dict[Tensor, Tensor] | None]

#: What tells the graph of one model from that of another: the names of its nodes and the identities of its parameters.
Kind: TypeAlias = tuple[frozenset[str], frozenset[int]]

# The graphs whose backward vmap has refused: a cache, so that such a model is not tried again at every step.
_refused: set[Kind] = set()


def collect(
    names: Sequence[str],
    losses: Sequence[Tensor | None],
    inputs: Inputs = None,
    *,
    method: str = "auto",
    weights: Weights | None = None,
    group_by: GroupBy | None = None,
    metric: Metric | None = None,
    loss_scale: float | Tensor | None = None,
    store_dtype: torch.dtype | None = None,
    retain_graph: bool = False,
    reduce: Reduce | None = None,
) -> GradStats:
    """What :func:`from_losses` and :func:`backward` do, with the seams that the Scalarizer needs.

    Args:
        names: Names of the ``T`` tasks.
        losses: ``T`` losses, None for an absent task.
        inputs: As for :func:`from_losses`.
        method: As for :func:`from_losses`.
        weights: If given, ``Σ_t w_t ∂L_t`` is accumulated into ``.grad`` of every leaf, as by :func:`backward`.
        group_by: As for :func:`from_losses`.
        metric: As for :func:`from_losses`.
        loss_scale: As for :func:`from_losses`.
        store_dtype: As for :func:`from_losses`.
        retain_graph: As for :func:`from_losses`.
        reduce: Applied to each block ``[T, *shape]`` of gradients before it is folded into the Gramian, such as a
            mean over data-parallel ranks, so that the Gramian is that of the averaged gradients. "batched" calls it
            in the order in which the backward reaches the inputs, which is the same on all ranks whose
            :func:`signature` agrees; "sequential" once for every input in their order, whatever the losses reach.

    Returns:
        The statistics of all ``T`` tasks.
    """
    check_method(method, store_dtype)
    scale = args.normal_loss_scale(loss_scale)
    present = args.present_losses(names, losses)
    device = next(iter(present.values())).device
    w = None if weights is None else args.normal_weights(weights, names, device)[list(present)]
    graph = Graph(list(present.values()))
    if inputs is None and graph.hides_parameters:
        raise ValueError(
            "inputs: the graph holds reentrant activation checkpoints or FSDP2 modules, whose parameters it does not "
            "show; pass the model"
        )
    named = args.normal_inputs(inputs, graph)
    groups, diagonal = args.group_names(group_by, named), args.metric_operand(metric, named)
    new_fold = functools.partial(Fold, len(present), named.tensors, groups, diagonal, device, reduce)
    # Absent tasks take no part: only the finished Gramian has rows for them.
    job = Job(list(present.values()), named.tensors, graph, new_fold, w)

    # In a user's autocast region the products below must not be rounded.
    with torch.autocast(device.type, enabled=False):
        fold, method = _run(job, method, store_dtype, retain_graph)
    has_loss = torch.tensor([task in present for task in range(len(names))], device=device)
    has_both = has_loss[:, None] & has_loss
    make_stats = functools.partial(GradStats, names=tuple(names), present=has_loss, method=method)
    zeros = torch.zeros(len(names), len(names), dtype=torch.float64, device=device)
    grams = {group: zeros.masked_scatter(has_both, gram / scale**2) for group, gram in fold.grams.items()}
    by_group = {} if group_by is None else {group: make_stats(gram) for group, gram in grams.items()}
    return make_stats(torch.stack(list(grams.values())).sum(0), groups=by_group)


def signature(names: Sequence[str], losses: Sequence[Tensor | None], inputs: Inputs = None) -> int:
    """A number that two processes share only if a batched collection would do the same steps in both.

    It is derived from the names of the tasks, which of them are present, the shapes and dtypes of the inputs and the
    tasks that reach each, the names of the graph's nodes in order, and whether this process knows that vmap refuses
    them. It fits a signed 64-bit integer.
    """
    present = args.present_losses(names, losses)
    graph = Graph(list(present.values()))
    facts = [
        list(names),
        list(present),
        [(tuple(t.shape), str(t.dtype), graph.tasks_reaching(t)) for t in args.normal_inputs(inputs, graph).tensors],
        [node.name() for node in graph.children],
        _kind(graph) in _refused,
    ]
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "big")


def _run(job: Job, method: str, store_dtype: torch.dtype | None, retain_graph: bool) -> tuple[Fold, str]:
    """Collect by ``method`` and see to the weighted backward; return also the method that was used."""
    if method == "auto" and (job.graph.hides_parameters or any(is_dtensor(tensor) for tensor in job.inputs)):
        method = "engine"
    if method != "engine":
        _check_visible(job)
    if method == "auto":
        (fold, grads), method = _collect_automatically(job, retain_graph)
    else:
        fold, grads = _collect_by(method, job, store_dtype, retain_graph)
    if grads is not None:
        # Through the leaves' own accumulation, so that what hooks it (DDP, fused optimizers) fires, and once.
        torch.autograd.backward(list(grads), list(grads.values()))
    elif job.weights is not None:
        cotangents = [weight.to(loss).expand(loss.shape) for weight, loss in zip(job.weights, job.losses, strict=True)]
        torch.autograd.backward(job.losses, cotangents, retain_graph=retain_graph)
    return fold, method


def _check_visible(job: Job) -> None:
    """Refuse what ``torch.autograd.grad`` would leave out without a word.

    Raises:
        ValueError: If the graph hides parameters, or no loss reaches any input.
    """
    if job.graph.hides_parameters:
        raise ValueError(
            "method: the graph holds reentrant activation checkpoints or FSDP2 modules, whose parameters it does not "
            "show; use method='engine' with the model as inputs, or checkpoint with use_reentrant=False"
        )
    if not any(job.graph.tasks_reaching(tensor) for tensor in job.inputs):
        raise ValueError(f"inputs: no loss reaches any of the {len(job.inputs)} inputs")


def _collect_by(method: str, job: Job, store_dtype: torch.dtype | None, retain_graph: bool) -> Collected:
    keep = retain_graph or job.weights is not None
    if method == "engine":
        return collect_with_engine(job, retain_graph=keep), None
    if method == "sequential":
        return collect_sequentially(job, store_dtype=store_dtype, retain_graph=keep), None
    try:
        return _collect_batched(job, retain_graph)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(f"method: 'batched' failed on this graph; 'auto' falls back if it can. {error}") from error


def _collect_batched(job: Job, retain_graph: bool) -> Collected:
    if job.weights is not None and any(leaf._backward_hooks for leaf in job.graph.leaves.values()):
        # A user's hook on a leaf would run twice: on the block, and where the weighted sum is accumulated.
        job, retain_graph = job.without_weights(), True
    return collect_batched(job, retain_graph=retain_graph)


def _collect_automatically(job: Job, retain_graph: bool) -> tuple[Collected, str]:
    """Collect by the batched method, or by the sequential one where ``vmap`` refuses; return also which it was.

    A failed try must leave the graph whole for the method that takes over, and what worked at the last step may fail
    at this one, as when a hook was added. So the graph is kept in any case, and freed afterwards.
    """
    kind = _kind(job.graph)
    reason = None
    if kind not in _refused:
        try:
            collected = _collect_batched(job, retain_graph=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            weighted_backward_follows = job.weights is not None and collected[1] is None
            if not (retain_graph or weighted_backward_follows):
                _free(job)
            return collected, "batched"
    # What is wrong with the graph itself, such as that it has been freed, is raised here.
    collected = _collect_by("sequential", job, None, retain_graph)
    if reason is not None:
        _refused.add(kind)
        _log.warning(
            "vmap refuses the backward of this model, so gradients are collected task by task and stored "
            "(method 'sequential'; said once for a model). The reason: %s",
            reason,
        )
    return collected, "sequential"


def _free(job: Job) -> None:
    """Free what the graph has saved, as a backward does: by one without any gradient, which computes nothing."""
    # A user's hook may not expect that there is none. What is then not freed here goes with the losses.
    with contextlib.ExitStack() as hooks, contextlib.suppress(Exception):
        for root in {root for root, _ in job.graph.roots}:
            hooks.callback(root.register_prehook(lambda grads: (None,) * len(grads)).remove)
        targets = job.inputs if job.weights is None else list(job.graph.leaves.values())
        torch.autograd.grad(job.losses, targets, allow_unused=True)


def _kind(graph: Graph) -> Kind:
    parameters = [id(leaf) for leaf in graph.leaves.values() if isinstance(leaf, nn.Parameter)]
    return frozenset(node.name() for node in graph.children), frozenset(parameters)


def check_method(method: str, store_dtype: torch.dtype | None = None) -> None:
    """Refuse a method that is unknown or not built, or one that does not go with ``store_dtype``."""
    if method in _LATER_METHODS:
        raise NotImplementedError(f"method: {method!r} is not built yet; there is {', '.join(map(repr, _METHODS))}")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if store_dtype is not None and method != "sequential":
        raise ValueError(f"store_dtype: needs method='sequential', which alone stores gradients, got method={method!r}")
    if store_dtype is not None and store_dtype not in ops.DTYPES:
        raise ValueError(f"store_dtype: expected float32, bfloat16, float16 or float64, got {store_dtype}")

"""One collection from start to end: checks, the choice of a method, and falling back where ``vmap`` refuses."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

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

# What trying has shown: whether vmap takes the backward of a graph with nodes of these names. A cache, so that a
# model that it refuses is not tried again at every step, and one that it takes need not be kept for a second try.
_vmap_takes: dict[frozenset[str], bool] = {}


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
    _check_method(method, store_dtype)
    scale = args.normal_loss_scale(loss_scale)
    present = args.check_losses(names, losses)
    device = next(loss.device for loss in present if loss is not None)
    w = None if weights is None else args.normal_weights(weights, names, device)
    graph = Graph(present)
    if inputs is None and graph.hides_parameters:
        raise ValueError(
            "inputs: the graph holds reentrant activation checkpoints or FSDP2 modules, whose parameters it does not "
            "show; pass the model"
        )
    named = args.normal_inputs(inputs, graph)
    groups, diagonal = args.group_names(group_by, named), args.metric_operand(metric, named)
    new_fold = functools.partial(Fold, len(names), named.tensors, groups, diagonal, device, reduce)
    job = Job(present, named.tensors, graph, new_fold, w)

    # In a user's autocast region the products below must not be rounded.
    with torch.autocast(device.type, enabled=False):
        fold, method = _run(job, method, store_dtype, retain_graph)
    has_loss = torch.tensor([loss is not None for loss in present], device=device)
    make_stats = functools.partial(GradStats, names=tuple(names), present=has_loss, method=method)
    grams = {group: gram / scale**2 for group, gram in fold.grams.items()}
    by_group = {} if group_by is None else {group: make_stats(gram) for group, gram in grams.items()}
    return make_stats(torch.stack(list(grams.values())).sum(0), groups=by_group)


def signature(names: Sequence[str], losses: Sequence[Tensor | None], inputs: Inputs = None) -> int:
    """A number that two processes share only if a batched collection would do the same steps in both.

    It is derived from the names of the tasks, which of them are present, the shapes and dtypes of the inputs and the
    tasks that reach each, the names of the graph's nodes in order, and what this process knows of vmap's taking
    them. It fits a signed 64-bit integer.
    """
    present = args.check_losses(names, losses)
    graph = Graph(present)
    facts = [
        list(names),
        [loss is not None for loss in present],
        [(tuple(t.shape), str(t.dtype), graph.tasks_reaching(t)) for t in args.normal_inputs(inputs, graph).tensors],
        [node.name() for node in graph.children],
        _vmap_takes.get(_kind(graph)),
    ]
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "big")


def _run(job: Job, method: str, store_dtype: torch.dtype | None, retain_graph: bool) -> tuple[Fold, str]:
    """Collect by ``method`` and see to the weighted backward; return also the method that was used."""
    if method == "auto" and (job.graph.hides_parameters or any(is_dtensor(tensor) for tensor in job.inputs)):
        method = "engine"
    if method != "engine":
        _check_visible(job)
    keep = retain_graph or job.weights is not None
    grads = None
    tried = _try_batched(job, method, retain_graph) if method in ("auto", "batched") else None
    if tried is not None:
        method, (fold, grads) = "batched", tried
    elif method == "engine":
        fold = collect_with_engine(job, retain_graph=keep)
    else:
        method, fold = "sequential", collect_sequentially(job, store_dtype=store_dtype, retain_graph=keep)
    if grads is not None:
        # Through the leaves' own accumulation, so that what hooks it (DDP, fused optimizers) fires, and once.
        torch.autograd.backward(list(grads), list(grads.values()))
    elif job.weights is not None:
        cotangents = [job.weights[task].to(loss).expand(loss.shape) for task, loss in job.present]
        torch.autograd.backward([loss for _, loss in job.present], cotangents, retain_graph=retain_graph)
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


def _try_batched(job: Job, method: str, retain_graph: bool) -> tuple[Fold, dict[Tensor, Tensor] | None] | None:
    """Collect by the batched method, or return None where it cannot and ``method`` is "auto".

    The result is the Gramian and the weighted gradient of each leaf; None for the latter leaves it to the caller, with
    a graph that is kept.

    A failed try must leave the graph for the method that takes over. So the graph is kept at the first try of its
    kind, and freed afterwards, by an ordinary backward, if it was not to be kept.
    """
    kind = _kind(job.graph)
    known = _vmap_takes.get(kind)
    if method == "auto" and known is False:
        return None
    if job.weights is not None and any(leaf._backward_hooks for leaf in job.graph.leaves.values()):
        # A user's hook on a leaf would run twice: on the block, and where the weighted sum is accumulated.
        job, retain_graph = job.without_weights(), True
    keep = retain_graph or (method == "auto" and known is None)
    try:
        collected = collect_batched(job, retain_graph=keep)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:
        if method == "batched":
            raise RuntimeError(f"method: 'batched' failed on this graph; 'auto' would fall back. {reason}") from reason
        if not keep:
            raise RuntimeError(
                "method: 'batched' has worked on a graph of the same kind, but failed on this one, which is now partly "
                f"freed; pass method='sequential' or retain_graph=True. {reason}"
            ) from reason
        if False not in _vmap_takes.values():
            _log.warning(
                "vmap refuses the backward of this model, so gradients are collected task by task and stored "
                "(method 'sequential'; said once). The reason: %s: %s",
                type(reason).__name__,
                reason,
            )
        _vmap_takes[kind] = False
        return None
    _vmap_takes[kind] = True
    if keep and not retain_graph:
        losses = [loss for _, loss in job.present]
        torch.autograd.grad(losses, job.inputs, [torch.ones_like(loss) for loss in losses], allow_unused=True)
    return collected


def _kind(graph: Graph) -> frozenset[str]:
    return frozenset(node.name() for node in graph.children)


def _check_method(method: str, store_dtype: torch.dtype | None) -> None:
    if method in _LATER_METHODS:
        raise NotImplementedError(f"method: {method!r} is not built yet; there is {', '.join(map(repr, _METHODS))}")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if store_dtype is not None and method != "sequential":
        raise ValueError(f"store_dtype: needs method='sequential', which alone stores gradients, got method={method!r}")
    if store_dtype is not None and store_dtype not in args.DTYPES:
        raise ValueError(f"store_dtype: expected float32, bfloat16, float16 or float64, got {store_dtype}")

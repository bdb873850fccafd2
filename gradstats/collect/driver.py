"""One collection from start to end: checks, the choice of a method, and the weighted backward."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradstats import ops
from gradstats.collect import arguments as args
from gradstats.collect.arguments import GroupBy, Inputs, Metric, Weights
from gradstats.collect.disjoint import collect_disjoint, task_positions
from gradstats.collect.engine import collect_with_engine
from gradstats.collect.fold import Fold, Reduce, is_dtensor
from gradstats.collect.graph import Graph
from gradstats.collect.job import Job
from gradstats.collect.plan import Plan
from gradstats.collect.sequential import collect_sequentially
from gradstats.collect.sketch import collect_sketch
from gradstats.collect.walk import collect_walking, route
from gradstats.stats import GradStats, root_sum_of_squares

_METHODS = ("auto", "batched", "blockwise", "sequential", "engine", "sketch")
#: The methods that pass segments, and whether with all tasks at once; None lets the plan choose.
_BATCHED = {"auto": None, "batched": True, "blockwise": False}
_PLANNED = ", ".join(map(repr, _BATCHED))

#: A Gramian, the weighted gradient of each leaf where the same backward has given it, and the method used.
Collected: TypeAlias = tuple[Fold, dict[Tensor, Tensor] | None, str]


def collect(
    names: Sequence[str],
    losses: Sequence[Tensor | None],
    inputs: Inputs = None,
    *,
    method: str = "auto",
    owner: Tensor | None = None,
    weights: Weights | None = None,
    group_by: GroupBy | None = None,
    metric: Metric | None = None,
    loss_scale: float | Tensor | None = None,
    store_dtype: torch.dtype | None = None,
    max_bytes: int | None = None,
    num_directions: int | None = None,
    seed: int | None = None,
    retain_graph: bool = False,
    reduce: Reduce | None = None,
) -> GradStats:
    """What :func:`from_losses` and :func:`backward` do, with the seams that the Scalarizer needs.

    Args:
        names: Names of the ``T`` tasks.
        losses: ``T`` losses, None for an absent task.
        inputs: As for :func:`from_losses`.
        method: As for :func:`from_losses`.
        owner: As for :func:`from_losses`.
        weights: If given, ``Σ_t w_t ∂L_t`` is accumulated into ``.grad`` of every leaf, as by :func:`backward`.
        group_by: As for :func:`from_losses`.
        metric: As for :func:`from_losses`.
        loss_scale: As for :func:`from_losses`.
        store_dtype: As for :func:`from_losses`.
        max_bytes: As for :func:`from_losses`.
        num_directions: As for :func:`from_losses`.
        seed: As for :func:`from_losses`.
        retain_graph: As for :func:`from_losses`.
        reduce: Applied to each block ``[T, *shape]`` of gradients before it is folded into the Gramian, such as a
            mean over data-parallel ranks, so that the Gramian is that of the averaged gradients. "batched" calls it
            in the order in which the backward reaches the inputs, which is the same on all ranks whose
            :func:`signature` agrees; "sequential" once for every input in their order, whatever the losses reach.

    Returns:
        The statistics of all ``T`` tasks.
    """
    check_method(method, store_dtype, num_directions, seed)
    if owner is not None and (method != "auto" or max_bytes is not None):
        raise ValueError(
            "owner: is a way of collecting of its own, which goes with method='auto' and without max_bytes"
        )
    if max_bytes is not None and method not in _BATCHED:
        raise ValueError(f"max_bytes: bounds the methods that follow a plan ({_PLANNED}), not method={method!r}")
    scale = args.normal_loss_scale(loss_scale)
    present = args.present_losses(names, losses)
    device = next(iter(present.values())).device
    owners = None if owner is None else task_positions(owner, len(names), list(present), device)
    w = None if weights is None else args.normal_weights(weights, names, device)[list(present)]
    job = _make_job(list(present.values()), inputs, w, group_by, metric, reduce)

    # In a user's autocast region the products below must not be rounded.
    is_rounding = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if is_rounding else contextlib.nullcontext():
        sketch = functools.partial(collect_sketch, num_directions=num_directions, seed=seed)
        fold, method = _run(job, method, owners, store_dtype, max_bytes, sketch, retain_graph)
    has_loss = torch.tensor([task in present for task in range(len(names))], device=device)
    make_stats = functools.partial(GradStats, names=tuple(names), present=has_loss, method=method)
    grams, errors = (
        {group: _of_all_tasks(entries.div_(scale**2), has_loss) for group, entries in found.items()}
        for found in (fold.grams, fold.standard_errors)
    )
    shown = {} if group_by is None else grams
    return make_stats(
        functools.reduce(torch.add, grams.values()),
        standard_error=root_sum_of_squares(list(errors.values())),
        groups={group: make_stats(gram, standard_error=errors.get(group)) for group, gram in shown.items()},
    )


def _of_all_tasks(entries: Tensor, present: Tensor) -> Tensor:
    """``entries`` of the tasks that are ``present``, with zeros for the others; no copy where none is missing."""
    tasks = len(present)
    if len(entries) == tasks:
        return entries
    return entries.new_zeros(tasks, tasks).masked_scatter_(present[:, None] & present, entries)


def explain(
    losses: Sequence[Tensor],
    inputs: Inputs = None,
    *,
    method: str = "auto",
    weights: Tensor | None = None,
    metric: Metric | None = None,
    max_bytes: int | None = None,
) -> Plan:
    """The plan that :func:`collect` would follow for losses that are all present."""
    check_method(method)
    if method not in _BATCHED:
        raise ValueError(
            f"method: expected one of {', '.join(map(repr, _BATCHED))}, which follow a plan, got {method!r}"
        )
    job = _make_job(losses, inputs, weights, None, metric, None)
    _check_visible(job)
    return route(job, batched=_BATCHED[method], max_bytes=max_bytes)[1]


def _make_job(
    losses: Sequence[Tensor],
    inputs: Inputs,
    weights: Tensor | None,
    group_by: GroupBy | None,
    metric: Metric | None,
    reduce: Reduce | None,
) -> Job:
    """Absent tasks take no part: only the finished Gramian has rows for them."""
    graph = Graph(losses)
    if inputs is None and graph.hides_parameters:
        raise ValueError(
            "inputs: the graph holds reentrant activation checkpoints or FSDP2 modules, whose parameters it does not "
            "show; pass the model"
        )
    named = args.normal_inputs(inputs, graph)
    if any(graph.edge_of(tensor)[0] in graph.leaves for tensor in named.tensors if not tensor.is_leaf):
        graph = Graph(losses, through_casts=False)  # lest a leaf and its cast be one
    groups, diagonal = args.group_names(group_by, named), args.metric_operand(metric, named)
    new_fold = functools.partial(Fold, len(losses), named.tensors, groups, diagonal, losses[0].device, reduce)
    needs_gradients = bool(diagonal) or reduce is not None
    return Job(list(losses), named.tensors, graph, new_fold, weights, named.names, needs_gradients)


def signature(
    names: Sequence[str], losses: Sequence[Tensor | None], inputs: Inputs = None, sizes: Sequence[int] = ()
) -> int:
    """A number that two processes share only if a batched collection would do the same steps in both.

    It is derived from the names of the tasks, which of them are present, the shapes and dtypes of the inputs and the
    tasks that reach each, the names of the graph's nodes in order, and ``sizes``. It fits a signed 64-bit integer.
    """
    present = args.present_losses(names, losses)
    graph = Graph(list(present.values()))
    facts = [
        list(names),
        list(present),
        [(tuple(t.shape), str(t.dtype), graph.tasks_reaching(t)) for t in args.normal_inputs(inputs, graph).tensors],
        [node.name() for node in graph.children],
        list(sizes),
    ]
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "big")


def _run(
    job: Job,
    method: str,
    owners: Tensor | None,
    store_dtype: torch.dtype | None,
    max_bytes: int | None,
    sketch: Callable[..., Fold],
    retain_graph: bool,
) -> tuple[Fold, str]:
    """Collect by ``method`` and see to the weighted backward; return also the method that was used."""
    if owners is not None:
        if any(is_dtensor(tensor) for tensor in job.inputs):
            raise ValueError("owner: expected inputs that are no DTensors; leave owner out")
        method = "disjoint"
    elif method == "auto" and (job.graph.hides_parameters or any(is_dtensor(tensor) for tensor in job.inputs)):
        method = "engine"
    if method != "engine":
        _check_visible(job)
    if owners is not None:
        fold, grads = collect_disjoint(job, owners, retain_graph=retain_graph)
    else:
        fold, grads, method = _collect_by(method, job, store_dtype, max_bytes, sketch, retain_graph)
    if grads is not None:
        _accumulate(grads)
    elif job.weights is not None:
        cotangents = [weight.to(loss).expand(loss.shape) for weight, loss in zip(job.weights, job.losses, strict=True)]
        torch.autograd.backward(job.losses, cotangents, retain_graph=retain_graph)
    return fold, method


def _accumulate(grads: dict[Tensor, Tensor]) -> None:
    """Empty ``grads`` into ``.grad`` of its leaves, once, through their own accumulation, which others may hook."""
    leaves, values = list(grads), list(grads.values())
    grads.clear()
    root = _Deliver.apply(values, *leaves)  # type: ignore[no-untyped-call]  # torch does not annotate it
    torch.autograd.backward(root, torch.zeros_like(root))


class _Deliver(torch.autograd.Function):
    """Gradients that nobody else holds by the time they reach their leaves, which then need not copy them."""

    @staticmethod
    def forward(ctx: Any, values: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.values = values
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None, *ctx.values)
        ctx.values.clear()
        return grads


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


def _collect_by(
    method: str,
    job: Job,
    store_dtype: torch.dtype | None,
    max_bytes: int | None,
    sketch: Callable[..., Fold],
    retain_graph: bool,
) -> Collected:
    keep = retain_graph or job.weights is not None
    if method == "engine":
        return collect_with_engine(job, retain_graph=keep), None, method
    if method == "sketch":
        return sketch(job, retain_graph=keep), None, method
    if method == "sequential":
        return collect_sequentially(job, store_dtype=store_dtype, retain_graph=keep), None, method
    if job.weights is not None and any(leaf._backward_hooks for leaf in job.graph.leaves.values()):
        # A user's hook on a leaf would run twice: on the rows, and where the weighted sum is accumulated.
        job, retain_graph = job.without_weights(), True
    try:
        fold, grads, used = collect_walking(
            job, batched=_BATCHED[method], max_bytes=max_bytes, retain_graph=retain_graph
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if method != "batched":
            raise
        raise RuntimeError(f"method: 'batched' failed on this graph; 'auto' may not. {error}") from error
    return fold, grads, method if method == "blockwise" else used


def check_method(
    method: str,
    store_dtype: torch.dtype | None = None,
    num_directions: int | None = None,
    seed: int | None = None,
) -> None:
    """Refuse a method that is unknown, or one that does not go with the other options."""
    for name, value, least in (("num_directions", num_directions, 1), ("seed", seed, 0)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        if value is not None and method != "sketch":
            raise ValueError(f"{name}: needs method='sketch', got method={method!r}")
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if store_dtype is not None and method != "sequential":
        raise ValueError(f"store_dtype: needs method='sequential', which alone stores gradients, got method={method!r}")
    if store_dtype is not None and store_dtype not in ops.DTYPES:
        raise ValueError(f"store_dtype: expected float32, bfloat16, float16 or float64, got {store_dtype}")

"""The ways to a Gramian that ``collect.py`` compares, each as its users would write it.

A method is prepared for one :class:`~cases.Case` and then called with the features and losses of a fresh forward pass.
It returns the Gramian ``[T, T]`` of the trunk's gradients, or None where it only marks what other work costs. Peers sum
in float32, as they do in use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from cases import SHARINGS, Case, Losses
from torch import Tensor

import gradstats

Run: TypeAlias = Callable[[Tensor, Losses], Tensor | None]
Prepare: TypeAlias = Callable[[Case], Run]

TASKS_TOGETHER = ("shared", "disjoint")


def vector(losses: Losses) -> Tensor:
    """The losses as one tensor ``[T]``."""
    return losses if isinstance(losses, Tensor) else torch.stack(losses)


def by_parameter(blocks: Sequence[Tensor]) -> Tensor:
    """Sum of ``J Jᵀ`` over parameters with gradients ``[T, *shape]``."""
    total = torch.zeros(len(blocks[0]), len(blocks[0]))
    for block in blocks:
        rows = block.flatten(1)
        total.addmm_(rows, rows.T)
    return total


def gradients(case: Case, losses: Losses) -> list[tuple[Tensor, ...]]:
    """Those of each task, from as many backwards through the trunk."""
    last = len(losses) - 1
    return [torch.autograd.grad(loss, case.parameters, retain_graph=t < last) for t, loss in enumerate(losses)]


# ---- marks ----------------------------------------------------------------------------------------------------------


def plain_backward(case: Case) -> Run:
    """What a step costs without statistics."""

    def run(_: Tensor, losses: Losses) -> None:
        vector(losses).sum().backward()

    return run


def task_backwards(case: Case) -> Run:
    """T backwards through the trunk, whose gradients are dropped."""

    def run(_: Tensor, losses: Losses) -> None:
        for t, loss in enumerate(losses):
            torch.autograd.grad(loss, case.parameters, retain_graph=t + 1 < len(losses))

    return run


# ---- plain torch ----------------------------------------------------------------------------------------------------


def loop_stack(case: Case) -> Run:
    """T gradients, flattened, stacked and multiplied: LibMTL, PCGrad, Nash-MTL, FAMO, Aligned-MTL."""

    def run(_: Tensor, losses: Losses) -> Tensor:
        rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in gradients(case, losses)])
        return rows @ rows.T

    return run


def loop_by_parameter(case: Case) -> Run:
    """T gradients, multiplied one parameter at a time."""

    def run(_: Tensor, losses: Losses) -> Tensor:
        rows = gradients(case, losses)
        total = torch.zeros(len(losses), len(losses))
        for grads in zip(*rows, strict=True):
            block = torch.stack([g.flatten() for g in grads])
            total.addmm_(block, block.T)
        return total

    return run


def _batched(case: Case, losses: Losses) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        vector(losses), case.parameters, grad_outputs=torch.eye(len(losses)), is_grads_batched=True
    )


def batched_cat(case: Case) -> Run:
    """One backward for all tasks, concatenated and multiplied."""

    def run(_: Tensor, losses: Losses) -> Tensor:
        rows = torch.cat([block.flatten(1) for block in _batched(case, losses)], dim=1)
        return rows @ rows.T

    return run


def batched_by_parameter(case: Case) -> Run:
    """One backward for all tasks, multiplied one parameter at a time."""
    return lambda _, losses: by_parameter(_batched(case, losses))


def func(case: Case) -> Run:
    """torch.func's recipe for per-sample gradients; runs its own forward, as its users pay it."""
    model, values = case.trunk, {name: p.detach() for name, p in case.trunk.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return (torch.func.functional_call(model, values, (sample[None],))[0] - target).square().mean()

    def run(_: Tensor, losses: Losses) -> Tensor:
        jacobian = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
        with case.precision():
            gradients = jacobian(values, case.samples, case.targets)
        return by_parameter(list(gradients.values()))

    return run


# ---- libraries ------------------------------------------------------------------------------------------------------


def autogram(case: Case) -> Run:
    """TorchJD's engine for Gramians; between samples where losses are per sample."""
    from torchjd.autogram import Engine

    engine = Engine(case.trunk, batch_dim=None if case.heads else 0)
    return lambda _, losses: engine.compute_gramian(vector(losses))


def autojac(case: Case, *, chunk: int | None = None) -> Run:
    """TorchJD's Jacobians."""
    from torchjd.autojac import jac

    return lambda _, losses: by_parameter(jac(losses, case.parameters, parallel_chunk_size=chunk))


def mtl_backward(case: Case) -> Run:
    """TorchJD's Jacobians below the features, heads differentiated apart."""
    from torchjd.autojac import mtl_backward

    def run(features: Tensor, losses: Losses) -> Tensor:
        mtl_backward(losses, features, shared_params=case.parameters)
        gram = by_parameter([p.jac for p in case.parameters])
        for p in case.parameters:
            del p.jac
        return gram

    return run


def opacus(case: Case) -> Run:
    """Opacus' per-sample gradients."""
    from opacus import GradSampleModule

    case.trunk = GradSampleModule(case.trunk, loss_reduction="sum")

    def run(_: Tensor, losses: Losses) -> Tensor:
        vector(losses).sum().backward()
        gram = by_parameter([p.grad_sample for p in case.parameters])
        case.trunk.zero_grad()
        return gram

    return run


def backpack(case: Case) -> Run:
    """BackPACK's per-sample gradients."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    case.trunk = extend(case.trunk)

    def run(_: Tensor, losses: Losses) -> Tensor:
        with backpack(BatchGrad()):
            vector(losses).sum().backward()
        gram = by_parameter([p.grad_batch for p in case.parameters])
        for p in case.parameters:
            del p.grad_batch
        return gram

    return run


# ---- gradstats ------------------------------------------------------------------------------------------------------


def collect(case: Case, *, method: str) -> Run:
    """``gradstats.from_losses``; "auto" is told which task owns which sample, the other methods do not use it."""
    owner = case.owner if method == "auto" else None
    return lambda _, losses: gradstats.from_losses(losses, case.parameters, method=method, owner=owner).gram


def fused(case: Case) -> Run:
    """``gradstats.backward``: the Gramian and the weighted gradients of all leaves."""
    weights = torch.linspace(0.5, 1.5, case.num_tasks)
    return lambda _, losses: gradstats.backward(losses, weights, case.parameters, owner=case.owner).gram


def collect_then_backward(case: Case) -> Run:
    """The Gramian first, then a plain backward of the weighted sum: what ``fused`` saves against."""
    weights = torch.linspace(0.5, 1.5, case.num_tasks)

    def run(_: Tensor, losses: Losses) -> Tensor:
        gram = gradstats.from_losses(losses, case.parameters, owner=case.owner, retain_graph=True).gram
        (weights * vector(losses)).sum().backward()
        return gram

    return run


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        prepare: Makes it ready for a case.
        kind: "mark" (no Gramian), "peer", "ours", "step" (ours, with a backward) or "inexact" (ours).
        sharings: Where it is measured.
        own_model: Whether it changes the model or counts its forwards, so that no other method may use it.
    """

    prepare: Prepare
    kind: str
    sharings: tuple[str, ...] = SHARINGS
    own_model: bool = False


PLAIN, TASK_BACKWARDS = "backward", "task-backwards"
OURS, FUSED, APART = "gradstats", "gradstats-fused", "gradstats-then-backward"
#: In the order of tables.
METHODS = {
    PLAIN: Method(plain_backward, "mark"),
    TASK_BACKWARDS: Method(task_backwards, "mark", TASKS_TOGETHER),
    "loop-stack": Method(loop_stack, "peer", TASKS_TOGETHER),
    "loop": Method(loop_by_parameter, "peer"),
    "vmap-cat": Method(batched_cat, "peer", TASKS_TOGETHER),
    "vmap": Method(batched_by_parameter, "peer"),
    "func": Method(func, "peer", ("per-sample",)),
    "autogram": Method(autogram, "peer", own_model=True),
    "autojac": Method(autojac, "peer"),
    "autojac-loop": Method(functools.partial(autojac, chunk=1), "peer", TASKS_TOGETHER),
    "mtl-backward": Method(mtl_backward, "peer", TASKS_TOGETHER),
    "opacus": Method(opacus, "peer", ("per-sample",), own_model=True),
    "backpack": Method(backpack, "peer", ("per-sample",), own_model=True),
    OURS: Method(functools.partial(collect, method="auto"), "ours"),
    "gradstats-batched": Method(functools.partial(collect, method="batched"), "ours", TASKS_TOGETHER),
    "gradstats-blockwise": Method(functools.partial(collect, method="blockwise"), "ours", TASKS_TOGETHER),
    "gradstats-sequential": Method(functools.partial(collect, method="sequential"), "ours", TASKS_TOGETHER),
    "gradstats-sketch": Method(functools.partial(collect, method="sketch"), "inexact", TASKS_TOGETHER),
    FUSED: Method(fused, "step", TASKS_TOGETHER),
    APART: Method(collect_then_backward, "step", TASKS_TOGETHER),
}

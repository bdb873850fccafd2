"""What is timed: ``gradstats.pairwise``, and what people write by hand for want of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import gradstats
from gradstats.bench.shapes import Shape

OURS = "pairwise"


@dataclass(frozen=True)
class Gradients:
    """The same gradients in every form that a method wants; where there is one parameter, in the same memory.

    Attributes:
        rows: For each of ``T`` tasks the gradients of its ``K`` parameters.
        blocks: For each parameter the gradients of all tasks, ``[T, *param]``.
        matrix: All of them, ``[T, P]``.
    """

    rows: list[list[Tensor]]
    blocks: list[Tensor]
    matrix: Tensor

    @functools.cached_property
    def plan(self) -> gradstats.PairwisePlan:
        """Of the rows, made when it is first asked for."""
        return gradstats.PairwisePlan(self.rows)

    @staticmethod
    def random(
        shapes: Sequence[Shape], num_tasks: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Gradients:
        """Normal entries, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        blocks = [torch.randn(num_tasks, *s, dtype=dtype, device=device, generator=generator) for s in shapes]
        if len(blocks) == 1:
            matrix = blocks[0].reshape(num_tasks, -1)
            return Gradients([[row] for row in matrix], blocks, matrix)
        rows = [[block[t].clone() for block in blocks] for t in range(num_tasks)]
        return Gradients(rows, blocks, torch.cat([block.reshape(num_tasks, -1) for block in blocks], 1))


def stack_cat(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """The usual way: flatten and concatenate everything, then multiply."""
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return matrix @ matrix.T


def by_parameter(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Stack and multiply one parameter at a time, and add."""
    gram = rows[0][0].new_zeros(len(rows), len(rows))
    for grads in zip(*rows, strict=True):
        block = torch.stack([g.flatten() for g in grads])
        gram = gram + block @ block.T
    return gram


def dot_by_pair(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Two loops over tasks with ``torch.dot`` inside."""
    gram = rows[0][0].new_zeros(len(rows), len(rows))
    for i, left in enumerate(rows):
        for j, right in enumerate(rows[: i + 1]):
            dots = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]
            gram[i, j] = gram[j, i] = torch.stack(dots).sum()
    return gram


@dataclass(frozen=True)
class Method:
    """One way to a Gramian.

    Attributes:
        call: Gradients to their Gramian ``[T, T]``.
        most_tasks: With more, it is out of the question.
        tf32: Whether matrix products of float32 may round their factors to TF32.
        compiled: Whether to put it through ``torch.compile``, which takes its time.
    """

    call: Callable[[Gradients], Tensor]
    most_tasks: int = 1 << 30
    tf32: bool = False
    compiled: bool = False

    def belongs(self, num_tasks: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it makes sense there."""
        has_tf32 = device.type == "cuda" and dtype == torch.float32
        return num_tasks <= self.most_tasks and (has_tf32 or not self.tf32)


METHODS = {
    OURS: Method(lambda g: gradstats.pairwise(g.rows).gram),
    "pairwise, planned": Method(lambda g: g.plan().gram),
    "pairwise, stacked": Method(lambda g: gradstats.pairwise(g.blocks, stacked=True).gram),
    "stack(cat) @ .T": Method(lambda g: stack_cat(g.rows)),
    "mm, ready-made": Method(lambda g: torch.mm(g.matrix, g.matrix.T)),
    "mm, ready-made, TF32": Method(lambda g: torch.mm(g.matrix, g.matrix.T), tf32=True),
    "stack + mm by parameter": Method(lambda g: by_parameter(g.rows)),
    "torch.dot by pair": Method(lambda g: dot_by_pair(g.rows), most_tasks=16),
    "compiled stack + mm by parameter": Method(lambda g: by_parameter(g.rows), most_tasks=16, compiled=True),
    "compiled torch.dot by pair": Method(lambda g: dot_by_pair(g.rows), most_tasks=8, compiled=True),
}

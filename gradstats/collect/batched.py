"""One backward for all tasks: heads run once each, the shared part carries ``T`` gradients at a time under ``vmap``.

The graph is cut where the graph of one loss ends and what several losses share begins. Above the cut a gradient
belongs to one task, so one ordinary backward of all losses together computes it. Hooks at the cut gather these into
blocks ``[T, *shape]``; below, ``torch.vmap`` carries blocks. A hook on each input takes its block, folds it into the
Gramian and lets zeros without memory take its place, so that the block is freed before the next one is computed.

With weights the same backward yields ``Σ_t w_t ∂L_t``. What reaches no input needs no block there: where a gradient
enters that part, the weighted sum over tasks replaces it.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradstats.collect.fold import Fold
from gradstats.collect.graph import Edge, edge_of
from gradstats.collect.job import Job

#: Makes of a block ``[T, *shape]`` the gradient that replaces it, and the dimension of its tasks (None: it has none).
Use: TypeAlias = Callable[[Tensor], tuple[Tensor, int | None]]

#: Converts a gradient on its way from one region into another; None is a gradient that is not there (yet).
Passage: TypeAlias = Callable[[Tensor | None], Tensor | None]


class _OnBlock(torch.autograd.Function):
    """``use(block)``, where ``block`` is the physical ``[T, *shape]`` tensor that ``vmap`` carries as one gradient.

    A batching rule is the one public place where that tensor can be seen.
    """

    @staticmethod
    def forward(grad: Tensor, num_tasks: int, use: Use) -> Tensor:
        # Not batched: it is the same for each task, as when a backward returns plain zeros.
        return use(grad.expand(num_tasks, *grad.shape))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(_: Any, in_dims: tuple[int, None, None], grad: Tensor, __: int, use: Use) -> tuple[Tensor, int | None]:
        return use(grad.movedim(in_dims[0], 0))


class _Gather:
    """The gradients of several tasks for one edge, which arrive one by one, as a block."""

    def __init__(self, num_tasks: int, arrivals: int) -> None:
        self._num_tasks = num_tasks
        self._missing = arrivals
        self._block: Tensor | None = None

    def put(self, task: int, grad: Tensor | None) -> Tensor | None:
        """Add ``grad`` to its task's row; return the block with the last arrival, None (no gradient yet) before."""
        if grad is not None:
            if self._block is None:
                self._block = grad.new_zeros(self._num_tasks, *grad.shape)
            self._block[task] += grad
        self._missing -= 1
        return self._block if self._missing == 0 else None


def collect_batched(job: Job, *, retain_graph: bool) -> tuple[Fold, dict[Tensor, Tensor] | None]:
    """Collect from one backward.

    Returns:
        The Gramian, and with ``job.weights`` the weighted gradient of every leaf that has one (else None).
    """
    return _Batched(job).run(retain_graph)


class _Region(enum.Enum):
    """What a node's gradients are while the backward passes it."""

    ONE_TASK = "the gradient of the one loss that reaches the node"
    BLOCKS = "the gradients of all tasks, one beside the other"
    WEIGHTED_SUM = "their weighted sum: several losses reach the node, which reaches no input"


class _Batched:
    """One collection; holds what its hooks need."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._graph = job.graph
        self._num_tasks = len(job.losses)
        self._weights = job.weights
        self._inputs = [(k, tensor, edge_of(tensor)[0]) for k, tensor in enumerate(job.inputs)]
        self._above_inputs = job.graph.with_any_below(node for _, _, node in self._inputs)
        self._fold = job.new_fold()
        self._weighted: dict[Node, Tensor] = {}

    def run(self, retain_graph: bool) -> tuple[Fold, dict[Tensor, Tensor] | None]:
        targets = self._targets()
        losses = self._job.losses

        def pull(row: Tensor) -> Tensor:
            with contextlib.ExitStack() as hooks:
                self._hook_inputs(hooks, row)
                self._hook_passages(hooks, row)
                cotangents = [self._cotangent(task, loss, row) for task, loss in enumerate(losses)]
                grads = torch.autograd.grad(
                    losses, list(targets.values()), cotangents, retain_graph=retain_graph, allow_unused=True
                )
            if self._weights is not None:
                self._take_weighted(targets, grads)
            return row

        with warnings.catch_warnings():
            # Operators without a batching rule run task by task: no reason to alarm the user of a model.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            # "same": what a backward draws at random (a recomputed dropout mask, say) is one draw for all tasks.
            torch.vmap(pull, randomness="same")(torch.eye(self._num_tasks, device=losses[0].device))
        if self._weights is None:
            return self._fold, None
        return self._fold, {self._graph.leaves[node]: grad for node, grad in self._weighted.items()}

    def _region(self, node: Node) -> _Region:
        if not self._graph.is_shared(node):
            return _Region.ONE_TASK
        return _Region.BLOCKS if node in self._above_inputs else _Region.WEIGHTED_SUM

    def _task(self, node: Node) -> int:
        """The one task that reaches ``node``."""
        return self._graph.reached_by[node].bit_length() - 1

    def _confined(self, grad: Tensor, node: Node, row: Tensor) -> Tensor:
        """``grad``, which ``node`` hands on or receives, for the tasks that reach it; zeros for the others.

        Theirs are zeros already, unless they were multiplied by an infinite derivative.
        """
        reached_by = self._graph.reached_by[node]
        others = [row[task] for task in range(self._num_tasks) if not reached_by >> task & 1]
        return torch.where(torch.stack(others).any().to(grad.device), 0, grad) if others else grad

    # ---- the two ends of the backward ------------------------------------------------------------------------------

    def _cotangent(self, task: int, loss: Tensor, row: Tensor) -> Tensor:
        region = self._region(edge_of(loss)[0])
        if region is _Region.BLOCKS:
            return row[task].to(loss.device, loss.dtype).expand(loss.shape)
        ones = torch.ones_like(loss)
        return self._weigh(task, ones) if region is _Region.WEIGHTED_SUM and self._weights is not None else ones

    def _targets(self) -> dict[Node, Tensor]:
        """What ``torch.autograd.grad`` is asked for, and so how far the backward goes."""
        if self._weights is not None:
            return self._graph.leaves
        # An activation above other inputs is passed anyway; asking for it would keep its block alive.
        return {
            node: tensor
            for _, tensor, node in self._inputs
            if node in self._graph.children and not self._goes_on_below(node)
        }

    def _goes_on_below(self, node: Node) -> bool:
        """Whether the gradient of a tensor made by ``node`` is needed beyond that tensor."""
        children = self._graph.children[node]
        return any(self._weights is not None or child in self._above_inputs for child, _ in children)

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def _hook_inputs(self, hooks: contextlib.ExitStack, row: Tensor) -> None:
        """Fold in each input's gradients where they arrive."""
        for k, tensor, node in self._inputs:
            if node in self._graph.children:
                handle = tensor.register_hook(self._input_hook(k, node, row))  # type: ignore[no-untyped-call]
                hooks.callback(handle.remove)

    def _input_hook(self, k: int, node: Node, row: Tensor) -> Callable[[Tensor | None], Tensor | None]:
        weighted_leaf = self._weights is not None and node in self._graph.leaves
        goes_on = self._goes_on_below(node)

        def fold_row(grad: Tensor) -> None:
            self._fold.add_row(k, self._task(node), grad)
            if weighted_leaf:
                self._weighted[node] = self._weigh(self._task(node), grad)

        def fold_block(block: Tensor) -> tuple[Tensor, None]:
            self._fold.add_block(k, block)
            if weighted_leaf:
                self._weighted[node] = self._combine(block)
            # Zeros without memory: whoever holds the gradient from here on must not hold the block.
            return block.new_zeros(()).expand(block.shape[1:]), None

        def hook(grad: Tensor | None) -> Tensor | None:
            if grad is None:  # a custom backward may return nothing for an input
                return None
            if self._region(node) is _Region.ONE_TASK:
                fold_row(grad)
                folded = grad.new_zeros(()).expand(grad.shape)
            else:
                folded = self._on_block(self._confined(grad, node, row), fold_block)
            return None if goes_on else folded

        return hook

    def _hook_passages(self, hooks: contextlib.ExitStack, row: Tensor) -> None:
        """Convert gradients where they flow into another region, or to where more tasks meet."""
        gathers = {edge: _Gather(self._num_tasks, count) for edge, count in self._arrivals().items()}
        for node in self._graph.children:
            passages = {}
            for i, (child, slot) in enumerate(node.next_functions):
                if child is not None and self._enters(node, child):
                    passages[i] = self._passage(node, (child, slot), gathers, row)
            if passages:
                hooks.callback(node.register_hook(functools.partial(_apply_passages, passages)).remove)

    def _enters(self, node: Node, child: Node) -> bool:
        """Whether a gradient that is wanted flows from ``node`` into another region, or to more tasks, at ``child``."""
        region = self._region(child)
        if region is _Region.WEIGHTED_SUM and self._weights is None:
            return False
        grows = region is _Region.BLOCKS and self._graph.reached_by[child] != self._graph.reached_by[node]
        return grows or region is not self._region(node)

    def _arrivals(self) -> Counter[Edge]:
        """How many gradients of single tasks arrive at each edge into the region of blocks."""
        arrivals: Counter[Edge] = Counter()
        for node, edges in self._graph.children.items():
            if self._region(node) is _Region.ONE_TASK:
                arrivals.update(edge for edge in edges if self._region(edge[0]) is _Region.BLOCKS)
        return arrivals

    def _passage(self, node: Node, edge: Edge, gathers: dict[Edge, _Gather], row: Tensor) -> Passage:
        """What becomes of a gradient that flows from ``node`` through ``edge``, as :meth:`_enters` tells."""

        def gather(grad: Tensor | None) -> Tensor | None:
            block = gathers[edge].put(self._task(node), grad)
            return None if block is None else self._on_block(row, lambda _: (block, 0))

        def weigh(grad: Tensor | None) -> Tensor | None:
            return None if grad is None else self._weigh(self._task(node), grad)

        def confine(grad: Tensor | None) -> Tensor | None:
            return None if grad is None else self._confined(grad, node, row)

        def combine(grad: Tensor | None) -> Tensor | None:
            confined = confine(grad)
            return None if confined is None else self._on_block(confined, lambda block: (self._combine(block), None))

        if self._region(node) is _Region.ONE_TASK:
            return gather if self._region(edge[0]) is _Region.BLOCKS else weigh
        return confine if self._region(edge[0]) is _Region.BLOCKS else combine

    def _on_block(self, grad: Tensor, use: Use) -> Tensor:
        result: Tensor = _OnBlock.apply(grad, self._num_tasks, use)  # type: ignore[no-untyped-call]
        return result

    # ---- the weighted sum ------------------------------------------------------------------------------------------

    def _take_weighted(self, targets: dict[Node, Tensor], grads: Sequence[Tensor | None]) -> None:
        """Add the leaves that are not inputs, whose hooks have not seen to it."""
        for node, grad in zip(targets, grads, strict=True):
            if grad is not None and node not in self._weighted:
                summed = self._region(node) is _Region.WEIGHTED_SUM
                self._weighted[node] = grad if summed else self._weigh(self._task(node), grad)

    def _weigh(self, task: int, grad: Tensor) -> Tensor:
        return self._combine(grad[None], slice(task, task + 1))

    def _combine(self, block: Tensor, tasks: slice = slice(None)) -> Tensor:
        """``Σ_t w_t block_t``, accumulated in float32 at least."""
        assert self._weights is not None
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        total: Tensor = torch.tensordot(self._weights[tasks].to(wide), wide, 1)
        return total.to(block.dtype)


def _apply_passages(
    passages: dict[int, Passage], grads: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The body of a hook that runs after a node, on the gradients that leave it."""
    return tuple(passages[i](grad) if i in passages else grad for i, grad in enumerate(grads))

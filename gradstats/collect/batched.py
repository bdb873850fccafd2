"""One backward for all tasks: heads run once each, the shared part carries ``T`` gradients at a time under ``vmap``.

The graph is cut where the graph of one loss ends and what several losses share begins. Above the cut a gradient
belongs to one task, so one ordinary backward of all losses together computes it. Hooks at the cut gather these into
blocks ``[T, *shape]``; below, ``torch.vmap`` carries blocks. A hook on each input takes its block, folds it into the
Gramian and lets zeros without memory take its place, so that the block is freed before the next one is computed.

With weights the same backward yields ``Σ_t w_t ∂L_t``. What reaches no input needs no block there: where a gradient
enters that part, the weighted sum over tasks replaces it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from gradstats.collect.fold import Fold
from gradstats.collect.graph import Edge, edge_of
from gradstats.collect.job import Job

#: Makes of a block ``[T, *shape]`` the gradient that replaces it, and the dimension of its tasks (None: it has none).
Use: TypeAlias = Callable[[Tensor], tuple[Tensor, int | None]]


class _OnBlock(torch.autograd.Function):
    """``use(block)``, where ``block`` is the physical ``[T, *shape]`` tensor that ``vmap`` carries as one gradient.

    A batching rule is the one public place where that tensor can be seen.
    """

    @staticmethod
    def forward(grad: Tensor, use: Use) -> Tensor:
        raise AssertionError("only called with batched gradients")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], grad: Tensor, use: Use) -> tuple[Tensor, int | None]:
        assert in_dims[0] is not None
        return use(grad.movedim(in_dims[0], 0))


class _Gather:
    """The gradients of several tasks for one edge, which arrive one by one, as a block."""

    def __init__(self, num_tasks: int, arrivals: int) -> None:
        self._num_tasks = num_tasks
        self._missing = arrivals
        self._block: Tensor | None = None

    def put(self, task: int, grad: Tensor | None, any_batched: Tensor) -> Tensor | None:
        """Add ``grad`` to its row; the last arrival returns the whole, the others None (no gradient yet)."""
        if grad is not None:
            if self._block is None:
                self._block = grad.new_zeros(self._num_tasks, *grad.shape)
            self._block[task] += grad
        self._missing -= 1
        if self._missing or self._block is None:
            return None
        block, self._block = self._block, None
        return on_block(any_batched, lambda _: (block, 0))


def on_block(grad: Tensor, use: Use) -> Tensor:
    """Apply ``use`` to the block behind a batched gradient."""
    result: Tensor = _OnBlock.apply(grad, use)
    return result


def collect_batched(job: Job, *, retain_graph: bool) -> Fold:
    """Collect from one backward, ``job.weights`` included."""
    return _Batched(job).run(retain_graph)


class _Batched:
    """One collection; holds what its hooks need."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._graph = job.graph
        self._weights = job.weights
        self._inputs = {edge_of(tensor): (k, tensor) for k, tensor in enumerate(job.inputs)}
        self._above_inputs = self._graph.with_any_below(node for node, _ in self._inputs)
        self._batched = {node for node in self._above_inputs if self._graph.is_shared(node)}
        self._fold = job.new_fold()
        self._weighted: dict[Node, Tensor] = {}

    def run(self, retain_graph: bool) -> Fold:
        targets = self._targets()
        present = self._job.present

        def pull(row: Tensor) -> Tensor:
            handles = [*self._hook_inputs(), *self._hook_cut(row)]
            try:
                grads = torch.autograd.grad(
                    [loss for _, loss in present],
                    list(targets.values()),
                    [self._cotangent(task, loss, row) for task, loss in present],
                    retain_graph=retain_graph,
                    allow_unused=True,
                )
            finally:
                for handle in handles:
                    handle.remove()
            if self._weights is not None:
                self._take_weighted(targets, grads)
            return row

        identity = torch.eye(self._fold.num_tasks, device=present[0][1].device)
        # "same": what a backward draws at random (a recomputed dropout mask, say) is one draw for all tasks.
        torch.vmap(pull, randomness="same")(identity)
        if self._weighted:
            # Through the leaves' own accumulation, so that what hooks it (DDP, fused optimizers) fires, and once.
            torch.autograd.backward(
                [self._graph.leaves[node] for node in self._weighted], list(self._weighted.values())
            )
        return self._fold

    def _targets(self) -> dict[Node, Tensor]:
        """What ``torch.autograd.grad`` is asked for, and so how far the backward goes."""
        if self._weights is not None:
            return self._graph.leaves
        # An activation above other inputs is passed anyway; asking for it would keep its block alive.
        return {
            node: tensor
            for (node, _), (_, tensor) in self._inputs.items()
            if node in self._graph.children and not self._flows_on(node)
        }

    def _flows_on(self, node: Node) -> bool:
        children = self._graph.children[node]
        return any(child in self._above_inputs for child, _ in children) or (
            self._weights is not None and bool(children)
        )

    def _cotangent(self, task: int, loss: Tensor, row: Tensor) -> Tensor:
        root = edge_of(loss)[0]
        if root in self._batched:
            return row[task].to(loss.device, loss.dtype).expand(loss.shape)
        ones = torch.ones_like(loss)
        return self._weigh(task, ones) if self._graph.is_shared(root) else ones

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def _hook_inputs(self) -> list[RemovableHandle]:
        return [
            tensor.register_hook(self._input_hook(k, node))
            for (node, _), (k, tensor) in self._inputs.items()
            if node in self._graph.children
        ]

    def _input_hook(self, k: int, node: Node) -> Callable[[Tensor], Tensor | None]:
        shared, flows_on, is_leaf = node in self._batched, self._flows_on(node), node in self._graph.leaves
        task = self._graph.reached_by[node].bit_length() - 1

        def fold_block(block: Tensor) -> tuple[Tensor, None]:
            self._fold.add_block(k, block)
            if is_leaf and self._weights is not None:
                self._weighted[node] = self._combine(block)
            return _no_memory_zeros(block[0]), None

        def hook(grad: Tensor) -> Tensor | None:
            if shared:
                zeros = on_block(grad, fold_block)
            else:
                self._fold.add_row(k, task, grad)
                if is_leaf and self._weights is not None:
                    self._weighted[node] = self._weigh(task, grad)
                zeros = _no_memory_zeros(grad)
            return None if flows_on else zeros

        return hook

    def _hook_cut(self, row: Tensor) -> list[RemovableHandle]:
        """Hook the nodes from which gradients flow into another kind of region."""
        gathers = {edge: _Gather(self._fold.num_tasks, count) for edge, count in self._arrivals().items()}
        handles = []
        for node in self._graph.children:
            crossing = [(i, edge) for i, edge in enumerate(node.next_functions) if self._crosses(node, edge[0])]
            if crossing:
                handles.append(node.register_hook(self._cut_hook(node, crossing, gathers, row)))
        return handles

    def _arrivals(self) -> Counter[Edge]:
        """How many gradients of single tasks arrive at each edge into the batched region."""
        arrivals: Counter[Edge] = Counter()
        for node, edges in self._graph.children.items():
            if not self._graph.is_shared(node):
                arrivals.update(edge for edge in edges if edge[0] in self._batched)
        return arrivals

    def _crosses(self, node: Node, child: Node | None) -> bool:
        if child is None or not self._graph.is_shared(child):
            return False
        if child in self._batched:
            return not self._graph.is_shared(node)
        return self._weights is not None and (node in self._batched or not self._graph.is_shared(node))

    def _cut_hook(
        self, node: Node, crossing: list[tuple[int, Edge]], gathers: dict[Edge, _Gather], row: Tensor
    ) -> Callable[..., tuple[Tensor | None, ...]]:
        from_batched = node in self._batched
        task = self._graph.reached_by[node].bit_length() - 1

        def hook(grad_inputs: tuple[Tensor | None, ...], _: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            grads = list(grad_inputs)
            for i, edge in crossing:
                grad = grads[i]
                if edge in gathers:
                    grads[i] = gathers[edge].put(task, grad, row)
                elif grad is not None:
                    grads[i] = (
                        on_block(grad, lambda block: (self._combine(block), None))
                        if from_batched
                        else self._weigh(task, grad)
                    )
            return tuple(grads)

        return hook

    # ---- the weighted sum -----------------------------------------------------------------------------------------

    def _take_weighted(self, targets: dict[Node, Tensor], grads: Sequence[Tensor | None]) -> None:
        """Add the leaves that are not inputs, whose hooks have not seen to it."""
        for node, grad in zip(targets, grads, strict=True):
            if grad is not None and node not in self._weighted:
                shared = self._graph.is_shared(node)
                self._weighted[node] = (
                    grad if shared else self._weigh(self._graph.reached_by[node].bit_length() - 1, grad)
                )

    def _weigh(self, task: int, grad: Tensor) -> Tensor:
        return grad if self._weights is None else grad * self._weights[task].to(grad)

    def _combine(self, block: Tensor) -> Tensor:
        """``Σ_t w_t block_t``, accumulated in float32 at least."""
        assert self._weights is not None
        wide = block.to(torch.promote_types(block.dtype, torch.float32))
        return torch.tensordot(self._weights.to(wide), wide, 1).to(block.dtype)


def _no_memory_zeros(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)

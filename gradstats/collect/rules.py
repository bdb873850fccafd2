"""Rules: how the gradient of a parameter splits into rows, for the autograd nodes that consume parameters.

A collection sees a graph, not modules, so a rule belongs to a node name. It says that the gradient of one operand is a
sum over rows ``n`` (samples or tokens) of something that is linear in what the forward saved for that row (``left``)
and in the cotangent of that row at the node's output (``right``). That is what it takes to split one backward by the
owners of the rows, or to get inner products of gradients without forming them. A node without a rule is collected in a
general, slower way, so a rule is never needed for a right result. To add one::

    from gradstats.collect.rules import Rows, rule

    @rule("MyLinearBackward")  # the name of a torch.autograd.Function's node, as node.name() gives it
    def my_linear(node, child, shape):
        if child != 1:  # the operand for which the gradient is asked: an index into node.next_functions
            return None  # no rule for this one
        (x,) = node.saved_tensors
        return Rows.outer_products(x, transposed=True)  # weight [o, k], applied to x [N, k] as x @ weight.T
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from gradstats.collect.graph import Graph

#: What the forward saved of a node, of any name: ``node._saved_mat1`` and the like, as torch's notes on autograd show.
AnyNode: TypeAlias = Any


@dataclass(frozen=True)
class Rows:
    """The gradient of one operand of a node as a sum over ``N`` rows.

    Leading dimensions ``*`` are free, such as the tasks' where each has a cotangent of its own.

    Attributes:
        left: What the forward saved, ``[N, ...]``: of an outer product ``[N, k]``, or the integers ``[N]`` that stand
            for rows of an identity matrix (an embedding's indices); None where all that matters is in ``right``.
        right: Makes of the cotangent at the node's output, ``[*, *output]``, the right factors ``[*, N, ...]``.
        contract: Makes of ``left`` and ``right``, ``[n, ...]`` and ``[*, n, ...]``, the sum over these rows
            ``[*, *operand]``.
        outer: Whether the gradient is the plain sum of the outer products of ``left [N, k]`` and ``right [*, N, o]``,
            so that the inner product of two gradients is ``Σ_nm (left leftᵀ)_nm (right rightᵀ)_nm``.
        arrange: Where that holds, makes of the product ``rightᵀ left``, ``[*, o, k]``, the gradient ``[*, *operand]``.
            None where nothing does: plans then form the gradients.
        unfold: Where that holds for more rows, ``m`` for each of the ``N`` (a convolution's positions): makes of
            ``right [N, o, ...]``, with ``m`` entries after the second dimension, ``left [N m, k]`` and
            ``right [N m, o]``. None where it does not hold.
    """

    left: Tensor | None
    right: Callable[[Tensor], Tensor]
    contract: Callable[[Tensor | None, Tensor], Tensor]
    outer: bool = False
    arrange: Callable[[Tensor], Tensor] | None = None
    unfold: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def outer_products(cls, left: Tensor, *, transposed: bool = False, by_column: bool = False) -> Rows:
        """The operand ``[k, o]`` (``[o, k]`` if transposed) of a product with ``left [N, k]`` that is ``[N, o]``.

        With ``by_column`` the gradient ``[k, o]`` lies in memory as the ``[o, k]`` that the operand is a transpose of.
        """

        def contract(left: Tensor | None, right: Tensor) -> Tensor:
            assert left is not None
            if transposed:
                return right.mT @ left
            return (right.mT @ left).mT if by_column else left.mT @ right

        def arrange(product: Tensor) -> Tensor:
            return product if transposed else product.mT

        return cls(left, lambda grad: grad, contract, outer=True, arrange=arrange)

    @classmethod
    def summed(cls, right: Callable[[Tensor], Tensor], shape: torch.Size) -> Rows:
        """An operand of any shape whose gradient is the sum of ``right``, ``[*, N, o]``."""
        return cls(None, right, lambda _, right: right.sum(-2).reshape((*right.shape[:-2], *shape)))


#: ``(node, child, shape)`` -> the rows of operand ``child`` of ``node``, a tensor of that shape, or None.
Rule: TypeAlias = Callable[[AnyNode, int, torch.Size], Rows | None]

_rules: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator that registers a rule for the nodes of these names; the latest rule for a name counts.

    The rule is called with the node, an index ``child`` into ``node.next_functions``, and the shape of the operand of
    the forward that this stands for, and returns :class:`Rows` or, where it does not fit, None.

    Args:
        names: As ``node.name()`` gives them, such as ``"AddmmBackward0"``.
    """

    def register(function: Rule) -> Rule:
        _rules.update(dict.fromkeys(names, function))
        return function

    return register


# ---- where a parameter is used ---------------------------------------------------------------------------------------

#: How nodes that only rearrange or cast an operand take its gradient back; see :class:`Use`.
_PASS_BACK: dict[str, Callable[[AnyNode, Tensor], Tensor]] = {
    "TBackward0": lambda node, grad: grad.mT,
    "ToCopyBackward0": lambda node, grad: grad,
    "AliasBackward0": lambda node, grad: grad,
    "TransposeBackward0": lambda node, grad: grad.transpose(node._saved_dim0, node._saved_dim1),
    "PermuteBackward0": lambda node, grad: grad.permute(_inverse(node._saved_dims, grad.ndim)),
    "ViewBackward0": lambda node, grad: grad.reshape(node._saved_self_sym_sizes),
    "UnsafeViewBackward0": lambda node, grad: grad.reshape(node._saved_self_sym_sizes),
    "ReshapeAliasBackward0": lambda node, grad: grad.reshape(node._saved_self_sym_sizes),
    "UnsqueezeBackward0": lambda node, grad: grad.squeeze(_signed(node._saved_dim)),
}


def _inverse(dims: Iterable[int], ndim: int) -> list[int]:
    order = [_signed(dim) % ndim for dim in dims]
    return [order.index(dim) for dim in range(ndim)]


def _signed(number: int) -> int:
    """A saved number that may be negative, which autograd nodes show modulo 2^64."""
    return number - 2**64 if number >= 2**63 else number


@dataclass(frozen=True)
class Use:
    """One place in the graph where a leaf is consumed.

    Attributes:
        node: The node of the operation.
        child: Which of its operands the leaf is: an index into ``node.next_functions``.
        path: The nodes in between, from ``node`` downwards, which only rearrange or cast (``weight.t()``, autocast).
    """

    node: Node
    child: int
    path: tuple[Node, ...]

    def restore(self, grad: Tensor) -> Tensor:
        """The gradient of the leaf, from that of the operand."""
        for node in self.path:
            grad = _PASS_BACK[node.name()](node, grad)
        return grad

    def rows(self, leaf: Tensor) -> Rows | None:
        """The rows of the operand's gradient, None where there is no rule for it; ``leaf`` is what is used here."""
        found = _rules.get(self.node.name())
        # No public attribute gives the shape of what a node made, and a view saves only what it was made from.
        shape = torch.Size(self.path[0]._input_metadata[0].shape) if self.path else leaf.shape
        return None if found is None else found(self.node, self.child, shape)


def uses(graph: Graph) -> dict[Node, list[Use]]:
    """Where each leaf below some losses is consumed, by its node in ``graph.leaves``, from the losses downwards."""
    found: dict[Node, list[Use]] = {}
    for node in graph.children:
        if node.name() in _PASS_BACK:
            continue  # on the path of the uses above it
        for i, (child, _) in enumerate(node.next_functions):
            path = []
            while child is not None and child not in graph.leaves and child.name() in _PASS_BACK:
                path.append(child)
                child = child.next_functions[0][0]
            if child in graph.leaves:
                found.setdefault(child, []).append(Use(node, i, tuple(path)))
    return found


# ---- linear layers and embeddings ------------------------------------------------------------------------------------


@rule("AddmmBackward0")
def _addmm(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    if node._saved_alpha != 1 or node._saved_beta != 1:
        return None
    if child == 0:
        return Rows.summed(lambda grad: grad, shape) if len(shape) == 1 and shape[0] > 1 else None
    return Rows.outer_products(node._saved_mat1, by_column=_is_by_column(node)) if child == 2 else None


@rule("MmBackward0")
def _mm(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    return Rows.outer_products(node._saved_self, by_column=_is_by_column(node)) if child == 1 else None


def _is_by_column(node: AnyNode) -> bool:
    """Whether the second matrix of a product is a transpose, as the weight of ``nn.Linear``."""
    return bool(node._saved_mat2_sym_strides[0] == 1)


@rule("BmmBackward0")
def _bmm(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    if child != 1 or shape[0] != 1:  # einsum multiplies by a weight as a batch of one
        return None
    plain = Rows.outer_products(node._saved_self[0])
    return Rows(
        plain.left,
        lambda grad: grad.squeeze(-3),
        lambda left, right: plain.contract(left, right).unsqueeze(-3),
        outer=True,
        arrange=lambda product: product.mT.unsqueeze(-3),
    )


@rule("EmbeddingBackward0")
def _embedding(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    if node._saved_scale_grad_by_freq:
        return None
    indices = node._saved_indices
    padding = indices.flatten() == _signed(node._saved_padding_idx)

    def right(grad: Tensor) -> Tensor:
        rows = grad.reshape(*grad.shape[: grad.ndim - indices.ndim - 1], indices.numel(), shape[-1])
        return rows.masked_fill(padding[:, None], 0)

    def contract(left: Tensor | None, right: Tensor) -> Tensor:
        assert left is not None
        return right.new_zeros(*right.shape[:-2], *shape).index_add_(-2, left, right)

    return Rows(indices.flatten(), right, contract, outer=True)


# ---- operands that are broadcast: biases, scales, positions ----------------------------------------------------------


@rule("AddBackward0")
def _add(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    if child == 1 and node._saved_alpha != 1:
        return None
    return _broadcast(node, shape, lambda grad: grad)


@rule("MulBackward0")
def _mul(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    factor = node._saved_self if child == 1 else node._saved_other
    return _broadcast(node, shape, lambda grad: grad * factor)


def _broadcast(node: AnyNode, shape: torch.Size, product: Callable[[Tensor], Tensor]) -> Rows | None:
    """The rows of an operand that is repeated over the first dimensions of the output, and maybe over later ones."""
    output = torch.Size(node._input_metadata[0].shape)
    padded = (*(1,) * (len(output) - len(shape)), *shape)
    first = next((i for i, size in enumerate(padded) if size != 1), len(padded))
    if output[:first].numel() == 1:
        return None
    repeated = [i - len(output) for i in range(first, len(output)) if padded[i] != output[i]]

    def right(grad: Tensor) -> Tensor:
        grad = product(grad)
        if repeated:
            grad = grad.sum(repeated, keepdim=True)
        return grad.reshape(*grad.shape[: grad.ndim - len(output)], output[:first].numel(), shape.numel())

    return Rows.summed(right, shape)


# ---- normalisation ---------------------------------------------------------------------------------------------------


@rule("NativeLayerNormBackward0")
def _layer_norm(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    x, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2

    def right(grad: Tensor) -> Tensor:
        if child == 1:
            grad = (x - mean).mul_(rstd) * grad
        return grad.reshape(*grad.shape[: grad.ndim - x.ndim], -1, shape.numel())

    return Rows.summed(right, shape)


@rule("FusedRmsNormBackward0")
def _rms_norm(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    x, rstd = node._saved_input, node._saved_result1
    return Rows.summed(
        lambda grad: (x * rstd * grad).reshape(*grad.shape[: grad.ndim - x.ndim], -1, shape.numel()), shape
    )


@rule("NativeGroupNormBackward0")
def _group_norm(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    x = node._saved_input
    by_group = (*node._saved_result1.shape, -1)
    mean, rstd = node._saved_result1[..., None], node._saved_result2[..., None]
    return _by_channel(x, lambda: (x.reshape(by_group) - mean).mul_(rstd).view(x.shape), child, shape)


@rule("NativeBatchNormBackward0")
def _batch_norm(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    if node._saved_training:  # which mixes samples
        return None
    x, by_channel = node._saved_input, (-1, *(1,) * (node._saved_input.ndim - 2))
    mean, variance = node._saved_running_mean.view(by_channel), node._saved_running_var.view(by_channel)
    return _by_channel(x, lambda: (x - mean) * (variance + node._saved_eps).rsqrt(), child, shape)


def _by_channel(x: Tensor, normalised: Callable[[], Tensor], child: int, shape: torch.Size) -> Rows:
    """The weight (child 1) or the bias of a norm of ``x [N, C, ...]``: for each sample the sum over its positions."""

    def right(grad: Tensor) -> Tensor:
        if child == 1:
            grad = normalised() * grad
        return grad.reshape(*grad.shape[: grad.ndim - x.ndim + 2], -1).sum(-1)

    return Rows.summed(right, shape)


# ---- convolutions ----------------------------------------------------------------------------------------------------


@rule("ConvolutionBackward0")
def _convolution(node: AnyNode, child: int, shape: torch.Size) -> Rows | None:
    x, weight = node._saved_input, node._saved_weight
    if child == 2:
        return Rows.summed(lambda grad: grad.reshape(*grad.shape[: grad.ndim - x.ndim + 2], -1).sum(-1), shape)
    if child != 1:
        return None
    geometry = (node._saved_stride, node._saved_padding, node._saved_dilation)
    kind = (node._saved_transposed, node._saved_output_padding, node._saved_groups)

    def contract(left: Tensor | None, right: Tensor) -> Tensor:
        if right.ndim > x.ndim:
            return torch.stack([contract(left, one) for one in right])
        mask = [False, True, False]
        grad: Tensor = torch.ops.aten.convolution_backward(right, left, weight, None, *geometry, *kind, mask)[1]
        return grad

    def unfold(right: Tensor) -> tuple[Tensor, Tensor]:
        stride, padding, dilation = geometry
        patches = torch.nn.functional.unfold(x, shape[2:], dilation=dilation, padding=padding, stride=stride)
        return patches.mT.flatten(0, 1), right.flatten(2).mT.flatten(0, 1)

    has_patches = x.ndim == 4 and not node._saved_transposed and node._saved_groups == 1
    return Rows(x, lambda grad: grad, contract, unfold=unfold if has_patches else None)

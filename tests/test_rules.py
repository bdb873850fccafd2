"""Rules against the gradients that autograd itself computes, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional

from gradstats.collect import rules
from gradstats.collect.graph import Graph, edge_of
from gradstats.collect.rules import Rows, rule, uses

pytestmark = pytest.mark.usefixtures("one_thread")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def random(module: nn.Module) -> nn.Module:
    """In float64, with no weight left at 1 or 0."""
    module = module.double()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + 0.5)
    return module


def flat() -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64)


def tokens() -> Tensor:
    return torch.randn(4, 5, 6, dtype=torch.float64)


def image(channels: int = 4) -> Tensor:
    return torch.randn(3, channels, 7, 6, dtype=torch.float64)


def indices() -> Tensor:
    return torch.randint(0, 9, (4, 5))


def applied(module: nn.Module, make: Callable[[], Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    module, x = random(module), make()
    return lambda: module(x), list(module.parameters())


def with_weight(
    shape: tuple[int, ...], apply: Callable[[Tensor, Tensor], Tensor], make: Callable[[], Tensor]
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    weight, x = parameter(*shape), make()
    return lambda: apply(x, weight), [weight]


def conv(cls: Any, *spatial: int, **options: Any) -> tuple[Callable[[], Tensor], list[Tensor]]:
    return applied(cls(4, 8, 3, **options), lambda: torch.randn(3, 4, *spatial, dtype=torch.float64))


CASES: dict[str, Callable[[], tuple[Callable[[], Tensor], list[Tensor]]]] = {
    "linear": lambda: applied(nn.Linear(6, 7), flat),
    "linear on tokens": lambda: applied(nn.Linear(6, 7), tokens),
    "linear on strided tokens": lambda: applied(nn.Linear(6, 7), lambda: tokens().transpose(0, 1)),
    "linear, no bias": lambda: applied(nn.Linear(6, 7, bias=False), tokens),
    "linear on a vector": lambda: applied(nn.Linear(6, 7), lambda: flat()[0]),
    "matmul": lambda: with_weight((6, 7), torch.matmul, tokens),
    "addmm": lambda: with_weight((6, 7), lambda x, w: torch.addmm(torch.zeros(7).double(), x, w), flat),
    "einsum": lambda: with_weight((7, 6), lambda x, w: torch.einsum("bsk,ok->bso", x, w), tokens),
    "embedding": lambda: applied(nn.Embedding(9, 6), indices),
    "embedding with padding": lambda: applied(nn.Embedding(9, 6, padding_idx=3), indices),
    "sparse embedding": lambda: applied(nn.Embedding(9, 6, sparse=True), indices),
    "bias after": lambda: with_weight((6,), torch.add, tokens),
    "bias before": lambda: with_weight((6,), lambda x, b: b + x, tokens),
    "positions": lambda: with_weight((1, 5, 6), torch.add, tokens),
    "scale": lambda: with_weight((6,), torch.mul, tokens),
    "scale before": lambda: with_weight((6,), lambda x, w: w * x, tokens),
    "scale of channels": lambda: with_weight((4, 1, 1), torch.mul, image),
    "scalar": lambda: with_weight((), torch.mul, tokens),
    "layer norm": lambda: applied(nn.LayerNorm(6), tokens),
    "layer norm over two": lambda: applied(nn.LayerNorm((5, 6)), tokens),
    "group norm": lambda: applied(nn.GroupNorm(2, 4), image),
    "rms norm": lambda: applied(nn.RMSNorm(6), tokens),
    "batch norm in eval mode": lambda: applied(nn.BatchNorm2d(4).eval(), image),
    "conv1d": lambda: conv(nn.Conv1d, 9, padding=1),
    "conv2d": lambda: conv(nn.Conv2d, 9, 8, stride=2, padding=1, dilation=2),
    "conv2d, grouped": lambda: conv(nn.Conv2d, 9, 8, groups=2),
    "conv2d, depthwise": lambda: conv(nn.Conv2d, 9, 8, groups=4),
    "conv3d": lambda: conv(nn.Conv3d, 5, 6, 7),
    "transposed conv": lambda: conv(nn.ConvTranspose2d, 5, 6, stride=2),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_sum_to_the_gradient(case: str) -> None:
    torch.manual_seed(0)
    apply, leaves = CASES[case]()
    loss = (apply() ** 2).sum()
    graph = Graph([loss])
    found = uses(graph)
    for leaf in leaves:
        (want,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (use,) = found[edge_of(leaf)[0]]
        (cotangent,) = torch.autograd.grad(loss, [GradientEdge(use.node, 0)], retain_graph=True)
        rows = use.rows(leaf)
        assert rows is not None, f"no rule for {use.node.name()}"
        right = rows.right(cotangent)
        torch.testing.assert_close(use.restore(rows.contract(rows.left, right)), want.to_dense())
        # Several cotangents at a time, and some of the rows.
        both = rows.right(torch.stack([cotangent, 2 * cotangent]))
        torch.testing.assert_close(use.restore(rows.contract(rows.left, both)[1]), 2 * want.to_dense())
        first, second = slice(0, 1), slice(1, None)
        parts = [rows.contract(None if rows.left is None else rows.left[s], right[s]) for s in (first, second)]
        if len(right) > 1:
            torch.testing.assert_close(use.restore(parts[0] + parts[1]), want.to_dense())
        if rows.arrange is not None and rows.left is not None:
            products = right.mT @ rows.left, both.mT @ rows.left
            torch.testing.assert_close(use.restore(rows.arrange(products[0])), want)
            torch.testing.assert_close(use.restore(rows.arrange(products[1])[1]), 2 * want)
        factors = (rows.left, right) if rows.outer else rows.unfold(right) if rows.unfold else None
        if factors is not None:
            left, right = factors
            one_hot = functional.one_hot(left, 9).double() if not left.is_floating_point() else left
            products = (one_hot @ one_hot.T) * (right @ right.T)
            torch.testing.assert_close(products.sum(), (want.to_dense() ** 2).sum())


def test_autocast_is_passed_through() -> None:
    layer = nn.Linear(6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(torch.randn(4, 6)).float().sum()
    graph = Graph([loss])
    (use,) = uses(graph)[graph.edge_of(layer.weight)[0]]
    assert [node.name() for node in use.path] == ["TBackward0"]
    rows = use.rows(layer.weight)
    assert rows is not None
    assert rows.outer
    grad = use.restore(rows.contract(rows.left, rows.right(torch.ones(4, 7, dtype=torch.bfloat16))))
    assert grad.shape == (7, 6)


def test_every_use_is_found() -> None:
    weight = parameter(6, 6)
    loss = ((flat() @ weight).tanh() @ weight.T + weight.sum()).sum()
    names = [use.node.name() for use in uses(Graph([loss]))[edge_of(weight)[0]]]
    assert sorted(names) == ["MmBackward0", "MmBackward0", "SumBackward0"]


@pytest.mark.parametrize(
    ("apply", "weight"),
    [
        (
            lambda w: functional.embedding(indices(), w, scale_grad_by_freq=True),
            parameter(9, 6),
        ),  # rows depend on each other
        (lambda w: functional.batch_norm(flat(), None, None, w, training=True), parameter(6)),  # mixes samples
        (lambda w: w @ flat(), parameter(3, 4)),  # samples are columns
        (lambda w: flat() + w, parameter(4, 6)),  # as many rows as samples
        (lambda w: torch.addmm(torch.zeros(7).double(), flat(), w, alpha=2), parameter(6, 7)),
        (lambda w: functional.prelu(flat(), w), parameter(6)),  # no rule
    ],
)
def test_what_does_not_fit_has_no_rows(apply: Callable[[Tensor], Tensor], weight: nn.Parameter) -> None:
    (use,) = uses(Graph([apply(weight).sum()]))[edge_of(weight)[0]]
    assert use.rows(weight) is None


class Scale(torch.autograd.Function):
    """``x * w``, as a user may write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def test_users_add_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))
    weight, x = parameter(6), flat()
    (use,) = uses(Graph([Scale.apply(x, weight).sum()]))[edge_of(weight)[0]]
    assert use.rows(weight) is None

    @rule("ScaleBackward")
    def scale(node: Any, child: int, shape: torch.Size) -> Rows | None:
        return Rows.summed(lambda grad: grad * node.saved_tensors[0], shape) if child == 1 else None

    rows = use.rows(weight)
    assert rows is not None
    torch.testing.assert_close(rows.contract(None, rows.right(torch.ones_like(x))), x.sum(0))

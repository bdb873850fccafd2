"""What tests of collecting compare with: T plain calls of ``torch.autograd.grad``, and what must stay as it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType

import torch
from torch import Tensor, nn

import gradstats

Losses = Mapping[str, Tensor]


#: The exact methods that see any graph; "engine", which needs leaves and runs hooks there, is for hidden parameters.
METHODS = ["auto", "batched", "blockwise", "sequential"]
#: Those that take whatever a plain backward takes; "batched" may refuse, saying so.
SURE_METHODS = ["auto", "blockwise", "sequential"]


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The plain gradients, dense and in float64; zeros where the loss does not reach."""
    grads = torch.autograd.grad(loss, inputs, torch.ones_like(loss), retain_graph=True, allow_unused=True)
    return [
        torch.zeros(tensor.shape, dtype=torch.float64) if grad is None else grad.to_dense().double()
        for grad, tensor in zip(grads, inputs, strict=True)
    ]


def plain_gram(losses: Iterable[Tensor], inputs: Iterable[Tensor]) -> Tensor:
    """The Gramian by T plain backwards, in float64; keeps the graph."""
    inputs = list(inputs)
    jacobian = torch.stack([torch.cat([g.flatten() for g in gradients(loss, inputs)]) for loss in losses])
    return jacobian @ jacobian.T


def assert_gram(got: Tensor, want: Tensor, rel: float = 1e-6) -> None:
    """``|ΔG_ij| <= rel · n_i n_j``, and what every Gramian is: float64 and exactly symmetric."""
    norms = want.diagonal().sqrt()
    error = (got - want).abs() / (norms[:, None] * norms[None, :]).clamp_min(1e-300)
    assert got.dtype == torch.float64
    assert not got.requires_grad, "the Gramian holds on to a graph"
    assert torch.equal(got, got.T)
    assert float(error.max()) <= rel, f"relative error {float(error.max()):.2e}, allowed {rel:.0e}\n{got}\n{want}"


def assert_gradients(got: Sequence[Tensor | None], want: Sequence[Tensor | None], rel: float = 1e-5) -> None:
    """Equal up to ``rel`` of each tensor's largest entry, and of 1 % of the largest of all (for sums that cancel)."""
    largest = max((float(grad.to_dense().abs().max()) for grad in want if grad is not None and grad.numel()), default=0)
    for k, (left, right) in enumerate(zip(got, want, strict=True)):
        assert (left is None) == (right is None), f"gradient {k}: {left} where {right} is expected"
        if left is not None and right is not None and right.numel():
            left, right = left.to_dense(), right.to_dense()
            error = float((left.double() - right.double()).abs().max())
            bound = rel * max(float(right.abs().max()), largest / 100)
            assert left.dtype == right.dtype
            assert error <= bound, f"gradient {k}: error {error:.2e}, allowed {bound:.2e}"


@contextlib.contextmanager
def _seeing_gradstats(seen: list[str]) -> Iterator[None]:
    """Write down every function of gradstats that is called."""

    def profile(frame: FrameType, event: str, _: object) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and str(module).partition(".")[0] == "gradstats":
            seen.append(f"{module}.{frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def weighted(losses: Losses, weights: Sequence[float]) -> Tensor:
    """``Σ_t w_t L_t``."""
    return torch.stack([w * loss.sum() for w, loss in zip(weights, losses.values(), strict=True)]).sum()


@contextlib.contextmanager
def untouched(model: nn.Module, losses: Losses) -> Iterator[None]:
    """Check that the body leaves ``.grad``, parameters, buffers, random numbers, hooks and graph as they were."""
    params = [p for p in model.parameters() if p.requires_grad]
    saved = [p.grad for p in params]
    for p in params[::2]:
        p.grad = torch.full_like(p, 3.0)
    total = weighted(losses, [1.0] * len(losses))
    before = torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in params]
    hooks = _hooks(model)
    random = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), random), "random numbers were drawn"
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} was changed"
    for p, (grad, value) in zip(params, grads, strict=True):
        assert p.grad is grad, ".grad was replaced"
        assert grad is None or value is None or torch.equal(grad, value), ".grad was changed"
    assert _hooks(model) == hooks, "a hook was left behind"
    seen: list[str] = []
    with _seeing_gradstats(seen):
        after = torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
    assert not seen, f"hooks were left in the graph: {seen}"
    for left, right in zip(before, after, strict=True):
        assert (left is None) == (right is None)
        assert left is None or right is None or torch.equal(left.to_dense(), right.to_dense()), "a backward changed"
    for p, grad in zip(params, saved, strict=True):
        p.grad = grad


def _hooks(model: nn.Module) -> list[int]:
    tensors = [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return tensors + [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]


def check(
    model: nn.Module,
    losses: Losses,
    method: str,
    inputs: Sequence[Tensor] | None = None,
    *,
    rel: float = 1e-6,
    rel_grad: float = 1e-5,
) -> gradstats.GradStats:
    """Compare both forms of a collection with plain backwards over one graph, which is kept.

    Args:
        model: Holds the parameters that an ordinary backward fills.
        losses: By task.
        method: How to collect.
        inputs: What the Gramian is of; all parameters of ``model`` that require grad where None.
        rel: Bound on the error of the Gramian.
        rel_grad: Bound on the error of the weighted gradients.

    Returns:
        The statistics.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    wanted = params if inputs is None else list(inputs)
    want = plain_gram(losses.values(), wanted)
    with untouched(model, losses):
        stats = gradstats.from_losses(losses, wanted, method=method, retain_graph=True)
    assert_gram(stats.gram, want, rel)
    assert stats.names == tuple(losses)
    weights = [0.5 + task for task in range(len(losses))]
    fused = filled(params, lambda: gradstats.backward(losses, weights, wanted, method=method, retain_graph=True))
    plain = filled(params, lambda: weighted(losses, weights).backward(retain_graph=True))
    assert_gradients(fused, plain, rel_grad)
    return stats


def filled(params: Sequence[Tensor], run: Callable[[], object]) -> list[Tensor | None]:
    """What ``run`` leaves in an empty ``.grad`` of each of ``params``, which are emptied again."""
    for p in params:
        p.grad = None
    run()
    grads = [p.grad for p in params]
    for p in params:
        p.grad = None
    return grads


class Heads(nn.Module):
    """A trunk with a linear head and a loss for each task, over its input kept as an attribute."""

    def __init__(self, trunk: nn.Module, width: int, x: Tensor, tasks: int = 3) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(tasks))
        self.x = x

    def features(self) -> Tensor:
        """What the heads read: ``[N, ..., width]``."""
        out: Tensor = self.trunk(self.x)
        return out

    def over(self, features: Tensor) -> dict[str, Tensor]:
        """The losses of the heads over ``features``."""
        return {f"t{i}": (head(features) ** 2).mean() for i, head in enumerate(self.heads)}

    def forward(self) -> dict[str, Tensor]:
        """The losses by task."""
        return self.over(self.features())

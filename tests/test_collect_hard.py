"""Collecting where others raise or are silently wrong: hooks, views, unusual products, odd graphs, low precision."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from oracle import (
    METHODS,
    SURE_METHODS,
    Heads,
    assert_gradients,
    assert_gram,
    check,
    filled,
    gradients,
    plain_gram,
    untouched,
    weighted,
)
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradstats

pytestmark = pytest.mark.usefixtures("one_thread", "any_size")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


#: For the six tasks of most models here.
WEIGHTS = [1.0, 2.0, 3.0, 0.5, 1.5, 2.5]
ONES = [1.0] * 6


class Net(Heads):
    """Two layers with fewer rows than fan-in and tasks, whose activations the tests can reach."""

    def __init__(self, tasks: int = 6) -> None:
        trunk = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh())
        super().__init__(trunk, 6, torch.randn(3, 9), tasks)

    def traced(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses, and the activations on the way to them by name."""
        hidden = self.trunk[1](self.trunk[0](self.x))
        features = self.trunk[3](self.trunk[2](hidden))
        outputs = [head(features) for head in self.heads]
        losses = {f"t{i}": (out**2).mean() for i, out in enumerate(outputs)}
        return losses, {"hidden": hidden, "features": features, "output": outputs[1], "loss": losses["t1"]}


def double(grad: Tensor) -> Tensor:
    return 2 * grad


def nodes_below(losses: Sequence[Tensor]) -> list[Node]:
    found: dict[Node, None] = {}
    stack = [loss.grad_fn for loss in losses]
    while stack:
        node = stack.pop()
        if node is not None and node not in found:
            found[node] = None
            stack.extend(child for child, _ in node.next_functions)
    return list(found)


# ---- hooks of the user -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["hidden", "features", "output", "loss"])
def test_a_hook_on_a_tensor_acts_once_on_every_task(where: str, method: str) -> None:
    model = Net()
    losses, tensors = model.traced()
    without = plain_gram(losses.values(), model.parameters())
    tensors[where].register_hook(double)
    assert not torch.allclose(plain_gram(losses.values(), model.parameters()), without)
    check(model, losses, method)


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_on_any_node_acts_once_on_every_task(before: bool) -> None:
    """Such hooks are no part of the contract of the other methods, which run some nodes outside a backward."""
    method = "sequential"
    model = Net()
    losses = model()
    params = list(model.parameters())
    wrong = []
    for node in nodes_below(list(losses.values())):
        if node.name() == "torch::autograd::AccumulateGrad":  # torch.autograd.grad does not run these
            continue
        if before:
            handle = node.register_prehook(lambda grads: tuple(map(double, grads)))
        else:
            handle = node.register_hook(lambda grads, _: tuple(None if g is None else double(g) for g in grads))
        want = plain_gram(losses.values(), params)
        got = gradstats.from_losses(losses, params, method=method, retain_graph=True).gram
        fused = filled(params, lambda: gradstats.backward(losses, WEIGHTS, method=method, retain_graph=True))
        plain = filled(params, lambda: weighted(losses, WEIGHTS).backward(retain_graph=True))
        handle.remove()
        try:
            assert_gram(got, want)
            assert_gradients(fused, plain)
        except AssertionError as error:
            wrong.append(f"{node.name()}: {str(error).splitlines()[0]}")
    assert not wrong


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", range(4))
def test_a_nonlinear_hook_on_a_parameter_sees_each_task_by_itself(which: int, method: str) -> None:
    """The Gramian is of each task's clipped gradient, ``.grad`` is the clipped sum: as with plain backwards."""
    model = Net()
    losses = model()
    param = list(model.trunk.parameters())[which]
    largest = min(float(gradients(loss, [param])[0].abs().max()) for loss in losses.values())
    param.register_hook(lambda grad: grad.clamp(-largest / 2, largest / 2))
    check(model, losses, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["layer", "activation", "trunk", "head"])
@pytest.mark.parametrize("before", [False, True])
def test_backward_hooks_on_modules_act_once_on_every_task(which: str, before: bool, method: str) -> None:
    model = Net()
    module = {"layer": model.trunk[2], "activation": model.trunk[1], "trunk": model.trunk, "head": model.heads[1]}[
        which
    ]
    if before:
        module.register_full_backward_pre_hook(lambda _, out: tuple(map(double, out)))
    else:
        module.register_full_backward_hook(
            lambda _, into, __: tuple(None if grad is None else double(grad) for grad in into)
        )
    model.x.requires_grad_()  # or the trunk as a whole would have no gradient to double
    check(model, model(), method)


@pytest.mark.parametrize("method", SURE_METHODS)
@pytest.mark.parametrize("where", ["hidden", "features", "output"])
def test_a_hook_that_reads_values_sees_the_gradient_of_every_task_once(where: str, method: str) -> None:
    model = Net()
    losses, tensors = model.traced()
    reached = [loss for name, loss in losses.items() if where != "output" or name == "t1"]
    want = sorted(float(torch.cat(gradients(loss, [tensors[where]])).norm()) for loss in reached)
    gram = plain_gram(losses.values(), model.parameters())
    seen: list[float] = []
    tensors[where].register_hook(lambda grad: seen.append(float(grad.norm())))
    stats = gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert_gram(stats.gram, gram)
    assert sorted(seen) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_over_several_gradients_still_works_afterwards(method: str) -> None:
    model = Net()
    losses, tensors = model.traced()
    calls: list[int] = []
    watched = [tensors["hidden"], tensors["features"], tensors["output"]]
    handle = torch.autograd.graph.register_multi_grad_hook(watched, lambda grads: calls.append(len(grads)))
    check(model, losses, method)
    calls.clear()
    weighted(losses, ONES).backward()
    assert calls == [3]
    handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_hooks_run_in_the_fused_form_alone_and_once(method: str) -> None:
    model = Net()
    losses = model()
    params = list(model.parameters())
    fired: list[Tensor] = []
    for p in params:
        p.register_post_accumulate_grad_hook(fired.append)
    gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert not fired
    gradstats.backward(losses, ONES, model, method=method)
    assert sorted(map(id, fired)) == sorted(map(id, params))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["hidden", "features", "output"])
def test_retained_gradients(where: str, method: str) -> None:
    model = Net()
    losses, tensors = model.traced()
    want = plain_gram(losses.values(), model.parameters())
    (retained,) = torch.autograd.grad(weighted(losses, WEIGHTS), tensors[where], retain_graph=True)
    # Asked for after collecting: as if there had been no collection.
    gradstats.from_losses(losses, model, method=method, retain_graph=True)
    tensors[where].retain_grad()
    weighted(losses, WEIGHTS).backward(retain_graph=True)
    torch.testing.assert_close(tensors[where].grad, retained)
    # Asked for before: the Gramian is right, and backwards go on from what was retained, if vmap did not see it.
    stats = gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert_gram(stats.gram, want)
    assert stats.method in ("batched", "blockwise") or torch.isfinite(tensors[where].grad).all()
    tensors[where].grad = None
    weighted(losses, WEIGHTS).backward()
    torch.testing.assert_close(tensors[where].grad, retained)


@pytest.mark.parametrize("method", METHODS)
def test_the_fused_form_retains_gradients_as_a_backward_does(method: str) -> None:
    model = Net()
    losses, tensors = model.traced()
    (want,) = torch.autograd.grad(weighted(losses, WEIGHTS), tensors["output"], retain_graph=True)
    gradstats.from_losses(losses, model, method=method, retain_graph=True)
    tensors["output"].retain_grad()
    gradstats.backward(losses, WEIGHTS, tensors["features"], method=method)
    assert tensors["output"].grad is not None
    assert tensors["output"].grad.shape == want.shape


# ---- products with a parameter, which may have rules of their own ----------------------------------------------------

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
_FORMS: dict[str, Form] = {
    "linear": functional.linear,
    "no_bias": lambda x, w, b: functional.linear(x, w),
    "matmul": lambda x, w, b: x @ w.t() + b,
    "parameter_on_the_left": lambda x, w, b: (w @ x.t()).t() + b,
    "vectors": lambda x, w, b: torch.stack([w @ row for row in x]),
    "one_vector": lambda x, w, b: functional.linear(x[0], w, b),
    "scaled_addmm": lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5, alpha=2.0),
    "addmv": lambda x, w, b: torch.addmv(b, w, x[0], beta=0.3, alpha=1.7),
    "three_dimensions": lambda x, w, b: functional.linear(x.repeat(2, 1, 1), w, b),
    "three_dimensions_strided": lambda x, w, b: functional.linear(x.repeat(2, 1, 1).transpose(0, 1), w, b),
    "expanded_input": lambda x, w, b: functional.linear(x[:1].expand(x.shape), w, b),
    "broadcast_in_front": lambda x, w, b: x.unsqueeze(1).unsqueeze(1).expand(-1, 2, 3, -1) @ w.t(),
    "bmm": lambda x, w, b: torch.bmm(x.expand(2, -1, -1), w.t().expand(2, -1, -1)) + b,
    "baddbmm": lambda x, w, b: torch.baddbmm(b[None, None], x.repeat(2, 1, 1), w.t().repeat(2, 1, 1), alpha=0.5),
    "einsum": lambda x, w, b: torch.einsum("nk,ok->no", x, w) + b,
    "used_twice": lambda x, w, b: functional.linear(x, w, b) + functional.linear(2 * x.flip(0), w, b).sin(),
    "used_in_a_chain": lambda x, w, b: functional.linear(functional.linear(x, w, b).tanh() @ w, w, b),
    "with_itself": lambda x, w, b: x @ (w.t() @ w),
    "also_elsewhere": lambda x, w, b: functional.linear(x, w, b) + w.sum() * b.prod(),
    "bias_from_the_weight": lambda x, w, b: functional.linear(x, w, w[:, 0] * b),
    "masked": lambda x, w, b: functional.linear(x, w * (w > 0), b),
    "normalised": lambda x, w, b: functional.linear(x, functional.normalize(w, dim=1), b),
    "sliced": lambda x, w, b: functional.linear(x, w[1:], b[1:]),
    "sliced_twice": lambda x, w, b: functional.linear(functional.linear(x, w[:3], b[:3]), w[3:, :3], b[3:]),
    "joined": lambda x, w, b: functional.linear(x, torch.cat([w, 2 * w]), torch.cat([b, b])),
    "expanded_weight": lambda x, w, b: functional.linear(x, w[:1].expand(w.shape), b[:1].expand(b.shape)),
    "cast": lambda x, w, b: functional.linear(x.double(), w.double(), b.double()).float(),
    "complex": lambda x, w, b: functional.linear(x.cfloat(), torch.complex(w, 2 * w), torch.complex(b, -b)).abs(),
    "conjugate": lambda x, w, b: (torch.complex(x, -x) @ torch.complex(w, 2 * w).mH).imag,
    "in_place_after": lambda x, w, b: functional.linear(x, w, b).add_(b).mul_(2).relu_(),
    "checkpointed": lambda x, w, b: checkpoint(functional.linear, x, w, b, use_reentrant=False),
    "no_rows": lambda x, w, b: torch.cat([functional.linear(x[:0], w, b), b[None]]),
    "pointwise_convolution": lambda x, w, b: functional.conv1d(x.t()[None], w[..., None], b),
    "convolution": lambda x, w, b: functional.conv2d(
        x.unflatten(1, (1, 4, 5)), w.unflatten(1, (1, 4, 5)), b, padding=2
    ),
    "grouped_convolution": lambda x, w, b: functional.conv1d(
        x.unflatten(1, (2, 10)), w.reshape(8, 2, 10)[:, :1], b, padding=3, groups=2
    ),
    "transposed_convolution": lambda x, w, b: functional.conv_transpose1d(
        x.unflatten(1, (4, 5)), w.reshape(4, 8, 5), b, stride=2
    ),
    "bilinear": lambda x, w, b: functional.bilinear(x[:, :5], x[:, :4], w.reshape(8, 4, 5).mT, b),
    "embedding_of_a_view": lambda x, w, b: functional.embedding(x.argsort()[:, :4], w.t()) + b,
    "embedding_and_decoder": lambda x, w, b: functional.embedding(x[:, :8].argsort(), w) @ w.t() + b,
    "indexed": lambda x, w, b: w[x[:, :8].argsort(), 1] * b,
    "gathered": lambda x, w, b: w.gather(1, x[:8].argsort()) * b[: len(x), None],
    "sparse_matrix": lambda x, w, b: torch.sparse.mm(x.detach().relu().to_sparse(), w.t()) + b,
    "outer": lambda x, w, b: torch.outer(b, x[0]) * w,
    "solved": lambda x, w, b: torch.linalg.solve(w @ w.t() + torch.eye(8), functional.linear(x, w, b).t()),
}
#: vmap has no rule for these.
_UNBATCHED = {"sparse_matrix", "conjugate"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("form", _FORMS)
def test_any_product_with_a_parameter(form: str, rows: int, method: str) -> None:
    """With fewer and with more rows than fan-in, at the bottom of the graph and above another layer."""
    model = nn.ParameterDict({"weight": torch.randn(8, 20) / 4, "bias": torch.randn(8) / 4})
    model["first"] = nn.Parameter(torch.randn(6, 20) / 2)
    model["strided"] = nn.Parameter((torch.randn(20, 8) / 4).t())  # a parameter whose memory is column-major
    cases = [("weight", False, False), ("weight", True, False), ("strided", True, False), ("weight", False, True)]
    for weight, is_above, used_elsewhere in cases if rows == 3 else cases[1:3]:
        x = torch.tanh(torch.randn(rows, 6) @ model["first"]) if is_above else torch.randn(rows, 20)
        out = _FORMS[form](x[:8] if form == "gathered" else x, model[weight], model["bias"])
        losses = {
            "square": out.square().mean(),
            "sine": (3 * out * torch.rand_like(out)).sin().sum(),
            "sum": out.sum(),  # whose cotangent takes no memory
            "part": out.flatten(1).cos()[0].sum() if out.ndim > 1 else out.cos().sum(),
        }
        if used_elsewhere:  # by one task alone
            losses["sum"] = losses["sum"] + model[weight].square().sum()
        try:
            check(model, losses, method)
        except RuntimeError as error:
            if method != "batched" or form not in _UNBATCHED or "method: 'batched'" not in str(error):
                raise


# ---- nodes with several outputs, views and writes in place -----------------------------------------------------------


class _TwoOutputs(torch.autograd.Function):
    """Tells a gradient that is missing from one that is zero."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, left: Tensor | None, right: Tensor | None) -> Tensor | None:
        parts = [grad * scale for grad, scale in ((left, 2.0), (right, 3.0)) if grad is not None]
        return sum(parts[1:], parts[0]) if parts else None


_SPLITS: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
    "unbind": lambda h: h.unflatten(1, (3, 2)).unbind(1),
    "split": lambda h: h.split([1, 3, 2], 1),
    "chunk": lambda h: h.chunk(3, 1),
    "views": lambda h: (h[:, :2], h[:, 1:5], h.view(3, 2, 3)[:, 0]),
    "strided_views": lambda h: (h.t()[::2], h.as_strided((2, 2), (6, 1)), h.diagonal()),
    "topk": lambda h: (h.topk(2).values, h.sort(1).values, h.max(1).values),
    "moments": lambda h: (*torch.var_mean(h, 1), h.std()),
    "eigh": lambda h: (*torch.linalg.eigh(h @ h.t() + torch.diag(torch.arange(3.0))), h),
    "qr": lambda h: (*torch.linalg.qr(h.t()), h),
    "custom": lambda h: (*_TwoOutputs.apply(h), h),
    "custom_unused": lambda h: (_TwoOutputs.apply(h)[1], h, h),
    "fourier": lambda h: (torch.fft.rfft(h).abs(), torch.fft.rfft(h).real, torch.view_as_real(torch.fft.fft(h))),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", _SPLITS)
def test_tasks_that_read_different_outputs_of_one_node(split: str, method: str) -> None:
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6))
    parts = _SPLITS[split](model(torch.randn(3, 9)))
    losses = {f"t{i}": (part.abs() + 0.1).log().sum() * (i + 1) for i, part in enumerate(parts)}
    losses["two"] = parts[0].square().sum() * parts[-1].square().sum()
    losses["all"] = sum((part.square().sum() for part in parts), torch.zeros(()))
    check(model, losses, method)
    losses = {"first": parts[0].square().sum(), "second": parts[1].abs().sum()}  # which may not meet before the node
    check(model, losses, method)


@pytest.mark.parametrize("method", METHODS)
def test_losses_that_are_views_of_one_vector(method: str) -> None:
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4))
    out = model(torch.randn(3, 9)).square()
    for vector in (out.mean(0), out.sum(0).view(2, 2).t().flatten(), out.flatten()[2:6]):
        want = plain_gram(vector.unbind(), model.parameters())
        stats = gradstats.from_losses(vector, model, method=method, retain_graph=True)
        assert_gram(stats.gram, want)
        check(model, {str(i): vector[i : i + 1] for i in range(4)}, method)
        check(model, {str(i): loss for i, loss in enumerate(vector.split(1))}, method)


@pytest.mark.parametrize("method", METHODS)
def test_writes_in_place(method: str) -> None:
    model = Net()
    hidden = model.trunk[0](model.x)
    hidden[:, :4].mul_(2)
    hidden.relu_()
    features = model.trunk[2](hidden)
    buffer = torch.zeros(4, 6)
    buffer[1:] = features
    buffer[0].copy_(features[1])
    buffer.view(-1)[::5].add_(features.sum())
    model.heads[1](buffer)  # a use without a loss
    check(model, model.over(buffer.exp_()), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_tensor_that_was_overwritten_is_refused(method: str) -> None:
    """As by a plain backward; reading it anyway would be silently wrong."""
    model = Net()
    losses, tensors = model.traced()
    with torch.no_grad():
        tensors["hidden"].add_(1.0)  # an operand of the second layer
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradstats.from_losses(losses, model.trunk[2].weight, method=method, retain_graph=True)
    model = Net()
    losses = model()
    with torch.no_grad():
        model.trunk[2].weight.add_(1.0)  # as an optimizer does
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradstats.backward(losses, ONES, model, method=method)
    assert all(p.grad is None for p in model.parameters())


# ---- what is saved for the backward ----------------------------------------------------------------------------------


def _rounded() -> contextlib.AbstractContextManager[object]:
    return torch.autograd.graph.saved_tensors_hooks(
        lambda saved: saved.bfloat16() if saved.dtype == torch.float32 else saved,
        lambda packed: packed.float() if packed.dtype == torch.bfloat16 else packed,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("saving", [torch.autograd.graph.save_on_cpu, _rounded])
def test_saved_tensors_that_the_user_packs(
    saving: Callable[[], contextlib.AbstractContextManager[object]], method: str
) -> None:
    model = Net()
    with saving():
        losses = model()
    check(model, losses, method)


@pytest.mark.parametrize("method", METHODS)
def test_nested_checkpoints_with_dropout(method: str) -> None:
    """What is recomputed is the same for each task, and random numbers go on as if nothing had been."""
    model = Heads(nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), 8, torch.randn(3, 8), tasks=6)
    dropout = nn.Dropout(0.4)

    def inner(x: Tensor) -> Tensor:
        return dropout(torch.tanh(model.trunk[1](x)))

    def outer(x: Tensor) -> Tensor:
        return dropout(model.trunk[2](checkpoint(inner, torch.relu(model.trunk[0](x)), use_reentrant=False)))

    check(model, model.over(checkpoint(outer, model.x, use_reentrant=False)), method)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_between_collections_draws_what_it_would_have_drawn(method: str) -> None:
    model = Heads(nn.Sequential(nn.Linear(9, 8), nn.Dropout(0.5), nn.Linear(8, 6)), 6, torch.randn(3, 9), tasks=6)
    after = []
    for collects in (False, True):
        torch.manual_seed(7)
        losses = model()
        if collects:
            gradstats.from_losses(losses, model, method=method, retain_graph=True)
        weighted(losses, ONES).backward()
        after.append(model()["t0"].item())
    assert after[0] == after[1]


# ---- which losses there are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_forty_tasks(method: str) -> None:
    model = Net(tasks=40)
    stats = check(model, model(), method)
    assert stats.gram.shape == (40, 40)
    shared = gradstats.from_losses(model(), method=method)
    assert shared.num_tasks == 40


@pytest.mark.parametrize("method", METHODS)
def test_several_losses_for_each_head(method: str) -> None:
    model = Net()
    _, tensors = model.traced()
    outputs = [head(tensors["features"]) for head in model.heads]
    losses = {f"{kind}{i}": out.pow(k).mean() for i, out in enumerate(outputs) for k, kind in ((2, "l2"), (4, "l4"))}
    losses["both"] = losses["l20"] + losses["l41"]
    check(model, losses, method)
    assert gradstats.shared_parameters(losses, model).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_different_shape_and_dtype(method: str) -> None:
    model = Net()
    plain = model()
    losses = {
        "zero_dim": plain["t0"],
        "one": plain["t1"].reshape(1),
        "double": plain["t2"].double(),
        "one_by_one": (plain["t0"] + plain["t2"]).reshape(1, 1),
    }
    stats = check(model, losses, method)
    assert stats.names == tuple(losses)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_a_parameter(method: str) -> None:
    """A learned temperature that is penalised as it is: the loss is a leaf."""
    model = Net()
    model.temperature = nn.Parameter(torch.tensor(0.7))
    plain = model()
    losses = {"scaled": plain["t0"] * model.temperature, "other": plain["t1"], "temperature": model.temperature}
    check(model, losses, method)


@pytest.mark.parametrize("method", METHODS)
def test_tasks_that_share_nothing_or_only_a_part(method: str) -> None:
    model = Heads(nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), 8, torch.randn(3, 8), tasks=5)
    a, b, c, d = (torch.tanh(layer(model.x)) for layer in model.trunk)
    reads = [a, torch.tanh(model.trunk[1](a)), b + c, c, d]
    losses = {f"t{i}": head(h).square().mean() for i, (head, h) in enumerate(zip(model.heads, reads, strict=True))}
    stats = check(model, losses, method)
    assert (stats.gram[4, :4] == 0).all()
    assert (stats.gram[0, 2:] == 0).all()
    assert stats.gram[2, 3] != 0
    check(model, {name: losses[name] for name in ("t0", "t3", "t4")}, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_task_whose_samples_are_missing_has_a_zero_row(method: str) -> None:
    model = Net()
    losses, tensors = model.traced()
    losses["none"] = model.heads[1](tensors["features"][:0]).square().sum()
    stats = check(model, losses, method)
    assert stats.present.all()
    assert (stats.gram[-1] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_data_that_requires_grad_is_no_input_unless_it_is_passed(method: str) -> None:
    """Adversarial training and some models of transformers ask for the gradient of the data: a leaf, no parameter."""
    model = Net()
    model.x.requires_grad_()
    losses = model()
    stats = gradstats.from_losses(losses, method=method, retain_graph=True)
    assert_gram(stats.gram, plain_gram(losses.values(), model.trunk.parameters()))
    stats = gradstats.from_losses(losses, [model.x], method=method, retain_graph=True)
    assert_gram(stats.gram, plain_gram(losses.values(), [model.x]))
    check(model, losses, method, [model.x, *model.trunk.parameters()])
    assert model.x.grad is not None  # filled by the fused form, as by a backward


# ---- repeated, nested and accumulated --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nested_modules_on_one_graph(method: str) -> None:
    model = Net()
    losses = model()
    with untouched(model, losses):
        parts = [
            gradstats.from_losses(losses, part, method=method, retain_graph=True)
            for part in (model, model.trunk, model.trunk[2], model.trunk[0], model.heads)
        ]
        again = gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert torch.equal(parts[0].gram, again.gram)
    assert_gram(parts[2].gram, plain_gram(losses.values(), model.trunk[2].parameters()))
    assert_gram(parts[2].gram + parts[3].gram, parts[1].gram)
    assert_gram((parts[1] + parts[4]).gram, parts[0].gram)


@pytest.mark.parametrize("method", METHODS)
def test_every_few_steps_with_ordinary_steps_between(method: str) -> None:
    """With evaluations, extra forwards, layers frozen and thawed, and both forms of collecting: training as without."""
    trained = []
    start = Net()
    for collects in (False, True):
        model = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(12):
            model.trunk[0].requires_grad_(step not in (4, 5, 6))
            with torch.no_grad():
                model.eval()()
            model.train()()  # a forward whose graph nobody uses
            losses = model()
            weights = WEIGHTS
            if collects and step % 3 == 0:
                want = plain_gram(losses.values(), gradstats.shared_parameters(losses, model).values())
                stats = gradstats.from_losses(losses, method=method, retain_graph=True)
                assert_gram(stats.gram, want)
            if collects and step % 4 == 1:
                gradstats.backward(losses, weights, method=method)
            else:
                weighted(losses, weights).backward()
            if step % 2:  # two batches a step
                optimizer.step()
                optimizer.zero_grad(set_to_none=step % 3 == 0)
        trained.append([p.detach() for p in model.parameters()])
    for left, right in zip(*trained, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_gramian_of_an_accumulated_gradient(method: str) -> None:
    """Exact from the sums over micro-batches; the sum of their Gramians is another matrix."""
    model = Net()
    batches = [model() for model.x in torch.randn(3, 3, 9)]
    summed = {name: torch.stack([losses[name] for losses in batches]).sum() for name in batches[0]}
    jacobian = 0
    for losses in batches:
        rows = [torch.cat([g.flatten() for g in gradients(loss, list(model.parameters()))]) for loss in losses.values()]
        jacobian = jacobian + torch.stack(rows)
    stats = check(model, summed, method)
    assert_gram(stats.gram, jacobian @ jacobian.T)
    added = sum(gradstats.from_losses(losses, model, method=method).gram for losses in batches)
    assert float((added - stats.gram).norm() / stats.gram.norm()) > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_between_trained_ones(method: str) -> None:
    model = Heads(nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), 8, torch.randn(3, 8), tasks=6)
    for frozen in ([1], [0, 3], [4], [0, 1, 2, 3]):
        for k, layer in enumerate(model.trunk):
            layer.requires_grad_(k not in frozen)
        stats = check(model, model(), method)
        assert stats.gram[0, 1] != 0
    model.requires_grad_(False)
    model.trunk[2].bias.requires_grad_(True)
    check(model, model(), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("table", [nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
def test_a_layer_used_far_apart(table: nn.Module, method: str) -> None:
    """As the embeddings of encoder and decoder: by then the first use is segments away from the second."""
    model = Heads(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), 8, torch.randn(3, 8), tasks=6)
    model.table = copy.deepcopy(table)
    first, second = torch.randint(0, 20, (2, 3, 1)) if isinstance(table, nn.Embedding) else torch.randn(2, 3, 1, 8)
    a, b, c, d = model.trunk
    low = b(torch.tanh(a(model.table(first))))
    read = model.table(second)
    normed = read * read.square().mean(-1, keepdim=True).rsqrt()  # a way to the table beside the residual one
    for high in (
        c(torch.tanh(low)) + d(read),
        c(torch.tanh(low)) @ d(read).mT @ low,
        c(low) + read + d(normed),
        c(torch.tanh(low)) * (d(normed) + read),
    ):
        check(model, model.over(torch.tanh(high)), method)
        check(model, model.over(torch.tanh(high)), method, list(model.table.parameters()))


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_on_a_view_of_a_parameter_that_is_used_far_apart(method: str) -> None:
    weight, layers = nn.Parameter(torch.randn(8, 8)), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    view = weight.t()
    view.register_hook(lambda grad: 2 * grad)
    h = torch.tanh(layers[0](torch.randn(4, 8)))
    h = torch.tanh(layers[1](torch.tanh(h @ weight.t())))
    losses = list(torch.tanh(layers[2](torch.tanh(h @ view))).square().mean(0)[:3])
    stats = gradstats.from_losses(losses, [weight, *layers.parameters()], method=method, retain_graph=True)
    assert_gram(stats.gram, plain_gram(losses, [weight, *layers.parameters()]))


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_of_thousands_of_nodes(method: str) -> None:
    model = nn.ParameterDict({"a": torch.tensor(0.999), "b": torch.randn(3)})
    h = torch.ones(3)
    for step in range(1500):
        h = h * model["a"] + (model["b"] if step % 500 == 0 else 0)
    losses = {f"t{i}": out for i, out in enumerate(h)}
    stats = gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert_gram(stats.gram, plain_gram(losses.values(), model.parameters()), 1e-5)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("method", METHODS)
def test_anomaly_mode_and_other_threads(method: str) -> None:
    model = Net()
    with torch.autograd.detect_anomaly():
        losses = model()
        want = plain_gram(losses.values(), model.parameters())
        stats = gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert_gram(stats.gram, want)
    found: list[Tensor] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(gradstats.from_losses(losses, model, method=method, retain_graph=True).gram)
        )
        for _ in range(2)
    ]
    for thread in threads:  # one after the other: hooks of two at a time on one graph would meet
        thread.start()
        thread.join()
    assert len(found) == 2
    assert all(torch.equal(gram, stats.gram) for gram in found)


# ---- backwards that vmap cannot carry --------------------------------------------------------------------------------


class _WithNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return torch.from_numpy(3 * ctx.saved_tensors[0].detach().numpy() ** 2 * grad.numpy())


class _DataDependent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return grad * (2 if float(grad.abs().sum()) > 1e-3 else 1)


_STUBBORN: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": _WithNumpy.apply,
    "data_dependent": _DataDependent.apply,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", ["hidden", "features", "output"])
@pytest.mark.parametrize("stubborn", _STUBBORN)
def test_custom_backwards_in_python(stubborn: str, depth: str, method: str) -> None:
    model = Net()
    function = _STUBBORN[stubborn]
    hidden = torch.tanh(model.trunk[0](model.x))
    features = model.trunk[2](function(hidden) if depth == "hidden" else hidden)
    outputs = [head(function(features) if depth == "features" else features) for head in model.heads]
    outputs[1] = function(outputs[1]) if depth == "output" else outputs[1]
    losses = {f"t{i}": out.square().mean() for i, out in enumerate(outputs)}
    try:
        check(model, losses, method)
    except RuntimeError as error:
        if method != "batched" or "method: 'batched'" not in str(error):
            raise


@pytest.fixture
def _keeps_buffers() -> Iterator[None]:
    import torch._functorch.config  # not loaded by `import torch` alone

    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which the compiler reads of every tensor
@pytest.mark.usefixtures("_keeps_buffers")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_blocks_between_eager_ones(method: str) -> None:
    model = Heads(nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), 8, torch.randn(3, 8), tasks=6)
    compiled = [torch.compile(nn.Sequential(layer, nn.Tanh()), backend="aot_eager") for layer in model.trunk[1:3]]
    h = compiled[0](torch.tanh(model.trunk[0](model.x)))
    for _ in range(2):  # the second one is used twice
        h = compiled[1](h)
    losses = model.over(model.trunk[3](h))
    try:
        check(model, losses, method)
    except RuntimeError as error:
        if method != "batched" or "method: 'batched'" not in str(error):
            raise


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_has_a_gramian_as_good_as_its_gradients(dtype: torch.dtype, method: str) -> None:
    """Against the same model in float64: no worse than plain backwards in that dtype summed in float64."""
    model = Heads(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)), 32, torch.randn(16, 32), tasks=6).to(
        dtype
    )
    model.x = model.x.to(dtype)
    exact = copy.deepcopy(model).double()
    exact.x = model.x.double()
    losses = {name: loss.float() for name, loss in model().items()}
    truth = plain_gram(exact().values(), exact.parameters())
    norms = truth.diagonal().sqrt()
    errors = [
        float(((gram - truth).abs() / (norms[:, None] * norms)).max())
        for gram in (
            gradstats.from_losses(losses, model, method=method, retain_graph=True).gram,
            plain_gram(losses.values(), model.parameters()),
        )
    ]
    assert errors[0] <= 1.5 * errors[1] + 1e-4
    fused = filled(list(model.parameters()), lambda: gradstats.backward(losses, WEIGHTS, model, method=method))
    exact_total = weighted(exact(), WEIGHTS)
    for p, grad, want in zip(
        model.parameters(), fused, torch.autograd.grad(exact_total, list(exact.parameters())), strict=True
    ):
        assert grad is not None
        assert grad.dtype == p.dtype
        assert float((grad.double() - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_different_dtypes(method: str) -> None:
    model = nn.ModuleDict({"low": nn.Linear(9, 8).bfloat16(), "mid": nn.Linear(8, 6), "high": nn.Linear(6, 4).double()})
    h = model["mid"](torch.tanh(model["low"](torch.randn(3, 9).bfloat16())).float())
    losses = {f"t{i}": out for i, out in enumerate(model["high"](h.double()).square().mean(0))}
    # The gradients of the lowest layer are rounded to bfloat16, in whichever order they are summed.
    check(model, losses, method, rel=1e-2, rel_grad=2e-2)
    check(model, losses, method, [*model["mid"].parameters(), *model["high"].parameters()], rel_grad=2e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype, method: str) -> None:
    model = Net()
    exact = plain_gram(model().values(), model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", dtype=dtype):
        losses = {name: scaler.scale(loss) for name, loss in model().items()}
    for inside in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=inside):
            stats = gradstats.from_losses(
                losses, model, method=method, loss_scale=scaler.get_scale(), retain_graph=True
            )
        assert_gram(stats.gram, plain_gram(losses.values(), model.parameters()) / 2.0**20, 2e-2)
        assert_gram(stats.gram, exact, 5e-2)
    # The step goes on as usual, with the scaler unscaling what the fused form has left.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    want = torch.autograd.grad(sum(model().values()), list(model.parameters()))
    gradstats.backward(losses, ONES, model, method=method, loss_scale=scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
    moved = [old - p.detach() for old, p in zip(before, model.parameters(), strict=True)]
    assert_gradients(moved, want, 5e-2)


@pytest.mark.parametrize("method", METHODS)
def test_an_overflow_under_a_scale_is_named(method: str) -> None:
    model = Net()
    with torch.autocast("cpu", dtype=torch.float16):
        features = model.features()
        losses = model.over(features)
        losses["t1"] = (model.heads[1](features) * 100).square().sum() * 1e3
    keep = torch.tensor([0, 2, 3, 4, 5])
    clean = plain_gram([losses[f"t{t}"] for t in keep], model.parameters())
    scaled = {name: loss * 2.0**9 for name, loss in losses.items()}
    assert not plain_gram([scaled["t1"]], model.parameters()).isfinite().all()
    stats = gradstats.from_losses(scaled, model, method=method, loss_scale=2.0**9)
    assert stats.non_finite_names == ("t1",)
    assert_gram(stats.gram[keep][:, keep], clean, 2e-2)

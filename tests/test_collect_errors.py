"""What cannot be collected is refused in one clear message, and nothing is left behind: no hook, no gradient."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from oracle import METHODS, Heads, assert_gradients, assert_gram, filled, plain_gram, untouched, weighted
from torch import Tensor, nn

import gradstats

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = [1.0, 2.0, 3.0]
FORMS = pytest.mark.parametrize("fused", [False, True], ids=["from_losses", "backward"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def net() -> Heads:
    return Heads(nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()), 6, torch.randn(3, 9))


def collect(fused: bool, losses: object, *arguments: object, **options: object) -> gradstats.GradStats:
    options.setdefault("retain_graph", True)
    if fused:
        return gradstats.backward(losses, [1.0 + i for i in range(len(losses))], *arguments, **options)
    return gradstats.from_losses(losses, *arguments, **options)


def refused(
    model: nn.Module, error: type[Exception], message: str, collects: Callable[[], object], losses: dict[str, Tensor]
) -> str:
    """Check that ``collects`` raises, with a message of a few lines at most, and leaves all as it was."""
    with untouched(model, losses), pytest.raises(error, match=message) as caught:
        collects()
    text = str(caught.value)
    assert len(text) < 600
    assert len(text.splitlines()) <= 3
    return text


# ---- losses ----------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_losses_without_a_graph(method: str, fused: bool) -> None:
    model = net()
    losses = model()
    detached = {name: loss.detach() for name, loss in losses.items()}
    text = refused(model, ValueError, "^losses: .*has a graph", lambda: collect(fused, detached, method=method), losses)
    assert "t0" in text
    with torch.no_grad():
        without = model()
    refused(model, ValueError, "^losses: ", lambda: collect(fused, list(without.values()), method=method), losses)


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_losses_on_different_devices(method: str, fused: bool) -> None:
    """A Gramian is of gradients that can be multiplied with each other."""
    model = net()
    losses = model()
    away = {"here": losses["t0"], "away": torch.ones((), device="meta", requires_grad=True) * 2}
    text = refused(model, ValueError, "^losses: .*device", lambda: collect(fused, away, method=method), losses)
    assert "meta" in text
    assert "cpu" in text


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_losses_of_more_than_one_number(method: str, fused: bool) -> None:
    model = net()
    losses = model()
    vector = {**losses, "vector": (model.features() ** 2).mean(0)}
    text = refused(model, ValueError, "^losses: .*one number", lambda: collect(fused, vector, method=method), losses)
    assert "vector" in text
    assert "(6,)" in text
    empty = {**losses, "empty": model.features()[:0].sum(0)[:0]}
    refused(model, ValueError, "^losses: .*'empty'", lambda: collect(fused, empty, method=method), losses)
    complex_ = {**losses, "complex": model.features().sum() * 1j}
    refused(model, TypeError, "^losses: .*'complex'", lambda: collect(fused, complex_, method=method), losses)


@FORMS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_named(bad: float, method: str, fused: bool) -> None:
    """By the statistics, whose other rows are right; the weighted gradient is what a backward gives."""
    model = net()
    features = model.features()
    losses = model.over(features)
    losses["broken"] = (features * torch.tensor([bad, 1, 1, 1, 1, 1])).square().mean()
    losses["overflow"] = (features.square().sum() * 1e30) ** 2
    params = list(model.parameters())
    want = plain_gram([losses[name] for name in ("t0", "t1", "t2")], params)
    stats = collect(fused, losses, model, method=method)
    assert stats.non_finite_names == ("broken", "overflow")
    assert stats.finite.tolist() == [True, True, True, False, False]
    assert_gram(stats.gram[:3, :3].contiguous(), want)
    if fused:
        heads = [p for head in model.heads for p in head.parameters()]  # which the broken tasks do not reach
        got = [p.grad for p in heads]
        assert all(bool(grad.isfinite().all()) for grad in got if grad is not None)
        assert_gradients(
            got, filled(heads, lambda: weighted(losses, [1.0, 2.0, 3.0, 4.0, 5.0]).backward(retain_graph=True))
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_scalarizer_logs_the_task_that_is_not_finite(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    scalarizer = gradstats.Scalarizer("uniform", tasks=["t0", "t1", "t2"], record_every=1, method=method)
    losses = model()
    losses["t1"] = losses["t1"] * float("nan")
    with caplog.at_level("WARNING", logger="gradstats"):
        scalarizer(losses)
    said = [record.getMessage() for record in caplog.records if "finite" in record.getMessage()]
    assert any("t1" in message and "t0" not in message for message in said)


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_that_has_been_freed(method: str, fused: bool) -> None:
    model = net()
    losses = model()
    weighted(losses, WEIGHTS).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"second time|freed") as caught:
        collect(fused, losses, model, method=method)
    assert len(str(caught.value)) < 600
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))
    assert not any(p._backward_hooks for p in model.parameters())
    # And by a collection that did not keep it.
    losses = model()
    collect(fused, losses, model, method=method, retain_graph=False)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        collect(fused, losses, model, method=method)


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_a_graph_of_which_a_part_has_been_freed(method: str, fused: bool) -> None:
    """As where one head was differentiated on its own before: the trunk is gone, the other heads are not."""
    model = net()
    losses = model()
    losses["t1"].backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        collect(fused, losses, model, method=method)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)


# ---- inputs ----------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_no_loss_reaches(method: str, fused: bool) -> None:
    model = net()
    losses = model()
    model.unused = nn.Linear(3, 3)
    for inputs in (model.unused, list(model.unused.parameters()), {"w": model.unused.weight}):
        refused(
            model,
            ValueError,
            "^inputs: no loss reaches",
            lambda inputs=inputs: collect(fused, losses, inputs, method=method),
            losses,
        )
    # One that is reached is enough.
    with untouched(model, losses):
        stats = gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert_gram(stats.gram, plain_gram(losses.values(), model.parameters()))


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_another_copy_of_the_model_holds(method: str, fused: bool) -> None:
    """An optimizer that was made before the model's parameters were replaced: no loss reaches what it updates."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    for layer in (model.trunk[0], model.trunk[2], *model.heads):
        layer.weight, layer.bias = nn.Parameter(layer.weight.clone()), nn.Parameter(layer.bias.clone())
    losses = model()
    stale = optimizer.param_groups[0]["params"]
    refused(model, ValueError, "^inputs: no loss", lambda: collect(fused, losses, stale, method=method), losses)


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_an_optimizer_is_no_input(method: str, fused: bool) -> None:
    model = net()
    losses = model()
    optimizer = torch.optim.SGD(model.parameters())
    refused(model, TypeError, "^inputs: ", lambda: collect(fused, losses, optimizer, method=method), losses)
    groups = optimizer.param_groups
    refused(model, TypeError, r"^inputs\[0\]: .*dict", lambda: collect(fused, losses, groups, method=method), losses)


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_is_not_a_leaf(method: str, fused: bool) -> None:
    """``nn.Parameter(...).double()`` is an activation: taken where the losses were made from it, refused elsewhere."""
    model = net()
    cast = nn.Parameter(torch.randn(6, 6)).double()
    assert not cast.is_leaf
    losses = model()
    refused(model, ValueError, "^inputs: no loss", lambda: collect(fused, losses, [cast], method=method), losses)
    features = model.features() @ cast.float()
    losses = model.over(features)
    stats = collect(fused, losses, [cast], method=method)
    assert_gram(stats.gram, plain_gram(losses.values(), [cast]))


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_duplicated_parameters_count_once(method: str, fused: bool) -> None:
    """As tied weights are listed twice by ``named_parameters(remove_duplicate=False)``."""
    model = net()
    model.trunk[2].bias = nn.Parameter(torch.randn(6))
    model.tied = nn.Linear(9, 8)
    model.tied.weight = model.trunk[0].weight
    losses = model()
    every = list(model.trunk.parameters())
    want = plain_gram(losses.values(), every)
    for inputs in (
        every * 2,
        [("a", every[0]), ("b", every[1]), ("c", every[0]), ("d", every[2]), ("e", every[3])],
        dict(model.named_parameters(remove_duplicate=False)),
    ):
        is_whole = isinstance(inputs, dict)
        stats = collect(fused, losses, inputs, method=method)
        assert_gram(stats.gram, plain_gram(losses.values(), model.parameters()) if is_whole else want)
    refused(
        model,
        ValueError,
        "^inputs: .*different names",
        lambda: collect(fused, losses, [("a", every[0]), ("a", every[1])], method=method),
        losses,
    )


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_do_not_require_grad(method: str, fused: bool) -> None:
    model = net()
    losses = model()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    refused(
        model,
        ValueError,
        r"^inputs\[1\]: .*requires grad",
        lambda: collect(fused, losses, [model.trunk[0].weight, frozen], method=method),
        losses,
    )
    model.eval().requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"^inputs\['w'\]: .*requires grad"):
        collect(fused, losses, {"w": model.trunk[0].weight}, method=method)


# ---- an exception on the way -----------------------------------------------------------------------------------------


class _Failing(torch.autograd.Function):
    """Raises at the call given by ``countdown[0]``, and not again."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, countdown: list[int], error: type) -> Tensor:
        ctx.countdown, ctx.error = countdown, error
        return x * 2

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.countdown[0] -= 1
        if ctx.countdown[0] == 0:
            raise ctx.error("out of luck")
        return grad * 2, None, None


@FORMS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("where", ["hidden", "features", "output"])
def test_a_backward_that_raises_leaves_nothing_behind(where: str, call: int, method: str, fused: bool) -> None:
    model = net()
    countdown = [0]

    def fail(x: Tensor, here: str) -> Tensor:
        return _Failing.apply(x, countdown, OSError) if here == where else x

    hidden = fail(torch.tanh(model.trunk[0](model.x)), "hidden")
    features = fail(torch.tanh(model.trunk[2](hidden)), "features")
    outputs = [head(features) for head in model.heads]
    outputs[1:] = [fail(out, "output") for out in outputs[1:]]
    losses = {f"t{i}": out.square().mean() for i, out in enumerate(outputs)}
    want = plain_gram(losses.values(), model.parameters())
    with untouched(model, losses):
        countdown[0] = call
        error = attempt(lambda: assert_gram(collect(False, losses, model, method=method).gram, want))
        # Without an error another way was taken, or the backward is called only once.
        assert error is None or "out of luck" in str(error)
        assert method != "sequential" or (error is None) == (countdown[0] > 0)
        countdown[0] = 0
    params = list(model.parameters())
    countdown[0] = call
    error = attempt(lambda: collect(fused, losses, model, method=method))
    assert error is None or ("out of luck" in str(error) and all(p.grad is None for p in params))
    countdown[0] = 0
    # Once more, without a failure; vmap refuses a function without a rule of its own.
    fused_grads: list[Tensor | None] = []
    error = attempt(lambda: fused_grads.extend(backward(model, losses, method)))
    if method == "batched":
        assert error is None or "method: 'batched'" in str(error)
    else:
        assert error is None
    if error is None:
        assert_gradients(fused_grads, filled(params, lambda: weighted(losses, WEIGHTS).backward(retain_graph=True)))
        assert_gram(gradstats.from_losses(losses, model, method=method).gram, want)


def attempt(run: Callable[[], object]) -> Exception | None:
    """The error that a collection raises, if it does."""
    try:
        run()
    except (OSError, RuntimeError) as error:
        return error
    return None


def backward(model: nn.Module, losses: dict[str, Tensor], method: str) -> list[Tensor | None]:
    """The weighted gradients by the fused form."""
    return filled(
        list(model.parameters()),
        lambda: gradstats.backward(losses, WEIGHTS, model, method=method, retain_graph=True),
    )


@FORMS
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_must_stop_a_program_stops_it(error: type, method: str, fused: bool) -> None:
    """Neither is a reason to try another method, and neither leaves a hook."""
    model = net()
    countdown = [0]
    features = _Failing.apply(torch.tanh(model.trunk[0](model.x)), countdown, error)
    losses = model.over(torch.tanh(model.trunk[2](features)))
    with untouched(model, losses):
        countdown[0] = 1
        with pytest.raises(error, match="out of luck"):
            collect(fused, losses, model, method=method)
        assert countdown[0] == 0, "the backward was tried again"


@FORMS
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_that_raises_leaves_nothing_behind(method: str, fused: bool) -> None:
    model = net()
    hidden = torch.tanh(model.trunk[0](model.x))
    features = torch.tanh(model.trunk[2](hidden))
    losses = model.over(features)
    want = plain_gram(losses.values(), model.parameters())

    def refuse(_: Tensor) -> None:
        raise OSError("out of luck")

    for tensor in (hidden, features, model.trunk[2].weight, model.heads[1].bias, losses["t2"]):
        with untouched(model, losses):
            handle = tensor.register_hook(refuse)
            with pytest.raises((OSError, RuntimeError), match="out of luck"):
                collect(fused, losses, model, method=method)
            handle.remove()
        assert_gram(gradstats.from_losses(losses, model, method=method, retain_graph=True).gram, want)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_function_that_raises_leaves_nothing_behind(method: str) -> None:
    model = net()
    losses = model()

    def group(name: str) -> str:
        return {"0.weight": "a"}[name]

    with untouched(model, losses), pytest.raises(KeyError, match=re.escape("0.bias")):
        gradstats.from_losses(losses, model.trunk, method=method, group_by=group, retain_graph=True)

"""Parameters that are used in lower precision than their own, as under autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import METHODS, Heads, assert_gradients, assert_gram, check, filled, plain_gram, untouched, weighted
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn import functional

import gradstats
from gradstats.collect import collect

pytestmark = [pytest.mark.usefixtures("one_thread", "any_size"), pytest.mark.filterwarnings("ignore:enable_nested")]

WEIGHTS = [0.5, 1.0, 2.0]


class Encoder(nn.Module):
    """Two pre-norm blocks around residual connections, which stay in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(2))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, 64]`` to the same shape."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class Tied(Heads):
    """One matrix embeds in float32, decodes in low precision, and is used once more in float32."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(40, 40), 40, torch.randint(0, 40, (2, 5)))
        self.decoder = nn.Linear(40, 40)
        self.decoder.weight = self.trunk.weight

    def features(self) -> Tensor:
        """``[2, 5, 40]``."""
        hidden = torch.tanh(self.decoder(torch.tanh(self.trunk(self.x))))
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(functional.linear(hidden.to(self.trunk.weight), self.trunk.weight))


class Repeated(Heads):
    """One linear layer three times."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(40, 40), 40, torch.randn(6, 40))

    def features(self) -> Tensor:
        """``[6, 40]``."""
        h = self.x
        for _ in range(3):
            h = torch.tanh(self.trunk(h))
        return h


def mlp() -> Heads:
    layers = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.Tanh())]
    return Heads(nn.Sequential(*layers), 64, torch.randn(6, 64))


def convolutions() -> Heads:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.Flatten()]
    return Heads(nn.Sequential(*layers), 72, torch.randn(4, 3, 8, 8))


def torch_encoder() -> Heads:
    layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True)
    return Heads(nn.TransformerEncoder(layer, 2), 32, torch.randn(2, 2, 32))


MODELS: dict[str, Callable[[], Heads]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "encoder": lambda: Heads(Encoder(), 64, torch.randn(2, 3, 64)),
    "nn.TransformerEncoder": torch_encoder,
    "tied": Tied,
    "repeated": Repeated,
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def autocast(dtype: torch.dtype = torch.bfloat16, *, cache: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=cache)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_as_exact_as_plain_backwards(name: str, cache: bool, method: str) -> None:
    model = MODELS[name]()
    exact = copy.deepcopy(model).double()
    exact.x = exact.x.double() if exact.x.is_floating_point() else exact.x
    truth = plain_gram(exact().values(), exact.parameters())
    with autocast(cache=cache):
        losses = model()
    plain = plain_gram(losses.values(), model.parameters())
    with untouched(model, losses):
        got = gradstats.from_losses(losses, model, method=method, retain_graph=True).gram
    norms = truth.diagonal().sqrt()
    error, allowed = (float(((gram - truth).abs() / (norms[:, None] * norms)).max()) for gram in (got, plain))
    assert error <= 1.2 * allowed + 1e-3
    assert allowed < 0.1
    params = list(model.parameters())
    fused = filled(params, lambda: gradstats.backward(losses, WEIGHTS, model, method=method, retain_graph=True))
    assert_gradients(fused, filled(params, lambda: weighted(losses, WEIGHTS).backward()), 0.03)


@pytest.mark.parametrize("name", ["mlp", "encoder", "nn.TransformerEncoder"])
def test_the_plan_is_that_of_full_precision_for_half_the_bytes(name: str) -> None:
    model = MODELS[name]()
    full = gradstats.explain(model(), model.trunk)
    with autocast():
        cast = gradstats.explain(model(), model.trunk)
    assert any(step.factored for step in full.steps)
    assert sum(len(step.factored) for step in cast.steps) == sum(len(step.factored) for step in full.steps)
    assert len(cast.steps) >= len(full.steps) - 1
    assert cast.bytes <= 0.75 * full.bytes


@pytest.mark.parametrize(("dtype", "factored"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_gradients_are_formed_where_matrix_products_are_fast(dtype: torch.dtype, factored: bool) -> None:
    model = Heads(nn.Linear(64, 64), 64, torch.randn(60, 64))
    with autocast(dtype):
        losses = model()
    assert ("weight*" in str(gradstats.explain(losses, model.trunk))) == factored


def test_segments_end_at_casts() -> None:
    first, norm, second = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)
    with autocast():
        out = second(norm(first(torch.randn(5, 64)).float()))
    plan = gradstats.explain(list(out.float().square().mean(0)[:3]), [*first.parameters(), *second.parameters()])
    assert len(plan.steps) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_that_are_not_formed_are_not_rounded(dtype: torch.dtype) -> None:
    model = Heads(nn.Linear(64, 64, bias=False), 64, torch.randn(5, 64))
    with autocast(dtype):
        features = model.features()
        losses = model.over(features)
    assert "weight*" in str(gradstats.explain(losses, model.trunk))
    assert features.grad_fn is not None
    output = GradientEdge(features.grad_fn, 0)
    cotangents = [torch.autograd.grad(loss, output, retain_graph=True)[0].double() for loss in losses.values()]
    rows = torch.stack([(d.T @ model.x.to(dtype).double()).flatten() for d in cotangents])
    assert_gram(gradstats.from_losses(losses, model.trunk, retain_graph=True).gram, rows @ rows.T)
    with pytest.raises(AssertionError, match="relative error"):
        assert_gram(plain_gram(losses.values(), model.trunk.parameters()), rows @ rows.T)


@pytest.mark.parametrize("method", METHODS)
def test_float16_with_a_gradient_scaler(method: str) -> None:
    model = MODELS["encoder"]()
    params = list(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with autocast(torch.float16):
        losses = {name: scaler.scale(loss) for name, loss in model().items()}
    want = plain_gram(model().values(), params)
    grads = torch.autograd.grad(weighted(model(), WEIGHTS), params)
    optimizer = torch.optim.SGD(params, lr=1.0)
    before = [p.detach().clone() for p in params]
    stats = gradstats.backward(losses, WEIGHTS, model, method=method, loss_scale=scaler.get_scale())
    assert_gram(stats.gram, want, 1e-2)
    scaler.step(optimizer)
    assert_gradients([old - p.detach() for old, p in zip(before, params, strict=True)], grads, 2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_and_its_own_cast_as_inputs(method: str) -> None:
    weight, x = nn.Parameter(torch.randn(6, 5).double()), torch.randn(4, 5)
    cast = weight.float()
    losses = list((x @ cast.T).square().mean(0))
    for inputs in ([weight, cast], [cast], [weight]):
        got = gradstats.from_losses(losses, inputs, method=method, retain_graph=True).gram
        assert_gram(got, plain_gram(losses, inputs))


@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_parameters_apply_once(method: str) -> None:
    model = mlp()
    for p in model.trunk.parameters():
        p.register_hook(lambda grad: 3 * grad)
    with autocast():
        losses = model()
    check(model, losses, method, list(model.trunk.parameters()), rel=2e-2, rel_grad=2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_averaged_over_ranks_in_the_dtype_of_their_parameters(method: str) -> None:
    model = mlp()
    with autocast():
        losses = model()
    seen = set()

    def double(block: Tensor) -> Tensor:
        seen.add(block.dtype)
        return 2 * block

    stats = collect(list(losses), list(losses.values()), model, method=method, reduce=double, retain_graph=True)
    assert seen == {torch.float32}
    assert_gram(stats.gram, 4 * plain_gram(losses.values(), model.parameters()), 1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_metric(method: str) -> None:
    model = mlp()
    with autocast():
        losses = model()
    params = list(model.trunk.parameters())
    metric = [torch.rand_like(p) + 0.5 for p in params]
    gram = gradstats.from_losses(losses, params, method=method, metric=metric, retain_graph=True).gram
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses.values()]
    scaled = torch.stack([torch.cat([(g * m.sqrt()).flatten() for g, m in zip(r, metric, strict=True)]) for r in rows])
    assert_gram(gram, scaled.double() @ scaled.double().T, 1e-2)

"""The Gramian during backward, against the plain way: T separate ``torch.autograd.grad`` calls in float64."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradstats
from gradstats.collect import collect, signature, walk

METHODS = ["auto", "batched", "blockwise", "sequential", "engine"]
Losses = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _fresh(any_size: None) -> None:
    torch.manual_seed(0)
    walk._say_refused.cache_clear()


def oracle(
    losses: Mapping[str, Tensor | None], inputs: Sequence[Tensor], metric: Sequence[Tensor] | None = None
) -> Tensor:
    rows = []
    for loss in losses.values():
        grads: Sequence[Tensor | None] = [None] * len(inputs)
        if loss is not None and loss.requires_grad:
            grads = torch.autograd.grad(loss, inputs, torch.ones_like(loss), retain_graph=True, allow_unused=True)
        flat = []
        for k, (grad, tensor) in enumerate(zip(grads, inputs, strict=True)):
            row = torch.zeros(tensor.shape, dtype=torch.float64) if grad is None else grad.to_dense().double()
            flat.append((row if metric is None else row * metric[k].double().sqrt()).flatten())
        rows.append(torch.cat(flat))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def assert_close(got: Tensor, want: Tensor, rel: float = 1e-10) -> None:
    """``|ΔG_ij| <= rel · n_i n_j``."""
    norms = want.diagonal().sqrt()
    assert got.dtype == torch.float64
    assert torch.equal(got, got.T)
    assert ((got - want).abs() <= rel * norms[:, None] * norms[None, :] + 1e-300).all(), (got, want)


def shared_leaves(losses: Mapping[str, Tensor], model: nn.Module) -> list[Tensor]:
    """Parameters that two losses reach, found by asking for their gradients."""
    params = [p for p in model.parameters() if p.requires_grad]
    reached = [0] * len(params)
    for loss in losses.values():
        grads = torch.autograd.grad(loss, params, torch.ones_like(loss), retain_graph=True, allow_unused=True)
        reached = [n + (g is not None) for n, g in zip(reached, grads, strict=True)]
    return [p for p, n in zip(params, reached, strict=True) if n > 1]


# ---- architectures ---------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """A trunk with one linear head and one loss for each task, on features of any shape ``[N, ..., width]``."""

    def __init__(self, trunk: nn.Module, width: int, make_input: Callable[[], Tensor], tasks: int = 3) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(tasks))
        self.make_input = make_input

    def features(self) -> Tensor:
        out = self.trunk(self.make_input())
        return out[0] if isinstance(out, tuple) else out

    def forward(self) -> Losses:
        features = self.features()
        return {f"t{i}": (h(features) ** 2).mean() * 10**i for i, h in enumerate(self.heads)}


def gaussian(*shape: int) -> Callable[[], Tensor]:
    x = torch.randn(*shape)
    return lambda: x


def tokens(*shape: int) -> Callable[[], Tensor]:
    x = torch.randint(0, 7, shape)
    return lambda: x


def mlp() -> nn.Module:
    return Heads(nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6), nn.Tanh()), 6, gaussian(4, 5))


def cnn() -> nn.Module:
    trunk = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.GroupNorm(2, 6),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    return Heads(trunk, 6, gaussian(4, 3, 6, 6))


class UNet(Heads):
    """Heads that read features at several depths, so that shared nodes lie below shared nodes."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), 12, gaussian(3, 4))

    def features(self) -> Tensor:
        h, levels = self.make_input(), []
        for layer in self.trunk:
            h = torch.tanh(layer(h))
            levels.append(h)
        return torch.cat(levels, -1)

    def forward(self) -> Losses:
        h, levels = self.make_input(), []
        for layer in self.trunk:
            h = torch.tanh(layer(h))
            levels.append(h)
        # Each head joins the levels itself: every level is handed to every task.
        return {
            f"t{i}": (head(torch.cat(levels, -1)) ** 2).mean() + levels[i].sum() for i, head in enumerate(self.heads)
        }


class Tied(Heads):
    """Decoder weights tied to the embedding, as in language models; the head of task 0 uses them once more."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(7, 4), 4, tokens(3, 5))
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.trunk.weight

    def forward(self) -> Losses:
        losses = super().forward()
        logits = self.decoder(torch.tanh(self.features()))
        losses["t0"] = losses["t0"] + nn.functional.cross_entropy(logits.flatten(0, 1), self.make_input().flatten())
        losses["t1"] = losses["t1"] + logits.logsumexp(-1).mean()
        return losses


class Reused(Heads):
    """One module called three times, and its weight used by its parent as well."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 5), 5, gaussian(4, 5))

    def features(self) -> Tensor:
        h = self.make_input()
        for _ in range(3):
            h = torch.sin(self.trunk(h))
        return h @ self.trunk.weight.T + self.trunk.bias


class Frozen(Heads):
    """Frozen, unused and partly shared parameters; task 2 does not reach the second layer."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(5, 5) for _ in range(4)), 5, gaussian(4, 5))
        self.trunk[1].weight.requires_grad_(False)
        self.trunk[3].requires_grad_(True)

    def forward(self) -> Losses:
        low = torch.tanh(self.trunk[1](torch.tanh(self.trunk[0](self.make_input()))))
        high = torch.tanh(self.trunk[2](low))
        return {f"t{i}": (h(low if i == 2 else high) ** 2).mean() for i, h in enumerate(self.heads)}


def lstm() -> nn.Module:
    return Heads(nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True), 10, gaussian(3, 4, 4))


def gru() -> nn.Module:
    return Heads(nn.GRU(4, 5, num_layers=2, dropout=0.2), 5, gaussian(4, 3, 4))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    return Heads(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 8, gaussian(2, 5, 8))


def embedding() -> nn.Module:
    return Heads(nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4)), 4, tokens(3, 5))


class Checkpointed(Heads):
    """Non-reentrant activation checkpointing, with dropout inside, of the trunk and of the heads."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 6)), 6, gaussian(4, 5))
        self.dropped = nn.ModuleList(nn.Sequential(nn.Dropout(0.4), head) for head in self.heads)

    def forward(self) -> Losses:
        features = checkpoint(self.trunk, self.make_input(), use_reentrant=False)
        return {f"t{i}": (checkpoint(h, features, use_reentrant=False) ** 2).mean() for i, h in enumerate(self.dropped)}


class Parametrized(Heads):
    def __init__(self) -> None:
        trunk = nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)),
            nn.SELU(),
            nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
        )
        super().__init__(trunk, 6, gaussian(4, 5))


class Entangled(Heads):
    """Losses made of losses, a loss given twice, and a loss that is itself an operand of the next."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 6), 6, gaussian(4, 5))

    def forward(self) -> Losses:
        losses = super().forward()
        losses["sum"] = losses["t0"] + 2 * losses["t1"]
        losses["product"] = losses["sum"] * losses["t2"]
        losses["again"] = losses["t1"]
        return losses


class Splits(Heads):
    """A node with several outputs of which each task uses another one; an intermediate Fourier transform."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 9), 3, gaussian(4, 5))

    def forward(self) -> Losses:
        spectrum = torch.fft.ifft(torch.fft.fft(self.trunk(self.make_input())) * (1 + 0.5j)).real
        parts = spectrum.chunk(3, -1)
        return {f"t{i}": (h(part) ** 2).mean() for i, (h, part) in enumerate(zip(self.heads, parts, strict=True))}


class Vector(Heads):
    """Losses that are the entries of one vector."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 6), 6, gaussian(4, 5))
        self.all = nn.Linear(6, 4)

    def forward(self) -> Losses:
        out = (self.all(self.features()) ** 2).mean(0)
        return {f"t{i}": loss for i, loss in enumerate(out)}


class Apart(Heads):
    """Tasks that share nothing."""

    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(5, 6) for _ in range(3)), 6, gaussian(4, 5))

    def forward(self) -> Losses:
        x = self.make_input()
        return {
            f"t{i}": (h(torch.tanh(t(x))) ** 2).mean()
            for i, (t, h) in enumerate(zip(self.trunk, self.heads, strict=True))
        }


class OwnBatches(Heads):
    """Each task has its own samples: parameters are shared, activations are not."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6)), 6, gaussian(6, 5))

    def forward(self) -> Losses:
        chunks = self.make_input().chunk(3)
        return {
            f"t{i}": (h(self.trunk(x)) ** 2).mean() for i, (h, x) in enumerate(zip(self.heads, chunks, strict=True))
        }


class _Scaled(torch.autograd.Function):
    """A user's function whose backward returns plain zeros for one operand and nothing for another."""

    @staticmethod
    def forward(x: Tensor, unused: Tensor, ignored: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.shape = inputs[1].shape  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * 3, torch.zeros(ctx.shape), None  # type: ignore[attr-defined]


class Custom(Heads):
    def __init__(self) -> None:
        super().__init__(nn.ModuleList(nn.Linear(5, 5) for _ in range(3)), 5, gaussian(4, 5))

    def features(self) -> Tensor:
        x = self.make_input()
        return _Scaled.apply(self.trunk[0](x), self.trunk[1](x), self.trunk[2](x))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn_batchnorm_dropout": cnn,
    "nested_features": UNet,
    "tied_weights": Tied,
    "reused_module": Reused,
    "frozen_and_unused": Frozen,
    "lstm": lstm,
    "gru": gru,
    "transformer": transformer,
    "embedding": embedding,
    "checkpoint": Checkpointed,
    "parametrized": Parametrized,
    "entangled_losses": Entangled,
    "split_outputs": Splits,
    "vector_of_losses": Vector,
    "share_nothing": Apart,
    "own_batches": OwnBatches,
    "custom_function": Custom,
}


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield ARCHITECTURES[request.param]()
    torch.set_default_dtype(default)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    state = {f"state {name}": value.clone() for name, value in model.state_dict().items()}
    return {**state, "random numbers": torch.get_rng_state()}


def assert_same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gramian_of_the_shared_parameters(model: nn.Module, method: str) -> None:
    losses = model()
    want = oracle(losses, shared_leaves(losses, model) or list(model.parameters()))
    before = snapshot(model)
    stats = gradstats.from_losses(losses, method=method, retain_graph=True)
    assert_same(before, snapshot(model))
    assert_close(stats.gram, want)
    assert stats.names == tuple(losses)
    assert stats.method == method or method in ("auto", "batched")
    assert stats.present.all()
    assert all(p.grad is None for p in model.parameters())
    # Twice on one graph, and what was hooked is unhooked.
    assert torch.equal(gradstats.from_losses(losses, method=method, retain_graph=True).gram, stats.gram)
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_gramian_of_all_parameters_by_module(model: nn.Module, method: str) -> None:
    losses = model()
    stats = gradstats.from_losses(losses, model, method=method, group_by="module", retain_graph=True)
    assert_close(stats.gram, oracle(losses, [p for p in model.parameters() if p.requires_grad]))
    assert_close(torch.stack([group.gram for group in stats.groups.values()]).sum(0), stats.gram, 1e-14)
    for name, group in stats.groups.items():
        members = [p for n, p in model.named_parameters() if n.rpartition(".")[0] == name and p.requires_grad]
        assert_close(group.gram, oracle(losses, members))


@pytest.mark.parametrize("which", [0, -1])
def test_gramian_of_one_parameter(model: nn.Module, which: int) -> None:
    """The backward passes no further than it must, and what flows elsewhere is left alone."""
    losses = model()
    params = [p for p in shared_leaves(losses, model) or model.parameters() if p.requires_grad]
    stats = gradstats.from_losses(losses, params[which], method="batched", retain_graph=True)
    assert_close(stats.gram, oracle(losses, [params[which]]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["shared", "all", "first", "last"])
def test_backward_adds_the_weighted_gradient(model: nn.Module, method: str, which: str) -> None:
    losses = model()
    params = [p for p in model.parameters() if p.requires_grad]
    inputs = {"shared": None, "all": model, "first": params[:1], "last": params[-1:]}[which]
    weights = [0.3 + 0.5 * i for i in range(len(losses))]
    sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)).backward(retain_graph=True)
    want = [None if p.grad is None else 2 * p.grad for p in params]
    fired = []
    handles = [p.register_post_accumulate_grad_hook(lambda p: fired.append(p)) for p in params]
    stats = gradstats.backward(
        losses, weights, inputs, method="auto" if method == "batched" else method, retain_graph=True
    )
    for p, grad in zip(params, want, strict=True):
        if grad is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12)
    if method == "batched":
        assert len(fired) == sum(grad is not None for grad in want)
        assert len({id(p) for p in fired}) == len(fired)
    for handle in handles:
        handle.remove()
    if which == "all":
        assert_close(stats.gram, oracle(losses, params))
    elif inputs is not None:
        assert_close(stats.gram, oracle(losses, inputs))


@st.composite
def random_graphs(draw: st.DrawFn) -> dict[str, list]:
    """A random acyclic network: who reads whom, what each loss reads, and what is differentiated."""
    size = draw(st.integers(2, 7))
    reads = [draw(st.lists(st.integers(0, max(i - 1, 0)), min_size=1, max_size=3)) for i in range(size)]
    own = [draw(st.integers(0, 3)) for _ in range(size)]  # which parameter each node uses
    losses = draw(st.lists(st.lists(st.integers(0, size - 1), min_size=1, max_size=3), min_size=1, max_size=4))
    chains = [draw(st.none() | st.integers(0, max(t - 1, 0))) for t in range(len(losses))]
    inputs = draw(st.lists(st.integers(0, size + 3), min_size=1, max_size=4, unique=True))
    return {"reads": reads, "own": own, "losses": losses, "chains": chains, "inputs": inputs}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=random_graphs())
def test_any_graph_and_any_inputs(spec: dict[str, list]) -> None:
    """Fused and plain collection agree with the plain way wherever losses part and inputs lie."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(4)]
    nodes: list[Tensor] = []
    for i, (reads, own) in enumerate(zip(spec["reads"], spec["own"], strict=True)):
        below = sum((nodes[j] for j in reads if j < i), torch.full((3,), 0.3, dtype=torch.float64))
        nodes.append(torch.sin(below * params[own] + i))
    losses: Losses = {}
    for t, (reads, chain) in enumerate(zip(spec["losses"], spec["chains"], strict=True)):
        loss = sum((nodes[j] * (t + j + 1)).square().sum() for j in reads)
        losses[f"t{t}"] = loss * losses[f"t{chain}"] if chain is not None and chain < t else loss
    inputs = [(nodes + params)[k] for k in spec["inputs"] if k < len(nodes) + len(params)]
    reached = {id(p) for p in params for n in losses.values() if _grad(n, p) is not None}
    if all(_grad(loss, tensor) is None for loss in losses.values() for tensor in inputs):
        with pytest.raises(ValueError, match="no loss reaches"):
            gradstats.from_losses(losses, inputs)
        return
    want = oracle(losses, inputs)
    weights = [0.5 + t for t in range(len(losses))]
    assert_close(gradstats.from_losses(losses, inputs, method="batched", retain_graph=True).gram, want)
    assert_close(gradstats.from_losses(losses, inputs, method="sequential", retain_graph=True).gram, want)
    total = sum(w * loss for w, loss in zip(weights, losses.values(), strict=True))
    grads = [_grad(total, p) for p in params]
    stats = gradstats.backward(losses, weights, inputs, method="batched")
    assert_close(stats.gram, want)
    for p, grad in zip(params, grads, strict=True):
        assert (p.grad is not None) == (id(p) in reached)
        if grad is not None:
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


def _grad(loss: Tensor, tensor: Tensor) -> Tensor | None:
    return torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)[0]


# ---- what may be passed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_forms_of_inputs_give_the_same(method: str) -> None:
    model = mlp()
    losses = model()
    named = dict(model.trunk.named_parameters())
    want = oracle(losses, list(named.values()))
    forms = [
        None,
        model.trunk,
        named,
        list(named.items()),
        list(named.values()),
        [*named.values(), model.trunk[0].weight],
        {**named, "again": model.trunk[2].bias},
        named.values(),
        model.trunk.parameters(),
    ]
    for form in forms:
        stats = gradstats.from_losses(losses, form, method=method, retain_graph=True)
        assert_close(stats.gram, want, 1e-6)
    first = gradstats.from_losses(losses, model.trunk[0].weight, method=method, retain_graph=True)
    assert_close(first.gram, oracle(losses, [model.trunk[0].weight]), 1e-6)


@pytest.mark.parametrize("method", ["batched", "sequential"])
def test_activations_as_inputs(method: str) -> None:
    model = mlp()
    hidden = torch.tanh(model.trunk[0](model.make_input()))
    features = model.trunk[2](hidden)
    losses = {f"t{i}": (h(features) ** 2).mean() for i, h in enumerate(model.heads)}
    for inputs in (
        [features],
        [hidden],
        [features, hidden],
        [hidden, features, model.trunk[0].weight, model.heads[1].weight],
    ):
        stats = gradstats.from_losses(losses, inputs, method=method, retain_graph=True)
        assert_close(stats.gram, oracle(losses, inputs), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_forms_of_losses_give_the_same(method: str) -> None:
    model = Vector()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    vector = torch.stack(list(model().values()))
    want = oracle(
        {str(i): loss for i, loss in enumerate(vector)}, [model.trunk.weight, model.trunk.bias, *model.all.parameters()]
    )
    with torch.no_grad():
        stats = gradstats.from_losses(vector, method=method, retain_graph=True)
    assert_close(stats.gram, want, 1e-6)
    assert stats.names == ("task0", "task1", "task2", "task3")
    for losses in ([loss.reshape(1) for loss in vector], tuple(loss.reshape(1, 1) for loss in vector)):
        assert_close(gradstats.from_losses(losses, method=method, retain_graph=True).gram, want, 1e-6)
    model.zero_grad()
    gradstats.backward([loss.reshape(1) for loss in vector], torch.ones(4), method=method, retain_graph=True)
    fused = [p.grad.clone() for p in model.all.parameters()]
    model.zero_grad()
    vector.sum().backward()
    torch.testing.assert_close(fused, [p.grad for p in model.all.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_absent_tasks_have_zero_rows(method: str) -> None:
    model = mlp()
    full = model()
    losses = {
        "a": full["t0"],
        "missing": None,
        "b": full["t1"],
        "detached": full["t2"].detach(),
        "c": torch.tensor(1.0),
    }
    stats = gradstats.from_losses(losses, model, method=method, retain_graph=True)
    assert_close(stats.gram, oracle(losses, list(model.parameters())), 1e-6)
    assert stats.present.tolist() == [True, False, True, False, False]
    assert stats.names == ("a", "missing", "b", "detached", "c")
    model.zero_grad()
    gradstats.backward(losses, dict.fromkeys(losses, 2.0), method=method, retain_graph=True)
    fused = [p.grad for p in model.trunk.parameters()]
    want = torch.autograd.grad(2 * (losses["a"] + losses["b"]), list(model.trunk.parameters()))
    torch.testing.assert_close(fused, list(want))


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_reaches_no_input_is_present_with_a_zero_row(method: str) -> None:
    model = mlp()
    losses = {**model(), "head only": (model.heads[0].weight ** 2).sum()}
    stats = gradstats.from_losses(losses, model.trunk, method=method)
    assert stats.present.all()
    assert (stats.gram[3] == 0).all()
    assert (stats.gram.diagonal()[:3] > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_one_task(method: str) -> None:
    model = mlp()
    loss = model()["t1"]
    reached = [*model.trunk.parameters(), *model.heads[1].parameters()]
    stats = gradstats.from_losses({"only": loss}, method=method, retain_graph=True)
    assert_close(stats.gram, oracle({"only": loss}, reached), 1e-6)
    gradstats.backward([loss], [3.0], method=method, retain_graph=True)
    torch.testing.assert_close([p.grad for p in reached], list(torch.autograd.grad(3 * loss, reached)))


@pytest.mark.parametrize("method", METHODS)
def test_permuting_tasks_permutes_the_gramian(method: str) -> None:
    model = cnn()
    losses = model()
    order = ["t2", "t0", "t1"]
    want = gradstats.from_losses(losses, model, method=method, retain_graph=True).gram
    got = gradstats.from_losses({name: losses[name] for name in order}, model, method=method, retain_graph=True).gram
    index = torch.tensor([2, 0, 1])
    assert_close(got, want[index][:, index], 1e-6)


def test_shared_parameters_are_found_without_a_backward() -> None:
    model = Frozen()
    losses = model()
    found = gradstats.shared_parameters(losses, model)
    assert [*found.values()] == shared_leaves(losses, model)
    assert list(found) == ["trunk.0.weight", "trunk.0.bias", "trunk.1.bias", "trunk.2.weight", "trunk.2.bias"]
    apart = Apart()
    assert gradstats.shared_parameters(apart(), apart) == {}
    sum(losses.values()).backward()


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_metric(method: str) -> None:
    model = Reused()
    losses = model()
    params = [model.trunk.weight, model.heads[0].weight, model.trunk.bias]
    metric = [torch.rand_like(p) + 0.1 for p in params]
    want = oracle(losses, params, metric)
    stats = gradstats.from_losses(losses, params, method=method, metric=metric, retain_graph=True)
    assert_close(stats.gram, want, 1e-6)
    twice = gradstats.from_losses(
        losses, [params[0], *params], method=method, metric=[metric[0], *metric], retain_graph=True
    )
    assert_close(twice.gram, want, 1e-6)
    named = {"w": params[0], "h": params[1], "b": params[2]}
    by_name = {"b": metric[2], "w": metric[0], "h": metric[1], "not an input": metric[0]}
    stats = gradstats.from_losses(losses, named, method=method, metric=by_name, retain_graph=True)
    assert_close(stats.gram, want, 1e-6)


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)])
def test_loss_scale_is_undone_in_the_gramian_alone(scale: float | Tensor) -> None:
    model = mlp()
    losses = model()
    plain = gradstats.from_losses(losses, retain_graph=True).gram
    scaled = {name: loss * scale for name, loss in losses.items()}
    stats = gradstats.backward(scaled, torch.ones(3), loss_scale=scale)
    assert_close(stats.gram, plain, 1e-6)
    want = torch.autograd.grad(sum(model().values()) * scale, model.trunk[0].weight)[0]
    torch.testing.assert_close(model.trunk[0].weight.grad, want, rtol=1e-4, atol=1e-4)


def test_stored_gradients_may_be_rounded() -> None:
    model = mlp()
    losses = model()
    want = oracle(losses, list(model.trunk.parameters()))
    stats = gradstats.from_losses(losses, method="sequential", store_dtype=torch.bfloat16, retain_graph=True)
    assert_close(stats.gram, want, 2**-7)
    assert not torch.allclose(stats.gram, want, rtol=1e-6)


def test_groups_by_parameter_and_by_function() -> None:
    model = mlp()
    losses = model()
    stats = gradstats.from_losses(losses, model.trunk, group_by="parameter", retain_graph=True)
    assert list(stats.groups) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    stats = gradstats.from_losses(losses, model.trunk, group_by=lambda name: name[-4:], retain_graph=True)
    assert list(stats.groups) == ["ight", "bias"]
    assert_close(stats.groups["bias"].gram, oracle(losses, [model.trunk[0].bias, model.trunk[2].bias]), 1e-6)
    assert stats.groups["bias"].names == stats.names
    assert stats.groups["bias"].method == stats.method


# ---- what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_the_graph_is_kept_or_freed(method: str) -> None:
    model = mlp()
    for _ in range(2):
        losses = model()
        gradstats.from_losses(losses, method=method)
        with pytest.raises(RuntimeError, match="second time"):
            sum(losses.values()).backward()
        losses = model()
        gradstats.from_losses(losses, method=method, retain_graph=True)
        model.zero_grad()
        sum(losses.values()).backward(retain_graph=True)
        grads = [p.grad for p in model.parameters()]
        gradstats.from_losses(losses, method=method)
        with pytest.raises(RuntimeError, match="second time"):
            sum(losses.values()).backward()
        losses = model()
        model.zero_grad()
        gradstats.backward(losses, [1.0, 1.0, 1.0], method=method)
        torch.testing.assert_close([p.grad for p in model.parameters()], grads)
        with pytest.raises(RuntimeError, match="second time"):
            sum(losses.values()).backward()
        with pytest.raises(RuntimeError, match="second time"):
            gradstats.from_losses(losses, method=method)


@pytest.mark.parametrize("fused", [False, True])
def test_freeing_the_graph_leaves_the_rest_alone(model: nn.Module, fused: bool) -> None:
    losses = model()
    params = [p for p in model.parameters() if p.requires_grad]
    want = [_grad(sum(losses.values()), p) for p in params]
    before = snapshot(model)
    stats = (
        gradstats.backward(losses, torch.ones(len(losses)), model) if fused else gradstats.from_losses(losses, model)
    )
    assert stats.method in ("batched", "blockwise")
    assert_same(before, snapshot(model))
    for p, grad in zip(params, want, strict=True):
        if fused and grad is not None:
            torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12)
        else:
            assert p.grad is None
    with pytest.raises(RuntimeError, match="second time"):
        sum(losses.values()).backward()


@pytest.mark.parametrize("method", METHODS)
def test_grad_is_left_as_it_was(method: str) -> None:
    model = cnn()
    losses = model()
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    gradstats.from_losses(losses, model.trunk, method=method)
    for p, (grad, value) in zip(model.parameters(), before, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)


@pytest.mark.parametrize("method", METHODS)
def test_training_with_a_gramian_every_other_step_is_training(method: str) -> None:
    """With extra forwards between, gradients accumulated over two batches, and parameters thawed on the way."""
    model = cnn()
    twin = copy.deepcopy(model)
    model.trunk[0].bias.requires_grad_(False)
    twin.trunk[0].bias.requires_grad_(False)
    runs = []
    for net, collects in ((model, True), (twin, False)):
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for step in range(6):
            if step == 3:
                net.trunk[0].bias.requires_grad_(True)
            losses = net()
            net()
            if collects and step % 2 == 0:
                stats = gradstats.from_losses(losses, method=method, retain_graph=True)
                assert_close(stats.gram, oracle(losses, shared_leaves(losses, net)), 1e-6)
            sum(losses.values()).backward()
            if step % 2:
                optimizer.step()
                optimizer.zero_grad()
        runs.append(snapshot(net))
    assert_same(*runs)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_the_user_run_and_stay(method: str) -> None:
    model = mlp()
    calls = []

    def double(grad: Tensor) -> Tensor:
        calls.append(1)
        return grad * 2

    model.trunk[0].weight.register_hook(double)
    model.trunk[2].register_full_backward_hook(lambda *_: calls.append(2))
    model.heads[1].weight.register_hook(double)
    losses = model()
    want = oracle(losses, list(model.parameters()))
    for _ in range(2):
        calls.clear()
        stats = gradstats.from_losses(losses, model, method=method, retain_graph=True)
        assert_close(stats.gram, want, 1e-6)
        assert {1, 2} <= set(calls)
    gradstats.backward(losses, torch.ones(3), method=method, retain_graph=True)
    fused = [p.grad for p in model.parameters()]
    model.zero_grad()
    sum(losses.values()).backward()
    torch.testing.assert_close(fused, [p.grad for p in model.parameters()])


def test_a_failing_accumulation_is_not_repeated() -> None:
    """What goes wrong once gradients are being accumulated is the user's to see, not a reason to start again."""
    model = mlp()

    def refuse(p: Tensor) -> None:
        raise OSError("full")

    model.trunk[0].weight.register_post_accumulate_grad_hook(refuse)
    with pytest.raises(OSError, match="full"):
        gradstats.backward(model(), torch.ones(3))


def test_a_failure_midway_leaves_no_hook_and_no_gradient() -> None:
    model = mlp()
    losses = model()

    def refuse(grad: Tensor) -> Tensor:
        raise OSError("no")

    for method in METHODS:
        handle = model.trunk[0].weight.register_hook(refuse)
        with pytest.raises((OSError, RuntimeError), match="no"):
            gradstats.backward(losses, torch.ones(3), method=method, retain_graph=True)
        handle.remove()
        assert not any(p._backward_hooks for p in model.parameters())
        assert all(p.grad is None for p in model.parameters())
    want = torch.autograd.grad(sum(losses.values()), list(model.parameters()), retain_graph=True)
    sum(losses.values()).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), want, strict=True))


def test_fused_sparse_gradients_stay_sparse_beside_dense_ones() -> None:
    embedding = nn.Embedding(7, 4, sparse=True)
    model = Heads(nn.Sequential(embedding, nn.Linear(4, 5)), 5, tokens(3, 5))
    weights, params = torch.tensor([0.5, 2.0, 3.0]), list(model.parameters())
    stats = gradstats.backward(model(), weights, model.trunk)
    fused = [p.grad for p in params]
    assert embedding.weight.grad.is_sparse
    model.zero_grad()
    assert_close(stats.gram, oracle(losses := model(), list(model.trunk.parameters())), 1e-6)
    sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)).backward()
    torch.testing.assert_close([g.to_dense() for g in fused], [p.grad.to_dense() for p in params])


# ---- falling back ----------------------------------------------------------------------------------------------------


class SparseEmbedding(Heads):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(7, 4, sparse=True), 4, tokens(3, 5))


class _Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.numpy() * 2)


class NumpyBackward(Heads):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4), 4, gaussian(4, 5))

    def features(self) -> Tensor:
        return _Numpy.apply(super().features())


class ReadsValues(Heads):
    """A hook on an activation that looks at the numbers, as gradient loggers do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4), 4, gaussian(4, 5))
        self.seen: list[float] = []

    def features(self) -> Tensor:
        out = super().features()
        out.register_hook(lambda grad: self.seen.append(float(grad.norm())))
        return out


class Compiled(Heads):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), 4, gaussian(4, 5))
        self.compiled = torch.compile(self.trunk, backend="aot_eager")

    def features(self) -> Tensor:
        return self.compiled(self.make_input())


@pytest.mark.parametrize("build", [SparseEmbedding, NumpyBackward, ReadsValues, Compiled])
def test_what_vmap_refuses_is_passed_task_by_task(build: Callable[[], Heads], caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    losses = model()
    params = list(model.parameters())
    want = oracle(losses, params)
    # A part that is passed task by task anyway, with the heads, or an error.
    try:
        outcome = gradstats.from_losses(losses, model, method="batched", retain_graph=True).method
    except RuntimeError as error:
        outcome = str(error)
    assert outcome == "blockwise" or "'batched' failed on this graph" in outcome
    # With a graph that need not be kept: a second try must find it whole.
    for collects in (gradstats.from_losses, lambda losses, _: gradstats.backward(losses, torch.ones(3), model)):
        stats = collects(model(), model)
        assert stats.method == "blockwise"
        assert_close(stats.gram, want, 1e-6)
    model.zero_grad()
    for _ in range(3):
        assert_close(gradstats.from_losses(losses, model, retain_graph=True).gram, want, 1e-6)
        gradstats.backward(losses, torch.ones(3), retain_graph=True)
    assert sum(record.name.startswith("gradstats") for record in caplog.records) <= 1
    fused = [p.grad.to_dense() for p in params]
    model.zero_grad()
    for _ in range(3):
        sum(losses.values()).backward(retain_graph=True)
    torch.testing.assert_close(fused, [p.grad.to_dense() for p in params])
    # A model that it takes is not affected.
    assert gradstats.from_losses(mlp()()).method == "batched"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["weight", "activation"])
def test_a_hook_that_reads_values(where: str, fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What vmap took at one step it may refuse at the next, where nothing of the graph shows why."""
    model = mlp()
    for hooked in (False, False, True, True):
        model.zero_grad()
        inner = model.trunk[0](model.make_input())
        features = model.trunk[1:](inner)
        if hooked:
            handle = (inner if where == "activation" else model.trunk[0].weight).register_hook(
                lambda g: g * float(g.norm())
            )
        losses = {f"t{i}": (h(features) ** 2).mean() for i, h in enumerate(model.heads)}
        want = oracle(losses, list(model.trunk.parameters()))
        (grad,) = torch.autograd.grad(sum(losses.values()), model.trunk[0].weight, retain_graph=True)
        if fused:
            stats = gradstats.backward(losses, torch.ones(3), model.trunk)
            # The hook on an activation is not linear: it sees single tasks here, and their sum there.
            assert (where == "activation" and hooked) or torch.allclose(model.trunk[0].weight.grad, grad)
        else:
            stats = gradstats.from_losses(losses, model.trunk)
        assert_close(stats.gram, want, 1e-6)
        assert stats.method == ("blockwise" if hooked else "batched")
        if hooked:
            handle.remove()
    (warning,) = [record for record in caplog.records if record.name.startswith("gradstats")]
    assert "vmap refuses" in warning.getMessage()
    assert "\n" not in warning.getMessage()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("depth", [2, 4, 5, 8])
def test_a_hook_that_changes_gradients_counts_once(depth: int, fused: bool) -> None:
    """A gradient must not pass it twice, on its way out of one segment and into the next."""
    layers = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.Tanh())]
    model = Heads(nn.Sequential(*layers), 64, gaussian(3, 64))
    features = model.trunk[:depth](model.make_input())
    features.register_hook(lambda grad: grad * 3)
    features = model.trunk[depth:](features)
    losses = {f"t{i}": (h(features) ** 2).mean() for i, h in enumerate(model.heads)}
    params = list(model.trunk.parameters())
    want = oracle(losses, params)
    grads = torch.autograd.grad(sum(losses.values()), params, retain_graph=True)
    for method in ("auto", "batched", "blockwise"):
        model.zero_grad()
        if fused:
            stats = gradstats.backward(losses, torch.ones(3), params, method=method, max_bytes=10**9, retain_graph=True)
            torch.testing.assert_close([p.grad for p in params], list(grads))
        else:
            stats = gradstats.from_losses(losses, params, method=method, retain_graph=True)
        assert_close(stats.gram, want, 1e-6)


def test_what_is_wrong_with_the_graph_is_no_refusal(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    losses = model()
    losses["t0"].backward()
    with pytest.raises(RuntimeError, match=r"^Trying to backward through the graph a second time"):
        gradstats.from_losses(losses)
    assert not caplog.records
    assert gradstats.from_losses(model()).method == "batched"


def test_hooks_that_expect_a_gradient_do_no_harm_where_the_graph_is_freed() -> None:
    model = mlp()
    features = model.features()
    features.register_hook(lambda grad: grad * 2)
    losses = {f"t{i}": (h(features) ** 2).mean() for i, h in enumerate(model.heads)}
    want = oracle(losses, list(model.trunk.parameters()))
    assert_close(gradstats.from_losses(losses).gram, want, 1e-6)


# ---- numbers that are not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_head_shows_in_its_own_row_alone(method: str, bad: float) -> None:
    model = mlp()
    features = model.features()
    losses = {f"t{i}": (h(features) ** 2).mean() for i, h in enumerate(model.heads)}
    clean = oracle(losses, list(model.trunk.parameters()))
    # Its backward multiplies every cotangent by inf: also a zero one, which would then be NaN.
    losses["t1"] = (features * 0).sum().sqrt() * bad
    stats = gradstats.from_losses(losses, model.trunk, method=method)
    assert stats.non_finite_names == ("t1",)
    keep = torch.tensor([0, 2])
    assert_close(stats.gram[keep][:, keep], clean[keep][:, keep], 1e-6)


class Roots(nn.Module):
    """Two losses share an infinite derivative, which the third does not reach; the fourth task is absent."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Parameter(torch.randn(4)), nn.Parameter(torch.zeros(4))

    def forward(self, *, above_all: bool) -> dict[str, Tensor | None]:
        p = self.low
        # Above the parameter that all tasks share, or beside it.
        roots = ((p - p.detach()) if above_all else self.high).sqrt()
        losses = {"a": roots.sum() + p.sum(), "b": (roots * 2).sum() + (p * p).sum(), "c": (p * 3).sum()}
        return {**losses, "absent": None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("above_all", [False, True])
def test_an_infinite_derivative_shows_in_the_tasks_that_reach_it_alone(method: str, above_all: bool) -> None:
    model = Roots()
    losses = model(above_all=above_all)
    for collects in (
        lambda: gradstats.from_losses(losses, model, method=method, retain_graph=True),
        lambda: gradstats.backward(losses, torch.ones(4), model, method=method, retain_graph=True),
    ):
        stats = collects()
        assert stats.non_finite_names == ("a", "b")
        assert stats.gram[2, 2] == 36
        assert (stats.gram[3] == 0).all()
    # The weighted gradient is spoilt where an ordinary backward spoils it, and nowhere else.
    fused = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    (losses["a"] + losses["b"] + losses["c"]).backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(fused, want, equal_nan=True)


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_with_a_scaler(method: str) -> None:
    model = transformer().eval()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model()
        # Inside the region, as in a loop that wraps its whole step.
        scaled = {name: scaler.scale(loss) for name, loss in losses.items()}
        stats = gradstats.from_losses(scaled, model, method=method, loss_scale=scaler.get_scale(), retain_graph=True)
    assert_close(stats.gram, oracle(losses, list(model.parameters())), 2e-2)
    outside = gradstats.from_losses(losses, model, method=method)
    assert_close(stats.gram, outside.gram, 2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_bfloat16_model_has_a_float64_gramian(method: str) -> None:
    model = mlp().bfloat16()
    x = model.make_input().bfloat16()
    features = model.trunk(x)
    losses = {f"t{i}": (h(features) ** 2).mean().float() for i, h in enumerate(model.heads)}
    stats = gradstats.backward(losses, [0.3, 1.7, 1.0], model, method=method, retain_graph=True)
    assert_close(stats.gram, oracle(losses, list(model.parameters())), 2e-2)
    for p in model.parameters():
        (want,) = torch.autograd.grad(0.3 * losses["t0"] + 1.7 * losses["t1"] + losses["t2"], p, retain_graph=True)
        assert p.grad.dtype == torch.bfloat16
        torch.testing.assert_close(p.grad, want, rtol=3e-2, atol=3e-2 * float(want.abs().max()))


# ---- hidden parameters -----------------------------------------------------------------------------------------------


def test_reentrant_checkpoints_need_the_engine() -> None:
    model = Heads(nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]), 5, gaussian(4, 5))
    hidden = model.trunk[0](model.make_input())
    plain = {f"t{i}": (h(model.trunk[1](hidden)) ** 2).mean() for i, h in enumerate(model.heads)}
    features = checkpoint(model.trunk[1], hidden, use_reentrant=True)
    losses = {f"t{i}": (h(features) ** 2).mean() for i, h in enumerate(model.heads)}
    want = oracle(plain, list(model.trunk.parameters()))
    stats = gradstats.from_losses(losses, model.trunk, retain_graph=True)
    assert stats.method == "engine"
    assert_close(stats.gram, want, 1e-6)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="inputs: the graph holds reentrant"):
        gradstats.from_losses(losses, retain_graph=True)
    for method in ("batched", "sequential"):
        with pytest.raises(ValueError, match="method='engine'"):
            gradstats.from_losses(losses, model.trunk, method=method, retain_graph=True)


def _fsdp_worker(rank: int, world: int, port: int, queue: torch.multiprocessing.SimpleQueue) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, world, rank == 0)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, store=store)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    x = torch.randn(8, 5)
    local = copy.deepcopy(model)
    want = list((local(x) ** 2).mean(0))
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    losses = list((model(x.chunk(world)[rank]) ** 2).mean(0))
    stats = gradstats.from_losses(losses, model, group_by="module", retain_graph=True)
    same_graph = gradstats.from_losses(losses, model, retain_graph=True)
    torch.stack(losses).sum().backward()
    weighted = list(torch.autograd.grad(sum(want), list(local.parameters()), retain_graph=True))
    error = max(
        float((p.grad.full_tensor() - g).abs().max()) for p, g in zip(model.parameters(), weighted, strict=True)
    )
    try:
        gradstats.from_losses(list((model(x) ** 2).mean(0)))
        refused = False
    except ValueError as e:
        refused = "pass the model" in str(e)
    if rank == world - 1:
        gram = oracle({str(i): loss for i, loss in enumerate(want)}, list(local.parameters()))
        queue.put((stats.method, stats.gram.tolist(), same_graph.gram.tolist(), gram.tolist(), error, refused))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_fsdp2_gives_the_gramian_of_the_averaged_gradients(world: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_fsdp_worker, (world, port, queue), nprocs=world)
    method, gram, again, want, error, refused = queue.get()
    assert method == "engine"
    assert_close(torch.tensor(gram, dtype=torch.float64), torch.tensor(want, dtype=torch.float64), 1e-6)
    assert_close(torch.tensor(again, dtype=torch.float64), torch.tensor(gram, dtype=torch.float64), 1e-12)
    assert error < 1e-6
    assert refused


# ---- the seams for the Scalarizer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_reduce_sees_every_block_before_it_is_folded(method: str) -> None:
    model = Frozen()
    losses = model()
    names, values = list(losses), list(losses.values())
    params = [p for p in model.parameters() if p.requires_grad]
    shapes = []

    def halve(block: Tensor) -> Tensor:
        shapes.append(tuple(block.shape))
        return block / 2

    stats = collect(names, values, params, method=method, reduce=halve, weights=[1.0, 1.0, 1.0], retain_graph=True)
    assert_close(stats.gram, oracle(losses, params) / 4, 1e-6)
    if method in ("auto", "batched", "blockwise"):
        expected = [(3, *p.shape) for p in params if not any(p is q for q in model.trunk[3].parameters())]
        assert sorted(shapes) == sorted(expected)
    else:
        assert shapes == [(3, *p.shape) for p in params]
    # What goes into .grad is not reduced: that is left to the data-parallel wrapper's own hooks.
    want = torch.autograd.grad(sum(values), model.trunk[0].weight)[0]
    torch.testing.assert_close(model.trunk[0].weight.grad, want)


def test_signature_tells_different_work_apart() -> None:
    model = mlp()
    names = ["t0", "t1", "t2"]
    losses = list(model().values())
    same = signature(names, losses, model.trunk)
    assert same == signature(names, list(model().values()), model.trunk)
    assert 0 <= same < 2**63
    others = [
        signature(names, [losses[0], None, losses[2]], model.trunk),
        signature(names, losses, model),
        signature(names, losses, list(model.trunk.parameters())[::-1]),
        signature(names, [losses[0], losses[1], losses[2] * 2], model.trunk),
        signature(["a", "b", "c"], losses, model.trunk),
    ]
    assert len({same, *others}) == 6


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument() -> None:
    model = mlp()
    losses = model()
    w = model.trunk[0].weight
    cases: list[tuple[type[Exception], str, dict]] = [
        (ValueError, "losses: expected at least one task", {"losses": {}}),
        (ValueError, r"losses: expected a tensor \[T\].*shape \(\)", {"losses": losses["t0"]}),
        (TypeError, "losses: expected a mapping, a sequence or a tensor", {"losses": 3.0}),
        (TypeError, "losses: expected a floating-point tensor for task 't0', got float", {"losses": {"t0": 1.0}}),
        (TypeError, "losses: .*task 'a', got torch.int64", {"losses": {"a": torch.tensor(1)}}),
        (ValueError, r"losses: expected one number for task 'a', got shape \(2,\)", {"losses": {"a": torch.ones(2)}}),
        (TypeError, "losses: expected a sequence of strings", {"losses": {1: losses["t0"]}}),
        (ValueError, "losses: none of .* has a graph", {"losses": {"a": torch.tensor(1.0), "b": None}}),
        (ValueError, "inputs: expected at least one tensor", {"inputs": []}),
        (ValueError, "inputs: expected at least one tensor", {"inputs": nn.ReLU()}),
        (TypeError, "inputs: expected", {"inputs": 3}),
        (TypeError, r"inputs\[1\]: expected a tensor, got str", {"inputs": [w, "w"]}),
        (TypeError, r"inputs\['w'\]: expected a tensor, got int", {"inputs": {"w": 1}}),
        (TypeError, "inputs: expected names that are strings", {"inputs": {1: w}}),
        (ValueError, "inputs: expected different names", {"inputs": [("w", w), ("w", model.trunk[0].bias)]}),
        (ValueError, r"inputs\[0\]: expected a tensor that requires grad", {"inputs": [torch.ones(2)]}),
        (TypeError, r"inputs\[0\]: expected float32.*complex64", {"inputs": [torch.ones(2, dtype=torch.cfloat)]}),
        (ValueError, "inputs: no loss reaches any of the 1 inputs", {"inputs": [torch.ones(2, requires_grad=True)]}),
        (ValueError, "method: expected one of 'auto', .*got 'best'", {"method": "best"}),
        (TypeError, "owner: expected a tensor of integers", {"owner": torch.zeros(4)}),
        (
            ValueError,
            "max_bytes: bounds the methods that follow a plan .*not method='sequential'",
            {"max_bytes": 10**9, "method": "sequential"},
        ),
        (ValueError, "max_bytes: the leanest plan needs about [0-9]+ bytes, got 100", {"max_bytes": 100}),
        (ValueError, "store_dtype: needs method='sequential'", {"store_dtype": torch.bfloat16}),
        (ValueError, "store_dtype: expected", {"store_dtype": torch.int8, "method": "sequential"}),
        (ValueError, "group_by: needs named inputs", {"group_by": "module"}),
        (ValueError, "group_by: expected 'parameter'", {"group_by": "layer", "inputs": model}),
        (TypeError, "group_by: expected 'parameter'", {"group_by": 3, "inputs": model}),
        (TypeError, "group_by: expected a string for '0.weight'", {"group_by": len, "inputs": model.trunk}),
        (ValueError, "metric: expected 1 tensors", {"metric": [], "inputs": [w]}),
        (ValueError, r"metric\[0\]: expected shape \(7, 5\)", {"metric": [torch.ones(3)], "inputs": [w]}),
        (ValueError, r"metric\[0\]: expected device", {"metric": [torch.ones(7, 5, device="meta")], "inputs": [w]}),
        (TypeError, r"metric\[0\]: expected a floating-point tensor", {"metric": [1.0], "inputs": [w]}),
        (TypeError, "metric: expected a mapping", {"metric": 1.0, "inputs": [w]}),
        (ValueError, "metric: a mapping needs named inputs", {"metric": {"w": w}, "inputs": [w]}),
        (ValueError, r"metric: .*none for \['w'\]", {"metric": {}, "inputs": {"w": w}}),
        (ValueError, "loss_scale: expected a positive, finite number, got 0", {"loss_scale": 0}),
        (ValueError, "loss_scale: expected a positive, finite number, got -2", {"loss_scale": torch.tensor(-2.0)}),
        (ValueError, "loss_scale: expected a positive, finite number, got inf", {"loss_scale": float("inf")}),
        (
            ValueError,
            "loss_scale: expected a positive, finite number, got nan",
            {"loss_scale": torch.tensor([torch.nan])},
        ),
        (TypeError, "loss_scale: expected a number or a tensor of one, got str", {"loss_scale": "2"}),
        (TypeError, "loss_scale: expected a number or a tensor of one, got list", {"loss_scale": [1.0]}),
        (TypeError, "loss_scale: expected a real number, got torch.complex64", {"loss_scale": torch.tensor(1j)}),
        (ValueError, r"loss_scale: expected one number, got shape \(2,\)", {"loss_scale": torch.ones(2)}),
        (ValueError, r"weights: expected 3 numbers.*shape \(2,\)", {"weights": [1.0, 2.0]}),
        (ValueError, "weights: expected one for each of", {"weights": {"t0": 1.0}}),
        (TypeError, "weights: expected one number per task, got None", {"weights": None}),
    ]
    for error, message, arguments in cases:
        arguments = {"losses": losses, **arguments}
        function = gradstats.backward if "weights" in arguments else gradstats.from_losses
        with pytest.raises(error, match=message):
            function(**arguments, retain_graph=True)
    features = model.features()
    over_features = [h(features).sum() for h in model.heads]
    with pytest.raises(ValueError, match="inputs: expected leaf tensors with method='engine'"):
        gradstats.from_losses(over_features, features, method="engine")
    with pytest.raises(ValueError, match="inputs: no loss reaches"):
        gradstats.from_losses(losses, torch.ones(2, requires_grad=True), method="engine", retain_graph=True)
    # Nothing was touched.
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())
    sum(losses.values()).backward()

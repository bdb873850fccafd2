"""Tasks that own disjoint samples: exact against T plain backwards, refused where samples mix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from oracle import assert_gradients, assert_gram, plain_gram, untouched, weighted
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import gradstats
from gradstats.collect import disjoint, owners, rules
from gradstats.collect.disjoint import should_factor
from gradstats.collect.rules import Rows, rule

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, LENGTH = 8, 5


@pytest.fixture(autouse=True)
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test finds out anew where samples lie."""
    monkeypatch.setattr(owners, "_known", {})


# ---- models ----------------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Token and position embeddings, a Transformer layer, and an output for each token."""

    def __init__(self, *, batch_first: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(11, 16)
        self.positions = nn.Embedding(LENGTH, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)
        self.out = nn.Linear(16, 11, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.positions(torch.arange(LENGTH))
        hidden = self.layer(hidden) if self.batch_first else self.layer(hidden.transpose(0, 1)).transpose(0, 1)
        out: Tensor = self.out(hidden)
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: Any, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.layers = kind(6, 7, num_layers=2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x if self.batch_first else x.transpose(0, 1))[0]
        return out if self.batch_first else out.transpose(0, 1)


class Packed(nn.Module):
    """Attention among the tokens of one owner."""

    def __init__(self, *, mixes: bool = False) -> None:
        super().__init__()
        self.mixes = mixes
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, ids: Tensor, owner: Tensor) -> Tensor:
        hidden = self.embed(ids)
        q, k, v = self.qkv(self.norm(hidden)).chunk(3, -1)
        apart = owner[..., :, None] != owner[..., None, :]
        scores = q @ k.mT if self.mixes else (q @ k.mT).masked_fill(apart, -torch.inf)
        out: Tensor = hidden + self.out(scores.softmax(-1) @ v)
        return out


class LowRank(nn.Module):
    """A weight that is computed from three parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(9, 6))
        self.a, self.b = nn.Parameter(torch.randn(9, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.w + 0.5 * self.a @ self.b)


def features() -> Tensor:
    return torch.randn(BATCH, 6)


def sequences() -> Tensor:
    return torch.randn(BATCH, LENGTH, 6)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 6, 6)


def ids() -> Tensor:
    return torch.randint(0, 11, (BATCH, LENGTH))


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 30), *between, nn.Tanh(), nn.Linear(30, 4))


def convolutions(norm: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, features),
    "mlp on sequences": (mlp, sequences),
    "weights used twice": (lambda: nn.Sequential(layer := nn.Linear(6, 6), nn.Tanh(), layer), features),
    "no rule, used twice": (lambda: nn.Sequential(layer := nn.PReLU(6), nn.Tanh(), layer), features),
    "layer norm": (lambda: mlp(nn.LayerNorm(30)), sequences),
    "rms norm and prelu": (lambda: mlp(nn.RMSNorm(30), nn.PReLU()), features),
    "conv and group norm": (lambda: convolutions(nn.GroupNorm(2, 8)), images),
    "batch norm in eval mode": (lambda: convolutions(nn.BatchNorm2d(8)).eval(), images),
    "wide conv": (lambda: nn.Sequential(nn.Conv2d(3, 64, 5), nn.Flatten(), nn.Linear(256, 2)), images),
    "transformer": (Tokens, ids),
    "transformer, tokens first": (lambda: Tokens(batch_first=False), ids),
    "tied embedding": (lambda: Tokens(tied=True), ids),
    "sparse embedding": (lambda: nn.Sequential(nn.Embedding(11, 6, sparse=True), nn.Linear(6, 3)), ids),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 9)), nn.Tanh()), features),
    "low rank": (LowRank, sequences),
    **{
        f"{kind.__name__}{'' if first else ', tokens first'}": (
            lambda kind=kind, first=first: Recurrent(kind, batch_first=first),
            sequences,
        )
        for kind in (nn.LSTM, nn.GRU)
        for first in (True, False)
    },
}

OWNERS = {
    "uneven": ([2, 0, 1, 1, 0, 2, 2, 2], 3),
    "even": ([0, 0, 1, 1, 2, 2, 3, 3], 4),
    "a task without samples": ([3, 0, 3, 1, 0, 1, 1, 0], 4),
    "one sample each": ([3, 0, 7, 1, 2, 6, 5, 4], 8),
    "one task": ([0] * 8, 1),
}


def task_losses(out: Tensor, owner: Tensor, num_tasks: int) -> dict[str, Tensor]:
    """The mean over each task's samples; one without samples is in the graph nonetheless."""
    return {f"t{t}": (out[owner == t] ** 2).sum() / max(1, int((owner == t).sum())) for t in range(num_tasks)}


@pytest.fixture
def double() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("owned", OWNERS)
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_plain_backwards(name: str, owned: str) -> None:
    make, data = MODELS[name]
    model, x = make(), data()
    entries, num_tasks = OWNERS[owned]
    owner = torch.tensor(entries)
    losses = task_losses(model(x), owner, num_tasks)
    named = dict(model.named_parameters())
    for again in range(2):  # what is found out about the model at the first time is used at the second
        with untouched(model, losses):
            stats = gradstats.from_losses(losses, named, owner=owner, retain_graph=True, group_by="parameter")
        assert_gram(stats.gram, plain_gram(losses.values(), named.values()), 1e-10)
        assert stats.method == "disjoint"
        assert len(owners._known) == 1, f"{again}: the layout should be certain, and remembered"
    for parameter, group in stats.groups.items():
        assert_gram(group.gram, plain_gram(losses.values(), [named[parameter]]), 1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.3, 2.0, 1.0], [0.0, -1.0, 1e6]])
@pytest.mark.parametrize("name", MODELS)
def test_weighted_gradients(name: str, weights: list[float]) -> None:
    make, data = MODELS[name]
    model, x, owner = make(), data(), torch.tensor(OWNERS["uneven"][0])
    losses = task_losses(model(x), owner, 3)
    params = list(model.parameters())
    want = plain_gram(losses.values(), params)
    grads = torch.autograd.grad(weighted(losses, weights), params, retain_graph=True, allow_unused=True)
    stats = gradstats.backward(losses, weights, model, owner=owner)
    assert_gram(stats.gram, want, 1e-10)
    assert_gradients([p.grad for p in params], grads, 1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", MODELS)
def test_metric(name: str) -> None:
    make, data = MODELS[name]
    model, x, owner = make(), data(), torch.tensor(OWNERS["uneven"][0])
    losses = task_losses(model(x), owner, 3)
    params = list(model.parameters())
    metric = [torch.rand_like(p) + 0.5 for p in params]
    rows = []
    for loss in losses.values():
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([(g.to_dense() * d.sqrt()).flatten() for g, d in zip(grads, metric, strict=True)]))
    jacobian = torch.stack(rows)
    assert_gram(gradstats.from_losses(losses, params, owner=owner, metric=metric).gram, jacobian @ jacobian.T, 1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("shape", [(20,), (3, 6)])
def test_owners_of_tokens(shape: tuple[int, ...]) -> None:
    model, tokens, owner = Packed(), torch.randint(0, 11, shape), torch.randint(0, 4, shape)
    losses = task_losses(model(tokens, owner), owner, 4)
    want = plain_gram(losses.values(), model.parameters())
    assert_gram(gradstats.from_losses(losses, model, owner=owner).gram, want, 1e-10)
    mixing = Packed(mixes=True)
    with pytest.raises(ValueError, match="owner: expected losses that each depend on"):
        gradstats.from_losses(task_losses(mixing(tokens, owner), owner, 4), mixing, owner=owner)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("dim", [0, 1])
def test_as_many_samples_as_tokens(dim: int) -> None:
    """Either dimension could be that of the samples; only the gradients tell."""
    body, head, x = nn.Linear(6, 5), nn.Linear(5, 2), torch.randn(4, 4, 6)
    owner = torch.tensor([0, 1, 2, 0])
    losses = task_losses(head(body(x).tanh().mean(dim)), owner, 3)
    inputs = [*body.parameters(), *head.parameters()]
    want = plain_gram(losses.values(), inputs)
    assert_gram(gradstats.from_losses(losses, inputs, owner=owner).gram, want, 1e-10)


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("shape", [(6,), (12, 2), (12, 4), (4, 6), (2, 3, 8), (6, 4, 3)])
def test_owners_of_parts(shape: tuple[int, ...], cyclic: bool) -> None:
    """Against the order written out, entry by entry."""
    size = math.prod(shape)
    for owner in (torch.arange(6) // 2, torch.arange(6) % 3, torch.arange(2), torch.zeros(3, dtype=torch.int64)):
        entries = [owner[i % len(owner) if cyclic else i // (size // len(owner))].item() for i in range(size)]
        for rows in (math.prod(shape[:level]) for level in range(len(shape) + 1)):
            parts = [set(entries[i : i + size // rows]) for i in range(0, size, size // rows)]
            want = [part.pop() for part in parts] if all(len(part) == 1 for part in parts) else None
            got = owners.Layout(len(shape), cyclic).owners(owner, shape, rows)
            assert (None if got is None else got.tolist()) == want


def test_owners_of_parts_are_seen_without_writing_all_entries() -> None:
    layout = owners.Layout(3, cyclic=True)
    assert layout.owners(torch.arange(32), (32, 2**15, 2**15), 2**20) is None  # 256 GiB if written out


@pytest.mark.parametrize("many", [16, 300])
def test_one_vector_of_losses(many: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)), torch.randn(many, 6)
    losses = (model(x) ** 2).mean(1)
    want = plain_gram(losses, model.parameters())
    stats = gradstats.from_losses(losses, model, owner=torch.arange(many), retain_graph=True)
    assert_gram(stats.gram, want)
    # Some of the entries, in another order, and each picked by itself.
    picked = torch.arange(many).flip(0)
    stats = gradstats.from_losses([losses[i] for i in picked], model, owner=picked, retain_graph=True)
    assert_gram(stats.gram, want.flip(0, 1))
    some = dict.fromkeys(map(str, range(many))) | {str(i): loss for i, loss in enumerate(losses.unbind()) if i % 3}
    stats = gradstats.from_losses(some, model, owner=torch.arange(many))
    rest = torch.arange(many) % 3 != 0
    assert_gram(stats.gram[rest][:, rest], want[rest][:, rest])
    assert not stats.gram[~rest].any()


@pytest.mark.usefixtures("double")
def test_activations_as_inputs() -> None:
    model, x, owner = mlp(), features(), torch.tensor(OWNERS["uneven"][0])
    hidden = model[0](x)
    losses = task_losses(model[1:](hidden), owner, 3)
    inputs = [hidden, *model.parameters()]
    want = plain_gram(losses.values(), inputs)
    assert_gram(gradstats.from_losses(losses, inputs, owner=owner).gram, want, 1e-10)


@pytest.mark.usefixtures("double")
def test_hooks_of_users_apply() -> None:
    model, x, owner = mlp(), features(), torch.tensor(OWNERS["uneven"][0])
    model[0].weight.register_hook(lambda grad: 3 * grad)
    hidden = model[0](x)
    hidden.register_hook(lambda grad: -2 * grad)
    losses = task_losses(model[1:](hidden), owner, 3)
    want = plain_gram(losses.values(), model.parameters())
    params = list(model.parameters())
    grads = torch.autograd.grad(weighted(losses, [1, 2, 3]), params, retain_graph=True)
    assert_gram(gradstats.backward(losses, [1, 2, 3], model, owner=owner).gram, want, 1e-10)
    assert_gradients([p.grad for p in params], grads, 1e-10)


@pytest.mark.usefixtures("double")
def test_hooks_that_cannot_apply_are_refused() -> None:
    layer, x, owner = nn.PReLU(6), features(), torch.tensor(OWNERS["uneven"][0])
    out = layer(x)
    out.register_hook(lambda grad: grad)
    losses = task_losses(out, owner, 3)
    out.register_hook(lambda grad: 2 * grad)
    with pytest.raises(ValueError, match="owner: a hook changes the gradient of the output of PreluKernelBackward0"):
        gradstats.from_losses(losses, layer, owner=owner)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["samples", "loss", "loss above a node without a rule"])
def test_what_is_not_finite_stays_with_its_task(where: str, bad: float) -> None:
    torch.manual_seed(0)
    # (Samples pass through the saved tensors of such a node: zero times NaN, as in every plain backward.)
    model = mlp(nn.PReLU()) if "rule" in where else mlp()
    x, owner, kept = features(), torch.tensor(OWNERS["uneven"][0]), torch.tensor([0, 2])
    want = gradstats.from_losses(task_losses(model(x), owner, 3), model, owner=owner).gram
    if where == "samples":
        x[owner == 1] *= bad
    for _ in range(2):
        losses = task_losses(model(x), owner, 3)
        if where != "samples":
            losses["t1"] = losses["t1"] * bad
        got = gradstats.from_losses(losses, model, owner=owner).gram
        assert not got[1].isfinite().any()
        assert_gram(got[kept[:, None], kept], want[kept[:, None], kept])


def test_low_precision() -> None:
    torch.manual_seed(0)
    model, x, owner = mlp(), features(), torch.tensor(OWNERS["uneven"][0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    losses = task_losses(out.float(), owner, 3)
    want = plain_gram(losses.values(), model.parameters())
    assert_gram(gradstats.from_losses(losses, model, owner=owner).gram, want, 1e-2)  # bfloat16 rounds at 4e-3
    model = model.bfloat16()
    losses = task_losses(model(x.bfloat16()), owner, 3)
    want = plain_gram(losses.values(), model.parameters())
    assert_gram(gradstats.from_losses(losses, model, owner=owner).gram, want, 1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_agrees_where_parameters_are_cast(name: str) -> None:
    """As autocast does it, but so that nothing is rounded: float64 parameters of a float32 model."""
    if name.startswith("sparse"):
        pytest.skip("autograd does not cast sparse gradients")
    torch.manual_seed(0)
    make, data = MODELS[name]
    model, x, owner = make(), data(), torch.tensor(OWNERS["uneven"][0])
    leaves = {key: p.detach().double().requires_grad_() for key, p in model.named_parameters()}
    out = torch.func.functional_call(model, {key: leaf.float() for key, leaf in leaves.items()}, x)
    losses = task_losses(out, owner, 3)
    params, weights = list(leaves.values()), [0.3, 2.0, 1.0]
    grads = torch.autograd.grad(weighted(losses, weights), params, retain_graph=True, allow_unused=True)
    want = plain_gram(losses.values(), params)
    assert_gram(gradstats.backward(losses, weights, params, owner=owner).gram, want)
    assert_gradients([p.grad for p in params], grads)


def test_uses_in_different_dtypes_are_summed_in_that_of_the_parameter() -> None:
    torch.manual_seed(0)
    embed, x, owner = nn.Embedding(11, 16), ids(), torch.tensor(OWNERS["uneven"][0])
    hidden = embed(x)
    low = hidden.tanh().bfloat16() @ embed.weight.bfloat16().T
    losses = task_losses(torch.cat([hidden, low / 1000], -1), owner, 3)
    want = plain_gram(losses.values(), [embed.weight])
    assert_gram(gradstats.from_losses(losses, [embed.weight], owner=owner).gram, want, 1e-5)


def test_retain_graph() -> None:
    model, x, owner = mlp(), features(), torch.tensor(OWNERS["uneven"][0])
    losses = task_losses(model(x), owner, 3)
    gradstats.from_losses(losses, model, owner=owner, retain_graph=True)
    gradstats.from_losses(losses, model, owner=owner)
    with pytest.raises(RuntimeError, match="second time"):
        gradstats.from_losses(losses, model, owner=owner)


# ---- the ways of taking products -------------------------------------------------------------------------------------


def test_choice() -> None:
    assert should_factor(rows=128, tasks=32, left=1024, right=1024, numel=2**20)  # an MLP
    assert should_factor(rows=32, tasks=32, left=512, right=1024, numel=2**19)  # one sample each
    assert not should_factor(rows=512, tasks=8, left=256, right=1024, numel=2**18)  # as many rows as a part has
    assert not should_factor(rows=2048, tasks=32, left=256, right=1024, numel=2**18)  # a Transformer
    assert not should_factor(rows=2048, tasks=2, left=9, right=3, numel=27)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("name", ["mlp on sequences", "conv and group norm", "wide conv", "transformer"])
def test_both_ways_agree(name: str, factored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disjoint, "should_factor", lambda *_: factored)
    monkeypatch.setattr(disjoint, "_ROWS", 7)  # several parts
    monkeypatch.setattr(disjoint, "_CHAIN", 5)
    monkeypatch.setattr(disjoint, "_BLOCK", 100)
    monkeypatch.setattr(disjoint, "_MANY", 2)
    make, data = MODELS[name]
    model, x = make(), data()
    for entries, num_tasks in OWNERS.values():
        owner = torch.tensor(entries)
        losses = task_losses(model(x), owner, num_tasks)
        want = plain_gram(losses.values(), model.parameters())
        assert_gram(gradstats.from_losses(losses, model, owner=owner).gram, want, 1e-10)


@pytest.mark.usefixtures("double")
def test_rules_of_users_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_rules", dict(rules._rules))

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, w = ctx.saved_tensors
            runs.append("backward")
            return grad * w, (grad * x).sum(0)

    runs: list[str] = []
    weight, x, owner = nn.Parameter(torch.randn(6)), features(), torch.tensor(OWNERS["uneven"][0])

    def collect() -> Tensor:
        losses = task_losses(Scale.apply(x, weight), owner, 3)
        want = plain_gram(losses.values(), [weight])
        runs.clear()
        got = gradstats.from_losses(losses, [weight], owner=owner).gram
        assert_gram(got, want, 1e-10)
        return got

    collect()
    assert runs == ["backward"] * 3  # without a rule, once for each task

    @rule("ScaleBackward")
    def scale(node: Any, child: int, shape: torch.Size) -> Rows | None:
        runs.append("rule")
        return Rows.summed(lambda grad: grad * node.saved_tensors[0], shape) if child == 1 else None

    collect()
    assert runs == ["rule"]


# ---- what is found out about a model ---------------------------------------------------------------------------------


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever a model is looked at anew."""
    found: list[int] = []
    run = owners._Probe.run

    def counted(self: Any, consumers: Sequence[Any], position: Any) -> Any:
        found.append(len(consumers))
        return run(self, consumers, position)

    monkeypatch.setattr(owners._Probe, "run", counted)
    return found


def test_models_are_looked_at_once(probes: list[int]) -> None:
    torch.manual_seed(0)
    model = convolutions(nn.BatchNorm2d(8)).eval()
    for size, entries in ((8, [0, 1, 2, 0, 1, 2, 0, 0]), (6, [2, 2, 1, 0, 0, 1])):
        x, owner = torch.randn(size, 3, 6, 6), torch.tensor(entries)
        gradstats.from_losses(task_losses(model(x), owner, 3), model, owner=owner)
    assert len(probes) == 1
    model.train()
    with pytest.raises(ValueError, match=r"owner: .*BatchNorm layer in training mode"):
        gradstats.from_losses(task_losses(model(x), owner, 3), model, owner=owner)


def test_a_model_is_looked_at_until_its_gradients_tell(probes: list[int]) -> None:
    torch.manual_seed(0)
    model, x, owner = mlp(), features(), torch.tensor(OWNERS["uneven"][0])
    with torch.no_grad():
        model[2].weight.zero_()  # nothing reaches the first layer
    for _ in range(2):
        losses = task_losses(model(x), owner, 3)
        want = plain_gram(losses.values(), model.parameters())
        assert_gram(gradstats.from_losses(losses, model, owner=owner).gram, want)
    assert len(probes) == 2
    with torch.no_grad():
        model[2].weight.normal_()
    for _ in range(2):
        gradstats.from_losses(task_losses(model(x), owner, 3), model, owner=owner)
    assert len(probes) == 3


def test_owner_is_checked_at_every_step() -> None:
    torch.manual_seed(0)
    model, x, owner = mlp(), features(), torch.tensor(OWNERS["uneven"][0])
    for _ in range(3):
        gradstats.from_losses(task_losses(model(x), owner, 3), model, owner=owner)
        losses = task_losses(model(x), owner, 3)
        with pytest.raises(ValueError, match="owner: expected losses that each depend on"):
            gradstats.from_losses(losses, model, owner=owner.roll(1))
        torch.stack(list(losses.values())).sum().backward()  # the graph is whole


# ---- refused ---------------------------------------------------------------------------------------------------------


def _contrastive(model: nn.Module, x: Tensor, owner: Tensor) -> list[Tensor]:
    out = functional.normalize(model(x), dim=1)
    each = functional.cross_entropy(out @ out.T, torch.arange(len(x)), reduction="none")
    return [each[owner == t].mean() for t in range(3)]


def _one_sees_all(model: nn.Module, x: Tensor, owner: Tensor) -> list[Tensor]:
    out = model(x)
    losses = list(task_losses(out, owner, 3).values())
    return [losses[0] + out.square().mean(), *losses[1:]]


def _batch_norm(model: nn.Module, x: Tensor, owner: Tensor) -> list[Tensor]:
    out = functional.batch_norm(model(x), None, None, training=True)
    return list(task_losses(out, owner, 3).values())


def _centred(model: nn.Module, x: Tensor, owner: Tensor) -> list[Tensor]:
    hidden = model[0](x)
    return list(task_losses(model[1:](hidden - hidden.mean(0)), owner, 3).values())


def _hardly_centred(model: nn.Module, x: Tensor, owner: Tensor) -> list[Tensor]:
    hidden = model[0](x)
    return list(task_losses(model[1:](hidden - 1e-4 * hidden.mean(0)), owner, 3).values())


@pytest.mark.parametrize(
    ("losses_of", "message"),
    [
        (_contrastive, "owner: expected losses that each depend on their task's own samples alone"),
        (_one_sees_all, "owner: expected losses that each depend on their task's own samples alone"),
        (_centred, "owner: expected losses that each depend on their task's own samples alone"),
        (_hardly_centred, "owner: expected losses that each depend on their task's own samples alone"),
        (_batch_norm, r"owner: .*BatchNorm layer in training mode \(NativeBatchNormBackward0\)"),
    ],
)
def test_mixed_samples_are_refused(losses_of: Callable[..., list[Tensor]], message: str) -> None:
    torch.manual_seed(0)
    model, x, owner = mlp(), features(), torch.tensor(OWNERS["uneven"][0])
    losses = losses_of(model, x, owner)
    for _ in range(2):
        with untouched(model, dict(enumerate(losses))), pytest.raises(ValueError, match=message):  # type: ignore[arg-type]
            gradstats.from_losses(losses, model, owner=owner)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "owner: expected a tensor of integers.*float32", {"owner": torch.zeros(BATCH)}),
        (TypeError, "owner: expected a tensor of integers.*bool", {"owner": torch.zeros(BATCH).bool()}),
        (TypeError, "owner: expected a tensor of integers.*list", {"owner": [0] * BATCH}),
        (ValueError, r"owner: expected shape \[B\].* got \(1, 1, 8\)", {"owner": torch.zeros(1, 1, BATCH).long()}),
        (ValueError, r"owner: expected shape \[B\].* got \(0,\)", {"owner": torch.zeros(0).long()}),
        (ValueError, "owner: expected tasks from 0 to 2, got 3", {"owner": torch.full((BATCH,), 3)}),
        (ValueError, "owner: expected tasks from 0 to 2, got -1", {"owner": torch.full((BATCH,), -1)}),
        (ValueError, "owner: expected one entry for each sample.* got 7;", {"owner": torch.zeros(7).long()}),
        (ValueError, "owner: is a way of", {"owner": torch.zeros(BATCH).long(), "method": "batched"}),
        (ValueError, "owner: is a way of", {"owner": torch.zeros(BATCH).long(), "max_bytes": 10**9}),
    ],
)
def test_errors(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    model, x = mlp(), features()
    losses = task_losses(model(x), torch.tensor(OWNERS["uneven"][0]), 3)
    with untouched(model, losses), pytest.raises(error, match=message):
        gradstats.from_losses(losses, model, **options)


@pytest.mark.parametrize("fused", [False, True])
def test_scalarizer_records_by_owner_what_it_records_without(fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    x, owner = torch.randn(BATCH, 4), torch.arange(BATCH) % 3
    recorded = []
    for given in (None, owner):
        scalarizer = gradstats.Scalarizer("uniform", tasks=["a", "b", "c"], record_every=1)
        out = model(x).squeeze(1)
        losses = [out[owner == t].square().mean() for t in range(3)]
        if fused:
            scalarizer.backward(losses, owner=given)
        else:
            scalarizer(losses, owner=given).backward()
        recorded.append(scalarizer.stats)
    assert recorded[1].method == "disjoint"
    assert recorded[0].method != "disjoint"
    torch.testing.assert_close(recorded[0].gram, recorded[1].gram, rtol=1e-6, atol=1e-9)

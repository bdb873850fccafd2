"""``loss = scalarizer(losses)`` in the loops people write: what is recorded, and that training is left as it was."""

import copy
import io
import logging
import math
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import gradstats
import gradstats.scalarizer

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ("small", "middle", "large")
SCALES = {"small": 1.0, "middle": 10.0, "large": 100.0}
EXAMPLES = Path(__file__).parents[1] / "examples"


class Model(nn.Module):
    """An encoder and one linear head a task; ``layers`` go between the encoder's linear layers."""

    def __init__(self, *layers: nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), *layers, nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.heads = nn.ModuleDict({name: nn.Linear(8, 2) for name in TASKS})
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.checkpointed:
            features = torch.utils.checkpoint.checkpoint(self.encoder, x, use_reentrant=False)
        else:
            features = self.encoder(x)
        return {name: head(features) for name, head in self.heads.items()}


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 6, generator=generator), torch.randn(size, 2, generator=generator)


def losses_of(outputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
    return {
        name: scale * (outputs[name].float() - (i - 1) * y).square().mean()
        for i, (name, scale) in enumerate(SCALES.items())
    }


def build(*layers: nn.Module, seed: int = 0, checkpointed: bool = False) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Model(*layers, checkpointed=checkpointed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def oracle(losses: dict[str, Tensor], inputs: nn.Module) -> Tensor:
    """The float64 Gramian of separate ``torch.autograd.grad`` calls; keeps the graph."""
    rows = []
    for name in TASKS:
        if losses.get(name) is None:
            rows.append(torch.zeros_like(rows[0]) if rows else None)
            continue
        grads = torch.autograd.grad(losses[name], list(inputs.parameters()), retain_graph=True)
        rows.append(torch.cat([g.double().flatten() for g in grads]))
    rows = [torch.zeros_like(next(r for r in rows if r is not None)) if r is None else r for r in rows]
    return torch.stack(rows) @ torch.stack(rows).T


def assert_gram(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    norms = expected.diagonal().sqrt()
    error = (found - expected).abs()
    assert (error <= rtol * norms[:, None] * norms[None, :]).all(), f"{found}\n{expected}"
    assert norms.max() > 0


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry with each Gramian that a Scalarizer collects."""
    calls: list[int] = []
    original = gradstats.scalarizer.collect

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(gradstats.scalarizer, "collect", counted)
    return calls


# ---- the plain loop -----------------------------------------------------------------------------------------------


VARIANTS = {
    "plain": (tuple, False),
    "dropout": (lambda: (nn.Dropout(0.5),), False),
    "batchnorm": (lambda: (nn.BatchNorm1d(16),), False),
    "checkpointed": (lambda: (nn.Dropout(0.5),), True),
}


@pytest.mark.parametrize("fused", [False, True], ids=["forward", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_monitoring_leaves_training_as_it_was(variant: str, fused: bool) -> None:
    """Parameters, buffers and the random stream after recorded steps are those of the loop without gradstats."""
    layers, checkpointed = VARIANTS[variant]

    def run(monitored: bool) -> tuple[dict[str, Tensor], Tensor]:
        model, _ = build(*layers(), checkpointed=checkpointed)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1)
        for step in range(5):
            x, y = batch(step)
            losses = losses_of(model(x), y)
            if not monitored:
                sum(losses.values()).backward()
            elif fused:
                expected = oracle(losses, model.encoder)
                scalarizer.backward(losses)
                assert_gram(scalarizer.stats.gram, expected)
            else:
                expected = oracle(losses, model.encoder)
                loss = scalarizer(losses)
                assert all(p.grad is None for p in model.parameters())
                loss.backward()
                assert_gram(scalarizer.stats.gram, expected)
            optimizer.step()
            optimizer.zero_grad()
        return state(model), torch.get_rng_state()

    (with_monitor, rng), (without, plain_rng) = run(True), run(False)
    if fused:  # one sum over tasks is formed in another order
        for name, value in without.items():
            torch.testing.assert_close(with_monitor[name], value, rtol=1e-4, atol=1e-5)
    else:
        assert_same(with_monitor, without)
    assert torch.equal(rng, plain_rng)


@pytest.mark.parametrize("method", ["auto", "sequential"])
def test_fused_form_frees_the_graph(method: str) -> None:
    model, _ = build()
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, method=method)
    for step in range(2):
        losses = losses_of(model(batch(step)[0]), batch(step)[1])
        scalarizer.backward(losses)
        with pytest.raises(RuntimeError, match="second time"):
            losses["small"].backward()


def test_autoscale_records_in_phase_1_alone_and_weighs_exactly(collections: list[int]) -> None:
    model, optimizer = build()
    scalarizer = gradstats.Scalarizer(
        "autoscale", tasks=TASKS, total_steps=60, explore=0.5, windows=3, samples_per_window=2
    )
    grams, records = [], []
    for step in range(60):
        x, y = batch(step)
        losses = losses_of(model(x), y)
        weights = scalarizer.weights.clone()
        manual = sum(float(w) * loss for w, loss in zip(weights, losses.values(), strict=True))
        expected = torch.autograd.grad(manual, list(model.parameters()), retain_graph=True)
        due = scalarizer.wants_stats()
        grams.append(oracle(losses, model.encoder) if due else None)
        loss = scalarizer(losses)
        loss.backward()
        torch.testing.assert_close(loss, manual, rtol=1e-6, atol=0.0)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
        if due:
            records.append(step)
            assert_gram(scalarizer.stats.gram, grams[-1])
        assert len(collections) == len(records)
        optimizer.step()
        optimizer.zero_grad()
    assert len(records) == 6
    assert max(records) < 30
    # Equal magnitude, from the oracle's norms: weights of a window are proportional to exp(-mean log norm).
    for window, found in enumerate(scalarizer.weighting.window_weights):
        norms = torch.stack([grams[step].diagonal().sqrt() for step in records[2 * window : 2 * window + 2]])
        inverse = torch.exp(-norms.log().mean(0))
        torch.testing.assert_close(found, 3 * inverse / inverse.sum(), rtol=1e-6, atol=0.0)
    assert scalarizer.weights[0] > 10 * scalarizer.weights[2]


def test_a_skipped_step_does_not_call_the_weighting_but_its_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    scalarizer = gradstats.Scalarizer("fixed", tasks=TASKS, weights=[0.5, 2.0, 3.0])
    monkeypatch.setattr(scalarizer.weighting, "forward", None)
    others = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    same, single, double = scalarizer.weights, torch.float32, torch.float64
    for weights, dtype in ((same, single), (others, single), (others, double), (same, double)):
        scalarizer.weighting.weights = weights
        losses = torch.tensor([1.0, 10.0, 100.0], dtype=dtype, requires_grad=True)
        total = scalarizer(dict(zip(TASKS, losses, strict=True)))
        total.backward()
        assert total.dtype == dtype
        assert losses.grad.tolist() == weights.tolist()
        assert total.item() == torch.dot(losses.detach().double(), weights)


def test_another_weighting_takes_effect_at_once_and_a_copy_has_its_own() -> None:
    scalarizer = gradstats.Scalarizer("fixed", tasks=["a"], weights=[2.0])
    loss = torch.ones((), requires_grad=True)
    assert [scalarizer([loss]).item() for _ in range(2)] == [2.0, 2.0]
    copied = copy.deepcopy(scalarizer)
    scalarizer.weighting = gradstats.weighting.create("fixed", 1, weights=[3.0])
    assert (scalarizer([loss]).item(), copied([loss]).item()) == (3.0, 2.0)
    assert copied.weighting is dict(copied.named_modules())["weighting"]


def test_autoscale_is_called_for_what_it_records_and_where_windows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    scalarizer = gradstats.Scalarizer(
        "autoscale", tasks=TASKS, total_steps=60, explore=0.5, windows=3, samples_per_window=1, schedule="random"
    )
    forward, called, due = scalarizer.weighting.forward, [], []
    monkeypatch.setattr(scalarizer.weighting, "forward", lambda *args: called.append(step) or forward(*args))
    model, _ = build()
    for step in range(60):
        if scalarizer.wants_stats():
            due.append(step)
        scalarizer(losses_of(model(batch(step)[0]), batch(step)[1])).backward()
    assert len(due) == 3
    assert called == sorted({*due, 9, 19, 29})
    assert scalarizer.weighting.step == 30  # the others of phase 1 are counted


def test_plain_loop_example() -> None:
    weights = runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"]()
    assert weights["metres"] > 10 * weights["millimetres"]


# ---- when a step records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_monitor_records_every_k_steps(every: int, collections: list[int]) -> None:
    model, _ = build()
    scalarizer = gradstats.Scalarizer("fixed", tasks=TASKS, weights=[1, 2, 3], record_every=every)
    recorded = []
    for step in range(7):
        before = scalarizer.stats
        scalarizer(losses_of(model(batch(step)[0]), batch(step)[1])).backward()
        if scalarizer.stats is not before:
            recorded.append(step)
    assert recorded == list(range(0, 7, every))
    assert len(collections) == len(recorded)


def test_eval_and_no_grad_neither_record_nor_count(collections: list[int]) -> None:
    model, _ = build()
    scalarizer = gradstats.Scalarizer("slaw", tasks=TASKS, record_every=2)
    before = state(scalarizer)
    scalarizer.eval()
    loss = scalarizer(losses_of(model(batch(0)[0]), batch(0)[1]))
    loss.backward()  # evaluation may want gradients, with respect to an image for example
    scalarizer.train()
    with torch.no_grad():
        scalarizer(losses_of(model(batch(1)[0]), batch(1)[1]))
    with torch.inference_mode():
        scalarizer(losses_of(model(batch(1)[0]), batch(1)[1]))
    assert not collections
    assert scalarizer.stats is None
    assert_same(state(scalarizer), before)
    assert scalarizer.weighting.count.tolist() == [0, 0, 0]


@pytest.mark.parametrize("how", ["missing", "none", "no_graph"])
def test_absent_task(how: str) -> None:
    model, _ = build()
    scalarizer = gradstats.Scalarizer("fixed", tasks=TASKS, weights=[1, 2, 3], record_every=1)
    x, y = batch(0)
    losses = losses_of(model(x), y)
    absent = losses.pop("middle")
    expected = oracle(losses, model.encoder)
    manual = losses["small"] + 3 * losses["large"]
    grads = torch.autograd.grad(manual, list(model.encoder.parameters()), retain_graph=True)
    if how != "missing":
        losses["middle"] = None if how == "none" else torch.zeros_like(absent)
    loss = scalarizer(losses)
    loss.backward()
    assert scalarizer.stats.present.tolist() == [True, False, True]
    assert_gram(scalarizer.stats.gram, expected)
    assert scalarizer.stats.gram[1].abs().max() == 0
    torch.testing.assert_close(loss, manual)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.encoder.parameters(), grads, strict=True))


def test_autoscale_keeps_the_weight_of_a_task_that_never_came() -> None:
    model, optimizer = build()
    scalarizer = gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=20, explore=1.0, windows=1)
    for step in range(20):
        losses = losses_of(model(batch(step)[0]), batch(step)[1])
        del losses["middle"]
        scalarizer(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scalarizer.weights.isfinite().all()
    assert scalarizer.weights[0] > 10 * scalarizer.weights[2]
    assert scalarizer.stats.present.tolist() == [True, False, True]


def test_a_step_with_one_task_alone_is_recorded_later_unless_inputs_are_given(caplog: pytest.LogCaptureFixture) -> None:
    """The graph of one loss does not show which parameters are shared, so it would count its head as well."""
    model, _ = build()
    for inputs, recorded in ((None, False), (model.encoder, True)):
        for fused in (False, True):
            scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, inputs=inputs)
            model.zero_grad()
            losses = losses_of(model(batch(0)[0]), batch(0)[1])
            (expected,) = torch.autograd.grad(losses["small"], model.encoder[0].weight, retain_graph=True)
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="gradstats"):
                if fused:
                    scalarizer.backward({"small": losses["small"]})
                else:
                    scalarizer({"small": losses["small"]}).backward()
            assert (scalarizer.stats is not None) is recorded
            assert ("one task alone" in caplog.text) is not recorded
            torch.testing.assert_close(model.encoder[0].weight.grad, expected)


@pytest.mark.parametrize("form", [list, tuple, torch.stack, dict], ids=["list", "tuple", "tensor", "mapping"])
def test_forms_of_losses(form: Callable) -> None:
    model, _ = build()
    # The graph of a tensor of losses does not show that the heads are not shared.
    inputs = model.encoder if form is torch.stack else None
    weights = dict(zip(TASKS, (1, 2, 3), strict=True))
    scalarizer = gradstats.Scalarizer("fixed", tasks=TASKS, inputs=inputs, weights=weights, record_every=1)
    x, y = batch(0)
    losses = losses_of(model(x), y)
    expected = oracle(losses, model.encoder)
    given = dict(reversed(losses.items())) if form is dict else form(list(losses.values()))
    loss = scalarizer(given)
    loss.backward()
    assert_gram(scalarizer.stats.gram, expected)
    torch.testing.assert_close(loss, losses["small"] + 2 * losses["middle"] + 3 * losses["large"])


def test_step_that_is_not_finite_is_discarded_named_and_recorded_again(
    collections: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = build()
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=3)
    recorded = []
    for step in range(7):
        losses = losses_of(model(batch(step)[0]), batch(step)[1])
        if step in (3, 4):
            losses["middle"] = losses["middle"] * math.inf
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="gradstats"):
            before = scalarizer.stats
            scalarizer(losses)
        messages = [record.getMessage() for record in caplog.records if "finite" in record.getMessage()]
        if step in (3, 4):
            assert len(messages) == 1
            assert "middle" in messages[0]
            assert "small" not in messages[0]
            assert f"step {step}" in messages[0]
        else:
            assert not messages
        if scalarizer.stats is not before:
            recorded.append(step)
            assert scalarizer.stats.finite.all()
    assert recorded == [0, 5, 6]
    assert len(collections) == 5


# ---- gradient accumulation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["autoscale", "slaw"])
def test_gradient_accumulation(weighting: str, collections: list[int]) -> None:
    accumulate, steps = 3, 24
    options = (
        {"total_steps": steps, "explore": 0.9, "windows": 2, "samples_per_window": 2}
        if weighting == "autoscale"
        else {}
    )
    model, optimizer = build()
    scalarizer = gradstats.Scalarizer(weighting, tasks=TASKS, accumulate=accumulate, record_every=5, **options)
    changes, collected_at = [], []
    for step in range(steps):
        grams, weights, due = [], scalarizer.weights.clone(), scalarizer.wants_stats()
        for micro in range(accumulate):
            x, y = batch(step * accumulate + micro)
            losses = losses_of(model(x), y)
            assert scalarizer.wants_stats() == due
            grams.append(oracle(losses, model.encoder))
            assert torch.equal(scalarizer.weights, weights)
            loss = scalarizer(losses)
            manual = sum(float(w) * loss for w, loss in zip(weights, losses.values(), strict=True))
            torch.testing.assert_close(loss, manual, rtol=1e-6, atol=0.0)
            (loss / accumulate).backward()
        if due:
            collected_at.append(step)
            assert_gram(scalarizer.stats.gram, torch.stack(grams).mean(0))
        if not torch.equal(weights, scalarizer.weights):
            changes.append(step)
        optimizer.step()
        optimizer.zero_grad()
    assert len(collections) == accumulate * len(collected_at)
    if weighting == "autoscale":
        assert changes == [10, 21]
        assert {0, 5, 10, 15, 20} < set(collected_at)
    else:
        assert changes == list(range(1, steps))
        assert collected_at == [0, 5, 10, 15, 20]


def test_micro_step_that_is_not_finite_is_left_out_of_the_mean() -> None:
    model, _ = build()
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, accumulate=2, record_every=1)
    first = losses_of(model(batch(0)[0]), batch(0)[1])
    expected = oracle(first, model.encoder)
    scalarizer(first)
    second = losses_of(model(batch(1)[0]), batch(1)[1])
    scalarizer({**second, "large": second["large"] * math.nan})
    assert_gram(scalarizer.stats.gram, expected)


def test_a_step_whose_weighting_fails_leaves_no_micro_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    scalarizer = gradstats.Scalarizer("dwa", tasks=TASKS, accumulate=2)
    losses = torch.ones(3, requires_grad=True)
    seen = []

    def fail(losses: Tensor, stats: object) -> Tensor:
        seen.append(losses)
        if len(seen) == 1:
            raise RuntimeError("for once")
        return torch.ones(3, dtype=torch.float64)

    monkeypatch.setattr(scalarizer.weighting, "forward", fail)
    scalarizer(losses)
    with pytest.raises(RuntimeError, match="for once"):
        scalarizer(losses)
    for factor in (2.0, 4.0):
        scalarizer(factor * losses)
    assert len(seen) == 2
    assert seen[1].tolist() == [3.0, 3.0, 3.0]


# ---- mixed precision ----------------------------------------------------------------------------------------------


def test_bfloat16_autocast(collections: list[int]) -> None:
    model, optimizer = build()
    scalarizer = gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=30, explore=0.7, windows=2)
    for step in range(30):
        x, y = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = losses_of(model(x), y)
            due = scalarizer.wants_stats()
            expected = oracle(losses, model.encoder) if due else None
            loss = scalarizer(losses)
        if due:
            # bfloat16 sums arrive at the shared activations in another order: half a unit in the last place of 8 bits.
            assert_gram(scalarizer.stats.gram, expected, rtol=2e-2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert 0 < len(collections) <= 21
    assert loss.dtype == torch.float32
    assert scalarizer.weights[0] > 10 * scalarizer.weights[2]


def float16_losses(model: Model, step: int, scale: float) -> dict[str, Tensor]:
    x, y = batch(step)
    with torch.autocast("cpu", dtype=torch.float16):
        return {name: scale * loss for name, loss in losses_of(model(x), y).items()}


@pytest.mark.parametrize("fused", [False, True], ids=["forward", "fused"])
def test_grad_scaler_measures_gradients_that_would_vanish_in_float16(fused: bool) -> None:
    """With losses times 1e-8 float16 gradients are zero, unless they are scaled as the user's own are."""
    model, optimizer = build()
    scale = 1e-8
    unscaled = gradstats.from_losses(float16_losses(model, 0, scale), model.encoder)
    assert unscaled.norms[0] == 0
    x, y = batch(0)
    expected = oracle({name: scale * loss for name, loss in losses_of(model(x), y).items()}, model.encoder)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, grad_scaler=scaler)
    losses = float16_losses(model, 0, scale)
    if fused:
        scalarizer.backward(losses)
    else:
        scaler.scale(scalarizer(losses)).backward()
    assert_gram(scalarizer.stats.gram, expected, rtol=2e-2)

    reference, reference_optimizer = build()
    reference_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    reference_scaler.scale(sum(float16_losses(reference, 0, scale).values())).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-2 * float(q.grad.abs().max()))
        assert fused or torch.equal(p.grad, q.grad)
    for which, opt in ((scaler, optimizer), (reference_scaler, reference_optimizer)):
        which.step(opt)
        which.update()
    assert not torch.equal(model.encoder[0].weight, build()[0].encoder[0].weight)


@pytest.mark.parametrize("fused", [False, True], ids=["forward", "fused"])
def test_grad_scaler_overflow_is_discarded_and_recorded_again(fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    """At a loss scale that is too high the optimizer's step is skipped and nothing is recorded until it has fallen."""
    model, optimizer = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=100, grad_scaler=scaler)
    discarded, skipped = [], []
    for step in range(12):
        before = state(model)
        expected = oracle(losses_of(model(batch(step)[0]), batch(step)[1]), model.encoder)
        wanted = scalarizer.wants_stats()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="gradstats"):
            losses = float16_losses(model, step, 1.0)
            if fused:
                scalarizer.backward(losses)
            else:
                scaler.scale(scalarizer(losses)).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() < scale:
            skipped.append(step)
            assert_same(before, state(model))
        messages = [record.getMessage() for record in caplog.records if "finite" in record.getMessage()]
        if messages:
            discarded.append(step)
            assert "large" in messages[0]  # the task of the largest gradients overflows, the smallest does not
            assert "small" not in messages[0]
        if wanted and scalarizer.stats is not None:
            assert_gram(scalarizer.stats.gram, expected, rtol=2e-2)
            assert step == discarded[-1] + 1
    assert discarded
    assert set(discarded) <= set(skipped)
    assert len(skipped) < 12
    assert scalarizer.stats is not None


def test_grad_scaler_that_is_disabled() -> None:
    model, _ = build()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scalarizer = gradstats.Scalarizer("uniform", tasks=TASKS, record_every=1, grad_scaler=scaler)
    losses = losses_of(model(batch(0)[0]), batch(0)[1])
    expected = oracle(losses, model.encoder)
    scalarizer.backward(losses)
    assert_gram(scalarizer.stats.gram, expected)


# ---- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighting", "stop"), [("autoscale", 13), ("autoscale", 20), ("autoscale", 37), ("slaw", 13), ("uniform", 13)]
)
def test_state_dict_in_the_middle_continues_exactly(weighting: str, stop: int) -> None:
    steps = 50
    options = (
        {"total_steps": steps, "explore": 0.6, "windows": 3, "samples_per_window": 4}
        if weighting == "autoscale"
        else {}
    )

    def objects(seed: int) -> tuple:
        model, optimizer = build(seed=seed)
        return model, optimizer, gradstats.Scalarizer(weighting, tasks=TASKS, record_every=7, **options)

    def train(model, optimizer, scalarizer, first: int, last: int) -> list[int]:
        recorded = []
        for step in range(first, last):
            before = scalarizer.stats
            scalarizer(losses_of(model(batch(step)[0]), batch(step)[1])).backward()
            if scalarizer.stats is not before:
                recorded.append(step)
            optimizer.step()
            optimizer.zero_grad()
        return recorded

    whole = objects(seed=0)
    recorded = train(*whole, 0, steps)
    interrupted = objects(seed=0)
    train(*interrupted, 0, stop)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in interrupted], file)
    file.seek(0)
    resumed = objects(seed=1)
    for part, saved in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    assert train(*resumed, stop, steps) == [step for step in recorded if step >= stop]
    assert_same(state(whole[0]), state(resumed[0]))
    assert torch.equal(whole[2].weights, resumed[2].weights)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": "abc"}, TypeError, "tasks: expected a sequence of strings"),
        ({"tasks": {"a", "b"}}, TypeError, "tasks: expected a sequence of strings"),
        ({"tasks": None}, TypeError, "^tasks: expected a sequence"),
        ({"tasks": []}, TypeError, "^tasks: expected a sequence"),
        ({"tasks": ["a", "a"]}, ValueError, "tasks: expected different names"),
        ({"tasks": ["a"], "method": "fastest"}, ValueError, "method: expected one of"),
        ({"tasks": ["a"], "num_directions": 8}, ValueError, "num_directions: needs method='sketch'"),
        ({"tasks": ["a"], "accumulate": 0}, ValueError, "accumulate: expected a positive integer"),
        ({"tasks": ["a"], "record_every": 0.5}, ValueError, "record_every: expected a positive integer"),
    ],
)
def test_wrong_arguments_are_refused_when_the_scalarizer_is_made(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        gradstats.Scalarizer("uniform", **arguments)


@pytest.mark.parametrize("losses", [None, 5, torch.tensor(1.0), [torch.tensor(1)], [torch.tensor(1j)]])
def test_wrong_losses_are_refused_by_name(losses: object) -> None:
    with pytest.raises(TypeError, match="losses: expected"):
        gradstats.Scalarizer("uniform", tasks=["a"])(losses)


def test_state_of_other_tasks_is_refused() -> None:
    saved = gradstats.Scalarizer("slaw", tasks=["a", "b"]).state_dict()
    with pytest.raises(ValueError, match="expected tasks"):
        gradstats.Scalarizer("slaw", tasks=["b", "a"]).load_state_dict(saved)


# ---- compiled models ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No compiled backward left from before, in memory or on disk: whether it donates its buffers is decided once."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_run(backend: str | None, steps: int = 16) -> tuple[Model, gradstats.Scalarizer]:
    model, optimizer = build()
    forward = model if backend is None else torch.compile(model, backend=backend)
    # A compiled model is one node of the graph, which does not show that the heads are not shared.
    scalarizer = gradstats.Scalarizer(
        "autoscale", tasks=TASKS, inputs=model.encoder, total_steps=steps, explore=0.7, samples_per_window=3
    )
    for step in range(steps):
        x, y = batch(step)
        before = scalarizer.stats
        loss = scalarizer(losses_of(forward(x), y))
        if scalarizer.stats is not before:
            assert_gram(scalarizer.stats.gram, oracle(losses_of(model(x), y), model.encoder))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, scalarizer


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model(backend: str, fresh_compiler: None) -> None:
    import torch._functorch.config  # not loaded by `import torch` alone

    with torch._functorch.config.patch(donated_buffer=False):
        model, scalarizer = compiled_run(backend)
    eager, eager_scalarizer = compiled_run(None)
    torch.testing.assert_close(scalarizer.weights, eager_scalarizer.weights, rtol=1e-3, atol=0.0)
    for name, value in state(eager).items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-2, atol=1e-3)
    assert scalarizer.stats.method == "blockwise"
    assert scalarizer.weights[0] > 10 * scalarizer.weights[2]


def test_compiled_model_with_donated_buffers_names_the_setting(fresh_compiler: None) -> None:
    """A backward that was compiled to overwrite its saved tensors cannot run once a task."""
    with pytest.raises(RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer = False"):
        compiled_run("aot_eager")


def test_compiled_encoder_measured_at_its_features(fresh_compiler: None) -> None:
    """With activations as inputs no compiled backward runs before the user's own, and no setting is needed."""
    model, optimizer = build()
    encoder = torch.compile(model.encoder, backend="aot_eager")
    stats = []
    for step in range(3):
        x, y = batch(step)
        features = encoder(x)
        losses = losses_of({name: head(features) for name, head in model.heads.items()}, y)
        stats.append(gradstats.from_losses(losses, features, retain_graph=True))
        rows = [
            torch.autograd.grad(loss, features, retain_graph=True)[0].double().flatten() for loss in losses.values()
        ]
        assert_gram(stats[-1].gram, torch.stack(rows) @ torch.stack(rows).T)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

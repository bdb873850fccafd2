"""``PairwisePlan``: what ``pairwise`` gives, whatever happened to the tensors since the plan was made."""

import copy
import gc
import pickle
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import gradstats
from gradstats import PairwisePlan, ops, pairwise

needs_compiled = pytest.mark.skipif(
    not gradstats.backends()["cpu"].available, reason="only compiled kernels keep plans"
)
SHAPES = [(5, 3), (4,), (70, 9)]


def gradients(num_tasks: int = 3, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(num_tasks)]


def exact(grads: list[list[Tensor]]) -> Tensor:
    """The Gramian from its definition."""
    jacobian = torch.stack([torch.cat([g.detach().double().flatten() for g in task]) for task in grads])
    return jacobian @ jacobian.T


def assert_is_current(plan: PairwisePlan, grads: list[list[Tensor]]) -> None:
    """Now and at the next call the plan gives what the gradients hold."""
    for _ in range(2):
        gram = plan().gram
        assert torch.equal(gram, pairwise(grads).gram)
        torch.testing.assert_close(gram, exact(grads), rtol=1e-6, atol=1e-6)


FORMS = {
    "lists": lambda grads: (grads, {}),
    "mapping": lambda grads: (dict(zip("abc", grads, strict=True)), {}),
    "names": lambda grads: (grads, {"names": ["x", "y", "z"]}),
    "metric": lambda grads: (grads, {"metric": [torch.rand(shape) for shape in SHAPES]}),
    "missing": lambda grads: ([[None, *grads[0][1:]], *grads[1:]], {}),
    "tensors": lambda grads: ([task[2] for task in grads], {}),
    "rows": lambda grads: (torch.stack([task[2] for task in grads]), {}),
    "blocks": lambda grads: ([None, *map(torch.stack, zip(*grads, strict=True))], {"stacked": True}),
}


def tensors_of(grads) -> list[Tensor]:
    if isinstance(grads, Tensor) or grads is None:
        return [] if grads is None else [grads]
    return [tensor for entry in (grads.values() if isinstance(grads, dict) else grads) for tensor in tensors_of(entry)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_gives_what_pairwise_gives_also_after_writing(form, dtype):
    grads, options = FORMS[form]([[g.to(dtype) for g in task] for task in gradients()])
    plan = PairwisePlan(grads, **options)
    for factor in (1.0, 3.0, float("nan")):
        tensors_of(grads)[0].mul_(factor)
        planned, plain = plan(), pairwise(grads, **options)
        torch.testing.assert_close(planned.gram, plain.gram, rtol=0, atol=0, equal_nan=True)
        assert planned.names == plain.names
        assert torch.equal(planned.present, plain.present)
        assert planned.non_finite_names == plain.non_finite_names


def test_reads_the_metric_again():
    grads, metric = gradients(), [torch.ones(shape) for shape in SHAPES]
    plan = PairwisePlan(grads, metric=metric)
    for entry in metric:
        entry.fill_(2.0)
    torch.testing.assert_close(plan().gram, 2 * exact(grads), rtol=1e-6, atol=1e-6)
    metric[1].data = torch.zeros(4)
    metric[2].data = torch.zeros(70, 9)
    torch.testing.assert_close(plan().gram, 2 * exact([task[:1] for task in grads]), rtol=1e-6, atol=1e-6)


CHANGES = {
    "other data": lambda t: setattr(t, "data", torch.ones_like(t)),
    "set_": lambda t: t.set_(torch.ones(200), 3, t.shape, tuple(torch.empty(t.shape).stride())),
    "another place of the storage": lambda t: setattr(t, "data", torch.arange(16.0)[1:].view(5, 3)),
    "moved storage": lambda t: t.untyped_storage().resize_(1 << 20),
    "other strides at the same address": lambda t: setattr(t, "data", t.data.flatten().view(3, 5).T),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notices_that_a_tensor_lies_elsewhere_or_otherwise(change):
    grads = gradients()
    plan = PairwisePlan(grads)
    before, place = plan().gram, grads[1][0].data_ptr()
    CHANGES[change](grads[1][0])
    assert (change == "other strides at the same address") == (grads[1][0].data_ptr() == place)
    assert_is_current(plan, grads)
    assert (change == "moved storage") == torch.equal(plan().gram, before)


def test_notices_other_types_and_shapes_at_the_same_address():
    grads = gradients()
    plan = PairwisePlan(grads)
    for t, task in enumerate(grads):
        task[1].fill_(t)
        task[1].data = task[1].data.view(torch.bfloat16)
    assert_is_current(plan, grads)
    for task in grads:
        task[2].resize_(3, 9)
    assert_is_current(plan, grads)


@needs_compiled  # others refuse it
def test_notices_another_number_of_tasks():
    rows = torch.randn(4, 6)
    plan = PairwisePlan(rows)
    assert plan().num_tasks == 4
    rows.resize_(3, 6)
    assert plan().names == ("task0", "task1", "task2")
    assert torch.equal(plan().gram, pairwise(rows).gram)


def test_says_what_makes_a_tensor_unfit_until_it_is_fit_again():
    grads = gradients()
    plan = PairwisePlan(grads)
    grads[2][1].resize_(3)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape("grads[2][1]: expected shape (4,) as in grads[0][1], got (3,)")):
            plan()
    grads[2][1].resize_(4)
    assert_is_current(plan, grads)


@needs_compiled
def test_never_reads_memory_that_is_gone():
    grads = gradients()
    plan = PairwisePlan(grads)
    size = grads[0][2].untyped_storage().nbytes()
    grads[0][2].untyped_storage().resize_(0)
    for function in (plan, lambda: pairwise(grads)):
        with pytest.raises(RuntimeError, match="storage is empty"):
            function()
    grads[0][2].untyped_storage().resize_(size)
    grads[0][2].fill_(2.0)
    assert_is_current(plan, grads)


def test_keeps_tensors_alive_as_long_as_it_lives():
    grads = gradients()
    expected, tensor = exact(grads), weakref.ref(grads[0][0])
    plan = PairwisePlan(grads)
    del grads
    gc.collect()
    others = [torch.full((70, 9), torch.nan) for _ in range(50)]  # which would take the memory, if it were free
    torch.testing.assert_close(plan().gram, expected)
    del plan, others
    gc.collect()
    assert tensor() is None


def test_is_of_tensors_not_of_their_containers():
    grads = gradients()
    plan = PairwisePlan(grads)
    expected = plan().gram
    grads[0][1] = torch.zeros(4)
    grads.pop()
    assert torch.equal(plan().gram, expected)


def test_accumulated_gradients_that_stay_put():
    torch.manual_seed(0)
    models = [torch.nn.Linear(6, 5) for _ in range(3)]
    x = torch.randn(7, 6)
    for model in models:
        model(x).square().sum().backward()
    plan = PairwisePlan([[p.grad for p in model.parameters()] for model in models])
    for step in range(3):
        for model in models:
            model.zero_grad(set_to_none=False)
            model(x + step).square().sum().backward()
        assert_is_current(plan, [[p.grad for p in model.parameters()] for model in models])


@needs_compiled
def test_does_not_pass_the_tensors_again(monkeypatch):
    grads = gradients()
    plan = PairwisePlan(grads)
    expected = plan().gram
    monkeypatch.delattr(ops, "gram")
    monkeypatch.delattr(ops, "GramPlan")
    assert torch.equal(plan().gram, expected)


def test_what_torch_would_copy_is_read_at_each_call():
    numbers = torch.randn(3, 40, 2)
    rows = torch.view_as_complex(numbers).conj().imag  # negated when it is read
    assert rows.is_neg()
    plan = PairwisePlan(rows)
    for _ in range(2):
        jacobian = -numbers[..., 1].double()
        torch.testing.assert_close(plan().gram, jacobian @ jacobian.T)
        numbers.mul_(2)


def test_threads_may_share_a_plan():
    grads = gradients(num_tasks=6)
    plan = PairwisePlan(grads)
    start = threading.Barrier(8)

    def call(seed: int) -> list[Tensor]:
        start.wait()
        for _ in range(5):  # plans that are made and forgotten beside it
            others = gradients(2, seed=seed)
            assert torch.equal(PairwisePlan(others)().gram, pairwise(others).gram)
        return [plan().gram for _ in range(50)]

    with ThreadPoolExecutor(8) as pool:
        for value in (1.0, 2.0, 3.0):
            grads[0][0].data = torch.full((5, 3), value)  # which all threads notice at once
            expected = pairwise(grads).gram
            assert all(torch.equal(gram, expected) for grams in pool.map(call, range(8)) for gram in grams)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_reads_its_own_tensors(duplicate):
    grads = gradients()
    plan = PairwisePlan(grads)
    other = duplicate(plan)
    before = plan().gram
    grads[0][0].zero_()
    assert torch.equal(other().gram, before)
    assert_is_current(plan, grads)
    del plan
    gc.collect()
    assert torch.equal(other().gram, before)


def test_under_compile_and_on_devices_without_plans():
    grads = gradients()
    plan = PairwisePlan(grads)
    compiled = torch.compile(lambda x: plan().gram + x, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3, 3)), plan().gram + 1)
    meta = PairwisePlan([[g.to("meta") for g in task] for task in grads])()
    assert meta.gram.shape == (3, 3)
    assert meta.gram.device.type == "meta"


def test_results_need_no_gradient():
    rows = [torch.randn(4, requires_grad=True) for _ in range(2)]
    assert not PairwisePlan(rows)().gram.requires_grad


@needs_compiled
def test_the_raw_operator_knows_its_plans():
    for operator in (torch.ops.gradstats._planned_gram, torch.ops.gradstats._forget_plan):
        with pytest.raises(RuntimeError, match="expected the number of a planned call, got -1"):
            operator(torch.empty(0), -1)

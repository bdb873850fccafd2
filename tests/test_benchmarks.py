"""The benchmarks: that they measure what they say on a tiny model, and that the documents quote what was measured."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import collect
import handover
import linear
import plan
import pytest
import records
import render
import torch
import weightings
from cases import SHARINGS, build_case
from methods import METHODS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.usefixtures("one_thread")
LIBRARIES = {"autogram": "torchjd", "autojac": "torchjd", "mtl-backward": "torchjd", "opacus": "opacus"}
LIBRARIES |= {"autojac-loop": "torchjd", "backpack": "backpack"}


@pytest.fixture
def measured_here(monkeypatch):
    """Measure in this process, with 3 rounds."""
    monkeypatch.setattr(collect, "in_fresh_process", lambda measure, *a, say=lambda _: None: measure(*a, say))


def run(out, *options, methods=("backward", "loop", "gradstats")):
    chosen = ("--models", "tiny", "--tasks", "2", "--sharing", "shared", "--quick", "--methods", *methods)
    collect.main(["--out", str(out), *chosen, *options])
    (cell,) = json.loads(out.read_text())["cells"]
    return cell


def results(**methods):
    """Results of one cell: time and memory by method."""
    parts = {
        what: {"methods": {name.replace("_", "-"): {"median": value[i]} for name, value in methods.items()}}
        for i, what in enumerate(("time", "memory"))
    }
    return {"cells": [{"model": "mlp", "sharing": "shared", "num_tasks": 32, **parts}]}


@pytest.mark.filterwarnings("ignore")  # Opacus and BackPACK warn of what they do themselves
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", METHODS)
def test_methods_find_the_same_gramian(sharing, name):
    method = METHODS[name]
    if sharing not in method.sharings:
        pytest.skip("not for this sharing")
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    exact = collect.exact_gram(build_case("tiny", 2, sharing).double())
    case = build_case("tiny", 2, sharing)
    try:
        gram = method.prepare(case)(*case.forward())
    except NotImplementedError as error:
        pytest.skip(str(error))
    if method.kind == "mark":
        assert gram is None
    elif method.kind != "inexact":
        assert collect.relative_error(gram, exact) < 1e-6


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_exact_gramian_is_that_of_the_trunk(sharing):
    case = build_case("tiny", 2, sharing)
    exact = collect.exact_gram(build_case("tiny", 2, sharing).double())
    assert exact.dtype == torch.float64
    for t, loss in enumerate(case.forward()[1]):
        case.trunk.zero_grad()
        loss.backward(retain_graph=True)
        norm = sum(p.grad.double().square().sum() for p in case.trunk.parameters())
        torch.testing.assert_close(exact[t, t], norm, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(
    ("model", "num_tasks", "share", "least"),  # of what is predicted, as measured: the Transformer frees rows earlier
    [
        ("cnn", 8, 1.0, 0.95),
        ("nn-transformer", 8, 0.8, 0.95),
        ("transformer", 2, 1.0, 0.7),
        ("transformer", 2, 0.8, 0.75),
    ],
)
def test_plans_predict_what_collections_take(model, num_tasks, share, least, monkeypatch):
    # It takes and frees a block as large as the prediction, and would be found in place of what the collection takes.
    monkeypatch.setattr("gradstats.collect.walk._keep_freed", lambda num_bytes: None)
    found = plan.follow_plan(model, num_tasks, share, print)
    sizes, work = found["mebibytes"], found["million_operations"]
    assert least * sizes["predicted"] <= sizes["tensors"] <= 1.05 * sizes["predicted"]
    assert work["predicted"] >= 0.99 * work["counted"]
    if share == 1:
        assert work["predicted"] == pytest.approx(work["counted"], rel=0.01)
    assert plan.follow_plan(model, num_tasks, 0.01, print)["absent"].startswith("max_bytes: the leanest plan")


@pytest.mark.parametrize("model", ["mlp", "nn-transformer"])
def test_a_budget_bounds_what_tensors_take(model):
    sizes = plan.follow_plan(model, 8, 0.9, print)["mebibytes"]
    assert sizes["tensors"] <= 1.02 * sizes["predicted"]


def test_linear_layers_are_timed_with_the_same_result(tmp_path):
    out = tmp_path / "linear.json"
    linear.main(["--layers", "30x20x10", "--tasks", "3", "--device", "cpu", "--seconds", "0", "--out", str(out)])
    single, half = json.loads(out.read_text())["records"]
    assert (single["layer"], single["tasks"], single["dtype"], half["dtype"]) == ("30x20x10", 3, "float32", "bfloat16")
    for way in single["ways"].values():
        assert way["milliseconds"] > 0
        assert way["error"] < 1e-6
    assert half["ways"][linear.FUSED]["error"] < 1e-6


@pytest.mark.parametrize("name", ["uw", "dwa", "gls", "famo", "imtl_l"])  # the others differ in scale or at random
def test_weightings_are_timed_with_the_same_result(name):
    losses = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    gradients = []
    for call in weightings.loss_calls(name, losses).values():
        call()
        gradients.append(losses.grad)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0.0)


def test_weightings_are_timed_beside_torchjd(tmp_path):
    out = tmp_path / "weightings.json"
    weightings.main(["--out", str(out), "--names", "dualproj", "exact_slw", "gls", "--sizes", "3", "--seconds", "0"])
    records = json.loads(out.read_text())["records"]
    assert [r["name"] for r in records] == ["dualproj"] * 4 + ["exact_slw"] * 3 + ["gls"]
    for record in records:
        assert record["gradstats"] > 0
        assert record.get("torchjd", 0) > 0 or record["name"] == "exact_slw"


def test_no_weighting_was_slower_than_torchjds():
    """The committed results: of two measurements of the same, one may be 2 % slower."""
    found = {(r["name"], r["kind"], r["num_tasks"]): r for r in render.load("weightings")["records"]}
    faster = {case: r["torchjd"] / r["gradstats"] for case, r in found.items() if "torchjd" in r}
    assert {case: ratio for case, ratio in faster.items() if ratio < 0.98} == {}
    easy = {("pcd", "agreeing")}  # where nothing is to be solved
    for name, kind in {*itertools.product(("nash_mtl", "fairgrad", *weightings.PROGRAMS), weightings.KINDS)} - easy:
        assert faster[name, kind, 32] >= 10
        assert found[name, kind, 128]["gradstats"] < 10_000


@pytest.mark.slow
def test_a_run_in_fresh_processes(tmp_path):
    out = tmp_path / "results.json"
    methods = ("backward", "loop", "gradstats")
    options = ("--models", "mlp", "--tasks", "2", "--sharing", "shared", "--quick", "--methods", *methods)
    command = [sys.executable, str(BENCHMARKS / "collect.py"), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "MLP, shared, T = 2" in done.stdout
    written = json.loads(out.read_text())
    assert written["machine"]["torch"] == torch.__version__
    (cell,) = written["cells"]
    assert (cell["parameters"], cell["samples"]) == (4_723_712, 64)
    assert 0 < cell["time"]["gradients_error"] < 1e-6
    for name in methods:
        time = cell["time"]["methods"][name]
        assert 0 < time["quartiles"][0] <= time["median"] <= time["quartiles"][1]
        assert time["error"] is None if name == "backward" else time["error"] < (1e-6 if name == "gradstats" else 1e-2)
    assert cell["time"]["methods"]["loop"]["median"] > cell["time"]["methods"]["backward"]["median"]
    memory = {name: cell["memory"]["methods"][name]["median"] for name in methods}
    gradient = 4 * cell["parameters"] / 2**20  # MiB
    assert gradient < memory["backward"] < 2.5 * gradient
    assert 2 * gradient < memory["loop"] < 6 * gradient  # holds both tasks' gradients


def test_resume_measures_what_is_missing_and_again_everything(tmp_path, measured_here):
    out = tmp_path / "results.json"
    run(out, "--what", "time", methods=["backward", "loop"])
    whole = run(out, "--resume")
    assert set(whole["time"]["methods"]) == set(whole["memory"]["methods"]) == {"backward", "loop", "gradstats"}
    assert run(out, "--resume") == whole
    again = run(out, "--again", methods=["gradstats"])
    assert again["memory"]["methods"]["loop"] == whole["memory"]["methods"]["loop"]
    assert again["time"]["methods"]["loop"] != whole["time"]["methods"]["loop"]  # times compare in one process only
    with pytest.raises(SystemExit):
        run(out)


def test_a_method_that_raises_is_absent_with_its_reason(tmp_path, measured_here, monkeypatch):
    def refuse(case):
        raise NotImplementedError("not built yet")

    monkeypatch.setitem(METHODS, "loop", dataclasses.replace(METHODS["loop"], prepare=refuse))
    cell = run(tmp_path / "results.json", methods=["backward", "loop"])
    for what in ("time", "memory"):
        assert cell[what]["methods"]["loop"] == {"absent": "NotImplementedError: not built yet"}
        assert "median" in cell[what]["methods"]["backward"]


def end_of_process(say):
    raise SystemExit(3)


def test_a_process_that_dies_is_absent():
    assert collect.in_fresh_process(end_of_process) == {"absent": "the process ended with 3"}


def test_peers_count_as_better_only_beyond_noise():
    verdicts = render.against_peers(results(loop=(100.0, 50.0), autogram=(200.0, 40.0), gradstats=(109.0, 41.0)))
    assert [(v.holds, v.value) for v in verdicts] == [(True, 1.09), (False, 1.025)]
    assert "T × grad, by parameter" in verdicts[0].what
    assert "TorchJD autogram" in verdicts[1].what


def test_a_wrong_gramian_does_not_count_as_fast():
    found = results(loop=(100.0, 50.0), gradstats=(10.0, 5.0))
    found["cells"][0]["time"]["methods"]["gradstats"]["error"] = 1e-3
    assert [v.holds for v in render.against_peers(found)] == [False, True, True]


def test_targets():
    found = results(autogram=(1000.0, 300.0), gradstats=(219.0, 121.0), task_backwards=(1.0, 1.0))
    assert [(v.value, v.holds) for v in render.targets(found)] == [(0.219, True), (121.0, False)]


def test_targets_of_pairwise_on_the_cpu(monkeypatch):
    def case(entries, num_tasks, of_read, of_peak, dtype="float32"):
        size = {"dtype": dtype, "list": "flat", "entries": entries, "num_tasks": num_tasks, "threads": 1}
        ours = {"method": "pairwise", "milliseconds": 2.0, "percent_of_read": of_read, "percent_of_peak": of_peak}
        return [size | ours, size | {"method": "mm, ready-made", "milliseconds": 3.0}]

    cases = [
        (2e7, 8, 91.0, 20.0),
        (2e7, 2, 95.0, 9.0),
        (2e7, 16, 74.0, 40.0),
        (1e6, 64, 30.0, 51.0),
        (1e4, 2, 9.0, 9.0),
    ]
    found = [*itertools.chain(*itertools.starmap(case, cases)), *case(2e7, 4, 69.0, 9.0, "bfloat16")]
    monkeypatch.setattr(render, "load", lambda name: {"records": found})
    monkeypatch.setattr(render, "CPU_RUNS", {"here": "cpu"})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in render.bench_targets_table().splitlines()]
    assert lines[0] == ["target", "limit", "here"]
    assert [line[1:] for line in lines[2:]] == [
        ["≥ 90", "91 … 95"],
        ["≥ 75", "**74 … 74**"],
        ["≥ 50", "51 … 51"],
        ["≥ 70", "**69 … 69**"],
        ["≥ 1", "1.5 … 1.5"],
        ["≥ 0.5", "1.5 … 1.5"],
    ]


def test_only_what_stands_between_markers_is_rewritten():
    tables = {"a": lambda: "| new |", "b": lambda: "| other |"}
    text = "x\n<!-- table: a -->\nold\n<!-- end -->\ny <!-- table: b --><!-- end -->\nz"
    new = render.rendered(text, tables)
    assert new == (
        "x\n<!-- table: a -->\n\n| new |\n\n<!-- end -->\ny <!-- table: b -->\n\n| other |\n\n<!-- end -->\nz"
    )
    assert render.rendered(new, tables) == new
    with pytest.raises(ValueError, match="got 'c'"):
        render.rendered("<!-- table: c --><!-- end -->", tables)


def test_the_documents_quote_the_committed_results():
    render.main(["--check"])


def test_tables_and_picture_show_what_was_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    found = results(backward=(20.0, 30.0), loop=(1000.0, 700.0), autogram=(1100.0, 300.0), gradstats=(200.0, 100.0))
    monkeypatch.setattr(render, "load", lambda name: found)
    lines = render.collect_table("time", "shared").splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")][:6] == ["MLP", "32", "20", "**10**", "50", "55"]
    lines = render.collect_table("memory", "shared").splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == ["MLP", "32", "30", "**100**", "700", "300"]
    figure = render.collect_picture(found)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["MLP, T = 32"]
    drawn = {p.get_label(): p.get_offsets().tolist() for p in figure.axes[0].collections}
    assert drawn["gradstats"] == [[10.0, 0.0]]
    assert drawn["TorchJD autogram"] == [[55.0, 0.0]]


def test_weights_depend_less_on_the_batches_the_more_steps_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "DRAWS", 30)
    out = tmp_path / "records.json"
    records.main(["--out", str(out), "--seeds", "1", "--steps", "500"])
    found = json.loads(out.read_text())
    every, *fewer, default = (r for r in found["records"] if len(r["tasks"]) == 3)
    assert every["samples"] is None
    assert every["from_all_steps"] == 0
    errors = [record["from_all_steps"] for record in fewer]
    assert errors == sorted(errors, reverse=True)
    assert sum(default["samples"]) == 11
    monkeypatch.setattr(render, "load", lambda name: found)
    lines = render.records_table().splitlines()
    assert len(lines) == 2 + 6
    assert [cell.strip() for cell in lines[3].split("|")[1:3]] == ["2 in each window", "20"]


@pytest.mark.parametrize("name", handover.OPTIMIZERS)
def test_rescaled_moments_are_those_of_longer_gradients(name):
    """What handover.py does to an optimizer's state, against an optimizer that has seen longer gradients all along."""
    gradients = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    states = []
    for factor in (1.0, 30.0):
        module = torch.nn.Linear(4, 1, bias=False)
        optimizer = handover.OPTIMIZERS[name][0](module.parameters(), 1e-3)
        for gradient in gradients:
            module.weight.grad = factor * gradient[None]
            optimizer.step()
        if factor == 1.0:
            handover.multiply(optimizer, module, 30.0)
        states.append(dict(optimizer.state[module.weight]))
    torch.testing.assert_close(*states)


def test_weights_are_handed_over_in_all_ways(tmp_path, monkeypatch):
    monkeypatch.setitem(handover.OPTIMIZERS, "SGD", (handover.OPTIMIZERS["SGD"][0], [1e-4]))
    monkeypatch.setitem(handover.OPTIMIZERS, "Adam", (torch.optim.Adam, [3e-3]))
    out = tmp_path / "handover.json"
    handover.main(["--out", str(out), "--steps", "100", "--seeds", "1", "--optimizers", "SGD", "Adam"])
    found = json.loads(out.read_text())
    by_sgd, records = (
        {r["way"]: r["errors"] for r in found["records"] if r["optimizer"] == o} for o in ("SGD", "Adam")
    )
    assert list(by_sgd) == list(records) == [way.title for way in handover.WAYS]
    assert len({str(errors) for errors in by_sgd.values()}) == len(by_sgd), "all ways differ"
    # Where the moments are rescaled with the weights, Adam does not see the weights' common scale: one training.
    rescaled = [errors[0] for way, errors in records.items() if "rescaled" in way]
    assert len(rescaled) == 3
    assert all(errors == pytest.approx(rescaled[0], rel=0.02) for errors in rescaled)
    others = [errors[0] for way, errors in records.items() if "rescaled" not in way]
    assert len({str(errors) for errors in [*others, rescaled[0]]}) == len(others) + 1, "all others differ"
    monkeypatch.setattr(render, "load", lambda name: found)
    lines = render.handover_table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(records)
    assert lines[2 + list(records).index("ideal fixed weights")].endswith(" 0.0 |")

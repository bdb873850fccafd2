"""The demo end to end, small: what it prints and writes, and that its numbers fit together."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import runpy
import statistics
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")
EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--epochs", "1", "--pairs-per-image", "1", "--record-every", "4"]  # 16 steps


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["digits"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["digits"]


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def demo(digits, tmp_path_factory):
    """The demo's results folder and what ``results.json`` in it says."""
    folder = tmp_path_factory.mktemp("demo") / "results"
    digits.main([*SMALL, "--seeds", "2", "--results-dir", str(folder)])
    return folder, json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_demo_writes_all_results(demo):
    folder, _ = demo
    pictures = {"results.png", "weights.png", "magnitude_similarity.png", "cosine.png"}
    assert {path.name for path in folder.iterdir()} == pictures | {"results.json", "results.csv", "results.md"}
    for name in pictures:
        with Image.open(folder / name) as image:
            image.load()
            assert image.width > 800


def test_demo_runs_every_method_with_every_seed(demo):
    folder, results = demo
    expected = {(m, seed) for m in ("single-task", "unitary", "SLAW", "AutoScale") for seed in (0, 1)}
    assert {(run["method"], run["seed"]) for run in results["runs"]} == expected
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["image"]) for row in rows] == [run["image"] for run in results["runs"]]


def test_demo_derives_drops_from_its_runs(demo):
    _, results = demo
    runs = {(run["method"], run["seed"]): run for run in results["runs"]}
    for method in ("unitary", "SLAW", "AutoScale"):
        for seed in (0, 1):
            ours, single = runs[method, seed], runs["single-task", seed]
            drops = [
                1 - ours["left"] / single["left"],
                1 - ours["right"] / single["right"],
                ours["image"] / single["image"] - 1,
            ]
            assert ours["delta_m_percent"] == pytest.approx(100 * statistics.fmean(drops))
        mean = statistics.fmean(runs[method, seed]["delta_m_percent"] for seed in (0, 1))
        assert results["summary"][method]["Δm (%), lower is better"]["mean"] == pytest.approx(mean)
    assert runs["unitary", 0]["weight_image"] == 1.0
    assert runs["AutoScale", 0]["weight_image"] < runs["AutoScale", 0]["weight_left"]


def test_demo_table_has_a_row_a_method_and_says_who_wins(demo):
    folder, results = demo
    assert all(seconds > 0 for seconds in results["cpu_seconds"].values())
    ratio = results["cpu_seconds"]["AutoScale"] / results["cpu_seconds"]["unitary"]
    lines = (folder / "results.md").read_text(encoding="utf-8").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["single-task", "unitary", "SLAW", "AutoScale"]
    assert lines[-1].split("|")[6].strip() == f"{ratio:.2f}"
    assert len(results["verdicts"]) == 2
    assert all(any(word in verdict for word in ("wins", "loses", "no winner")) for verdict in results["verdicts"])


def test_monitoring_changes_no_training(digits):
    options = digits.parse(SMALL)
    data = digits.overlaid_digits(pairs_per_image=1)
    for weighting in ("uniform", "slaw", "autoscale"):
        plain = digits.train("plain", weighting, digits.TASKS, data, 0, options)
        monitored = digits.train("monitored", weighting, digits.TASKS, data, 0, options, record_every=1)
        assert plain.metrics == monitored.metrics
        assert plain.weights == monitored.weights
        assert len(monitored.history.steps) == 16


def results_with(digits, drops):
    """Results in which AutoScale's only error is ``drops`` percent above single-task, SLAW's and unitary's 10."""
    single = {"left": 50.0, "right": 50.0, "image": 1.0}

    def runs(values):
        return [digits.Run({**single, "image": 1 + 3 * value / 100}, [1.0, 1.0, 1.0], None) for value in values]

    methods = {"unitary": runs([10.0, 10.0, 10.0]), "SLAW": runs([10.0, 10.0, 10.0]), "AutoScale": runs(drops)}
    return digits.Results([single] * 3, methods, {})


@pytest.mark.parametrize(
    ("drops", "verdict"),
    [
        ([5.0, 6.0, 7.0], "-4.0 ± 2.5 points; AutoScale wins"),
        ([13.0, 14.0, 15.0], "4.0 ± 2.5 points; AutoScale loses"),
        ([5.0, 9.0, 13.0], "-1.0 ± 9.9 points; no winner: the interval of the difference holds 0"),
    ],
)
def test_verdicts(digits, drops, verdict):
    first, second = digits.verdicts(results_with(digits, drops))
    assert first == f"Δm of AutoScale minus Δm of unitary: {verdict}."
    assert second == f"Δm of AutoScale minus Δm of SLAW: {verdict}."


def test_recorded_rows_give_the_gramian_back(digits):
    gradients = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = digits.gradstats.pairwise(gradients, names=digits.TASKS)
    row = {f"gradient/{name}": value for name, value in measured.to_dict().items()}
    assert torch.allclose(digits.recorded_stats(row).gram, measured.gram, rtol=1e-12)


@torch.no_grad()
def test_reconstruction_loss_is_in_units_of_the_data(digits):
    model = digits.Digits(("image",))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    batch = {"image": torch.full((4, 1, 11, 11), 3.0)}
    assert float(digits.compute_losses(model, batch, reconstruction="sum")["image"]) == pytest.approx(9 * 121)
    assert float(digits.compute_losses(model, batch, reconstruction="mean")["image"]) == pytest.approx(9)


@pytest.mark.parametrize("option", ["--seeds", "--epochs", "--pairs-per-image", "--batch-size", "--threads"])
def test_options_refuse_zero(digits, option, capsys):
    with pytest.raises(SystemExit):
        digits.parse([option, "0"])
    assert f"{option}: expected at least 1, got 0" in capsys.readouterr().err


def test_one_seed_has_no_interval(digits):
    results = results_with(digits, [5.0])
    results.single = results.single[:1]
    results.runs = {method: runs[:1] for method, runs in results.runs.items()}
    assert all("one seed tells nothing" in verdict for verdict in digits.verdicts(results))
    assert math.isnan(results.intervals()["AutoScale"][digits.DROP].half_width)


def test_domains_example(capsys, one_thread):
    results = runpy.run_path(str(EXAMPLES / "domains.py"))["main"](steps=60, seeds=1)
    assert list(results) == ["uniform", "loss weights", "sampling"]
    assert all(run["clean"] > 40 for (run,) in results.values())  # of ten classes
    assert "test accuracy (%)" in capsys.readouterr().out

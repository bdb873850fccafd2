"""Comparisons: experiments, single runs, many runs in processes, and what their results say."""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from gradstats.cli import main
from gradstats.compare import Metric, Results, Source, compare, score
from gradstats.compare.nyuv2 import depth_measures, segmentation_measures
from gradstats.compare.results import DROP, SINGLE, Trained
from gradstats.compare.runs import Run, _context, _run_apart, make_weighting, train, without_required_options
from gradstats.compare.tox21 import roc_auc
from gradstats.weighting import AutoScale, Fixed, available

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERIMENT = """
import os, time
from dataclasses import dataclass

import torch
from torch import nn

from gradstats.compare import Experiment, Metric
from gradstats.data import Samples, batches


class Net(nn.Module):
    def __init__(self, tasks):
        super().__init__()
        self.trunk = nn.Linear(4, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks})

    def forward(self, x):
        features = self.trunk(x).tanh()
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


@dataclass
class Regressions(Experiment):
    epochs: int = 2
    broken: int = -1
    killed: int = -1
    slow: float = 0.0
    tasks = ("a", "b")
    metrics = (Metric("a", "error", higher_is_better=False), Metric("b", "closeness"))

    def __post_init__(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        self.samples = Samples({"x": x, "a": x.sum(1), "b": 10 * x[:, 0]})

    def make_model(self, tasks):
        time.sleep(self.slow)
        if torch.initial_seed() == self.killed:
            os._exit(3)
        return Net(tasks)

    def train_loader(self):
        return batches(self.samples, 16, shuffle=True)

    def compute_losses(self, model, batch):
        losses = {task: (out - batch[task]).square().mean() for task, out in model(batch["x"]).items()}
        if torch.initial_seed() == self.broken:
            losses["b"] = losses["b"] * float("nan")
        return losses

    def evaluate(self, model, split):
        losses = self.compute_losses(model, self.samples[:32] if split == "valid" else self.samples[32:])
        values = {"a": lambda loss: loss, "b": lambda loss: 1 / loss}
        return {m: values[m.task](losses[m.task].item()) for m in self.metrics if m.task in losses}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "regressions.py"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


# ---- weightings and experiments --------------------------------------------------------------------------------------


def test_weightings_are_read_with_their_options():
    assert make_weighting("slaw", 3, total_steps=100).num_tasks == 3
    autoscale = make_weighting("autoscale(cost=condition, explore=0.5)", 2, total_steps=100, seed=3)
    assert isinstance(autoscale, AutoScale)
    assert autoscale.cost == "condition"
    fixed = make_weighting("fixed(weights=[1, 2.5])", 2, total_steps=100)
    assert isinstance(fixed, Fixed)
    assert fixed.weights.tolist() == [1.0, 2.5]


def test_weightings_are_told_what_the_training_is():
    context = {"total_steps": 100, "seed": 3, "window": 7}
    assert make_weighting("pcgrad", 2, **context).seed == 3
    assert make_weighting("dwa", 2, **context).window == 7
    assert make_weighting("dwa(window=20)", 2, **context).window == 20


@pytest.mark.parametrize("text", ["", "slaw(", "slaw(2)", "slaw.x", "slaw; uw", "autoscale(cost=f(1))"])
def test_weightings_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="weighting: expected a name"):
        make_weighting(text, 2, total_steps=100)


def test_all_weightings_but_those_that_need_options():
    names = without_required_options()
    assert set(available()) - set(names) == {"fixed"}
    for name in names:
        make_weighting(name, 3, total_steps=100)


def test_score_is_better_where_metrics_are():
    up, down = Metric("a", "accuracy"), Metric("b", "error", higher_is_better=False)
    base = score({up: 0.5, down: 2.0})
    assert score({up: 0.55, down: 2.0}) == pytest.approx(base + np.log(1.1) / 2)
    assert score({up: 0.5, down: 1.0}) == pytest.approx(base + np.log(2) / 2)
    assert np.isfinite(score({up: 0.0, down: 1.0}))


def test_experiments_of_users(file):
    experiment = Source(str(file), settings={"epochs": 7}).load()
    assert experiment.settings()["epochs"] == 7
    assert {"lr", "weight_decay", "slow"} < experiment.settings().keys()
    assert "data" not in experiment.settings()
    with pytest.raises(ValueError, match=r"settings: .* has epochs, lr, .*; got epoch"):
        Source(str(file), settings={"epoch": 7}).load()
    with pytest.raises(ValueError, match="expected one of digits, tox21, nyuv2 or a Python file, got 'tox22'"):
        Source("tox22").load()
    file.write_text(EXPERIMENT.replace('tasks = ("a", "b")', 'tasks = ("a", "c")'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics for each of them, from Regressions; got tasks \['a', 'c'\]"):
        Source(str(file)).load()
    file.write_text("x = 1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected one subclass of Experiment in .*regressions.py, got \[\]"):
        Source(str(file)).load()


# ---- the built-in experiments ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Tox21 and NYUv2 in the format of the real ones, but tiny and random."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (90, 2)).astype(np.float32)
    labels[rng.random((90, 2)) < 0.2] = np.nan
    split = np.repeat([0, 1, 2], 30).astype(np.uint8)
    np.savez(
        tmp_path / "tox21.npz",
        fp2048=rng.integers(0, 256, (90, 256), dtype=np.uint8),
        y=labels,
        tasks=np.array(["NR-A", "SR-B"]),
        split_random=split,
        split_scaffold=split[::-1],
    )
    (tmp_path / "nyuv2").mkdir()
    for name, count in (("train", 20), ("test", 6)):
        np.savez(
            tmp_path / "nyuv2" / f"{name}.npz",
            image=rng.integers(0, 256, (count, 16, 24, 3), dtype=np.uint8),
            label13=np.where(rng.random((count, 16, 24)) < 0.1, 255, rng.integers(0, 13, (count, 16, 24))).astype("u1"),
            depth_code=rng.integers(18, 255, (count, 16, 24), dtype=np.uint8),
        )
    return tmp_path


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("digits", {"pairs_per_image": 1, "epochs": 1, "batch_size": 256}),
        ("tox21", {"epochs": 2, "batch_size": 10}),
        ("nyuv2", {"epochs": 1, "batch_size": 6, "width": 4}),
        ("nyuv2", {"epochs": 1, "batch_size": 6, "width": 4, "stride": 2}),
    ],
)
def test_built_in_experiments_train(name, settings, folder):
    source = Source(name, folder, settings)
    experiment = source.load()
    content = train(Run(source, "autoscale", tuple(experiment.tasks), seed=0))
    assert [m["task"] for m in content["metrics"]] == [m.task for m in experiment.metrics]
    assert all(np.isfinite(m["value"]) for m in content["metrics"])
    assert content["seconds"] > 0
    assert content["weights"].keys() == {"step", *experiment.tasks}
    alone = experiment.tasks[-1]
    single = train(Run(source, "uniform", (alone,), seed=0))
    assert {m["task"] for m in single["metrics"]} == {alone}


def test_stride_of_scenes(folder):
    batch = next(iter(Source("nyuv2", folder, {"batch_size": 6, "stride": 3}).load().train_loader()))
    assert {name: (*tensor.shape,) for name, tensor in batch.items()} == {
        "image": (6, 3, 6, 8),
        "segmentation": (6, 6, 8),
        "depth": (6, 6, 8),
    }
    with pytest.raises(ValueError, match="stride: expected a positive integer, got 0"):
        Source("nyuv2", folder, {"stride": 0}).load()


@pytest.mark.parametrize("name", ["tox21", "nyuv2"])
def test_missing_data_is_named(name, tmp_path):
    with pytest.raises(ValueError, match="data: expected the folder that holds"):
        Source(name).load()
    with pytest.raises(FileNotFoundError, match=f"{name}.*npz with the arrays"):
        Source(name, tmp_path).load()


def test_roc_auc_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 10, (200,), generator=generator).float()  # with ties
    labels = torch.randint(0, 2, (200,), generator=generator).float()
    assert roc_auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    known = torch.rand(200, generator=generator) < 0.7
    expected = metrics.roc_auc_score(labels[known], scores[known])
    assert roc_auc(scores, torch.where(known, labels, torch.nan)) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(roc_auc(scores, torch.ones(200)))
    assert np.isnan(roc_auc(scores, torch.zeros(200)))


def test_measures_of_scenes():
    truth = torch.tensor([[[0, 0, 1, 255]]], dtype=torch.uint8)
    named = torch.tensor([[[0, 1, 1, 0]]])
    iou, accuracy = segmentation_measures(named, truth)
    assert iou == pytest.approx((1 / 2 + 1 / 2) / 2)  # of the classes 0 and 1, the others do not occur
    assert accuracy == pytest.approx(2 / 3)
    absolute, relative = depth_measures(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert (absolute, relative) == (1.0, 0.5)


# ---- many runs -------------------------------------------------------------------------------------------------------


def test_exit_codes_of_many_processes():
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(lambda _: _run_apart(_context(), os.getpid), range(100)))
    assert codes == [0] * 100


def test_comparison_end_to_end(file, tmp_path):
    """Begun by the command line and killed in the middle, then finished by a second call, and called again."""
    out, method = tmp_path / "out", "fixed(weights=[1,0.01])"
    command = [sys.executable, "-m", "gradstats.cli", "compare", str(file), "--out", str(out), "--seeds", "2"]
    command += ["--weightings", method, "--set", "slow=0.3"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(out.glob("runs/*.json"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*.json")}
    assert 2 <= len(done) < 8
    assert not (out / "results.csv").exists()

    arguments = {"out": out, "weightings": [method], "seeds": 2, "jobs": 2, "progress": False}
    arguments["settings"] = {"slow": 0.3}
    results = compare(str(file), **arguments)
    assert results.methods == ["uniform", method]
    assert done == {path: path.stat().st_mtime_ns for path in done}

    with (out / "results.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    value = {(row["method"], row["seed"], row["metric"]): float(row["value"]) for row in rows}
    assert len(rows) == len(value) == 3 * 2 * 2
    assert {row["weight"] for row in rows if row["method"].startswith("fixed") and row["task"] == "b"} == {"0.01"}
    assert value["uniform", "0", "error"] != value["uniform", "1", "error"]
    drops = [
        50 * (value["uniform", seed, "error"] / value[SINGLE, seed, "error"] - 1)
        + 50 * (1 - value["uniform", seed, "closeness"] / value[SINGLE, seed, "closeness"])
        for seed in "01"
    ]
    assert results.intervals()["uniform"][DROP].mean == pytest.approx(statistics.fmean(drops))
    lines = (out / "results.md").read_text(encoding="utf-8").splitlines()
    assert {line.split("|")[1].strip() for line in lines[2:5]} == {SINGLE, *results.methods}
    assert lines[-1].split()[-1].startswith("slow=0.3")
    assert f"--seeds 2 --weightings uniform '{method}' --set epochs=2" in lines[-1]
    assert all((out / name).stat().st_size > 10_000 for name in ("results.png", "weights.png"))

    # What is there stays; what is missing is trained again, to the same result.
    files = sorted((out / "runs").iterdir())
    assert len(files) == 4 + 4
    written = {path: path.stat().st_mtime_ns for path in files}
    before = json.loads(files[-1].read_text(encoding="utf-8"))
    files[-1].unlink()
    again = compare(str(file), **arguments)
    assert json.loads(files[-1].read_text(encoding="utf-8"))["metrics"] == before["metrics"]
    assert {path: path.stat().st_mtime_ns for path in files[:-1]} == {path: written[path] for path in files[:-1]}
    assert again.tidy().count("\n") == results.tidy().count("\n")

    # Results of other settings are refused, and so are those of another experiment file, before anything runs.
    with pytest.raises(
        ValueError, match=r"holds a run of other settings \(settings .*'epochs': 2.*choose another folder"
    ):
        compare(str(file), **{**arguments, "settings": {"slow": 0.3, "epochs": 3}})
    file.write_text(EXPERIMENT + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other settings \(fingerprint "):
        compare(str(file), **arguments)


def test_runs_that_fail_are_told_and_the_others_kept(file, tmp_path):
    with pytest.raises(RuntimeError, match="6 of 9 runs failed") as error:
        compare(str(file), out=tmp_path / "out", weightings=[], seeds=3, settings={"broken": 1, "killed": 2})
    assert "FloatingPointError: the loss of task 'b' is nan" in str(error.value)
    assert "uniform, seed 2: its process ended with exit code 3" in str(error.value)
    tidy = (tmp_path / "out" / "results.csv").read_text(encoding="utf-8")
    assert {line.split(",")[1] for line in tidy.splitlines()[1:]} == {"0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--seeds", "0"], "seeds: expected a positive integer, got 0"),
        (["digits", "--weightings", "slaw", "nonsense"], "weighting: expected one of uniform, .*, got 'nonsense'"),
        (["digits", "--weightings", "slaw(x=1)"], "unexpected keyword argument 'x'"),
        (["nowhere.py"], "or a Python file, got 'nowhere.py'"),
        (["tox21", "--data", "nowhere"], "tox21.npz with the arrays .*; there is no such file"),
        (["digits", "--set", "epochs"], "expected name=value, got 'epochs'"),
    ],
)
def test_bad_arguments_of_the_command_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["compare", *arguments, "--out", str(tmp_path)])
    assert error.value.code != 0
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


# ---- what results say ------------------------------------------------------------------------------------------------

METRICS = (Metric("a", "accuracy"), Metric("b", "error", higher_is_better=False))


def trained(method, seed, values, *, tasks=("a", "b"), metrics=METRICS, seconds=1.0, memory=100):
    entries = [{**vars(m), "value": v} for m, v in zip(metrics, values, strict=True)]
    weights = {"step": [1], **{task: [1.0] for task in tasks}}
    content = {"metrics": entries, "weights": weights, "best_epoch": 1, "seconds": seconds, "memory": memory}
    return Trained(Run(Source("x"), method, tasks, seed), content)


def singles(seeds=3):
    runs = [trained("uniform", s, [0.5], tasks=("a",), metrics=METRICS[:1]) for s in range(seeds)]
    return runs + [trained("uniform", s, [2.0], tasks=("b",), metrics=METRICS[1:]) for s in range(seeds)]


def test_ranks_times_and_drops():
    runs = singles(1)
    runs += [trained("uniform", 0, [0.5, 3.0], seconds=2.0), trained("slaw", 0, [0.5, 1.0], seconds=3.0, memory=None)]
    runs += [trained("uw", 0, [0.25, 3.0], seconds=1.0)]
    results = Results(runs, METRICS)
    assert results.mean_ranks() == {"uniform": (1.5 + 2.5) / 2, "slaw": (1.5 + 1) / 2, "uw": (3 + 2.5) / 2}
    assert results.relative("seconds") == {"uniform": 1.0, "slaw": 1.5, "uw": 0.5}
    assert np.isnan(results.relative("memory")["slaw"])
    assert results.drops("slaw") == {0: pytest.approx(-25.0)}
    assert results.drops("uw") == {0: pytest.approx(50.0)}
    order = [line.split()[0] for line in results.table().splitlines()[2:]]
    assert order == [SINGLE, "slaw", "uniform", "uw"]


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ([1.0, 1.04, 0.96], "better"),
        ([3.0, 3.04, 2.96], "worse"),
        ([1.0, 2.0, 3.0], "not told apart: the interval holds 0"),
        ([1.0], "one seed tells nothing of the spread"),
    ],
)
def test_verdicts(errors, verdict):
    seeds = range(len(errors))
    runs = singles(len(errors)) + [trained("uniform", s, [0.5, 2.0]) for s in seeds]
    runs += [trained("slaw", s, [0.5, error]) for s, error in zip(seeds, errors, strict=True)]
    (line,) = Results(runs, METRICS).verdicts()
    assert line.startswith("slaw minus unitary, Δm: ")
    assert line.endswith(verdict)


def test_many_metrics_are_averaged_by_kind():
    metrics = [Metric(f"t{i}", "AUC") for i in range(8)]
    tasks = tuple(m.task for m in metrics)
    results = Results([trained("uniform", 0, [i / 10 for i in range(8)], tasks=tasks, metrics=metrics)], metrics)
    ((label, interval),) = results.intervals()["uniform"].items()
    assert label == "AUC, mean of 8"
    assert interval.mean == pytest.approx(0.35)


def test_without_references_there_is_no_drop():
    results = Results([trained("uniform", 0, [0.5, 2.0]), *singles(1)[:1]], METRICS)
    assert DROP not in results.intervals()["uniform"]
    assert SINGLE not in results.intervals()
    assert results.table().splitlines()[-1].split()[-4] == "–"


def test_the_extras_are_named():
    code = "import sys; sys.modules['lightning'] = None; import gradstats.compare"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert 'install them with: pip install "gradstats[train,plot]"' in done.stderr

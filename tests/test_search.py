"""Searches of weights on a real Ray with two CPUs."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradstats.scalarizer import Scalarizer

TASKS = ("good", "useless")
HOW = {"metric": "val/loss/good", "mode": "min", "progress": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 1)

    def forward(self, x):
        return self.trunk(x).squeeze(1)


def make_trainer(weights, *, at_epoch=None, **options):
    """The useless task pulls away from the good one, so the less it weighs the better."""
    from gradstats.train import Trainer

    torch.manual_seed(0)
    x = torch.randn(64, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1)), 16)

    def compute_losses(model, batch):
        x, y = batch
        if at_epoch is not None and model.training and trainer.progress.epoch_step == 0:
            at_epoch(trainer.progress.epoch, weights)
        out = model(x)
        return {"good": (out - y).square().mean(), "useless": (out + y).square().mean()}

    model = Net()
    trainer = Trainer(
        model,
        compute_losses,
        torch.optim.SGD(model.parameters(), 0.1),
        Scalarizer("fixed", tasks=TASKS, weights=weights),
        max_epochs=3,
        log_every=1,
        accelerator="cpu",
        **options,
    )
    return trainer, loader, loader


def search_and_kill(name: str, folder: Path, kills: dict[int, int | None]):
    """Search in ``folder``; once so many epochs have begun there, each process of ``kills``, None for a trial, dies."""
    import gradstats.search

    options = {"population_based_training": {"population": 2}, "random_search": {"samples": 3, "resources": {"cpu": 2}}}

    def at_epoch(epoch, weights):
        with (folder / "begun").open("a", encoding="utf-8") as begun:
            begun.write(f"{epoch} {weights['good']}\n")
        for count, process in kills.items():
            marker = folder / f"killed after {count}"
            if len((folder / "begun").read_text(encoding="utf-8").splitlines()) >= count and not marker.exists():
                marker.touch(exist_ok=False)
                if process is not None:
                    wait_for_two_snapshots(folder / "search/trials")
                os.kill(process or os.getpid(), signal.SIGKILL)
                time.sleep(60)  # until Ray kills this one, too

    def make(weights, **options):
        return make_trainer(weights, at_epoch=at_epoch, **options)

    return getattr(gradstats.search, name)(make, TASKS, directory=folder / "search", **options[name], **HOW)


@pytest.fixture(scope="module")
def search():
    ray = pytest.importorskip("ray")
    pytest.importorskip("lightning")
    import gradstats.search

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # which Ray's processes cannot import
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["TUNE_GLOBAL_CHECKPOINT_S"] == "1"  # a killed search loses no more, beside epochs in progress
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield gradstats.search
    ray.shutdown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files that Ray leaves to the garbage collector to close
        gc.collect()


def test_weights_are_drawn_and_rescaled():
    searches = pytest.importorskip("gradstats.search.searches", exc_type=ImportError)
    first, second = searches._drawn(TASKS, 2, seed=0)
    assert first != second
    assert sum(first.values()) == pytest.approx(2)
    assert searches._rescaled({"weights": {"good": 3.0, "useless": 0.5}})["weights"] == pytest.approx(
        {"good": 12 / 7, "useless": 2 / 7}
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("population_based_training", {"population": 1}, "population: expected an integer of at least 2, got 1"),
        ("population_based_training", {"interval": 0}, "interval: expected a positive integer, got 0"),
        ("population_based_training", {"tasks": ["a"]}, r"tasks: expected at least two different names, got \['a'\]"),
        ("random_search", {"samples": 0}, "samples: expected a positive integer, got 0"),
        ("random_search", {"mode": "best"}, "mode: expected 'min' or 'max', got 'best'"),
        ("grid_search", {"divisions": 1}, "divisions: expected an integer of at least 2, the number of tasks, got 1"),
    ],
)
def test_bad_arguments(name, arguments, message, tmp_path):
    gradstats_search = pytest.importorskip("gradstats.search", exc_type=ImportError)
    common = {"make_trainer": None, "tasks": TASKS, "directory": tmp_path, "metric": "val/loss/good", "mode": "min"}
    with pytest.raises(ValueError, match=message):
        getattr(gradstats_search, name)(**common | arguments)


def test_the_extra_is_named():
    code = "import sys; sys.modules['ray'] = None; import gradstats.search"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert 'gradstats.search needs Ray Tune; install it with: pip install "gradstats[search]"' in done.stderr


def test_the_grid_is_that_of_the_simplex(monkeypatch, tmp_path):
    searches = pytest.importorskip("gradstats.search.searches", exc_type=ImportError)
    monkeypatch.setattr(searches._Search, "run", lambda search, candidates: candidates)
    grid = searches.grid_search(None, (*TASKS, "other"), divisions=4, directory=tmp_path, **HOW)
    assert [[weight * 4 / 3 for weight in weights.values()] for weights in grid] == [
        pytest.approx(parts) for parts in ([1, 1, 2], [1, 2, 1], [2, 1, 1])
    ]


def wait_for_two_snapshots(folder: Path) -> None:
    """Until Ray has noted where every trial stands now; the first snapshot may be of a moment before."""
    seen: set[int] = set()
    while len(seen) < 1 + 2:
        seen |= {file.stat().st_mtime_ns for file in folder.glob("experiment_state-*.json")}
        time.sleep(0.1)


def search_twice(name: str, folder: Path, kills: dict[int, str]):
    """A search whose driver, a process of its own, is killed in the middle, and what the same call then finds."""
    ray = pytest.importorskip("ray")
    command = [sys.executable, __file__, name, str(folder), json.dumps(kills)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    return search_and_kill(name, folder, {})


@pytest.mark.slow
@pytest.mark.timeout(900)  # each of Ray's processes imports Lightning, which takes long on a busy machine
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_population_whose_trial_and_whose_driver_are_killed_in_the_middle(search, tmp_path):
    found = search_twice("population_based_training", tmp_path, {3: "trial", 6: "driver"})
    assert [epochs for _, epochs, _ in found.trials] == [3] * 2, "both went on to their end"
    assert found.value == min(value for value, _, _ in found.trials) == found.trials[0][0]
    assert found.weights["good"] > found.weights["useless"]
    assert [sum(weights.values()) for _, _, weights in found.trials] == [pytest.approx(2)] * 2
    assert [epoch for epoch, _ in found.schedule] == [1, 2, 3]
    assert found.schedule[-1][1] == pytest.approx(found.weights)
    assert found.history.series("weight/good")[1] == [pytest.approx(found.weights["good"])] * 12, "fixed in retraining"
    assert len(str(found).splitlines()) == 2 + 2
    begun = (tmp_path / "begun").read_text(encoding="utf-8").splitlines()
    assert len(begun) <= 6 + 1 + 2 + 3, "the kills lose the epochs in progress alone; the last 3 are the retraining"

    # A finished search is not repeated; another one does not go on in its folder.
    again = search_and_kill("population_based_training", tmp_path, {})
    assert (tmp_path / "begun").read_text(encoding="utf-8").splitlines() == begun
    assert again.weights == pytest.approx(found.weights)  # Ray's own files round
    assert (again.value, len(again.schedule), len(again.trials)) == (found.value, 3, 2)
    arguments = {"directory": tmp_path / "search", **HOW}
    with pytest.raises(ValueError, match="holds a search that differs in first weights"):
        search.population_based_training(make_trainer, TASKS, population=3, **arguments)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("search")
def test_random_weights_with_the_driver_killed_in_the_middle(tmp_path):
    # With both processors for each trial, one process trains all of them in turn.
    found = search_twice("random_search", tmp_path, {5: "driver"})
    values, epochs, weights = zip(*found.trials, strict=True)
    assert epochs == (3, 3, 3)
    assert list(values) == sorted(values)
    shares = [weight["good"] for weight in weights]
    assert shares == sorted(shares, reverse=True), "the less the useless task weighs the better"
    assert len(set(shares)) == 3
    assert [sum(weight.values()) for weight in weights] == [pytest.approx(2)] * 3
    assert (found.weights, found.value) == (weights[0], values[0])
    assert found.history.series("weight/good")[1] == [pytest.approx(shares[0])] * 12
    begun = [line.split() for line in (tmp_path / "begun").read_text(encoding="utf-8").splitlines()]
    assert [int(epoch) for epoch, _ in begun] == [0, 1, 2, 0, 1, 1, 2, 0, 1, 2], "the epoch in progress alone is lost"


if __name__ == "__main__":  # the driver to be killed
    name, folder, kills = sys.argv[1:]
    processes = {"trial": None, "driver": os.getpid()}
    search_and_kill(name, Path(folder), {int(count): processes[victim] for count, victim in json.loads(kills).items()})

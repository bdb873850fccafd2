"""The trainer. This file is also the script of the jobs that tests kill or run in several processes."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from gradstats.scalarizer import Scalarizer
from gradstats.train import Trainer
from gradstats.train.checkpoint import RandomState

pytestmark = pytest.mark.usefixtures("one_thread")
TASKS = ("sum", "difference", "sign")


class Net(nn.Module):
    """An encoder and a head for each task; everything that has a state or draws random numbers is in it."""

    def __init__(self, tasks=TASKS, hidden=16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({task: nn.Linear(hidden, 1) for task in tasks})

    def forward(self, x):
        features = self.encoder(x)
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


def compute_losses(model, batch):
    x, y = batch
    return {task: (out - y[:, TASKS.index(task)]).square().mean() for task, out in model(x).items()}


def compute_metrics(model, batch):
    """One value per sample, and a mean over the batch."""
    x, y = batch
    out = model(x)
    return {"error": (out["sum"] - y[:, 0]).abs(), "difference_mse": (out["difference"] - y[:, 1]).square().mean()}


def data(n, seed=0):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    # Three tasks of very different scale.
    return TensorDataset(x, torch.stack([x.sum(1), 30 * (x[:, 0] - x[:, 1]), 0.1 * x[:, 2].sign()], 1))


def make_trainer(directory=None, weighting="uniform", *, tasks=TASKS, lr=1e-2, hidden=16, options=None, **kwargs):
    torch.manual_seed(1)
    model = Net(tasks, hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    kwargs = {
        "compute_losses": compute_losses,
        "accelerator": "cpu",
        "progress": False,
        "directory": directory,
    } | kwargs
    if "max_steps" not in kwargs:
        kwargs.setdefault("max_epochs", 2)
    scalarizer = Scalarizer(weighting, tasks=tasks, **(options or {}))
    return Trainer(model, optimizer=optimizer, scalarizer=scalarizer, **kwargs)


def loaders(n=50, batch_size=8, **kwargs):
    return DataLoader(data(n), batch_size, shuffle=True, **kwargs), DataLoader(data(21, seed=1), batch_size)


def assert_same(a, b, where=""):
    """Bit for bit, through nested containers."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a.view(torch.uint8) if a.ndim else a, b.view(torch.uint8) if b.ndim else b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


# ---- the loop ---------------------------------------------------------------------------------------------------


def test_training_learns_and_leaves_a_history():
    trainer = make_trainer(max_epochs=20, log_every=10, options={"record_every": 25})
    history = trainer.fit(*loaders(200))
    steps, losses = history.series("val/loss/difference")
    assert steps == list(range(25, 501, 25))
    assert losses[-1] < 0.1 * losses[0]
    assert history.series("loss/sum")[0] == sorted({*range(10, 501, 10), *range(1, 501, 25)})
    assert history.series("weight/sign")[1] == [1.0] * len(history.steps)
    assert history.series("gradient/norm/difference")[0] == list(range(1, 501, 25))
    assert set(history.epochs[0]) == {"step", "epoch", "lr"} | {
        f"{p}/loss/{t}" for p in ("train", "val") for t in TASKS
    }
    with pytest.raises(KeyError, match="no column 'weight/depth'"):
        history.series("weight/depth")


def test_one_epoch_is_the_loop_that_a_user_would_write():
    trainer = make_trainer(max_epochs=1, clip_norm=5.0, options={"record_every": 2})
    history = trainer.fit(DataLoader(data(50), 8))
    torch.manual_seed(1)
    model, total = Net(), dict.fromkeys(TASKS, 0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in DataLoader(data(50), 8):
        losses = compute_losses(model, batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        total = {task: total[task] + losses[task].item() / 7 for task in TASKS}
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], parameter)
    assert {task: history.epochs[0][f"train/loss/{task}"] for task in TASKS} == pytest.approx(total)


def test_validation_means_are_exact_with_an_uneven_last_batch():
    trainer = make_trainer(max_epochs=1, compute_metrics=compute_metrics)
    train, val = loaders()
    assert len(val.dataset) % val.batch_size != 0
    row = trainer.fit(train, val).epochs[0]
    with torch.no_grad():
        x, y = val.dataset.tensors
        out = trainer.model.eval()(x)
    expected = {f"val/loss/{task}": (out[task] - y[:, i]).square().mean() for i, task in enumerate(TASKS)}
    expected |= {
        "val/error": (out["sum"] - y[:, 0]).abs().mean(),
        "val/difference_mse": expected["val/loss/difference"],
    }
    assert {name: row[name] for name in expected} == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-6)


def test_validation_neither_counts_nor_draws_gradients():
    seen = []

    def losses(model, batch):
        seen.append((model.training, torch.is_grad_enabled()))
        return compute_losses(model, batch)

    trainer = make_trainer(compute_losses=losses, max_epochs=2)
    trainer.fit(*loaders(16))
    assert seen == [(True, True)] * 2 + [(False, False)] * 3 + [(True, True)] * 2 + [(False, False)] * 3


def test_accumulated_batches_equal_one_large_batch():
    def states(batch_size, accumulate):
        trainer = make_trainer(max_epochs=1, options={"accumulate": accumulate})
        trainer.model.encoder = nn.Linear(4, 16)  # without what depends on the batch
        torch.manual_seed(2)
        nn.init.normal_(trainer.model.encoder.weight)
        nn.init.zeros_(trainer.model.encoder.bias)
        trainer.fit(DataLoader(data(27), batch_size))
        return trainer.progress.step, trainer.model.state_dict()

    (few, small), (large_steps, large) = states(4, 2), states(8, 1)
    assert (few, large_steps) == (3, 4)  # the seventh small batch is left over; the fourth large one is of three
    assert small.keys() == large.keys()
    (_, small), (_, large) = states(9, 3), states(27, 1)
    for name in small:
        torch.testing.assert_close(small[name], large[name], rtol=1e-4, atol=1e-6)


def test_famo_sees_each_step_once_more():
    trainer = make_trainer(weighting="famo", max_epochs=1, options={"accumulate": 2})
    trainer.fit(DataLoader(data(48), 8))
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scalarizer = Scalarizer("famo", tasks=TASKS, accumulate=2)
    batches = list(DataLoader(data(48), 8))
    for pair in zip(batches[::2], batches[1::2], strict=True):
        for batch in pair:
            (scalarizer(compute_losses(model, batch)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            first, second = (compute_losses(model, batch) for batch in pair)
        scalarizer.after_step({task: (first[task] + second[task]) / 2 for task in TASKS})
    torch.testing.assert_close(trainer.scalarizer.weighting.learned, scalarizer.weighting.learned)
    assert scalarizer.weighting.learned.abs().min() > 0.01
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], parameter)


def test_tasks_may_be_missing():
    def losses(model, batch):
        out = compute_losses(model, batch)
        if trainer.progress.step % 2:
            del out["difference"]
            out["sign"] = None
        return out

    trainer = make_trainer(compute_losses=losses, max_epochs=1, log_every=1, options={"record_every": 1})
    history = trainer.fit(*loaders(16))
    assert history.series("loss/sum")[0] == [1, 2]
    assert history.series("loss/sign")[0] == history.series("loss/difference")[0] == [1]
    assert history.epochs[0]["train/loss/sign"] == history.steps[0]["loss/sign"]


def test_max_steps_cuts_the_last_epoch_short():
    trainer = make_trainer(max_steps=9, log_every=1)
    history = trainer.fit(*loaders(50))
    assert [row["step"] for row in history.epochs] == [7, 9]
    assert trainer.progress.step == len(history.steps) == 9


@pytest.mark.parametrize(("interval", "expected"), [("epoch", [1.0, 0.5, 0.25]), ("step", [0.5, 0.125, 0.03125])])
def test_scheduler_interval(interval, expected):
    parameter = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(parameter.parameters(), lr=1.0)
    trainer = Trainer(
        parameter,
        lambda model, batch: {"a": model(batch[0]).square().mean()},
        optimizer,
        Scalarizer("uniform", tasks=["a"]),
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5),
        scheduler_interval=interval,
        max_epochs=3,
        accelerator="cpu",
        progress=False,
    )
    lrs = trainer.fit(DataLoader(data(16), 8)).series("lr")[1]
    if interval == "step":  # the row holds the rate after the epoch's two steps
        expected = [0.25, 0.0625, 0.015625]
    assert lrs == expected


def test_early_stopping_and_best_checkpoint(tmp_path):
    values = [5.0, 3.0, math.nan, 4.0, 3.5, 1.0]

    def metrics(_, batch):
        return {"scripted": torch.full((len(batch[0]),), values[trainer.progress.epoch])}

    trainer = make_trainer(
        tmp_path, compute_metrics=metrics, max_epochs=6, monitor="val/scripted", patience=3, options={"record_every": 5}
    )
    history = trainer.fit(*loaders(16))
    assert len(history.epochs) == 5
    best, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert (best["progress"]["epoch"], best["progress"]["best"]) == (2, 3.0)
    assert (last["progress"]["epoch"], last["progress"]["waited"]) == (5, 3)
    assert_same(dict(last["model"]), dict(trainer.model.state_dict()))
    Net().load_state_dict(best["model"])
    resumed = make_trainer(
        tmp_path, compute_metrics=metrics, max_epochs=6, monitor="val/scripted", patience=3, options={"record_every": 5}
    )
    assert len(resumed.fit(*loaders(16), resume=True).epochs) == 5, "a run that stopped stays stopped"


def test_the_best_model_can_be_restored(tmp_path):
    values = [5.0, 3.0, 4.0]

    def metrics(_, batch):
        return {"scripted": torch.full((len(batch[0]),), values[trainer.progress.epoch])}

    options = {"compute_metrics": metrics, "max_epochs": 3, "monitor": "val/scripted", "restore_best": True}
    trainer = make_trainer(tmp_path, **options)
    assert len(trainer.fit(*loaders(16)).epochs) == 3
    best, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["model"] for name in ("best", "last"))
    assert_same(dict(trainer.model.state_dict()), dict(best))
    assert not torch.equal(best["heads.sum.bias"], last["heads.sum.bias"])
    resumed = make_trainer(tmp_path, **options)
    resumed.fit(*loaders(16), resume=True)
    assert_same(dict(resumed.model.state_dict()), dict(best))
    # Without a best epoch the model stays as it is; what another run has left in the folder is not taken for it.
    values[:] = [math.nan] * 3
    trainer = make_trainer(tmp_path, **options)
    trainer.fit(*loaders(16))
    assert_same(dict(trainer.model.state_dict()), dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["model"]))


def test_mode_max_monitors_the_largest(tmp_path):
    values = [1.0, 3.0, 2.0]

    def metrics(*_):
        return {"accuracy": torch.tensor(values[trainer.progress.epoch])}

    trainer = make_trainer(tmp_path, compute_metrics=metrics, max_epochs=3, monitor="val/accuracy", mode="max")
    trainer.fit(*loaders(16))
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["progress"]["epoch"] == 2


def test_evaluate_judges_the_plain_model_and_may_be_monitored(tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    seen = []

    def evaluate(model):
        seen.append((type(model), model.training, torch.is_grad_enabled(), model.heads["sum"].bias.item()))
        return {"area": next(scores)}

    trainer = make_trainer(tmp_path, evaluate=evaluate, monitor="val/area", mode="max", max_epochs=3)
    history = trainer.fit(loaders()[0])
    assert history.series("val/area") == ([7, 14, 21], [1.0, 3.0, 2.0])
    assert [row[:3] for row in seen] == [(Net, False, False)] * 3
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["model"]
    assert best["heads.sum.bias"].item() == seen[1][3]


def test_seed_makes_runs_repeatable():
    def final(seed):
        trainer = make_trainer(seed=seed)
        torch.rand(7)
        random.random()
        trainer.fit(*loaders())
        return dict(trainer.model.state_dict())

    first, second = final(3), final(3)
    assert_same(first, second)
    assert not torch.equal(first["heads.sum.weight"], final(4)["heads.sum.weight"])


def test_loggers_get_weights_and_gradient_metrics(tmp_path):
    make_trainer(tmp_path, options={"record_every": 5}).fit(*loaders())
    (file,) = tmp_path.glob("logs/version_0/metrics.csv")
    header, *rows = file.read_text().splitlines()
    assert {"weight/sum", "loss/sum", "gradient/norm/sum", "gradient/mean_cosine", "val/loss/sum"} <= set(
        header.split(",")
    )
    assert len(rows) == 3 + 2  # steps 1, 6 and 11; two epochs


def test_progress_bar_can_be_turned_on(capsys):
    make_trainer(progress=True, max_epochs=1).fit(*loaders())
    assert "7/7" in capsys.readouterr().err


def test_bfloat16_autocast_keeps_targets_and_collects():
    dtypes = set()

    def losses(model, batch):
        out = model(batch[0])
        dtypes.update({batch[1].dtype, out["sum"].dtype})
        return compute_losses(lambda _: out, batch)

    trainer = make_trainer(compute_losses=losses, precision="bf16-mixed", max_epochs=8, options={"record_every": 10})
    history = trainer.fit(*loaders(100))
    assert dtypes == {torch.float32, torch.bfloat16}  # autocast is on, and the targets were not rounded
    assert "gradient/mean_cosine" in history.steps[0]
    _, values = history.series("train/loss/difference")
    assert values[-1] < 0.5 * values[0]


# ---- errors -----------------------------------------------------------------------------------------------------


def test_non_finite_loss_names_the_task_and_spares_the_parameters(tmp_path):
    def losses(model, batch):
        out = compute_losses(model, batch)
        return {**out, "difference": out["difference"] * math.nan} if trainer.progress.step == 10 else out

    trainer = make_trainer(tmp_path, compute_losses=losses)
    with pytest.raises(FloatingPointError, match="'difference' is nan at step 11"):
        trainer.fit(*loaders())
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["progress"]["step"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": None}, "max_epochs, max_steps: expected at least one"),
        ({"max_epochs": 0}, "max_epochs: expected a positive integer, got 0"),
        ({"log_every": 1.5}, "log_every: expected a positive integer"),
        ({"checkpoint_every": 3}, "directory: expected a folder"),
        ({"patience": 3}, "monitor: expected the name of a metric"),
        ({"restore_best": True}, "monitor: expected the name of a metric"),
        ({"restore_best": True, "monitor": "val/loss/sum"}, "directory: expected a folder"),
        ({"mode": "best"}, "mode: expected one of"),
        ({"scheduler_interval": "batch"}, "scheduler_interval: expected one of"),
        ({"clip_norm": 0.0}, "clip_norm: expected a positive number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_bad_arguments_of_fit():
    train, val = loaders()
    with pytest.raises(ValueError, match="directory: expected the folder to resume from"):
        make_trainer().fit(train, resume=True)
    with pytest.raises(ValueError, match="val_loader: expected a loader"):
        make_trainer(monitor="val/error").fit(train)
    with pytest.raises(ValueError, match=r"monitor: expected one of .*'val/loss/sum'.*, got 'val/error'"):
        make_trainer(monitor="val/error").fit(train, val)
    with pytest.raises(ValueError, match="train_loader: expected at least 1 batches"):
        make_trainer().fit(DataLoader(data(3), 4, drop_last=True))
    for losses, message in [
        (lambda out: out["sum"].mean(), "expected a mapping from task to scalar loss, got Tensor"),
        (lambda out: {"sum": out["sum"]}, r"expected a scalar tensor for task 'sum', got shape \(8,\)"),
        (lambda _: {"sum": 1.0}, "expected a scalar tensor for task 'sum', got float"),
    ]:
        with pytest.raises(TypeError, match=message):
            make_trainer(compute_losses=lambda model, batch, f=losses: f(model(batch[0]))).fit(train)


def test_missing_extra_is_named():
    code = "import sys; sys.modules['lightning'] = None; import gradstats.train"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: gradstats.train needs Lightning Fabric and tqdm" in done.stderr
    assert 'pip install "gradstats[train]"' in done.stderr


def test_importing_gradstats_does_not_import_the_trainer():
    code = "import sys, gradstats; assert not {'lightning', 'gradstats.train'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- checkpoints ------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, checkpoint_every=3)
    saved, real_save = [], torch.save

    def save(state, file, *args, **kwargs):
        if len(saved) == 2:
            file.write(b"half a file")
            raise OSError("disk full")
        saved.append(state["progress"]["step"])
        real_save(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        trainer.fit(*loaders())
    assert saved == [3, 6]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["progress"]["step"] == 6
    assert [p.name for p in tmp_path.glob("*.ckpt*")] + [p.name for p in tmp_path.glob(".*")] == ["last.ckpt"]


def test_keyboard_interrupt_leaves_the_last_checkpoint(tmp_path):
    def losses(model, batch):
        if trainer.progress.step == 8:
            raise KeyboardInterrupt
        return compute_losses(model, batch)

    trainer = make_trainer(tmp_path, compute_losses=losses)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(*loaders())
    assert make_trainer(tmp_path).fit(*loaders(), resume=True).series("lr")[0] == [7, 14]


def test_random_state_covers_every_source():
    def draw():
        first = [next(iter(loader))[0][:1].sum().item() for loader in (direct, nested)]
        return [*first, random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    direct = DataLoader(data(50), 8, shuffle=True, generator=generators[0])
    sampler = BatchSampler(RandomSampler(data(50), generator=generators[1]), 8, drop_last=False)
    nested = DataLoader(data(50), batch_sampler=sampler)
    state = RandomState(torch.device("cpu"), (direct, nested, None))
    before = state.get()
    values = [draw() for _ in range(3)]
    assert len({tuple(v) for v in values}) == 3
    state.set(before)
    assert [draw() for _ in range(3)] == values


def test_resume_without_a_checkpoint_starts_afresh(tmp_path):
    assert len(make_trainer(tmp_path / "new").fit(*loaders(), resume=True).epochs) == 2
    with pytest.raises(FileNotFoundError):
        make_trainer(tmp_path).fit(*loaders(), resume=tmp_path / "other.ckpt")


def test_resume_refuses_a_different_setup(tmp_path):
    make_trainer(tmp_path).fit(*loaders())
    before = (tmp_path / "last.ckpt").read_bytes()
    for options, message in [
        ({"tasks": TASKS[:2]}, r"tasks \['sum', 'difference', 'sign'\] there, \['sum', 'difference'\] here"),
        ({"hidden": 8}, r"parameters .*'encoder.0.weight': \[16, 4\].* there, .*'encoder.0.weight': \[8, 4\].* here"),
        ({"weighting": "slaw"}, "weighting Uniform there, SLAW here"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, **options).fit(*loaders(), resume=True)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint of"):
        make_trainer(tmp_path).fit(*loaders(), resume=tmp_path / "other.ckpt")


# ---- jobs: killed and resumed, several processes -------------------------------------------------------------------

EPOCHS, STEPS_PER_EPOCH, KILL_AT = 4, 10, 26  # killed in the third epoch, in AutoScale's second window


def resumable(directory, checkpoint_every, *, losses=compute_losses, own_generator=False):
    """A run with everything in it that has a state: a trainer and its loaders."""
    options = {"total_steps": EPOCHS * STEPS_PER_EPOCH, "explore": 0.9, "windows": 3, "samples_per_window": 4}
    trainer = make_trainer(
        directory,
        "autoscale",
        options=options,
        compute_losses=losses,
        compute_metrics=compute_metrics,
        max_epochs=EPOCHS,
        clip_norm=5.0,
        monitor="val/error",
        checkpoint_every=checkpoint_every,
        log_every=1,
        seed=5,
    )
    optimizer = trainer._optimizer.optimizer
    trainer.scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, EPOCHS * STEPS_PER_EPOCH)
    trainer._scheduler_interval = "step"
    generator = torch.Generator().manual_seed(9) if own_generator else None
    return trainer, loaders(STEPS_PER_EPOCH * 8, generator=generator)


def outcome(trainer):
    return {
        "model": dict(trainer.model.state_dict()),
        "optimizer": trainer._optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scalarizer": dict(trainer.scalarizer.state_dict()),
        "history": trainer.history.state_dict(),
        "progress": vars(trainer.progress),
        "random": torch.get_rng_state(),
    }


def job_that_hangs(directory, checkpoint_every, own_generator):
    """Trains until a step in the third epoch, says so in a file, and waits to be killed."""

    def losses(model, batch):
        if trainer.progress.step == KILL_AT:
            (Path(directory) / "hanging").touch()
            time.sleep(600)
        return compute_losses(model, batch)

    trainer, both = resumable(directory, checkpoint_every, losses=losses, own_generator=own_generator)
    trainer.fit(*both)


@pytest.mark.parametrize(("checkpoint_every", "own_generator"), [(None, False), (5, False), (12, True)])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, checkpoint_every, own_generator):
    killed = subprocess.Popen(
        [sys.executable, __file__, "hang", tmp_path, str(checkpoint_every or 0), str(int(own_generator))]
    )
    try:
        while not (tmp_path / "hanging").exists():
            assert killed.poll() is None, "the job ended by itself"
            time.sleep(0.05)
    finally:
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    expected = {None: (2, 20, 0), 5: (2, 25, 5), 12: (2, 24, 4)}[checkpoint_every]
    assert tuple(checkpoint["progress"][name] for name in ("epoch", "step", "epoch_step")) == expected

    uninterrupted, both = resumable(None, None, own_generator=own_generator)
    uninterrupted.fit(*both)
    resumed, both = resumable(tmp_path, checkpoint_every, own_generator=own_generator)
    resumed.fit(*both, resume=True)
    assert_same(outcome(resumed), outcome(uninterrupted))
    weights = [row["weight/difference"] for row in resumed.history.steps]
    assert len(set(weights)) > 2, "the weights moved before and after the kill"


def job_on_two_processes(directory):
    """Trains on two processes, in one go and in two; each rank writes what it ended with."""

    def run(name, **kwargs):
        trainer = make_trainer(
            Path(directory) / name,
            devices=2,
            strategy="ddp",
            compute_metrics=compute_metrics,
            seed=5,
            log_every=1,
            options={"record_every": 3},
            **kwargs,
        )
        trainer.fit(*loaders(64), resume=True)
        return trainer

    straight = run("straight", max_epochs=2)
    run("stopped", max_epochs=1)
    resumed = run("stopped", max_epochs=2)
    result = {"straight": outcome_of_rank(straight), "resumed": outcome_of_rank(resumed)}
    torch.save(result, Path(directory) / f"rank{straight.fabric.global_rank}.pt")


def outcome_of_rank(trainer):
    return {
        "model": dict(trainer.model.state_dict()),
        "epochs": trainer.history.epochs,
        "weights": trainer.scalarizer.weights,
        "gram": trainer.scalarizer.stats.gram,
    }


def test_two_processes_agree_and_resume(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    subprocess.run([sys.executable, __file__, "ddp", tmp_path], check=True, env=environment, timeout=200)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for kind in ("straight", "resumed"):
        # Running statistics of BatchNorm are each rank's own.
        own = [name for name in first[kind]["model"] if "running" in name]
        assert own
        for name in own:
            del first[kind]["model"][name], second[kind]["model"][name]
        assert_same(first[kind], second[kind])
    assert_same(first["straight"], first["resumed"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "hang":
        job_that_hangs(sys.argv[2], int(sys.argv[3]) or None, bool(int(sys.argv[4])))
    else:
        job_on_two_processes(sys.argv[2])

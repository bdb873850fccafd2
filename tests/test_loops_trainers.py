"""``loss = scalarizer(losses)`` under Lightning's automatic optimization and in a Hugging Face ``Trainer``."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import gradstats
import gradstats.scalarizer

lightning = pytest.importorskip("lightning")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Theirs are not ours to mend.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]

EXAMPLES = Path(__file__).parents[1] / "examples"
TASKS = ("metres", "millimetres")


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


def data() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :1] * x[:, 1:2], 1000 * x[:, 2:3].abs()


def assert_same_parameters(a: torch.nn.Module, b: torch.nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- Lightning ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning_example() -> dict:
    return runpy.run_path(str(EXAMPLES / "lightning_module.py"))


def lightning_module(example: dict, total_steps: int, accumulate: int):
    class Validated(example["TwoRegressions"]):
        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.training_step(batch, index)

    torch.manual_seed(0)
    return Validated(total_steps, accumulate)


def lightning_fit(module, epochs: int, accumulate: int, checkpoint: Path | None = None):
    loader = DataLoader(TensorDataset(*data()), batch_size=16)  # 4 batches an epoch
    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=accumulate, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader, loader, ckpt_path=checkpoint, weights_only=True)
    return trainer


def test_lightning_example(lightning_example: dict) -> None:
    weights = lightning_example["main"]()
    assert weights["metres"] > 100 * weights["millimetres"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_is_the_hand_written_loop(lightning_example: dict, accumulate: int, collections: list[int]) -> None:
    epochs, steps = 10, 40 // accumulate
    module = lightning_module(lightning_example, steps, accumulate)
    lightning_fit(module, epochs, accumulate)
    assert module.scalarizer.weighting.step == module.scalarizer.weighting.explore_steps < steps
    by_lightning = len(collections)
    assert 0 < by_lightning <= accumulate * module.scalarizer.weighting.explore_steps

    other = lightning_module(lightning_example, steps, accumulate)
    optimizer = other.configure_optimizers()
    for _ in range(epochs):
        for index, rows in enumerate(torch.arange(64).split(16)):
            (other.training_step([t[rows] for t in data()], 0) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert len(collections) == 2 * by_lightning
    assert_same_parameters(module, other)
    assert torch.equal(module.scalarizer.weights, other.scalarizer.weights)


def test_lightning_checkpoint_in_phase_1_continues_exactly(lightning_example: dict, tmp_path: Path) -> None:
    whole = lightning_module(lightning_example, total_steps=100, accumulate=1)
    lightning_fit(whole, 8, 1)
    interrupted = lightning_module(lightning_example, total_steps=100, accumulate=1)
    trainer = lightning_fit(interrupted, 3, 1)  # step 12 of the 20 of phase 1, in the second window
    assert interrupted.scalarizer.weighting.exploring
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = lightning_module(lightning_example, total_steps=100, accumulate=1)
    lightning_fit(resumed, 8, 1, tmp_path / "last.ckpt")
    assert_same_parameters(whole, resumed)
    assert torch.equal(whole.scalarizer.weights, resumed.scalarizer.weights)
    assert len(whole.scalarizer.weighting.window_weights) == 2
    assert torch.equal(whole.scalarizer.weighting.window_weights, resumed.scalarizer.weighting.window_weights)


# ---- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_example() -> dict:
    return runpy.run_path(str(EXAMPLES / "hf_trainer.py"))


def hf_rows() -> list[dict[str, Tensor]]:
    return [dict(zip(("x", *TASKS), row, strict=True)) for row in zip(*data(), strict=True)]


def hf_arguments(folder: Path, **options):
    return transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=16, learning_rate=1e-2, use_cpu=True, report_to="none",
        disable_tqdm=True, **options,
    )  # fmt: skip


def test_hf_example(hf_example: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = hf_example["main"]()
    assert weights["metres"] > 100 * weights["millimetres"]
    assert not list(tmp_path.iterdir())


def test_hf_scalarizer_outside_the_model(hf_example: dict, tmp_path: Path, collections: list[int]) -> None:
    """Steps are those of the optimizer, evaluation does not count, and checkpoints hold the model alone."""
    steps, accumulate = 20, 2
    torch.manual_seed(0)
    options = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 10, "label_names": list(TASKS)}
    trainer = hf_example["MultiTaskTrainer"](
        hf_example["Model"](),
        hf_arguments(tmp_path, max_steps=steps, gradient_accumulation_steps=accumulate, **options),
        train_dataset=hf_rows(),
        eval_dataset=hf_rows(),
    )
    trainer.scalarizer = gradstats.Scalarizer(
        "autoscale", tasks=TASKS, total_steps=steps, explore=0.5, samples_per_window=5, accumulate=accumulate
    )
    trainer.train()
    assert trainer.state.global_step == steps
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4
    assert trainer.scalarizer._progress.step == steps
    assert len(collections) == 5 * accumulate
    assert trainer.scalarizer.weights[0] > 100 * trainer.scalarizer.weights[1]
    saved = safetensors.load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert saved.keys() == trainer.model.state_dict().keys()


def test_hf_scalarizer_inside_the_model_travels_in_checkpoints(hf_example: dict, tmp_path: Path) -> None:
    class Inside(hf_example["Model"]):
        def __init__(self) -> None:
            super().__init__()
            self.scalarizer = gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=40, explore=0.5)

        def forward(self, x: Tensor, metres: Tensor, millimetres: Tensor) -> dict[str, Tensor]:
            return {"loss": self.scalarizer(super().forward(x, metres, millimetres))}

    def trainer():
        torch.manual_seed(0)
        arguments = hf_arguments(tmp_path, max_steps=40, save_steps=13)
        return transformers.Trainer(Inside(), arguments, train_dataset=hf_rows())

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-13"))
    assert_same_parameters(whole.model, resumed.model)
    for one in (whole, resumed):
        assert one.model.scalarizer._progress.step == 40
        assert len(one.model.scalarizer.weighting.window_weights) == 2
    assert torch.equal(whole.model.scalarizer.weights, resumed.model.scalarizer.weights)
    assert whole.model.scalarizer.weights[0] > 100 * whole.model.scalarizer.weights[1]

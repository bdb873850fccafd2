"""AutoScale in a Hugging Face ``Trainer``: override ``compute_loss``, keep everything else.

The Scalarizer is made outside the model here, so Hugging Face's checkpoints do not hold its state; as a submodule of
the model it would travel in them.

python examples/hf_trainer.py
"""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import gradstats

TASKS = ("metres", "millimetres")


class Model(nn.Module):
    """An encoder that both tasks share, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(32, 1) for name in TASKS})

    def forward(self, x: Tensor, metres: Tensor, millimetres: Tensor) -> dict[str, Tensor]:
        """The loss of each task."""
        features = self.encoder(x)
        targets = dict(zip(TASKS, (metres, millimetres), strict=True))
        return {name: (head(features) - targets[name]).square().mean() for name, head in self.heads.items()}


class MultiTaskTrainer(Trainer):
    """A ``Trainer`` whose loss is the Scalarizer's."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        """The weighted sum of the losses."""
        losses = model(**inputs)
        loss = self.scalarizer(losses)  # in evaluation, without gradients, it neither records nor counts
        return (loss, losses) if return_outputs else loss


def main(steps: int = 100, accumulate: int = 2) -> dict[str, float]:
    """Train; returns the weights found."""
    torch.manual_seed(0)
    rows = [{"x": x, "metres": x[:1] * x[1:2], "millimetres": 1000 * x[2:3].abs()} for x in torch.randn(256, 4)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, gradient_accumulation_steps=accumulate, per_device_train_batch_size=32,
            learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no",
        )  # fmt: skip
        trainer = MultiTaskTrainer(Model(), arguments, train_dataset=rows)
        trainer.scalarizer = gradstats.Scalarizer("autoscale", tasks=TASKS, total_steps=steps, accumulate=accumulate)
        trainer.train()
    return dict(zip(TASKS, trainer.scalarizer.weights.tolist(), strict=True))


if __name__ == "__main__":
    print("weights:", main())

"""Overlaid digits: name the left one, name the right one, draw the image again. Losses of very different scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor, nn

from gradstats.compare.experiment import Experiment, Metric, moved
from gradstats.data import batches, overlaid_digits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.data import DataLoader

OUTPUTS = {"left": 10, "right": 10, "image": 11 * 11}


class Digits(nn.Module):
    """A small convolutional encoder, shared by one head for each task.

    Args:
        tasks: Any of ``OUTPUTS``.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 5 * 5, 64),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, OUTPUTS[task])) for task in tasks}
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Logits ``[N, 10]`` or pixels ``[N, 121]`` of each task, from images ``[N, 1, 11, 11]`` in 0 to 16."""
        features = self.encoder(image / 16.0)
        return {task: head(features) for task, head in self.heads.items()}


def compute_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, reconstruction: Literal["sum", "mean"] = "sum"
) -> dict[str, Tensor]:
    """Mean loss of each task over the batch: nats for the digits, squared intensities for the image.

    Args:
        model: A :class:`Digits`.
        batch: ``"image"``, ``"left"`` and ``"right"`` as :class:`gradstats.data.OverlaidDigits` has them.
        reconstruction: Whether the squared error of an image is summed over its pixels, as in autoencoders with a
            Gaussian likelihood, or averaged.
    """
    losses = {}
    for task, output in model(batch["image"]).items():
        if task == "image":
            squared = (output - batch["image"].flatten(1)).square()
            losses[task] = (squared.sum(1) if reconstruction == "sum" else squared.mean(1)).mean()
        else:
            losses[task] = F.cross_entropy(output, batch[task])
    return losses


def metric_values(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Metric of each task: accuracy in percent, root mean squared error of a pixel in intensities 0 to 16."""
    values = {}
    for task, output in model(batch["image"]).items():
        if task == "image":
            values[task] = F.mse_loss(output, batch["image"].flatten(1)).sqrt().item()
        else:
            values[task] = 100.0 * (output.argmax(1) == batch[task]).double().mean().item()
    return values


@dataclass
class DigitsExperiment(Experiment):
    """Overlaid digits (:func:`gradstats.data.overlaid_digits`), which scikit-learn ships; no folder is needed.

    Attributes:
        pairs_per_image: Pairs in which each digit is the left one.
        batch_size: Pairs in a batch.
        reconstruction: As for :func:`compute_losses`.
    """

    epochs: int = 12
    lr: float = 3e-3
    pairs_per_image: int = 8
    batch_size: int = 64
    reconstruction: Literal["sum", "mean"] = "sum"

    tasks = tuple(OUTPUTS)
    metrics = (
        Metric("left", "accuracy (%)"),
        Metric("right", "accuracy (%)"),
        Metric("image", "error (RMSE, 0–16)", higher_is_better=False),
    )

    def __post_init__(self) -> None:
        self._splits = overlaid_digits(pairs_per_image=self.pairs_per_image)

    def make_model(self, tasks: Sequence[str]) -> nn.Module:
        """A small convolutional network."""
        return Digits(tasks)

    def train_loader(self) -> DataLoader[Any]:
        """Shuffled pairs."""
        return batches(self._splits["train"], self.batch_size, shuffle=True)

    def compute_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropies and squared error."""
        return compute_losses(model, batch, reconstruction=self.reconstruction)

    def evaluate(self, model: nn.Module, split: Literal["valid", "test"]) -> dict[Metric, float]:
        """Accuracies and root mean squared error."""
        values = metric_values(model, moved(self._splits[split][:], model))
        return {metric: values[metric.task] for metric in self.metrics if metric.task in values}

"""Tox21: is a molecule active in each of twelve assays? Few positives, many labels missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor, nn

from gradstats.compare.experiment import Experiment, Metric, moved
from gradstats.data import batches, tox21

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.data import DataLoader


class Assays(nn.Module):
    """A shared multilayer perceptron over fingerprints, with one logit for each task.

    Args:
        tasks: Names of the tasks.
        width: Units of the first layer; the second has a quarter of them.
        dropout: Share of the units dropped in each layer.
    """

    def __init__(self, tasks: Sequence[str], width: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((2048, width), (width, width // 4)):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout)]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({task: nn.Linear(width // 4, 1) for task in tasks})

    def forward(self, fingerprint: Tensor) -> dict[str, Tensor]:
        """Logits ``[N]`` of each task, from bits ``[N, 2048]`` in any dtype."""
        features = self.trunk(fingerprint.float())
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


@dataclass
class Tox21Experiment(Experiment):
    """Tox21 (:func:`gradstats.data.tox21`), scored by the area under the ROC curve of each assay.

    Learning rate, dropout and ℓ2 strength are those of a few that gave unitary scalarization the best validation score.

    Attributes:
        split: ``"random"`` or ``"scaffold"``.
        batch_size: Molecules in a batch.
        width: Units of the first layer; the second has a quarter of them.
        dropout: Share of the units dropped in each layer.
    """

    epochs: int = 8
    lr: float = 3e-3
    split: Literal["random", "scaffold"] = "random"
    batch_size: int = 128
    width: int = 512
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.data is None:
            raise ValueError("data: expected the folder that holds tox21.npz, got None")
        self._splits = tox21(self.data, split=self.split)
        self.tasks = [name for name in self._splits["train"].tensors if name != "fingerprint"]
        self.metrics = [Metric(task, "ROC-AUC") for task in self.tasks]

    def make_model(self, tasks: Sequence[str]) -> nn.Module:
        """A multilayer perceptron of three layers."""
        return Assays(tasks, self.width, self.dropout)

    def train_loader(self) -> DataLoader[Any]:
        """Shuffled molecules."""
        return batches(self._splits["train"], self.batch_size, shuffle=True)

    def compute_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Binary cross-entropy of each assay over the molecules that it was measured on; without any, none."""
        losses = {}
        for task, logits in model(batch["fingerprint"]).items():
            known = ~batch[task].isnan()
            if known.any():
                losses[task] = F.binary_cross_entropy_with_logits(logits[known], batch[task][known])
        return losses

    def evaluate(self, model: nn.Module, split: Literal["valid", "test"]) -> dict[Metric, float]:
        """Area under the ROC curve of each assay."""
        data = self._splits[split]
        outputs = [model(moved(batch, model)["fingerprint"]) for batch in batches(data, self.batch_size)]
        scores = {task: torch.cat([output[task] for output in outputs]).cpu() for task in outputs[0]}
        return {m: roc_auc(scores[m.task], data.tensors[m.task]) for m in self.metrics if m.task in scores}


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Share of the pairs of a positive and a negative that ``scores`` put in order; equal scores count half.

    Args:
        scores: Any numbers ``[N]``.
        labels: 1, 0 or, to be left out, NaN, ``[N]``.

    Returns:
        A number in [0, 1]; NaN without a positive or without a negative.
    """
    positives, negatives = scores[labels == 1], scores[labels == 0].sort().values
    below = torch.searchsorted(negatives, positives)
    not_above = torch.searchsorted(negatives, positives, right=True)
    return ((below + not_above).double() / 2).mean().item() / len(negatives) if len(negatives) else float("nan")

"""NYUv2: name the class of every pixel and its depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor, nn

from gradstats.compare.experiment import Experiment, Metric, moved
from gradstats.data import Samples, batches, nyuv2
from gradstats.data.nyuv2 import IGNORED, NUM_CLASSES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.utils.data import DataLoader

OUTPUTS = {"segmentation": NUM_CLASSES, "depth": 1}


class UNet(nn.Module):
    """A U-net whose last features are shared by one 1x1 convolution for each task.

    Args:
        tasks: Any of ``OUTPUTS``.
        width: Channels at full resolution; they double with each of three halvings.
        dropout: Share of the channels dropped where they are narrowest.
    """

    def __init__(self, tasks: Sequence[str], width: int, dropout: float) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(_block(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.dropout = nn.Dropout2d(dropout)
        self.up = nn.ModuleList(_block(3 * o, o) for o in reversed(widths[:-1]))
        self.heads = nn.ModuleDict({task: nn.Conv2d(width, OUTPUTS[task], 1) for task in tasks})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Logits ``[N, 13, H, W]`` or metres ``[N, 1, H, W]`` of each task, from uint8 images ``[N, 3, H, W]``."""
        x = (image / 127.5 - 1.0).contiguous(memory_format=torch.channels_last)  # CPUs convolve it much faster
        skipped: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skipped else x)
            skipped.append(x)
        x = self.dropout(x)
        for block, skip in zip(self.up, reversed(skipped[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, skip.shape[-2:]), skip], 1))
        return {task: head(x) for task, head in self.heads.items()}


def _block(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (channels, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


@dataclass
class NYUv2Experiment(Experiment):
    """NYUv2 (:func:`gradstats.data.nyuv2`): segmentation into 13 classes and depth, by a small U-net.

    Attributes:
        batch_size: Images in a batch.
        width: Channels of the network at full resolution.
        dropout: As for :class:`UNet`.
        stride: Of the rows and columns of an image, every how many are kept, in all splits.
    """

    epochs: int = 12
    batch_size: int = 16
    width: int = 16
    dropout: float = 0.1
    stride: int = 1

    tasks = tuple(OUTPUTS)
    metrics = (
        Metric("segmentation", "mIoU"),
        Metric("segmentation", "pixel accuracy"),
        Metric("depth", "absolute error (m)", higher_is_better=False),
        Metric("depth", "relative error", higher_is_better=False),
    )

    def __post_init__(self) -> None:
        if self.data is None:
            raise ValueError("data: expected the folder that holds nyuv2/train.npz and nyuv2/test.npz, got None")
        if self.stride < 1:
            raise ValueError(f"stride: expected a positive integer, got {self.stride!r}")
        self._splits = {name: _thinned(split, self.stride) for name, split in nyuv2(self.data).items()}

    def make_model(self, tasks: Sequence[str]) -> nn.Module:
        """A small U-net."""
        return UNet(tasks, self.width, self.dropout)

    def train_loader(self) -> DataLoader[Any]:
        """Shuffled images."""
        return batches(self._splits["train"], self.batch_size, shuffle=True)

    def compute_losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy over the labelled pixels, absolute error of depth over all."""
        outputs, losses = model(batch["image"]), {}
        if "segmentation" in outputs:
            labels = batch["segmentation"].long()
            losses["segmentation"] = F.cross_entropy(outputs["segmentation"], labels, ignore_index=IGNORED)
        if "depth" in outputs:
            losses["depth"] = F.l1_loss(outputs["depth"].squeeze(1), batch["depth"])
        return losses

    def evaluate(self, model: nn.Module, split: Literal["valid", "test"]) -> dict[Metric, float]:
        """Mean intersection over union and accuracy of pixels; absolute and relative error of depth."""
        data = self._splits[split]
        named = [_named(model(moved(batch, model)["image"])) for batch in batches(data, self.batch_size)]
        values: dict[Metric, float] = {}
        for task in named[0]:
            numbers = MEASURES[task](torch.cat([batch[task] for batch in named]), data.tensors[task])
            values |= zip([metric for metric in self.metrics if metric.task == task], numbers, strict=True)
        return values


def _thinned(samples: Samples, stride: int) -> Samples:
    """Every ``stride``-th row and column of the images."""
    return Samples({name: tensor[..., ::stride, ::stride].contiguous() for name, tensor in samples.tensors.items()})


def _named(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Classes and metres ``[N, H, W]``, on the CPU, from the network's outputs."""
    return {
        task: (output.argmax(1) if task == "segmentation" else output.squeeze(1)).cpu()
        for task, output in outputs.items()
    }


def segmentation_measures(named: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean intersection over union of the classes that occur, and accuracy, over the labelled pixels.

    Args:
        named: Classes ``[N, H, W]``.
        truth: True classes ``[N, H, W]``; 255 to be ignored.
    """
    known = truth != IGNORED
    pairs = truth[known].long() * NUM_CLASSES + named[known]
    counts = torch.bincount(pairs, minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES).double()
    right = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - right
    return (right / union)[counts.sum(1) > 0].mean().item(), (right.sum() / counts.sum()).item()


def depth_measures(named: Tensor, truth: Tensor) -> tuple[float, float]:
    """Mean absolute error in metres, and mean of the absolute error relative to the true depth."""
    off = (named - truth).abs().double()
    return off.mean().item(), (off / truth).mean().item()


MEASURES = {"segmentation": segmentation_measures, "depth": depth_measures}

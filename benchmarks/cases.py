"""What ``collect.py`` measures on: small models with T tasks, and three ways in which tasks and samples go together.

* ``shared``: all tasks look at the same samples, each through a head of its own.
* ``disjoint``: every task owns samples that no other task sees.
* ``per-sample``: one loss for each sample; the gradients are those of the whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812  # its usual name
from torch import Tensor, nn

SHARINGS = ("shared", "disjoint", "per-sample")
OUTPUTS = 4  # of each head

Losses: TypeAlias = list[Tensor] | Tensor


@dataclass
class Case:
    """A model with data.

    Attributes:
        trunk: The part whose gradients count.
        heads: One linear layer for each task; none for per-sample losses.
        samples: ``[N, ...]``.
        targets: ``[T, N, 4]``; ``[T, N / T, 4]`` where tasks own their samples; ``[N, 4]`` for per-sample losses.
        owner: Task of each sample, int64 ``[N]``, or None where tasks share samples.
        autocast: Whether the forward pass runs under bfloat16 autocast.
        parameters: Those of the trunk.
    """

    trunk: nn.Module
    heads: nn.ModuleList
    samples: Tensor
    targets: Tensor
    owner: Tensor | None
    autocast: bool = False
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.trunk.parameters())

    @property
    def num_tasks(self) -> int:
        """Number of tasks ``T``."""
        return len(self.targets)

    def double(self) -> Case:
        """The same in float64, which autocast leaves alone, in place."""
        self.trunk.double()
        self.heads.double()
        self.samples, self.targets = self.samples.double(), self.targets.double()
        return self

    def precision(self) -> torch.autocast:
        """In which forward passes run."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)

    def forward(self) -> tuple[Tensor, Losses]:
        """The trunk's output ``[N, ...]`` and ``T`` losses; those of samples in one tensor."""
        with self.precision():
            return self._forward()

    def _forward(self) -> tuple[Tensor, Losses]:
        features = self.trunk(self.samples)
        if not self.heads:
            return features, (features - self.targets).square().mean(1)
        owned = self.owner is not None
        parts = features.unflatten(0, (self.num_tasks, -1)) if owned else [features] * self.num_tasks
        return features, [
            F.mse_loss(head(part), target) for head, part, target in zip(self.heads, parts, self.targets, strict=True)
        ]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with GroupNorm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class EncoderBlock(nn.Module):
    """Pre-norm Transformer block of ``nn.Linear`` and scaled dot-product attention, as timm writes it."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]`` to the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MeanPool(nn.Module):
    """Mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, tokens, width]`` to ``[N, width]``."""
        return x.mean(1)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers, each followed by ReLU."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def cnn() -> nn.Sequential:
    """Four residual blocks of 32 to 256 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.GroupNorm(8, 32),
        nn.ReLU(),
        ResidualBlock(32, 32, 1),
        ResidualBlock(32, 64, 2),
        ResidualBlock(64, 128, 2),
        ResidualBlock(128, 256, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def transformer() -> nn.Sequential:
    """Four pre-norm blocks of width 256."""
    return nn.Sequential(*[EncoderBlock(256, 4, 1024) for _ in range(4)], MeanPool())


def torch_transformer() -> nn.Sequential:
    """The same size from ``nn.TransformerEncoder``, post-norm."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), MeanPool())


@dataclass(frozen=True)
class Model:
    """How a model is built and fed.

    Attributes:
        build: Makes the trunk.
        sample: Shape of one sample.
        features: Width of the trunk's output.
        batch: Samples that tasks share.
        owned: Samples that each task owns, by the number of tasks.
        title: For tables.
        autocast: Whether the forward pass runs under bfloat16 autocast.
    """

    build: Callable[[], nn.Module]
    sample: tuple[int, ...]
    features: int
    batch: int
    owned: dict[int, int]
    title: str
    autocast: bool = False


MODELS = {
    "mlp": Model(lambda: mlp(512, *[1024] * 5), (512,), 1024, 64, {2: 32, 8: 8, 32: 4}, "MLP"),
    "cnn": Model(cnn, (3, 32, 32), 256, 16, {2: 16, 8: 4, 32: 1}, "CNN"),
    "transformer": Model(transformer, (64, 256), 256, 8, {2: 16, 8: 4, 32: 1}, "Transformer"),
    "nn-transformer": Model(torch_transformer, (64, 256), 256, 8, {2: 16, 8: 4, 32: 1}, "nn.TransformerEncoder"),
    "tiny": Model(lambda: mlp(8, 16, 16), (8,), 16, 6, {2: 3}, "tiny MLP"),
}
#: Two of them in mixed precision.
MODELS |= {
    f"{name}-autocast": replace(MODELS[name], title=f"{MODELS[name].title}, autocast", autocast=True)
    for name in ("mlp", "transformer")
}


def build_case(model: str, num_tasks: int, sharing: str) -> Case:
    """The model with the same weights and data at every call."""
    torch.manual_seed(0)
    spec = MODELS[model]
    trunk = spec.build()
    owner = None
    if sharing == "per-sample":
        trunk = nn.Sequential(trunk, nn.Linear(spec.features, OUTPUTS))
        heads = nn.ModuleList()
        samples, targets = torch.randn(num_tasks, *spec.sample), torch.randn(num_tasks, OUTPUTS)
        owner = torch.arange(num_tasks)
    else:
        heads = nn.ModuleList([nn.Linear(spec.features, OUTPUTS) for _ in range(num_tasks)])
        rows = spec.batch
        if sharing == "disjoint":
            rows = spec.owned.get(num_tasks, 1)
            owner = torch.arange(num_tasks).repeat_interleave(rows)
        samples = torch.randn(rows if owner is None else len(owner), *spec.sample)
        targets = torch.randn(num_tasks, rows, OUTPUTS)
    return Case(trunk, heads, samples, targets, owner, spec.autocast)

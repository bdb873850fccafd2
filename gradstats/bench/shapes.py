"""Lists of parameter shapes that people have gradients of, written down so that no model has to be built."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]


def _resnet(blocks: tuple[int, int, int, int], *, bottleneck: bool, stem: int = 64, classes: int = 1000) -> list[Shape]:
    """He et al. (2015) as torchvision builds them, with BatchNorm."""

    def convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]  # the last two are the norm's

    shapes = convolution(stem, 3, 7)
    inputs = stem
    for width, count in zip((stem, 2 * stem, 4 * stem, 8 * stem), blocks, strict=True):
        outputs = 4 * width if bottleneck else width
        for _ in range(count):
            if bottleneck:
                shapes += convolution(width, inputs, 1) + convolution(width, width, 3) + convolution(outputs, width, 1)
            else:
                shapes += convolution(width, inputs, 3) + convolution(width, width, 3)
            if inputs != outputs:
                shapes += convolution(outputs, inputs, 1)  # of the shortcut
            inputs = outputs
    return [*shapes, (classes, inputs), (classes,)]


def _linear(outputs: int, inputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _encoder_block(width: int) -> list[Shape]:
    """Four projections and a hidden layer of 4 x width, each followed or preceded by a norm."""
    norm = [(width,), (width,)]
    hidden = _linear(4 * width, width) + _linear(width, 4 * width)
    return 4 * _linear(width, width) + norm + hidden + norm


def _vit_b() -> list[Shape]:
    """ViT-B/16 of Dosovitskiy et al. (2020) with 1000 classes, queries, keys and values in one matrix as in timm."""
    block = _encoder_block(768)[6:] + _linear(3 * 768, 768)
    embedding: list[Shape] = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return embedding + 12 * block + [(768,), (768,)] + _linear(1000, 768)


def _bert_base() -> list[Shape]:
    """BERT-base, uncased, of Devlin et al. (2018), with the pooler."""
    embedding: list[Shape] = [(30522, 768), (512, 768), (2, 768), (768,), (768,)]
    return embedding + 12 * _encoder_block(768) + _linear(768, 768)


def _llama_shard(ranks: int = 64) -> list[Shape]:
    """One rank's part of Llama 3 8B (Dubey et al., 2024), every parameter cut along its first dimension as by FSDP2."""
    width, hidden, keys, words = 4096, 14336, 1024, 128256
    attention: list[Shape] = [(width, width), (keys, width), (keys, width), (width, width)]
    block = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(first // ranks, *rest) for first, *rest in [(words, width), *32 * block, (width,), (words, width)]]


#: What ``--lists`` names.
MODELS: dict[str, Callable[[], list[Shape]]] = {
    "resnet18-narrow": lambda: _resnet((2, 2, 2, 2), bottleneck=False, stem=2, classes=10),
    "resnet18": lambda: _resnet((2, 2, 2, 2), bottleneck=False),
    "resnet50": lambda: _resnet((3, 4, 6, 3), bottleneck=True),
    "vit-b": _vit_b,
    "bert-base": _bert_base,
    "llama-shard": _llama_shard,
}

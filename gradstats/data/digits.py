"""Pairs of overlaid handwritten digits, built from the images that scikit-learn ships.

The recipe is that of MultiMNIST (Sabour et al., 2017; as a multi-task problem: Sener & Koltun, 2018): a left digit in
the upper left corner of a larger canvas, a right digit in the lower right corner, the pixelwise maximum where they
overlap. What differs is ours: the digits are 8x8 instead of 28x28, so the canvas is 11x11 (28x28 on 36x36 overlaps as
much as 8x8 on 10.3x10.3 would) and is not shrunk back afterwards, which would leave too few pixels to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZE, SHIFT = 8, 3
CANVAS = SIZE + SHIFT
SPLITS = {"train": 0.6, "valid": 0.2, "test": 0.2}


@dataclass(frozen=True, eq=False)
class OverlaidDigits(Dataset[dict[str, Tensor]]):
    """``N`` pairs of overlaid digits.

    Indexing with one number gives one sample; with a slice, a list or a tensor of indices, a whole batch at once (use
    ``DataLoader(data, batch_size=None, sampler=BatchSampler(...))``). Both are mappings with the keys ``"image"``,
    ``"left"`` and ``"right"``.

    Attributes:
        images: Float32 tensor ``[N, 1, 11, 11]``, ink intensities 0 to 16 as the source has them.
        left: Int64 tensor ``[N]``, class 0 to 9 of the digit in the upper left corner.
        right: Int64 tensor ``[N]``, class 0 to 9 of the digit in the lower right corner.
        sources: Int64 tensor ``[N, 2]``, row of the left and of the right digit in ``sklearn.datasets.load_digits()``.
    """

    images: Tensor
    left: Tensor
    right: Tensor
    sources: Tensor

    def __len__(self) -> int:
        """Number of pairs ``N``."""
        return len(self.images)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The sample, or the batch, at ``index``."""
        return {"image": self.images[index], "left": self.left[index], "right": self.right[index]}


def overlaid_digits(*, pairs_per_image: int = 8, seed: int = 0) -> dict[str, OverlaidDigits]:
    """Training, validation and test pairs of overlaid digits.

    The 1,797 source images are shuffled and split 60/20/20 *before* any pairing, so no image of one split occurs in
    another. Within a split every image is the left digit ``pairs_per_image`` times, each time with a right digit drawn
    uniformly from the same split. (The source mixes the hands of 13 writers and does not say who wrote what, so all
    splits share writers.)

    Args:
        pairs_per_image: How often each image is the left digit; at least 1. Valid and test pairs grow with it too.
        seed: Seed of the split and of the pairing. The same seed gives the same data.

    Returns:
        ``{"train": ..., "valid": ..., "test": ...}``; with 8 pairs per image 8624, 2880 and 2872 pairs.

    Raises:
        ImportError: If scikit-learn is not installed (extra ``demo``).
        ValueError: If ``pairs_per_image`` is below 1.
    """
    if pairs_per_image < 1:
        raise ValueError(f"pairs_per_image: expected at least 1, got {pairs_per_image}")
    digits, labels = _source_digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits))
    cuts = np.rint(np.cumsum(list(SPLITS.values()))[:-1] * len(digits)).astype(int)
    splits = {}
    for name, rows in zip(SPLITS, np.split(order, cuts), strict=True):
        left = np.tile(rows, pairs_per_image)
        right = rng.choice(rows, size=len(left))
        splits[name] = OverlaidDigits(
            images=torch.from_numpy(overlay(digits[left], digits[right])).unsqueeze(1),
            left=torch.from_numpy(labels[left]),
            right=torch.from_numpy(labels[right]),
            sources=torch.from_numpy(np.stack([left, right], axis=1)),
        )
    return splits


def overlay(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Left digits over right digits on a common canvas, by the pixelwise maximum.

    Args:
        left: Images ``[N, 8, 8]`` for the upper left corner.
        right: Images ``[N, 8, 8]`` for the lower right corner.

    Returns:
        Images ``[N, 11, 11]`` of the same dtype.
    """
    canvas = np.zeros((len(left), CANVAS, CANVAS), left.dtype)
    canvas[:, :SIZE, :SIZE] = left
    corner = canvas[:, SHIFT:, SHIFT:]
    np.maximum(corner, right, out=corner)
    return canvas


def _source_digits() -> tuple[np.ndarray, np.ndarray]:
    """The source images, float32 ``[1797, 8, 8]``, and their classes, int64 ``[1797]``."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("overlaid_digits needs scikit-learn: pip install 'gradstats[demo]'") from error
    source = load_digits()
    return source.images.astype(np.float32), source.target.astype(np.int64)

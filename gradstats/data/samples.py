"""Samples in memory, loaders of whole batches, and ``.npz`` files with clear errors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence, Sized

    import torch

SPLIT_CODES = {"train": 0, "valid": 1, "test": 2}


@dataclass(frozen=True, eq=False)
class Samples(Dataset[dict[str, Tensor]]):
    """``N`` samples as tensors by name.

    Indexing with one number gives one sample; with a slice, a list or a tensor of indices, a whole batch at once. Both
    are dictionaries with the keys of ``tensors``.

    Attributes:
        tensors: Tensors ``[N, ...]`` by name.
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        """Number of samples ``N``."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> dict[str, Tensor]:
        """The sample, or the batch, at ``index``."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def batches(
    data: Dataset[dict[str, Tensor]],
    batch_size: int,
    *,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[dict[str, Tensor]]:
    """Loader that takes each batch from ``data`` with one indexing, much faster than sample by sample.

    Args:
        data: A data set that a list of indices can index, such as :class:`Samples`.
        batch_size: Samples in a batch.
        shuffle: Whether to draw the samples in a new random order in each epoch and drop an incomplete last batch, as
            training wants it; otherwise all samples come in their order.
        generator: Source of the random order; None for torch's global one.
    """
    sized = cast("Sized", data)  # which torch does not say of its data sets
    rows = RandomSampler(sized, generator=generator) if shuffle else SequentialSampler(sized)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(rows, batch_size, drop_last=shuffle))


def read_npz(folder: str | os.PathLike[str], file: str, arrays: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The named ``arrays`` of ``folder/file``.

    Raises:
        FileNotFoundError: If there is no such file; names it and what it should hold.
        ValueError: If the file lacks an array.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise FileNotFoundError(f"data: expected {path} with the arrays {', '.join(arrays)}; there is no such file")
    with np.load(path, allow_pickle=False) as content:
        missing = [name for name in arrays if name not in content]
        if missing:
            raise ValueError(f"data: expected {', '.join(missing)} in {path}, which has {', '.join(content)}")
        return {name: content[name] for name in arrays}

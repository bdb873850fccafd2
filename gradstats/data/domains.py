"""Batches that mix domains in chosen proportions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class DomainSampler(Sampler[list[int]]):
    """Draws batches whose samples come from each domain with a chosen probability.

    Loss weights and sampling probabilities are two ways to the same mixture: with domains drawn in proportion to the
    weights, the expected gradient of the batch's plain mean loss is that of ``Σ w_t L_t / T``, ``L_t`` being the mean
    loss over domain ``t``, and no forward or backward pass is spent on what counts little. So weights found by a
    :class:`gradstats.Scalarizer` (``scalarizer.weights``) can be handed over to the loader at any time::

        sampler = DomainSampler(domain, batch_size=64)
        loader = DataLoader(dataset, batch_sampler=sampler)
        ...
        sampler.weights = scalarizer.weights

    Every sample's domain is drawn on its own, and its row uniformly from the domain, with replacement. (A worker of the
    loader prefetches batches, which keep the proportions that they were drawn with.)

    Args:
        domain: Domain 0 to ``T - 1`` of each sample of the data set, int64 ``[N]``; none may be empty.
        batch_size: Samples in a batch.
        weights: Proportions of the domains, ``T`` finite, non-negative numbers, not all 0; None for equal ones.
        num_batches: Batches in an epoch; None for ``N // batch_size``.
        generator: Source of randomness; None for torch's global one.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        domain: Tensor,
        batch_size: int,
        *,
        weights: Sequence[float] | Tensor | None = None,
        num_batches: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if domain.ndim != 1 or not len(domain) or domain.dtype != torch.int64 or int(domain.min()) < 0:
            raise ValueError(
                f"domain: expected int64 numbers of domains [N], got {domain.dtype} of shape {tuple(domain.shape)}"
            )
        self._sizes = torch.bincount(domain)
        if not self._sizes.all():
            empty = (self._sizes == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"domain: expected samples of every domain up to {len(self._sizes) - 1}, got none of {empty}"
            )
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
        self._rows = domain.argsort(stable=True)  # domain after domain
        self._starts = self._sizes.cumsum(0) - self._sizes
        self._batch_size, self._generator = batch_size, generator
        self._num_batches = len(domain) // batch_size if num_batches is None else num_batches
        self.weights = torch.ones(len(self._sizes)) if weights is None else weights

    @property
    def weights(self) -> Tensor:
        """Proportions of the domains, float64 ``[T]``, scaled to a sum of 1; may be set to any positive multiple."""
        return self._weights

    @weights.setter
    def weights(self, weights: Sequence[float] | Tensor) -> None:
        values = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()
        if values.shape != self._sizes.shape or not ((values >= 0) & values.isfinite()).all() or not values.sum() > 0:
            raise ValueError(
                f"weights: expected {len(self._sizes)} finite, non-negative numbers, not all 0, got {values.tolist()}"
            )
        self._weights = values / values.sum()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Rows of each batch."""
        for _ in range(self._num_batches):
            domains = torch.multinomial(self._weights, self._batch_size, replacement=True, generator=self._generator)
            uniform = torch.rand(self._batch_size, generator=self._generator, dtype=torch.float64)
            places = (uniform * self._sizes[domains]).long()
            yield self._rows[self._starts[domains] + places].tolist()

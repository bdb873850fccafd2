"""What a training run leaves behind in numbers, and the means that go into it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class History:
    """Rows of plain floats; the same names go to the loggers, and ``pandas.DataFrame(history.steps)`` just works.

    Attributes:
        steps: One row for each recorded Gramian and each ``log_every``-th step: ``"step"`` (optimizer steps done,
            this one included), ``"loss/<task>"`` (of this process), ``"weight/<task>"`` and, where a Gramian was
            recorded, ``"gradient/<metric>"`` for every metric of :meth:`gradstats.GradStats.to_dict`.
        epochs: One row for each epoch: ``"step"``, ``"epoch"`` (epochs done), ``"lr"``, ``"train/loss/<task>"`` and,
            with a validation loader, ``"val/loss/<task>"`` and ``"val/<metric>"``.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one column, such as ``"weight/seg"`` or ``"val/loss/seg"``; ready to plot.

        Raises:
            KeyError: If no row has such a column.
        """
        rows = [row for row in (*self.steps, *self.epochs) if name in row]
        if not rows:
            known = sorted({key for row in (*self.steps, *self.epochs) for key in row})
            raise KeyError(f"name: no column {name!r} in this history; it has {known}")
        return [int(row["step"]) for row in rows], [row[name] for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"steps": self.steps, "epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.steps, self.epochs = list(state["steps"]), list(state["epochs"])


class Means:
    """Running means by name, exact over batches of unequal size."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        # Known from the start, so that ranks agree on what they reduce where one of them never met a task.
        self._sums = {name: [0.0, 0.0] for name in names}

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        """Count a mean ``value`` of ``count`` things."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += value * count
        entry[1] += count

    def over_ranks(self, fabric: Fabric) -> Means:
        """The same means over all processes."""
        total = torch.tensor(list(self._sums.values()), dtype=torch.float64).to(fabric.device)
        total = cast("Tensor", fabric.all_reduce(total, reduce_op="sum"))
        reduced = Means()
        reduced._sums = dict(zip(self._sums, total.tolist(), strict=True))
        return reduced

    def values(self) -> dict[str, float]:
        """The means of whatever was counted at all."""
        return {name: total / count for name, (total, count) in self._sums.items() if count}

    def state_dict(self) -> dict[str, list[float]]:
        """Everything, for a checkpoint."""
        return self._sums

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._sums = {name: list(entry) for name, entry in state.items()}


def batch_size(batch: Any) -> int | None:
    """Leading dimension of the first tensor in a batch of nested mappings and sequences; None where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((size for part in parts if (size := batch_size(part)) is not None), None)

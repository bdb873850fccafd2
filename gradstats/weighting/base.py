"""What a weighting is: a policy from losses and Gramian to one weight per task."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gradstats.stats import GradStats


class Weighting(nn.Module, ABC):
    """Policy that maps losses and, where it wants them, gradient statistics to one weight per task.

    A weighting never sees a gradient. Its state travels in ``state_dict``: subclasses name the attributes that make
    it up in ``STATE`` (tensors and plain numbers; not buffers, which casting a model to bfloat16 would round).

    Args:
        num_tasks: Number of tasks ``T``.

    Attributes:
        weights: The weights in force, float64 ``[T]``; all ones until the policy decides otherwise.

    Raises:
        ValueError: If ``num_tasks`` is not a positive integer.
    """

    STATE: ClassVar[tuple[str, ...]] = ()

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        if not isinstance(num_tasks, int) or num_tasks < 1:
            raise ValueError(f"num_tasks: expected a positive integer, got {num_tasks!r}")
        self.num_tasks = num_tasks
        self.weights = torch.ones(num_tasks, dtype=torch.float64)

    @property
    def needs(self) -> frozenset[str]:
        """What the steps still to come will use: any of ``"losses"`` and ``"gramian"``."""
        return frozenset()

    def wants_stats(self) -> bool:
        """Whether the step about to be taken should come with a Gramian."""
        return "gramian" in self.needs

    @abstractmethod
    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Take one optimizer step's losses and statistics and return the weights for that step.

        Args:
            losses: Detached float64 tensor ``[T]``; NaN for a task without a loss at this step.
            stats: Statistics of the unweighted task gradients, or None. It may be None although
                :meth:`wants_stats` is true, where the step's gradients were not finite.

        Returns:
            Float64 tensor ``[T]`` on the device of ``losses``.
        """

    def get_extra_state(self) -> Tensor:
        """The attributes named in ``STATE``, for ``state_dict``."""
        return packed({name: getattr(self, name) for name in self.STATE})

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned; tensors come back on the CPU.

        Raises:
            ValueError: If the state is not that of this kind of weighting.
        """
        values = unpacked(state)
        if set(values) != set(self.STATE):
            raise ValueError(f"state: expected {sorted(self.STATE)} for {type(self).__name__}, got {sorted(values)}")
        for name, value in values.items():
            setattr(self, name, value)


def packed(state: dict[str, Any]) -> Tensor:
    """``state`` as a uint8 tensor: safetensors, in which Hugging Face's Trainer saves, takes tensors alone."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpacked(state: Tensor) -> dict[str, Any]:
    """The dictionary given to :func:`packed`, with its tensors on the CPU."""
    content: dict[str, Any] = torch.load(
        io.BytesIO(state.cpu().numpy().tobytes()), map_location="cpu", weights_only=True
    )
    return content

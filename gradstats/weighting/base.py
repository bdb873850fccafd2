"""What a weighting is: a policy from losses and Gramian to one weight per task."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gradstats.stats import GradStats


@dataclass(frozen=True)
class Facts:
    """What the table of all weightings in the documentation says of one.

    Attributes:
        title: Name as its paper writes it.
        paper: Where it was published, such as ``"arXiv 2001.06782"``; ``"ours"`` where it was not.
        uses: What the weights are computed from: ``"G"`` the Gramian, ``"diag G"`` the norms alone, ``"L"`` the losses,
            ``"state"`` what earlier steps have left, ``"random"`` a generator; ``"–"`` nothing.
        cost: Of one decision for ``T`` tasks.
        sign: Which values weights can have: ``"> 0"``, ``"≥ 0"`` or ``"any"``.
        tested: What the tests compare it with.
    """

    title: str
    paper: str
    uses: str
    cost: str
    sign: str
    tested: str


class Weighting(nn.Module, ABC):
    """Policy that maps losses and, where it wants them, gradient statistics to one weight per task.

    A weighting never sees a gradient. Its state travels in ``state_dict``: subclasses name the attributes that make
    it up in ``STATE``: integers and float64 tensors, whose shapes never change. They are no buffers, which casting a
    model to bfloat16 would round.

    Args:
        num_tasks: Number of tasks ``T``.

    Attributes:
        weights: The weights in force, float64 ``[T]``; all ones until the policy decides otherwise. New ones come as
            another tensor: it is not written into.

    Raises:
        ValueError: If ``num_tasks`` is not a positive integer.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    FACTS: ClassVar[Facts]  # of those that have a name

    def __init__(self, num_tasks: int) -> None:
        super().__init__()
        if not isinstance(num_tasks, int) or num_tasks < 1:
            raise ValueError(f"num_tasks: expected a positive integer, got {num_tasks!r}")
        self.num_tasks = num_tasks
        self.weights = torch.ones(num_tasks, dtype=torch.float64, device="cpu")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the state directly: ``nn.Module`` would first look for parameters and submodules, for 1 µs a time."""
        if name in self.STATE:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def needs(self) -> frozenset[str]:
        """What the steps still to come will use: any of ``"losses"``, ``"gramian"`` and ``"after_step"``."""
        return frozenset()

    def skip(self) -> bool:
        """Take the next step with ``weights`` as they are; whether that could be done without its losses.

        Who skips steps sets ``weights`` anew rather than in place when they change.
        """
        return False

    def wants_stats(self) -> bool:
        """Whether the step about to be taken should come with a Gramian."""
        return "gramian" in self.needs

    @abstractmethod
    def forward(self, losses: Tensor, stats: GradStats | None = None) -> Tensor:
        """Take one optimizer step's losses and statistics and return the weights for that step.

        Args:
            losses: Detached float64 tensor ``[T]``; NaN for a task without a loss at this step. Where ``needs`` is
                empty, only its device can be relied on.
            stats: Statistics of the unweighted task gradients, or None. It may be None although
                :meth:`wants_stats` is true, where the step's gradients were not finite.

        Returns:
            Float64 tensor ``[T]`` on the device of ``losses``.
        """

    def after_step(self, losses: Tensor) -> None:
        """Learn what the optimizer step has achieved; does nothing unless ``needs`` has ``"after_step"``.

        Args:
            losses: Losses of the same batch after the step, as for :meth:`forward`.
        """

    def _move_state(self, device: torch.device) -> None:
        """Let the state, all of it where the weights are, follow the losses: no copies between devices at each step."""
        if self.weights.device == device:
            return
        for name in self.STATE:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))

    def get_extra_state(self) -> Tensor:
        """The attributes named in ``STATE``, for ``state_dict``."""
        return packed([getattr(self, name) for name in self.STATE])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` returned; tensors come back on the CPU.

        Raises:
            ValueError: If the state is not that of this kind of weighting with this number of tasks and these options.
        """
        values = unpacked(state, [getattr(self, name) for name in self.STATE])
        if values is None:
            raise ValueError(f"state: expected that of {type(self).__name__} for {self.num_tasks} tasks")
        for name, value in zip(self.STATE, values, strict=True):
            setattr(self, name, value)


def packed(values: Sequence[int | Tensor]) -> Tensor:
    """Integers and float64 tensors as one uint8 tensor of a size that depends on their shapes alone.

    That is what every kind of checkpoint takes: safetensors wants tensors, ``torch.distributed.checkpoint`` tensors
    that keep their size, and casting a model to bfloat16 leaves uint8 as it is.
    """
    flat = [torch.as_tensor(value, dtype=torch.float64, device="cpu").reshape(-1) for value in values]
    return torch.cat([torch.zeros(0, dtype=torch.float64, device="cpu"), *flat]).view(torch.uint8)


def unpacked(state: Tensor, like: Sequence[int | Tensor]) -> list[int | Tensor] | None:
    """What was given to :func:`packed`, shaped like ``like``; None if ``state`` has another size."""
    sizes = [value.numel() if isinstance(value, Tensor) else 1 for value in like]
    if not isinstance(state, Tensor) or state.numel() != 8 * sum(sizes):
        return None
    parts = torch.split(state.detach().cpu().clone().view(torch.float64), sizes)
    # Cloned: a tensor that starts elsewhere in a cache line may be summed in another order.
    return [
        part.clone().reshape(old.shape) if isinstance(old, Tensor) else int(part)
        for part, old in zip(parts, like, strict=True)
    ]


def checked_positive(name: str, value: float) -> float:
    """``value``, or a ValueError that names the argument."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return value


def checked_numbers(name: str, values: Sequence[float] | None, count: int, *, default: float) -> Tensor:
    """``count`` finite numbers as a float64 tensor, or a ValueError that names the argument; ``default`` for None."""
    numbers = [default] * count if values is None else [float(value) for value in values]
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}: expected {count} finite numbers, got {numbers}")
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def checked_weighting(name: str, weighting: str | Weighting, num_tasks: int) -> Weighting:
    """The weighting that an option holds or names, or an error that names the option."""
    if isinstance(weighting, str):
        from gradstats.weighting import create  # which knows this module, too

        return create(weighting, num_tasks)
    if not isinstance(weighting, Weighting):
        raise TypeError(f"{name}: expected a name or a Weighting, got {type(weighting).__name__}")
    if weighting.num_tasks != num_tasks:
        raise ValueError(f"{name}: expected one for {num_tasks} tasks, got one for {weighting.num_tasks}")
    return weighting

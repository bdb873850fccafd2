"""What the hardware can do at most, for the shares that :mod:`gradstats.bench` prints: read, and multiply and add.

The operators exist where a compiled library for the device is loaded; there is no reference kernel, since plain torch
operations are not limits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstats.ops.backends import backends

# Kept alive for the life of the process, as the library of the operators proper.
_library = torch.library.Library("gradstats", "FRAGMENT")
_library.define("_read(Tensor[] tensors, int ahead) -> Tensor")
_library.define("_multiply_add(Tensor like, int count) -> Tensor")


def available(device_type: str) -> bool:
    """Whether the limits of ``"cpu"`` or ``"cuda"`` can be measured here."""
    return backends()[device_type].available


def read(tensors: Sequence[Tensor], *, ahead: int = 0) -> Tensor:
    """Read contiguous tensors once, with torch's threads, and do nothing else.

    Args:
        tensors: At least one, all on one device; on a GPU aligned to 16 bytes.
        ahead: On the CPU, ask for memory so many bytes before it is needed; 0 leaves that to the processor.

    Returns:
        The exclusive or of all bytes, uint8 ``[]``.
    """
    result: Tensor = torch.ops.gradstats._read(list(tensors), ahead)
    return result


def multiply_add(like: Tensor, count: int) -> Tensor:
    """Do at least ``count`` fused multiply-adds in registers, with torch's threads or the whole GPU.

    Args:
        like: Whose device and dtype, float32 or float64, to use.
        count: At least so many; they are done in pieces of some hundred thousand for each thread of a CPU.

    Returns:
        How many were done, float64 ``[]``.
    """
    result: Tensor = torch.ops.gradstats._multiply_add(like, count)
    return result

"""The fused kernel for linear layers, in Triton: their weight gradients are formed and multiplied tile by tile.

This is the host side of ``linear_kernel`` (:mod:`gradstats.ops.triton_kernels`). What it does not take (more than 16
tasks, float64, dtypes that differ) goes by parts, as on a backend without such a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
from torch import Tensor

from gradstats import ops
from gradstats.ops import triton_kernels
from gradstats.ops.triton_gram import TRITON_DTYPES, VECTOR_BYTES, launcher, reduce_slots, to_device

_MAX_TASKS = 16
_SIDE = 128  # of a tile: outputs of all tasks together, and inputs
# Rows that tensor cores add up: few, as they cut bits off, and more the fewer bits products have.
_ROWS = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 64}
_MAX_SLOTS = 2048  # of tiles that are summed apart, a function of sizes alone
_MIN_TUNED = 1 << 32  # multiply-adds: with fewer, what is fastest is chance, and would be kept for more


def linear_gram(inputs: Tensor, cotangents: Sequence[Tensor]) -> Tensor:
    """Kernel of ``gradstats::linear_gram``; the arguments are described at :func:`gradstats.ops.linear_gram`."""
    if not _is_fit(inputs, cotangents):
        return ops._linear_gram_by_parts(inputs, cotangents)
    return _run(inputs, cotangents)


def linear_gram_combine(inputs: Tensor, cotangents: Sequence[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel of ``gradstats::linear_gram_combine``; see :func:`gradstats.ops.linear_gram_combine`."""
    if not _is_fit(inputs, cotangents):
        return ops._linear_gram_combine_by_parts(inputs, cotangents, weights)
    if weights.dtype != torch.float64 or weights.shape != (len(cotangents),) or weights.device != inputs.device:
        raise ValueError(f"gradstats: expected float64 weights of shape [{len(cotangents)}] on {inputs.device}")
    combined = inputs.new_empty((cotangents[0].shape[1], inputs.shape[1]))
    return _run(inputs, cotangents, weights, combined), combined


def _is_fit(inputs: Tensor, cotangents: Sequence[Tensor]) -> bool:
    """Whether the kernel takes them. Checks what keeps a direct call of the operator from reading out of bounds."""
    if not cotangents or any(x.ndim != 2 or x.device != inputs.device for x in (inputs, *cotangents)):
        raise ValueError("gradstats: expected inputs [N, k], and cotangents [N, o] of each task on the same device")
    first = cotangents[0]
    if any(x.shape != (len(inputs), first.shape[1]) for x in cotangents):
        raise ValueError("gradstats: expected cotangents [N, o] of one shape for inputs [N, k]")
    alike = inputs.dtype in _ROWS and all(x.dtype == inputs.dtype for x in cotangents)
    return len(cotangents) <= _MAX_TASKS and alike and inputs.numel() > 0 and first.numel() > 0


def tiling(num_tasks: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's tiles: a function of sizes alone."""
    tasks = triton.next_power_of_2(num_tasks)
    return {"TASKS": tasks, "OUTPUTS": _SIDE // tasks, "INPUTS": _SIDE, "ROWS": _ROWS[dtype]}


def _run(
    inputs: Tensor, cotangents: Sequence[Tensor], weights: Tensor | None = None, combined: Tensor | None = None
) -> Tensor:
    """The Gramian; with ``weights``, the weighted gradient goes to ``combined``."""
    if inputs.stride(1) != 1:
        inputs = inputs.contiguous()
    if len({x.stride() for x in cotangents}) > 1 or cotangents[0].stride(1) != 1:
        cotangents = [x.contiguous() for x in cotangents]
    (num_rows, fan_in), fan_out = inputs.shape, cotangents[0].shape[1]
    strides = inputs.stride(0), cotangents[0].stride(0)
    tiles = tiling(len(cotangents), inputs.dtype)
    tasks = tiles["TASKS"]
    addresses = np.zeros(tasks, dtype=np.int64)  # tasks that do not exist have cotangents of zeros
    addresses[: len(cotangents)] = [x.data_ptr() for x in cotangents]
    starts = (*addresses.tolist(), inputs.data_ptr(), *(stride * inputs.itemsize for stride in strides))
    if weights is not None:
        weights = torch.nn.functional.pad(weights, (0, tasks - len(weights)))
    num_tiles = triton.cdiv(fan_out, tiles["OUTPUTS"]) * triton.cdiv(fan_in, tiles["INPUTS"])
    partial = inputs.new_empty((min(num_tiles, _MAX_SLOTS), tasks, tasks), dtype=torch.float64)
    result = inputs.new_empty((len(cotangents), len(cotangents)), dtype=torch.float64)
    tune = len(cotangents) * num_rows * fan_in * fan_out >= _MIN_TUNED
    launch = launcher(triton_kernels.linear_kernel, (len(partial),), num_warps=8, tune=tune)
    with torch.cuda.device_of(inputs):  # type: ignore[no-untyped-call]  # torch does not annotate it
        launch(
            to_device(addresses, inputs.device),
            inputs,
            weights,
            combined,
            partial,
            num_rows,
            fan_in,
            fan_out,
            *strides,
            DTYPE=TRITON_DTYPES[inputs.dtype],
            ALIGNED=all(start % VECTOR_BYTES == 0 for start in starts),
            AS_FLOAT32=inputs.device.type != "cuda",  # Triton's interpreter
            COMBINE=combined is not None,
            **tiles,
        )
        reduce_slots(partial, result)
    return result

"""The Triton backend: ``gradstats::gram`` and ``combine`` on GPUs for which the CUDA library is not compiled.

This is the host side. It writes the addresses of the gradients into a table, cuts their entries into slots and
launches the kernels of :mod:`gradstats.ops.triton_kernels`, without waiting for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from gradstats.ops import reference, triton_kernels

Table: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
_MAX_REGISTER_ROWS = 8  # up to so many tasks, the sums of all pairs fit in registers
_LANES = 128  # threads of the register kernel and of the weighted sums
VECTOR_BYTES = 16  # what each of them reads of a row at a time, if aligned
_MAX_TILE = 64  # tasks on each side of a tile of pairs
# What the tile kernel reads of a row at a time: short sums, as tensor cores cut bits off when they add.
_TILE_BYTES = 64

# Slots are ranges of chunks that are summed apart. Their number depends on sizes alone, never on the device.
_MIN_SLOTS, _MAX_SLOTS = 16, 2048
_MAX_SUMS = 1 << 21  # of all slots: 16 MiB
_MIN_CHUNKS = 4  # of a slot

_MIN_TUNED = 64 << 20  # bytes of gradients: with fewer, what is fastest is chance, and would be kept for more


class Kind(NamedTuple):
    """What the parameters of one launch have in common."""

    dtype: torch.dtype
    beside_dtype: torch.dtype | None  # of the metric, or of what the gradients are combined to
    aligned: bool  # all addresses, to 16 bytes

    def constants(self) -> dict[str, Any]:
        """The kernels' arguments that they are compiled for."""
        return {
            "DTYPE": TRITON_DTYPES[self.dtype],
            "METRIC_DTYPE": TRITON_DTYPES[self.beside_dtype] if self.beside_dtype else None,
            "ALIGNED": self.aligned,
        }

    @property
    def vector(self) -> int:
        """Entries of a row that a thread reads at a time; one by one, many leave registers."""
        return VECTOR_BYTES // self.dtype.itemsize if self.aligned else 2

    @property
    def wide(self) -> bool:
        """Whether products are formed in float64 from the start."""
        return self.dtype == torch.float64 or self.beside_dtype is not None


class Parameter(NamedTuple):
    """The gradients of one parameter as the kernels read them: runs of ``numel`` entries."""

    addresses: list[int]  # 0: zeros
    beside: int  # address of the metric, or of what the gradients are combined to
    numel: int
    kind: Kind
    tensors: Sequence[Tensor]  # copies must live until they are read


class Tiling(NamedTuple):
    """How the kernels cut their work up."""

    rows: int  # tasks, with those that fill the last tile
    tile: int  # 0: the register kernel

    @classmethod
    def of(cls, num_tasks: int) -> Tiling:
        """The tiling for a number of tasks."""
        if num_tasks <= _MAX_REGISTER_ROWS:
            return cls(num_tasks, 0)
        tile = min(_MAX_TILE, max(16, triton.next_power_of_2(num_tasks)))
        return cls(triton.cdiv(num_tasks, tile) * tile, tile)

    def chunk(self, kind: Kind) -> int:
        """Entries of a row that are read at a time."""
        if not self.tile:
            return _LANES * kind.vector
        return max(_TILE_BYTES // kind.dtype.itemsize, 16)  # no fewer, for tl.dot of Triton 3.6

    def num_slots(self, chunks: int) -> int:
        """Slots for a number of chunks."""
        most = min(_MAX_SLOTS, max(_MIN_SLOTS, _MAX_SUMS // self.rows**2))
        return max(1, min(chunks // _MIN_CHUNKS, most))


def gram(grads: Sequence[Tensor], num_tasks: int, metric: Sequence[Tensor], stacked: bool) -> Tensor:
    """Kernel of ``gradstats::gram``; the arguments are described at :func:`gradstats.ops.gram`.

    Gradients are read where they lie if all tasks share a parameter's strides and these are dense; others are copied.
    The first call for a kind of gradients compiles the kernels, and the first large one tunes them, which a CUDA graph
    cannot capture.
    """
    groups = _by_kind(_parameters(grads, num_tasks, metric, stacked))
    tiling = Tiling.of(num_tasks)
    tables = [_table(group, tiling) for group in groups.values()]
    slots = [tiling.num_slots(int(table[-1, -1])) for table in tables]
    first = grads[0]
    partial = first.new_empty((sum(slots), tiling.rows, tiling.rows), dtype=torch.float64)
    result = first.new_empty((num_tasks, num_tasks), dtype=torch.float64)
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]  # torch does not annotate it
        for kind, table, sums in zip(groups, tables, torch.split(partial, slots), strict=True):
            size = int(table[-1, -1]) * tiling.chunk(kind) * tiling.rows * kind.dtype.itemsize
            _launch(kind, to_device(table, first.device), sums, tiling, tune=size >= _MIN_TUNED)
        reduce_slots(partial, result)
    return result


def combine(grads: Sequence[Tensor], num_tasks: int, weights: Tensor, stacked: bool) -> list[Tensor]:
    """Kernel of ``gradstats::combine``; the arguments are described at :func:`gradstats.ops.combine`.

    As for :func:`gram`, gradients that do not lie alike are copied, and the first call compiles.
    """
    _count_parameters(grads, num_tasks, stacked)
    first = grads[0]
    if weights.dtype != torch.float64 or weights.shape != (num_tasks,) or weights.device != first.device:
        raise ValueError(f"gradstats::combine: expected float64 weights of shape [{num_tasks}] on {first.device}")
    combined = [reference.empty_combination(rows) for rows in reference.rows_by_parameter(grads, num_tasks, stacked)]
    # Tasks that do not exist have no gradients, and weights of 0.
    tiling = Tiling(triton.cdiv(num_tasks, triton_kernels.AT_ONCE.value) * triton_kernels.AT_ONCE.value, 0)
    padded = torch.nn.functional.pad(weights, (0, tiling.rows - num_tasks))
    with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]  # torch does not annotate it
        for kind, group in _by_kind(_parameters(grads, num_tasks, combined, stacked)).items():
            table = _table(group, tiling)
            grid = (min(int(table[-1, -1]), _MAX_SLOTS),)
            triton_kernels.combine_kernel[grid](
                to_device(table, first.device),
                padded,
                len(group),
                tiling.rows,
                DTYPE=TRITON_DTYPES[kind.dtype],
                ALIGNED=kind.aligned,
                LANES=_LANES,
                VECTOR=kind.vector,
                num_warps=_LANES // 32,
            )
    return combined


# ---- arguments -------------------------------------------------------------------------------------------------------


def _count_parameters(grads: Sequence[Tensor], num_tasks: int, stacked: bool) -> int:
    if num_tasks < 1 or not grads:
        raise ValueError("gradstats: expected at least one task and one tensor")
    if stacked:
        if any(block.ndim == 0 or block.shape[0] != num_tasks for block in grads):
            raise ValueError("gradstats: expected stacked blocks of shape [num_tasks, ...]")
        return len(grads)
    if len(grads) % num_tasks:
        raise ValueError(f"gradstats: {len(grads)} tensors are not a multiple of num_tasks = {num_tasks}")
    return len(grads) // num_tasks


def _parameters(
    grads: Sequence[Tensor], num_tasks: int, beside: Sequence[Tensor], stacked: bool
) -> Iterator[Parameter]:
    """The parameters that have entries. Checks what keeps a direct call of the operator from reading out of bounds.

    ``beside`` is the metric, what the gradients are combined to, or empty.
    """
    num_params = _count_parameters(grads, num_tasks, stacked)
    if beside and len(beside) != num_params:
        raise ValueError(f"gradstats: expected a metric of {num_params} tensors, got {len(beside)}")
    device = grads[0].device
    for k in range(num_params):
        if stacked and grads[k].numel():
            yield _stacked_parameter(grads[k], beside[k : k + 1], device)
        elif not stacked:
            rows = grads[k::num_params]
            present = [row for row in rows if row.shape != (0,)]  # which stands for a missing gradient
            if any(row.numel() for row in present):
                yield _listed_parameter(rows, present, beside[k : k + 1], device)


def _by_kind(parameters: Iterator[Parameter]) -> dict[Kind, list[Parameter]]:
    groups: dict[Kind, list[Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.kind, []).append(parameter)
    return groups


def _listed_parameter(
    rows: Sequence[Tensor], present: Sequence[Tensor], beside: Sequence[Tensor], device: torch.device
) -> Parameter:
    first = present[0]
    if any(row.shape != first.shape or row.dtype != first.dtype for row in present):
        raise ValueError("gradstats: tensors of one parameter differ in shape or dtype")
    _check(first.shape, present, beside, device)
    if not _lie_alike(first.shape, [tensor.stride() for tensor in (*present, *beside)]):
        rows, beside = [row.contiguous() for row in rows], [d.contiguous() for d in beside]
    addresses = [row.data_ptr() if row.numel() else 0 for row in rows]
    return _parameter(addresses, first.dtype, first.numel(), rows, beside)


def _stacked_parameter(block: Tensor, beside: Sequence[Tensor], device: torch.device) -> Parameter:
    shape = block.shape[1:]
    _check(shape, [block], beside, device)
    if not _lie_alike(shape, [block.stride()[1:], *(d.stride() for d in beside)]):
        block, beside = block.contiguous(), [d.contiguous() for d in beside]
    step = block.stride(0) * block.itemsize
    addresses = [block.data_ptr() + t * step for t in range(block.shape[0])]
    return _parameter(addresses, block.dtype, shape.numel(), [block], beside)


def _check(shape: torch.Size, rows: Sequence[Tensor], beside: Sequence[Tensor], device: torch.device) -> None:
    if any(tensor.dtype not in TRITON_DTYPES for tensor in (rows[0], *beside)):
        raise ValueError("gradstats: expected float32, float64, float16 or bfloat16 tensors")
    if any(tensor.device != device for tensor in (*rows, *beside)):
        raise ValueError(f"gradstats: expected all tensors on {device}")
    if beside and beside[0].shape != shape:
        raise ValueError("gradstats: expected a metric of the gradients' shapes")


def _parameter(
    addresses: list[int], dtype: torch.dtype, numel: int, rows: Sequence[Tensor], beside: Sequence[Tensor]
) -> Parameter:
    address = beside[0].data_ptr() if beside else 0
    aligned = all(each % VECTOR_BYTES == 0 for each in (*addresses, address))
    kind = Kind(dtype, beside[0].dtype if beside else None, aligned)
    return Parameter(addresses, address, numel, kind, [*rows, *beside])


def _lie_alike(shape: torch.Size, strides: Sequence[tuple[int, ...]]) -> bool:
    """Whether tensors of these strides all visit one run of memory in the same order."""
    # Strides along sides of length 1 mean nothing.
    layouts = {tuple((s, n) for s, n in zip(of_one, shape, strict=True) if n != 1) for of_one in strides}
    if len(layouts) > 1:
        return False
    run = 1
    for stride, size in sorted(layouts.pop()):
        if stride != run:
            return False
        run *= size
    return True


# ---- launches --------------------------------------------------------------------------------------------------------


def _table(parameters: Sequence[Parameter], tiling: Tiling) -> Table:
    """What the kernels read instead of arguments, int64 ``[K + 1, rows + 3]``; see ``triton_kernels``."""
    table = np.zeros((len(parameters) + 1, tiling.rows + triton_kernels.COLUMNS.value), dtype=np.int64)
    table[:-1, : len(parameters[0].addresses)] = [p.addresses for p in parameters]
    numel = np.array([p.numel for p in parameters])
    chunk = tiling.chunk(parameters[0].kind)
    columns = table[:, tiling.rows :]
    columns[:-1, triton_kernels.BESIDE.value] = [p.beside for p in parameters]
    columns[:-1, triton_kernels.NUMEL.value] = numel
    columns[1:, triton_kernels.START.value] = np.cumsum(-(-numel // chunk))
    return table


def to_device(table: Table, device: torch.device) -> Tensor:
    """A copy of the table on the device."""
    if device.type != "cuda":  # Triton's interpreter
        return torch.from_numpy(table)
    if torch.cuda.is_current_stream_capturing():
        return _from_arguments(table, device)
    return torch.from_numpy(table).pin_memory().to(device, non_blocking=True)


def _from_arguments(table: Table, device: torch.device) -> Tensor:
    """The same by scalar arguments of kernels, which a CUDA graph keeps: it would copy from memory that has gone."""
    words = torch.zeros(table.size, dtype=torch.int64, device=device)
    torch._foreach_add_(list(words.unbind()), table.flatten().tolist())
    return words.view(table.shape)


def reduce_slots(partial: Tensor, result: Tensor) -> None:
    """Sum all slots, float64 ``[slots, rows, rows]``, in order, and make the result ``[T, T]`` symmetric."""
    slots, num_rows, _ = partial.shape
    grid = (triton.cdiv(result.numel(), 16),)
    triton_kernels.reduce_kernel[grid](partial, result, slots, len(result), num_rows, SLOTS=128, BLOCK=16, num_warps=4)


def launcher(kernel: Any, grid: tuple[int, ...], num_warps: int, *, tune: bool) -> Callable[..., Any]:
    """What launches an autotuned kernel: as is best, or, without tuning it, with that number of warps."""
    return kernel[grid] if tune else functools.partial(kernel.fn[grid], num_warps=num_warps)


def _launch(kind: Kind, table: Tensor, sums: Tensor, tiling: Tiling, *, tune: bool) -> None:
    """Let the kernel of the tiling fill the sums of all slots ``[slots, rows, rows]``."""

    def run(kernel: Any, programs: int, num_warps: int, **constants: Any) -> None:
        grid = (len(sums), programs)
        sizes = (len(table) - 1, tiling.rows)
        constants.update(kind.constants())
        launch = launcher(kernel, grid, num_warps, tune=tune)
        if kind.wide:
            launch(table, sums, None, *sizes, WIDE=True, **constants)
            return
        fits = table.new_empty(grid, dtype=torch.int32)
        launch(table, sums, fits, *sizes, WIDE=False, **constants)
        if kind.dtype != torch.float16:  # whose squares always fit
            launcher(kernel, grid, num_warps, tune=False)(table, sums, fits, *sizes, WIDE=True, **constants)

    if not tiling.tile:
        run(triton_kernels.register_kernel, 1, _LANES // 32, LANES=_LANES, VECTOR=kind.vector)
        return
    tiles, chunk = tiling.rows // tiling.tile, tiling.chunk(kind)
    for same, programs in ((True, tiles), (False, tiles * (tiles - 1))):
        if programs:
            run(triton_kernels.tile_kernel, programs, tiling.tile // 8, SAME=same, TILE=tiling.tile, CHUNK=chunk)

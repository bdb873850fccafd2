"""One case: gradients of one size, and every method's time, memory, host cost and error on them.

* All methods take turns, in an order that rotates from round to round, so that whatever else the machine does hits all
  of them. Times are medians over rounds.
* Before each call the caches are filled with something else, and on a CPU the method is then called on tensors of one
  entry: its code is warm, the gradients are cold.
* On a GPU a time is that between two CUDA events around the call. The graph time is the same around the replay of a
  CUDA graph of it, which leaves out what the host does; rates and shares are taken from it where it is there. A method
  that takes more than a GiB has none, as graphs keep their memory.
* The limits take turns with the methods. One reads the same tensors and does nothing else (on a CPU in two ways, with
  and without asking for memory ahead; the faster counts). The other multiplies and adds in registers, in float64 for
  float64 and else in float32; for 16 bits on a GPU it is a large ``torch.mm``, since tensor cores have a higher rate.
* The arithmetic of a Gramian is counted once for each pair of tasks, ``T (T + 1)`` operations an entry. A method that
  does more gets no credit for it.
* Extra memory is the growth of its peak over one call; on a CPU that of the resident set, and on Linux alone.
* The host cost is the time that a call takes to return with as many tensors, of one entry each.
* The error is the largest ``|G_ij - exact_ij| / (n_i n_j)``, with the exact sums in float64.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradstats.bench.machine import cache_bytes
from gradstats.bench.methods import Gradients, Method
from gradstats.bench.shapes import Shape
from gradstats.ops import limits, reference

Call: TypeAlias = Callable[[], Any]
Record: TypeAlias = dict[str, Any]

READ, READ_AHEAD, MULTIPLY = "read", "read ahead", "multiply-add"
LIMITS = (READ, READ_AHEAD, MULTIPLY)
_AHEAD = 4096  # bytes; 2 to 8 KiB read faster than 1 or 16 KiB where this was written
_MULTIPLY_ADDS = {"cpu": 200_000_000, "cuda": 100_000_000_000}  # for each thread, or the whole GPU: milliseconds
_LARGE = 8192  # side of matrices that keep the tensor cores busy
_FLUSHED = 4  # times the size of the last cache
_LEAST_ROUNDS, _MOST_ROUNDS, _HOST_CALLS, _HOST_SECONDS = 5, 100, 25, 1.0
_MOST_KEPT = 1 << 30  # bytes that a graph may keep for as long as it is there


@dataclass(frozen=True)
class Case:
    """What is measured on.

    Attributes:
        device: Where.
        threads: Of torch on the CPU.
        dtype: Of the gradients.
        num_tasks: ``T``.
        name: ``"flat"`` or that of a model.
        shapes: Of its parameters.
    """

    device: torch.device
    threads: int
    dtype: torch.dtype
    num_tasks: int
    name: str
    shapes: Sequence[Shape]

    @property
    def entries(self) -> int:
        """Entries ``P`` of one task's gradients."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Size of all tasks' gradients."""
        return self.num_tasks * self.entries * self.dtype.itemsize

    @property
    def bytes_needed(self) -> int:
        """Memory to measure in: the gradients in every form, and on a CPU what the hungriest method adds.

        On a GPU a method that does not fit fails and is absent; on a CPU it would take the process with it.
        """
        forms = 1 if len(self.shapes) == 1 else 3
        return self.bytes * (forms + 2 * (self.device.type == "cpu"))

    def gradients(self, shapes: Sequence[Shape]) -> Gradients:
        """Those of the case, or as many of other shapes."""
        return Gradients.random(shapes, self.num_tasks, self.dtype, self.device)

    def describe(self) -> Record:
        """The fields that all records of the case share."""
        return {
            "device": self.device.type,
            "threads": self.threads,
            "dtype": str(self.dtype).removeprefix("torch."),
            "num_tasks": self.num_tasks,
            "list": self.name,
            "entries": self.entries,
            "tensors": len(self.shapes),
            "bytes": self.bytes,
        }


def measure_case(case: Case, methods: Mapping[str, Method], *, seconds: float, fits: bool) -> list[Record]:
    """One record for each limit, and each of the methods that belongs to the case.

    Args:
        case: What to measure on.
        methods: What to measure, by name.
        seconds: Time for the rounds, as far as the least number of rounds allows.
        fits: Whether there is memory for it; otherwise only the host cost is measured.
    """
    torch.set_num_threads(case.threads)
    methods = {
        name: method
        for name, method in methods.items()
        if method.belongs(case.num_tasks, case.dtype, case.device) and (fits or not method.compiled)
    }
    single = case.gradients([(1,) * len(shape) for shape in case.shapes])
    # Compiled methods would compile anew for other shapes.
    small = {name: bound(method, single) for name, method in methods.items() if not method.compiled}
    facts: dict[str, Record] = {name: {} for name in methods}
    for name, call in small.items():
        facts[name]["host_microseconds"] = _host_microseconds(call, case.device)
    if fits:
        gradients = case.gradients(case.shapes)
        multiplication, operations = _multiplication(case)
        limit_calls = _reads(case, gradients) | multiplication
        calls = limit_calls | _working_calls(case, methods, gradients, facts)
        if case.device.type == "cuda":
            calls |= _captured(calls, facts)
        times = interleaved(calls, _reads(case, single) | small, case.device, seconds)
        facts = {name: {} for name in limit_calls} | facts
        add_shares(case, times, facts, operations)
    return [case.describe() | {"method": name} | record for name, record in facts.items()]


# ---- calls ----------------------------------------------------------------------------------------------------------


def bound(method: Method, gradients: Gradients) -> Call:
    """The method as it is timed, on these gradients."""

    def call() -> Tensor:
        return method.call(gradients)

    def call_with_tf32() -> Tensor:
        torch.set_float32_matmul_precision("high")
        try:
            return method.call(gradients)
        finally:
            torch.set_float32_matmul_precision("highest")

    if method.compiled:
        return torch.compile(call, fullgraph=True, dynamic=False)
    return call_with_tf32 if method.tf32 else call


def _reads(case: Case, gradients: Gradients) -> dict[str, Call]:
    """Ways to read all gradients, where a compiled library has them."""
    if not limits.available(case.device.type):
        return {}
    single = len(gradients.blocks) == 1
    tensors = gradients.blocks if single else [g for row in gradients.rows for g in row]
    calls: dict[str, Call] = {READ: lambda: limits.read(tensors)}
    if case.device.type == "cpu":
        calls[READ_AHEAD] = lambda: limits.read(tensors, ahead=_AHEAD)
    return calls


def _multiplication(case: Case) -> tuple[dict[str, Call], float]:
    """Multiplications and additions at the highest rate, where a compiled library has them; and how many those are."""
    if not limits.available(case.device.type):
        return {}, 0.0
    if case.device.type == "cuda" and case.dtype.itemsize == 2:
        square = torch.randn(_LARGE, _LARGE, dtype=case.dtype, device=case.device)
        return {MULTIPLY: lambda: square @ square}, 2.0 * _LARGE**3
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    like = torch.empty(0, dtype=dtype, device=case.device)
    count = _MULTIPLY_ADDS[case.device.type] * (case.threads if case.device.type == "cpu" else 1)
    return {MULTIPLY: lambda: limits.multiply_add(like, count)}, 2 * limits.multiply_add(like, count).item()


def _working_calls(
    case: Case, methods: Mapping[str, Method], gradients: Gradients, facts: dict[str, Record]
) -> dict[str, Call]:
    """The methods that work, called twice. Adds errors, memory and what does not work to ``facts``."""
    exact = reference.gram(gradients.blocks, case.num_tasks, [], True)
    calls: dict[str, Call] = {}
    if any(method.compiled for method in methods.values()):
        torch.compiler.reset()  # so that the case before does not count against the limit on compiling anew
    for name, method in methods.items():
        call = bound(method, gradients)
        try:
            facts[name]["error"] = worst_error(call(), exact)
            facts[name]["extra_bytes"] = extra_bytes(call, case.device)
        except Exception as error:  # what a method cannot do is a result
            facts[name] = {"absent": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            continue
        calls[name] = call
    return calls


def _graph(name: str) -> str:
    return f"{name}, graph"


def _captured(calls: Mapping[str, Call], facts: Mapping[str, Record]) -> dict[str, Call]:
    """Replays of CUDA graphs of those calls that can be captured, and whose memory can be spared meanwhile."""
    replays: dict[str, Call] = {}
    for name, call in calls.items():
        if facts.get(name, {}).get("extra_bytes", 0) > _MOST_KEPT:
            continue  # it runs so long that what the host does hardly counts
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:
            continue
        replays[_graph(name)] = graph.replay
    return replays


# ---- measuring ------------------------------------------------------------------------------------------------------


def interleaved(
    calls: Mapping[str, Call], small: Mapping[str, Call], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Times of all calls in seconds, round by round; ``small`` are the calls that warm their code."""
    other = torch.zeros(_FLUSHED * cache_bytes(device) // 4, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    start = time.perf_counter()
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        turn = done % len(order)
        for name in order[turn:] + order[:turn]:
            other.sum()
            if device.type == "cpu" and name in small:
                small[name]()
            times[name].append(_seconds(calls[name], device))
    return times


def _seconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":  # the events and the call are queued while the caches are still being filled
        first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _host_microseconds(call: Call, device: torch.device) -> float:
    call()
    times: list[float] = []
    while len(times) < _LEAST_ROUNDS or (len(times) < _HOST_CALLS and sum(times) < _HOST_SECONDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """Growth of the peak of memory over one call; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")  # lets the peak start again from the present size
        before = _resident("VmRSS:")
        call()
        return max(0, _resident("VmHWM:") - before)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) << 10


def add_shares(
    case: Case, times: Mapping[str, Sequence[float]], facts: dict[str, Record], limit_operations: float
) -> None:
    """Add times, rates and shares of the limits to the records in ``facts``."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    seconds = {name: medians.get(_graph(name), median) for name, median in medians.items()}
    operations = dict.fromkeys(medians, float(case.num_tasks * (case.num_tasks + 1) * case.entries))
    operations |= {READ: 0.0, READ_AHEAD: 0.0, MULTIPLY: limit_operations}
    for name in [name for name in facts if name in times]:
        low, middle, high = statistics.quantiles(times[name], n=4, method="inclusive")
        record = {"milliseconds": 1e3 * middle, "quartiles": [1e3 * low, 1e3 * high], "rounds": len(times[name])}
        if _graph(name) in medians:
            record["graph_milliseconds"] = 1e3 * medians[_graph(name)]
        if name != MULTIPLY:
            record["gigabytes_per_second"] = case.bytes / seconds[name] / 1e9
        if READ in medians and name != MULTIPLY:
            fastest = min(seconds[READ], seconds.get(READ_AHEAD, math.inf))
            record["percent_of_read"] = 100 * fastest / seconds[name]
        if operations[name]:
            record["gigaflops_per_second"] = operations[name] / seconds[name] / 1e9
        if operations[name] and MULTIPLY in medians:
            peak = limit_operations / seconds[MULTIPLY]
            record["percent_of_peak"] = 100 * operations[name] / seconds[name] / peak
        facts[name] |= record


def worst_error(gram: Tensor, exact: Tensor) -> float:
    """Largest error relative to the product of the norms."""
    norms = exact.diagonal().sqrt()
    return float(((gram.double() - exact) / norms[:, None] / norms[None, :]).abs().max())

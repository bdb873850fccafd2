"""Checks and normal forms of what users pass to the collecting functions."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradstats import ops
from gradstats.collect.graph import Graph
from gradstats.stats import check_names

Losses: TypeAlias = Mapping[str, Tensor | None] | Sequence[Tensor | None] | Tensor
Inputs: TypeAlias = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Mapping[str, Tensor] | nn.Module | None
GroupBy: TypeAlias = str | Callable[[str], str]
Metric: TypeAlias = Mapping[str, Tensor] | Sequence[Tensor]
Weights: TypeAlias = Tensor | Sequence[float] | Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Named:
    """Different tensors in a fixed order, with their names where they have any.

    Attributes:
        tensors: No tensor twice.
        names: As many names, or None.
        positions: Where each tensor stood among those given.
        given: How many were given, duplicates included.
    """

    tensors: list[Tensor]
    names: list[str] | None
    positions: list[int]
    given: int


def normal_losses(losses: Losses, *, per_sample: bool = False) -> tuple[tuple[str, ...], list[Tensor | None]]:
    """Names and losses of the tasks; with ``per_sample`` one for each sample, ``[B]``, else one number.

    Raises:
        TypeError: If ``losses`` or one of them has a wrong type.
        ValueError: If there is no task, a name is not a string, or a tensor of losses has another number of dimensions.
    """
    names = None
    if isinstance(losses, Mapping):
        names, items = list(losses), list(losses.values())
    elif isinstance(losses, Tensor):
        if losses.ndim != 1 + per_sample:
            expected = "[T, B] of the losses of samples" if per_sample else "[T] of one loss per task"
            raise ValueError(f"losses: expected a tensor {expected}, got shape {tuple(losses.shape)}")
        with torch.enable_grad():
            items = list(losses.unbind())
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        items = list(losses)
    else:
        raise TypeError(f"losses: expected a mapping, a sequence or a tensor [T], got {type(losses).__name__}")
    if not items:
        raise ValueError("losses: expected at least one task, got none")
    return check_names(names, len(items), "losses"), items


def present_losses(names: Sequence[str], losses: Sequence[Tensor | None]) -> dict[int, Tensor]:
    """Position and loss of each task that is not absent; one is if its loss is None or has no graph.

    Raises:
        TypeError: If a loss is not a tensor of a floating type.
        ValueError: If a loss is not one number, or no loss has a graph.
    """
    for name, loss in zip(names, losses, strict=True):
        if loss is None:
            continue
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"losses: expected a floating-point tensor for task {name!r}, got {got}")
        if loss.numel() != 1:
            raise ValueError(
                f"losses: expected one number for task {name!r}, got shape {tuple(loss.shape)}; "
                "reduce it first, with .mean() for example"
            )
    present = {task: loss for task, loss in enumerate(losses) if loss is not None and loss.requires_grad}
    devices = {loss.device: names[task] for task, loss in present.items()}
    if len(devices) > 1:
        where = " and ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"losses: expected all on one device, got {where}")
    if not present:
        raise ValueError(f"losses: none of {list(names)} has a graph (requires_grad is False, or all are None)")
    return present


def normal_inputs(inputs: Inputs, graph: Graph) -> Named:
    """The tensors to differentiate with respect to; a tensor given twice counts once.

    Raises:
        TypeError: If ``inputs`` or one of them has a wrong type.
        ValueError: If there is none, or one does not require grad.
    """
    names: list[str] | None = None
    tensors: list[Any]
    if inputs is None:
        tensors = default_inputs(graph)
    elif isinstance(inputs, nn.Module):
        _show_shards(inputs)
        named = [(name, p) for name, p in inputs.named_parameters() if p.requires_grad]
        names, tensors = [name for name, _ in named], [p for _, p in named]
    elif isinstance(inputs, Mapping):
        names, tensors = list(inputs), list(inputs.values())
    elif isinstance(inputs, Tensor):
        tensors = [inputs]
    elif not isinstance(inputs, Iterable) or isinstance(inputs, str):
        raise TypeError(f"inputs: expected tensors, pairs, a mapping or a module, got {type(inputs).__name__}")
    else:
        tensors = list(inputs)
        if tensors and all(isinstance(item, tuple) and len(item) == 2 for item in tensors):
            names, tensors = [name for name, _ in tensors], [tensor for _, tensor in tensors]
    if names is not None:
        _check_input_names(names)
    if not tensors:
        raise ValueError("inputs: expected at least one tensor that requires grad, got none")
    for i, tensor in enumerate(tensors):
        _check_input(tensor, f"inputs[{names[i]!r}]" if names else f"inputs[{i}]")
    first = {id(tensor): i for i, tensor in reversed(list(enumerate(tensors)))}
    positions = sorted(first.values())
    kept = None if names is None else [names[i] for i in positions]
    return Named([tensors[i] for i in positions], kept, positions, len(tensors))


def _show_shards(module: nn.Module) -> None:
    """Make FSDP2 modules show the sharded parameters, where gradients arrive.

    Between forward and backward the outermost one shows its unsharded ones; a backward gathers them anew.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for part in module.modules():
            if isinstance(part, fsdp.FSDPModule):
                part.reshard()


def default_inputs(graph: Graph) -> list[Tensor]:
    """The leaves that at least two losses reach; where there are none, all leaves; parameters alone if there are any.

    Data may require grad as well, and is no parameter.
    Losses that share nothing have orthogonal gradients, and a single loss shares with nobody: their Gramian is
    diagonal, and the full gradients are what its norms can mean.
    """
    shared = [leaf for node, leaf in graph.leaves.items() if graph.is_shared(node)]
    leaves = shared or list(graph.leaves.values())
    parameters: list[Tensor] = [leaf for leaf in leaves if isinstance(leaf, nn.Parameter)]
    return parameters or leaves


def _check_input_names(names: Sequence[object]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"inputs: expected names that are strings, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"inputs: expected different names, got {list(names)}")


def _check_input(tensor: object, argument: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in ops.DTYPES:
        raise TypeError(f"{argument}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if not tensor.requires_grad:
        raise ValueError(f"{argument}: expected a tensor that requires grad, got one that does not")


def group_names(group_by: GroupBy | None, inputs: Named) -> list[str]:
    """The group of each input; one nameless group where ``group_by`` is None.

    Raises:
        ValueError: If ``group_by`` is unknown or the inputs have no names.
        TypeError: If it is neither a string nor callable, or a function does not return a string.
    """
    if group_by is None:
        return [""] * len(inputs.tensors)
    if inputs.names is None:
        raise ValueError("group_by: needs named inputs: pass a module, a mapping or (name, tensor) pairs as inputs")
    if callable(group_by):
        groups = [group_by(name) for name in inputs.names]
        for name, group in zip(inputs.names, groups, strict=True):
            if not isinstance(group, str):
                raise TypeError(f"group_by: expected a string for {name!r}, got {group!r}")
        return groups
    if group_by == "parameter":
        return list(inputs.names)
    if group_by == "module":
        return [name.rpartition(".")[0] for name in inputs.names]
    if isinstance(group_by, str):
        raise ValueError(f"group_by: expected 'parameter', 'module' or a function of the name, got {group_by!r}")
    raise TypeError(f"group_by: expected 'parameter', 'module' or a function, got {type(group_by).__name__}")


def metric_operand(metric: Metric | None, inputs: Named) -> list[Tensor]:
    """The positive diagonal of each input; empty where ``metric`` is None.

    Raises:
        TypeError: If ``metric`` or one of its entries has a wrong type.
        ValueError: If an entry is missing or has another shape or device than its input.
    """
    if metric is None:
        return []
    if isinstance(metric, Mapping):
        if inputs.names is None:
            raise ValueError("metric: a mapping needs named inputs: a module, a mapping or (name, tensor) pairs")
        missing = [name for name in inputs.names if name not in metric]
        if missing:
            raise ValueError(f"metric: expected an entry for each input, none for {missing}")
        diagonal = [metric[name] for name in inputs.names]
    elif isinstance(metric, Sequence) and not isinstance(metric, str):
        if len(metric) != inputs.given:
            raise ValueError(f"metric: expected {inputs.given} tensors, one per input, got {len(metric)}")
        diagonal = [metric[i] for i in inputs.positions]
    else:
        raise TypeError(f"metric: expected a mapping or a sequence of tensors, got {type(metric).__name__}")
    for k, (entry, tensor) in enumerate(zip(diagonal, inputs.tensors, strict=True)):
        if not isinstance(entry, Tensor) or entry.dtype not in ops.DTYPES:
            got = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(f"metric[{k}]: expected a floating-point tensor, got {got}")
        if entry.shape != tensor.shape:
            raise ValueError(
                f"metric[{k}]: expected shape {tuple(tensor.shape)} as its input, got {tuple(entry.shape)}"
            )
        if entry.device != tensor.device:
            raise ValueError(f"metric[{k}]: expected device {tensor.device} as its input, got {entry.device}")
    return diagonal


def normal_weights(weights: Weights, names: Sequence[str], device: torch.device) -> Tensor:
    """Weights as a float64 tensor ``[T]`` without a graph.

    Raises:
        ValueError: If there is not one number for each task.
    """
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights: expected one for each of {list(names)}, got {list(weights)}")
        weights = [float(weights[name]) for name in names]
    w = torch.as_tensor(weights, device=device).detach().double()
    if w.shape != (len(names),):
        raise ValueError(f"weights: expected {len(names)} numbers, one per task, got shape {tuple(w.shape)}")
    return w


def normal_loss_scale(loss_scale: float | Tensor | None) -> float | Tensor:
    """The factor that the losses carry; 1 where None. The value of a tensor on a device is not waited for.

    Raises:
        TypeError: If it is neither a real number nor a tensor of one.
        ValueError: If it is not one number, positive and finite.
    """
    if loss_scale is None:
        return 1.0
    if isinstance(loss_scale, Tensor):
        if loss_scale.is_complex():
            raise TypeError(f"loss_scale: expected a real number, got {loss_scale.dtype}")
        if loss_scale.numel() != 1:
            raise ValueError(f"loss_scale: expected one number, got shape {tuple(loss_scale.shape)}")
        loss_scale = loss_scale.detach()
        if loss_scale.device.type != "cpu":
            return loss_scale.reshape(()).double()
    elif not isinstance(loss_scale, Real):
        raise TypeError(f"loss_scale: expected a number or a tensor of one, got {type(loss_scale).__name__}")
    if not 0 < float(loss_scale) < math.inf:
        raise ValueError(f"loss_scale: expected a positive, finite number, got {float(loss_scale)}")
    return float(loss_scale)

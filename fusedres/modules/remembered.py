"""The last call of a block in each mode, so that one like it need not be read and checked anew in Python.

Reading a block takes as long as a tiny convolution. A call whose parts are the very objects of the last one, with an
input of the same shape, takes that one's plan again (its tensors live that long). What may change in an object that
stays (a parameter's `.data`) is checked by the C++ passes before they compute anything (`serves` in
csrc/residual_block); where they decline, the block is read as if nothing were remembered.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd import UNIT_TENSORS, BlockPlan
from fusedres.dispatch import measured
from fusedres.modules.anatomy import Parts, shadowed, touched
from fusedres.modules.genuine import replaced_code, replaced_on_block
from fusedres.modules.reading import Tensors
from fusedres.ops.launch import direct

_ABSENT = object()
_ATTRIBUTES = frozenset(("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_of_convolution = itemgetter("stride", "padding", "dilation", "groups", "padding_mode")
_of_norm = itemgetter("training", "track_running_stats", "momentum", "eps")


class Remembered(NamedTuple):
    """A call: what it was made of, by identity, and its plan."""

    parts: tuple[Any, ...]
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    options: tuple[str, str]  # memory and conv
    plan: BlockPlan
    tensors: Tensors
    layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...]  # shape and strides of the convolutions' weights


def remember(
    block: nn.Module, parts: Parts, x: Tensor, options: tuple[str, str], plan: BlockPlan, tensors: Tensors
) -> None:
    """Keeps a call that the C++ passes serve."""
    if plan.backend != "cpu" or plan.dtype is not x.dtype or torch.compiler.is_compiling() or measured(x.device):
        return
    found = _parts_of(block, parts)
    if found is None or any(type(part) is list for part in found):  # a list may change in place
        return
    if not all(tensor is None or tensor.is_leaf for tensor in tensors):  # a graph is not to be kept alive
        return
    unchecked = plan._replace(checked=False)
    made = Remembered(found, x.shape, x.stride(), x.dtype, options, unchecked, tensors, _layouts(tensors))
    others = block.__dict__.get("fused_calls", {}).items()
    # A call with tensors that the block no longer has is forgotten, so that their memory is free.
    kept = {mode: call for mode, call in others if all(map(_same_or_unread, call.tensors, tensors))}
    block.__dict__["fused_calls"] = kept | {block.training: made}


def recall(
    block: nn.Module, cls: type[nn.Module], parts: Parts, x: Tensor, options: tuple[str, str]
) -> tuple[BlockPlan, Tensors] | None:
    """The plan and the tensors of the last call, where this one is like it; x is on the CPU and plain."""
    calls: dict[bool, Remembered] | None = block.__dict__.get("fused_calls")
    last = None if calls is None else calls.get(block.training)
    if (
        last is None
        or x.shape != last.shape
        or x.dtype is not last.dtype
        or options != last.options
        or x.stride() != last.strides
        or torch.is_autocast_enabled("cpu")
        or not direct()
        or measured(x.device)
        or replaced_code(cls, parts.base) is not None
        or replaced_on_block(block.__dict__) is not None
        or nn.modules.module._has_any_global_hook()
    ):
        return None
    found = _parts_of(block, parts)
    if found is None or len(found) != len(last.parts) or not all(map(is_, found, last.parts)):
        return None
    for tensor in last.tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg()):
            return None
    if _layouts(last.tensors) != last.layouts:
        return None
    return last.plan, last.tensors


def _same_or_unread(old: Tensor | None, new: Tensor | None) -> bool:
    """A mode that does not read a tensor (the counter in eval mode) has None for it."""
    return old is new or old is None or new is None


def _layouts(tensors: Tensors) -> tuple[tuple[torch.Size, tuple[int, ...]], ...]:
    return tuple((weight.shape, weight.stride()) for weight in tensors[::UNIT_TENSORS] if weight is not None)


def _parts_of(block: nn.Module, parts: Parts) -> tuple[Any, ...] | None:
    """Every object that a plan is made of; None where a child has a hook or a method of its own."""
    children = block.__dict__["_modules"]
    relu, downsample = children.get("relu"), children.get("downsample")
    if relu is None or touched("relu", relu) is not None or shadowed(block, type(block), parts) is not None:
        return None
    found: list[Any] = [type(relu), downsample, type(downsample)]
    units: Iterable[tuple[Any, Any]] = [(children.get(conv), children.get(norm)) for conv, norm in parts.units]
    if type(downsample) is nn.Sequential:
        inner = tuple(downsample.__dict__["_modules"].values())
        if len(inner) != 2 or touched("downsample", downsample) is not None:
            return None
        units = [*units, inner]
    elif downsample is not None:
        if touched("downsample", downsample) is not None:
            return None
        found += (downsample.in_channels, downsample.out_channels, downsample.stride)
    for conv, norm in units:
        if type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
            return None
        if touched("", conv) is not None or touched("", norm) is not None:
            return None
        settings, state = conv.__dict__, norm.__dict__
        weights, parameters, buffers = settings["_parameters"], state["_parameters"], state["_buffers"]
        if not _ATTRIBUTES.isdisjoint(settings) or not _ATTRIBUTES.isdisjoint(state):
            return None
        found += (conv, norm, weights.get("weight"), weights.get("bias", _ABSENT))
        found += _of_convolution(settings)
        found += _of_norm(state)
        found += (parameters.get("weight", _ABSENT), parameters.get("bias", _ABSENT))
        found += (buffers.get("running_mean", _ABSENT), buffers.get("running_var", _ABSENT))
        found.append(buffers.get("num_batches_tracked", _ABSENT))
    return tuple(found)

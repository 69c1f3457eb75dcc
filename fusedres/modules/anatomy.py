"""What a residual block or a stem consists of, and whether every part is plain enough to be fused.

Read once at every call: what is checked here is what runs, whatever another thread does to the module meanwhile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.utils import _pair
from torch.nn.parameter import Parameter

from fusedres.modules.genuine import replaced_code, replaced_on_block, replaced_on_child
from fusedres.modules.shortcut import ZeroPadShortcut

SHARDED = "is a DTensor"  # the end of a reason that holds between calls only, where fully_shard gathers parameters
_PLAIN_TENSORS = (Parameter, torch.Tensor, nn.Buffer)
_VECTORS = ("weight", "bias", "running_mean", "running_var")
_Pair = tuple[int, int]
_Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Unit(NamedTuple):
    """A convolution without bias and the BatchNorm after it, as they are now."""

    conv_name: str
    norm_name: str
    conv_weight: Tensor
    stride: _Pair
    padding: _Pair
    dilation: _Pair
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    batch_statistics: bool  # else the running ones, as constants
    update: bool  # the running statistics are updated with this batch
    momentum: float | None
    eps: float


class Anatomy(NamedTuple):
    """The parts of a block; a stem has one unit and no shortcut."""

    units: tuple[Unit, ...]
    projection: Unit | None = None
    zero_pad: ZeroPadShortcut | None = None


class Parts(NamedTuple):
    """Where a block's parts are: names of the convolutions and of the norms; and torchvision's class of it."""

    base: type[nn.Module] | None
    convs: tuple[str, ...]
    norms: tuple[str, ...]


def block_anatomy(block: nn.Module, cls: type[nn.Module], stock: type[nn.Module], parts: Parts) -> Anatomy | str:
    """The block's parts, or why it must run unfused: the stock class's forward then runs.

    Fused ops bypass the children's own code, so anything that changes a child's behaviour counts: another type, a
    hook, a replaced method, a parametrization, a tensor subclass, an option that no kernel has.
    """
    common = _common(block, cls, stock, parts)
    if isinstance(common, str):
        return common
    units, children = common
    downsample = children.get("downsample")
    if downsample is None:
        return Anatomy(units)
    reason = _touched("downsample", downsample)
    if reason is not None:
        return reason
    if type(downsample) is ZeroPadShortcut:
        return Anatomy(units, None, downsample)
    inner = tuple(downsample.__dict__["_modules"].values()) if type(downsample) is nn.Sequential else ()
    if len(inner) != 2:
        return f"downsample is a {type(downsample).__name__} other than convolution + BatchNorm or ZeroPadShortcut"
    projection = _unit("downsample.0", inner[0], "downsample.1", inner[1])
    return projection if isinstance(projection, str) else Anatomy(units, projection)


def stem_anatomy(model: nn.Module, cls: type[nn.Module], stock: type[nn.Module], parts: Parts) -> Anatomy | str:
    """The stem of a ResNet (conv1, bn1, relu, maxpool), or why it must run unfused."""
    common = _common(model, cls, stock, parts)
    if isinstance(common, str):
        return common
    units, children = common
    return _maxpool(children.get("maxpool")) or Anatomy(units)


def _common(
    block: nn.Module, cls: type[nn.Module], stock: type[nn.Module], parts: Parts
) -> tuple[tuple[Unit, ...], dict[str, Any]] | str:
    """The units of the branch, and all children; or why not."""
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    reason = replaced_code(cls, stock, parts.base) or replaced_on_block(block.__dict__)
    if reason is not None:
        return reason
    children = block.__dict__["_modules"]
    units: list[Unit] = []
    for conv_name, norm_name in zip(parts.convs, parts.norms, strict=True):
        unit = _unit(conv_name, children.get(conv_name), norm_name, children.get(norm_name))
        if isinstance(unit, str):
            return unit
        units.append(unit)
    relu = children.get("relu")
    if type(relu) is not nn.ReLU:
        return f"relu is a {type(relu).__name__}, not a ReLU"
    return _touched("relu", relu) or (tuple(units), children)


def _touched(name: str, child: nn.Module) -> str | None:
    attributes = child.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return f"a hook on {name}"
    return replaced_on_child(name, attributes)


def _of_type(name: str, child: nn.Module | None, expected: type[nn.Module]) -> str | None:
    if type(child) is expected:
        return _touched(name, child)
    if child is not None and hasattr(child, "parametrizations"):
        return f"a parametrization on {name}"
    return f"{name} is a {type(child).__name__}, not a {expected.__name__}"


def _unit(conv_name: str, conv: Any, norm_name: str, norm: Any) -> Unit | str:
    """A convolution and its norm, or why they cannot be fused."""
    reason = _of_type(conv_name, conv, nn.Conv2d) or _of_type(norm_name, norm, nn.BatchNorm2d)
    if reason is not None:
        return reason
    convolution = _convolution(conv_name, conv)
    if isinstance(convolution, str):
        return convolution
    vectors = _vectors(norm_name, norm)
    if isinstance(vectors, str):
        return vectors
    batch_statistics = bool(norm.training) or vectors[2] is None
    update = bool(norm.training and norm.track_running_stats)
    batches = _counter(norm_name, norm, vectors[2]) if update else None
    if isinstance(batches, str):
        return batches
    momentum, eps = norm.momentum, norm.eps
    if type(momentum) not in (float, int, type(None)) or type(eps) not in (float, int):
        return f"{norm_name} has a momentum or eps that is not a number"
    if momentum is None and batches is None:
        momentum = 0.0  # as in torch: without a counter nothing is averaged in
    return Unit(conv_name, norm_name, *convolution, *vectors, batches, batch_statistics, update, momentum, eps)


def _convolution(name: str, conv: nn.Conv2d) -> tuple[Tensor, _Pair, _Pair, _Pair, int] | str:
    """Weight, stride, padding, dilation and groups, or why a convolution cannot be fused."""
    parameters = conv.__dict__["_parameters"]
    if parameters.get("bias") is not None:
        return f"{name} has a bias"
    if "bias" not in parameters:
        return f"{name}.bias is not a parameter"
    if conv.padding_mode != "zeros":
        return f"{name} has padding_mode {conv.padding_mode!r}"
    weight = parameters.get("weight")
    reason = _not_plain(weight)
    if reason is not None:
        return f"{name}.weight {reason}"
    if weight.dim() != 4:
        return f"{name}.weight has {weight.dim()} dimensions, not 4"
    pairs: list[_Pair] = []
    for option, value, least in (
        ("stride", conv.stride, 1),
        ("padding", conv.padding, 0),
        ("dilation", conv.dilation, 1),
    ):
        pair = _as_pair(value)
        if pair is None or min(pair) < least:
            return f"{name} has {option} {value!r}"
        pairs.append(pair)
    if type(conv.groups) is not int or conv.groups < 1:
        return f"{name} has groups {conv.groups!r}"
    return weight, pairs[0], pairs[1], pairs[2], conv.groups


def _as_pair(value: Any) -> _Pair | None:
    """What torch's convolution takes for two integers: one, or a sequence of one or two."""
    if type(value) is int:
        return value, value
    if not isinstance(value, tuple | list) or not all(type(item) is int for item in value):
        return None
    if len(value) == 1:
        return value[0], value[0]
    return (value[0], value[1]) if len(value) == 2 else None


def _vectors(
    name: str, norm: nn.BatchNorm2d
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | str:
    """Weight, bias, running mean and variance of a norm, or why it cannot be fused.

    Running statistics that a call neither reads nor updates may be missing, as in torch.
    """
    attributes = norm.__dict__
    parameters, buffers = attributes["_parameters"], attributes["_buffers"]
    if "weight" not in parameters or "bias" not in parameters:
        return f"{name} has a weight or bias that is not a parameter"
    if "running_mean" not in buffers or "running_var" not in buffers:
        if not norm.training or norm.track_running_stats:
            return f"{name} has a running_mean or running_var that is not a buffer"
        running_mean = running_var = None
    else:
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    vectors = (parameters["weight"], parameters["bias"], running_mean, running_var)
    for field, vector in zip(_VECTORS, vectors, strict=True):
        reason = None if vector is None else _not_plain(vector) or _no_vector(vector)
        if reason is not None:
            return f"{name}.{field} {reason}"
    if (running_mean is None) != (running_var is None):
        return f"{name} has only one of running_mean and running_var"
    return vectors


def _no_vector(tensor: Tensor) -> str | None:
    if tensor.dim() != 1:
        return f"has {tensor.dim()} dimensions, not 1"
    return None if tensor.is_contiguous() else "is not contiguous"


def _counter(name: str, norm: nn.BatchNorm2d, running_mean: Tensor | None) -> Tensor | str | None:
    """The counter of a norm that updates its statistics, or why it cannot be fused."""
    buffers = norm.__dict__["_buffers"]
    if "num_batches_tracked" not in buffers:
        return f"{name}.num_batches_tracked is not a buffer"
    batches = buffers["num_batches_tracked"]
    if batches is None:
        return None
    reason = _not_plain(batches)
    if reason is not None:
        return f"{name}.num_batches_tracked {reason}"
    if batches.dtype is not torch.int64:
        return f"{name}.num_batches_tracked is {batches.dtype}, not torch.int64"
    if batches.dim() != 0:
        return f"{name}.num_batches_tracked has {batches.dim()} dimensions, not 0"
    if running_mean is not None and batches.device != running_mean.device:
        return f"{name}.num_batches_tracked is on {batches.device}, running_mean on {running_mean.device}"
    result: Tensor = batches
    return result


def _not_plain(tensor: Any) -> str | None:
    """Why kernels cannot read a tensor by its address: a subclass, another layout, values that are not in memory."""
    if type(tensor) not in _PLAIN_TENSORS:
        return f"is a {type(tensor).__name__}"
    if torch.compiler.is_compiling():
        return None
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}"
    if tensor.is_neg() or tensor._is_zerotensor():
        return "is lazily negated or zero"
    return None


# What the fused max-pool does: windows of 3x3, stride 2, padding 1.
_POOLING = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}


def _maxpool(child: nn.Module | None) -> str | None:
    reason = _of_type("maxpool", child, nn.MaxPool2d)
    if reason is not None:
        return reason
    for option, expected in _POOLING.items():
        value = getattr(child, option)
        if _pair(value) != expected:
            return f"maxpool has {option} {value}, not {expected[0]}"
    for option in ("ceil_mode", "return_indices"):
        if getattr(child, option):
            return f"maxpool has {option}"
    return None

"""What a residual block or a stem consists of, and whether every part is plain enough to be fused.

Read once at every call: what is checked here is what runs, whatever another thread does to the module meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.utils import _pair
from torch.nn.parameter import Parameter

from fusedres.autograd import ConvBN
from fusedres.modules.genuine import replaced_code, replaced_on_block, replaced_on_child
from fusedres.modules.shortcut import ZeroPadShortcut

SHARDED = "is a DTensor"  # the end of a reason that holds between calls only, where fully_shard gathers parameters
_VECTORS = ("weight", "bias", "running_mean", "running_var")
_Pair = tuple[int, int]
_Check = Callable[[Any], str | None]  # of a tensor: why kernels cannot read it, None where they can


class Unit(NamedTuple):
    """A convolution without bias and the BatchNorm after it, as they are now."""

    conv_name: str
    norm_name: str
    settings: ConvBN
    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


class Anatomy(NamedTuple):
    """The parts of a block; a stem has one unit and no shortcut."""

    units: tuple[Unit, ...]
    projection: Unit | None = None
    zero_pad: ZeroPadShortcut | None = None


_BASIC = (("conv1", "bn1"), ("conv2", "bn2"))
_NAMES_OF = {
    (): (),
    _BASIC[:1]: ("conv1", "bn1", "relu", "maxpool"),
    _BASIC: ("conv1", "bn1", "conv2", "bn2", "relu"),
    (*_BASIC, ("conv3", "bn3")): ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "relu"),
}


class Parts(NamedTuple):
    """torchvision's class of a block, and the names of its convolutions, each with its norm's."""

    base: type[nn.Module] | None
    units: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the children that every call reaches."""
        return _NAMES_OF[self.units]


_Common = tuple[tuple[Unit, ...], dict[str, Any], _Check]


def block_anatomy(block: nn.Module, cls: type[nn.Module], parts: Parts) -> Anatomy | str:
    """The block's parts, or why it must run unfused: the stock class's forward then runs.

    Fused ops bypass the children's own code, so anything that changes a child's behaviour counts: another type, a
    hook, a replaced method, a parametrization, a tensor subclass, an option that no kernel has.
    """
    common = _common(block, cls, parts)
    if isinstance(common, str):
        return common
    units, children, not_plain = common
    downsample = children.get("downsample")
    if downsample is None:
        return Anatomy(units)
    reason = touched("downsample", downsample)
    if reason is not None:
        return reason
    if type(downsample) is ZeroPadShortcut:
        return Anatomy(units, None, downsample)
    inner = tuple(downsample.__dict__["_modules"].values()) if type(downsample) is nn.Sequential else ()
    if len(inner) != 2:
        return f"downsample is a {type(downsample).__name__} other than convolution + BatchNorm or ZeroPadShortcut"
    projection = _unit("downsample.0", inner[0], "downsample.1", inner[1], not_plain)
    return projection if isinstance(projection, str) else Anatomy(units, projection)


def stem_anatomy(model: nn.Module, cls: type[nn.Module], parts: Parts) -> Anatomy | str:
    """The stem of a ResNet (conv1, bn1, relu, maxpool), or why it must run unfused."""
    common = _common(model, cls, parts)
    if isinstance(common, str):
        return common
    units, children, _ = common
    return _maxpool(children.get("maxpool")) or Anatomy(units)


def _common(
    block: nn.Module, cls: type[nn.Module], parts: Parts
) -> tuple[tuple[Unit, ...], dict[str, Any], _Check] | str:
    """The units of the branch, all children, and what checks a tensor; or why not."""
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    reason = replaced_code(cls, parts.base) or replaced_on_block(block.__dict__) or shadowed(block, cls, parts)
    if reason is not None:
        return reason
    children = block.__dict__["_modules"]
    not_plain = _other_kind if torch.compiler.is_compiling() else _other_kind_or_lazy
    units: list[Unit] = []
    for conv_name, norm_name in parts.units:
        unit = _unit(conv_name, children.get(conv_name), norm_name, children.get(norm_name), not_plain)
        if isinstance(unit, str):
            return unit
        units.append(unit)
    relu = children.get("relu")
    if type(relu) is not nn.ReLU:
        return f"relu is a {type(relu).__name__}, not a ReLU"
    return touched("relu", relu) or (tuple(units), children, not_plain)


def shadowed(block: nn.Module, cls: type[nn.Module], parts: Parts) -> str | None:
    """Which child is not the one that Python finds by its name: an attribute of the instance or of the class is."""
    attributes = block.__dict__
    if attributes.get("downsample") is not None:  # None lies there where a block has none
        return "downsample is no module"
    for name in parts.names:
        if name in attributes or hasattr(cls, name):
            return f"{name} is an attribute of the {'instance' if name in attributes else 'class'}"
    return "downsample is an attribute of the class" if hasattr(cls, "downsample") else None


def touched(name: str, child: nn.Module) -> str | None:
    """Which hook or method of its own a child has."""
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
        return touched(name, child)
    if child is not None and hasattr(child, "parametrizations"):
        return f"a parametrization on {name}"
    return f"{name} is a {type(child).__name__}, not a {expected.__name__}"


def _unit(conv_name: str, conv: Any, norm_name: str, norm: Any, not_plain: _Check) -> Unit | str:
    """A convolution and its norm, or why they cannot be fused."""
    reason = _of_type(conv_name, conv, nn.Conv2d) or _of_type(norm_name, norm, nn.BatchNorm2d)
    if reason is not None:
        return reason
    convolution = _convolution(conv_name, conv.__dict__, not_plain)
    if type(convolution) is str:
        return convolution
    conv_weight, stride, padding, dilation, groups, pixelwise = convolution
    attributes = norm.__dict__
    training, tracks = bool(attributes["training"]), bool(attributes["track_running_stats"])
    vectors = _vectors(norm_name, attributes, not training or tracks, not_plain)
    if type(vectors) is str:
        return vectors
    update = training and tracks
    batches = _counter(norm_name, attributes["_buffers"], vectors[2], not_plain) if update else None
    if type(batches) is str:
        return batches
    momentum, eps = attributes["momentum"], attributes["eps"]
    if type(eps) is not float and type(eps) is not int:
        return f"{norm_name} has eps {eps!r}"
    if momentum is None:
        momentum = 0.0 if batches is None else None  # as in torch: without a counter nothing is averaged in
    elif type(momentum) is not float and type(momentum) is not int:
        return f"{norm_name} has momentum {momentum!r}"
    weight, bias, mean, var = vectors
    statistics = (training or mean is None, update, momentum, eps)
    settings = ConvBN(stride, padding, dilation, groups, pixelwise, *statistics)
    return Unit(conv_name, norm_name, settings, conv_weight, weight, bias, mean, var, batches)


def _convolution(name: str, attributes: dict[str, Any], not_plain: _Check) -> Any:
    """Weight, stride, padding, dilation, groups, and whether it is pixelwise; or a text: why it cannot be fused."""
    parameters = attributes["_parameters"]
    if "weight" in attributes or "bias" in attributes:
        return f"{name} has a weight or bias that is no parameter"
    if parameters.get("bias", name) is not None:
        return f"{name} has a bias" if "bias" in parameters else f"{name}.bias is not a parameter"
    if attributes["padding_mode"] != "zeros":
        return f"{name} has padding_mode {attributes['padding_mode']!r}"
    weight = parameters.get("weight")
    reason = not_plain(weight)
    if reason is not None:
        return f"{name}.weight {reason}"
    if weight.dim() != 4:
        return f"{name}.weight has {weight.dim()} dimensions, not 4"
    stride = _as_pair(attributes["stride"], 1)
    padding = _as_pair(attributes["padding"], 0)
    dilation = _as_pair(attributes["dilation"], 1)
    groups = attributes["groups"]
    if stride is None or padding is None or dilation is None or type(groups) is not int or groups < 1:
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        wrong = next((option for option, pair in options.items() if pair is None), "groups")
        return f"{name} has {wrong} {attributes[wrong]!r}"
    pixelwise = groups == 1 and padding == (0, 0) and stride[0] == stride[1] and weight.shape[2] == weight.shape[3] == 1
    return weight, stride, padding, dilation, groups, pixelwise


def _as_pair(value: Any, least: int) -> _Pair | None:
    """What torch's convolution takes for two integers: one, or a sequence of one or two; None for all else."""
    if type(value) is int:
        value = (value, value)
    elif type(value) is list or (type(value) is tuple and len(value) == 1):
        value = tuple(value) if len(value) == 2 else (*value, *value)
    if type(value) is not tuple or len(value) != 2:
        return None
    first, second = value
    if type(first) is not int or type(second) is not int or first < least or second < least:
        return None
    return value


def _vectors(name: str, attributes: dict[str, Any], reads_statistics: bool, not_plain: _Check) -> Any:
    """Weight, bias, running mean and variance of a norm, or a text: why it cannot be fused.

    Running statistics that a call neither reads nor updates may be missing, as in torch.
    """
    parameters, buffers = attributes["_parameters"], attributes["_buffers"]
    if "weight" not in parameters or "bias" not in parameters or "weight" in attributes or "bias" in attributes:
        return f"{name} has a weight or bias that is not a parameter"
    if "running_mean" in attributes or "running_var" in attributes or "num_batches_tracked" in attributes:
        return f"{name} has a running_mean, running_var or num_batches_tracked that is not a buffer"
    if "running_mean" not in buffers or "running_var" not in buffers:
        if reads_statistics:
            return f"{name} has a running_mean or running_var that is not a buffer"
        buffers = {}
    weight, bias = parameters["weight"], parameters["bias"]
    mean, var = buffers.get("running_mean"), buffers.get("running_var")
    for tensor in (weight, bias, mean, var):
        if tensor is not None and (not_plain(tensor) is not None or tensor.dim() != 1 or not tensor.is_contiguous()):
            fields = zip(_VECTORS, (weight, bias, mean, var), strict=True)
            field = next(field for field, found in fields if found is tensor)
            return f"{name}.{field} {not_plain(tensor) or 'is no contiguous vector'}"
    if (mean is None) != (var is None):
        return f"{name} has only one of running_mean and running_var"
    return weight, bias, mean, var


def _counter(name: str, buffers: dict[str, Any], running_mean: Tensor | None, not_plain: _Check) -> Any:
    """The counter of a norm that updates its statistics, or a text: why it cannot be fused."""
    if "num_batches_tracked" not in buffers:
        return f"{name}.num_batches_tracked is not a buffer"
    batches = buffers["num_batches_tracked"]
    if batches is None:
        return None
    reason = not_plain(batches)
    if reason is None and batches.dtype is not torch.int64:
        reason = f"is {batches.dtype}, not torch.int64"
    if reason is None and batches.dim() != 0:
        reason = f"has {batches.dim()} dimensions, not 0"
    if reason is None and running_mean is not None and batches.device != running_mean.device:
        reason = f"is on {batches.device}, running_mean on {running_mean.device}"
    return batches if reason is None else f"{name}.num_batches_tracked {reason}"


def _other_kind(tensor: Any) -> str | None:
    """Why a tensor is no plain one, by its class."""
    kind = type(tensor)
    return None if kind is Parameter or kind is Tensor or kind is nn.Buffer else f"is a {kind.__name__}"


def _other_kind_or_lazy(tensor: Any) -> str | None:
    """Why kernels cannot read a tensor by its address: a subclass, another layout, values that are not in memory."""
    kind = type(tensor)
    if kind is not Parameter and kind is not Tensor and kind is not nn.Buffer:
        return f"is a {kind.__name__}"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}"
    return "is lazily negated or zero" if tensor.is_neg() or tensor._is_zerotensor() else None


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

"""What a residual block consists of, and whether every part is plain enough to be fused. Checked at every call."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.utils import _pair
from torch.nn.parameter import Parameter

from fusedres.modules.shortcut import ZeroPadShortcut

_PLAIN_TENSORS = (Parameter, torch.Tensor, nn.Buffer)


def unusual(block: nn.Module, convs: tuple[str, ...], norms: tuple[str, ...]) -> str | None:
    """Why this block must run unfused, or None.

    Fused ops bypass the children's own forward, so anything that changes a child's behaviour counts: another type, a
    hook, a forward of the instance, a parametrization, a tensor subclass, an option that no kernel has.
    """
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    children = block.__dict__["_modules"]
    for name in convs:
        reason = _conv(name, children.get(name))
        if reason is not None:
            return reason
    for name in norms:
        reason = _norm(name, children.get(name))
        if reason is not None:
            return reason
    relu = children.get("relu")
    if type(relu) is not nn.ReLU:
        return f"relu is a {type(relu).__name__}, not a ReLU"
    reason = _touched("relu", relu)
    if reason is not None:
        return reason
    return _downsample(children.get("downsample"))


def unusual_stem(model: nn.Module) -> str | None:
    """Why the stem of this ResNet (conv1, bn1, relu, maxpool) must run unfused, or None."""
    reason = unusual(model, ("conv1",), ("bn1",))
    return reason or _maxpool(model.__dict__["_modules"].get("maxpool"))


def _touched(name: str, child: nn.Module) -> str | None:
    attributes = child.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return f"a hook on {name}"
    if "forward" in attributes:
        return f"{name}.forward is replaced on the instance"
    return None


def _of_type(name: str, child: nn.Module | None, expected: type[nn.Module]) -> str | None:
    if type(child) is expected:
        return _touched(name, child)
    if child is not None and hasattr(child, "parametrizations"):
        return f"a parametrization on {name}"
    return f"{name} is a {type(child).__name__}, not a {expected.__name__}"


def _conv(name: str, child: nn.Module | None) -> str | None:
    reason = _of_type(name, child, nn.Conv2d)
    if reason is not None:
        return reason
    assert isinstance(child, nn.Conv2d)
    parameters = child.__dict__["_parameters"]
    if parameters.get("bias") is not None:
        return f"{name} has a bias"
    if child.padding_mode != "zeros":
        return f"{name} has padding_mode {child.padding_mode!r}"
    if isinstance(child.padding, str):
        return f"{name} has padding {child.padding!r}"
    if type(parameters.get("weight")) not in _PLAIN_TENSORS:
        return f"{name}.weight is a {type(parameters.get('weight')).__name__}"
    return None


def _norm(name: str, child: nn.Module | None) -> str | None:
    reason = _of_type(name, child, nn.BatchNorm2d)
    if reason is not None:
        return reason
    assert child is not None
    parameters = child.__dict__["_parameters"]
    buffers = child.__dict__["_buffers"]
    for tensor in (parameters.get("weight"), parameters.get("bias"), buffers["running_mean"], buffers["running_var"]):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TENSORS:
            return f"{name} holds a {type(tensor).__name__}"
        if not tensor.is_contiguous():
            return f"{name} holds a vector that is not contiguous"
    if (buffers["running_mean"] is None) != (buffers["running_var"] is None):
        return f"{name} has only one of running_mean and running_var"
    return None


def _downsample(child: nn.Module | None) -> str | None:
    if child is None:
        return None
    if type(child) is ZeroPadShortcut:
        return _touched("downsample", child)
    if type(child) is not nn.Sequential or len(child) != 2:
        return f"downsample is a {type(child).__name__} other than convolution + BatchNorm or ZeroPadShortcut"
    inner = child.__dict__["_modules"]
    conv, norm = inner.values()
    return _touched("downsample", child) or _conv("downsample.0", conv) or _norm("downsample.1", norm)


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

"""Checks whether the code that a fused block bypasses is still torch's and torchvision's own.

A fused block does not call its children. If somebody replaces `Conv2d._conv_forward`, `BatchNorm2d.forward` or a
block's forward, on the class or on one instance, before or after fuse(), the replacement must run: such blocks run
their stock forward. Each call compares the classes with their state when this module was imported.
"""

from __future__ import annotations

from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fusedres.modules.shortcut import ZeroPadShortcut


class _Bypassed:
    """Holds everything that calls of a block's or a stem's children reach, so that one attrgetter reads all of it."""

    Module, Conv2d, BatchNorm2d, SyncBatchNorm, ReLU = nn.Module, nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU
    MaxPool2d, Sequential, Identity = nn.MaxPool2d, nn.Sequential, nn.Identity
    BatchNorm1d, LeakyReLU, PReLU, SiLU = nn.BatchNorm1d, nn.LeakyReLU, nn.PReLU, nn.SiLU
    Hardswish, GELU = nn.Hardswish, nn.GELU
    ZeroPadShortcut = ZeroPadShortcut
    DenseLayer = _DenseLayer
    functional, torch = nn.functional, torch


def _methods(*classes: str) -> tuple[str, ...]:
    return tuple(f"{cls}.{method}" for cls in classes for method in ("forward", "__call__"))


_OF_UNITS = (
    "Module._call_impl",
    *_methods("Conv2d", "BatchNorm2d", "SyncBatchNorm", "ReLU"),
    "Conv2d._conv_forward",
    "BatchNorm2d._check_input_dim",
    "functional.conv2d",
    "functional.batch_norm",
    "functional._verify_batch_size",
    "functional.relu",
    "torch.batch_norm",
    "torch.relu",
    "torch.relu_",
)
# Also the other norms and activations of a tail, and of the step between two convolutions.
_OF_TAILS = (
    *_OF_UNITS,
    *_methods("BatchNorm1d", "Identity", "LeakyReLU", "PReLU", "SiLU", "Hardswish", "GELU"),
    *(f"functional.{name}" for name in ("leaky_relu", "prelu", "silu", "hardswish", "gelu")),
)
_OF_STEMS = (*_OF_UNITS, *_methods("MaxPool2d"), "functional.max_pool2d", "torch.max_pool2d")
_OF_BLOCKS = (*_OF_UNITS, *_methods("Sequential"), "ZeroPadShortcut.forward", "torch.Tensor.__iadd__")
_OF_READ_BLOCKS = (*_OF_BLOCKS, *_methods("Identity"), "torch.Tensor.__add__", "torch.add")
_OF_DENSE_BLOCKS = (*_OF_UNITS, *_methods("DenseLayer"), "DenseLayer.bn_function", "torch.cat")
_BYPASSED = {
    None: _OF_STEMS,
    ResNet: _OF_STEMS,
    BasicBlock: _OF_BLOCKS,
    Bottleneck: _OF_BLOCKS,
    _DenseBlock: _OF_DENSE_BLOCKS,
    _Transition: _OF_UNITS,
    nn.Module: _OF_READ_BLOCKS,  # a block of another class, which tracing.py has read
}

# What a call of a block or a ResNet itself reaches, from the fused class: its call, and the stock class's methods.
_CALL = ("__call__", "_call_impl")
_STOCK_METHODS = {
    None: _CALL,
    nn.Module: _CALL,
    BasicBlock: (*_CALL, "_stock.forward"),
    Bottleneck: (*_CALL, "_stock.forward"),
    ResNet: (*_CALL, "_stock.forward", "_stock._forward_impl"),
    _DenseBlock: (*_CALL, "_stock.forward", "items"),
    _Transition: (*_CALL, "_stock.forward", "__iter__"),
}

# Methods that may be replaced on an instance of a child or of a block.
_CHILD_METHODS = ("forward", "_call_impl", "_compiled_call_impl", "_conv_forward", "_check_input_dim")
_BLOCK_METHODS = ("forward", "_call_impl", "_forward_impl")


_BUILTIN = (BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType)


def _own(function: Any) -> Any:
    """Return the function, or an object equal to no function if it was replaced before this module was imported."""
    if not isinstance(function, FunctionType):
        return function if isinstance(function, _BUILTIN) else object()
    homes = {function.__globals__["__name__"].partition(".")[0], function.__module__.partition(".")[0]}
    own = homes <= {"torch", "torchvision", "fusedres"} and not hasattr(function, "__wrapped__")
    return function if own else object()


def _own_of(base: type[nn.Module] | None, names: tuple[str, ...]) -> tuple[Any, ...]:
    owner = nn.Module if base is None else base
    return tuple(_own(getattr(owner, name.removeprefix("_stock."))) for name in names)


_read = {base: attrgetter(*names) for base, names in _BYPASSED.items()}
_OWN = {base: tuple(map(_own, read(_Bypassed))) for base, read in _read.items()}
_read_stock = {base: attrgetter(*names) for base, names in _STOCK_METHODS.items()}
_OWN_STOCK = {base: _own_of(base, names) for base, names in _STOCK_METHODS.items()}


def replaced_code(cls: type[nn.Module], base: type[nn.Module] | None) -> str | None:
    """Return which code that a fused block bypasses was replaced, or None.

    Args:
        cls: the fused block's class; its attribute _stock is the class with the unfused forward.
        base: torchvision's BasicBlock, Bottleneck or ResNet, if both descend from one of them; nn.Module: a block of
            another class, whose own forward parts.py checks; None: a stem of another class.
    """
    if (
        not torch.compiler.is_compiling()
        and _read[base](_Bypassed) == _OWN[base]
        and _read_stock[base](cls) == _OWN_STOCK[base]
    ):
        return None
    return _first_replaced(cls, base)


def replaced_forward(cls: Any) -> str | None:
    """Return that somebody replaced the forward of the torchvision class of a fused block, or None."""
    base = cls._base
    if base not in (BasicBlock, Bottleneck):
        return None
    return _named(cls, ("_stock.forward",), _OWN_STOCK[base][-1:])


_read_units = attrgetter(*_OF_UNITS)
_OWN_OF_UNITS = tuple(map(_own, _read_units(_Bypassed)))


def replaced_in_units() -> str | None:
    """Return which code of a convolution, a BatchNorm or a ReLU was replaced, or None."""
    return None if _read_units(_Bypassed) == _OWN_OF_UNITS else _named(_Bypassed, _OF_UNITS, _OWN_OF_UNITS)


_read_tails = attrgetter(*_OF_TAILS)
_OWN_OF_TAILS = tuple(map(_own, _read_tails(_Bypassed)))


def replaced_in_tails() -> str | None:
    """Return which code of a unit, or of another norm or activation of a tail, was replaced, or None."""
    return None if _read_tails(_Bypassed) == _OWN_OF_TAILS else _named(_Bypassed, _OF_TAILS, _OWN_OF_TAILS)


_OF_SEQUENTIALS = ("Module._call_impl", *_methods("Sequential"))
_read_sequentials = attrgetter(*_OF_SEQUENTIALS)
_OWN_OF_SEQUENTIALS = tuple(map(_own, _read_sequentials(_Bypassed)))


def is_transparent(name: str, module: Any, kind: type[nn.Sequential] = nn.Sequential) -> bool:
    """Whether a module is of this kind, which only calls its children, and nothing observes its call."""
    if type(module) is not kind or nn_module._has_any_global_hook() or touched(name, module) is not None:
        return False
    return bool(_read_sequentials(_Bypassed) == _OWN_OF_SEQUENTIALS)


@torch.compiler.assume_constant_result
def _first_replaced(cls: Any, base: type[nn.Module] | None) -> str | None:
    """Return which code was replaced, in words, or None; compiled code keeps the answer from its compilation."""
    found = _named(_Bypassed, _BYPASSED[base], _OWN[base])
    if found is not None:
        return found
    found = _named(cls, _STOCK_METHODS[base], _OWN_STOCK[base])
    return None if found is None else f"{cls._stock.__qualname__}.{found.removeprefix('_stock.')}"


def _named(owner: Any, names: tuple[str, ...], own: tuple[Any, ...]) -> str | None:
    """Return the first of the owner's attributes that was replaced, in words, or None."""
    for name, function in zip(names, own, strict=True):
        found = attrgetter(name)(owner)
        if found is not function:
            by = f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', type(found).__name__)}"
            return f"{name} is replaced by {by}"
    return None


def touched(name: str, child: nn.Module) -> str | None:
    """Return that a child has a hook, or which of its methods is replaced on the instance; else None."""
    attributes = child.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        return f"a hook on {name}"
    for method in _CHILD_METHODS:
        if method in attributes:
            return f"{name}.{method} is replaced on the instance"
    return None


def replaced_on_block(attributes: dict[str, Any]) -> str | None:
    """Return which method of a block or a ResNet is replaced on the instance, or None; attributes: its __dict__."""
    for method in _BLOCK_METHODS:
        if method in attributes:
            return f"{method} is replaced on the instance"
    return None


@torch.compiler.assume_constant_result
def class_attribute(cls: type[nn.Module], names: tuple[str, ...]) -> str | None:
    """Return which of the children's names is also an attribute of a class, or None: Python finds that one first."""
    for owner in cls.__mro__:
        if not owner.__dict__.keys().isdisjoint(names):
            name = next(name for name in names if name in owner.__dict__)
            return f"{name} is an attribute of the class {owner.__qualname__}"
    return None

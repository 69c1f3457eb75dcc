"""Whether the code that a fused block bypasses is torch's and torchvision's own, or somebody replaced it.

A fused block does not call its children. Whoever replaces `Conv2d._conv_forward`, `BatchNorm2d.forward` or a block's
forward, on the class or on one instance, before or after fuse(), means the replacement to run: such blocks run their
stock forward. Classes are compared at every call with what they had when this module was imported.
"""

from __future__ import annotations

from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

# What calling the children of a block and of a stem reaches, below torch.
_CLASSES = ("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Sequential")
_NAMES = (
    *(f"nn.{cls}.{method}" for cls in _CLASSES for method in ("forward", "__call__", "_call_impl")),
    "nn.Conv2d._conv_forward",
    "nn.BatchNorm2d._check_input_dim",
    *(f"nn.functional.{function}" for function in ("conv2d", "batch_norm", "relu", "max_pool2d")),
    *("conv2d", "batch_norm", "relu", "relu_"),
)
_read = attrgetter(*_NAMES)

# What a block's or a ResNet's own call reaches.
_STOCK_METHODS = {BasicBlock: ("forward",), Bottleneck: ("forward",), ResNet: ("forward", "_forward_impl")}

# What an instance may have replaced: a child, and a block.
_CHILD_METHODS = ("forward", "_call_impl", "_compiled_call_impl", "_conv_forward", "_check_input_dim")
_BLOCK_METHODS = ("forward", "_call_impl", "_forward_impl")


def _own(function: Any) -> Any:
    """The function, or what equals nothing where somebody had replaced it before this module was imported."""
    home = function.__globals__["__name__"] if isinstance(function, FunctionType) else "torch"
    return function if home.partition(".")[0] in ("torch", "torchvision") else object()


_OWN = tuple(map(_own, _read(torch)))
_OWN_CALL, _OWN_CALL_IMPL = _own(nn.Module.__call__), _own(nn.Module._call_impl)
_OWN_STOCK = {
    stock: tuple((name, _own(getattr(stock, name))) for name in names) for stock, names in _STOCK_METHODS.items()
}


def replaced_code(cls: type[nn.Module], stock: type[nn.Module], base: type[nn.Module] | None) -> str | None:
    """What was replaced of the code that a fused block bypasses, None where nothing was.

    Args:
        cls: the fused block's class.
        stock: the class of its forward when it runs unfused.
        base: torchvision's BasicBlock, Bottleneck or ResNet, from which both descend, if they do.
    """
    if not torch.compiler.is_compiling() and (
        _read(torch) == _OWN
        and cls.__call__ is _OWN_CALL
        and cls._call_impl is _OWN_CALL_IMPL
        and (base is None or all(getattr(stock, name) is function for name, function in _OWN_STOCK[base]))
    ):
        return None
    return _first_replaced(cls, stock, base)


@torch.compiler.assume_constant_result
def _first_replaced(cls: type[nn.Module], stock: type[nn.Module], base: type[nn.Module] | None) -> str | None:
    """What was replaced, in words; compiled code keeps what it was compiled with."""
    calls = (("__call__", _OWN_CALL), ("_call_impl", _OWN_CALL_IMPL))
    methods = () if base is None else _OWN_STOCK[base]
    prefix = f"{stock.__qualname__}."
    found = _named(torch, tuple(zip(_NAMES, _OWN, strict=True)), "torch.")
    return found or _named(stock, methods, prefix) or _named(cls, calls, prefix)


def _named(owner: Any, own: tuple[tuple[str, Any], ...], prefix: str) -> str | None:
    """The first of the owner's attributes that is not its own, in words."""
    for name, function in own:
        found = attrgetter(name)(owner)
        if found is not function:
            by = f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', type(found).__name__)}"
            return f"{prefix}{name} is replaced by {by}"
    return None


def replaced_on_child(name: str, attributes: dict[str, Any]) -> str | None:
    """Which method of a child is replaced on the instance, of its __dict__."""
    if (
        "forward" in attributes
        or "_call_impl" in attributes
        or "_compiled_call_impl" in attributes
        or "_conv_forward" in attributes
        or "_check_input_dim" in attributes
    ):
        found = next(method for method in _CHILD_METHODS if method in attributes)
        return f"{name}.{found} is replaced on the instance"
    return None


def replaced_on_block(attributes: dict[str, Any]) -> str | None:
    """Which method of a block or a ResNet is replaced on the instance, of its __dict__."""
    if "forward" in attributes or "_call_impl" in attributes or "_forward_impl" in attributes:
        found = next(method for method in _BLOCK_METHODS if method in attributes)
        return f"{found} is replaced on the instance"
    return None

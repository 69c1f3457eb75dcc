"""Collects from the modules of a block or a stem every object that a call depends on, and why it may not run fused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.utils import _pair

from fusedres.modules.anatomy import ABSENT, Filters, Gathered, RawUnit, ZeroPad
from fusedres.modules.frozen_norm import DEFAULT_EPS, is_frozen_norm
from fusedres.modules.genuine import class_attribute, replaced_code, replaced_on_block, touched
from fusedres.modules.parts import Parts, UnitPaths, at, changed, dropping
from fusedres.modules.shortcut import AvgPoolShortcut, ZeroPadShortcut

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def gather(block: nn.Module, cls: Any, parts: Parts) -> Gathered | str:
    """Return what a call of a block or a stem depends on, or why it must run unfused, by the stock class's forward.

    Fused ops bypass the children's own code, so everything that changes a child's behaviour is a reason: another type,
    a hook, a replaced method, a parametrization, or an attribute that Python finds instead of the child.

    Args:
        cls: the fused class of the block.
    """
    if not parts.units:
        return "it was not read"
    reason = reason_of_code(block, cls, cls._base, parts)
    return gather_parts(block, parts) if reason is None else reason


def reason_of_code(block: nn.Module, cls: Any, base: type[nn.Module] | None, parts: Parts) -> str | None:
    """Return which code of a block, or around its parts, would be bypassed and is not as it was read, or None.

    Args:
        cls, base: see replaced_code.
    """
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    return (
        replaced_code(cls, base)
        or replaced_on_block(block.__dict__)
        or hidden(block, cls, parts.names)
        or changed(block, cls, parts)
    )


def gather_parts(block: nn.Module, parts: Parts) -> Gathered | str:
    """Return the objects of the parts, or which part is not plain."""
    find: Callable[[str], Any] = partial(at, block) if parts.nested else block.__dict__["_modules"].get
    units: list[RawUnit] = []
    for conv_name, norm_name, _ in parts.units:
        unit = gather_unit(conv_name, norm_name, find(conv_name), find(norm_name))
        if isinstance(unit, str):
            return unit
        units.append(unit)
    for path in parts.relus:
        reason = _of_type(path, find(path), nn.ReLU)
        if reason is not None:
            return reason
    if parts.maxpool is not None:
        reason = refuse_maxpool(parts.maxpool, at(block, parts.maxpool))
        if reason is not None:
            return reason
    return _gather_shortcut(block, tuple(units), parts)


def gather_unit(conv_name: str, norm_name: str, conv: Any, norm: Any) -> RawUnit | str:
    """Return a convolution and its norm, or why they cannot be fused; norm: None if there is none."""
    kind = type(norm)
    reason = _of_type(conv_name, conv, nn.Conv2d)
    if reason is None and norm is not None:
        known = kind is nn.BatchNorm2d or kind is nn.SyncBatchNorm or is_frozen_norm(kind)
        reason = touched(norm_name, norm) if known else _of_type(norm_name, norm, nn.BatchNorm2d)
    if reason is not None:
        return reason
    settings = conv.__dict__
    weights = _found(settings, "_parameters")
    return RawUnit(
        conv_name,
        norm_name,
        norm is not None and is_frozen_norm(kind),
        weights.get("weight"),
        weights.get("bias", ABSENT),
        settings["stride"],
        settings["padding"],
        settings["dilation"],
        settings["groups"],
        settings["padding_mode"],
        *(_NO_NORM if norm is None else _gather_norm(norm)),
    )


_NO_NORM = (None, None, None, None, None, False, False, 0.0, 1.0, None)


def _gather_norm(norm: Any) -> tuple[Any, ...]:
    """Return the last fields of RawUnit, from weight on."""
    kind, state = type(norm), norm.__dict__
    frozen = kind is not nn.BatchNorm2d and kind is not nn.SyncBatchNorm
    buffers = _found(state, "_buffers")
    affine = buffers if frozen else _found(state, "_parameters")
    if frozen:
        statistics = (None, False, True, 0.0, state.get("eps", DEFAULT_EPS))
    else:
        batches = buffers.get("num_batches_tracked", ABSENT)
        statistics = (batches, state["training"], state["track_running_stats"], state["momentum"], state["eps"])
    return (
        affine.get("weight", ABSENT),
        affine.get("bias", ABSENT),
        buffers.get("running_mean", ABSENT),
        buffers.get("running_var", ABSENT),
        *statistics,
        _group_of(state) if kind is nn.SyncBatchNorm else None,
    )


def _found(attributes: dict[str, Any], registered: str) -> dict[str, Any]:
    """Return a module's parameters or buffers as Python finds them: it finds a plain attribute of the same name first.

    DataParallel and FullyShardedDataParallel give modules such attributes for each call.
    """
    tensors: dict[str, Any] = attributes[registered]
    for name in _TENSORS:
        if name in attributes:
            tensors = tensors | {name: attributes[name]}
    return tensors


def _group_of(state: dict[str, Any]) -> Any:
    """Return the group of processes whose batches SyncBatchNorm's statistics are of, or None if this is one process."""
    if not (state["training"] and dist.is_available() and dist.is_initialized()):
        return None
    group = state["process_group"] or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _gather_shortcut(block: nn.Module, units: tuple[RawUnit, ...], parts: Parts) -> Gathered | str:
    """Return what a call depends on, with the shortcut's part of it, or why the shortcut cannot be fused."""
    paths: UnitPaths | None = parts.projection
    zero_pad, filters = parts.zero_pad, parts.shortcut_filters
    if parts.downsample is not None:
        found = _look_into(parts.downsample, block.__dict__["_modules"].get(parts.downsample))
        if isinstance(found, str):
            return found
        paths, zero_pad, filters = found
    modules: Filters = ()
    if paths is not None:
        filters = paths.filters
    if parts.filtered or filters:
        before = (*(unit.filters for unit in parts.units), filters)
        modules = tuple(tuple(at(block, path) for path in each) for each in before)
    if zero_pad is not None:
        pad = at(block, zero_pad)
        reason = _of_type(zero_pad, pad, ZeroPadShortcut)
        if reason is not None:
            return reason
        return Gathered(units, None, ZeroPad(pad.in_channels, pad.out_channels, pad.stride), modules)
    if paths is None:
        return Gathered(units, None, None, modules)
    projection = gather_unit(paths.conv, paths.norm, at(block, paths.conv), at(block, paths.norm))
    return projection if isinstance(projection, str) else Gathered(units, projection, None, modules)


_Shortcut = tuple[UnitPaths | None, str | None, tuple[str, ...]]  # projection, ZeroPadShortcut, filters without either


def _look_into(path: str, downsample: Any) -> _Shortcut | str:
    """Return the parts of a torchvision block's shortcut, or why it cannot be fused."""
    if downsample is None:
        return None, None, ()
    reason = touched(path, downsample)
    if reason is not None:
        return reason
    if type(downsample) is ZeroPadShortcut:
        return None, path, ()
    sequential = type(downsample) in (nn.Sequential, AvgPoolShortcut)
    children = downsample.__dict__["_modules"] if sequential else {}
    names = tuple(children)
    if nn.Identity in map(type, children.values()):
        for name, child in children.items():
            reason = dropping(f"{path}.{name}", child) if type(child) is nn.Identity else None
            if reason is not None:
                return reason
        names = tuple(name for name, child in children.items() if type(child) is not nn.Identity)
    if len(names) < 2 or any(type(children[name]) is not nn.AvgPool2d for name in names[:-2]):
        return f"{path} is a {type(downsample).__name__} other than convolution + BatchNorm or ZeroPadShortcut"
    return _paths_of(path, names), None, ()


# A call must find the same objects as the one before (remembered.py).
_paths: dict[tuple[str, tuple[str, ...]], UnitPaths] = {}


def _paths_of(path: str, names: tuple[str, ...]) -> UnitPaths:
    """Return the paths of a shortcut's filters, convolution and norm."""
    found = _paths.get((path, names))
    if found is None:
        *filters, conv, norm = (f"{path}.{name}" for name in names)
        found = UnitPaths(conv, norm, tuple(filters))
        if not torch.compiler.is_compiling():
            _paths[path, names] = found
    return found


def hidden(block: nn.Module, cls: type[nn.Module], names: tuple[str, ...]) -> str | None:
    """Return which child an attribute of the instance or of a class hides, in words, or None."""
    attributes = block.__dict__
    for name in names:
        if name in attributes and attributes[name] is not None:  # a block without downsample may have None there
            return f"{name} is an attribute of the instance, not a module"
    return class_attribute(cls, names)


def _of_type(name: str, child: nn.Module | None, expected: type[nn.Module]) -> str | None:
    if type(child) is expected:
        return touched(name, child)
    if child is not None and hasattr(child, "parametrizations"):
        return f"a parametrization on {name}"
    return f"{name} is a {type(child).__name__}, not a {expected.__name__}"


# The only max-pool that is fused: 3x3 windows, stride 2, padding 1.
_POOLING = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}


def refuse_maxpool(name: str, child: nn.Module | None) -> str | None:
    """Return why a max-pool is not the one that is fused, or None if it is."""
    reason = _of_type(name, child, nn.MaxPool2d)
    if reason is not None:
        return reason
    for option, expected in _POOLING.items():
        value = getattr(child, option)
        if _pair(value) != expected:
            return f"{name} has {option} {value}, not {expected[0]}"
    for option in ("ceil_mode", "return_indices"):
        if getattr(child, option):
            return f"{name} has {option}"
    return None

"""The parts of a residual block or a stem, and whether each of them is plain enough to be fused.

A call collects the objects that it depends on once (`gather`) and derives everything else from them (`anatomy_of`). So
the checked objects are the ones that run, even if another thread changes the module meanwhile. A later call that
collects the same objects is the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd import PLAIN, ConvBN
from fusedres.dispatch import LIBRARY

# Ends of reasons that hold only between calls, for which fully_shard and FullyShardedDataParallel gather parameters.
_FLATTENED = "is flattened by FullyShardedDataParallel"
SHARDED = ("is a DTensor", _FLATTENED)
ABSENT = object()  # stands for an attribute that a module does not have, not even as None
_Pair = tuple[int, int]
Filters = tuple[tuple[nn.Module, ...], ...]  # before each unit, then before the shortcut; none at all: ()
_Check = Callable[[Any], str | None]  # returns why kernels cannot read a tensor, or None


class RawUnit(NamedTuple):
    """A convolution and the norm after it as read from the modules; nothing is checked yet."""

    conv_name: str
    norm_name: str
    promotes: bool  # the norm's result has the dtype that its input and its vectors promote to (FrozenBatchNorm2d)
    conv_weight: Any
    conv_bias: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: Any
    padding_mode: Any
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any
    training: Any
    track_running_stats: Any
    momentum: Any
    eps: Any
    group: Any  # of SyncBatchNorm's processes, if there are several


class ZeroPad(NamedTuple):
    """A ZeroPadShortcut."""

    in_channels: int
    out_channels: int
    stride: int


class Gathered(NamedTuple):
    """Every object besides the input that a call of a block depends on."""

    units: tuple[RawUnit, ...]
    projection: RawUnit | None = None
    zero_pad: ZeroPad | None = None
    filters: Filters = ()

    def is_same(self, other: Gathered) -> bool:
        """Whether both hold the same objects."""
        return all(map(is_, self._objects(), other._objects()))

    def is_fixed(self) -> bool:
        """Whether no object other than a tensor can change in place."""
        return not any(type(found) is list for found in self._objects())

    def _objects(self) -> Iterator[Any]:
        """Iterate over all objects, in the same order for all blocks of one class."""
        return chain(*self.units, self.projection or (None,), self.zero_pad or (None,), *self.filters)


class Unit(NamedTuple):
    """A checked convolution without bias and the BatchNorm after it."""

    conv_name: str
    norm_name: str
    promotes: bool
    settings: ConvBN
    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The UNIT_TENSORS of the unit."""
        vectors = (self.weight, self.bias, self.running_mean, self.running_var)
        return self.conv_weight, *vectors, self.num_batches_tracked


class Anatomy(NamedTuple):
    """The parts of a block; a stem has one unit and no shortcut."""

    units: tuple[Unit, ...]
    projection: Unit | None = None
    zero_pad: ZeroPad | None = None
    filters: Filters = ()
    chained: bool = False  # a part of a branch, which ends with a ReLU and has no shortcut

    @property
    def synchronised(self) -> bool:
        """Whether some statistics are those of several processes."""
        units = self.units if self.projection is None else (*self.units, self.projection)
        return any(unit.settings.group is not None for unit in units)


def anatomy_of(gathered: Gathered) -> Anatomy | str:
    """Return the parts of a block or a stem, or the option or tensor that no kernel supports, in words."""
    not_plain = _other_kind if torch.compiler.is_compiling() else _other_kind_or_lazy
    units: list[Unit] = []
    for raw in gathered.units:
        unit = _unit(raw, not_plain)
        if isinstance(unit, str):
            return unit
        units.append(unit)
    if gathered.projection is None:
        return Anatomy(tuple(units), None, gathered.zero_pad, gathered.filters)
    projection = _unit(gathered.projection, not_plain)
    return projection if isinstance(projection, str) else Anatomy(tuple(units), projection, None, gathered.filters)


def _unit(raw: RawUnit, not_plain: _Check) -> Unit | str:
    conv_name, norm_name = raw.conv_name, raw.norm_name
    geometry = _geometry(conv_name, raw, not_plain)
    if type(geometry) is str:
        return geometry
    vectors = _vectors(norm_name, raw, not_plain)
    if type(vectors) is str:
        return vectors
    weight, bias, mean, var = vectors
    training, update = bool(raw.training), bool(raw.training and raw.track_running_stats)
    batches = _counter(norm_name, raw.num_batches_tracked, mean, not_plain) if update else None
    if type(batches) is str:
        return batches
    momentum, eps = raw.momentum, raw.eps
    if type(eps) is not float and type(eps) is not int:
        return f"{norm_name} has eps {eps!r}"
    if momentum is None:
        momentum = 0.0 if batches is None else None  # as in torch: without a counter, the statistics stay as they are
    elif type(momentum) is not float and type(momentum) is not int:
        return f"{norm_name} has momentum {momentum!r}"
    statistics = (training or mean is None, update, momentum, eps)
    if raw.group is not None and torch.compiler.is_compiling():
        return f"{norm_name} is synchronised, which is not compiled"
    settings = ConvBN._make((*geometry, *statistics, LIBRARY, raw.group))
    return Unit(conv_name, norm_name, raw.promotes, settings, raw.conv_weight, weight, bias, mean, var, batches)


def _geometry(name: str, raw: RawUnit, not_plain: _Check) -> Any:
    """Return stride, padding, dilation, groups, and whether the convolution is pixelwise; or why it is not fused."""
    if raw.conv_bias is not None:
        return f"{name}.bias is not a parameter" if raw.conv_bias is ABSENT else f"{name} has a bias"
    if raw.padding_mode != "zeros":
        return f"{name} has padding_mode {raw.padding_mode!r}"
    weight = raw.conv_weight
    reason = not_plain(weight)
    if reason is not None:
        return f"{name}.weight {reason}"
    if weight.dim() != 4:
        if getattr(weight, "_fsdp_flattened", False):
            return f"{name}.weight {_FLATTENED}"
        return f"{name}.weight has {weight.dim()} dimensions, not 4"
    stride, padding, dilation = _as_pair(raw.stride, 1), _as_pair(raw.padding, 0), _as_pair(raw.dilation, 1)
    groups = raw.groups
    if stride is None or padding is None or dilation is None or type(groups) is not int or groups < 1:
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        wrong = next((option for option, pair in options.items() if pair is None), "groups")
        return f"{name} has {wrong} {getattr(raw, wrong)!r}"
    pixelwise = groups == 1 and padding == (0, 0) and stride[0] == stride[1] and weight.shape[2] == weight.shape[3] == 1
    return stride, padding, dilation, groups, pixelwise


def _as_pair(value: Any, least: int) -> _Pair | None:
    """Return a pair from what torch accepts for one: an integer, or a sequence of one or two. None: anything else."""
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


def _vectors(name: str, raw: RawUnit, not_plain: _Check) -> Any:
    """Return weight, bias, running mean and variance of a norm, or why it cannot be fused.

    As in torch, running statistics may be missing if the call neither reads nor updates them.
    """
    weight, bias, mean, var = raw.weight, raw.bias, raw.running_mean, raw.running_var
    if weight is ABSENT or bias is ABSENT:
        return f"{name} has a weight or bias that is not a parameter"
    if mean is ABSENT or var is ABSENT:
        if not raw.training or raw.track_running_stats:
            return f"{name} has a running_mean or running_var that is not a buffer"
        mean = var = None
    for field, tensor in (("weight", weight), ("bias", bias), ("running_mean", mean), ("running_var", var)):
        if tensor is not None and (not_plain(tensor) is not None or tensor.dim() != 1 or not tensor.is_contiguous()):
            return f"{name}.{field} {not_plain(tensor) or 'is not a contiguous vector'}"
    if (mean is None) != (var is None):
        return f"{name} has only one of running_mean and running_var"
    return weight, bias, mean, var


def _counter(name: str, batches: Any, running_mean: Tensor | None, not_plain: _Check) -> Any:
    """Return the counter of a norm that updates its statistics, or why the norm cannot be fused."""
    if batches is None:
        return None
    reason = "is not a buffer" if batches is ABSENT else not_plain(batches)
    if reason is None and batches.dtype is not torch.int64:
        reason = f"is {batches.dtype}, not torch.int64"
    if reason is None and batches.dim() != 0:
        reason = f"has {batches.dim()} dimensions, not 0"
    if reason is None and running_mean is not None and batches.device != running_mean.device:
        reason = f"is on {batches.device}, running_mean on {running_mean.device}"
    return batches if reason is None else f"{name}.num_batches_tracked {reason}"


def _other_kind(tensor: Any) -> str | None:
    """Return why a tensor is not plain, judged by its class, or None."""
    return None if type(tensor) in PLAIN else f"is a {type(tensor).__name__}"


def _other_kind_or_lazy(tensor: Any) -> str | None:
    """Return why kernels cannot read a tensor by its address, or None.

    It is a subclass, has another layout, or its values are not in memory.
    """
    if type(tensor) not in PLAIN:
        return f"is a {type(tensor).__name__}"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}"
    return "is lazily negated or zero" if tensor.is_neg() or tensor._is_zerotensor() else None

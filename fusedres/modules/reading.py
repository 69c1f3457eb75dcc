"""Makes the plan of one call from a block's parts, with every check before anything is computed or updated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from fusedres.autograd import BlockPlan, ConvBN, DensePlan, NormActConvPlan, StemPlan, suggests_channels_last
from fusedres.dispatch import LIBRARY, Way
from fusedres.errors import DtypeError, ShapeError
from fusedres.modules.anatomy import Anatomy, Unit, ZeroPad
from fusedres.modules.choice import images_at_a_time, own_products, unsaved_ends
from fusedres.ops._sizes import FLOATING

_HALF = (torch.bfloat16, torch.float16)

Shape = tuple[int, int, int, int]
Tensors = tuple[Tensor | None, ...]


class Input(NamedTuple):
    """The input of a call and what follows from it."""

    op: str  # the name of the block's class, for errors
    x: Tensor
    dtype: torch.dtype  # of the convolutions
    autocast: bool
    backend: str
    conv: str  # fuse()'s option
    way: Way | None  # measured
    other: Tensor | None = None  # what the shortcut reads, if it is not x
    synchronised: bool = False  # some statistics are those of several processes


class Read(NamedTuple):
    """A unit as it runs, its tensors, and the shape and memory format of its output."""

    unit: ConvBN
    tensors: Tensors
    shape: Shape
    channels_last: bool


def read_input(op: str, x: Tensor, backend: str, conv: str, way: Way | None) -> Input:
    """Return the input of a call; only x itself is checked here.

    Raises:
        ShapeError, DtypeError: x is not a batch of images of a floating-point dtype.
    """
    if x.dim() != 4:
        raise ShapeError(
            f"{op}: x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}; add a batch dimension"
        )
    if x.dtype not in FLOATING:
        raise DtypeError(
            f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}; convert it, e.g. x.float()"
        )
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast and x.dtype is not torch.float64 else x.dtype
    return Input(op, x, dtype, autocast, backend, conv, way)


def read_block(given: Input, anatomy: Anatomy, memory: str) -> tuple[BlockPlan, Tensors] | str:
    """Return the plan of a call and its tensors, or why it must run unfused.

    Raises:
        ShapeError, DtypeError, RuntimeError: eager raises an error for this call too, or it cannot be computed.
    """
    given = given._replace(synchronised=anatomy.synchronised)
    op, x = given.op, given.x
    refused = promoted(given, (*anatomy.units, anatomy.projection))
    if refused is not None:
        return refused
    shape, channels_last = _shape(x), suggests_channels_last(x)
    units: list[ConvBN] = []
    tensors: list[Tensor | None] = []
    for part in anatomy.units:
        found = read_unit(given, part, shape, channels_last)
        units.append(found.unit)
        tensors += found.tensors
        shape, channels_last = found.shape, found.channels_last
    projection: ConvBN | None = None
    start = _shape(x if given.other is None else given.other)
    reached, pad_stride = shape if anatomy.chained else start, 1
    if anatomy.projection is not None:
        end = read_unit(given, anatomy.projection, start, channels_last)
        projection, reached = end.unit, end.shape
        tensors += end.tensors
    elif anatomy.zero_pad is not None:
        reached, pad_stride = _zero_padded(op, x, anatomy.zero_pad), anatomy.zero_pad.stride
    if reached != shape:
        if all(size in (1, whole) for size, whole in zip(reached, shape, strict=True)):
            return f"the shortcut of shape {reached} is broadcast to {shape}"
        raise ShapeError(
            f"{op}: the shortcut must have shape {shape} like the residual branch, got {reached}; "
            "give the block a downsample (1x1 convolution + BatchNorm, or ZeroPadShortcut) that reaches it"
        )
    ends = unsaved_ends(_saves_less(given, memory) and not anatomy.chained, units, projection, tensors, shape)
    one_pass, recompute = (_NEITHER, ends) if _recomputes(given) else (ends, _NEITHER)
    images = images_at_a_time(x, shape)
    plan = BlockPlan(
        tuple(units), projection, pad_stride, one_pass, recompute, images, given.dtype, given.backend, channels_last
    )
    if given.other is not None or anatomy.chained:
        plan = plan._replace(reads="none" if anatomy.chained else "other", in_cpp=False)
    elif anatomy.synchronised:
        plan = plan._replace(in_cpp=False)
    return plan, tuple(tensors)


def read_stem(given: Input, anatomy: Anatomy) -> tuple[StemPlan, Tensors] | str:
    """Return the plan of a stem's call and its tensors, or why it must run unfused; raises as read_block does."""
    refused = promoted(given, anatomy.units)
    if refused is not None:
        return refused
    given = given._replace(synchronised=anatomy.synchronised)
    found = read_unit(given, anatomy.units[0], _shape(given.x), suggests_channels_last(given.x))
    return StemPlan(found.unit, given.dtype, given.backend, found.channels_last), found.tensors


def read_norm_act_conv(given: Input, parts: Sequence[Unit], kind: str | None) -> NormActConvPlan | str:
    """Return the plan of convolutions that read act(BN(x)), or why torch's own operators must run.

    Args:
        parts: each convolution with the norm before it, which they share.
        kind: of the activation; None: there is no norm either, and the convolutions read x.

    Raises:
        ShapeError, DtypeError, RuntimeError, ValueError: torch raises an error for this call too.
    """
    x = given.x
    before = given._replace(dtype=x.dtype)  # BatchNorm reads x in its own dtype, also under autocast
    refused = promoted(before, parts[:1])
    if refused is not None:
        return refused
    shape = _shape(x)
    flat = kind is not None and _is_flat(shape, given)
    formats = []
    for part in parts:
        _convolved_shape(given, part, shape)
        _check_weight(given, part)
        formats.append((suggests_channels_last(x) and not flat) or suggests_channels_last(part.conv_weight))
    if kind is not None:
        _check_norm(before, parts[0], shape)
    units = tuple(part.settings for part in parts)
    return NormActConvPlan(units, kind, given.dtype, given.backend, tuple(formats))


def read_dense_block(given: Input, parts: Sequence[Unit]) -> DensePlan | str:
    """Return the plan of a dense block, or why the stock forward must run.

    Args:
        parts: two of each layer: a convolution, with the norm before it.

    Raises:
        ShapeError, DtypeError, RuntimeError, ValueError: torch raises an error for this call too.
    """
    x = given.x
    if x.dtype is not given.dtype and x.dtype is not torch.float32:
        return f"x is {x.dtype}, and autocast runs convolutions in {given.dtype}"
    before = given._replace(dtype=x.dtype)  # BatchNorm reads x in its own dtype, also under autocast
    refused = promoted(before, parts[::2]) or promoted(given, parts[1::2])
    if refused is not None:
        return refused
    shape, widths = _shape(x), [x.shape[1]]
    channels_last = suggests_channels_last(x)
    for outer, inner in zip(parts[::2], parts[1::2], strict=True):
        reached, kept = (shape[0], widths[-1], *shape[2:]), channels_last
        for part in (outer, inner):
            source = reached
            reached = _convolved_shape(given, part, source)
            _check_weight(given, part)
            _check_norm(before if part is outer else given, part, source)
            kept = (kept and not _is_flat(source, given)) or suggests_channels_last(part.conv_weight)
        if reached[2:] != shape[2:]:
            return f"{inner.conv_name} has a result of {reached[2:]} pixels, x has {shape[2:]}"
        channels_last = channels_last and kept
        widths.append(widths[-1] + reached[1])
    units = tuple(part.settings for part in parts)
    return DensePlan(units, tuple(widths), given.dtype, given.backend, channels_last)


def _is_flat(shape: Shape, given: Input) -> bool:
    """Whether BatchNorm returns images of this shape as NCHW, whatever they are."""
    return shape[1] == 1 or shape[2] == shape[3] == 1 or (given.x.dtype is torch.float64 and given.x.is_cuda)


_NEITHER = (False, False)


def _recomputes(given: Input) -> bool:
    """Return whether an output that is not saved is computed again, instead of its statistics before it (one-pass).

    On a CPU that takes less time in 16 bits: one-pass gradients need products in float32.
    """
    return given.backend == "cpu" and given.dtype.itemsize == 2


def _saves_less(given: Input, memory: str) -> bool:
    return memory == "min" or (given.way is not None and given.way.one_pass and given.conv == "auto")


def _shape(x: Tensor) -> Shape:
    return x.shape[0], x.shape[1], x.shape[2], x.shape[3]


def promoted(given: Input, units: Iterable[Unit | None]) -> str | None:
    """Return which norm's result has a wider dtype than the convolutions have, in words, or None."""
    for unit in units:
        if unit is not None and unit.promotes:
            dtypes = {vector.dtype for vector in (unit.weight, unit.bias, unit.running_mean) if vector is not None}
            if dtypes != {given.dtype}:
                return f"{unit.norm_name} is {dtypes.pop()}, and so would be its result of a {given.dtype} convolution"
    return None


def _zero_padded(op: str, x: Tensor, shortcut: ZeroPad) -> Shape:
    if x.shape[1] != shortcut.in_channels:
        raise ShapeError(
            f"{op}: x must have {shortcut.in_channels} channels for downsample, got shape {tuple(x.shape)}; "
            f"use ZeroPadShortcut({x.shape[1]}, ...)"
        )
    stride = shortcut.stride
    return x.shape[0], shortcut.out_channels, -(-x.shape[2] // stride), -(-x.shape[3] // stride)


def read_unit(given: Input, part: Unit, shape: Shape, channels_last: bool) -> Read:
    """Return a unit for an input of this shape and memory format.

    Raises:
        ShapeError, DtypeError, RuntimeError, ValueError: the unit does not fit this input.
    """
    x, weight = given.x, part.conv_weight
    reached = _convolved_shape(given, part, shape)
    _check_weight(given, part)
    _check_norm(given, part, reached)
    unit = part.settings
    own = own_products(given.conv, given.backend, unit.groups, (weight.shape[2], weight.shape[3]), given.way)
    if given.synchronised:
        own = LIBRARY
    unit = unit if own == unit.own else unit._replace(own=own)
    channels_last = channels_last or suggests_channels_last(weight)
    if reached[1] == 1 or reached[2] == reached[3] == 1 or (given.dtype is torch.float64 and x.is_cuda):
        channels_last = False  # torch's batch_norm takes these for NCHW; cuDNN has no float64 channels_last
    return Read(unit, part.tensors, reached, channels_last)


def _check_weight(given: Input, part: Unit) -> None:
    """Check that a convolution takes x with its weight."""
    op, x, weight = given.op, given.x, part.conv_weight
    if weight.device != x.device:
        _wrong_device(op, f"{part.conv_name}.weight", weight, x)
    if weight.dtype is not x.dtype and (not given.autocast or torch.float64 in (weight.dtype, x.dtype)):
        raise DtypeError(
            f"{op}: {part.conv_name}.weight must be {x.dtype} like x, got {weight.dtype}; convert one or use autocast"
        )


def _convolved_shape(given: Input, part: Unit, shape: Shape) -> Shape:
    op, unit = given.op, part.settings
    out_channels, in_channels = part.conv_weight.shape[:2]
    if shape[1] != in_channels * unit.groups:
        raise ShapeError(
            f"{op}: {'x' if shape == given.x.shape else 'its input'} must have {in_channels * unit.groups} channels "
            f"(dim 1) for {part.conv_name}, got shape {shape}; give it a convolution of {shape[1]} input channels, or "
            "another input"
        )
    if unit.groups != 1 and out_channels % unit.groups != 0:
        raise ShapeError(
            f"{op}: {part.conv_name} must have output channels that {unit.groups} groups divide, got {out_channels}; "
            "set groups to a divisor"
        )
    reached = unit.output_shape(shape, part.conv_weight.shape)
    if min(*reached[2:], *shape[2:]) < 1:
        raise ShapeError(
            f"{op}: the input of {part.conv_name} must be larger than its kernel, got shape {shape}; use larger images"
        )
    return reached


def _check_norm(given: Input, part: Unit, shape: Shape) -> None:
    """Check that torch's batch_norm accepts the norm of a unit; shape: that of the convolution's output."""
    wanted: torch.dtype | None = None
    device, size = given.x.device, (shape[1],)
    for vector in (part.weight, part.bias, part.running_mean, part.running_var):
        if vector is not None:
            if wanted is None:
                wanted = vector.dtype
            if vector.shape != size or vector.dtype is not wanted or vector.device != device:
                _refuse_vector(given, part, vector, shape[1], wanted)
    if wanted is not given.dtype and wanted is not None and (wanted is not torch.float32 or given.dtype not in _HALF):
        _refuse_vector(given, part, None, shape[1], wanted)
    if part.settings.batch_statistics:
        if shape[0] * shape[2] * shape[3] == 1 and part.settings.group is None:
            got = torch.Size(shape)
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {got}")
        if part.settings.eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {part.settings.eps}")


def _refuse_vector(given: Input, part: Unit, vector: Tensor | None, channels: int, dtype: torch.dtype) -> NoReturn:
    """Raise the error for a vector that does not match the others of its norm; None: their common dtype is wrong."""
    op, name = given.op, part.norm_name
    if vector is None:
        wanted = f"{given.dtype} or torch.float32" if given.dtype in _HALF else f"{given.dtype}"
        raise DtypeError(f"{op}: {name} must be {wanted} for a {given.dtype} convolution, got {dtype}; convert it")
    if vector.shape != (channels,):
        raise ShapeError(
            f"{op}: {name} must have {channels} channels like {part.conv_name}, got {tuple(vector.shape)}; "
            f"replace it by BatchNorm2d({channels})"
        )
    if vector.device != given.x.device:
        _wrong_device(op, name, vector, given.x)
    raise DtypeError(f"{op}: {name} must have one dtype, got {dtype} and {vector.dtype}; convert it")


def _wrong_device(op: str, name: str, tensor: Tensor, x: Tensor) -> NoReturn:
    raise RuntimeError(f"{op}: {name} must be on {x.device} like x, got {tensor.device}; move one")

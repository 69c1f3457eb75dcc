"""What every op checks before a kernel sees a pointer. Messages: op and argument, expected, got, remedy."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_CHANNELS_LAST = torch.channels_last


def arithmetic_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


def _fail(error: type[Exception], op: str, argument: str, expected: str, got: object, remedy: str = "") -> NoReturn:
    raise error(f"{op}: {argument} must {expected}, got {got}" + (f"; {remedy}" if remedy else ""))


def activation(op: str, argument: str, tensor: Tensor, backend: str) -> None:
    """A dense channels_last (N, C, H, W) floating-point tensor on a device that the backend serves."""
    if tensor.dim() != 4:
        _fail(ValueError, op, argument, "have 4 dimensions (N, C, H, W)", tuple(tensor.shape))
    if tensor.dtype not in FLOATING:
        _fail(TypeError, op, argument, "be float32, float64, bfloat16 or float16", tensor.dtype, "convert it first")
    if not tensor.is_contiguous(memory_format=_CHANNELS_LAST):
        remedy = "call .contiguous(memory_format=torch.channels_last)"
        _fail(ValueError, op, argument, "be dense and channels_last", f"strides {tensor.stride()}", remedy)
    if backend == "cpu" and not tensor.is_cpu:
        _fail(RuntimeError, op, argument, "be on the CPU for the cpu backend", tensor.device, "use another backend")


def same(op: str, argument: str, tensor: Tensor, other: str, reference: Tensor, remedy: str = "") -> None:
    """Same shape, dtype, device and layout as another activation that was checked."""
    if tensor.shape != reference.shape:
        expected = f"have shape {tuple(reference.shape)} like {other}"
        _fail(ValueError, op, argument, expected, tuple(tensor.shape), remedy)
    same_kind(op, argument, tensor, other, reference)


def same_kind(op: str, argument: str, tensor: Tensor, other: str, reference: Tensor) -> None:
    """Same dtype, device and layout as another activation that was checked."""
    if tensor.dtype is not reference.dtype:
        _fail(TypeError, op, argument, f"be {reference.dtype} like {other}", tensor.dtype, "convert one of them")
    if tensor.device != reference.device:
        _fail(RuntimeError, op, argument, f"be on {reference.device} like {other}", tensor.device, "move one of them")
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=_CHANNELS_LAST):
        remedy = "call .contiguous(memory_format=torch.channels_last)"
        _fail(ValueError, op, argument, "be dense and channels_last", f"strides {tensor.stride()}", remedy)


def dense(op: str, argument: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    """A contiguous tensor of exactly this shape and dtype, on another's device."""
    if tensor.shape != shape:
        _fail(ValueError, op, argument, f"have shape {shape}", tuple(tensor.shape))
    if tensor.dtype is not dtype:
        _fail(TypeError, op, argument, f"be {dtype}", tensor.dtype)
    if tensor.device != like.device:
        _fail(RuntimeError, op, argument, f"be on {like.device}", tensor.device, "move one of them")
    if not tensor.is_contiguous():
        _fail(ValueError, op, argument, "be contiguous", f"strides {tensor.stride()}", "call .contiguous()")


def channel_vector(op: str, argument: str, tensor: Tensor | None, channels: int, like: Tensor) -> None:
    """None, or a contiguous floating-point (C,) tensor of any dtype on another's device."""
    if tensor is None:
        return
    if tensor.dtype not in FLOATING:
        _fail(TypeError, op, argument, "be float32, float64, bfloat16 or float16", tensor.dtype)
    dense(op, argument, tensor, (channels,), tensor.dtype, like)


def state(op: str, argument: str, tensor: Tensor, x: Tensor) -> None:
    """The (4, C) state of bn_statistics or bn_frozen for the activation x."""
    dense(op, argument, tensor, (4, x.shape[1]), arithmetic_dtype(x), x)


def gate(op: str, argument: str, tensor: Tensor | None, like: Tensor) -> None:
    """None, packed bits of an activation's shape, or a ReLU's output like it."""
    if tensor is None:
        return
    if tensor.dtype is torch.uint8:
        dense(op, argument, tensor, mask_shape(like), torch.uint8, like)
    else:
        same(op, argument, tensor, "the gradient", like)


def mask_shape(x: Tensor) -> tuple[int, int, int, int]:
    """Shape of the packed bits of an (N, C, H, W) activation: (N, H, W, ceil(C / 8))."""
    n, c, h, w = x.shape
    return n, h, w, (c + 7) // 8


def subsampled(size: int, stride: int) -> int:
    """Pixels left when every stride-th is taken."""
    return (size + stride - 1) // stride


def positive_stride(op: str, stride: int) -> None:
    """The stride is at least 1."""
    if stride < 1:
        _fail(ValueError, op, "stride", "be at least 1", stride)

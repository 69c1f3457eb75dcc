"""Sizes of a convolution, and which of its taps fall on padding."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_Axes = tuple[tuple[int, ...], ...]  # (size, kernel, stride, padding, dilation) of height and width


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pixels of a convolution's output along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """(N, K, P, Q) of a convolution of (N, C, H, W) with (K, C, R, S)."""
    p, q = (
        output_size(x.shape[2 + axis], weight.shape[2 + axis], stride[axis], padding[axis], dilation[axis])
        for axis in (0, 1)
    )
    return x.shape[0], weight.shape[0], p, q


def empty_output(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Room for a convolution's output, channels_last."""
    shape = output_shape(x, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# They are never freed, as a captured graph or another stream may still read them; so they are not many.
_tables: dict[tuple[_Axes, torch.device], Tensor] = {}
_MOST_TABLES = 256


def tap_table(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """(R·S, P·Q) float32: 1 where a tap of an output pixel is inside x, 0 where it falls on padding."""
    axes = tuple(
        (x.shape[2 + axis], weight.shape[2 + axis], stride[axis], padding[axis], dilation[axis]) for axis in (0, 1)
    )
    table = _tables.get((axes, x.device))
    if table is not None:
        return table
    if len(_tables) >= _MOST_TABLES or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _build(axes, x.device)  # for this call; in a graph that is captured, filled at each replay
    # What this thread allocates may belong to the pool of a graph that torch.compile warms up for; another's does not.
    with ThreadPoolExecutor(1) as apart:
        return _tables.setdefault((axes, x.device), apart.submit(_build_for_all_streams, axes, x.device).result())


def _build_for_all_streams(axes: _Axes, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return _build(axes, device)
    with torch.cuda.device(device):
        table = _build(axes, device)
        torch.cuda.current_stream().synchronize()
    return table


def _build(axes: _Axes, device: torch.device) -> Tensor:
    rows, columns = (_inside(axis, device) for axis in axes)
    return (rows[:, None, :, None] & columns[None, :, None, :]).float().flatten(2).flatten(0, 1).contiguous()


def _inside(axis: tuple[int, ...], device: torch.device) -> Tensor:
    """(kernel, outputs) booleans of one axis."""
    size, kernel, stride, padding, dilation = axis
    taps = torch.arange(kernel, device=device)[:, None] * dilation - padding
    pixels = torch.arange(output_size(size, kernel, stride, padding, dilation), device=device) * stride
    position = taps + pixels
    return (position >= 0) & (position < size)

"""Which taps of a convolution fall on padding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fusedres.values import Geometry

_Axes = tuple[tuple[int, ...], ...]  # (outputs, size, kernel, stride, padding, dilation) of height and width


# Tables are never freed, because a captured graph or another stream may still read them. So their number is limited.
_tables: dict[tuple[_Axes, torch.device], Tensor] = {}
_MOST_TABLES = 256


def tap_table(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return (R·S, P·Q) float32: 1 where a tap of an output pixel is inside x, 0 where it falls on padding."""
    outputs = geometry.output_shape(x.shape, weight.shape)[2:]
    axes = tuple(zip(outputs, x.shape[2:], weight.shape[2:], *geometry, strict=True))
    table = _tables.get((axes, x.device))
    if table is not None:
        return table
    if len(_tables) >= _MOST_TABLES or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _build(axes, x.device)  # for this call only; a captured graph fills it at each replay
    # While torch.compile warms up a graph, memory of this thread may come from the graph's pool. Use another thread.
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
    """Return (kernel, outputs) booleans of one axis."""
    outputs, size, kernel, stride, padding, dilation = axis
    taps = torch.arange(kernel, device=device)[:, None] * dilation - padding
    pixels = torch.arange(outputs, device=device) * stride
    position = taps + pixels
    return (position >= 0) & (position < size)

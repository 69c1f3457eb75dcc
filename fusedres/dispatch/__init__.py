"""The measured choices that "auto" follows on a device. Each process reads them once, at the first call.

If nothing was measured, a block calls only `measured`.
"""

from __future__ import annotations

import threading

import torch

from fusedres.dispatch import store
from fusedres.dispatch.table import LIBRARY, UNFUSED, Directions, Entry, Shape, Table, Way, batch_class

__all__ = [
    "LIBRARY", "UNFUSED", "Directions", "Entry", "Shape", "Table", "Way",
    "backend", "batch_class", "dtype_name", "install", "measured", "table", "uses_tf32", "way",
]  # fmt: skip

_tables: dict[torch.device, Table | None] = {}
_reading = threading.Lock()


def table(device: torch.device) -> Table | None:
    """Return the table of a device, or None if nothing was measured."""
    try:
        return _tables[device]
    except KeyError:
        return _load(device)


def _load(device: torch.device) -> Table | None:
    if device == torch.device("cuda") and torch.cuda.is_available():  # without an index
        return table(torch.device("cuda", torch.cuda.current_device()))
    with _reading:
        if device not in _tables:
            _tables[device] = store.load(device)
    return _tables[device]


def install(device: torch.device, found: Table | None) -> None:
    """Follow this table from now on instead of the one that was read; tune uses this while it measures."""
    _tables[device] = found


@torch.compiler.assume_constant_result
def measured(device: torch.device) -> bool:
    """Whether there is a table for the device."""
    return table(device) is not None


@torch.compiler.assume_constant_result
def backend(device: torch.device) -> str | None:
    """Return the backend of the device's table, or None without a table."""
    found = table(device)
    return None if found is None else found.backend


@torch.compiler.assume_constant_result
def way(device: torch.device, dtype: torch.dtype, phase: str, batch: int, *shape: str | int) -> Way:
    """Return the measured way of a shape on a device with a table; shape: the fields of Shape from kind to width.

    torch.compile treats the result as a constant, and sizes must be plain integers.
    """
    found = table(device)
    assert found is not None
    return found.way(Shape._make((*shape, batch_class(batch), dtype_name(device, dtype), phase)))


def uses_tf32(dtype: torch.dtype) -> bool:
    """Return whether torch's convolutions of this dtype use TF32 on a GPU."""
    return dtype is torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def dtype_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return a dtype's name in a Shape; float32 on a GPU is "tf32" if torch's convolutions use TF32."""
    if device.type == "cuda" and uses_tf32(dtype):
        return "tf32"
    return str(dtype).removeprefix("torch.")

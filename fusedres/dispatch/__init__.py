"""What "auto" follows on a device: the choices that were measured there, read once a process at the first call.

Where nothing was measured, `measured` is all that a block asks.
"""

from __future__ import annotations

import threading

import torch

from fusedres.dispatch import store
from fusedres.dispatch.table import LIBRARY, UNFUSED, Directions, Entry, Shape, Table, Way, batch_class

__all__ = [
    "LIBRARY", "UNFUSED", "Directions", "Entry", "Shape", "Table", "Way",
    "backend", "batch_class", "dtype_name", "install", "measured", "table", "way",
]  # fmt: skip

_tables: dict[torch.device, Table | None] = {}
_reading = threading.Lock()


def table(device: torch.device) -> Table | None:
    """The table of a device, None where nothing was measured."""
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
    """Follows this table from now on, whatever was read; for whoever measures."""
    _tables[device] = found


@torch.compiler.assume_constant_result
def measured(device: torch.device) -> bool:
    """Whether there is a table."""
    return table(device) is not None


@torch.compiler.assume_constant_result
def backend(device: torch.device) -> str | None:
    """The table's backend, None without one."""
    found = table(device)
    return None if found is None else found.backend


@torch.compiler.assume_constant_result
def way(device: torch.device, dtype: torch.dtype, phase: str, batch: int, *shape: str | int) -> Way:
    """The measured way of a shape, given from its kind to its width, on a device with a table.

    torch.compile takes the result as a constant; sizes must be plain integers.
    """
    found = table(device)
    assert found is not None
    return found.way(Shape._make((*shape, batch_class(batch), dtype_name(device, dtype), phase)))


def dtype_name(device: torch.device, dtype: torch.dtype) -> str:
    """As a Shape has it: float32 on a GPU is tf32 where torch's convolutions take that."""
    if dtype is torch.float32 and device.type == "cuda":
        return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "float32"  # type: ignore[attr-defined]
    return str(dtype).removeprefix("torch.")

"""Make tables of measured choices for tests, and follow one of them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fusedres import dispatch
from fusedres.dispatch import Entry, Shape, Table, Way, store

CPU = torch.device("cpu")
HERE = store.family(CPU)


def table(blocks: dict[Shape, Way] | None = None, backend: str = "cpu", configs: dict[str, str] | None = None) -> Table:
    entries = {shape: Entry(way, 1.0) for shape, way in (blocks or {}).items()}
    return Table(HERE, backend, store.versions(), "2026-01-01", entries, configs or {})


def bottleneck(size: int = 56, batch: int = 64, **more: object) -> Shape:
    return Shape("bottleneck", "identity", 256, 64, 256, 1, 1, 1, size, size, batch, "bfloat16", "train")._replace(
        **more
    )


def empty_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Return the path of this device's table in an empty cache folder; no table has been read yet."""
    monkeypatch.setattr(dispatch, "_tables", {})
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(folder / "cache"))
    (folder / "cache").mkdir()
    return folder / "cache" / store.file_name(HERE)


@contextmanager
def following(found: Table | None, device: torch.device = CPU) -> Iterator[None]:
    before = dispatch.table(device)
    dispatch.install(device, found)
    try:
        yield
    finally:
        dispatch.install(device, before)

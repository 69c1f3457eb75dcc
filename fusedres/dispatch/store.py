"""Where tables of measured choices lie: in the package, by device, and in the user's cache folder, which goes before.

Writers take turns under a lock and replace the file as a whole, so that readers see the old one or the new one.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from fusedres._version import __version__
from fusedres.dispatch.table import Entry, Table, as_json, parse

PACKAGED = Path(__file__).parent / "measured"


def family(device: torch.device) -> str | None:
    """What shares a table: a GPU's name and capability, a CPU's model and threads; None where nothing is measured."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, sm_{properties.major}{properties.minor}"
    if device.type == "cpu":
        interpreted = ", Triton interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"{_cpu_name()}, {torch.get_num_threads()} threads{interpreted}"
    return None


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.machine()


def file_name(device: str) -> str:
    """Of the table of a device family."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def cache_folder() -> Path:
    """FUSEDRES_CACHE_DIR, else fusedres in XDG_CACHE_HOME, else in ~/.cache."""
    chosen = os.environ.get("FUSEDRES_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fusedres")


def versions() -> dict[str, str | None]:
    """What the times of a table hold for."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {"fusedres": __version__, "torch": torch.__version__, "triton": triton}


def load(device: torch.device) -> Table | None:
    """The device's table: the package's, with what the user measured in front; None where there is neither."""
    name = family(device)
    if name is None:
        return None
    packaged = read(PACKAGED / file_name(name), name)
    users = read(cache_folder() / file_name(name), name)
    if users is not None and users.versions != versions():
        _ignore(cache_folder() / file_name(name), f"it was measured with {_listed(users.versions)}")
        users = None
    if packaged is None or users is None:
        return _with_triton(users or packaged)
    return _with_triton(replace(users, blocks=packaged.blocks | users.blocks, configs=packaged.configs | users.configs))


def _with_triton(table: Table | None) -> Table | None:
    """The table, if what it says can run: Triton may not be installed."""
    if table is None or importlib.util.find_spec("triton") is not None:
        return table
    backends = {table.backend, *(entry.way.backend for entry in table.blocks.values())}
    if "triton" not in backends:
        return table
    warnings.warn("fusedres: what was measured on this device is ignored: it needs Triton; install it", stacklevel=2)
    return None


def read(path: Path, device: str) -> Table | None:
    """The table in a file; None where there is no file, or none that can be used, which is a warning."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), device)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors
        _ignore(path, str(error))
        return None


def _ignore(path: Path, reason: str) -> None:
    warnings.warn(
        f"fusedres: {path} is ignored: {reason}; measure anew with `python -m fusedres tune`, or delete it",
        stacklevel=2,
    )


def _listed(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def writable(path: Path) -> None:
    """Raises OSError where `update` could not write there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if path.exists():
            path.open("r+").close()


def update(path: Path, table: Table) -> None:
    """Writes a table, keeping what else the file has of the same device and versions.

    A shape's new entry replaces the file's, except where another backend had gained more over eager there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        before = read(path, table.device)
        if before is not None and before.versions == table.versions:
            blocks = before.blocks | table.blocks
            for shape in before.blocks.keys() & table.blocks.keys():
                old = before.blocks[shape]
                if old.way.backend not in (None, table.backend) and _gain(old) > _gain(table.blocks[shape]):
                    blocks[shape] = old
            table = replace(table, blocks=blocks, configs=before.configs | table.configs)
        unfinished = path.with_name(path.name + ".new")  # whoever holds the lock may overwrite a killed process's
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(_as_text(table))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def _gain(entry: Entry) -> float:
    """Eager's time over that of what is followed."""
    return 1.0 if entry.way.backend is None or entry.eager_over_way is None else entry.eager_over_way


def _as_text(table: Table) -> str:
    """JSON, an entry a line."""
    data = as_json(table)
    blocks = ",\n".join(map(json.dumps, data.pop("blocks")))
    configs = ",\n".join(f"{json.dumps(key)}: {json.dumps(label)}" for key, label in data.pop("configs").items())
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    return f'{{\n{head},\n"blocks": [\n{blocks}\n],\n"configs": {{\n{configs}\n}}\n}}\n'


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; a killed one leaves no lock."""
    with path.with_name(path.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

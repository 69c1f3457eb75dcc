"""Where tables of measured choices lie: in the package, by device, and in the user's cache folder, which goes before.

Writers take turns under a lock and replace the file as a whole, so that readers see the old one or the new one. What
lies where a table is expected and is none is told in one warning, and blocks run as without a table.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from fusedres import files
from fusedres._version import __version__
from fusedres.dispatch.table import Entry, Table, as_json, decode, parse

PACKAGED = Path(__file__).parent / "measured"
LARGEST = 16 << 20  # bytes of a file that is read: some 50,000 shapes
_INTERPRETED = ", Triton interpreted"
_CAPABILITY = re.compile(r", sm_\d+$")
_LONGEST_REASON = 300  # of a warning, which may quote what is in the file


def family(device: torch.device) -> str | None:
    """What shares a table: a GPU's name and capability, a CPU's model and threads; None where nothing is measured."""
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, sm_{properties.major}{properties.minor}"
    if device.type == "cpu":
        interpreted = _INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else ""
        return f"{_cpu_name()}, {torch.get_num_threads()} threads{interpreted}"
    return None


def serving(device: str) -> frozenset[str]:
    """The backends whose kernels take the tensors of a device family."""
    if _CAPABILITY.search(device):
        return frozenset({"reference", "triton", "cuda"})
    return frozenset({"reference", "cpu", *(["triton"] if device.endswith(_INTERPRETED) else [])})


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
    return {"fusedres": __version__, "torch": torch.__version__, "triton": triton, "kernels": _kernels()}


@cache
def _kernels() -> str:
    """What changes when a kernel does."""
    folder = Path(__file__).parents[1] / "kernels"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def load(device: torch.device) -> Table | None:
    """The device's table: the package's, with what the user measured in front; where there is neither, that of another
    GPU of the same capability.
    """
    name = family(device)
    if name is None:
        return None
    packaged = _packaged(PACKAGED / file_name(name), name)
    users = _users(cache_folder() / file_name(name), name)
    if packaged is None and users is None:
        users = _of_a_sibling(name)
    if packaged is None or users is None:
        return _with_triton(users or packaged)
    return _with_triton(replace(users, blocks=packaged.blocks | users.blocks, configs=packaged.configs | users.configs))


def _users(path: Path, device: str | None) -> Table | None:
    found = read(path, device)
    if found is None or found.versions == versions():
        return found
    _ignore(path, f"it was measured with {_listed(found.versions)}")
    return None


def _packaged(path: Path, device: str | None) -> Table | None:
    """A table of the package: one of Triton's kernels holds while they or Triton's minor version are what they were."""
    found, now = read(path, device), versions()
    if found is None or found.backends.isdisjoint(("triton", "cuda")):
        return found
    if found.versions.get("kernels") == now["kernels"] or _minor(found.versions.get("triton")) == _minor(now["triton"]):
        return found
    _ignore(path, f"it was measured with {_listed(found.versions)}, this is {_listed(now)}")
    return None


def _minor(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]


def _of_a_sibling(device: str) -> Table | None:
    """What was measured on another GPU of the same capability, by the user before the package's."""
    capability = _CAPABILITY.search(device)
    if capability is None:
        return None
    pattern = "*" + file_name(capability[0])
    for folder, read_table in ((cache_folder(), _users), (PACKAGED, _packaged)):
        for path in sorted(folder.glob(pattern)):
            found = None if path.name == file_name(device) else read_table(path, None)
            if found is not None and found.device.endswith(capability[0]):
                return found
    return None


def _with_triton(table: Table | None) -> Table | None:
    """The table, if what it says can run: Triton may not be installed."""
    if table is None or importlib.util.find_spec("triton") is not None:
        return table
    if "triton" not in table.backends:
        return table
    warnings.warn("fusedres: what was measured on this device is ignored: it needs Triton; install it", stacklevel=2)
    return None


def read(path: Path, device: str | None) -> Table | None:
    """The table of a device, of any where it is None; None where there is no file, or none that can be used, which is a
    warning.
    """
    try:
        table = parse(decode(files.read(path, LARGEST)), device)
        foreign = table.backends - serving(table.device)
        if foreign:
            raise ValueError(f"it names the backend {', '.join(sorted(foreign))}, which does not serve this device")
        return table
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.lexists(path):
            return None
        _ignore(path, f"it is a link that leads nowhere ({error.strerror})")
    except Exception as error:  # nothing that a file holds may stop a block
        _ignore(path, str(error) or type(error).__name__)
    return None


def _ignore(path: Path, reason: str) -> None:
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}..."
    warnings.warn(
        f"fusedres: {path} is ignored: {' '.join(reason.split())}; measure anew with `python -m fusedres tune`, or "
        "delete it",
        stacklevel=2,
    )


def _listed(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def writable(path: Path) -> None:
    """Raises OSError where `update` could not write there."""
    files.require_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        files.require_writable(path)


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
        files.write(path, _as_text(table).encode())


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
    """One process at a time; a killed one leaves no lock. The lock's file is neither written nor followed as a link."""
    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "the lock is no regular file", str(lock))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

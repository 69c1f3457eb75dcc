"""Files of measured choices, one per device: shipped in the package, or in the user's cache folder, which overrides.

Writers use a lock and replace the whole file, so that readers see the old file or the new one. If a file cannot be used
as a table, one warning says so, and blocks run as without a table.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
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

from fusedres import files, processor
from fusedres._version import __version__
from fusedres.dispatch.table import Entry, Table, as_json, decode, parse

PACKAGED = Path(__file__).parent / "measured"
LARGEST = 16 << 20  # bytes of the largest file that is read: about 50,000 shapes
_INTERPRETED = ", Triton interpreted"
_CAPABILITY = re.compile(r", sm_\d+$")
_LONGEST_REASON = 300  # characters of a reason in a warning, which may quote the file


def family(device: torch.device) -> str | None:
    """Return the name under which devices share a table, or None for a device that cannot be measured.

    A GPU's name and capability, or a CPU's model, instruction sets and number of threads.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, sm_{properties.major}{properties.minor}"
    if device.type == "cpu":
        interpreted = _INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else ""
        model = " with ".join(filter(None, (processor.name(), processor.instruction_sets())))
        return f"{model}, {torch.get_num_threads()} threads{interpreted}"
    return None


def serving(device: str) -> frozenset[str]:
    """Return the backends with kernels for tensors of a device family."""
    if _CAPABILITY.search(device):
        return frozenset({"reference", "triton", "cuda"})
    return frozenset({"reference", "cpu", *(["triton"] if device.endswith(_INTERPRETED) else [])})


def file_name(device: str) -> str:
    """Return the file name of a device family's table."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def cache_folder() -> Path:
    """Return $FUSEDRES_CACHE_DIR, else the folder fusedres in $XDG_CACHE_HOME, else in ~/.cache."""
    chosen = os.environ.get("FUSEDRES_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fusedres")


def versions() -> dict[str, str | None]:
    """Return the versions for which a table's times hold."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {"fusedres": __version__, "torch": torch.__version__, "triton": triton, "kernels": _kernels()}


@cache
def _kernels() -> str:
    """Return a hash that changes with any kernel."""
    folder = Path(__file__).parents[1] / "kernels"
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def load(device: torch.device) -> Table | None:
    """Return the device's table: the user's entries override the package's.

    If the device has neither, use the table of another GPU of the same capability.
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
    """Return a table of the package, or None if it is too old.

    A table with kernels for GPUs holds until both the kernels and Triton's minor version have changed.
    """
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
    """Return the table of another GPU of the same capability: a user's if there is one, else one of the package."""
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
    """Return the table, or None with a warning if it needs Triton and Triton is not installed."""
    if table is None or importlib.util.find_spec("triton") is not None:
        return table
    if "triton" not in table.backends:
        return table
    warnings.warn("fusedres: the table of this device is ignored: it needs Triton; install it", stacklevel=2)
    return None


def read(path: Path, device: str | None) -> Table | None:
    """Return the table in a file, or None if there is no file. A file that cannot be used gives a warning and None.

    device: the family that the table must be for; None: any.
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
        _ignore(path, f"it is a broken link ({error.strerror})")
    except Exception as error:  # no content of a file may stop a block
        _ignore(path, str(error) or type(error).__name__)
    return None


def _ignore(path: Path, reason: str) -> None:
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[:_LONGEST_REASON]}..."
    warnings.warn(
        f"fusedres: {path} is ignored: {' '.join(reason.split())}; measure again with `python -m fusedres tune`, or "
        "delete it",
        stacklevel=2,
    )


def _listed(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items())


def writable(path: Path) -> None:
    """Raise OSError if `update` could not write there."""
    files.require_regular(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        files.require_writable(path)


def update(path: Path, table: Table) -> None:
    """Write a table and keep the file's other entries if they have the same device and versions.

    A new entry replaces the file's entry for its shape, unless another backend was faster there, compared with eager.
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
    """Return eager's time divided by the time of the entry's way."""
    return 1.0 if entry.way.backend is None or entry.eager_over_way is None else entry.eager_over_way


def _as_text(table: Table) -> str:
    """Return JSON with one entry per line."""
    data = as_json(table)
    blocks = ",\n".join(map(json.dumps, data.pop("blocks")))
    configs = ",\n".join(f"{json.dumps(key)}: {json.dumps(label)}" for key, label in data.pop("configs").items())
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    return f'{{\n{head},\n"blocks": [\n{blocks}\n],\n"configs": {{\n{configs}\n}}\n}}\n'


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time run the body; a killed process leaves no lock.

    The lock file is not written to, and a link in its place is not followed.
    """
    lock = path.with_name(path.name + ".lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "the lock is no regular file", str(lock))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

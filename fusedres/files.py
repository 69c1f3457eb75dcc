"""Safe access to files that others may damage: reading trusts nothing, writing replaces the whole file or nothing.

This module uses only Python's standard library; the examples load it by its path.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


def require_regular(path: Path) -> None:
    """Raise OSError if path is not a regular file but, for example, a folder, a pipe or a device."""
    with contextlib.suppress(FileNotFoundError):
        _refuse_others(os.stat(path), path)


def _refuse_others(found: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yield a descriptor to read a regular file. Never waits, which opening a pipe without a writer would do.

    Raises:
        OSError: the file does not exist, cannot be read, or is not a regular file.
    """
    _refuse_others(os.stat(path), path)  # before opening it, which alone has an effect on some devices
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_others(os.fstat(descriptor), path)
        yield descriptor
    finally:
        os.close(descriptor)


def read(path: Path, largest: int) -> bytes:
    """Return the content of a regular file of at most `largest` bytes.

    Raises:
        OSError: as `opened` raises it, or the file is larger.
    """
    with opened(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise OSError(errno.EFBIG, f"it has more than {largest} bytes", str(path))
    return data


def write(path: Path, data: bytes | memoryview) -> None:
    """Replace a whole file: readers see the old content or the new, and a writer that is killed leaves one of the two.

    Any number of processes may write to one path. If it is a link, the link is replaced and its target stays.

    Raises:
        OSError: the file cannot be written; the old one stays.
    """
    with _unfinished(path) as (temporary, descriptor):
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        require_regular(path)
        os.replace(temporary, path)
    with contextlib.suppress(OSError):  # makes the new name survive a loss of power
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def require_writable(path: Path) -> None:
    """Raise OSError if `write` could not write."""
    require_regular(path)
    with _unfinished(path):
        pass


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[tuple[Path, int]]:
    """Yield a new file next to path that only this process uses, and its descriptor; remove it if not renamed."""
    _remove_leftovers(path)
    temporary, descriptor = _create(path)
    try:
        yield temporary, descriptor
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        os.close(descriptor)


def _create(path: Path) -> tuple[Path, int]:
    """Create a file that stays locked as long as its process lives."""
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.unfinished")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another process took it for a leftover
            _lock(descriptor)
            os.stat(temporary)
            return temporary, descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock a file; raise BlockingIOError if another process has the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # the file system has no locks, so nobody removes leftovers there
        pass


def _remove_leftovers(path: Path) -> None:
    """Remove unfinished files that killed processes left for this path; those of live processes are locked."""
    pattern = re.compile(re.escape(_prefix(path)) + r"[0-9a-f]{16}\.unfinished")
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            if pattern.fullmatch(name):
                with contextlib.suppress(OSError):
                    _remove_if_unlocked(path.with_name(name))


def _remove_if_unlocked(leftover: Path) -> None:
    descriptor = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        leftover.unlink()
    finally:
        os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".{path.name[:40]}."  # cut, so that the full name is not longer than file names may be

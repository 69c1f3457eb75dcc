"""Writes the files that train.py leaves in --out."""

from pathlib import Path

from data import UsageError, shown
from shared import files


def write(path: Path, content: bytes | memoryview) -> None:
    """Replace a file as a whole. If the process is killed or the disk is full, the old file remains.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content)
    except OSError as error:
        raise UsageError(
            f"{shown(path)} cannot be written ({error.strerror}): make room there or pass another --out"
        ) from error

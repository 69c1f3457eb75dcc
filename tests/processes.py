"""Helpers of tests that start processes of their own."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Seconds after which a process surely hangs. No test may fail because other processes use the cores: what takes minutes
# on an idle machine can take an hour on a busy one.
HANG = 4 * 3600


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], str]) -> str:
    """Return what `make` returns. Only one process of this session calls it; other workers of pytest-xdist wait.

    An exception is not kept: each worker then calls `make` itself.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder inside the session's folder
        folder = folder.parent
    kept = folder / f"{name}.txt"
    with _locked(folder / f"{name}.lock"):
        if not kept.exists():
            kept.write_text(make(), encoding="utf-8")
        return kept.read_text(encoding="utf-8")


def interruptible() -> None:
    """For preexec_fn: let Ctrl-C reach the process, also if the tests run in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

"""What tests share that start processes of their own."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Seconds after which a process hangs for sure: no test may fail because other processes have the cores, and minutes
# of an idle machine are an hour of a busy one.
HANG = 4 * 3600


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], str]) -> str:
    """What `make` returns, made by one process of this session; other workers of pytest-xdist wait for it.

    What raises is not kept: each worker then sees the failure itself.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a folder a worker, in one of this session
        folder = folder.parent
    kept = folder / f"{name}.txt"
    with _locked(folder / f"{name}.lock"):
        if not kept.exists():
            kept.write_text(make(), encoding="utf-8")
        return kept.read_text(encoding="utf-8")


def interruptible() -> None:
    """For preexec_fn: the process hears Ctrl-C also where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

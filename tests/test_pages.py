"""keep_pages: freed memory stays mapped; elsewhere than with glibc it says why it did nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from processes import HANG

import fusedres


def test_kept_pages_are_not_faulted_again() -> None:
    code = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import torch, fusedres
if not fusedres.keep_pages():
    sys.exit(77)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(25 << 20).fill_(1)  # 100 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(40)))  # the minimum: a small block after the tensor, or a growing heap, adds faults
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)
    if done.returncode == 77:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40  # otherwise 25,600 pages of 4 KiB or 50 pages of 2 MiB


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Musl:
        """A C library without mallopt."""

    monkeypatch.setattr("ctypes.CDLL", lambda _: Musl())
    with pytest.warns(UserWarning, match="keep_pages: nothing was changed, as only glibc"):
        assert fusedres.keep_pages() is False

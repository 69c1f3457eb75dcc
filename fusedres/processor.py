"""What this machine's processor is called, and which of its instruction sets decide how fast convolutions are."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_DECISIVE = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def name() -> str:
    """Return the model's name. Virtual machines may give different processors the same one."""
    return _field("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str | None:
    """Return the instruction sets that make a difference, with spaces between, or None if there are none."""
    flags = (_field("flags") or "").split()
    return " ".join(each for each in _DECISIVE if each in flags) or None


def _field(field: str) -> str | None:
    try:
        found = re.search(rf"^{field}\s*:\s*(.+)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None

"""keep_pages: memory that is freed stays mapped, so that the next allocation does not fault its pages in again."""

from __future__ import annotations

import ctypes
import warnings

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_NEVER = 2**31 - 1


def keep_pages() -> bool:
    """Make the C library keep freed memory mapped for the rest of the process; Linux with glibc only.

    By default glibc maps each large tensor anew and unmaps it when it is freed. Touching a fresh page costs a page
    fault for every 4 KiB, on virtual machines several times as long as a pass over the memory. After this call freed
    memory stays with the process and is used again. It applies to everything in the process that calls malloc, not to
    PyTorch alone, and cannot be undone: memory that is no longer needed is not returned to the system.

    Returns:
        True if it applies from now on. False if the C library has no such setting; nothing was changed then.

    Warns:
        the C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        mallopt = None
    if mallopt is not None and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER):
        return True
    warnings.warn("keep_pages: nothing was changed, as only glibc's malloc can keep freed pages", stacklevel=2)
    return False

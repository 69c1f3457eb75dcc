"""What building and rehearsing a pack change in Triton: its cache, its launchers, and the driver's library."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from triton.backends.nvidia import driver as nvidia
from triton.runtime.cache import get_cache_manager

COMPILED_LAUNCHERS = hasattr(nvidia, "make_launcher")  # up to Triton 3.6, one for each signature


@contextlib.contextmanager
def launchers(compile_module: Callable[..., Any]) -> Iterator[None]:
    """Inside, Triton compiles its launchers with this function."""
    before = nvidia.compile_module_from_src
    nvidia.compile_module_from_src = partial(compile_module, before)
    try:
        yield
    finally:
        nvidia.compile_module_from_src = before


def has_launcher(src: str, name: str) -> bool:
    """Whether a launcher is where Triton looks for it."""
    from triton.runtime import build

    key = build.hashlib.sha256((src + build.platform_key()).encode()).hexdigest()
    return get_cache_manager(key).get_file(f"{name}{build.sysconfig.get_config_var('EXT_SUFFIX')}") is not None


@contextlib.contextmanager
def environment(scratch: Path) -> Iterator[None]:
    """Inside, Triton has an empty cache that keeps only binaries, and a stub of the driver's library to link with."""
    library = scratch / "driver" / "libcuda.so.1"
    library.parent.mkdir()
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(library), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    given = {
        "TRITON_CACHE_DIR": str(scratch / "cache"),
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_LIBCUDA_PATH": str(library.parent),
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

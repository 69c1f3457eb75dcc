"""Run the CUDA backend on the host: csrc's .cu files and their bindings, compiled with g++ against tests/cuda_shim.

`install()` uses that module instead of fusedres._CUDA, so that the backend "cuda" takes CPU tensors. The module is
built once for each state of the sources and kept in the folder for temporary files; only changed files are compiled.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
SHIM = ROOT / "tests" / "cuda_shim"
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def sources(csrc: Path = CSRC) -> list[Path]:
    """Return every CUDA source file."""
    return sorted(csrc.rglob("*.cu"))


def kept() -> Path:
    """Return the folder that keeps object files from one session to the next."""
    folder = Path(tempfile.gettempdir(), f"fusedres-cuda-shim-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def locked() -> Iterator[Path]:
    """Lock that folder and return it. Other test processes wait, mostly because they need the same object files."""
    with (kept() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield kept()


def included(path: Path, csrc: Path) -> list[Path]:
    """Return a source file and all of our files that it includes, found by reading the #include lines."""
    found = [path]
    for file in found:  # the loop appends to this list
        for name in re.findall(r'^#include [<"]([\w./]+)[>"]', file.read_text(), re.MULTILINE):
            at = next((folder / name for folder in (SHIM, csrc) if (folder / name).is_file()), None)
            if at is not None and at not in found:
                found.append(at)
    return found


def compile_objects(files: list[Path], flags: list[str], folder: Path, csrc: Path = CSRC) -> list[Path]:
    """Compile C++ or CUDA sources for the host into `folder`; an object file is named by the hash of all its inputs."""
    assert COMPILER, "g++ was not found"

    def compiled(path: Path) -> Path:
        key = hashlib.sha256("\0".join([COMPILER, *FLAGS, *flags, str(csrc)]).encode())
        for part in included(path, csrc):
            key.update(part.read_bytes())
        target = folder / f"{path.stem}-{key.hexdigest()[:20]}.o"
        if not target.exists():
            made = target.with_suffix(f".{os.getpid()}")
            include = [f"-I{SHIM}", f"-I{csrc}"]
            command = [COMPILER, *FLAGS, *flags, *include, "-x", "c++", "-c", str(path), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
            made.replace(target)
        return target

    with locked(), ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, files))


@cache
def module() -> Any:
    """Build and load the functions of fusedres._CUDA, here with host pointers."""
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = compile_objects(sources(), ["-O1", "-fPIC", "-fvisibility=hidden"], kept())
    options = ["-O1", "-fPIC", "-fvisibility=hidden", '-DFUSEDRES_CUDA_ARCHS="host"', *include]
    objects += compile_objects([CSRC / "bindings_cuda.cpp"], options, kept())
    names = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:20]
    library = objects[0].with_name(f"_CUDA-{names}.so")
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        subprocess.run([COMPILER, "-shared", "-pthread", *map(str, objects), "-o", str(made)], check=True)
        made.replace(library)
    loader = ExtensionFileLoader("_CUDA", str(library))
    spec = spec_from_loader("_CUDA", loader)
    assert spec is not None
    loaded = module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


def install() -> None:
    """Make the backend "cuda" run on CPU tensors from now on."""
    from fusedres import cuda_support
    from fusedres.kernels import serving
    from fusedres.ops._library import OPS

    if cuda_support.module() is module():
        return
    cuda_support.substitute(module(), ("cpu", "meta"))
    serving.explain.cache_clear()  # it holds what was found while the backend could not run here
    for op in OPS.values():
        op._kernels.clear()

"""Finds nvcc, reads the list of architectures, and compiles csrc/**/*.cu, for setup.py and the tests.

CUDA_HOME            the folder of the toolkit; if it is not set, nvcc is searched on PATH
TORCH_CUDA_ARCH_LIST the architectures as torch writes them: "8.0;9.0a+PTX", separated by semicolons or spaces
MAX_JOBS             the number of parallel compilations (default: one per core)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# PTX of 9.0, as PTX of 9.0a runs on no newer GPU.
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0;9.0+PTX"

NAMES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}

# constexpr functions (common/row_map.h) are called on the device too.
FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


def find() -> str | None:
    """Return the path of nvcc, or None if there is none."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc")


def jobs() -> int:
    """Return how many compilations may run at once."""
    return max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))


def known(nvcc: str) -> set[str]:
    """Return the architectures that this nvcc compiles for, "80", "90", ..., without their a or f."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\bsm_(\d+)", listed))


def parse_archs(listed: str) -> list[tuple[str, bool]]:
    """Return ("90a", whether with PTX) for each entry of TORCH_CUDA_ARCH_LIST, in its order.

    Raises:
        ValueError: an entry is not an architecture.
    """
    for name, archs in NAMES.items():
        listed = re.sub(rf"\b{name}(\+PTX)?", lambda found, archs=archs: archs + (found[1] or ""), listed)
    found = []
    for entry in re.split(r"[;\s,]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 9.0+PTX, got {entry!r} in {listed!r}"
            )
        found.append((match[1] + match[2] + match[3], match[4] is not None))
    return found


def archs(nvcc: str) -> list[tuple[str, bool]]:
    """Return what to compile for: all of TORCH_CUDA_ARCH_LIST, or the default architectures that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        return parse_archs(asked)
    served = known(nvcc)
    return [(arch, ptx) for arch, ptx in parse_archs(DEFAULT_ARCHS) if arch.rstrip("af") in served]


def as_text(listed: Sequence[tuple[str, bool]]) -> str:
    """Return the architectures as TORCH_CUDA_ARCH_LIST writes them."""
    parts = []
    for arch, ptx in listed:
        match = re.fullmatch(r"(\d+)(\d)([af]?)", arch)
        assert match
        parts.append(f"{match[1]}.{match[2]}{match[3]}" + ("+PTX" if ptx else ""))
    return ";".join(parts)


def gencode(listed: Sequence[tuple[str, bool]]) -> list[str]:
    """Return nvcc's options for these architectures. Machine code is made once, even if one is named twice."""
    machine = dict.fromkeys(arch for arch, _ in listed if not _is_ptx_only(arch, listed))
    options = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in machine]
    return options + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch, ptx in listed if ptx]


def _is_ptx_only(arch: str, listed: Sequence[tuple[str, bool]]) -> bool:
    """Whether only PTX is needed, as for 9.0+PTX beside 9.0a: every GPU of 9.0 runs the code of 9.0a."""
    return (arch, True) in listed and (f"{arch}a", False) in listed


def library_dirs(nvcc: str) -> list[str]:
    """Return the folders of this nvcc's own libraries."""
    shown = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    line = next((line for line in shown.splitlines() if "LIBRARIES=" in line), "")
    return [found for found in re.findall(r'-L"?([^"\s]+)', line) if not found.endswith("stubs")]


def compile_all(
    nvcc: str,
    sources: Sequence[str],
    folder: str,
    include: str,
    options: Sequence[str],
    newest_header: float = float("inf"),
) -> list[str]:
    """Compile the sources, which are below `include`, to objects in `folder`, and return the objects' paths.

    An object that is newer than its source and all headers is kept.

    Raises:
        RuntimeError: a source does not compile. The error has nvcc's messages.
    """
    objects = [str(Path(folder, os.path.relpath(source, include)).with_suffix(".cu.o")) for source in sources]
    stale = []
    for source, target in zip(sources, objects, strict=True):
        newest = max(newest_header, os.stat(source).st_mtime)
        if not os.path.exists(target) or os.stat(target).st_mtime <= newest:
            stale.append((source, target))
    workers = min(jobs(), len(stale)) or 1
    threads = f"--threads={max(1, jobs() // workers)}"

    def run(pair: tuple[str, str]) -> None:
        source, target = pair
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=Path(target).parent) as own:
            made = str(Path(own, "made.o"))
            command = [nvcc, *FLAGS, *options, threads, f"-I{include}", "-c", source, "-o", made]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
            os.replace(made, target)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, stale))
    return objects

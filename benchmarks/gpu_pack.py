"""Builds what a GPU's minutes should not go into, on a machine without one: a wheel and everything Triton compiles.

    python benchmarks/gpu_pack.py --out DIR                 for sm_90a and this Python, torch and Triton
    python benchmarks/gpu_pack.py --out DIR --rehearse      launches all of it on a stubbed driver, and compiles nothing

DIR holds the wheel, each kernel that the blocks of ResNet-18 and ResNet-50 and the stem launch first at batch 256 in
bfloat16, Triton's launchers where its version compiles those, and a manifest; less than 64 MiB together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import triton
from candidates import Specialised, cases, launches_of, specialise
from harness import ROOT
from suite.pack import KERNELS, LAUNCHERS, MANIFEST, about, key_of, misfit, taken
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

from fusedres.kernels import launch as launching
from fusedres.kernels.launch import Launch

ARCH = 90
MOST_BYTES = 64 << 20
_COMPILED_LAUNCHERS = hasattr(nvidia, "make_launcher")  # up to Triton 3.6, one a signature


def first_launches(blocks: str) -> list[Launch]:
    """What these blocks launch, each with the config that is taken where nothing was measured."""
    return launches_of(cases(blocks).values(), ARCH)


def distinct(launches: Iterable[Launch]) -> list[Specialised]:
    """One for each compilation."""
    return list({what.key: what for what in (specialise(made, made.config, ARCH) for made in launches)}.values())


# --- building ---------------------------------------------------------------------------------------------------------


def build_wheel(out: Path) -> Path:
    """The package for this Python, its CUDA kernels for Hopper alone."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, env=os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0a"})
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def build_kernels(todo: list[Specialised], out: Path, processes: int) -> None:
    """Compiles them, each process its share, in a cache of its own."""
    for folder in (KERNELS, LAUNCHERS):
        (out / folder).mkdir(exist_ok=True)
    keyed = {_key(what): what for what in todo}  # before any is compiled: that changes what sources share
    children = []
    for index in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(KeyboardInterrupt):
                code = _build_share(dict(list(keyed.items())[index::processes]), out)
            os._exit(code)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("gpu_pack.py: a kernel does not compile; see above")


def _key(what: Specialised) -> str:
    parsed = make_backend(what.target).parse_options({**what.options, **what.source.parse_options()})
    return key_of(what.source, parsed, what.target.arch)


def _build_share(todo: dict[str, Specialised], out: Path) -> int:
    with tempfile.TemporaryDirectory() as scratch, _environment(Path(scratch)):
        for key, what in todo.items():
            folder = out / KERNELS / key
            folder.mkdir(exist_ok=True)
            compiled = triton.compile(what.source, target=what.target, options=what.options)
            for file in Path(get_cache_manager(compiled.hash).cache_dir).iterdir():
                if file.suffix in (".cubin", ".json") and not file.name.startswith("__grp__"):
                    (folder / file.name).write_bytes(file.read_bytes())
            if _COMPILED_LAUNCHERS:
                with contextlib.suppress(ImportError):  # it is built, and loads where there is a driver
                    nvidia.CudaLauncher(what.source, compiled.metadata)
        if _COMPILED_LAUNCHERS:
            with contextlib.suppress(ImportError):
                nvidia.CudaUtils()
        for module in Path(triton.knobs.cache.dir).glob("*/*.so"):
            target = out / LAUNCHERS / module.parent.name
            target.mkdir(exist_ok=True)
            (target / module.name).write_bytes(module.read_bytes())
    return 0


@contextlib.contextmanager
def _environment(scratch: Path) -> Iterator[None]:
    """An empty cache for Triton, which keeps binaries alone, and a driver's library to link with."""
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


def size_of(out: Path) -> int:
    """Bytes of everything in it."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


# --- rehearsing -------------------------------------------------------------------------------------------------------


class StubbedDriver:
    """Stands where Triton asks a GPU: launches end here."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
        )

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Hopper."""
        return GPUTarget("cuda", ARCH, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Looks for the launcher where Triton would build it."""
        if _COMPILED_LAUNCHERS:
            before = nvidia.compile_module_from_src
            nvidia.compile_module_from_src = self._found
            try:
                nvidia.CudaLauncher(source, metadata)
            finally:
                nvidia.compile_module_from_src = before
        return lambda *_: self.counts.update(["launches"])

    def _found(self, src: str, name: str, **_: Any) -> Any:
        from triton.runtime import build

        key = build.hashlib.sha256((src + build.platform_key()).encode()).hexdigest()
        suffix = build.sysconfig.get_config_var("EXT_SUFFIX")
        self.counts["launchers"] += 1
        self.counts["launchers compiled"] += get_cache_manager(key).get_file(f"{name}{suffix}") is None
        return SimpleNamespace(launch=None)


def rehearse(out: Path, blocks: str) -> Counter[str]:
    """Launches everything on a stubbed driver, with an empty cache and the pack; what was counted."""
    driver = StubbedDriver()
    with tempfile.TemporaryDirectory() as scratch, _environment(Path(scratch)):
        Path(triton.knobs.cache.dir).mkdir()
        triton.runtime.driver.set_active(driver)
        with taken(out) as counts:
            for made in first_launches(blocks):
                launching._run(made.kernel, made.grid, made.arguments, made.config)
    return driver.counts + counts


# --- command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Builds, or rehearses; 1 where the pack is too large, does not fit, or lacks something."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the pack")
    parser.add_argument("--rehearse", action="store_true", help="launch all of it on a stubbed driver")
    parser.add_argument("--blocks", default="all", help="a name or pattern of blocks.py, or stem (all)")
    parser.add_argument("--no-wheel", action="store_true", help="kernels only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    if launching.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    out: Path = options.out
    if options.rehearse:
        reason = misfit(out, ARCH)
        if reason:
            parser.error(f"--out: {reason}")
        counts = rehearse(out, options.blocks)
        print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        return int(counts["compiled"] + counts["launchers compiled"] > 0)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    if not options.no_wheel:
        print(f"{build_wheel(out).name}, {time.time() - begun:.0f} s", flush=True)
    todo = distinct(first_launches(options.blocks))
    build_kernels(todo, out, max(1, options.processes))
    (out / MANIFEST).write_text(json.dumps(about(ARCH), indent=1) + "\n")
    size = size_of(out)
    print(f"{len(todo)} kernels, {size / 2**20:.1f} MiB in all, {time.time() - begun:.0f} s; {about(ARCH)}")
    if size >= MOST_BYTES:
        print(f"gpu_pack.py: {size:,} bytes, at most {MOST_BYTES:,}", file=sys.stderr)
    return int(size >= MOST_BYTES)


if __name__ == "__main__":
    sys.exit(run(main, "gpu_pack.py"))

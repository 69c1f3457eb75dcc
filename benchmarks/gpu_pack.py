"""Builds what a GPU's minutes should not go into, on a machine without one: a wheel and everything Triton compiles.

    python benchmarks/gpu_pack.py --out DIR                 for sm_90a and this Python, torch and Triton
    python benchmarks/gpu_pack.py --out DIR --rehearse      launches all of it on a stubbed driver, and compiles nothing

DIR holds the wheel, a manifest, and an archive of each kernel that the calls of gpu_suite.py launch, and of Triton's
launchers where its version compiles those; less than 64 MiB together.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import triton
from common.harness import ROOT
from compiled_code.candidates import Specialised
from suite.launches import ARCH, Made, distinct, of_step
from suite.miscompiled import forget, waiting
from suite.pack import ARCHIVE, KERNELS, LAUNCHERS, MANIFEST, WAITS, about, key_of, misfit, taken
from suite.schedule import CALLS
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

import fusedres
from fusedres.kernels.triton_core import launch as launching
from fusedres.kernels.triton_core.launch import Launch

MOST_BYTES = 64 << 20
_COMPILED_LAUNCHERS = hasattr(nvidia, "make_launcher")  # up to Triton 3.6, one a signature


def launched_by(calls: Iterable[str], blocks: str) -> list[Made]:
    """What these calls launch on these blocks."""
    return [made for call in calls for step in CALLS[call] for made in of_step(step.name, blocks)]


# --- building ---------------------------------------------------------------------------------------------------------


def build_wheel(out: Path) -> Path:
    """The package for this Python, its CUDA kernels for Hopper alone."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, env=os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0a"})
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def build_kernels(todo: list[tuple[Specialised, bool]], out: Path, processes: int) -> None:
    """Compiles them, each process its share, in a cache of its own."""
    # before any is compiled: that changes what sources share
    keyed = {(WAITS if waits else KERNELS, _key(what)): what for what, waits in todo}
    with tempfile.TemporaryDirectory() as scratch:
        built, children = Path(scratch), []
        for index in range(processes):
            child = os.fork()
            if child == 0:
                code = 1
                with contextlib.suppress(KeyboardInterrupt):
                    code = _build_share(dict(list(keyed.items())[index::processes]), built)
                os._exit(code)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            raise SystemExit("gpu_pack.py: a kernel does not compile; see above")
        with ZipFile(out / ARCHIVE, "w", ZIP_DEFLATED) as archive:
            for file in sorted(path for path in built.rglob("*") if path.is_file()):
                archive.write(file, file.relative_to(built).as_posix())


def _key(what: Specialised) -> str:
    parsed = make_backend(what.target).parse_options({**what.options, **what.source.parse_options()})
    return key_of(what.source, parsed, what.target.arch)


def _build_share(todo: dict[tuple[str, str], Specialised], built: Path) -> int:
    with tempfile.TemporaryDirectory() as scratch, _environment(Path(scratch)):
        for (kind, key), what in todo.items():
            with waiting(Path(scratch) / WAITS, []) if kind == WAITS else contextlib.nullcontext():
                compiled = triton.compile(what.source, target=what.target, options=what.options)
                files = Path(get_cache_manager(compiled.hash).cache_dir).iterdir()
                for file in files:
                    if file.suffix in (".cubin", ".json") and not file.name.startswith("__grp__"):
                        _keep(file, built / kind / key)
            if _COMPILED_LAUNCHERS:
                with _launchers(_built):
                    nvidia.CudaLauncher(what.source, compiled.metadata)
        if _COMPILED_LAUNCHERS:
            with contextlib.suppress(ImportError):  # it is built, and loads where there is a driver
                nvidia.CudaUtils()
        for module in Path(triton.knobs.cache.dir).glob("*/*.so"):
            _keep(module, built / LAUNCHERS / module.parent.name)
    return 0


def _keep(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).write_bytes(file.read_bytes())


@contextlib.contextmanager
def _launchers(compile_module: Callable[..., Any]) -> Iterator[None]:
    """Inside, Triton compiles its launchers by this function."""
    before = nvidia.compile_module_from_src
    nvidia.compile_module_from_src = partial(compile_module, before)
    try:
        yield
    finally:
        nvidia.compile_module_from_src = before


def _built(build: Callable[..., Any], src: str, name: str, **more: Any) -> Any:
    if not _has_launcher(src, name):
        with contextlib.suppress(ImportError):  # it is built, and loads where there is a driver
            build(src=src, name=name, **more)
    return SimpleNamespace(launch=None)


def _has_launcher(src: str, name: str) -> bool:
    """Whether it is where Triton looks for it."""
    from triton.runtime import build

    key = build.hashlib.sha256((src + build.platform_key()).encode()).hexdigest()
    return get_cache_manager(key).get_file(f"{name}{build.sysconfig.get_config_var('EXT_SUFFIX')}") is not None


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


def _is_checkout() -> bool:
    """Whether the package that is compiled is the one of the wheel."""

    def kernels(package: Path) -> dict[Path, bytes]:
        folder = package / "kernels"
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.py")}

    return kernels(Path(fusedres.__file__).parent) == kernels(ROOT / "fusedres")


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
            unload_module=lambda _: None,
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
            with _launchers(self._found):
                nvidia.CudaLauncher(source, metadata)
        return lambda *_: self.counts.update(["launches"])

    def _found(self, build: Callable[..., Any], src: str, name: str, **_: Any) -> Any:
        self.counts["launchers"] += 1
        self.counts["launchers compiled"] += not _has_launcher(src, name)
        return SimpleNamespace(launch=None)


def rehearse(out: Path, todo: Sequence[Made]) -> Counter[str]:
    """Launches everything on a stubbed driver, with an empty cache and the pack; what was counted."""
    driver = StubbedDriver()
    forget(made.launch.kernel for made in todo)
    with tempfile.TemporaryDirectory() as scratch, _environment(Path(scratch)):
        triton.runtime.driver.set_active(driver)
        with taken(out) as packed:
            _launch(made.launch for made in todo if not made.waits)
        waited = [made.launch for made in todo if made.waits]
        kernels = list({made.name: made.kernel for made in waited}.values())
        with waiting(Path(scratch) / WAITS, kernels), taken(out, WAITS) as packed_waits:
            _launch(waited)
    return driver.counts + packed + packed_waits


def _launch(todo: Iterable[Launch]) -> None:
    for made in todo:
        launching._run(made.kernel, made.grid, made.arguments, made.config)


# --- command ----------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Builds, or rehearses; 1 where the pack is too large, does not fit, or lacks something."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the pack")
    parser.add_argument("--rehearse", action="store_true", help="launch all of it on a stubbed driver")
    parser.add_argument("--call", nargs="+", choices=tuple(CALLS), default=list(CALLS), help="of gpu_suite.py (both)")
    parser.add_argument("--blocks", default="all", help="a name or pattern of blocks.py, or stem (all)")
    parser.add_argument("--no-wheel", action="store_true", help="kernels only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    if launching.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    if not _is_checkout():
        parser.error("the installed fusedres has other kernels than this checkout; install it: pip install .")
    out: Path = options.out
    if options.rehearse:
        reason = misfit(out, ARCH)
        if reason:
            parser.error(f"--out: {reason}")
        counts = rehearse(out, launched_by(options.call, options.blocks))
        print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        return int(counts["compiled"] + counts["launchers compiled"] > 0)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    if not options.no_wheel:
        print(f"{build_wheel(out).name}, {time.time() - begun:.0f} s", flush=True)
    todo = distinct(launched_by(options.call, options.blocks))
    build_kernels(todo, out, max(1, options.processes))
    (out / MANIFEST).write_text(json.dumps(about(ARCH), indent=1) + "\n")
    size = size_of(out)
    print(f"{len(todo)} kernels, {size / 2**20:.1f} MiB in all, {time.time() - begun:.0f} s; {about(ARCH)}")
    if size >= MOST_BYTES:
        print(f"gpu_pack.py: {size:,} bytes, at most {MOST_BYTES:,}", file=sys.stderr)
    return int(size >= MOST_BYTES)


if __name__ == "__main__":
    sys.exit(run(main, "gpu_pack.py"))

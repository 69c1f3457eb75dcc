"""Builds a pack: the wheel, and every kernel and launcher that Triton compiles."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import triton
from common.harness import ROOT
from compiled_code.candidates import Specialised
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

import fusedres
from suite.miscompiled import waiting
from suite.pack import ARCHIVE, KERNELS, LAUNCHERS, WAITS, key_of
from suite.pack_triton import COMPILED_LAUNCHERS, environment, has_launcher, launchers


def build_wheel(out: Path) -> Path:
    """Build the wheel of the package for this Python, with CUDA kernels for Hopper only."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, env=os.environ | {"TORCH_CUDA_ARCH_LIST": "9.0a"})
    return max(out.glob("*.whl"), key=lambda path: path.stat().st_mtime)


def build_kernels(todo: list[tuple[Specialised, bool]], out: Path, processes: int) -> None:
    """Compile the kernels in several processes, each with its own cache, and write the archive."""
    # The keys come first, as compiling changes data that the sources share.
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
    with tempfile.TemporaryDirectory() as scratch, environment(Path(scratch)):
        for (kind, key), what in todo.items():
            with waiting(Path(scratch) / WAITS, []) if kind == WAITS else contextlib.nullcontext():
                compiled = triton.compile(what.source, target=what.target, options=what.options)
                files = Path(get_cache_manager(compiled.hash).cache_dir).iterdir()
                for file in files:
                    if file.suffix in (".cubin", ".json") and not file.name.startswith("__grp__"):
                        _keep(file, built / kind / key)
            if COMPILED_LAUNCHERS:
                with launchers(_built):
                    nvidia.CudaLauncher(what.source, compiled.metadata)
        if COMPILED_LAUNCHERS:
            with contextlib.suppress(ImportError):  # it is built, but it loads only if there is a driver
                nvidia.CudaUtils()
        for module in Path(triton.knobs.cache.dir).glob("*/*.so"):
            _keep(module, built / LAUNCHERS / module.parent.name)
    return 0


def _keep(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).write_bytes(file.read_bytes())


def _built(build: Callable[..., Any], src: str, name: str, **more: Any) -> Any:
    if not has_launcher(src, name):
        with contextlib.suppress(ImportError):  # it is built, but it loads only if there is a driver
            build(src=src, name=name, **more)
    return SimpleNamespace(launch=None)


def is_checkout() -> bool:
    """Whether the installed package has the kernels of this checkout, which the wheel is built from."""

    def kernels(package: Path) -> dict[Path, bytes]:
        folder = package / "kernels"
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.py")}

    return kernels(Path(fusedres.__file__).parent) == kernels(ROOT / "fusedres")

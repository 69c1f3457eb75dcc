"""A pack: the wheel, the kernels and Triton's launchers that gpu_pack.py built on a machine without a GPU.

The hash under which Triton keeps a kernel depends on the build of Triton, so it differs between machines with the same
version. A pack therefore has its own keys: of the source of the kernel, its specialisation and the version. Before
Triton compiles a kernel, it is looked up in the pack and copied to where Triton looks for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
import triton
from triton.compiler import compiler
from triton.compiler.compiler import make_backend
from triton.runtime.cache import get_cache_manager

ARCHIVE, MANIFEST = "kernels.zip", "manifest.json"
KERNELS, LAUNCHERS = "kernels", "launchers"  # folders of the archive
WAITS = "waits"  # kernels that wait for every wgmma
_compile = compiler.compile


def about(capability: int) -> dict[str, str]:
    """Return what must be the same on both machines; with the version of the kernels if the package is installed."""
    found = {
        "python": f"cp{sys.version_info.major}{sys.version_info.minor}",
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "triton": triton.__version__,
        "capability": str(capability),
    }
    with suppress(ImportError):
        from fusedres.dispatch.store import versions

        found["kernels"] = str(versions()["kernels"])
    return found


def misfit(folder: Path, capability: int) -> str | None:
    """Return why a pack does not fit this machine, None if it fits."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{folder} has no manifest: {error}"
    here = about(capability)
    other = [f"{name} {found.get(name)}, here {value}" for name, value in here.items() if found.get(name) != value]
    return f"it is for {'; '.join(other)}" if other else None


def key_of(source: Any, options: Any, capability: int) -> str:
    """Return the key of a compilation, from the source and the parsed options of Triton's compile."""
    parts = (source.hash(), options.hash(), triton.__version__, capability)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class _Taken:
    """An opened pack."""

    def __init__(self, archive: ZipFile, kernels: str) -> None:
        self.archive, self.counts = archive, Counter[str]()
        self.files: defaultdict[str, list[str]] = defaultdict(list)  # key → its files
        for file in archive.namelist():
            where, key, name = file.split("/")
            if where == kernels:
                self.files[key].append(file)
            elif where == LAUNCHERS:
                _keep(archive.read(file), Path(triton.knobs.cache.dir) / key / name)

    def look_up(self, source: Any, target: Any, options: Any) -> None:
        """Copy a kernel of the pack, if it is there, to where Triton looks for it."""
        backend = make_backend(target)
        parsed = backend.parse_options({**(options or {}), **source.parse_options()})
        hash_ = hashlib.sha256(_key_of_triton(source, backend, parsed).encode()).hexdigest()
        cache, name = get_cache_manager(hash_), f"{source.name[:150]}.json"
        if cache.get_group(name) is None:
            files = self.files.get(key_of(source, parsed, target.arch), [])
            self.counts["packed" if files else "compiled"] += 1
            if files:
                contents = {Path(file).name: self.archive.read(file) for file in files}
                cache.put_group(name, {file: cache.put(content, file) for file, content in contents.items()})


_taken: list[_Taken] = []  # only the last one is used


def _look_up_and_compile(source: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
    """Replaces triton.compile. Kernels that were bound meanwhile keep it, so it also works when no pack is open."""
    if target is None:
        target = triton.runtime.driver.active.get_current_target()
    if _taken:
        _taken[-1].look_up(source, target, options)
    return _compile(source, target, options, **more)


@contextmanager
def taken(folder: Path, kernels: str = KERNELS) -> Iterator[Counter[str]]:
    """Inside, kernels come from this folder of the pack if it has them; yield the counts "packed" and "compiled"."""
    before = triton.compiler.compile
    with ZipFile(folder / ARCHIVE) as archive:
        _taken.append(_Taken(archive, kernels))
        triton.compiler.compile = triton.compile = _look_up_and_compile
        try:
            yield _taken[-1].counts
        finally:
            triton.compiler.compile = triton.compile = before
            _taken.pop()


def _keep(content: bytes, path: Path) -> None:
    """Write the file at once or not at all, as other processes look for it at the same time."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{path.name}.{os.getpid()}")
        written.write_bytes(content)
        written.replace(path)


def _key_of_triton(source: Any, backend: Any, options: Any) -> str:
    return str(compiler.get_cache_key(source, backend, options, env_vars=compiler.get_cache_invalidating_env_vars()))

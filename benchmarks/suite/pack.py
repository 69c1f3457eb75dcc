"""What gpu_pack.py built on a machine without a GPU, for one that fits: a wheel, kernels, and Triton's launchers.

Triton keeps a kernel under a hash of its own build, which is another one for the same version elsewhere. So a pack has
keys of its own, of the kernel's source, its specialisation and the version; what Triton is about to compile is looked
up there and put where Triton looks.
"""

from __future__ import annotations

import hashlib
import json
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
WAITS = "waits"  # kernels in which every wgmma is waited for
_compile = compiler.compile


def about(capability: int) -> dict[str, str]:
    """What must be the same on both machines; of the package once it is installed."""
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
    """Why a pack is of no use here, None where it is."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{folder} has no manifest: {error}"
    here = about(capability)
    other = [f"{name} {found.get(name)}, here {value}" for name, value in here.items() if found.get(name) != value]
    return f"it is for {'; '.join(other)}" if other else None


def key_of(source: Any, options: Any, capability: int) -> str:
    """Of a compilation: source and parsed options of Triton's compile."""
    parts = (source.hash(), options.hash(), triton.__version__, capability)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@contextmanager
def taken(folder: Path, kernels: str = KERNELS) -> Iterator[Counter[str]]:
    """Inside, what is in this folder of the pack is not compiled, and no other; counts "packed" and "compiled" ones."""
    counts: Counter[str] = Counter()
    before = triton.compiler.compile

    def compile(source: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        if target is None:
            target = triton.runtime.driver.active.get_current_target()
        backend = make_backend(target)
        parsed = backend.parse_options({**(options or {}), **source.parse_options()})
        hash_ = hashlib.sha256(_key_of_triton(source, backend, parsed).encode()).hexdigest()
        cache, name = get_cache_manager(hash_), f"{source.name[:150]}.json"
        if cache.get_group(name) is None:
            files = found.get(key_of(source, parsed, target.arch), [])
            counts["packed" if files else "compiled"] += 1
            if files:
                cache.put_group(
                    name, {Path(file).name: cache.put(archive.read(file), Path(file).name) for file in files}
                )
        return _compile(source, target, options, **more)

    with ZipFile(folder / ARCHIVE) as archive:
        found: defaultdict[str, list[str]] = defaultdict(list)
        for file in archive.namelist():
            where, key, name = file.split("/")
            if where == kernels:
                found[key].append(file)
            elif where == LAUNCHERS:
                get_cache_manager(key).put(archive.read(file), name)
        triton.compiler.compile = triton.compile = compile
        try:
            yield counts
        finally:
            triton.compiler.compile = triton.compile = before


def _key_of_triton(source: Any, backend: Any, options: Any) -> str:
    return str(compiler.get_cache_key(source, backend, options, env_vars=compiler.get_cache_invalidating_env_vars()))

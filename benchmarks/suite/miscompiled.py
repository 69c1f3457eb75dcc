"""Look for two known miscompilations in results.

waits: every op with a product is compiled again so that it waits for each wgmma before anything else runs. If bits
differ, data was overwritten while a wgmma was in flight (triton#9433, triton#11047).
warps: convolutions in true float32 with eight warps, which fusedres does not use (pytorch#173068). Wrong results there
are reported, but they are not an error.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from common import blocks

from fusedres.kernels.triton_core.launch import Config, Launch, Problem, choosing, record_launches
from fusedres.tune.calls import Call, Visit
from fusedres.tune.compare import Expected, differing
from suite.arithmetic import GEMMS
from suite.pack import WAITS, taken
from suite.precision import PRECISIONS
from suite.settings import Case, Settings, first_lines
from suite.walk import TINY, walk_block

BLOCKS, WAYS = "resnet50.*", ("fused min", "fused")
OF_TAPS = ("conv_fprop", "conv_dgrad", "conv_bn_add_relu")
_SCRIPT = r"""#!/bin/sh
for argument in "$@"; do
    case "$argument" in
        *.ptx) sed -i -E 's/(wgmma\.wait_group\.sync\.aligned)[[:space:]]+[0-9]+;/\1 0;/' "$argument" ;;
    esac
done
exec "$FUSEDRES_PTXAS" "$@"
"""


@contextmanager
def waiting(folder: Path, kernels: Sequence[Any]) -> Iterator[None]:
    """Inside, these kernels are compiled again with a wait after every wgmma, into a cache in `folder`."""
    folder.mkdir(exist_ok=True)
    script = folder / "ptxas"
    if not script.exists():
        script.write_text(_SCRIPT)
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    given = {
        "FUSEDRES_PTXAS": triton.knobs.nvidia.ptxas.path,
        "TRITON_PTXAS_PATH": str(script),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    forget(kernels)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        forget(kernels)


def forget(kernels: Iterable[Any]) -> None:
    """Make this process forget the compiled versions of these kernels."""
    for kernel in kernels:
        getattr(kernel, "device_caches", {}).clear()  # kernels of the interpreter have none


def cases(settings: Settings) -> list[Case]:
    """Return the cases of waits at batch 256, then those of warps."""
    chosen: Mapping[str, Any] = TINY if settings.tiny else blocks.select([BLOCKS])
    ways, batch = (WAYS[:1], 2) if settings.tiny else (WAYS, 256)
    usual = PRECISIONS["bfloat16" if settings.on_gpu else "float32"]
    folder = tempfile.TemporaryDirectory(prefix="fusedres-waits-")  # removed when the cases that hold it are freed
    seen: dict[str, set[str]] = {"waits": set(), "warps": set()}
    looked: tuple[tuple[str, Callable[..., None], Any, tuple[str, ...]], ...] = (
        ("waits", partial(_of_waits, folder=folder), usual, ways),
        ("warps", _of_warps, PRECISIONS["float32"], ("fused",)),
    )
    found = []
    for what, look, precision, through in looked:
        for way in through:
            for name, block in chosen.items():
                case = f"{what}, {name}, {way}"
                walk = partial(walk_block, name=name, block=block, way=way, batch=batch, dtype=precision.dtype)
                visit = Visit(seen[what], partial(look, settings, case))
                found.append(Case(case, partial(_walk, settings, precision, walk, visit), settings.patience))
    return found


def _walk(settings: Settings, precision: Any, walk: partial, visit: Visit) -> None:
    with precision.switched():
        walk(settings, visit)


def _of_waits(settings: Settings, case: str, call: Call, folder: tempfile.TemporaryDirectory[str]) -> None:
    backend = call.args[-1]
    with record_launches() as made:
        as_compiled = call.results(backend)
    kernels = _products(made)
    if not kernels:
        return
    try:
        packed = taken(settings.pack, WAITS) if settings.pack else nullcontext()
        with waiting(Path(folder.name), kernels), packed:
            waited = call.results(backend)
        found = differing(as_compiled, waited)
        error = found and f"{found} where every wgmma is waited for"
    except Exception as failure:
        error = _said(settings, failure)
    settings.row(case, op=call.op.name, name=call.signature, waits="wrong" if error else "right", error=error)


def _products(made: Sequence[Launch]) -> list[Any]:
    return list({launch.name: launch.kernel for launch in made if launch.name in GEMMS}.values())


def _of_warps(settings: Settings, case: str, call: Call) -> None:
    if call.op.name not in OF_TAPS:
        return
    expected = Expected(call)
    try:
        with choosing(in_eight_warps):
            wrong = expected.wrong(call.results(call.args[-1]))
    except Exception as failure:
        wrong = _said(settings, failure)
    about = {"op": call.op.name, "name": call.signature, "dtype": "float32"}
    settings.row(case, **about, eight_warps="wrong" if wrong else "right", why=wrong)


def in_eight_warps(problem: Problem, candidates: Sequence[Config]) -> Config:
    return replace(candidates[0], num_warps=8)


def _said(settings: Settings, failure: Exception) -> str:
    if settings.on_gpu:
        torch.cuda.synchronize()  # raises if the GPU is lost, and so ends the whole case
    return f"{type(failure).__name__}: {first_lines(str(failure))}"

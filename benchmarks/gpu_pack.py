"""Builds what a GPU's minutes should not go into, on a machine without one: a wheel and everything Triton compiles.

    python benchmarks/gpu_pack.py --out DIR                 for sm_90a and this Python, torch and Triton
    python benchmarks/gpu_pack.py --out DIR --rehearse      launches all of it on a stubbed driver, and compiles nothing

DIR holds the wheel, a manifest, and an archive of each kernel that the calls of gpu_suite.py launch, and of Triton's
launchers where its version compiles those; less than 64 MiB together.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

from suite.launches import ARCH, Made, distinct, of_step
from suite.pack import MANIFEST, about, misfit
from suite.pack_building import build_kernels, build_wheel, is_checkout
from suite.pack_rehearsal import launch_pack
from suite.schedule import CALLS

from fusedres.kernels.triton_core import launch as launching

MOST_BYTES = 64 << 20


def launched_by(calls: Iterable[str], blocks: str) -> list[Made]:
    """What these calls launch on these blocks."""
    return [made for call in calls for step in CALLS[call] for made in of_step(step.name, blocks)]


def size_of(out: Path) -> int:
    """Bytes of everything in it."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


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
    if not is_checkout():
        parser.error("the installed fusedres has other kernels than this checkout; install it: pip install .")
    out: Path = options.out
    if options.rehearse:
        reason = misfit(out, ARCH)
        if reason:
            parser.error(f"--out: {reason}")
        counts = launch_pack(out, launched_by(options.call, options.blocks))
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

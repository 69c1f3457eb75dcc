"""Builds the wheel and all kernels of Triton on a machine without a GPU, to save time on the GPU.

    python benchmarks/gpu_pack.py --out DIR                 for sm_90a and this Python, torch and Triton
    python benchmarks/gpu_pack.py --out DIR --rehearse      launch all kernels on a stubbed driver; compiles nothing

DIR gets the wheel, a manifest, and an archive of the kernels that the calls of gpu_suite.py launch and of Triton's
launchers, if its version compiles them. Together these are smaller than 64 MiB.
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
    """Return what these calls launch on these blocks."""
    return [made for call in calls for step in CALLS[call] for made in of_step(step.name, blocks)]


def size_of(out: Path) -> int:
    """Return the bytes of all files in the folder."""
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> int:
    """Build a pack or rehearse with it; return 1 if the pack is too large or lacks something."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pack")
    parser.add_argument("--rehearse", action="store_true", help="launch all kernels of the pack on a stubbed driver")
    parser.add_argument(
        "--call", nargs="+", choices=tuple(CALLS), default=list(CALLS), help="calls of gpu_suite.py (default: both)"
    )
    parser.add_argument("--blocks", default="all", help="a name or pattern of common/blocks.py, or stem (default: all)")
    parser.add_argument("--no-wheel", action="store_true", help="kernels only")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    if launching.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    if not is_checkout():
        parser.error("the installed fusedres has other kernels than this checkout; install the checkout: pip install .")
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

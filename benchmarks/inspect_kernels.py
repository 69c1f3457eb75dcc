"""Compiles every Triton kernel without a GPU, and shows registers, spills, shared memory and pipelining.

Blocks and ops run on meta tensors, where a launch is only recorded. Each recorded kernel is compiled with each of its
candidate configs, specialised as Triton's JIT does for these arguments. The numbers come from the SASS and the resource
usage. Nothing is timed. TRITON_INTERPRET must not be set.

    python benchmarks/inspect_kernels.py --arch 90 --kernel bn_relu --json rows.json
    python benchmarks/inspect_kernels.py --hazards

As a library:

    # all candidates; x and state are on "meta"
    print(table(inspect_function(lambda: bn_relu(x, state, backend="triton"), arch=90)))

A product of 16-bit operands must use tensor cores (wgmma on sm_90) and have a full pipeline; the exceptions are in
compiled_code/pipelines.py. No kernel may touch data that a wgmma in flight uses: hazards.py checks registers, ptx.py
checks shared memory, and --hazards prints what they found for each candidate. The last lines name products with fewer
than FEWEST good candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
import triton
from common.harness import Progress, machine, print_table
from compiled_code.candidates import (
    DTYPES,
    GPUS,
    Specialised,
    cases,
    compilations,
    describe,
    launches_of,
    problem,
    record,
    specialise,
)
from compiled_code.hazards import overwrites
from compiled_code.pipelines import COPIES, STORES, lacks
from compiled_code.ptx import races
from compiled_code.sass import TENSOR_CORE, Binary
from memory_traffic.launched import WAYS

from fusedres.kernels.triton_core import launch as launching
from fusedres.kernels.triton_core.launch import Launch

FEWEST = 4
THREADS = {80: 2048, 89: 1536, 90: 2048}  # per multiprocessor


@dataclass(frozen=True)
class Row:
    """The result of one compilation. Loop counts are None if the kernel has no main loop."""

    kernel: str
    problem: str
    config: str
    arch: int
    key: str  # of the compilation
    failed: str | None  # the error if it does not compile
    registers: int
    spilled: int  # bytes per thread
    shared: int  # bytes per program
    resident: int  # programs per multiprocessor, by registers, shared memory and threads
    dot: bool
    product: bool  # a dot of 16-bit operands
    tensor_core: str | None  # HGMMA (wgmma), HMMA (mma), DMMA; None: no tensor-core instruction
    tensor_core_count: int
    unrolled: bool  # tensor-core instructions stand in no loop
    loop_async_copies: int | None  # cp.async or TMA: the fewest of the main loops
    loop_shared_stores: int | None  # the most of the main loops
    wgmma_waits: tuple[int, ...]  # for every wait in main loops: how many groups of wgmma may stay in flight
    overwrites: int  # instructions that touch registers of a wgmma in flight
    races: int  # writes to shared memory that a wgmma may still read
    loads: int  # from global memory, asynchronous ones included
    loads_16: int  # of these, loads of 16 bytes per thread
    stores: int
    stores_16: int
    compile_s: float  # near 0 if it was in Triton's cache
    fp_fusion: bool | None  # None: Triton's default
    lacks: tuple[str, ...]  # what a full pipeline has and this one lacks by design: pipelines.py
    problems: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The problems, or ok."""
        return "; ".join(self.problems) or "ok"


def _inspect(what: Specialised, known: dict[str, Any] | None = None) -> Row:
    launch, config, arch = what.launch, what.config, what.target.arch
    named = {
        "kernel": launch.name,
        "problem": problem(launch),
        "config": describe(config),
        "arch": arch,
        "key": what.name,
        "fp_fusion": what.fp_fusion,
        "lacks": tuple(lacks(launch, config, arch)),
        "problems": (),
    }
    if known is not None:
        kept = {name: known[name] for name in Row.__dataclass_fields__} | {"wgmma_waits": tuple(known["wgmma_waits"])}
        return _judged(Row(**kept | named))
    start = time.perf_counter()
    try:
        compiled = triton.compile(what.source, target=what.target, options=what.options)
    except Exception as error:  # every error of Triton or ptxas is a result
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        nothing: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__, 0) | {
            "tensor_core": None,
            "wgmma_waits": (),
            "loop_async_copies": None,
            "loop_shared_stores": None,
        }
        return _judged(Row(**nothing | named | {"failed": f"{type(error).__name__}: {reason}"}))
    seconds = time.perf_counter() - start
    binary = Binary(compiled.asm["cubin"])
    shared, threads = compiled.metadata.shared, 32 * config.num_warps
    registers, spilled = binary.resources
    kinds = [k for k in TENSOR_CORE if binary.count(k)]
    loads = [op for op in binary.opcodes if op.startswith("LDG")]
    stores = [op for op in binary.opcodes if op.startswith("STG")]
    row = Row(
        **named,
        failed=None,
        registers=registers,
        spilled=spilled,
        shared=shared,
        resident=min(
            65_536 // (8 * -(-registers // 8) * threads),
            (GPUS[arch].shared_memory + 1024) // (shared + 1024),
            THREADS[arch] // threads,
            32,
        ),
        dot="tt.dot " in compiled.asm["ttir"],
        product=re.search(r"tt\.dot .*x(bf16|f16)>", compiled.asm["ttir"]) is not None,
        tensor_core="+".join(kinds) or None,
        tensor_core_count=sum(binary.count(k) for k in kinds),
        unrolled=binary.unrolled,
        loop_async_copies=binary.async_copies,
        loop_shared_stores=binary.shared_stores,
        wgmma_waits=tuple(sorted(binary.wgmma_waits)),
        overwrites=len({hazard.by.address for hazard in overwrites(binary.instructions)}),
        races=_races(compiled.asm["ptx"], what),
        loads=len(loads),
        loads_16=sum(".128" in op for op in loads),
        stores=len(stores),
        stores_16=sum(".128" in op for op in stores),
        compile_s=round(seconds, 3),
    )
    return _judged(row)


def _races(ptx: str, what: Specialised) -> int:
    """Return the races of one thread of each warpgroup."""
    if "wgmma" not in ptx:
        return 0
    return sum(len(races(ptx, what.arguments, 128 * group)) for group in range(what.config.num_warps // 4))


def _judged(row: Row) -> Row:
    return replace(row, problems=tuple(_problems(row)))


def _problems(row: Row) -> Iterator[str]:
    if row.failed is not None:
        yield f"does not compile: {row.failed}"
    if row.fp_fusion is None:
        yield "fp fusion is left to Triton's default"
    if row.spilled:
        yield f"spills {row.spilled} bytes"
    limit = GPUS[row.arch].shared_memory
    if row.shared > limit:
        yield f"shared memory {row.shared:,} over {limit:,}"
    if row.overwrites:
        yield f"{row.overwrites} instructions touch registers of a wgmma in flight"
    if row.races:
        yield f"{row.races} writes to shared memory that a wgmma may still read"
    if not row.product:
        return
    if row.arch >= 90 and "HGMMA" not in (row.tensor_core or ""):
        yield "a 16-bit dot without wgmma"
    elif row.tensor_core is None:
        yield "a 16-bit dot without tensor cores"
    # mma is synchronous: if it is unrolled, stores of the first columns mix with the products of the last columns.
    missed = {
        COPIES: row.loop_async_copies == 0 and not row.unrolled,
        STORES: bool(row.loop_shared_stores) and not (row.unrolled and row.tensor_core == "HMMA"),
    }
    yield from (what for what, found in missed.items() if found and what not in row.lacks)


# --- many -------------------------------------------------------------------------------------------------------------


def inspect_launches(launches: Iterable[Launch], arch: int = 90, limit: int | None = None) -> list[Row]:
    """Return one row for every distinct compilation of the candidates of the launches (the first `limit` of each)."""
    return [_inspect(what) for what in compilations(launches, arch, limit)]


def inspect_function(function: Callable[[], Any], arch: int = 90, limit: int | None = None) -> list[Row]:
    """Call inspect_launches for the launches of `function`, which runs ops or blocks on meta tensors."""
    return inspect_launches(record(function, arch), arch, limit)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as text, grouped by problem."""
    lines = []
    for _, group in groupby(rows, lambda r: (r.kernel, r.arch, r.problem)):
        same = list(group)
        lines += ["", *heading(same[0]), *map(line, same)]
    return "\n".join(lines)


def heading(row: Row) -> list[str]:
    """Return the lines above the rows of a problem."""
    return [f"{row.kernel} [sm_{row.arch}] {row.problem}", "  ".join(f"{n:>{w}}" for n, w in _COLUMNS)]


def line(row: Row) -> str:
    """Return the row as text."""
    loop = "-" if row.loop_async_copies is None else f"{row.loop_async_copies}/{row.loop_shared_stores}"
    cells = (
        row.config, row.registers, row.spilled, f"{row.shared:,}", row.resident,
        f"{row.tensor_core_count} {row.tensor_core}" if row.tensor_core else "-", loop,
        _waits([row]), f"{row.overwrites}/{row.races}", f"{row.loads_16}/{row.loads}",
        f"{row.stores_16}/{row.stores}", f"{row.compile_s:.1f}", row.verdict,
    )  # fmt: skip
    return "  ".join(f"{c!s:>{w}}" for c, (_, w) in zip(cells, _COLUMNS, strict=True))


_COLUMNS = (
    ("config", 44), ("regs", 4), ("spill", 5), ("shared", 8), ("res", 3), ("tensor core", 11), ("copy/sts", 8),
    ("waits", 5), ("hazards", 7), ("ld16", 7), ("st16", 7), ("s", 5), ("verdict", 7),
)  # fmt: skip


def _waits(rows: Iterable[Row]) -> str:
    return ",".join(map(str, sorted({wait for row in rows for wait in row.wgmma_waits}))) or "-"


def hazards(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the hazards of each kernel and candidate: the worst of its compilations."""
    named = ((row.kernel, row.config, row) for row in rows if "HGMMA" in (row.tensor_core or ""))
    by_candidate: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for kernel, config, row in sorted(named, key=lambda found: found[:2]):
        by_candidate[kernel, config].append(row)
    header = ["kernel", "candidate", "Triton", "compiled", "overwrites", "races", "waits", "registers"]
    cells = []
    for (kernel, config), same in by_candidate.items():
        worst = (max(getattr(row, name) for row in same) for name in ("overwrites", "races", "registers"))
        overwritten, raced, registers = map(str, worst)
        counts = [str(len(same)), overwritten, raced, _waits(same), registers]
        cells.append([kernel, config, triton.__version__, *counts])
    return header, cells


def live(launches: Iterable[Launch], rows: Iterable[Row], arch: int = 90) -> dict[tuple[str, str], int]:
    """Return kernel and problem of every product → how many of its candidates have no problem."""
    rows = list(rows)
    dots, good = {row.kernel for row in rows if row.dot}, {row.key for row in rows if not row.problems}
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for launch in launches:
        if launch.name in dots:
            keys = {specialise(launch, config, arch).name for config in launch.candidates}
            found[launch.name, problem(launch)] |= keys & good
    return {key: len(keys) for key, keys in found.items()}


# --- command ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    return {row["key"]: row for row in rows if row.keys() >= Row.__dataclass_fields__.keys()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every candidate of every Triton kernel; needs no GPU.")
    parser.add_argument("--arch", type=int, choices=tuple(GPUS), default=90)
    parser.add_argument(
        "--kernel", nargs="*", default=("",), help="only kernels with one of these texts in their names (default: all)"
    )
    parser.add_argument(
        "--blocks",
        default="all",
        help="what runs: a name or pattern of common/blocks.py, stem, tails (default: all)",
    )
    parser.add_argument(
        "--ways", nargs="*", choices=tuple(WAYS), default=tuple(WAYS), help="how blocks run (default: all)"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="tf32 and fp32 are float32 (default: bf16)"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--limit", type=int, help="only the first candidates of each launch")
    parser.add_argument(
        "--hazards", action="store_true", help="print only the hazards of wgmmas in flight, by candidate"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="append the rows, one per line; kernels in this file are not compiled again"
    )
    options = parser.parse_args(argv)
    if launching.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    torch.backends.cudnn.conv.fp32_precision = "ieee" if options.dtype == "fp32" else "tf32"
    runs = cases(options.blocks, options.ways, options.batch, DTYPES[options.dtype]).values()
    wanted = launches_of(runs, options.arch, options.kernel)
    todo = sorted(compilations(wanted, options.arch, options.limit), key=lambda w: (w.launch.name, problem(w.launch)))
    path = Path(options.json or os.devnull)
    known = _read(path)
    where = {key: machine(torch.device("cpu"))[key] for key in ("versions", "commit", "date")}
    rows: list[Row] = []
    bar = Progress(len(todo) if options.hazards else 0)
    with path.open("a") as file:
        for what in todo:
            row = _inspect(what, known.get(what.name))
            if options.hazards:
                bar.step(row.kernel)
            else:
                if not rows or heading(row) != heading(rows[-1]):
                    print("", *heading(row), sep="\n")
                print(line(row), flush=True)
            rows.append(row)
            if row.key not in known:
                file.write(json.dumps(asdict(row) | {"verdict": row.verdict} | where) + "\n")
                file.flush()
    if options.hazards:
        bar.close()
        print_table(*hazards(rows))
    bad = [row for row in rows if row.problems]
    few = {} if options.limit else {key: n for key, n in live(wanted, rows, options.arch).items() if n < FEWEST}
    print(f"\n{len(rows)} compilations of {len({r.kernel for r in rows})} kernels, {len(bad)} with a problem")
    for (kernel, sizes), count in few.items():
        print(f"{count} good candidates: {kernel} {sizes}")
    return 1 if bad or few else 0


if __name__ == "__main__":
    sys.exit(run(main, "inspect_kernels.py"))

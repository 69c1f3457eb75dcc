"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, shared memory, pipelining.

Blocks and ops run on meta tensors, where a launch is only recorded. Each recorded kernel is compiled for every one of
its candidate configs, specialised as Triton's JIT would for these arguments, and read back from SASS and resource
usage. Nothing is timed. Needs a process without TRITON_INTERPRET.

    python benchmarks/inspect_kernels.py --arch 90 --kernel bn_relu --json rows.json

As a library:

    rows = inspect_function(lambda: bn_relu(x, state, "triton"), arch=90)  # all candidates; x and state on "meta"
    print(table(rows))
    row = inspect_launch(launch, config, arch=90)

The main loop of a kernel is any innermost loop with tensor-core instructions; where it is unrolled, what stands from
the first to the last of them; where there are none, any innermost loop with global memory accesses. Counts are of
instructions as they stand in the SASS, not as they run.

PIPELINED names the kernels whose tensor-core pipeline is meant to stay full: no shared-memory stores in the main loop
and no wait for all of wgmma there. The verdict holds them to it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import triton
from blocks import select
from harness import Progress, machine
from launched import WAYS, CountLaunched, Stem, build
from torch import Tensor
from traffic import Block
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import fusedres
from fusedres.kernels import launch as launching
from fusedres.kernels.launch import H100, Config, Gpu, Launch, record_launches

# Whose candidates are taken, by arch: A100, RTX 4090, H100. A multiprocessor has 1,024 bytes of shared memory more than
# one program may use.
GPUS = {80: Gpu(80, 108, 166_912), 89: Gpu(89, 128, 101_376), 90: H100}
THREADS = {80: 2048, 89: 1536, 90: 2048}  # of a multiprocessor

PIPELINED = frozenset(("conv_fprop_kernel", "conv_bn_add_relu_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel"))

DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Row:
    """What one compilation gave. Loop counts are None where the kernel has no main loop."""

    kernel: str
    problem: str
    config: str
    arch: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    resident: int  # programs a multiprocessor, by registers, shared memory and threads
    product: bool  # a dot of 16-bit operands
    tensor_core: str | None  # HGMMA (wgmma), HMMA (mma), DMMA; None: no tensor-core instruction
    tensor_core_count: int
    unrolled: bool  # tensor-core instructions stand in no loop
    loop_async_copies: int | None  # fewest of any main loop: cp.async or TMA
    loop_shared_stores: int | None  # most of any main loop
    wgmma_waits: tuple[int, ...]  # of every wait in main loops: how many groups of wgmma may stay in flight
    loads: int  # from global memory, asynchronous ones included
    loads_16: int  # of these, 16 bytes a thread
    stores: int
    stores_16: int
    compile_s: float
    pipelined: bool  # named in PIPELINED
    problems: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """ok, or what is wrong."""
        return "; ".join(self.problems) or "ok"


# --- compilation ------------------------------------------------------------------------------------------------------


class _Capture:
    """Stands for a kernel where launch.py starts it, and keeps what it was given."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._keep

    def _keep(self, **arguments: Any) -> None:
        self.arguments = arguments


@dataclass(frozen=True)
class Specialised:
    """One kernel as Triton would compile it for a launch's arguments and one config."""

    launch: Launch
    config: Config
    source: ASTSource
    options: dict[str, Any]
    target: GPUTarget

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that share a compilation."""
        source, config = self.source, self.config
        kernel = (self.launch.kernel.fn.__module__, self.launch.name, self.target.arch)
        parts = (source.signature, source.constants, source.attrs)
        return (*kernel, *(repr(sorted(p.items())) for p in parts), config.num_warps, config.num_stages)


def specialise(launch: Launch, config: Config, arch: int) -> Specialised:
    """Binds the recorded arguments with Triton's own binder, so alignment and constants are those of a real launch."""
    if launching.INTERPRETED:
        raise RuntimeError("inspect_kernels: TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    capture = _Capture()
    launching._run(capture, launch.grid, launch.arguments, config)
    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**capture.arguments)
    options, signature, constants, attrs = kernel._pack_args(backend, capture.arguments, bound, specialization, rest)
    return Specialised(launch, config, ASTSource(kernel, signature, constants, attrs), options.__dict__, target)


def inspect_launch(launch: Launch, config: Config, arch: int = 90) -> Row:
    """Compiles the launch's kernel with `config` and reads the result."""
    return _inspect(specialise(launch, config, arch))


def _inspect(what: Specialised) -> Row:
    launch, config, arch = what.launch, what.config, what.target.arch
    named = {"kernel": launch.name, "problem": problem(launch), "config": describe(config), "arch": arch}
    pipelined = launch.name in PIPELINED
    start = time.perf_counter()
    try:
        compiled = triton.compile(what.source, target=what.target, options=what.options)
    except Exception as error:  # whatever Triton or ptxas raise is the finding
        reason = (str(error).strip().splitlines() or [""])[-1][:200]
        nothing: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__, 0) | {
            "tensor_core": None,
            "wgmma_waits": (),
            "loop_async_copies": None,
            "loop_shared_stores": None,
        }
        failed = (f"does not compile: {type(error).__name__}: {reason}",)
        return Row(**nothing | named | {"pipelined": pipelined, "problems": failed})
    seconds = time.perf_counter() - start
    binary = Binary(compiled.asm["cubin"])
    shared, threads = compiled.metadata.shared, 32 * config.num_warps
    registers, spilled = binary.resources
    kinds = [k for k in _TENSOR_CORE if binary.count(k)]
    loads = [op for op in binary.opcodes if op.startswith("LDG")]
    stores = [op for op in binary.opcodes if op.startswith("STG")]
    row = Row(
        **named,
        registers=registers,
        spilled=spilled,
        shared=shared,
        resident=min(
            65_536 // (8 * -(-registers // 8) * threads),
            (GPUS[arch].shared_memory + 1024) // (shared + 1024),
            THREADS[arch] // threads,
            32,
        ),
        product=re.search(r"tt\.dot .*x(bf16|f16)>", compiled.asm["ttir"]) is not None,
        tensor_core="+".join(kinds) or None,
        tensor_core_count=sum(binary.count(k) for k in kinds),
        unrolled=binary.unrolled,
        loop_async_copies=binary.async_copies,
        loop_shared_stores=binary.shared_stores,
        wgmma_waits=tuple(sorted(binary.wgmma_waits)),
        loads=len(loads),
        loads_16=sum(".128" in op for op in loads),
        stores=len(stores),
        stores_16=sum(".128" in op for op in stores),
        compile_s=round(seconds, 3),
        pipelined=pipelined,
        problems=(),
    )
    return replace(row, problems=tuple(_problems(row)))


def _problems(row: Row) -> Iterator[str]:
    if row.spilled:
        yield f"spills {row.spilled} bytes"
    limit = GPUS[row.arch].shared_memory
    if row.shared > limit:
        yield f"shared memory {row.shared:,} over {limit:,}"
    if not row.product:
        return
    if row.arch >= 90 and "HGMMA" not in (row.tensor_core or ""):
        yield "a 16-bit dot without wgmma"
    elif row.tensor_core is None:
        yield "a 16-bit dot without tensor cores"
    if row.loop_async_copies == 0 and not row.unrolled:
        yield "no asynchronous copies in the main loop"
    if row.pipelined and row.loop_shared_stores:
        yield f"{row.loop_shared_stores} shared-memory stores in the main loop"
    if row.pipelined and 0 in row.wgmma_waits:
        yield "wgmma wait 0 in the main loop"


def describe(config: Config) -> str:
    """BLOCK_M=128 BLOCK_N=64 w8 s3."""
    return " ".join([*(f"{k}={v}" for k, v in config.blocks.items()), f"w{config.num_warps}", f"s{config.num_stages}"])


def problem(launch: Launch) -> str:
    """The dtype of the narrowest floating-point tensor, sizes and switches, and the tensors that are not there."""
    dtypes = [v.dtype for v in launch.arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    words = [DTYPES[min(dtypes, key=lambda d: d.itemsize)]] if dtypes else []
    for name, value in launch.arguments.items():
        if value is None:
            words.append(f"no-{name.removesuffix('_ptr')}")
        elif isinstance(value, int | str) and not name.lower().startswith("stride"):
            words.append(f"{name}={value}")
    return " ".join(words)


# --- reading what was compiled ----------------------------------------------------------------------------------------

_ASYNC = ("LDGSTS", "UBLKCP", "UTMALDG")
_TENSOR_CORE = ("HGMMA", "HMMA", "DMMA")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


class Binary:
    """A cubin, disassembled with cuobjdump of the triton package."""

    def __init__(self, cubin: bytes) -> None:
        self._cubin = cubin

    @cached_property
    def _text(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @property
    def resources(self) -> tuple[int, int]:
        """Registers and spilled bytes of a thread; ptxas may reserve a few bytes of stack that nothing touches."""
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", self._text))
        touched = any(op.startswith(("LDL", "STL")) for op in self.opcodes)
        return int(found["REG"]), (int(found["STACK"]) + int(found["LOCAL"])) * touched

    @cached_property
    def instructions(self) -> list[tuple[int, str, str]]:
        """(address, opcode with its modifiers, operands)."""
        return [(int(a, 16), op, rest) for a, op, rest in _INSTRUCTION.findall(self._text)]

    @property
    def opcodes(self) -> list[str]:
        """Of every instruction."""
        return [op for _, op, _ in self.instructions]

    def count(self, opcode: str) -> int:
        """Instructions of this opcode, whatever its modifiers."""
        return sum(op.partition(".")[0] == opcode for op in self.opcodes)

    @cached_property
    def lines(self) -> list[str]:
        """Every instruction as text."""
        return [op + operands for _, op, operands in self.instructions]

    @cached_property
    def loops(self) -> list[list[str]]:
        """The instructions of every innermost loop."""
        spans = []
        for address, op, operands in self.instructions:
            target = re.search(r"0x([0-9a-f]+)\s*$", operands)
            if op.startswith("BRA") and target and int(target[1], 16) < address:
                spans.append((int(target[1], 16), address))
        return [
            [
                line
                for (address, _, _), line in zip(self.instructions, self.lines, strict=True)
                if low <= address <= high
            ]
            for low, high in _innermost(spans)
        ]

    @cached_property
    def unrolled(self) -> bool:
        """Whether there are tensor-core instructions, and none in a loop."""
        return not _with(self.loops, _TENSOR_CORE) and bool(_with([self.lines], _TENSOR_CORE))

    @cached_property
    def main_loops(self) -> list[list[str]]:
        """The instructions of each main loop."""
        if self.unrolled:
            products = [i for i, line in enumerate(self.lines) if line.startswith(_TENSOR_CORE)]
            return [self.lines[products[0] : products[-1] + 1]]
        return _with(self.loops, _TENSOR_CORE) or _with(self.loops, ("LDG", *_ASYNC, "STG"))

    @property
    def async_copies(self) -> int | None:
        """Asynchronous copies in the main loop, the fewest of several; all of them where it is unrolled."""
        loops = [self.lines] if self.unrolled else self.main_loops
        return min((len([line for line in loop if line.startswith(_ASYNC)]) for loop in loops), default=None)

    @property
    def shared_stores(self) -> int | None:
        """Shared-memory stores in the main loop, the most of several."""
        return max((len([line for line in loop if line.startswith("STS")]) for loop in self.main_loops), default=None)

    @property
    def wgmma_waits(self) -> list[int]:
        """Of every wait in main loops, how many groups of wgmma may stay in flight."""
        found = (
            re.match(r"WARPGROUP\.DEPBAR\.LE\s+gsb0, 0x([0-9a-f]+)", line) for loop in self.main_loops for line in loop
        )
        return [int(wait[1], 16) for wait in found if wait]


def _with(loops: Iterable[list[str]], opcodes: tuple[str, ...]) -> list[list[str]]:
    """The loops that hold one of the opcodes."""
    return [loop for loop in loops if any(line.startswith(opcodes) for line in loop)]


def _innermost(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans that hold no other one."""
    distinct = sorted(set(spans))
    return [s for s in distinct if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in distinct)]


# --- many -------------------------------------------------------------------------------------------------------------


@contextmanager
def assumed(arch: int) -> Iterator[None]:
    """Launchers take the candidates of this arch's GPU inside, off a GPU."""
    before, launching.assumed = launching.assumed, GPUS[arch]
    try:
        yield
    finally:
        launching.assumed = before


def record(function: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """The launches that `function` makes under the triton backend; its tensors are on the meta device.

    Ops run their launchers, called as ops, as part of a block, or directly.
    """
    with assumed(arch), fusedres.use_backend("triton"), CountLaunched() as count, record_launches() as direct:
        function()
    for name in sorted(count.missing):
        print(f"note: {name} has no triton kernel yet", file=sys.stderr)
    return count.kernels + direct


def compilations(launches: Iterable[Launch], arch: int = 90, limit: int | None = None) -> list[Specialised]:
    """Every distinct compilation of the launches' candidates (the first `limit` of each), in order."""
    found: dict[tuple[Any, ...], Specialised] = {}
    for launch in launches:
        for config in list(launch.candidates)[:limit]:
            what = specialise(launch, config, arch)
            found.setdefault(what.key, what)
    return list(found.values())


def inspect_launches(launches: Iterable[Launch], arch: int = 90, limit: int | None = None) -> list[Row]:
    """One row for every distinct compilation of the launches' candidates (the first `limit` of each)."""
    return [_inspect(what) for what in compilations(launches, arch, limit)]


def inspect_function(function: Callable[[], Any], arch: int = 90, limit: int | None = None) -> list[Row]:
    """inspect_launches of what `function` launches; it runs ops or blocks on meta tensors."""
    return inspect_launches(record(function, arch), arch, limit)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, kernel by kernel."""
    lines = []
    for (kernel, arch, sizes), group in groupby(rows, lambda r: (r.kernel, r.arch, r.problem)):
        lines += ["", f"{kernel} [sm_{arch}] {sizes}", "  ".join(f"{n:>{w}}" for n, w in _COLUMNS)]
        for row in group:
            loop = "-" if row.loop_async_copies is None else f"{row.loop_async_copies}/{row.loop_shared_stores}"
            cells = (
                row.config, row.registers, row.spilled, f"{row.shared:,}", row.resident,
                f"{row.tensor_core_count} {row.tensor_core}" if row.tensor_core else "-", loop,
                ",".join(map(str, row.wgmma_waits)) or "-", f"{row.loads_16}/{row.loads}",
                f"{row.stores_16}/{row.stores}", f"{row.compile_s:.1f}", row.verdict,
            )  # fmt: skip
            lines.append("  ".join(f"{c!s:>{w}}" for c, (_, w) in zip(cells, _COLUMNS, strict=True)))
    return "\n".join(lines)


_COLUMNS = (
    ("config", 44), ("regs", 4), ("spill", 5), ("shared", 8), ("res", 3), ("tensor core", 11), ("copy/sts", 8),
    ("waits", 5), ("ld16", 7), ("st16", 7), ("s", 5), ("verdict", 7),
)  # fmt: skip


# --- command ----------------------------------------------------------------------------------------------------------


def cases(
    blocks: str = "all", ways: Iterable[str] = tuple(WAYS), batch: int = 256, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Callable[[], None]]:
    """Name → a function that runs a block of ResNet-18 or 50, or the stem, on meta tensors, training and inference."""
    chosen: dict[str, Block | Stem] = {} if blocks == "stem" else dict(select([blocks]))
    if blocks in ("all", "stem"):
        chosen["stem"] = Stem()

    def step(what: Block | Stem, way: str) -> None:
        module, x = build(what, way, batch, dtype)
        out = module.train()(x)
        out.backward(torch.empty_like(out))
        with torch.inference_mode():
            module.eval()(x)

    return {f"{name}, {way}": lambda w=what, y=way: step(w, y) for name, what in chosen.items() for way in ways}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compiles every candidate of every Triton kernel; needs no GPU.")
    parser.add_argument("--arch", type=int, choices=tuple(GPUS), default=90)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--blocks", default="all", help="what runs (all): a name or pattern of blocks.py, or stem")
    parser.add_argument("--ways", nargs="*", choices=tuple(WAYS), default=tuple(WAYS), help="how blocks run (all)")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"), default="bf16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--limit", type=int, help="only the first candidates of each launch")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    options = parser.parse_args(argv)
    if launching.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    dtype = next(d for d, name in DTYPES.items() if name == options.dtype)
    launches = []
    for run in cases(options.blocks, options.ways, options.batch, dtype).values():
        launches += [launch for launch in record(run, options.arch) if options.kernel in launch.name]
    todo = compilations(launches, options.arch, options.limit)
    bar = Progress(len(todo))
    rows = []
    for what in todo:
        bar.step(what.launch.name)
        rows.append(_inspect(what))
    bar.close()
    print(table(sorted(rows, key=lambda r: (r.kernel, r.problem))))
    bad = [row for row in rows if row.problems]
    print(f"\n{len(rows)} compilations of {len({r.kernel for r in rows})} kernels, {len(bad)} with a problem")
    if options.json:
        where = {key: machine(torch.device("cpu"))[key] for key in ("versions", "commit", "date")}
        written = [asdict(row) | {"verdict": row.verdict} | where for row in rows]
        Path(options.json).write_text(json.dumps(written, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

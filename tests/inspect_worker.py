"""Compile kernels in a process without TRITON_INTERPRET and print what benchmarks/inspect_kernels.py says of them.

These are the kernels of the package, each with the arguments of its first launch by the named blocks, and a matrix
product written here, with configs that are wrong on purpose. The output is one JSON object on stdout.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

from fusedres.kernels.triton_core.launch import Config, Launch, ceil_div, launch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import inspect_kernels
from compiled_code import candidates, ptx
from compiled_code.sass import Binary
from suite.miscompiled import waiting

M, N, K = 65536, 256, 512


@triton.jit
def product_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    bias_ptr,  # (N,) or None
    out_ptr,  # (M, N)
    M,
    N,
    K,
    MASK_PROLOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * K + (k + steps)[None, :], mask=rows[:, None] < M, other=0)
        if MASK_PROLOGUE:  # a mask computed from indices, so that the operand goes through shared memory again
            a = tl.where((rows[:, None] + k + steps[None, :]) % 7 == 0, 0.0, a)
        b = tl.load(b_ptr + (k + steps)[:, None] * N + columns[None, :])
        if MASK_PROLOGUE:
            b = (b * 2).to(b.dtype)
        total = tl.dot(a, b, total)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns)[None, :]
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total, mask=rows[:, None] < M)


def product(config: Config, mask_prologue: bool = False) -> None:
    """Launch product_kernel on meta tensors."""
    a, b, out = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((M, K), (K, N), (M, N)))
    arguments = {"a_ptr": a, "b_ptr": b, "bias_ptr": None, "out_ptr": out, "M": M, "N": N, "K": K}
    grid = (ceil_div(M, config["BLOCK_M"]), N // config["BLOCK_N"])
    launch(product_kernel, grid, arguments | {"MASK_PROLOGUE": mask_prologue}, config)


def tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, warps, stages)


PRODUCTS = {
    "good": lambda: product(tile(128, 128, 64, 8, 3)),
    "spilling": lambda: product(tile(128, 256, 32, 4, 2)),
    "shared memory": lambda: product(tile(128, 128, 64, 8, 8)),
    "drained": lambda: product(tile(128, 128, 64, 8, 3), mask_prologue=True),
    "small": lambda: product(tile(16, 64, 64, 4, 3)),
    "one stage": lambda: product(tile(128, 128, 64, 8, 1)),
    "invalid": lambda: product(tile(100, 64, 64, 4, 3)),
}


@triton.jit
def arguments_kernel(
    aligned_ptr, shifted_ptr, missing_ptr, out_ptr, ONE, SIXTEENS, ODD, HUGE, FLAG: tl.constexpr, BLOCK: tl.constexpr
):
    tl.store(out_ptr + tl.arange(0, BLOCK), ONE + SIXTEENS + ODD + HUGE)


def specialised() -> dict[str, str]:
    """Return how each argument of a launch is specialised by the compiler."""
    whole = torch.empty(256, dtype=torch.bfloat16, device="meta")
    arguments = {"aligned_ptr": whole[8:], "shifted_ptr": whole[1:], "missing_ptr": None, "out_ptr": whole.float()}
    sizes = {"ONE": 1, "SIXTEENS": 48, "ODD": 7, "HUGE": 2**31 + 1, "FLAG": True}
    config = Config({"BLOCK": 64})
    (made,) = candidates.record(lambda: launch(arguments_kernel, (1,), arguments | sizes, config))
    source = candidates.specialise(made, config, 90).source
    found = {}
    for index, (name, kind) in enumerate(source.signature.items()):
        more = source.constants[index,] if kind == "constexpr" else source.attrs.get((index,)) or ""
        found[name] = f"{kind} {more}".rstrip()
    return found


def first_of(block: str, only: set[str] | None = None) -> list[Launch]:
    """Return the first launch of each named kernel."""
    found: dict[str, Launch] = {}
    for made in candidates.launches_of(candidates.cases(block).values()):
        if only is None or made.name in only:
            found.setdefault(made.name, made)
    return list(found.values())


def fewest(products: set[str]) -> list[tuple[int, str, str, int]]:
    """Return arch, kernel, problem and the number of candidates for every product of every block."""
    found: dict[tuple[int, str, str], set[str]] = {}
    for arch in (80, 90):
        for made in candidates.launches_of(candidates.cases().values(), arch, sorted(products)):
            key = arch, made.name, candidates.problem(made)
            found.setdefault(key, set()).update(map(candidates.describe, made.candidates))
    return [(*key, len(configs)) for key, configs in found.items()]


def compiled_by_batch(blocks: tuple[str, ...], batches: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """Map each batch size to its number of compilations, and to the number that the first batch did not launch."""
    found: dict[int, set] = {}
    for batch in batches:
        made = [made for block in blocks for run in candidates.cases(block, batch=batch).values()
                for made in candidates.record(run)]  # fmt: skip
        found[batch] = {candidates.specialise(launch, launch.config, 90).key for launch in made}
    return {batch: (len(keys), len(keys - found[batches[0]])) for batch, keys in found.items()}


def races_without_barriers() -> list[int]:
    """Find writes that come too early in two products of several warpgroups: as compiled, and without any barrier."""
    counts = []
    for name in ("good", "drained"):
        (made,) = candidates.record(PRODUCTS[name])
        what = candidates.specialise(made, made.config, 90)
        text = triton.compile(what.source, target=what.target, options=what.options).asm["ptx"]
        bare = re.sub(r"\b(bar\.sync|barrier\.cta\.sync)\b[^;]*;", "", text)
        assert bare != text
        counts += [len(ptx.races(each, what.arguments, 0)) for each in (text, bare)]
    return counts


def waits_as_compiled_and_forced() -> list[list[int]]:
    """Return the waits of the good product, as compiled and when all are forced."""
    (made,) = candidates.record(PRODUCTS["good"])
    what = candidates.specialise(made, made.config, 90)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for around in (contextlib.nullcontext(), waiting(Path(folder), [made.kernel])):
            with around:
                compiled = triton.compile(what.source, target=what.target, options=what.options)
            found.append(Binary(compiled.asm["cubin"]).wgmma_waits)
    return found


def main(wide: str, narrow: str) -> None:
    """Inspect the first launch of every kernel by block `wide`, and of every kernel with a product by `narrow`."""
    rows = inspect_kernels.inspect_launches(first_of(wide), limit=1)
    rows += inspect_kernels.inspect_launches(candidates.launches_of(candidates.cases("tails").values()), limit=1)
    products = {row.kernel for row in rows if row.dot}
    rows += inspect_kernels.inspect_launches(first_of(narrow, products), limit=1)
    written = {name: inspect_kernels.inspect_function(run, arch=90)[0] for name, run in PRODUCTS.items()}
    written["sm_80"] = inspect_kernels.inspect_function(PRODUCTS["good"], arch=80)[0]
    record = {
        "rows": [asdict(row) for row in rows],
        "candidates": fewest(products),
        "specialised": specialised(),
        "by_batch": compiled_by_batch((wide, narrow, "resnet50.layer4.1", "stem"), (256, 250, 64, 7, 1)),
        "races": races_without_barriers(),
        "waits": waits_as_compiled_and_forced(),
        "products": {name: asdict(row) for name, row in written.items()},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Times each memory-bound op alone against a copy that moves the same number of bytes.

    python benchmarks/bench_ops.py                         56², 28², 14² and 7², the widths of ResNet-18 and ResNet-50
    python benchmarks/bench_ops.py --ops bn_add_relu --sizes 56 --json ops.json

Op and copy alternate in one run. The caches are flushed before each, so all data comes from memory. The copy works
between preallocated buffers; the op allocates its results, as it does in a model. On a CPU freed memory stays mapped,
so that page faults are not timed (--fresh-pages includes them). A second pass over an argument is counted, although a
cache may serve it. Each op is checked against the reference backend before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
from common import harness
from common.harness import Variant
from memory_traffic import counting
from torch import Tensor
from torch.utils._pytree import tree_map_only

import fusedres
from fusedres import backends, ops
from fusedres.values import (
    Activation,
    BnBranch,
    Gated,
    Norm,
    ShortcutGradient,
    ShortcutInput,
    TailCoefficients,
    TailNeeds,
    TailTerm,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SIZES = (56, 28, 14, 7)
# Allowed difference of two backends by rounding, relative to the largest element. Sums have up to 100,000 terms.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

# Additions, multiplications and maxima per element by the formulas of each op; a Gram matrix adds C + 1 to bn_relu.
ARITHMETIC = {
    "bn_statistics": 4,  # x - p, its sum, the sum of its square
    "bn_relu": 3,
    "bn_add_relu identity": 4,
    "bn_add_relu two branches": 6,
    "bn_add_relu zero-pad": 4,
    "bn_add_relu_backward identity": 8,  # the two sums; a(d - c1 - (x - mean) c2)
    "bn_add_relu_backward two branches": 15,
    "bn_relu_backward_": 14,  # the mask of ReLU is computed again, twice
    "relu_backward": 1,
    "shortcut_grad_": 1,
    "dense_append_": 4,  # as bn_statistics
    "dense_bn_relu": 3,
    "dense_bn_relu_backward_": 9,  # the mask of ReLU is computed again
    "dense_gradient": 4,
    "gated_tail highway": 26,  # a sigmoid takes about 20
    "gated_tail SiLU before the add": 24,
    "gated_tail squeeze-and-excitation": 5,
    "gated_tail_reduce highway": 33,
    "gated_tail_reduce SiLU before the add": 30,
    "gated_tail_reduce squeeze-and-excitation": 6,
    "gated_tail_apply highway": 36,
    "gated_tail_apply SiLU before the add": 30,
    "gated_tail_apply squeeze-and-excitation": 8,
}


@dataclass
class Op:
    """An op on tensors of one shape: `call(backend, arguments)`."""

    op: str
    variant: str
    phase: str
    arguments: dict[str, Any]
    call: Callable[[str, dict[str, Any]], Any]
    flops: int = 0

    def __str__(self) -> str:
        return f"{self.op} {self.variant}".strip()


def ops_of(channels: int, size: int, batch: int, dtype: torch.dtype, device: torch.device) -> list[Op]:
    """Return every memory-bound op at one activation shape."""
    source = torch.Generator().manual_seed(0)

    def activation(c: int = channels, s: int = size) -> Tensor:
        made = torch.randn((batch, c, s, s), generator=source).to(device, dtype)
        return made.to(memory_format=torch.channels_last)

    x, shortcut, grad = activation(), activation(), activation()
    one, zero = torch.ones(channels, device=device), torch.zeros(channels, device=device)
    if dtype == torch.float64:
        one, zero = one.double(), zero.double()

    def state(of: Tensor) -> Tensor:
        return ops.bn_statistics(of, Norm(one, zero, None, None, None, 0.1, 1e-5), backend="reference")

    s, t = state(x), state(shortcut)
    _, bits = ops.bn_add_relu(x, s, ShortcutInput(shortcut), True, backend="reference")
    running = {"running_mean": zero.clone(), "running_var": one.clone()}
    # The shortcut of option A: strided pixels, half of the channels.
    narrow = activation(channels // 2, 2 * size)
    # For the op in place: a gradient that keeps its magnitude when the op is applied again and again.
    ready = activation()
    found = [
        Op("bn_statistics", "", "forward", {"x": x} | running, lambda b, a: ops.bn_statistics(
            a["x"], Norm(one, zero, a["running_mean"], a["running_var"], None, 0.1, 1e-5), backend=b)),
        Op("bn_relu", "", "forward", {"x": x}, lambda b, a: ops.bn_relu(a["x"], s, backend=b)),
        Op("bn_add_relu", "identity", "forward", {"x": x, "shortcut": shortcut}, lambda b, a: ops.bn_add_relu(
            a["x"], s, ShortcutInput(a["shortcut"]), True, backend=b)),
        Op("bn_add_relu", "two branches", "forward", {"x": x, "shortcut": shortcut}, lambda b, a: ops.bn_add_relu(
            a["x"], s, ShortcutInput(a["shortcut"], t), True, backend=b)),
        Op("bn_add_relu", "zero-pad", "forward", {"x": x, "shortcut": narrow}, lambda b, a: ops.bn_add_relu(
            a["x"], s, ShortcutInput(a["shortcut"], None, 2), True, backend=b)),
        Op("bn_add_relu_backward", "identity", "backward", {"grad": grad, "x": x},
           lambda b, a: ops.bn_add_relu_backward(
               Gated(a["grad"], bits), BnBranch(a["x"], s, True), None, backend=b)),
        Op("bn_add_relu_backward", "two branches", "backward", {"grad": grad, "x": x, "shortcut": shortcut},
           lambda b, a: ops.bn_add_relu_backward(
               Gated(a["grad"], bits), BnBranch(a["x"], s, True), BnBranch(a["shortcut"], t, True), backend=b)),
        Op("bn_relu_backward_", "", "backward", {"grad": ready, "x": x}, lambda b, a: ops.bn_relu_backward_(
            a["grad"], BnBranch(a["x"], s, True), True, backend=b)),
        Op("relu_backward", "", "backward", {"grad": grad}, lambda b, a: ops.relu_backward(
            Gated(a["grad"], bits), backend=b)),
        Op("gram", "", "forward", {"x": x}, lambda b, a: ops.gram(a["x"], s, backend=b)),
        Op("shortcut_grad_", "", "backward", {"grad_x": activation(), "grad": grad}, lambda b, a: ops.shortcut_grad_(
            a["grad_x"], ShortcutGradient(a["grad"], bits), backend=b)),
    ]  # fmt: skip
    found += dense_block(x, s, grad)
    factor = torch.rand((batch, channels), generator=source).to(device, s.dtype)
    tails = {
        "highway": (lambda a: (TailTerm(a["x"], None, None, a["logits"]), TailTerm(a["shortcut"]),
                               Activation("relu", None, True), True), None),
        "SiLU before the add": (lambda a: (TailTerm(a["x"], s), TailTerm(a["shortcut"]),
                                           Activation("silu", None, True), False), None),
        "squeeze-and-excitation": (lambda a: (TailTerm(a["x"], s, factor), TailTerm(a["shortcut"]),
                                              Activation("relu"), False), bits),
    }  # fmt: skip
    for variant, (tail, mask) in tails.items():
        found += gated_tails(variant, tail, mask, {"x": x, "shortcut": shortcut}, grad, s)
    for op in found:
        op.flops = x.numel() * (channels + 4 if op.op == "gram" else ARITHMETIC[str(op)])
    return found


def dense_block(x: Tensor, state: Tensor, grad: Tensor) -> list[Op]:
    """Return the passes over the buffer of a dense block that is twice as wide as x."""
    buffer, grad_x = torch.cat((x, grad), 1), torch.cat((grad, x), 1)
    channels, pairs = x.shape[1], torch.zeros((buffer.shape[1], 2), dtype=torch.float64, device=x.device)
    backward = {"buffer": buffer, "grad_x": grad_x}
    return [
        Op("dense_append_", "", "forward", {"buffer": buffer.clone(), "x": x, "pairs": pairs},
           lambda b, a: ops.dense_append_(a["buffer"], a["x"], channels, a["pairs"], backend=b)),
        Op("dense_bn_relu", "", "forward", {"buffer": buffer}, lambda b, a: ops.dense_bn_relu(
            a["buffer"], state, backend=b)),
        Op("dense_bn_relu_backward_", "", "backward", backward | {"grad": grad, "pairs": pairs.clone()},
           lambda b, a: ops.dense_bn_relu_backward_(
               a["grad"], BnBranch(a["buffer"], state, True), a["grad_x"], a["pairs"], backend=b)),
        Op("dense_gradient", "", "backward", backward, lambda b, a: ops.dense_gradient(
            a["buffer"], a["grad_x"], pairs, pairs, channels, channels, backend=b)),
    ]  # fmt: skip


def gated_tails(
    variant: str,
    tail: Callable[[dict[str, Any]], tuple[Any, ...]],
    mask: Tensor | None,
    read: dict[str, Tensor],
    grad: Tensor,
    state: Tensor,
) -> list[Op]:
    """Return the three passes of a gated tail; backward reads only what its equation needs."""
    if variant == "highway":
        read = read | {"logits": torch.randn_like(grad)}
    normalised = tail(read)[0].state is not None
    coefficients = TailCoefficients(state[None] if normalised else None, None)
    needs = TailNeeds(True, variant != "SiLU before the add", variant == "highway")
    backward = {"grad": grad} | (read if variant == "highway" else {"x": read["x"]})

    def backward_of(arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Return the tail as backward takes it: the gradient stands for a shortcut that is only written, not read."""
        branch, shortcut, *others = tail({"shortcut": arguments["grad"]} | arguments)
        return (branch, shortcut if needs.needs_shortcut else None, *others)

    return [
        Op("gated_tail", variant, "forward", read, lambda b, a: ops.gated_tail(
            *tail(a), mask is not None, backend=b)),
        Op("gated_tail_reduce", variant, "backward", backward, lambda b, a: ops.gated_tail_reduce(
            Gated(a["grad"], mask), *backward_of(a), backend=b)),
        Op("gated_tail_apply", variant, "backward", backward, lambda b, a: ops.gated_tail_apply(
            Gated(a["grad"], mask), *backward_of(a), coefficients, needs, backend=b)),
    ]  # fmt: skip


def disagreement(op: Op, backend: str) -> str | None:
    """Return how `backend` and the reference differ by more than rounding, as text; None if they agree."""
    found = []
    for name in (backend, "reference"):
        arguments = tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.preserve_format), op.arguments)
        result = op.call(name, arguments)
        tensors = [result] if isinstance(result, Tensor) else list(result or ())
        if op.phase == "backward" and "shortcut" not in arguments:
            # the third sum belongs to the second branch
            tensors = [t[:2] if t.shape[:1] == (3,) else t for t in tensors]
        found.append(tensors + list(arguments.values()))
    for position, (ours, reference) in enumerate(zip(*found, strict=True)):
        if ours.shape != reference.shape:
            return f"result {position} has shape {tuple(ours.shape)}, the reference {tuple(reference.shape)}"
        if not ours.numel():
            continue
        if ours.dtype == torch.uint8:  # mask bits: they may differ if a value is within rounding of 0
            share = (ours != reference).double().mean().item()
            if not share <= 1e-3:
                return f"result {position}: {share:.2%} of the mask bytes differ"
            continue
        error = (ours.double() - reference.double()).abs().max().item()
        of_values = op.arguments.get("x", op.arguments.get("buffer", reference))
        allowed = TOLERANCES[of_values.dtype] * reference.double().abs().max().item()
        if not error <= allowed:
            return f"result {position} is off by {error:.3g}, allowed {allowed:.3g}"
    return None


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", help="cuda, cpu (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of activations (default: GPU bfloat16, CPU float32)")
    parser.add_argument("--batch", type=int, help="images (default: GPU 64, CPU 8)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=list(SIZES), help="heights and widths (default: 56 28 14 7)"
    )
    parser.add_argument(
        "--channels", type=int, nargs="+", help="channels (default: those of ResNet-18 and ResNet-50 at each size)"
    )
    parser.add_argument("--ops", nargs="+", help="names of ops (default: all)")
    parser.add_argument("--backend", default="auto", help="backend of the ops (default: auto)")
    parser.add_argument("--pairs", type=int, default=30, help="rounds; each times op and copy once (default: 30)")
    parser.add_argument("--fresh-pages", action="store_true", help="CPU: do not keep freed memory mapped")
    parser.add_argument("--json", metavar="FILE", help="write a row for each measurement")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device.startswith("cuda")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.batch = options.batch or (64 if on_gpu else 8)
    for name in ("pairs", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if an op disagrees with the reference."""
    options = parse(argv)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    if options.backend == "auto":
        backend = backends.backend_for(device.type)
        if backend is None:
            print(f"bench_ops: no backend serves {device.type}; pass --backend reference", file=sys.stderr)
            return 2
    else:
        backend = options.backend
    kept = device.type == "cpu" and not options.fresh_pages and fusedres.keep_pages()
    where = harness.machine(device)
    print(
        f"{where['device']}, torch {where['versions']['torch']}, fusedres {where['versions']['fusedres']}, "
        f"{backend} backend, {options.dtype}, batch {options.batch}"
        f"{', freed memory stays mapped' if kept else ''}"
    )
    if note := harness.busy_note(device):
        print(note)
    shapes = [
        (channels, size)
        for size in options.sizes
        for channels in (options.channels or (64 * 56 // size, 256 * 56 // size))
    ]
    timer, rate = harness.Timer(device, cold=True), harness.matmul_rate(device, dtype)
    rows, lines = [], []
    progress = harness.Progress(len(shapes))
    for channels, size in shapes:
        few = {str(op): op for op in ops_of(channels, 2, 1, dtype, device)}
        for op in ops_of(channels, size, options.batch, dtype, device):
            if options.ops and op.op not in options.ops:
                continue
            progress.step(f"{size}² x {channels} {op}", 0)
            problem = disagreement(op, backend)
            if problem:
                progress.close()
                print(f"{op} at {size}² x {channels}: {backend} disagrees with reference: {problem}", file=sys.stderr)
                return 1
            with counting.CountRun() as count:
                op.call(backend, op.arguments)
            # The flush also evicts the code of the interpreter. A call on a few pixels loads it again, but no data.
            small = few[str(op)]
            variants = [
                Variant(
                    "op",
                    lambda op=op: op.call(backend, op.arguments),
                    prepare=lambda small=small: small.call(backend, small.arguments),
                ),
                replace(harness.copy_variant(count.total, device), prepare=harness.copy_variant(16, device).run),
            ]
            samples = harness.interleave(variants, timer, rounds=options.pairs, warmup=3)
            summary, copy = harness.summarize(samples["op"]), harness.summarize(samples["copy"])
            ratio = harness.ratio_interval(samples["copy"], samples["op"])
            row = harness.row(
                where,
                summary,
                op=op.op,
                name=f"{size}x{channels}",
                variant=op.variant,
                backend=backend,
                shape=[options.batch, channels, size, size],
                dtype=options.dtype,
                memory_format="channels_last",
                phase=op.phase,
                ratio=ratio.as_dict(),
                peak_bytes=harness.peak_bytes(variants[0].run, device),
                counted_bytes=count.total,
                copy_bytes_per_s=count.total / copy.median,
                floor_bytes=count.total,
                flops=op.flops,
                matmul_flops_per_s=rate,
                data="synthetic",
            )
            rows.append(row)
            lines.append([
                f"{size}² x {channels}", str(op), f"{summary.median * 1e3:.3f}",
                f"{summary.p20 * 1e3:.3f}-{summary.p80 * 1e3:.3f}", f"{count.total / 1e6:.2f}",
                f"{row['bytes_per_s'] / 1e9:.1f}", f"{row['copy_bytes_per_s'] / 1e9:.1f}",
                f"{100 * ratio.median:.0f} ({100 * ratio.low:.0f}-{100 * ratio.high:.0f})",
            ])  # fmt: skip
        progress.step(f"{size}² x {channels}")
    progress.close()
    if not rows:
        print(f"bench_ops: no op is called {', '.join(options.ops)}", file=sys.stderr)
        return 2
    header = ["shape", "op", "ms", "20-80 %", "moved MB", "GB/s", "copy GB/s", "% of copy (95%)"]
    harness.print_table(header, lines)
    if options.json:
        harness.write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, "bench_ops.py"))

"""Times fused residual blocks against torchvision's, in training and inference, after checking that they agree.

    python benchmarks/bench_block.py                     on the GPU if there is one, else on the CPU; under two minutes
    python benchmarks/bench_block.py --full --json all.json    every stage shape of ResNet-18/50 at batch 8 and 16
    python benchmarks/bench_block.py --blocks 'resnet50.layer[12].1' --phase train --compile --plot blocks.png

The columns are: milliseconds of eager in NCHW, of eager in channels_last, of the convolutions of the block alone (the
time that remains if all else were free), and of the fused block; eager / fused, both channels_last, with the 95%
interval; the percentage of (eager - convolutions) that fusion removes; megabytes saved for backward; megabytes moved,
as counted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
from common import blocks, harness
from common.designs import Design
from memory_traffic import closed_form
from suite import floors
from suite.timed_block import BASE, BOUND, FUSED, OPS, Bench, BlockCase, BlockSettings
from torch import nn

import fusedres
from fusedres import backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HEADER = [
    "block", "phase", "batch", "NCHW ms", "eager ms", "conv ms", "fused ms", "ratio (95%)", "removed %",
    "saved MB", "moved MB",
]  # fmt: skip


def rows_of(
    case: BlockCase, settings: BlockSettings, where: dict[str, Any], ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Return one row per variant; `ceilings` are copy_bytes_per_s and matmul_flops_per_s."""
    block, itemsize = case.block, settings.dtype.itemsize
    floor = None
    if not isinstance(block, Design):
        floor = floors.of_block(block, case.phase, case.batch, itemsize, ceilings)
    bound = harness.summarize(case.samples[BOUND]).median
    rows = []
    for name, samples in case.samples.items():
        summary = harness.summarize(samples)
        ratio = harness.ratio_interval(case.samples[BASE], samples)
        removed = harness.removed_interval(case.samples[BASE], samples, case.samples[BOUND])
        ours, whole = name == FUSED, name not in (BASE, BOUND)
        fields = {
            "op": OPS[block.kind],
            "name": case.name,
            "variant": name,
            "backend": (case.backend or "unfused") if ours else None,
            "conv": settings.conv if ours else None,
            "memory": settings.memory if ours else None,
            "frozen": (settings.freeze and case.phase == "infer") if ours else None,
            "shape": [case.batch, block.in_channels, block.size, block.size],
            "geometry": {"planes": block.planes, "stride": block.stride, "shortcut": block.shortcut},
            "dtype": str(settings.dtype).removeprefix("torch."),
            "memory_format": "contiguous" if name == "eager_nchw" else "channels_last",
            "phase": case.phase,
            "ratio": ratio.as_dict(),
            "removed_percent": removed.as_dict() if whole else None,
            "peak_bytes": case.peak.get(name),
            "saved_bytes": case.saved.get(name),
            "counted_bytes": case.counted.get(name),
            "floor_bytes": None if floor is None else floor.bytes,
            "flops": None if floor is None else floor.flops,
            "data": "synthetic",
            "percent_of_conv_only": 100 * bound / summary.median,
        }
        rows.append(harness.row(where, summary, **fields, **ceilings))
    return rows


def cells(case: BlockCase, extra: bool) -> list[str]:
    """Return the case as a line of the table."""
    times = {name: harness.summarize(samples).median * 1e3 for name, samples in case.samples.items()}
    ratio = harness.ratio_interval(case.samples[BASE], case.samples[FUSED])
    removed = harness.removed_interval(case.samples[BASE], case.samples[FUSED], case.samples[BOUND])
    line = [case.name, case.phase, str(case.batch)]
    line += [f"{times[n]:.3g}" for n in ("eager_nchw", BASE, BOUND, FUSED)]
    line.append(f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
    line.append("-" if math.isnan(removed.median) else f"{removed.median:.0f} ({removed.low:.0f}-{removed.high:.0f})")
    for counts in (case.saved, case.counted):
        line.append(f"{counts[BASE] / 1e6:.3g}/{counts[FUSED] / 1e6:.3g}" if counts else "-")
    if extra:
        compiled = harness.ratio_interval(case.samples["compile"], case.samples[FUSED])
        line += [f"{times['compile']:.3g}", f"{compiled.median:.2f} ({compiled.low:.2f}-{compiled.high:.2f})"]
    return line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="half precision runs under autocast (default: GPU bfloat16, CPU float32)"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: GPU 64, CPU 8; --full: 8 and 16)")
    parser.add_argument(
        "--blocks", nargs="+", help="names or patterns such as 'resnet50.*', or all, default, designs, tiny"
    )
    parser.add_argument(
        "--phase", choices=("both", *closed_form.PHASES), default="both", help="what to measure (default: both)"
    )
    parser.add_argument("--memory", default="auto", help="fuse()'s memory: auto or min (default: auto)")
    parser.add_argument("--conv", default="auto", help="fuse()'s conv (default: auto)")
    parser.add_argument("--backend", help="backend of the fused ops (default: FUSEDRES_BACKEND, else auto)")
    parser.add_argument(
        "--pairs",
        type=int,
        help="rounds; each times every variant once (default: as many as the budget allows, at most 40)",
    )
    parser.add_argument(
        "--budget", type=float, default=95, help="seconds for the whole run, unless --pairs is given (default: 95)"
    )
    parser.add_argument("--full", action="store_true", help="every stage shape, at least 30 pairs, no budget")
    parser.add_argument("--freeze", action="store_true", help="inference with weights folded once (fusedres.freeze)")
    parser.add_argument("--keep-pages", action="store_true", help="CPU: freed memory stays mapped (glibc)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, default mode, channels_last")
    parser.add_argument("--json", metavar="FILE", help="write a row for each measurement")
    parser.add_argument("--plot", metavar="FILE.png", help="draw times and saved bytes relative to eager")
    options = parser.parse_args(argv)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.batch = options.batch or ([8, 16] if options.full else [64] if on_gpu else [8])
    options.blocks = options.blocks or ["all" if options.full else "default"]
    if options.full:
        options.pairs = max(30, options.pairs or 30)
    for name, least in (("pairs", 1), ("budget", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name}: must be at least {least}, got {value}")
    if min(options.batch) < 1:
        parser.error(f"--batch: must be at least 1, got {min(options.batch)}")
    try:
        options.blocks = blocks.select(options.blocks)
        fusedres.fuse(nn.Identity(), filter=lambda *_: False, memory=options.memory, conv=options.conv)
        with fusedres.use_backend(options.backend) if options.backend else contextlib.nullcontext():
            backends.backend_for(torch.device(options.device).type)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return options


def main(argv: list[str] | None = None, fuse: Callable[[nn.Module], nn.Module] | None = None) -> int:
    """Run the benchmark; stop and return 1 if a fused block disagrees."""
    options = parse(argv)
    started = time.perf_counter()
    if options.keep_pages:
        fusedres.keep_pages()
    settings = BlockSettings(
        torch.device(options.device), DTYPES[options.dtype], options.memory, options.conv, options.backend,
        options.freeze, options.compile, fuse,
    )  # fmt: skip
    if settings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    phases = closed_form.PHASES if options.phase == "both" else (options.phase,)
    cases = [BlockCase(n, b, size, p) for size in options.batch for n, b in options.blocks.items() for p in phases]

    where = harness.machine(settings.device)
    bandwidth = harness.copy_bandwidth(settings.device)
    rate = harness.matmul_rate(settings.device, settings.dtype)
    ceilings = {"copy_bytes_per_s": bandwidth, "matmul_flops_per_s": rate}
    print(
        f"{where['device']}, torch {where['versions']['torch']}, fusedres {where['versions']['fusedres']}, "
        f"{options.dtype}, copy {bandwidth / 1e9:.1f} GB/s, matmul {rate / 1e9:.0f} GFLOP/s"
    )
    if note := harness.busy_note(settings.device):
        print(note)
    progress = harness.Progress(100 * len(cases))
    rows: list[dict[str, Any]] = []
    lines = []
    for done, case in enumerate(cases):
        if done and not options.pairs and time.perf_counter() - started > options.budget:
            break
        progress.step(f"{case}: checking", 0)
        bench = Bench(case, settings)
        failed = [v for v in bench.check() if not v.passed]
        if failed:
            progress.close()
            print(f"{case}: the fused block disagrees with torchvision's", file=sys.stderr)
            print("\n".join(f"  {v}" for v in failed), file=sys.stderr)
            return 1
        pairs = options.pairs or 40
        left = options.budget - (time.perf_counter() - started)
        budget = None if options.pairs else max(0.0, left) / (len(cases) - done)
        begun, shown = time.perf_counter(), 0

        def tick(rounds: int, case: BlockCase = case, begun: float = begun, budget: float | None = budget) -> None:
            nonlocal shown
            share = max(rounds / pairs, (time.perf_counter() - begun) / budget if budget else 0.0)  # noqa: B023
            progress.step(f"{case}: timing", int(100 * min(1.0, share)) - shown)
            shown = int(100 * min(1.0, share))

        bench.measure(pairs, min(5, pairs), budget, tick)
        progress.step(str(case), 100 - shown)
        rows += rows_of(case, settings, where, ceilings)
        lines.append(cells(case, options.compile))
    progress.close()
    left_out = cases[len(lines) :]
    cases = cases[: len(lines)]
    harness.print_table(HEADER + (["compile ms", "vs compile"] if options.compile else []), lines)
    counts = [len(c.samples[BASE]) for c in cases]
    print(
        f"{min(counts)}-{max(counts)} interleaved rounds per line; ratio: eager channels_last over fused; "
        f"saved, moved: eager/fused; outputs{' and gradients' if 'train' in phases else ''} checked against float64; "
        f"{time.perf_counter() - started:.0f} s"
    )
    if left_out:
        print(
            f"note: {len(left_out)} lines left out, the {options.budget:g} s of --budget were spent: {left_out[0]} ..."
        )
    for reason in sorted({c.unfused for c in cases if c.unfused}):
        print(f"note: {sum(c.unfused == reason for c in cases)} of {len(cases)} lines ran unfused: {reason}")
    if options.json:
        harness.write_rows(options.json, rows)
    if options.plot:
        from reporting.plots import plot_blocks

        plot_blocks(rows, Path(options.plot))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, "bench_block.py"))

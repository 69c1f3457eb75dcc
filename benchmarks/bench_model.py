"""Times whole ResNets, DenseNets and YOLO11n, eager against fused: images per second and memory of a step.

    python benchmarks/bench_model.py                      the GPU if there is one, else the CPU
    python benchmarks/bench_model.py --models resnet18 --phase train --batch 32 --compile --json models.json
    python benchmarks/bench_model.py --phase infer --batch 1 8 32 --rivals
    python benchmarks/bench_model.py --phase train --rivals
    python benchmarks/bench_model.py --models yolo11n --phase train --size 640 --batch 8

yolo11n needs ultralytics (pip install '.[rivals]'); its loss is the cross entropy of averages of all its outputs.

A training step is zero_grad, forward, cross entropy, backward and SGD with momentum, on random images that are already
on the device. Variants are interleaved, in one process except for --rivals, and timed only if their scores agree with
those of eager. Moved bytes are counted while operators and kernels run. The bound follows from the traffic model and
the measured rates of a copy and of a matrix product.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
from common import harness
from memory_traffic.launched import WAYS
from suite import cpu_rivals
from suite.models import Work, measure
from suite.precision import PRECISIONS
from suite.settings import Settings

import fusedres

HEADER = [
    "model", "phase", "batch", "variant", "images/s", "eager / it (95%)", "% of bound", "peak MB", "saved MB",
    "moved MB", "page faults",
]  # fmt: skip

MEMORY = ("peak_bytes", "saved_bytes", "counted_bytes")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = ("resnet18", "resnet34", "resnet50", "densenet121", "densenet169", "densenet201", "yolo11n")
    parser.add_argument("--models", nargs="+", choices=names, default=["resnet18", "resnet50"])
    parser.add_argument(
        "--phase", choices=("both", "train", "infer"), default="both", help="what to measure (default: both)"
    )
    parser.add_argument("--batch", type=int, nargs="+", help="images per step (default: GPU 64, CPU 8)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype",
        choices=tuple(PRECISIONS),
        help="half precision runs under autocast, with --rivals without it (default: GPU bfloat16, CPU float32)",
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds; each times every variant once (default: 12)")
    parser.add_argument(
        "--budget",
        type=float,
        default=150,
        help="seconds of timing, after which three rounds are enough (default: 150)",
    )
    parser.add_argument("--keep-pages", action="store_true", help="CPU: freed memory stays mapped (glibc)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument(
        "--rivals",
        action="store_true",
        help="CPU: each way in its own process, also frozen inference, torch.compile (default; freezing), onnxruntime "
        "and OpenVINO if they are installed (pip install '.[rivals]'), and training with keep_pages(); says which "
        "goals are met",
    )
    parser.add_argument("--json", metavar="FILE", help="write a row for each measurement")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device")
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.batch = options.batch if options.batch is not None else [64 if on_gpu else 8]
    for name, value, least in (
        ("batch", min(options.batch), 1),
        ("rounds", options.rounds, 1),
        ("size", options.size, 32),
    ):
        if value < least:
            parser.error(f"--{name}: must be at least {least}, got {value}")
    if options.rivals and "yolo11n" in options.models:
        parser.error("--rivals: is for ResNets")
    if options.rivals and on_gpu:
        parser.error("--rivals: is for CPUs; gpu_suite.py has the rivals of a GPU")
    if options.rivals and options.dtype not in cpu_rivals.DTYPES:
        parser.error(f"--rivals: --dtype must be one of {', '.join(cpu_rivals.DTYPES)}, got {options.dtype}")
    if options.rivals and options.keep_pages:
        parser.error("--rivals: training is timed with and without; leave out --keep-pages")
    return options


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as a line of the table."""
    ratio = row["ratio"]
    megabytes = ["-" if row[key] is None else f"{row[key] / 1e6:,.0f}" for key in MEMORY]
    return [
        row["name"], row["phase"], str(row["shape"][0]), row["variant"], f"{row['images_per_s']:.4g}",
        f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})",
        "-" if row["percent_of_bound"] is None else f"{row['percent_of_bound']:.0f}", *megabytes,
        "-" if row["page_faults"] is None else f"{row['page_faults']:,.0f}",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return 1 if a variant failed or disagrees."""
    options = parse(argv)
    device = torch.device(options.device)
    if options.keep_pages:
        fusedres.keep_pages()
    names = ["eager_nchw", *(WAYS if device.type == "cuda" else ("library", "library min"))]
    names += ["compile"] if options.compile else []
    phases = ("train", "infer") if options.phase == "both" else (options.phase,)
    cases = [(model, phase, batch) for model in options.models for phase in phases for batch in options.batch]
    progress = harness.Progress(len(cases))
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings("models", Path(folder), device, tiny=False, until=float("inf"))
        where = settings.where
        print(f"{where['device']}, torch {where['versions']['torch']}, fusedres {where['versions']['fusedres']}")
        if note := harness.busy_note(device):
            print(note)
        for model, phase, batch in cases:
            case = f"{model} {phase} batch {batch}"
            work = Work(model, phase, batch, PRECISIONS[options.dtype], options.size)
            progress.step(case, 0)
            if options.rivals:
                timed, said = cpu_rivals.measure(work, cpu_rivals.ways(work), options.rounds)
                rows += timed
                notes += [f"{case}, {note}" for note in said]
            else:
                different = [name for name in names if phase == "train" or not name.endswith(" min")]
                measure(settings, case, work, different, options.rounds, options.budget / len(cases))
            progress.step(case)
        found = settings.journal.rows()
    progress.close()
    rows += [{key: row.get(key) for key in harness.ROW_KEYS} for row in found if "median_s" in row]
    for row in found:
        if "error" in row:
            print(f"{row['name']} {row['phase']} {row['variant']}: {row['error']}", file=sys.stderr)
    harness.print_table(HEADER, [cells(row) for row in rows])
    for note in notes:
        print(note)
    if options.rivals:
        print()
        harness.print_table(cpu_rivals.GOALS_HEADER, cpu_rivals.goals(rows))
    if options.json:
        harness.write_rows(options.json, rows)
    return int(any("error" in row for row in found))


if __name__ == "__main__":
    sys.exit(run(main, "bench_model.py"))

"""The bytes that a training step of residual blocks moves per image, for each way of running it.

    python benchmarks/traffic.py                    totals of ResNet-18, 34 and 50 in closed form
    python benchmarks/traffic.py --block layer1.0   every kernel of one block in closed form
    python benchmarks/traffic.py --launched         what the triton backend launches, beside the closed form

The folder memory_traffic/ has the counts: closed_form.py from the shapes of a block, launched.py from the arguments of
every kernel launch, and counting.py from the operators that run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

from common.networks import resnet_blocks
from memory_traffic import launched
from memory_traffic.closed_form import MODES, bytes_moved, kernels, stem_bytes, table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Bytes per image that a training step must move, for each way of running it."
    )
    parser.add_argument("--image", type=int, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--itemsize", type=int, default=2, help="bytes per element (default: 2, for bf16 or fp16)")
    parser.add_argument(
        "--block", help="list the kernels of one block: layer1.0 is of ResNet-50, 18:layer2.0 of ResNet-18"
    )
    parser.add_argument("--launched", nargs="*", metavar="WAY", help="count the launches of the triton backend "
        "instead, on meta tensors (default: all ways of launched.py)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=256, help="images per step for --launched (default: 256)")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")
    options = parser.parse_args(argv)
    if options.launched is not None:
        _print_launched(options, parser)
        return
    if options.block:
        depth, _, name = options.block.rpartition(":")
        block = resnet_blocks(int(depth or 50), options.image)[name]
        for mode in MODES:
            moved = bytes_moved(block, mode, "train", 1, options.itemsize, weights=False)
            print(f"{mode}: {moved / 1e6:.3f} MB per image")
            for k in kernels(block, mode):
                operands = ", ".join(k.reads) + (" + mask" if k.mask_bits else "")
                results = ", ".join(k.writes) or "reduced"
                print(f"    {k.bytes(options.itemsize) / 1e6:8.3f}  {k.name}: {operands} -> {results}")
        return
    rows = table(options.image, options.itemsize)
    print(
        f"MB per image, training step of the residual blocks at {options.image}², {options.itemsize} bytes per element"
    )
    print(f"{'way':<12}" + "".join(f"{'ResNet-' + d:>12}" for d in ("18", "34", "50")))
    for row in rows:
        print(f"{row['mode']:<12}" + "".join(f"{row[f'resnet{d}']:>12.1f}" for d in (18, 34, 50)))
    stem = [stem_bytes(fused, options.image, options.itemsize) / 1e6 for fused in (False, True)]
    print(f"stem: eager {stem[0]:.1f}, fused {stem[1]:.1f}")
    if options.json:
        record = {"image": options.image, "itemsize": options.itemsize, "rows": rows, "stem": stem}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


def _print_launched(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    unknown = [way for way in options.launched if way not in launched.WAYS]
    if unknown:
        parser.error(f"--launched: unknown ways {unknown}; known: {', '.join(launched.WAYS)}")
    if options.itemsize != 2:
        parser.error(f"--launched: blocks run in bf16, so --itemsize must be 2, got {options.itemsize}")
    if options.batch < 1:
        parser.error(f"--launched: --batch must be at least 1, got {options.batch}")
    launched.show(options.launched or list(launched.WAYS), options.batch, options.image, options.json)


if __name__ == "__main__":
    raise SystemExit(run(main, "traffic.py"))

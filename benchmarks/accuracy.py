"""Compares the errors of a fused block with those of eager: the numbers of docs/accuracy.md.

    python benchmarks/accuracy.py                     500 random blocks, with both values of memory; under a minute
    python benchmarks/accuracy.py --blocks 4000 --format contiguous --markdown

A random block is a BasicBlock or a Bottleneck with 1 to 64 channels (the middle ones of a Bottleneck), with an identity
or a projection as shortcut, on 1 to 8 images of 1 to 14 pixels in height and width. Its parameters are random, or give
channels that are nearly equal, means far from zero, or small variances. Most blocks are in training. Eager and the
fused block run in float32; the same block in float64 is the exact result. For each tensor

    ratio = |fused - exact| / |eager - exact|      in L2 norms, both with 2^-26 |exact| added,

where the added term keeps errors that are small by chance from dominating the ratio. No pre-activation is so near to
zero that rounding changes a mask (tests/reference.py). The table has geometric mean / 95th percentile / maximum of the
ratio.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import reference
import tolerance
from shapes import EXPANSION, Case

import fusedres

WIDTHS = (1, 2, 3, 4, 5, 8, 16, 32, 64)
KINDS = ("output", "grad x", "grad conv", "grad BN weight", "grad BN bias", "running mean", "running var")
CONDITIONS = ("plain", "plain", "correlated", "offset", "small")
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
_LUCK = 2.0**-26


@dataclass(frozen=True)
class Drawn:
    """A random block, and how its parameters and input are changed."""

    case: Case
    condition: str
    mode: str
    memory_format: torch.memory_format

    def __str__(self) -> str:
        name = next(name for name, found in FORMATS.items() if found is self.memory_format)
        return f"{self.case} seed {self.case.seed} {self.condition} {self.mode} {name}"


@dataclass(frozen=True)
class Error:
    """The ratio of one tensor of one block, and how far its error is above the floor of the rule."""

    kind: str
    width: int
    memory: str
    ratio: float
    above_floor: float  # (error - floor) / error of eager: the larger one of the max norm and L2
    where: str


def draw(seed: int, formats: Sequence[str] = tuple(FORMATS)) -> Drawn:
    """Return the random block of this seed."""
    rng = random.Random(seed)
    block, planes = rng.choice(("basic", "bottleneck")), rng.choice(WIDTHS)
    channels = planes * EXPANSION[block]
    in_channels, stride, shortcut = channels, 1, "identity"
    if rng.random() < 0.6:
        shortcut = "projection"
        in_channels, stride = max(1, channels // rng.choice((1, 2, 2, 4))), rng.choice((1, 2))
    least = rng.choice((1, 1, 9))  # some large ones, as memory="min" needs many rows
    while True:
        batch, height, width = rng.randint(min(least, 6), 8), rng.randint(least, 14), rng.randint(least, 14)
        case = Case(block, shortcut, in_channels, planes, stride, batch, height, width, seed)
        if case.values_a_channel >= 3:
            break
    mode = "train" if rng.random() < 0.85 else rng.choice(("eval", "frozen"))
    return Drawn(case, rng.choice(CONDITIONS), mode, FORMATS[rng.choice(formats)])


def prepare(drawn: Drawn) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the stock block, its input and the gradient of its output, in float32."""
    block = reference.set_mode(reference.build(drawn.case, torch.float32, drawn.memory_format), drawn.mode)
    x, grad = reference.inputs(drawn.case, torch.float32, drawn.memory_format)
    _harden(block, x, drawn)
    reference.separate(block, x)
    return block, x, grad


@torch.no_grad()
def _harden(block: nn.Module, x: Tensor, drawn: Drawn) -> None:
    generator = torch.Generator().manual_seed(drawn.case.seed)
    if drawn.condition == "correlated":
        apart = 10 ** -(1 + torch.rand(1, generator=generator).item())
        x.copy_(x.mean(1, keepdim=True) + apart * x)
        for name, child in block.named_modules():
            if not isinstance(child, nn.Conv2d):
                continue
            if name in ("conv1", "conv2"):
                child.weight.copy_(child.weight[:1] + apart * child.weight)
            elif child.in_channels > 1:  # the common part of its inputs cancels
                child.weight.sub_(child.weight.mean(1, keepdim=True))
    elif drawn.condition == "offset":
        x.add_(10 * torch.randn(x.shape[1], generator=generator).view(1, -1, 1, 1))
    elif drawn.condition == "small":
        for child in block.modules():
            if isinstance(child, nn.Conv2d):
                child.weight.mul_(0.03)


def takes_one_pass(drawn: Drawn) -> bool:
    """Whether memory="min" changes anything: in training, a 1x1 convolution at the end of a branch with enough rows."""
    case = drawn.case
    wide = [case.planes] if case.block == "bottleneck" else []
    wide += [case.in_channels] if case.shortcut == "projection" else []
    return drawn.mode == "train" and any(case.values_a_channel >= 16 * channels for channels in wide)


def measure(drawn: Drawn, memories: Iterable[str] = ("auto", "min")) -> list[Error]:
    """Return the errors of every tensor of a block that rounding may change."""
    block, x, grad = prepare(drawn)
    oracle = reference.oracle(block, x, grad)
    eager = reference.run(copy.deepcopy(block), x, grad)
    found = []
    for memory in memories:
        if memory == "min" and not takes_one_pass(drawn):
            continue
        fused = fusedres.fuse(copy.deepcopy(block), memory=memory)
        if not all(row.fused for row in fusedres.report(fused)):
            raise RuntimeError(f"{drawn}: not fused:\n{fusedres.report(fused)}")
        values = reference.run(fused, x, grad)
        for name, terms in oracle.terms.items():
            tensors = values[name], eager[name], oracle.values[name], terms, oracle.spread[name]
            norms = tolerance.measure(name, *tensors, torch.float32)
            luck = _LUCK * oracle.values[name].norm().item() + 1e-30
            ratio = (norms[1].error + luck) / (norms[1].eager + luck)
            above = max((m.error - m.floor) / max(m.eager, 1e-30) for m in norms)
            found.append(Error(kind_of(name), drawn.case.planes, memory, ratio, above, f"{name} of {drawn}"))
    return found


def kind_of(name: str) -> str:
    """Return the entry of KINDS for the name of a tensor (tests/reference.py)."""
    if name in ("out", "grad_x"):
        return KINDS[0] if name == "out" else KINDS[1]
    if name.startswith("stats."):
        return KINDS[5] if name.endswith("running_mean") else KINDS[6]
    if "conv" in name or "downsample.0" in name:
        return KINDS[2]
    return KINDS[3] if name.endswith("weight") else KINDS[4]


Budget = dict[tuple[str, int, str], list[float]]  # memory, width, kind: sorted ratios


def budget(errors: Iterable[Error]) -> Budget:
    """Return the sorted ratios of each memory, width and kind of tensor."""
    found: Budget = defaultdict(list)
    for error in errors:
        found[error.memory, error.width, error.kind].append(error.ratio)
    return {key: sorted(ratios) for key, ratios in sorted(found.items())}


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return exp of the mean logarithm."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def table(found: Budget, memory: str, markdown: bool = False) -> str:
    """Return a table with one row per width and one column per kind: geometric mean / 95th percentile / maximum."""
    widths = sorted({width for of, width, _ in found if of == memory})
    lines = [[f"memory={memory}", *KINDS]]
    for width in widths:
        row = [str(width)]
        for kind in KINDS:
            ratios = found.get((memory, width, kind), [])
            numbers = (geometric_mean(ratios), ratios[int(0.95 * (len(ratios) - 1))], ratios[-1]) if ratios else ()
            row.append(" / ".join(f"{number:.2f}" for number in numbers))
        lines.append(row)
    if markdown:
        lines.insert(1, ["---"] * (len(KINDS) + 1))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    sizes = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(f"{cell:>{size}}" for cell, size in zip(line, sizes, strict=True)) for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and the tensor that is the farthest above the floor of the rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first block")
    parser.add_argument("--memory", nargs="+", default=["auto", "min"], choices=["auto", "min"])
    parser.add_argument("--format", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = range(options.seed, options.seed + options.blocks)
    errors = [error for seed in seeds for error in measure(draw(seed, options.format), options.memory)]
    found = budget(errors)
    for memory in options.memory:
        print(f"{table(found, memory, options.markdown)}\n")
    worst = max(errors, key=lambda error: error.above_floor)
    print(f"most above the floor: {worst.above_floor:.2f} of eager's error, {worst.memory}: {worst.where}")


if __name__ == "__main__":
    raise SystemExit(run(main, "accuracy.py"))

"""Times each convolution of a ResNet on the CPU: torch's against what may run instead, forward and both gradients.

    python benchmarks/bench_convolution.py                       ResNet-50 at batch 8; takes a minute or two
    python benchmarks/bench_convolution.py --depth 18 --batch 32 --rounds 9
    python benchmarks/bench_convolution.py --dtype bfloat16

In float32 the alternative ("own") is this package's kernel. In bfloat16 it is torch's product of matrices, and for
weights' gradients on a CPU with AMX this package's kernel. The columns are torch's milliseconds, the ratio torch / own
for the forward pass, the input's gradient and the weight's, and how the largest error of the alternative's forward pass
compares with torch's, both against float64. All tensors are channels_last. Both take turns; a time is the median over
rounds, a ratio the median of the ratios. The time to pack a weight counts for own. Where there is no alternative (the
input's gradient of a strided convolution) there is a dash; such a convolution counts as torch's in the last line, which
weights each convolution by how often the network has it. Fused blocks take what this table says is faster, by shape and
instruction set (csrc/convolution_method/convolution_method.cpp).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
from common import harness
from common.networks import Convolution, Stem, resnet_blocks
from torch import Tensor

from fusedres.autograd import product
from fusedres.kernels import cpu_convolution
from fusedres.kernels.cpu_convolution import Purpose
from fusedres.values import Geometry, Raw

DIRECTIONS = ("forward", "grad input", "grad weight")
HEADER = ["convolution", "count", *(column for each in DIRECTIONS for column in (f"{each} ms", "torch / own"))]
HEADER.append("error own / torch")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the largest value, between both


@dataclass
class Operands:
    """The tensors of one convolution, and its calls in torch and in this package's kernels by direction."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    geometry: Geometry

    @staticmethod
    def of(shape: Convolution, batch: int, dtype: torch.dtype) -> Operands:
        """Return random operands."""
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(dtype, memory_format=torch.channels_last)

        weight = random(shape.out_channels, shape.in_channels, shape.kernel, shape.kernel)
        return Operands(
            random(batch, shape.in_channels, shape.in_size, shape.in_size),
            weight / (shape.weight / shape.out_channels) ** 0.5,
            random(batch, shape.out_channels, shape.out_size, shape.out_size),
            Geometry((shape.stride,) * 2, (shape.kernel // 2,) * 2, (1, 1)),
        )

    def torch(self) -> dict[str, Callable[[], Tensor]]:
        stride, padding, dilation = self.geometry

        def backward(of_input: bool) -> Tensor:
            mask = (of_input, not of_input, False)
            found = torch.ops.aten.convolution_backward(
                self.grad, self.x, self.weight, None, stride, padding, dilation, False, (0, 0), 1, mask
            )
            return found[0 if of_input else 1]

        calls = (
            lambda: torch.conv2d(self.x, self.weight, None, stride, padding, dilation),
            lambda: backward(True),
            lambda: backward(False),
        )
        return dict(zip(DIRECTIONS, calls, strict=True))

    def own(self) -> dict[str, Callable[[], Tensor]]:
        """Return what may run instead of torch's calls."""
        return self._kernels() if self.x.dtype is torch.float32 else self._products()

    def _products(self) -> dict[str, Callable[[], Tensor]]:
        x, weight = self.x.shape, self.weight.shape
        with_kernel = cpu_convolution.is_faster(x, weight, self.geometry, self.x.dtype, 1, Purpose.WEIGHT_GRADIENT)

        def weight_gradient() -> Tensor:
            if with_kernel:
                return cpu_convolution.weight_gradient(self.grad, Raw(self.x, None), self.weight, self.geometry)
            return product.weight_gradient(self.grad, self.x, self.weight, self.geometry)

        calls = (
            lambda: product.product(self.x, self.weight),
            lambda: product.input_gradient(self.grad, self.weight),
            weight_gradient,
        )
        found = dict(zip(DIRECTIONS, calls, strict=True))
        if self.x.shape[2:] != self.grad.shape[2:] or self.weight.shape[2:] != (1, 1):
            del found["forward"], found["grad input"]
        return found

    def _kernels(self) -> dict[str, Callable[[], Tensor]]:
        calls = (
            lambda: cpu_convolution.convolve(self.x, self.weight, self.geometry),
            lambda: cpu_convolution.input_gradient(self.grad, self.weight, self.geometry),
            lambda: cpu_convolution.weight_gradient(self.grad, Raw(self.x, None), self.weight, self.geometry),
        )
        found = dict(zip(DIRECTIONS, calls, strict=True))
        if not cpu_convolution.has_input_gradient(self.weight, self.geometry):
            del found["grad input"]
        return found

    def error_ratio(self) -> float | None:
        """Return the largest error of the own forward pass, divided by that of torch's."""
        if "forward" not in self.own():
            return None
        exact = torch.conv2d(self.x.double(), self.weight.double(), None, *self.geometry)
        own, library = (float((each()["forward"]() - exact).abs().max()) for each in (self.own, self.torch))
        return own / library


def convolutions(depth: int, size: int) -> Counter[Convolution]:
    """Return the distinct convolutions of a ResNet as its blocks run them, and how often.

    A projection's convolution has no stride: the block reads every stride-th pixel before.
    """
    found: Counter[Convolution] = Counter()
    for block in (Stem(size), *resnet_blocks(depth, size).values()):
        for each in block.convolutions:
            if each.name == "projection":
                each = replace(each, stride=1, in_size=each.out_size)
            found[replace(each, name="")] += 1
    return found


def measure(operands: Operands, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return direction → the seconds of torch and of own (none where it has no kernel).

    Raises:
        RuntimeError: they disagree.
    """
    timer, own, found = harness.Timer(torch.device("cpu")), operands.own(), {}
    for direction, library in operands.torch().items():
        variants = [harness.Variant("torch", library)]
        if direction in own:
            expected, got = library(), own[direction]()
            error = float((got - expected).abs().max() / expected.abs().max())
            if not error < TOLERANCE[got.dtype]:
                raise RuntimeError(f"{direction} differs from torch's by {error:.2g} of the largest value")
            variants.append(harness.Variant("own", own[direction]))
        samples = harness.interleave(variants, timer, rounds=rounds)
        found[direction] = samples["torch"], samples.get("own", [])
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--depth", type=int, choices=(18, 34, 50), default=50, help="of the ResNet (default: 50)")
    parser.add_argument("--batch", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each variant (default: 7)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(argv)
    for name in ("batch", "size", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(options, name)}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the table."""
    options = parse(argv)
    lines, totals = [], {direction: [0.0, 0.0] for direction in DIRECTIONS}
    for shape, count in convolutions(options.depth, options.size).items():
        line = [
            f"{shape.in_channels}-{shape.out_channels} {shape.kernel}x{shape.kernel}/{shape.stride} {shape.in_size}²"
        ]
        line.append(str(count))
        operands = Operands.of(shape, options.batch, getattr(torch, options.dtype))
        for direction, (library, own) in measure(operands, options.rounds).items():
            seconds = harness.summarize(library).median
            ratio = harness.ratio_interval(library, own).median if own else None
            line += [f"{1e3 * seconds:.2f}", "-" if ratio is None else f"{ratio:.2f}"]
            totals[direction][0] += count * seconds
            totals[direction][1] += count * seconds / (ratio or 1)
        lines.append([*line, "-" if (error := operands.error_ratio()) is None else f"{error:.2f}"])
    ends = [
        text for of_torch, of_own in totals.values() for text in (f"{1e3 * of_torch:.1f}", f"{of_torch / of_own:.2f}")
    ]
    lines.append(["all", str(sum(convolutions(options.depth, options.size).values())), *ends, ""])
    machine = harness.machine(torch.device("cpu"))
    print(f"{machine['device']}, {machine['isa']}, torch {torch.__version__}, {options.dtype}, batch {options.batch}")
    if note := harness.busy_note(torch.device("cpu")):
        print(note)
    harness.print_table(HEADER, lines)


if __name__ == "__main__":
    raise SystemExit(run(main, "bench_convolution.py"))

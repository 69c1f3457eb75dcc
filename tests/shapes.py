"""Shapes of the tests: a residual block with its shortcut and input, and the lists of them that the tests run over.

The shapes are small on purpose: odd sizes and channel counts that are no multiple of the SIMD width reach every path of
the code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BLOCKS = ("basic", "bottleneck")
SHORTCUTS = ("identity", "projection", "zeropad")
EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True)
class Case:
    """One residual block and its input: (batch, in_channels, height, width) -> (batch, out_channels, ...)."""

    block: str
    shortcut: str
    in_channels: int
    planes: int
    stride: int = 1
    batch: int = 3
    height: int = 7
    width: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shortcut == "identity" and (self.stride != 1 or self.in_channels != self.out_channels):
            raise ValueError(f"{self}: an identity shortcut keeps the shape")
        if self.shortcut == "zeropad" and self.in_channels > self.out_channels:
            raise ValueError(f"{self}: a zero-padded shortcut cannot remove channels")

    @property
    def out_channels(self) -> int:
        return self.planes * EXPANSION[self.block]

    @property
    def values_a_channel(self) -> int:
        """The number of values per channel that the last BatchNorm averages over."""
        return self.batch * -(-self.height // self.stride) * -(-self.width // self.stride)

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the block's BatchNorms."""
        names = ("bn1", "bn2") if self.block == "basic" else ("bn1", "bn2", "bn3")
        return (*names, "downsample.1") if self.shortcut == "projection" else names

    @property
    def last_norm(self) -> str:
        """The name of the BatchNorm that ends the residual branch."""
        return "bn2" if self.block == "basic" else "bn3"

    @property
    def convolutions(self) -> tuple[str, ...]:
        names = ("conv1", "conv2") if self.block == "basic" else ("conv1", "conv2", "conv3")
        return (*names, "downsample.0") if self.shortcut == "projection" else names

    def __str__(self) -> str:
        return (
            f"{self.block}-{self.shortcut}-{self.in_channels}to{self.out_channels}-s{self.stride}"
            f"-{self.batch}x{self.height}x{self.width}"
        )


def case(block: str, shortcut: str, planes: int = 8, stride: int | None = None, **sizes: int) -> Case:
    """Return the usual case of this block and shortcut: an identity keeps the size, the other two halve it."""
    out_channels = planes * EXPANSION[block]
    if shortcut == "identity":
        return Case(block, shortcut, out_channels, planes, stride or 1, **sizes)
    in_channels = sizes.pop("in_channels", max(1, out_channels // 2))
    return Case(block, shortcut, in_channels, planes, stride or 2, **sizes)


def modes(case: Case) -> tuple[str, ...]:
    """Return the modes of reference.set_mode: train, eval, all BatchNorms frozen, and each of them frozen alone."""
    return ("train", "eval", "frozen", *(f"frozen:{name}" for name in case.norms))


def with_size(base: Case, batch: int, height: int, width: int) -> Case:
    return replace(base, batch=batch, height=height, width=width)


# Every block with every shortcut, with stride 2 if the shortcut allows it: most tests run over this list.
CORE = tuple(case(block, shortcut) for block in BLOCKS for shortcut in SHORTCUTS)

# Projection and zero-padded shortcuts with stride 1, which change only the channels or nothing.
STRIDE_ONE = tuple(
    case(block, shortcut, stride=1, in_channels=in_channels)
    for block in BLOCKS
    for shortcut in ("projection", "zeropad")
    for in_channels in (5, 8)
)

# Channel counts next to multiples of the SIMD width; planes of a Bottleneck are a quarter of its output channels.
CHANNELS = tuple(
    case("basic", shortcut, planes, height=5, width=3)
    for planes in (1, 3, 65, 127, 129)
    for shortcut in ("identity", "projection")
) + tuple(
    case("bottleneck", shortcut, planes, height=5, width=3)
    for planes in (1, 3, 33)
    for shortcut in ("identity", "projection", "zeropad")
)

# Sizes that can break launch heuristics, strided views and code that reads a layout from ambiguous strides.
SIZES = tuple(
    with_size(base, *size)
    for base in CORE
    for size in ((1, 9, 7), (1, 3, 2), (2, 1, 1), (5, 1, 1), (2, 1, 13), (255, 1, 1), (2, 15, 17))
)

# Batch sizes at the limits of a grid or of a chunk of rows; images are 1x1, so that only the batch counts.
BATCHES = tuple(
    case(block, shortcut, planes=2, batch=batch, height=1, width=1)
    for block, shortcut, batch in (
        ("basic", "identity", 1),
        ("basic", "projection", 2),
        ("bottleneck", "identity", 255),
        ("basic", "zeropad", 512),
        ("bottleneck", "projection", 4096),
        ("basic", "projection", 70_000),
        ("bottleneck", "identity", 70_000),
    )
)

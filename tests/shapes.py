"""Shapes of the tests: a residual block, its shortcut, its input, and the lists that the tests run over.

Small on purpose: every path of the code is reached by odd sizes and channel counts off the SIMD width, not by
volume.
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
            raise ValueError(f"{self}: a zero-padded shortcut adds channels, it removes none")

    @property
    def out_channels(self) -> int:
        return self.planes * EXPANSION[self.block]

    @property
    def values_a_channel(self) -> int:
        """Values that the last BatchNorm averages over."""
        return self.batch * -(-self.height // self.stride) * -(-self.width // self.stride)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the block's BatchNorms."""
        names = ("bn1", "bn2") if self.block == "basic" else ("bn1", "bn2", "bn3")
        return (*names, "downsample.1") if self.shortcut == "projection" else names

    @property
    def last_norm(self) -> str:
        """Name of the BatchNorm that ends the residual branch."""
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
    """The usual case of this block and shortcut: the shape is kept by an identity, halved by the other two."""
    out_channels = planes * EXPANSION[block]
    if shortcut == "identity":
        return Case(block, shortcut, out_channels, planes, stride or 1, **sizes)
    in_channels = sizes.pop("in_channels", max(1, out_channels // 2))
    return Case(block, shortcut, in_channels, planes, stride or 2, **sizes)


def modes(case: Case) -> tuple[str, ...]:
    """Training, eval, all BatchNorms frozen, and each of them frozen alone: see reference.set_mode."""
    return ("train", "eval", "frozen", *(f"frozen:{name}" for name in case.norms))


def with_size(base: Case, batch: int, height: int, width: int) -> Case:
    return replace(base, batch=batch, height=height, width=width)


# Every block with every shortcut, stride 2 where the shortcut allows one: the list that most tests run over.
CORE = tuple(case(block, shortcut) for block in BLOCKS for shortcut in SHORTCUTS)

# Shortcuts that change the shape without a stride, or change nothing.
STRIDE_ONE = tuple(
    case(block, shortcut, stride=1, in_channels=in_channels)
    for block in BLOCKS
    for shortcut in ("projection", "zeropad")
    for in_channels in (5, 8)
)

# Channel counts around and off the SIMD width; planes of a Bottleneck are a quarter of its output.
CHANNELS = tuple(
    case("basic", shortcut, planes, height=5, width=3)
    for planes in (1, 3, 65, 127, 129)
    for shortcut in ("identity", "projection")
) + tuple(
    case("bottleneck", shortcut, planes, height=5, width=3)
    for planes in (1, 3, 33)
    for shortcut in ("identity", "projection", "zeropad")
)

# Sizes at which launch heuristics, strided views and ambiguous strides go wrong.
SIZES = tuple(
    with_size(base, *size)
    for base in CORE
    for size in ((1, 9, 7), (1, 3, 2), (2, 1, 1), (5, 1, 1), (2, 1, 13), (255, 1, 1), (2, 15, 17))
)

# Batches at which a grid or a chunk of rows ends: 1x1 images, so that the batch is all there is.
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

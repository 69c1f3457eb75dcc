"""The least time of a block and of a model, from the traffic model and the measured rates of copy and matmul."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.networks import Block, Stem, resnet_blocks
from memory_traffic import closed_form

from suite.settings import floor_seconds


@dataclass(frozen=True)
class Floor:
    """Bytes of the best mode, operations of the convolutions, and the least seconds."""

    bytes: int
    flops: int
    seconds: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.bytes + other.bytes, self.flops + other.flops, self.seconds + other.seconds)


def of_block(block: Block | Stem, phase: str, batch: int, itemsize: int, ceilings: Mapping[str, float]) -> Floor:
    """Return the floor of a block: the longer one of the times of memory and of arithmetic."""
    moved = min(closed_form.bytes_moved(block, way, phase, batch, itemsize) for way in closed_form.MODES[1:])
    flops = closed_form.flops(block, phase, batch)
    return Floor(moved, flops, floor_seconds(ceilings, moved, flops))


def of_model(
    name: str, phase: str, batch: int, itemsize: int, ceilings: Mapping[str, float], image: int = 224
) -> Floor | None:
    """Return the sum over stem and blocks, without classifier and optimizer; None if the model is not known."""
    depth = name.removeprefix("resnet")
    if depth not in ("18", "34", "50"):
        return None
    total = of_block(Stem(image), phase, batch, itemsize, ceilings)
    for block in resnet_blocks(int(depth), image).values():
        total += of_block(block, phase, batch, itemsize, ceilings)
    return total

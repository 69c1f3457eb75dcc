"""The gradient of a residual network by the length of the paths that it flows back along.

n blocks make 2ⁿ paths, as each is passed over its shortcut or through its branch; C(n, k) of them pass k branches.
The gradient of the first block's input is the sum over all paths, so it is that over the lengths k, exactly:
G_i[k] = S_iᵀ·G_{i+1}[k] + F_iᵀ·G_{i+1}[k − 1].

Source: Veit, Wilber and Belongie 2016, Residual Networks Behave Like Ensembles of Relatively Shallow Networks,
https://arxiv.org/abs/1605.06431, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from fusedres.analysis.observing import Observed, Split

SHARE = 0.95  # of all norms, for the range of lengths that carry them
SAMPLES = 24  # paths of each length


@dataclass(frozen=True)
class PathLength:
    """The paths through this many branches.

    `paths` is how many there are, C(n, length). `norm` is the mean norm of the gradient of one of them, over a sample;
    `of_sum` is the norm of the sum over all of them, exactly.
    """

    length: int
    paths: int
    norm: float
    of_sum: float


@dataclass(frozen=True)
class Paths:
    """The gradient by path length; `difference` is that of the sum over the lengths to autograd's gradient."""

    lengths: list[PathLength]
    difference: float

    @property
    def mean_length(self) -> float:
        """The mean length of all paths: that of Binomial(n, ½)."""
        return (len(self.lengths) - 1) / 2

    @property
    def sizes(self) -> list[float]:
        """The number of paths times the mean norm of one, by length: the norms of all paths, with nothing cancelled."""
        return [each.paths * each.norm for each in self.lengths]

    @staticmethod
    def carrying(sizes: Sequence[float]) -> tuple[int, int]:
        """Return the first and last of the lengths that have SHARE of the sizes, as few lengths as possible."""
        wanted = SHARE * sum(sizes)
        ranges = [
            (last - first, first)
            for first in range(len(sizes))
            for last in range(first, len(sizes))
            if sum(sizes[first : last + 1]) >= wanted
        ]
        width, first = min(ranges, default=(len(sizes) - 1, 0))  # none: a size is no number
        return first, first + width

    def share_of_paths(self, first: int, last: int) -> float:
        """Return the share of all paths that have these lengths."""
        return sum(each.paths for each in self.lengths[first : last + 1]) / sum(each.paths for each in self.lengths)


def paths(seen: Sequence[Observed], bar: tqdm) -> Paths | None:
    """Return the gradient by path length; None if a block has no shortcut, or other layers stand between the blocks."""
    follows = all(torch.equal(call.output, following.x) for call, following in pairwise(seen))
    if not follows or not all(call.block.has_shortcut for call in seen):
        return None
    splits = [Split(call) for call in seen]
    end = seen[-1].grad_output
    sums: list[Tensor] = [end]
    for split in reversed(splits):
        kept, longer = [split.shortcut(grad) for grad in sums], [split.branch(grad) for grad in sums]
        nothing = torch.zeros_like(kept[0])
        sums = [a + b for a, b in zip([*kept, nothing], [nothing, *longer], strict=True)]
    largest = seen[0].grad_x.abs().max().item()
    difference = (torch.stack(sums).sum(0) - seen[0].grad_x).abs().max().item()
    difference = difference / largest if largest else difference
    random = torch.Generator().manual_seed(0)
    lengths = []
    for length, of_sum in enumerate(sums):
        norms = [_norm_along_path(splits, end, length, random) for _ in range(SAMPLES)]
        paths_of_length = math.comb(len(seen), length)
        lengths.append(PathLength(length, paths_of_length, sum(norms) / SAMPLES, of_sum.norm().item()))
        bar.update()
    return Paths(lengths, difference)


def _norm_along_path(splits: Sequence[Split], end: Tensor, length: int, random: torch.Generator) -> float:
    """Return the norm of the gradient along a random path through this many branches."""
    through = set(torch.randperm(len(splits), generator=random)[:length].tolist())
    grad = end
    for index in reversed(range(len(splits))):
        grad = splits[index].branch(grad) if index in through else splits[index].shortcut(grad)
    return grad.norm().item()

"""Networks of several designs, each trained from the same seeds with the same recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from tqdm import tqdm

from fusedres.analysis.data import Data
from fusedres.analysis.results import COLOURS, Mean, mean, style
from fusedres.analysis.training import Recipe, train, work_on
from fusedres.analysis.work import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST_LOSS = 1e-6  # a smaller one is drawn here


@dataclass(frozen=True)
class Variant:
    """The runs of one design, one a seed."""

    network: str
    runs: list[Run]

    @property
    def diverged(self) -> int:
        """How many runs ended with a loss that is not finite."""
        return sum(not math.isfinite(run.loss) for run in self.runs)

    @property
    def logarithm(self) -> Mean:
        """The decimal logarithm of the training loss at the end, over the seeds that have not diverged."""
        losses = [max(run.loss, SMALLEST_LOSS) for run in self.runs if math.isfinite(run.loss)]
        return mean([math.log10(loss) for loss in losses]) if losses else Mean(math.inf, None)

    @property
    def typical_loss(self) -> float:
        """The geometric mean of the training loss at the end, over the seeds that have not diverged."""
        return float(10**self.logarithm.value)

    @property
    def said_loss(self) -> str:
        """The typical loss in words."""
        if self.diverged == len(self.runs):
            return "diverged"
        diverged = f", {self.diverged} of {len(self.runs)} seeds diverged" if self.diverged else ""
        least = "at most " if any(run.loss < SMALLEST_LOSS for run in self.runs) else ""
        return f"{least}{self.typical_loss:.3g}{diverged}"

    @property
    def losses(self) -> list[float]:
        """The training losses at the end, infinite where a run has diverged."""
        return [run.loss if math.isfinite(run.loss) else math.inf for run in self.runs]

    @property
    def rank(self) -> tuple[int, float]:
        """What variants are ordered by: the lower, the better."""
        return self.diverged, self.typical_loss


def train_variants(
    networks: Mapping[str, Callable[[], nn.Module]],
    data: Data,
    recipe: Recipe,
    seeds: int,
    folder: Path | None = None,
    progress: bool = False,
) -> list[Variant]:
    """Train a network of each design from each seed; see work_on."""
    runs: dict[str, list[Run]] = {name: [] for name in networks}
    epochs = recipe.epochs * len(networks) * seeds
    with (
        work_on(networks, data, recipe, seeds, folder) as work,
        tqdm(total=epochs, unit="epoch", disable=None if progress else True) as bar,
    ):
        for seed in range(seeds):
            for name, make in networks.items():
                bar.set_description(f"{name}, seed {seed}")
                runs[name].append(train(name, make, data, recipe, seed, work, bar)[0])
    return [Variant(name, found) for name, found in runs.items()]


def draw_variants(ends: Axes, curves: Axes, variants: Sequence[Variant]) -> None:
    """Draw the training losses at the end, with every seed, and over the epochs."""
    for index, (variant, colour) in enumerate(zip(variants, cycle(COLOURS))):
        losses = [max(run.loss, SMALLEST_LOSS) for run in variant.runs if math.isfinite(run.loss)]
        ends.plot(losses, [index] * len(losses), "o", ms=5, color=colour, alpha=0.6)
        ends.plot([variant.typical_loss], [index], "D", ms=7, color=colour)
        for run in variant.runs:
            label = variant.network if run is variant.runs[0] else None
            epochs = range(1, len(run.losses) + 1)
            line = "--" if index % 2 else "-"  # so that none hides another
            curves.plot(epochs, run.losses, line, color=colour, lw=1, alpha=0.8, label=label)
    ends.set_xscale("log")
    names = [f"{each.network}{f' ({each.diverged} diverged)' if each.diverged else ''}" for each in variants]
    ends.set_yticks(range(len(variants)), names)
    ends.invert_yaxis()
    curves.set_yscale("log")
    style(ends, "Training loss at the end\n(dots: seeds; diamonds: geometric mean)", "cross-entropy", "")
    style(curves, "Training loss by epoch", "epoch", "cross-entropy")

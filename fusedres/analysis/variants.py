"""Networks of several designs, each trained from the same seeds with the same recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from tqdm import tqdm

from fusedres.analysis.data import Data
from fusedres.analysis.results import COLOURS, Mean, mean, style
from fusedres.analysis.training import Recipe, Run, Work, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST_LOSS = 1e-6  # a smaller one is drawn here


@dataclass(frozen=True)
class Variant:
    """The runs of one design, one a seed."""

    network: str
    runs: list[Run]

    @property
    def loss(self) -> Mean:
        """The training loss at the end, over the seeds."""
        return mean([run.loss for run in self.runs])

    @property
    def logarithm(self) -> Mean:
        """The decimal logarithm of the training loss at the end, over the seeds."""
        return mean([math.log10(max(run.loss, SMALLEST_LOSS)) for run in self.runs])

    @property
    def typical_loss(self) -> float:
        """The geometric mean of the training loss at the end, over the seeds."""
        return float(10**self.logarithm.value)

    @property
    def error(self) -> Mean:
        """The share of wrong answers on the held-out images, over the seeds."""
        return mean([1 - run.test_accuracy for run in self.runs])


def train_variants(
    experiment: str,
    networks: Mapping[str, Callable[[], nn.Module]],
    data: Data,
    recipe: Recipe,
    seeds: int,
    folder: Path | None = None,
    progress: bool = False,
) -> list[Variant]:
    """Train a network of each design from each seed; see Work for folder."""
    settings = {"experiment": experiment, "data": data.name, "images": len(data.labels), "recipe": recipe}
    work = Work(folder, settings | {"networks": list(networks), "seeds": seeds})
    runs: dict[str, list[Run]] = {name: [] for name in networks}
    epochs = recipe.epochs * len(networks) * seeds
    with tqdm(total=epochs, unit="epoch", disable=None if progress else True) as bar:
        for seed in range(seeds):
            for name, make in networks.items():
                bar.set_description(f"{name}, seed {seed}")
                runs[name].append(train(name, make, data, recipe, seed, work, bar)[0])
    return [Variant(name, found) for name, found in runs.items()]


def draw_variants(ends: Axes, curves: Axes, variants: Sequence[Variant]) -> None:
    """Draw the training losses at the end, with every seed, and over the epochs."""
    for index, (variant, colour) in enumerate(zip(variants, COLOURS, strict=False)):
        losses = [max(run.loss, SMALLEST_LOSS) for run in variant.runs]
        ends.plot(losses, [index] * len(losses), "o", ms=5, color=colour, alpha=0.6)
        ends.plot([variant.typical_loss], [index], "D", ms=7, color=colour)
        epochs = range(1, len(variant.runs[0].losses) + 1)
        logs = [sum(math.log(max(run.losses[epoch - 1], SMALLEST_LOSS)) for run in variant.runs) for epoch in epochs]
        curves.plot(epochs, [math.exp(log / len(variant.runs)) for log in logs], color=colour, label=variant.network)
    ends.set_xscale("log")
    ends.set_yticks(range(len(variants)), [variant.network for variant in variants])
    ends.invert_yaxis()
    curves.set_yscale("log")
    style(ends, "Training loss at the end\n(dots: seeds; diamonds: geometric mean)", "cross-entropy", "")
    style(curves, "Training loss by epoch", "epoch", "cross-entropy")

"""Degradation: the training loss of plain networks rises with depth, that of residual networks hardly does.

Source: He et al. 2015, Deep Residual Learning, https://arxiv.org/abs/1512.03385, figure 1 and section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fusedres.analysis.data import Data
from fusedres.analysis.results import COLOURS, Result, style
from fusedres.analysis.sizes import FULL
from fusedres.analysis.training import Recipe
from fusedres.analysis.variants import Variant, train_variants
from fusedres.models import plain, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS: dict[str, Callable[[int], nn.Module]] = {"plain": plain, "residual": resnet}


@dataclass(frozen=True)
class Depth:
    """The runs of one design at one depth."""

    design: str
    depth: int
    trained: Variant


@dataclass(frozen=True)
class Degradation(Result):
    """The training losses by design and depth."""

    name: ClassVar[str] = "degradation"
    title: ClassVar[str] = "Degradation: training loss by depth"
    depths: list[Depth]

    def conclusion(self) -> str:
        """Return what the numbers say."""
        said = []
        for design, found in self._by_design().items():
            first, last = found[0].trained, found[-1].trained
            higher = sum(deep > shallow for shallow, deep in zip(first.losses, last.losses, strict=True))
            ratio = last.typical_loss / first.typical_loss
            times = f" ({ratio:.3g} times)" if math.isfinite(ratio) else ""
            said.append(
                f"the training loss of {design} networks goes from {first.said_loss} at depth {found[0].depth} to "
                f"{last.said_loss} at depth {found[-1].depth}{times}, higher in {higher} of {len(first.runs)} seeds"
            )
        text = "; ".join(said)
        return f"{text[0].upper()}{text[1:]}."

    def draw(self, figure: Figure) -> None:
        """Draw the training loss by depth with its intervals, and the losses of the deepest by epoch."""
        by_depth, curves = figure.subplots(1, 2)
        for (design, found), colour in zip(self._by_design().items(), cycle(COLOURS)):
            depths = [each.depth for each in found]
            logs = [each.trained.logarithm for each in found]
            means = [10**log.value for log in logs]
            by_depth.plot(depths, means, "o-", color=colour, label=f"{design}, geometric mean")
            whole = [i for i, each in enumerate(found) if not each.trained.diverged and logs[i].half is not None]
            if whole:
                low, high = ([10 ** (logs[i].value + sign * (logs[i].half or 0)) for i in whole] for sign in (-1, 1))
                interval = f"{design}, 95 % interval of the logarithm"
                where = [depths[i] for i in whole]
                by_depth.fill_between(where, low, high, color=colour, alpha=0.15, lw=0, label=interval)
            gone = [depth for depth, each in zip(depths, found, strict=True) if each.trained.diverged]
            if gone:
                by_depth.plot(gone, [1.0] * len(gone), "x", color=colour, label=f"{design}, a seed diverged (at 1)")
            for index, run in enumerate(found[-1].trained.runs):
                label = f"{design}, depth {found[-1].depth}, each seed" if index == 0 else None
                curves.plot(range(1, len(run.losses) + 1), run.losses, color=colour, alpha=0.7, label=label)
        by_depth.set_yscale("log")
        curves.set_yscale("log")
        style(by_depth, "Training loss at the end", "depth in layers", "cross-entropy")
        style(curves, "Training loss by epoch, deepest networks", "epoch", "cross-entropy")

    def _by_design(self) -> dict[str, list[Depth]]:
        found: dict[str, list[Depth]] = {}
        for each in sorted(self.depths, key=lambda each: each.depth):
            found.setdefault(each.design, []).append(each)
        return dict(sorted(found.items()))


def degradation(
    data: Data,
    networks: Mapping[str, Callable[[int], nn.Module]] | None = None,
    depths: Sequence[int] = FULL.degradation_depths,
    recipe: Recipe = FULL.degradation,
    seeds: int = FULL.seeds,
    folder: Path | None = None,
    progress: bool = False,
) -> Degradation:
    """Train networks of several depths and return their training losses.

    Args:
        data: what to train on; load() gives it.
        networks: functions that make a network of a depth, by design. None: plain and resnet of fusedres.models.
        depths: in layers.
        recipe: how each is trained.
        seeds: how many networks of each.
        folder: for what a killed run has done, to go on there; None: nothing is kept.
        progress: show a progress bar on a terminal.

    Raises: AnalysisError: there are no networks or seeds, or another process works in the folder.
    """
    if networks is None:
        networks, data = NETWORKS, data.in_colour()
    designs = {f"{design} {depth}": (design, depth) for depth in depths for design in networks}
    makes = {name: partial(networks[design], depth) for name, (design, depth) in designs.items()}
    trained = train_variants(makes, data, recipe, seeds, folder, progress)
    return Degradation([Depth(*designs[variant.network], variant) for variant in trained])

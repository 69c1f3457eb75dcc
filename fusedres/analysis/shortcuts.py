"""What happens when the shortcuts are not identities: scaled, gated, convolved, dropped.

out = relu(F(x) + S(x)), with S(x) one of x; x/2; (1 − σ(W·x + b))⊙x with a 1x1 convolution and b = 0 or −6; a 1x1
convolution with BatchNorm; x with half of its elements dropped. Where the shape changes, all have the shortcut that
subsamples and pads.

Source: He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027, table 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.analysis.data import Data
from fusedres.analysis.results import Result
from fusedres.analysis.sizes import FULL
from fusedres.analysis.training import Recipe
from fusedres.analysis.variants import Variant, draw_variants, train_variants
from fusedres.models import CifarNetwork
from fusedres.modules import FusedBasicBlock, ZeroPadShortcut

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS_OF_A_BLOCK, _STAGES = 2, 3


class ScaledShortcut(nn.Module):
    """S(x) = factor·x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def extra_repr(self) -> str:
        """Return the settings that are no modules."""
        return f"factor={self.factor}"

    def forward(self, x: Tensor) -> Tensor:
        """Return S(x)."""
        return self.factor * x


class GatedShortcut(nn.Module):
    """S(x) = (1 − σ(W·x + b))⊙x with a 1x1 convolution W, whose bias b is gate_bias at the start."""

    def __init__(self, channels: int, gate_bias: float) -> None:
        super().__init__()
        self.gate = nn.Conv2d(channels, channels, 1)
        nn.init.constant_(self.gate.bias, gate_bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return S(x)."""
        return (1 - self.gate(x).sigmoid()) * x


class DroppedShortcut(nn.Module):
    """S(x) is x where a coin falls so, else 0, in training; x/2 in eval. Nothing makes up for what is dropped."""

    def forward(self, x: Tensor) -> Tensor:
        """Return S(x)."""
        return F.dropout(x, 0.5, self.training) / 2


def _convolved(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))


# From its channels, and the test error in % of ResNet-110 on CIFAR-10 in table 1 of the paper (None: it failed).
SHORTCUTS: dict[str, tuple[Callable[[int], nn.Module | None], float | None]] = {
    "identity": (lambda channels: None, 6.61),
    "x / 2": (lambda channels: ScaledShortcut(0.5), None),
    "gate, b = 0": (lambda channels: GatedShortcut(channels, 0.0), 12.86),
    "gate, b = −6": (lambda channels: GatedShortcut(channels, -6.0), 6.91),
    "1x1 convolution": (_convolved, 12.22),
    "dropout": (lambda channels: DroppedShortcut(), None),
}


def network(shortcut: Callable[[int], nn.Module | None], depth: int = FULL.shortcuts_depth) -> CifarNetwork:
    """Return a ResNet for CIFAR of this depth, 6n + 2, with a shortcut made from its channels (None: the identity)."""

    def make(inplanes: int, planes: int, stride: int) -> nn.Module:
        changes = stride != 1 or inplanes != planes
        return FusedBasicBlock(
            inplanes, planes, stride, ZeroPadShortcut(inplanes, planes, stride) if changes else shortcut(planes)
        )

    return CifarNetwork(make, (depth - 2) // (_LAYERS_OF_A_BLOCK * _STAGES))


@dataclass(frozen=True)
class Shortcuts(Result):
    """The training losses by shortcut, the lowest first."""

    name: ClassVar[str] = "shortcuts"
    title: ClassVar[str] = "Shortcuts: the identity against others"
    variants: list[Variant]

    def conclusion(self) -> str:
        """Return what the numbers say."""
        order = " < ".join(f"{variant.network} ({variant.said_loss})" for variant in self.variants)
        seeds = len(self.variants[0].runs)
        below = [
            sum(a < b for a, b in zip(first.losses, second.losses, strict=True))
            for first, second in pairwise(self.variants)
        ]
        text = f"Training loss in order, geometric mean over the seeds ({seeds}): {order}."
        if seeds > 1:
            text += f" Each is below the next in {', '.join(map(str, below))} of {seeds} seeds."
        errors = {
            variant.network: SHORTCUTS[variant.network][1] for variant in self.variants if variant.network in SHORTCUTS
        }
        if errors:
            known = "; ".join(
                f"{name}: {'failed' if error is None else f'{error} %'}" for name, error in errors.items()
            )
            text += f" Test errors of ResNet-110 on CIFAR-10 (He et al. 2016), in this order: {known}."
        return text

    def draw(self, figure: Figure) -> None:
        """Draw the training losses at the end and by epoch."""
        ends, curves = figure.subplots(1, 2)
        draw_variants(ends, curves, self.variants)


def shortcuts(
    data: Data,
    networks: Mapping[str, Callable[[], nn.Module]] | None = None,
    depth: int = FULL.shortcuts_depth,
    recipe: Recipe = FULL.shortcuts,
    seeds: int = FULL.seeds,
    folder: Path | None = None,
    progress: bool = False,
) -> Shortcuts:
    """Train networks that differ in their shortcuts and return their training losses, ordered.

    Args:
        data: what to train on; load() gives it.
        networks: functions that make a network, by shortcut. None: those of SHORTCUTS, with this depth.
        depth: in layers, 6n + 2.
        recipe: how each is trained.
        seeds: how many networks of each.
        folder: for what a killed run has done, to go on there; None: nothing is kept.
        progress: show a progress bar on a terminal.

    Raises: AnalysisError: there are no networks or seeds, or another process works in the folder.
    """
    if networks is None:
        data = data.in_colour()
        networks = {name: partial(network, make, depth) for name, (make, _) in SHORTCUTS.items()}
    trained = train_variants(networks, data, recipe, seeds, folder, progress)
    return Shortcuts(sorted(trained, key=lambda variant: variant.rank))

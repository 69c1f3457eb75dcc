"""How the gradient of the loss flows back through the blocks, over the shortcuts and through the branches.

With out = F(x) + S(x), dL/dx = S'ᵀ·dL/dout + F'ᵀ·dL/dout: the shortcut's part and the branch's part (after a ReLU, with
the gradient before it). Without shortcuts there is the branch's part alone, a product over all layers.

Source: He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027, equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusedres.analysis.data import Data
from fusedres.analysis.observing import Loss, Split, cross_entropy, observe
from fusedres.analysis.results import COLOURS, AnalysisError, Result, largest, mean, style
from fusedres.analysis.sizes import FULL
from fusedres.models import plain, preact_resnet, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "plain": plain,
    "residual": resnet,
    "pre-activation": preact_resnet,
}
_IMAGES = 32
_LAYERS_OF_A_BLOCK = 2
_TINY = 1e-300  # stands for the norm 0 in ratios and logarithms
# The norm of the gradient grows by √(π/(π − 1)) a layer of BatchNorm and ReLU without shortcuts, at initialisation.
# Source: Yang et al. 2019, A Mean Field Theory of Batch Normalization, https://arxiv.org/abs/1902.08129.
PLAIN_GROWTH = math.sqrt(math.pi / (math.pi - 1))


@dataclass(frozen=True)
class BlockGradient:
    """Norms of the gradient of a block's input, of its parts, and how far their sum is from autograd's.

    `difference` is the largest error of an element over the largest element.
    """

    name: str
    total: float
    shortcut: float
    branch: float
    difference: float


@dataclass(frozen=True)
class NetworkGradients:
    """The blocks of one network in order."""

    network: str
    depth: int | None
    seed: int | None
    blocks: list[BlockGradient]

    @property
    def growth(self) -> float:
        """The norm at the first block over that at the last."""
        return max(self.blocks[0].total, _TINY) / max(self.blocks[-1].total, _TINY)


@dataclass(frozen=True)
class GradientFlow(Result):
    """The gradients of networks."""

    name: ClassVar[str] = "gradient-flow"
    title: ClassVar[str] = "Gradient flow: what the shortcuts carry back"
    dtype: str
    networks: list[NetworkGradients]

    @property
    def difference(self) -> float:
        """The largest difference between the sum of the parts and autograd's gradient."""
        return largest([block.difference for network in self.networks for block in network.blocks])

    def conclusion(self) -> str:
        """Return what the numbers say."""
        parts = f"The shortcut's part and the branch's add up to autograd's gradient to {self.difference:.1e}."
        said = []
        for name, found in self._deepest().items():
            if not any(block.total for network in found for block in network.blocks):
                said.append(f"{name}: the gradient is 0 at every block; is the last layer's weight 0?")
                continue
            growth = mean([math.log10(network.growth) for network in found])
            blocks = found[0].blocks
            depth = "" if found[0].depth is None else f" of depth {found[0].depth}"
            layers = _LAYERS_OF_A_BLOCK * (len(blocks) - 1)
            a_layer = (
                ""
                if found[0].depth is None or name not in NETWORKS
                else f" ({10 ** (growth.value / max(1, layers)):.3f} a layer)"
            )
            text = (
                f"{name}{depth}: the norm at the first block is {10**growth.value:.3g} times that at the last{a_layer}"
            )
            if any(block.shortcut for block in blocks):
                every = [block for network in found for block in network.blocks if block.total]
                shortcut, branch = (
                    sum(getattr(block, part) / block.total for block in every) / max(1, len(every))
                    for part in ("shortcut", "branch")
                )
                text += (
                    f" (on average the shortcut's part has {shortcut:.2f} of the whole norm, the branch's {branch:.2f})"
                )
            said.append(text)
        if "plain" in self._deepest():
            said.append(f"mean-field theory of BatchNorm and ReLU without shortcuts has {PLAIN_GROWTH:.3f} a layer")
        text = "; ".join(said)
        return f"{text[0].upper()}{text[1:]}. {parts}"

    def draw(self, figure: Figure) -> None:
        """Draw the norms over the blocks, by depth; and the parts in the deepest networks."""
        by_depth, parts = figure.subplots(1, 2)
        names = list(dict.fromkeys(network.network for network in self.networks))
        depths = sorted({network.depth or 0 for network in self.networks})
        for name, colour in zip(names, cycle(COLOURS)):
            for depth in depths:
                found = [n for n in self.networks if n.network == name and (n.depth or 0) == depth]
                if found:
                    where, norms = _mean_norms(found)
                    label = name if depth == depths[-1] else None
                    alpha = 0.3 + 0.7 * (depths.index(depth) + 1) / len(depths)
                    by_depth.plot(where, [norm / norms[-1] for norm in norms], color=colour, label=label, alpha=alpha)
        by_depth.set_yscale("log")
        shown = "" if depths == [0] else f"\n(depths {', '.join(map(str, depths))}: the darker, the deeper)"
        title = f"‖dL/dx‖ over that at the last block{shown}"
        style(by_depth, title, "place of the block (0: first, 1: last)", "‖dL/dx‖ / ‖dL/dx‖ at the last")
        for (name, found), colour in zip(self._deepest().items(), cycle(COLOURS)):
            for part, line in (("shortcut", "-"), ("branch", ":")):
                rows = [[getattr(block, part) / max(block.total, _TINY) for block in each.blocks] for each in found]
                values = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
                if any(values):
                    where = [index / max(1, len(values) - 1) for index in range(len(values))]
                    parts.plot(where, values, line, color=colour, label=f"{name}: {part}")
        parts.set_ylim(bottom=0)
        title = "Norms of the parts over that of their sum\n(deepest networks, mean over seeds)"
        style(parts, title, "place of the block (0: first, 1: last)", "‖part‖ / ‖dL/dx‖")

    def _deepest(self) -> dict[str, list[NetworkGradients]]:
        """Return the deepest networks of each name, one a seed."""
        deepest: dict[str, list[NetworkGradients]] = {}
        for network in self.networks:
            known = deepest.setdefault(network.network, [])
            if known and (network.depth or 0) > (known[0].depth or 0):
                known.clear()
            if not known or network.depth == known[0].depth:
                known.append(network)
        return deepest


def gradient_flow(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss = cross_entropy, names: Sequence[str] | None = None
) -> GradientFlow:
    """Return the gradients at the blocks of a model, with the parts of the shortcut and of the branch.

    dL/dx is autograd's, through the model as it is, fused or not. The parts are computed block by block from dL/dout.

    Args:
        model: any model with residual blocks, in its mode; it stays as it was.
        images: (N, …), floating, in the model's dtype.
        labels: what loss takes, mostly (N,) in int64; loss(model(images), labels) is differentiated.
        names: of the modules that are the blocks; None: see residual_blocks.

    Raises: ValueError: there are no blocks, the loss does not depend on them, or they draw random numbers.
    """
    network = _gradients(model, images, labels, loss, names)
    return GradientFlow(str(images.dtype), [NetworkGradients(type(model).__name__, None, None, network)])


def gradient_flow_by_depth(
    data: Data,
    networks: Mapping[str, Callable[[int], nn.Module]] | None = None,
    depths: Sequence[int] = FULL.flow_depths,
    seeds: int = FULL.seeds,
    progress: bool = False,
) -> GradientFlow:
    """Return the gradients of new networks of several depths, in float64 and with the statistics of the batch.

    Args:
        data: gives the images.
        networks: functions that make a network of a depth, by name. None: plain, resnet and preact_resnet of
            fusedres.models.
        depths: in layers.
        seeds: how many networks of each.
        progress: show a progress bar on a terminal.

    Raises: AnalysisError: there are no networks, depths or seeds.
    """
    if networks is None:
        networks, data = NETWORKS, data.in_colour()
    if seeds < 1 or not networks or not depths:
        raise AnalysisError(
            f"gradient_flow: there must be networks, depths and seeds, got {len(networks)}, {len(depths)} and {seeds}"
        )
    images, labels = data.images[:_IMAGES].double(), data.labels[:_IMAGES]
    found = []
    with tqdm(total=len(networks) * len(depths) * seeds, unit="network", disable=None if progress else True) as bar:
        for depth in depths:
            for name, make in networks.items():
                for seed in range(seeds):
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(seed)
                        model = make(depth).double()
                    blocks = _gradients(model, images, labels, cross_entropy, None)
                    found.append(NetworkGradients(name, depth, seed, blocks))
                    bar.update()
    return GradientFlow("torch.float64", found)


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, names: Sequence[str] | None
) -> list[BlockGradient]:
    found = []
    for seen in observe(model, images, labels, loss, names):
        split = Split(seen)
        shortcut, branch = split.shortcut(seen.grad_output), split.branch(seen.grad_output)
        largest = seen.grad_x.abs().max().item()
        difference = (shortcut + branch - seen.grad_x).abs().max().item()
        norms = (seen.grad_x.norm().item(), shortcut.norm().item(), branch.norm().item())
        found.append(BlockGradient(seen.block.name, *norms, difference / largest if largest else difference))
    return found


def _mean_norms(networks: Sequence[NetworkGradients]) -> tuple[list[float], list[float]]:
    """Return places from 0 to 1, and the geometric means of the norms over networks of one depth."""
    count = len(networks[0].blocks)
    logs = [sum(math.log(max(network.blocks[index].total, _TINY)) for network in networks) for index in range(count)]
    return [index / max(1, count - 1) for index in range(count)], [math.exp(log / len(networks)) for log in logs]

"""Whether x_L = x_l + ΣF(x_i) holds along a chain of residual blocks, and what a skip inside a sigmoid does.

Where nothing acts after the add and the shortcuts are identities, the equation holds exactly, up to rounding. With a
ReLU after the add it does not: what it cuts off is missing from the sum.

A chain of x ← σ(w·x) has the derivative ∏ w·σ'. With the skip inside, σ(w·x + x), the weight is only w + 1, and each
factor is still at most (w + 1)/4: it vanishes. With the skip around the sigmoid, x + σ(w·x), each is 1 + w·σ'.

Source: He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027, equation 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fusedres.analysis.blocks import copy_of
from fusedres.analysis.data import Data
from fusedres.analysis.observing import Call, check_images, run_observed, undisturbed
from fusedres.analysis.results import COLOURS, AnalysisError, Result, largest, style
from fusedres.analysis.sizes import FULL
from fusedres.models import preact_resnet, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS: dict[str, Callable[[int], nn.Module]] = {"pre-activation": preact_resnet, "ReLU after the add": resnet}
_IMAGES = 32
_DTYPES = (torch.float64, torch.float32)
SKIPS = ("none", "inside", "around")
_CHAIN = 50
_SMALLEST = 1e-17  # an error of 0 is drawn here


@dataclass(frozen=True)
class Chain:
    """A row of blocks with identity shortcuts, each of which reads the output of the one before.

    `errors` has for each block l the largest |x_L − (x_l + ΣF)| of an element, over the largest |x_L|.
    """

    network: str
    dtype: str
    blocks: list[str]
    errors: list[float]


@dataclass(frozen=True)
class SigmoidChain:
    """The derivative of a chain of sigmoids after each of its layers, and its bound; skip: one of SKIPS.

    `bounds` are ((w + 1)/4)^L or (w/4)^L, from above; around the sigmoid 1, from below. `difference` is the largest
    relative one between autograd's derivatives and the products of the layers' derivatives in closed form.
    """

    skip: str
    weight: float
    derivatives: list[float]
    bounds: list[float]
    difference: float


@dataclass(frozen=True)
class Unrolling(Result):
    """The chains of networks, and chains of sigmoids."""

    name: ClassVar[str] = "unrolling"
    title: ClassVar[str] = "Unrolling: x_L = x_l + ΣF"
    chains: list[Chain]
    sigmoids: list[SigmoidChain]

    def conclusion(self) -> str:
        """Return what the numbers say."""
        worst: dict[tuple[str, str], float] = {}
        for chain in self.chains:
            key = chain.network, chain.dtype
            worst[key] = largest([worst.get(key, 0.0), *chain.errors])
        said = [
            f"{network} in {dtype.removeprefix('torch.')} by {error:.2g}" for (network, dtype), error in worst.items()
        ]
        text = f"x_L differs from x_l + ΣF, relative to the largest x_L: {', '.join(said)}."
        if self.sigmoids:
            ends = {chain.skip: chain.derivatives[-1] for chain in self.sigmoids}
            layers, weight = len(self.sigmoids[0].derivatives), self.sigmoids[0].weight
            text += (
                f" Through {layers} sigmoids with w = {weight:g} the derivative is {ends['none']:.2g} without a skip, "
                f"{ends['inside']:.2g} with it inside (w + 1), {ends['around']:.3g} with it around the sigmoid."
            )
        return text

    def draw(self, figure: Figure) -> None:
        """Draw the errors along the chains, and the derivatives of the sigmoids."""
        errors, *others = figure.subplots(1, 2 if self.sigmoids else 1, squeeze=False)[0]
        keys = list(dict.fromkeys((chain.network, chain.dtype) for chain in self.chains))
        for key, colour in zip(keys, cycle(COLOURS)):
            for index, chain in enumerate(c for c in self.chains if (c.network, c.dtype) == key):
                values = [max(error, _SMALLEST) for error in chain.errors]
                label = f"{key[0]}, {key[1].removeprefix('torch.')}" if index == 0 else None
                left = range(len(values), 0, -1)
                line = "--" if key[1] == "torch.float32" else "-"
                errors.plot(
                    left, values, line, marker="o", ms=3, color=colour, label=label, alpha=1 / (1 + 0.4 * index)
                )
        errors.set_yscale("log")
        title = "Error of x_L = x_l + ΣF, over the largest x_L\n(fainter: later chains)"
        style(errors, title, "blocks from l to L", "largest error", (0.62, 0.22))
        for axis in others:
            for sigmoid, colour in zip(self.sigmoids, cycle(COLOURS)):
                layers = range(1, len(sigmoid.derivatives) + 1)
                axis.plot(layers, sigmoid.derivatives, color=colour, label=f"skip: {sigmoid.skip}")
                axis.plot(layers, sigmoid.bounds, ":", color=colour, label=f"bound: {sigmoid.skip}")
            axis.set_yscale("log")
            title = f"Derivative through sigmoids, w = {self.sigmoids[0].weight:g}"
            style(axis, title, "layers", "dx_L / dx_0")


def unrolling(model: nn.Module, images: Tensor, names: Sequence[str] | None = None) -> Unrolling:
    """Return how far x_L is from x_l + ΣF along every chain of blocks with identity shortcuts of a model.

    Args:
        model: any model with residual blocks, fused or not, in its mode; it stays as it was.
        images: (N, …), floating, in the model's dtype.
        names: of the modules that are the blocks; None: see residual_blocks.

    Raises: ValueError: there are no blocks, none has an identity shortcut, or they draw random numbers.
    """
    return Unrolling(_chains(type(model).__name__, model, images, names), [])


def unrolling_of_designs(
    data: Data,
    networks: Mapping[str, Callable[[int], nn.Module]] | None = None,
    depth: int = FULL.unrolling_depth,
    weight: float = 1.0,
    seed: int = 0,
) -> Unrolling:
    """Return the chains of new networks in float64 and float32, and those of sigmoids with this weight.

    Args:
        data: gives the images.
        networks: functions that make a network of a depth, by name. None: preact_resnet and resnet of fusedres.models.
    """
    if networks is None:
        networks, data = NETWORKS, data.in_colour()
    found = []
    for dtype in _DTYPES:
        for name, make in networks.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = make(depth).to(dtype)
            found += _chains(name, model, data.images[:_IMAGES].to(dtype), None)
    return Unrolling(found, [sigmoid_chain(skip, weight) for skip in SKIPS])


def sigmoid_chain(skip: str, weight: float = 1.0, layers: int = _CHAIN, start: float = 0.5) -> SigmoidChain:
    """Return the derivatives of a chain of sigmoids in float64; skip: "none", "inside" or "around".

    Args:
        start: x_0.

    Raises: ValueError: skip is none of these.
    """
    if skip not in SKIPS:
        raise ValueError(f"sigmoid_chain: skip must be one of {', '.join(SKIPS)}, got {skip!r}")
    first = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    x, product, difference = first, 1.0, 0.0
    derivatives: list[float] = []
    inner = weight + 1 if skip == "inside" else weight
    for _ in range(layers):
        value = torch.sigmoid(inner * x)
        slope = (inner * value * (1 - value)).item()
        product *= 1 + slope if skip == "around" else slope
        x = x + value if skip == "around" else value
        derivatives.append(torch.autograd.grad(x, first, retain_graph=True)[0].item())
        difference = max(difference, abs(derivatives[-1] - product) / abs(product))
    bound = 1.0 if skip == "around" else inner / 4
    return SigmoidChain(skip, weight, derivatives, [bound**layer for layer in range(1, layers + 1)], difference)


def _chains(network: str, model: nn.Module, images: Tensor, names: Sequence[str] | None) -> list[Chain]:
    check_images(images)
    with undisturbed(), torch.no_grad():
        _, calls = run_observed(copy_of(model), images, names)
    rows: list[list[Call]] = []
    for call in calls:
        if not call.block.is_identity:
            continue
        if rows and torch.equal(rows[-1][-1].output, call.x):
            rows[-1].append(call)
        else:
            rows.append([call])
    if not rows:
        raise AnalysisError(f"unrolling: {network} must have blocks whose shortcut is the identity, got none")
    return [_chain(network, row) for row in rows]


@torch.no_grad()
def _chain(network: str, calls: Sequence[Call]) -> Chain:
    end = calls[-1].output
    total, errors = torch.zeros_like(end), []
    for call in reversed(calls):
        total = total + call.block.branch(call.x).reshape_as(call.x)  # a branch may add in another shape
        errors.append(((call.x + total - end).abs().max() / end.abs().max()).item())
    return Chain(network, str(end.dtype), [call.block.name for call in calls], errors[::-1])

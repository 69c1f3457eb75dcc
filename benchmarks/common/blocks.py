"""The measured modules: each distinct residual block of ResNet-18 and ResNet-50 by its name, and the stem."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common.designs import DESIGNS, TINY_DESIGNS, Design
from common.networks import Block, Stem, resnet_blocks

Measured = Block | Stem | Design
# The blocks of a run without options: both kinds of blocks, where memory traffic counts most, and both shortcuts.
DEFAULT = (
    "resnet18.layer1.0",
    "resnet18.layer2.0",
    "resnet50.layer1.0",
    "resnet50.layer1.1",
    "resnet50.layer2.1",
    "stem",
)
STEM = {"stem": Stem()}
# Small enough for any machine: they show that everything runs, and are not for measuring.
TINY: dict[str, Block | Stem] = {
    "tiny.basic": Block("basic", 8, 8, 8),
    "tiny.basic.projection": Block("basic", 8, 16, 8, 2, "projection"),
    "tiny.basic.zero_pad": Block("basic", 8, 16, 8, 2, "zero_pad"),
    "tiny.bottleneck": Block("bottleneck", 32, 8, 8),
    "tiny.bottleneck.projection": Block("bottleneck", 16, 8, 8, 2, "projection"),
    "tiny.stem": Stem(16),
}


def stage_blocks() -> dict[str, Block]:
    """Return each distinct block shape of ResNet-18 and ResNet-50 at 224², by the name of its first block."""
    found: dict[str, Block] = {}
    for depth in (18, 50):
        for name, block in resnet_blocks(depth).items():
            if block not in found.values():
                found[f"resnet{depth}.{name}"] = block
    return found


def select(patterns: list[str]) -> dict[str, Measured]:
    """Return the blocks with a name that matches a pattern (`*`, `?`).

    Groups are `all` blocks of ResNets, `default`, `designs` (the other blocks of the residual family), and `tiny`.
    """
    real: dict[str, Block | Stem] = stage_blocks() | STEM
    known: dict[str, Measured] = {**real, **TINY, **DESIGNS, **TINY_DESIGNS}
    groups = {"all": list(real), "default": list(DEFAULT), "designs": list(DESIGNS), "tiny": list(TINY)}
    chosen: dict[str, Measured] = {}
    for pattern in patterns:
        names = groups.get(pattern) or [n for n in known if fnmatchcase(n, pattern)]
        if not names:
            raise ValueError(f"no block is called {pattern!r}; known: {', '.join([*groups, *known])}")
        chosen |= {n: known[n] for n in names}
    return chosen


class StemOnly(nn.Module):
    """The stem of a ResNet, which `fusedres.fuse` fuses in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def conv1(self) -> nn.Module:
        return self.model.conv1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model = self.model
        out = model.fused_stem(x) if hasattr(model, "fused_stem") else None
        return model.maxpool(model.relu(model.bn1(model.conv1(x)))) if out is None else out


def make_block(block: Measured, seed: int = 0) -> nn.Module:
    """Return a block of plain torch, with random weights, BatchNorm parameters and running statistics."""
    if isinstance(block, Stem):
        return _make_stem(seed)
    if isinstance(block, Design):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _initialised(block.eager())
    kind = BasicBlock if block.kind == "basic" else Bottleneck
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shortcut: nn.Module | None = None
        if block.shortcut == "projection":
            shortcut = nn.Sequential(
                nn.Conv2d(block.in_channels, block.out_channels, 1, block.stride, bias=False),
                nn.BatchNorm2d(block.out_channels),
            )
        elif block.shortcut == "zero_pad":
            from fusedres import ZeroPadShortcut

            shortcut = ZeroPadShortcut(block.in_channels, block.out_channels, block.stride)
        return _initialised(kind(block.in_channels, block.planes, block.stride, shortcut))


def _initialised(module: nn.Module) -> nn.Module:
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.0, 0.2)
            nn.init.normal_(m.running_mean, 0.0, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return module


def _make_stem(seed: int) -> nn.Module:
    """Return a stem with weights -1, 0, 1, so that it is exact in every dtype with images of `make_input`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(BasicBlock, [1, 1, 1, 1])
        for name in ("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
            setattr(model, name, nn.Identity())
        _initialised(model)
        with torch.no_grad():
            model.conv1.weight.copy_(torch.randint(-1, 2, model.conv1.weight.shape))
    return StemOnly(model)


def make_input(block: Measured, batch: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return an input as the block gets it in a model: the output of a ReLU; for a stem, images of small integers."""
    source = torch.Generator(device).manual_seed(1)
    size = (batch, block.in_channels, block.size, block.size)
    if isinstance(block, Stem):
        x = torch.randint(-2, 3, size, generator=source, device=device).to(dtype)
    else:
        x = torch.randn(size, generator=source, device=device).to(dtype).relu()
    return x.to(memory_format=torch.channels_last)


class ConvolutionsOnly:
    """The convolutions of a block alone, each with its own input: the bound for any fusion around them."""

    def __init__(self, module: nn.Module, block: Measured, batch: int, x: torch.Tensor) -> None:
        projection = "downsample.0" if block.shortcut == "projection" else ""
        self.parts = []
        for c in block.convolutions:
            conv = copy.deepcopy(module.get_submodule(projection if c.name == "projection" else c.name))
            source = self._fresh(batch, c.in_channels, c.in_size, x).requires_grad_(not isinstance(block, Stem))
            grad = self._fresh(batch, c.out_channels, c.out_size, x)
            self.parts.append((conv, source, grad))

    @staticmethod
    def _fresh(batch: int, channels: int, size: int, like: torch.Tensor) -> torch.Tensor:
        made = torch.randn(batch, channels, size, size, device=like.device).to(like.dtype)
        return made.to(memory_format=torch.channels_last)

    def train(self) -> None:
        """Run each forward and backward."""
        for conv, source, grad in self.parts:
            conv(source).backward(grad)

    def infer(self) -> list[torch.Tensor]:
        """Run each forward and return the outputs."""
        return [conv(source) for conv, source, _ in self.parts]

    def cleanup(self) -> None:
        """Drop the gradients."""
        for conv, source, _ in self.parts:
            source.grad = conv.weight.grad = None

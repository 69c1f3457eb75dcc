"""Block classes of other packages, and of users, that fuse() may fuse where their forward is a residual block's.

No other package is imported: a class is known by its full name. tracing.py reads each block.
"""

from __future__ import annotations

import re
from typing import TypeVar

from torch import nn

from fusedres.modules.frozen_norm import recognise_frozen_norms
from fusedres.modules.gathering import gather_parts
from fusedres.modules.parts import Parts, path_of, stock_of
from fusedres.modules.stem_tracing import stem_of
from fusedres.modules.tail_reading import tails_of
from fusedres.modules.tracing import parts_of

_Block = TypeVar("_Block", bound="type[nn.Module] | nn.Module")

_PACKAGES = {
    "timm.models.resnet": ("BasicBlock", "Bottleneck"),
    "torchvision.models.regnet": ("ResBottleneckBlock",),
    "transformers.models.resnet.modeling_resnet": ("ResNetBasicLayer", "ResNetBottleNeckLayer"),
    "transformers.models.rt_detr.modeling_rt_detr_resnet": ("RTDetrResNetBasicLayer", "RTDetrResNetBottleNeckLayer"),
    "mmdet.models.backbones.resnet": ("BasicBlock", "Bottleneck"),
    "mmpretrain.models.backbones.resnet": ("BasicBlock", "Bottleneck"),
    "mmseg.models.backbones.resnet": ("BasicBlock", "Bottleneck"),
    "mmpose.models.backbones.resnet": ("BasicBlock", "Bottleneck"),
    "mmaction.models.backbones.resnet": ("BasicBlock", "Bottleneck"),
    "wespeaker.models.resnet": ("BasicBlock", "Bottleneck"),
    "segmentation_models_pytorch.encoders._senet": ("Bottleneck",),
}
_known = {f"{module}.{name}" for module, names in _PACKAGES.items() for name in names}
# Blocks that are convolutions and tails: BatchNorm, activation, sum (tail_reading.py).
_WITH_TAILS = {
    "ultralytics.nn.modules.conv.Conv",
    "ultralytics.nn.modules.conv.Conv2",
    "ultralytics.nn.modules.block.Bottleneck",
}
_registered: set[type[nn.Module]] = set()


def register(block: _Block) -> _Block:
    """Declare that fuse() may fuse blocks of a class of yours, wherever their forward computes a residual block.

    out = relu(F(x) + S(x)), where F is two or three convolutions, each followed by BatchNorm, with a ReLU between any
    two, and S is the identity, a convolution with BatchNorm, or a ZeroPadShortcut. Of any other row of modules and sums
    that has BatchNorms, each BatchNorm is fused with the activation and the sum that follow it (their tail). The names
    of the modules, and whether ReLU is a module or a function, do not matter. fuse() reads the forward of each block; a
    block that computes something else stays as it is, and report() says what does not fit.

    Args:
        block: the class; or a block of that class, which is checked at once. Usable as a decorator of a class.

    Returns:
        block itself.

    Raises:
        TypeError: block is neither a module nor a class of modules.
        ValueError: the block is no such block; the message says which step of its forward does not fit.
    """
    cls = block if isinstance(block, type) else type(block)
    if not issubclass(cls, nn.Module):
        raise TypeError(f"register: block must be a torch.nn.Module or a class of them, got {cls.__name__}")
    if isinstance(block, nn.Module):
        parts = read(block)
        if isinstance(parts, str):
            raise ValueError(
                f"register: {path_of(cls)} must compute relu(branch + shortcut), or have tails, got: {parts}"
            )
    _registered.add(cls)
    return block


def is_declared(cls: type[nn.Module]) -> bool:
    """Whether the class whose forward a class has is known or registered, or the class itself is registered."""
    if cls in _registered:
        return True
    owner = _owner(cls)
    return owner in _registered or path_of(owner) in _known or path_of(owner) in _WITH_TAILS


def _owner(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that defines the forward of a class."""
    return next(base for base in cls.__mro__ if "forward" in base.__dict__)


# Names that residual blocks have, and names of the modules in their shortcuts.
_BLOCK_NAME = re.compile(r"block|basic|bottle\w?neck|residual|res\w*(unit|layer)$", re.IGNORECASE)
_SHORTCUT_NAMES = frozenset(("downsample", "shortcut", "skip", "skip_connection", "identity_conv", "residual_conv"))
_FEW_CONVOLUTIONS = range(2, 9)


def looks_residual(module: nn.Module) -> bool:
    """Whether a module of an unknown class has the looks of a residual block: some convolutions, and a name for it."""
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        return False
    named = _BLOCK_NAME.search(type(module).__name__) is not None
    if not named and _SHORTCUT_NAMES.isdisjoint(module._modules):
        return False
    return sum(isinstance(child, nn.modules.conv._ConvNd) for child in module.modules()) in _FEW_CONVOLUTIONS


def why_unknown(block: nn.Module) -> str:
    """Return why a residual-looking block of a class that nobody declared is not fused."""
    parts = read(block)
    gathered = parts if isinstance(parts, str) or parts.steps else gather_parts(block, parts)
    if isinstance(gathered, str):
        return gathered
    return f"its class is not known; fusedres.register({path_of(type(block))}) lets fuse() switch it"


_NETWORKS = {
    "segmentation_models_pytorch.encoders.resnet.ResNetEncoder",
    "timm.models.hrnet.HighResolutionNet",
    "timm.models.resnet.ResNet",
    "torchvision.models._utils.IntermediateLayerGetter",
    "transformers.models.resnet.modeling_resnet.ResNetEmbeddings",
}
_STEM = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.ReLU, nn.MaxPool2d)


def has_stem(network: nn.Module) -> bool:
    """Whether a module is a network whose stem may be fused, or a Sequential that begins with one.

    The stem of a torchvision ResNet with its own forward is not meant.
    """
    cls: type[nn.Module] = getattr(type(network), "_stock", type(network))
    children = list(network._modules.values())
    if cls is nn.Sequential:
        return len(children) > len(_STEM) and all(map(isinstance, children, _STEM))
    return path_of(_owner(cls)) in _NETWORKS and bool(children) and any(network.children())


def read_network(network: nn.Module) -> Parts | str:
    """Return the parts of the stem that a network begins with, or why it cannot be fused."""
    recognise_frozen_norms(network)
    stock = getattr(type(network), "_stock", type(network))  # the class of a fused network
    return stem_of(network, stock.forward)


def read(block: nn.Module) -> Parts | str:
    """Return the parts of a block of a declared class, or why no fused block computes the same.

    A residual block has units. Another block has steps if it may be one of tails: not if its class is known for
    residual blocks.
    """
    stock = stock_of(type(block))
    known = path_of(_owner(stock))
    if known in _WITH_TAILS:
        return read_tails(block)
    parts = read_units(block)
    if isinstance(parts, str) and known not in _known:
        tails = read_tails(block)
        return parts if isinstance(tails, str) else tails
    return parts


def read_units(block: nn.Module) -> Parts | str:
    """Return the parts of a residual block, or why it is none."""
    recognise_frozen_norms(block)
    return parts_of(block, stock_of(type(block)).forward)


def read_tails(block: nn.Module) -> Parts | str:
    """Return the parts of a block with tails, or why it has none that can be fused."""
    return tails_of(block, stock_of(type(block)).forward)

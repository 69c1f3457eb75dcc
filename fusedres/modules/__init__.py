"""Drop-in modules with the constructors, child names and state_dict keys of the blocks that they replace."""

from fusedres.modules.basic_block import FusedBasicBlock
from fusedres.modules.bottleneck import FusedBottleneck, ResNeXtBottleneck
from fusedres.modules.families import register
from fusedres.modules.fused_block import FusedBlock
from fusedres.modules.highway import Highway, HighwayConv2d, HighwayLinear
from fusedres.modules.norm_act_conv import NormActConv
from fusedres.modules.postactivation import PlainBlock, SEBasicBlock, SEBottleneck
from fusedres.modules.preactivation import PreActBasicBlock, PreActBottleneck, PreActSequential, WideBlock
from fusedres.modules.resnet import FusedResNet, FusedStem
from fusedres.modules.scaled_residual import LayerScale, ReZero, SkipInit, StochasticDepth
from fusedres.modules.shortcut import AvgPoolShortcut, ZeroPadShortcut
from fusedres.modules.tail import ResidualTail

__all__ = [
    "AvgPoolShortcut",
    "FusedBasicBlock",
    "FusedBlock",
    "FusedBottleneck",
    "FusedResNet",
    "FusedStem",
    "Highway",
    "HighwayConv2d",
    "HighwayLinear",
    "LayerScale",
    "NormActConv",
    "PlainBlock",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActSequential",
    "ReZero",
    "ResNeXtBottleneck",
    "ResidualTail",
    "SEBasicBlock",
    "SEBottleneck",
    "SkipInit",
    "StochasticDepth",
    "WideBlock",
    "ZeroPadShortcut",
    "register",
]

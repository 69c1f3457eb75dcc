"""Drop-in modules with the constructors, child names and state_dict keys of the blocks that they replace."""

from fusedres.modules.basic_block import FusedBasicBlock
from fusedres.modules.bottleneck import FusedBottleneck
from fusedres.modules.families import register
from fusedres.modules.fused_block import FusedBlock
from fusedres.modules.highway import Highway, HighwayConv2d, HighwayLinear
from fusedres.modules.norm_act_conv import NormActConv
from fusedres.modules.postactivation import SEBasicBlock, SEBottleneck
from fusedres.modules.preactivation import PreActBasicBlock, PreActBottleneck
from fusedres.modules.resnet import FusedResNet, FusedStem
from fusedres.modules.shortcut import ZeroPadShortcut
from fusedres.modules.tail import ResidualTail

__all__ = [
    "FusedBasicBlock",
    "FusedBlock",
    "FusedBottleneck",
    "FusedResNet",
    "FusedStem",
    "Highway",
    "HighwayConv2d",
    "HighwayLinear",
    "NormActConv",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ResidualTail",
    "SEBasicBlock",
    "SEBottleneck",
    "ZeroPadShortcut",
    "register",
]

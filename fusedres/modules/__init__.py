"""Drop-in modules with torchvision's constructors, child names and state_dict keys."""

from fusedres.modules.basic_block import FusedBasicBlock
from fusedres.modules.bottleneck import FusedBottleneck
from fusedres.modules.fused_block import FusedBlock
from fusedres.modules.resnet import FusedResNet, FusedStem
from fusedres.modules.shortcut import ZeroPadShortcut

__all__ = ["FusedBasicBlock", "FusedBlock", "FusedBottleneck", "FusedResNet", "FusedStem", "ZeroPadShortcut"]

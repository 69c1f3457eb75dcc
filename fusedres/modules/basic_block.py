"""torchvision's BasicBlock, fused."""

from __future__ import annotations

from torchvision.models.resnet import BasicBlock

from fusedres.modules.fused_block import FusedBlock
from fusedres.modules.parts import Parts, UnitPaths


class FusedBasicBlock(FusedBlock, BasicBlock):
    """torchvision's BasicBlock with its passes fused: same constructor, children, state_dict and results.

    out = relu(BN2(conv2(relu(BN1(conv1(x))))) + S(x)). The shortcut S is the identity, `downsample` = 1x1 convolution +
    BatchNorm, or a ZeroPadShortcut (He et al. 2015, figure 2).

    Shape:
        x (N, inplanes, H, W), float32, float64, bfloat16 or float16 → (N, planes, ceil(H / stride),
        ceil(W / stride)) in x's memory format; channels_last is the fast one.

    Saved for backward: x, both raw convolution outputs (and the projection's, except with memory="min"), and one bit
    per element. BatchNorm's running statistics are updated as in torch. If any part is not plain (`unfused_reason()`),
    the block runs torchvision's forward.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device; nothing is updated then.
    """

    _stock = BasicBlock
    _base = BasicBlock
    _parts = Parts((UnitPaths("conv1", "bn1"), UnitPaths("conv2", "bn2")), ("relu",), downsample="downsample").named()

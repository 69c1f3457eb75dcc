"""torchvision's ResNet with its stem fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from fusedres.autograd import ConvBN, StemPlan, count_path, run_stem
from fusedres.backends import backend_for
from fusedres.dispatch import measured
from fusedres.modules.anatomy import unusual_stem
from fusedres.modules.choice import measured_way, own_products
from fusedres.modules.fused_block import add_unit, convolution_dtype, is_plain, without_kernels


class FusedStem(nn.Module):
    """Mixin in front of a model with the children conv1, bn1, relu and maxpool of a ResNet: runs them fused.

    Everything is read from the children at each call.
    """

    fused_conv: str = "auto"
    fused_memory: str = "auto"  # a stem has one way of it; "min" keeps a table from leaving it unfused

    def stem_unfused_reason(self) -> str | None:
        """Why the stem runs unfused on its parameters' device, or None where it is fused."""
        return unusual_stem(self) or without_kernels(self.__dict__["_modules"]["conv1"].weight)

    def _stem(self, x: Tensor) -> Tensor | None:
        """maxpool(relu(bn1(conv1(x)))) where it can run fused, else None."""
        if not is_plain(x) or unusual_stem(self) is not None:
            return None
        device = x.device
        backend, way = backend_for(device), None
        if backend is None or (x.dim() == 4 and x.shape[0] == 0):
            return None
        if measured(device) and x.dim() == 4:
            way = measured_way(self, ("conv1",), x, backend, self.fused_conv, self.fused_memory)
            if way is not None:
                backend = way.backend
                if backend is None:
                    return None
        op = type(self).__name__
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        dtype = convolution_dtype(op, x, autocast)
        modules = self.__dict__["_modules"]
        units: list[ConvBN] = []
        tensors: list[Tensor | None] = []
        shape = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        conv, norm = modules["conv1"], modules["bn1"]
        own = own_products(self.fused_conv, backend, conv, way)
        add_unit(op, "conv1", conv, "bn1", norm, x, dtype, autocast, shape, units, tensors, own)
        return run_stem(x, StemPlan(units[0], dtype, backend), tuple(tensors))


class FusedResNet(FusedStem, ResNet):
    """torchvision's ResNet with its stem fused: same constructor, children, state_dict and numbers.

    BatchNorm, ReLU and the 3x3 max-pool behind the convolution are one pass each way; fused_conv says, as fuse()'s
    conv, whose convolution runs: with this package's own the statistics come with it, and no gradient of its output is
    stored unless the images need one. The layers run as they are: fusedres.fuse switches their blocks, or build it from
    FusedBasicBlock or FusedBottleneck.

    Saved for backward by the stem: its input, the raw convolution output, and one byte an element of the pooled output.
    Any part that is not plain (`stem_unfused_reason()`: CIFAR's Identity for maxpool, SyncBatchNorm, a hook) makes the
    whole forward torchvision's.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels or shape, dtype, or device; nothing is updated then.
    """

    def _forward_impl(self, x: Tensor) -> Tensor:
        pooled = self._stem(x)
        if pooled is None:
            count_path("stem_unfused")
            result: Tensor = super()._forward_impl(x)
            return result
        model: Any = self
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            pooled = layer(pooled)
        scores: Tensor = model.fc(torch.flatten(model.avgpool(pooled), 1))
        return scores

"""torchvision's ResNet with its stem fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from fusedres.autograd import count_path, run_stem, wants_gradients
from fusedres.modules.anatomy import Anatomy, Parts, anatomy_of, gather
from fusedres.modules.calls import (
    holds_inference_tensors,
    input_of_call,
    keep_reason,
    options_of,
    reason_of_shapes,
    unusual_input,
    without_kernels,
)
from fusedres.modules.choice import serving_backend
from fusedres.modules.reading import read_stem


class FusedStem(nn.Module):
    """Mixin in front of a model with the children conv1, bn1, relu and maxpool of a ResNet: runs them fused.

    Everything is read from the children once at each call.
    """

    fused_conv: str = "auto"  # as fuse()'s, which makes "fused" "measured": this package's where that was faster
    fused_memory: str = "auto"  # a stem has one way of it; "min" keeps a table from leaving it unfused
    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _stock: type[nn.Module] = nn.Module  # the class of the forward that runs unfused
    _parts: Parts = Parts.of(None, (("conv1", "bn1"),), "relu", "maxpool")

    def anatomy(self) -> Anatomy | str:
        """The stem's parts, or why it runs unfused whatever the input."""
        gathered = gather(self, type(self), self._parts)
        return gathered if isinstance(gathered, str) else anatomy_of(gathered, self._parts)

    def stem_unfused_reason(self) -> str | None:
        """Why the stem runs unfused on its parameters' device, or None where it is fused."""
        anatomy = self.anatomy()
        if isinstance(anatomy, str):
            return anatomy
        options = options_of(self)
        without = without_kernels(anatomy.units[0].conv_weight, options.conv, options.memory)
        return without or reason_of_shapes(type(self).__name__, anatomy)

    def fused_stem(self, x: Tensor) -> Tensor | None:
        """maxpool(relu(bn1(conv1(x)))) where it can run fused, else None."""
        return run_fused_stem(type(self), self, x)


def run_fused_stem(cls: Any, model: nn.Module, x: Tensor) -> Tensor | None:
    """maxpool(relu(bn1(conv1(x)))) of a module of the class cls, a FusedStem, where it can run fused, else None."""
    options = options_of(model)
    reason = unusual_input(x)
    gathered = reason or gather(model, cls, cls._parts)
    anatomy = gathered if isinstance(gathered, str) else anatomy_of(gathered, cls._parts)
    if isinstance(anatomy, str):
        keep_reason(model, reason)
        return None
    backend = serving_backend(x.device, options.conv, options.memory)
    given = input_of_call(cls.__name__, x, anatomy, backend, options)
    if isinstance(given, str):
        keep_reason(model, given)
        return None
    plan, tensors = read_stem(given, anatomy)
    recorded = wants_gradients(x, tensors)
    if holds_inference_tensors(x, tensors, recorded or plan.unit.update):
        keep_reason(model, "a tensor was made in inference mode")
        return None
    keep_reason(model, "")
    return run_stem(x, plan, tensors, recorded)


class FusedResNet(FusedStem, ResNet):
    """torchvision's ResNet with its stem fused: same constructor, children, state_dict and numbers.

    BatchNorm, ReLU and the 3x3 max-pool behind the convolution are one pass each way. The convolution is the library's
    unless this package's was measured faster, or fused_conv is set to "fused": the statistics come with it then, and no
    gradient of its output is stored unless the images need one. The layers run as they are: fusedres.fuse switches
    their blocks, or build it from FusedBasicBlock or FusedBottleneck.

    Saved for backward by the stem: its input, the raw convolution output, and one byte an element of the pooled output.
    Any part that is not plain (`stem_unfused_reason()`: CIFAR's Identity for maxpool, SyncBatchNorm, a hook) makes the
    whole forward torchvision's.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels or shape, dtype, or device; nothing is updated then.
    """

    _stock = ResNet
    _parts = Parts.of(ResNet, (("conv1", "bn1"),), "relu", "maxpool")

    def _forward_impl(self, x: Tensor) -> Tensor:
        cls: Any = type(self)
        fused = issubclass(cls, FusedResNet)  # else unfuse() in another thread came between
        pooled = run_fused_stem(cls, self, x) if fused else None
        if pooled is None:
            count_path("stem_unfused")
            result: Tensor = (cls._stock if fused else cls)._forward_impl(self, x)
            return result
        model: Any = self
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            pooled = layer(pooled)
        scores: Tensor = model.fc(torch.flatten(model.avgpool(pooled), 1))
        return scores

"""torchvision's ResNet with its stem fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from fusedres.autograd import count_path, run_stem, wants_gradients
from fusedres.modules.anatomy import Anatomy, anatomy_of
from fusedres.modules.calls import (
    holds_inference_tensors,
    input_of_call,
    keep_reason,
    options_of,
    reason_of_parts,
    unusual_input,
)
from fusedres.modules.choice import serving_backend
from fusedres.modules.gathering import gather
from fusedres.modules.parts import Parts, UnitPaths
from fusedres.modules.reading import read_stem
from fusedres.modules.scripting import Scriptable


class FusedStem(Scriptable):
    """Mixin that runs conv1, bn1, relu and maxpool of a ResNet fused; it comes before the model's class in the bases.

    Everything is read from the children once per call.
    """

    # As in fuse(), which turns "fused" into "measured": this package's convolution if it was measured faster.
    fused_conv: str = "auto"
    fused_memory: str = "auto"  # changes nothing in a stem, but with "min" a table cannot leave it unfused
    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _stock: type[nn.Module] = nn.Module  # the class with the unfused forward
    _base: type[nn.Module] | None = None
    _parts: Parts = Parts((UnitPaths("conv1", "bn1"),), ("relu",), "maxpool").named()

    def anatomy(self) -> Anatomy | str:
        """Return the stem's parts, or why it runs unfused for every input."""
        gathered = gather(self, type(self), self._parts)
        return gathered if isinstance(gathered, str) else anatomy_of(gathered)

    def stem_unfused_reason(self) -> str | None:
        """Return why the stem runs unfused on its parameters' device, or None if it is fused."""
        return reason_of_parts(type(self).__name__, self.anatomy(), options_of(self))

    def fused_stem(self, x: Tensor) -> Tensor | None:
        """Return maxpool(relu(bn1(conv1(x)))) if it can run fused, else None."""
        return run_fused_stem(type(self), self, x)


def run_fused_stem(cls: Any, model: nn.Module, x: Tensor) -> Tensor | None:
    """Return maxpool(relu(bn1(conv1(x)))) of model if it can run fused, else None; cls: its class, a FusedStem."""
    options = options_of(model)
    reason = unusual_input(x)
    gathered = reason or gather(model, cls, cls._parts)
    anatomy = gathered if isinstance(gathered, str) else anatomy_of(gathered)
    if isinstance(anatomy, str):
        keep_reason(model, reason)
        return None
    backend = serving_backend(x.device, options.conv, options.memory)
    given = input_of_call(cls.__name__, x, anatomy, backend, options)
    if isinstance(given, str):
        keep_reason(model, given)
        return None
    found = read_stem(given, anatomy)
    if isinstance(found, str):
        keep_reason(model, found)
        return None
    plan, tensors = found
    recorded = wants_gradients(x, tensors)
    if holds_inference_tensors(x, tensors, recorded or plan.unit.update):
        keep_reason(model, "a tensor was made in inference mode")
        return None
    keep_reason(model, "")
    return run_stem(x, plan, tensors, recorded)


class FusedResNet(FusedStem, ResNet):
    """torchvision's ResNet with its stem fused: same constructor, children, state_dict and results.

    BatchNorm, ReLU and the 3x3 max-pool after the convolution are one pass in forward and one in backward. The
    convolution is the library's, unless this package's was measured faster or fused_conv is set to "fused". Ours
    computes the statistics too, and the gradient of its output is stored only if the images need a gradient. The layers
    run unchanged: switch their blocks with fusedres.fuse, or build the model from FusedBasicBlock or FusedBottleneck.

    Saved for backward by the stem: its input, the raw convolution output, and one byte per element of the pooled
    output. If any part is not plain (`stem_unfused_reason()`: CIFAR's Identity for maxpool, SyncBatchNorm, a hook),
    the whole forward is torchvision's.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device; nothing is updated then.
    """

    _stock = ResNet
    _base = ResNet

    def _forward_impl(self, x: Tensor) -> Tensor:
        cls: Any = type(self)
        fused = issubclass(cls, FusedResNet)  # false if another thread called unfuse() just now
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

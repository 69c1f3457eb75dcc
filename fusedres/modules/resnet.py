"""torchvision's ResNet with its stem fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from fusedres.autograd import Inputs, count_path, in_format, run_block, run_stem, wants_gradients
from fusedres.modules.anatomy import Anatomy, anatomy_of
from fusedres.modules.calls import (
    holds_inference_tensors,
    input_of_call,
    keep_reason,
    options_of,
    reason_of_parts,
    unusual_input,
)
from fusedres.modules.choice import not_measured, serving_backend, unverified
from fusedres.modules.families import read_network
from fusedres.modules.foreign import UNREAD, Foreign
from fusedres.modules.freezable import Freezable
from fusedres.modules.frozen_network import FrozenModel, run_frozen_network
from fusedres.modules.gathering import gather
from fusedres.modules.parts import Parts, UnitPaths
from fusedres.modules.reading import Input, promoted, read_block, read_input, read_stem

_WITH_POOL = Parts((UnitPaths("conv1", "bn1"),), ("relu",), "maxpool").named()
_WITHOUT_POOL = Parts((UnitPaths("conv1", "bn1"),), ("relu",), identities=("maxpool",)).named()


def parts_of_resnet(network: nn.Module) -> Parts:
    """Return where torchvision's ResNet has the parts of its stem; an Identity may stand for the max-pool."""
    return _WITHOUT_POOL if type(network._modules.get("maxpool")) is nn.Identity else _WITH_POOL


class FusedStem(Freezable):
    """Mixin that runs conv1, bn1, relu and maxpool of a ResNet fused; it comes before the model's class in the bases.

    Everything is read from the children once per call.
    """

    # As in fuse(), which turns "fused" into "measured": this package's convolution if it was measured faster.
    fused_conv: str = "auto"
    fused_memory: str = "auto"  # changes nothing in a stem, but with "min" a table cannot leave it unfused
    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _stock: type[nn.Module] = nn.Module  # the class with the unfused forward
    _base: type[nn.Module] | None = None
    _parts: Parts

    def stem_parts(self) -> Parts:
        """Return where the parts of the stem are."""
        return self.__dict__.get("_parts", UNREAD)

    def anatomy(self) -> Anatomy | str:
        """Return the stem's parts, or why it runs unfused for every input."""
        gathered = gather(self, type(self), self.stem_parts())
        return gathered if isinstance(gathered, str) else anatomy_of(gathered)

    def stem_unfused_reason(self) -> str | None:
        """Return why the stem runs unfused on its parameters' device, or None if it is fused."""
        anatomy = self.anatomy()
        if isinstance(anatomy, Anatomy):
            anatomy = anatomy._replace(chained=True)
        return reason_of_parts(type(self).__name__, anatomy, options_of(self))

    def fused_stem(self, x: Tensor) -> Tensor | None:
        """Return maxpool(relu(bn1(conv1(x)))) if it can run fused, else None."""
        return run_fused_stem(type(self), self, x)


def run_fused_stem(cls: Any, model: FusedStem, x: Tensor) -> Tensor | None:
    """Return maxpool(relu(bn1(conv1(x)))) of model if it can run fused, else None; cls: its class, a FusedStem."""
    options = options_of(model)
    reason = unusual_input(x)
    parts: Parts = cls.stem_parts(model)
    gathered = reason or gather(model, cls, parts)
    anatomy = gathered if isinstance(gathered, str) else anatomy_of(gathered)
    if isinstance(anatomy, str):
        keep_reason(model, reason)
        return None
    if len(anatomy.units) > 1 or parts.maxpool is None:
        return _run_deep_stem(cls, model, x, anatomy, parts.maxpool is not None)
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
    frozen: FrozenModel | None = options.frozen
    live = recorded or plan.unit.batch_statistics or not x.is_cpu or torch.compiler.is_compiling()
    if frozen is None or live:
        return run_stem(x, plan, tensors, recorded)
    count_path("frozen_stem")
    return in_format(frozen.stem(x, plan, tensors).run(x), plan.channels_last)


def _run_deep_stem(cls: Any, model: FusedStem, x: Tensor, anatomy: Anatomy, pools: bool) -> Tensor | None:
    """Do the same for a stem of several convolutions, or without a max-pool; pools: whether there is one."""
    options, tensors = options_of(model), tuple(tensor for unit in anatomy.units for tensor in unit.tensors)
    written = wants_gradients(x, tensors) or any(unit.settings.update for unit in anatomy.units)
    chained = anatomy._replace(units=anatomy.units[: -1 if pools else None], chained=True)
    backend = serving_backend(x.device, options.conv, options.memory)
    reason = unverified(anatomy, x.device, options.conv, options.memory)
    if backend is None or reason is not None:
        reason = reason or not_measured(x.device)
    elif x.dim() == 4 and x.shape[0] == 0 and not anatomy.synchronised:
        reason = "the batch was empty"
    elif holds_inference_tensors(x, tensors, written):
        reason = "a tensor was made in inference mode"
    else:
        given = read_input(cls.__name__, x, backend, options.conv, None)
        found = promoted(given, anatomy.units) or read_block(given, chained, "auto")
        if not isinstance(found, str):
            h = run_block(Inputs(x), *found, wants_gradients(x, found[1]))
            keep_reason(model, "")
            return _pooled(cls, h, anatomy, given) if pools else h
        reason = found
    keep_reason(model, reason)
    return None


def _pooled(cls: Any, h: Tensor, anatomy: Anatomy, given: Input) -> Tensor:
    """Run the last convolution of a stem, with its norm, ReLU and max-pool."""
    given = read_input(cls.__name__, h, given.backend, given.conv, None)
    found = read_stem(given, anatomy._replace(units=anatomy.units[-1:]))
    assert not isinstance(found, str)  # checked for all units
    plan, tensors = found
    return run_stem(h, plan, tensors, wants_gradients(h, tensors))


class FusedResNet(FusedStem, ResNet):
    """torchvision's ResNet with its stem fused: same constructor, children, state_dict and results.

    BatchNorm, ReLU and the 3x3 max-pool after the convolution are one pass in forward and one in backward. The
    convolution is the library's, unless this package's was measured faster or fused_conv is set to "fused". Ours
    computes the statistics too, and the gradient of its output is stored only if the images need a gradient. The layers
    run unchanged: switch their blocks with fusedres.fuse, or build the model from FusedBasicBlock or FusedBottleneck.

    Saved for backward by the stem: its input, the raw convolution output, and one byte per element of the pooled
    output. With an Identity as maxpool, as for CIFAR, the stem ends with the ReLU, and only the first two are saved. If
    any part is not plain (`stem_unfused_reason()`: another max-pool, a hook),
    the whole forward is torchvision's.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device; nothing is updated then.
    """

    _stock = ResNet
    _base = ResNet

    def stem_parts(self) -> Parts:
        """Return where the parts of the stem are."""
        return parts_of_resnet(self)

    def _forward_impl(self, x: Tensor) -> Tensor:
        cls: Any = type(self)
        fused = issubclass(cls, FusedResNet)  # false if another thread called unfuse() just now
        frozen = self.__dict__.get("fused_frozen")
        if frozen is not None and fused:
            whole = run_frozen_network(cls, self, frozen, x)
            if whole is not None:
                return whole
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


class FusedForeignStem(Foreign, FusedStem):
    """Mixin of a network of another package that begins with a stem, which was read from its forward (stem_tracing.py).

    The stock forward runs on the stem's result, with the modules of the stem replaced by identities.
    """

    _read = staticmethod(read_network)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the stock forward returns; a call with anything but one tensor, or compiled, is the stock one."""
        cls: Any = type(self)
        if not issubclass(cls, FusedForeignStem):  # another thread called unfuse() just now
            return cls.forward(self, *inputs, **named)
        if len(inputs) == 1 and not named and not torch.compiler.is_compiling():
            rest = _after_stem(self, cls._stock, cls.stem_parts(self).names)
            pooled = run_fused_stem(cls, self, inputs[0])
            if pooled is not None:
                return cls._stock.forward(rest, pooled)
        count_path("stem_unfused")
        return cls._stock.forward(self, *inputs, **named)


_NOTHING = nn.Identity()


def _after_stem(network: nn.Module, stock: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Return a view of a network, of its stock class, whose children of these names do nothing."""
    rest: nn.Module = object.__new__(stock)
    modules = {name: _NOTHING if name in names else child for name, child in network._modules.items()}
    rest.__dict__.update(network.__dict__, _modules=modules)
    return rest

"""Runs a frozen torchvision ResNet as a whole, if nothing can see that its modules are not called one by one.

Else, and for other networks, its stem and its blocks run frozen one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fusedres.autograd import (
    BlockPlan,
    FoldedStem,
    Frozen,
    FrozenBlock,
    FrozenNetwork,
    Inputs,
    StemPlan,
    count_path,
    fold_linear,
    fold_stem,
    run_folded,
)
from fusedres.modules.anatomy import anatomy_of
from fusedres.modules.calls import keep_reason, unusual_input
from fusedres.modules.choice import serving_backend
from fusedres.modules.fused_block import FusedBlock
from fusedres.modules.gathering import gather
from fusedres.modules.genuine import replaced_code, touched
from fusedres.modules.reading import Tensors, read_block, read_input, read_stem
from fusedres.ops.launch import direct

_Kind = tuple[Any, ...]  # what the folds depend on besides the weights


class FrozenModel:
    """What fusedres.freeze leaves on a network with a fused stem; train() drops it."""

    def __init__(self) -> None:
        self.made: _Made | None = None
        self._stem: FoldedStem | None = None

    def stem(self, x: Tensor, plan: StemPlan, tensors: Tensors) -> FoldedStem:
        """Return the folded stem for inputs like x."""
        stem = self._stem
        if stem is None or stem.kind != (x.dtype, x.device, plan.dtype):
            stem = self._stem = fold_stem(x, plan, tensors)
        return stem


class _Made(NamedTuple):
    """The folded network for inputs of one kind, or None if it cannot run as a whole, and what it was made from."""

    kind: _Kind
    network: FrozenNetwork | None
    modules: tuple[tuple[nn.Module, type[nn.Module], tuple[nn.Module | None, ...], object], ...]  # the network first

    def fits(self, kind: _Kind) -> bool:
        """Whether the inputs are of this kind, and the network has the modules that it had."""
        return self.kind == kind and all(
            type(module) is cls
            and tuple(module.__dict__["_modules"].values()) == children
            and module.__dict__.get("fused_frozen") is frozen
            for module, cls, children, frozen in self.modules
        )


def run_frozen_network(cls: Any, model: Any, frozen: FrozenModel, x: Tensor) -> Tensor | None:
    """Return the scores of a FusedResNet of class cls, or None if its modules have to run one by one."""
    if unusual_input(x) is not None or x.dim() != 4 or x.shape[0] == 0 or not x.is_cpu or not direct():
        return None
    if serving_backend(x.device, "auto", "auto") != "cpu":
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in model.parameters())):
        return None
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    weight = model.conv1.weight
    kind = (x.dtype, autocast, tuple(x.shape[1:]), weight.dtype, weight.device)
    made = frozen.made
    if made is None or not made.fits(kind):
        made = frozen.made = _make(cls, model, x, kind)
    if made.network is None or _observed(cls, made):
        return None
    for module, *_, folds in made.modules:
        if folds is not None:
            keep_reason(module, "")
    count_path("frozen_network")
    return made.network.run(x)


def _observed(cls: Any, made: _Made) -> bool:
    """Whether something would see that modules are not called: a hook, or code of somebody else's."""
    if nn_module._has_any_global_hook() or replaced_code(cls, cls._base):
        return True
    kinds = {kind for _, kind, *_ in made.modules if issubclass(kind, FusedBlock)}
    if any(replaced_code(kind, kind._base) for kind in kinds):
        return True
    return any(module.training or touched("", module) for module, *_ in made.modules[1:])


def _make(cls: Any, model: Any, x: Tensor, kind: _Kind) -> _Made:
    modules = tuple((m, type(m), tuple(m._modules.values()), m.__dict__.get("fused_frozen")) for m in model.modules())
    with torch.no_grad():
        return _Made(kind, _folded(cls, model, x), modules)


def _folded(cls: Any, model: Any, x: Tensor) -> FrozenNetwork | None:
    """Return the folded network for inputs like x, or None if a part of it is not plain.

    Raises:
        ShapeError, DtypeError, RuntimeError: a layer does not fit its input.
    """
    layers = (model.layer1, model.layer2, model.layer3, model.layer4)
    parts = cls.stem_parts(model)
    gathered = gather(model, cls, parts)
    if isinstance(gathered, str) or len(parts.units) > 1 or parts.maxpool is None:
        return None
    if any(type(layer) is not nn.Sequential for layer in layers) or not _averages(model.avgpool):
        return None
    anatomy = anatomy_of(gathered)
    given = read_input(cls.__name__, x, "cpu", "auto", None)
    found = anatomy if isinstance(anatomy, str) else read_stem(given, anatomy)
    if isinstance(found, str) or found[0].unit.batch_statistics:
        return None
    plan, tensors = found
    stem = fold_stem(x, plan, tensors)  # not the one that is kept: it is packed for images of this size
    h = stem.run(x[: stem.images])
    blocks: list[tuple[BlockPlan, FrozenBlock]] = []
    for block in (block for layer in layers for block in layer):
        block_plan, frozen = _folded_block(block, h) or (None, None)
        if block_plan is None or frozen is None:
            return None
        blocks.append((block_plan, frozen))
        h = run_folded(Inputs(h), block_plan, frozen.convolutions, None)
    classifier = model.fc
    if type(classifier) is nn.Linear:
        if classifier.weight.dtype is not plan.dtype and not given.autocast:
            return None  # the module raises the error
        classifier = fold_linear(classifier.weight, classifier.bias, x.shape[0], plan.dtype)
    return FrozenNetwork(stem, tuple(blocks), classifier)


def _folded_block(block: nn.Module, h: Tensor) -> tuple[BlockPlan, FrozenBlock] | None:
    """Return a block's plan for an input like h and its folds, or None if it does not run frozen."""
    cls: Any = type(block)  # read once, as another thread may call unfuse() now
    frozen: Frozen | None = block.__dict__.get("fused_frozen")
    if frozen is None or not issubclass(cls, FusedBlock) or cls.forward is not FusedBlock.forward:
        return None
    gathered = gather(block, cls, block.__dict__.get("_parts", cls._parts))
    anatomy = gathered if isinstance(gathered, str) else anatomy_of(gathered)
    if isinstance(anatomy, str) or anatomy.filters:
        return None
    found = read_block(read_input(cls.__name__, h, "cpu", "auto", None), anatomy, "auto")
    if isinstance(found, str) or any(unit.batch_statistics for unit in found[0].all_units):
        return None
    return found[0], frozen.folded(Inputs(h), *found)


def _averages(pool: Any) -> bool:
    """Whether a pool is the average over all pixels."""
    return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))

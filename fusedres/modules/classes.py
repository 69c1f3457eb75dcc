"""Maps torchvision's classes, subclasses of them, and declared classes of others to fused classes and back.

A subclass that does not define its own forward (it adds a tag or a helper method, or fully_shard made it) gets its own
fused class, which keeps isinstance, attributes and methods. So does each declared class (families.py).
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fusedres.modules.basic_block import FusedBasicBlock
from fusedres.modules.bottleneck import FusedBottleneck
from fusedres.modules.densenet import FusedDense, FusedDenseBlock, FusedTransition
from fusedres.modules.families import is_declared
from fusedres.modules.fused_block import FusedBlock, FusedForeignBlock
from fusedres.modules.resnet import FusedForeignStem, FusedResNet, FusedStem
from fusedres.modules.tail_block import FusedTailBlock

Module = type[nn.Module]

FUSED: dict[Module, Module] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
    _DenseBlock: FusedDenseBlock,
    _Transition: FusedTransition,
}
_FOREIGN: dict[Module, Module] = {
    nn.Module: FusedForeignBlock,
    FusedTailBlock: FusedTailBlock,
    FusedForeignStem: FusedForeignStem,
}
_of_subclasses: dict[tuple[Module, Module], Module] = {}  # user's subclass, or a declared class, and its base → fused
_of_sharded: dict[Module, Module] = {}  # sharded fused class → the sharded stock class
refusals: dict[Module, str] = {}  # classes that cannot be subclassed, and why
_METHODS = ("forward", "_forward_impl", "__call__", "_call_impl", "__getattr__", "__getattribute__")
_OWN_NAMES = (  # names that the fused classes use
    "anatomy", "fused_stem", "restored", "stem_parts", "stem_unfused_reason", "unfused_reason",
    "_base", "_parts", "_read", "_served_by", "_stock",
)  # fmt: skip


def base_of(cls: Module) -> Module | None:
    """Return the class whose fused class serves cls, or None if there is none.

    This is the torchvision class that cls is or descends from; for a declared class, nn.Module; for the fused class of
    a block with tails, FusedTailBlock; for that of a network with a stem, FusedForeignStem.
    """
    if issubclass(cls, FusedTailBlock):
        return FusedTailBlock
    if issubclass(cls, FusedForeignBlock):
        return nn.Module
    if issubclass(cls, FusedForeignStem):
        return FusedForeignStem
    base = next((stock for stock in cls.__mro__ if stock in FUSED), None)
    declared = (base is None or "forward" in _overridden(cls, base)) and base is not ResNet and is_declared(cls)
    return nn.Module if declared else base


def own_method(cls: Module, base: Module) -> str | None:
    """Return a method of the subclass cls of base that keeps it from being fused, or None."""
    return next(iter(_overridden(cls, base)), None)


def _overridden(cls: Module, base: Module) -> list[str]:
    names = (*_METHODS, *(() if is_fused(base) else _OWN_NAMES))
    if base in _FOREIGN:
        base, names = nn.Module, (*_METHODS[2:], *_OWN_NAMES)
    return [name for name in names if getattr(cls, name, None) is not getattr(base, name, None)]


def own_method_of_fused(cls: Module) -> str | None:
    """Do the same as own_method for a user's subclass of a fused class."""
    fused = next(other for other in cls.__mro__ if other in FUSED.values() or "_stock" in other.__dict__)
    return own_method(cls, fused)


def is_fused(cls: Module) -> bool:
    """Whether a class is a fused class or descends from one."""
    return issubclass(cls, FusedBlock | FusedTailBlock | FusedStem | FusedDense)


def fused_class(cls: Module, base: Module) -> Module | None:
    """Return the fused class of cls, or None if it cannot be made.

    base: the result of base_of; for a block with tails FusedTailBlock.
    """
    if (cls, base) in _of_subclasses:
        return _of_subclasses[cls, base]
    if cls in FUSED:
        return FUSED[cls]
    described = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_stock": cls, "_served_by": base}
    if base in _FOREIGN:
        described["forward"] = _with_signature(_FOREIGN[base].forward, cls.forward)
    bases = (_OfSubclass, FUSED.get(base) or _FOREIGN[base], cls)
    try:
        made = types.new_class(f"Fused{cls.__name__}", bases, {}, lambda body: body.update(described))
    except Exception as error:  # a metaclass or __init_subclass__ may raise anything
        refusals[cls] = f"{cls.__module__}.{cls.__qualname__} cannot be subclassed: {error}"
        return None
    return _of_subclasses.setdefault((cls, base), made)


def _with_signature(forward: Any, stock: Any) -> Any:
    """Return a forward that takes anything with the signature of the stock one, which torch.fx and trainers read."""
    return functools.update_wrapper(types.FunctionType(forward.__code__, forward.__globals__), stock)


def stock_class(cls: Module) -> Module:
    """Return the class that a fused class replaces, or cls itself if it is a user's subclass of a fused class."""
    if cls in FUSED.values() or "_stock" in cls.__dict__:
        stock: Module = cls._stock  # type: ignore[attr-defined]
        return stock
    if _is_sharded(cls):
        wrapper, fused = cls.__bases__
        if cls not in _of_sharded:
            body = {name: value for name, value in cls.__dict__.items() if name not in ("__dict__", "__weakref__")}
            _of_sharded[cls] = type(cls.__name__.replace("Fused", "", 1), (wrapper, stock_class(fused)), body)
        return _of_sharded[cls]
    return cls


def _is_sharded(cls: Module) -> bool:
    """Whether torch's fully_shard made the class from a fused class."""
    bases = cls.__bases__
    return len(bases) == 2 and bases[0].__module__.startswith("torch.distributed.") and is_fused(bases[1])


def _rebuilt(stock: Module, base: Module) -> nn.Module:
    """Return an empty instance of the fused class of a subclass (for pickle)."""
    cls = fused_class(stock, base)
    assert cls is not None
    return cls.__new__(cls)


class _OfSubclass(nn.Module):
    """Mixin of the fused classes of subclasses. No module has them by name, so pickle finds them by the subclass."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        stock: Module = type(self)._stock  # type: ignore[attr-defined]
        if stock.__reduce__ is not object.__reduce__ or stock.__reduce_ex__ is not object.__reduce_ex__:
            return super().__reduce_ex__(protocol)  # the subclass's own, which may return the stock class
        return _rebuilt, (stock, type(self)._served_by), self.__getstate__()  # type: ignore[attr-defined]

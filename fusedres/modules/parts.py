"""Where the parts of a block or a stem are: paths of modules below it, such as "bn1" or "layer.0.convolution".

The classes of torchvision name their parts themselves. Blocks of other classes are read by tracing.py.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

from torch import nn

from fusedres.modules.genuine import class_attribute, touched

PLAIN_VALUES = (bool, int, float, str, type(None))  # are compared by value, as are collections of them
COLLECTIONS = (dict, list, set)  # all others are compared by identity


class UnitPaths(NamedTuple):
    """A convolution and the norm after it; the filters are modules that run before the convolution, as they are."""

    conv: str
    norm: str
    filters: tuple[str, ...] = ()


class Container(NamedTuple):
    """A module between the block and its parts, whose forward calls them in a known order."""

    path: str
    cls: type[nn.Module]
    forward: Any  # of the class, when it was read
    children: tuple[str, ...]


class Condition(NamedTuple):
    """The value of an attribute that the forward of a block, or of a container in it, has read."""

    path: str  # "": the block
    name: str
    value: Any

    def holds(self, owner: nn.Module | None) -> bool:
        """Whether the attribute still has this value."""
        now = getattr(owner, self.name, _ABSENT)
        if type(now) is not type(self.value):
            return False
        comparable = type(now) in PLAIN_VALUES or type(now) in COLLECTIONS
        return now is self.value or (comparable and now == self.value)


_ABSENT = object()


class Step(NamedTuple):
    """A step of a forward that is read as tails (tail_reading.py): the call of a module, or a tail.

    Value 0 is the block's input; step i makes value i + 1. A tail is ResidualTail's equation without gates; one without
    norms is a sum, or an activation, alone.
    """

    x: int  # the value that the module, or the branch of the tail, reads
    call: str | None = None  # the path of the module that is called; None: a tail
    norm: str | None = None
    activation: str | None = None  # a path, or FUNCTION
    before_add: bool = False
    shortcut: int | None = None  # the value that is added
    shortcut_norm: str | None = None
    into: int | None = None  # 0 or 1: the sum takes the place of the branch's term, or of the shortcut's
    last: tuple[int, ...] = ()  # values that no later step reads

    @property
    def paths(self) -> list[str]:
        """The paths of its modules."""
        found = (self.call, self.norm, self.activation, self.shortcut_norm)
        return [path for path in found if path is not None and path != FUNCTION]


FUNCTION = "relu()"  # a ReLU that is no module


class Parts(NamedTuple):
    """The parts of a block or a stem: units, or steps."""

    units: tuple[UnitPaths, ...]  # of the branch, in order
    relus: tuple[str, ...] = ()
    maxpool: str | None = None
    downsample: str | None = None  # a shortcut that each call looks into
    projection: UnitPaths | None = None
    zero_pad: str | None = None
    shortcut_filters: tuple[str, ...] = ()  # of a shortcut without a projection
    identities: tuple[str, ...] = ()  # modules that may return their input
    containers: tuple[Container, ...] = ()
    conditions: tuple[Condition, ...] = ()
    forward: Any = None  # of the block's class, when it was read; None: a class of torchvision
    steps: tuple[Step, ...] = ()  # of a block that is no residual block of units, but has tails

    names: tuple[str, ...] = ()  # the block's own children among the parts
    nested: bool = False  # some part is not a child of the block itself
    filtered: bool = False  # some unit has filters

    def named(self) -> Parts:
        """Return these parts with their names."""
        others = (self.maxpool, self.downsample, self.zero_pad)
        units = self.units if self.projection is None else (*self.units, self.projection)
        paths = chain(*((unit.conv, unit.norm) for unit in units), self.relus, self.identities, filter(None, others))
        all_paths = (*paths, *chain(*(step.paths for step in self.steps)))
        return self._replace(
            names=tuple(dict.fromkeys(path.partition(".")[0] for path in all_paths)),
            nested=any("." in path for path in all_paths),
            filtered=any(unit.filters for unit in self.units),
        )


def at(block: nn.Module, path: str) -> Any:
    """Return the module at a path below a block, or None; attributes that hide a child are not looked at."""
    if "." not in path:
        return block.__dict__["_modules"].get(path)
    found: Any = block
    for name in path.split("."):
        found = found.__dict__["_modules"].get(name)
        if found is None:
            return None
    return found


def stock_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that fuse() has replaced by cls, or cls itself, also for a subclass with its own forward."""
    owner = next(base for base in cls.__mro__ if "_stock" in base.__dict__ or "forward" in base.__dict__)
    found: type[nn.Module] = owner.__dict__.get("_stock", cls)
    return found


def changed(block: nn.Module, cls: Any, parts: Parts) -> str | None:
    """Return what is no longer as it was when the block was read, in words, or None; cls: its fused class."""
    for path in parts.identities:
        reason = dropping(path, at(block, path))
        if reason is not None:
            return reason
    if parts.forward is None:
        return None
    if cls._stock.forward is not parts.forward:
        return f"{cls._stock.__qualname__}.forward is replaced: call fuse() again"
    for path, kind, forward, children in parts.containers:
        module = at(block, path)
        if stock_of(type(module)) is not kind or tuple(module.__dict__["_modules"]) != children:
            return f"{path} has changed: call fuse() again"
        if kind.forward is not forward:
            return f"{kind.__qualname__}.forward is replaced: call fuse() again"
        reason = touched(path, module) or _hidden_in(path, module, kind, children)
        if reason is not None:
            return reason
    for condition in parts.conditions:
        owner = at(block, condition.path) if condition.path else block
        if not condition.holds(owner):
            name = f"{condition.path}.{condition.name}" if condition.path else condition.name
            return f"{name} was {condition.value!r} when fuse() read the block, and has changed: call fuse() again"
    return None


def _hidden_in(path: str, module: nn.Module, cls: type[nn.Module], children: tuple[str, ...]) -> str | None:
    hidden = next((name for name in children if name in module.__dict__), None)
    return class_attribute(cls, children) if hidden is None else f"{path}.{hidden} is an attribute, not a module"


# Modules that return their input in eval mode, or if this attribute is 0.
_PROBABILITY = {
    "torch.nn.modules.dropout.Dropout": "p",
    "torch.nn.modules.dropout.Dropout2d": "p",
    "torchvision.ops.stochastic_depth.StochasticDepth": "p",
    "timm.layers.drop.DropBlock2d": "drop_prob",
    "timm.layers.drop.DropPath": "drop_prob",
    "mmcv.cnn.bricks.drop.DropPath": "drop_prob",
}


def path_of(cls: type) -> str:
    """Return the full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def may_be_identity(cls: type) -> bool:
    """Whether a module of this class returns its input, always or in some cases."""
    return cls is nn.Identity or path_of(cls) in _PROBABILITY


def dropping(path: str, module: nn.Module | None) -> str | None:
    """Return why a module does not return its input now, or None if it does."""
    if module is None or not may_be_identity(type(module)):
        return f"{path} is a {type(module).__name__}"
    reason = touched(path, module)
    if reason is not None or type(module) is nn.Identity:
        return reason
    active = module.training and getattr(module, _PROBABILITY[path_of(type(module))]) != 0
    return f"{path} (a {type(module).__name__}) drops values in training" if active else None

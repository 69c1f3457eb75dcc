"""Reads from the forward of a network how it begins: with conv, norm and ReLU, once or more, then a max-pool or not.

As in tracing.py the forward runs once without a tensor. Only the values inside the stem matter: each of them must be
used once, by the next module of the stem, and nothing of it may be read or returned. After the stem the forward may do
what it wants, so that it can be run on the stem's result, with the modules of the stem replaced by identities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fusedres.modules.frozen_norm import is_frozen_norm
from fusedres.modules.gathering import refuse_maxpool
from fusedres.modules.noting import Notes, UnfitError, noting_copy
from fusedres.modules.parts import Parts, UnitPaths


class _StemTrace(Notes):
    """What one run of a network's forward has noted."""

    def is_part(self, module: nn.Module) -> bool:
        return not isinstance(module, nn.Sequential)

    def call(self, path: str, cls: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:
        values = list(_values_in((args, kwargs)))
        alone = len(args) == 1 and not kwargs and values == [args[0]]
        return _used(values, _kind_of(cls) if alone else "other", path)


def _kind_of(cls: type[nn.Module]) -> str:
    if issubclass(cls, nn.Conv2d):
        return "conv"
    if issubclass(cls, nn.modules.batchnorm._NormBase) or is_frozen_norm(cls):
        return "norm"
    return {nn.ReLU: "relu", nn.MaxPool2d: "maxpool"}.get(cls, "other")


class _Value:
    """Stands for anything that is computed from the network's input; `uses` are the values made of it."""

    def __init__(self, kind: str, path: str = "") -> None:
        self.kind, self.path = kind, path
        self.uses: list[_Value] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _used([self], f"read of {name}")

    def __call__(self, *args: Any, **kwargs: Any) -> _Value:
        return _used([self, *_values_in((args, kwargs))], "other")

    def __bool__(self) -> bool:
        raise UnfitError("its forward depends on a tensor's value or shape")

    __index__ = __int__ = __float__ = __iter__ = __len__ = __bool__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> _Value:
        return _used(list(_values_in((args, kwargs))), "other")


def _operator(self: _Value, *others: Any) -> _Value:
    return _used([self, *_values_in(others)], "other")


for _name in (
    "add", "radd", "iadd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "neg", "getitem", "floordiv", "mod",
    "eq", "ne", "lt", "le", "gt", "ge",
):  # fmt: skip
    setattr(_Value, f"__{_name}__", _operator)
_Value.__hash__ = object.__hash__  # type: ignore[method-assign]


def _used(values: list[_Value], kind: str, path: str = "") -> _Value:
    made = _Value(kind, path)
    for value in values:
        value.uses.append(made)
    return made


def _values_in(found: Any) -> Iterator[_Value]:
    """Iterate over the values in what a forward passes on or returns."""
    if isinstance(found, _Value):
        yield found
    elif isinstance(found, dict):
        yield from _values_in(list(found.values()))
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _values_in(each)


def stem_of(network: nn.Module, forward: Callable[..., Any]) -> Parts | str:
    """Return the parts of the stem that a network's forward begins with, or why there is none that can be fused."""
    try:
        training, evaluating = (_read(network, forward, training) for training in (True, False))
    except UnfitError as error:
        return str(error)
    except Exception as error:  # a forward may raise anything when it gets no tensor
        return f"its forward cannot be read: {type(error).__name__}: {error}"
    return training if training == evaluating else "its forward begins otherwise in training"


def _read(network: nn.Module, forward: Callable[..., Any], training: bool) -> Parts:
    notes, images = _StemTrace(), _Value("input")
    copy = noting_copy(network, notes)
    for module in copy.modules():
        module.__dict__["training"] = training
    for value in _values_in(forward(copy, images)):
        value.uses.append(_Value("returned"))
    units: list[UnitPaths] = []
    relus: list[str] = []
    value, maxpool = images, None
    while True:
        steps = _next(value, "conv", "norm", "relu")
        if len(steps) < 3:
            break
        units.append(UnitPaths(steps[0].path, steps[1].path))
        relus.append(steps[2].path)
        value = steps[2]
    pooled = _next(value, "maxpool")
    if pooled and "." not in pooled[0].path and refuse_maxpool("", network.get_submodule(pooled[0].path)) is None:
        maxpool = pooled[0].path
    if not units:
        first = value.uses[0].kind if len(value.uses) == 1 else "used more than once"
        raise UnfitError(f"its forward does not begin with convolution, norm and ReLU alone: its input is {first}")
    conditions = tuple(each for each in notes.conditions() if each.name != "training")
    containers = _containers(notes, units)
    parts = Parts(tuple(units), tuple(relus), maxpool, containers=containers, conditions=conditions, forward=forward)
    parts = parts.named()
    _require_whole_children(network, parts)
    return parts


def _next(value: _Value, *kinds: str) -> list[_Value]:
    """Return the values that follow, each the only use of the one before, as long as they are of these kinds."""
    found: list[_Value] = []
    for kind in kinds:
        if len(value.uses) != 1 or value.uses[0].kind != kind:
            break
        value = value.uses[0]
        found.append(value)
    return found


def _containers(notes: Notes, units: list[UnitPaths]) -> Any:
    """Return the containers that hold parts of the stem."""
    held = [path for unit in units for path in unit[:2]]
    return tuple(each for each in notes.containers if any(path.startswith(f"{each.path}.") for path in held))


def _require_whole_children(network: nn.Module, parts: Parts) -> None:
    """Raise if a child of the network holds a part of the stem and something else."""
    held = {*parts.relus, *(path for unit in parts.units for path in unit[:2]), parts.maxpool}
    for name in parts.names:
        for path, module in network.get_submodule(name).named_modules(prefix=name):
            if not isinstance(module, nn.Sequential) and path not in held:
                raise UnfitError(f"{name} holds a part of its stem and {path}")

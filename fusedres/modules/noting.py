"""Copies of modules that note what their forward does, so that it can run without a tensor."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.modules.parts import COLLECTIONS, PLAIN_VALUES, Condition, Container, stock_of

_OWN_ATTRIBUTES = frozenset((*nn.Module().__dict__, "_noted")) - {"training"}  # of every module, and of its copy


class UnfitError(Exception):
    """A step of a forward that cannot be fused; the message says which."""


class Notes(ABC):
    """What one run of a forward has noted."""

    def __init__(self) -> None:
        self.containers: list[Container] = []
        self.reads: dict[tuple[str, str], Any] = {}

    @abstractmethod
    def is_part(self, module: nn.Module) -> bool:
        """Whether a module is a step of its own; the others are called through."""

    @abstractmethod
    def call(self, path: str, cls: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:
        """Return what stands for the result of a part."""

    def conditions(self) -> tuple[Condition, ...]:
        """The attributes that the forward has read.

        Raises:
            UnfitError: one of them may change without notice.
        """
        found: list[Condition] = []
        for (path, name), value in self.reads.items():
            if type(value) in COLLECTIONS and _is_plain(value):
                value = value.copy()
            elif isinstance(value, list | dict | set | Tensor):
                raise UnfitError(f"its forward reads the {type(value).__name__} {path + '.' if path else ''}{name}")
            found.append(Condition(path, name, value))
        return tuple(found)


def _is_plain(collection: Any) -> bool:
    """Whether a collection has plain values alone, so that a copy shows whether it changes."""
    values = [*collection, *collection.values()] if isinstance(collection, dict) else collection
    return all(type(value) in PLAIN_VALUES for value in values)


_RELUS = {torch.relu, torch.relu_, F.relu, F.relu_}
_ADDS = {torch.add, operator.add, operator.iadd}


class Value(ABC):
    """Stands for a tensor: what is done to it is noted if it is a ReLU or a sum, and does not fit otherwise."""

    @abstractmethod
    def relu(self) -> Any:
        """Return relu(self)."""

    @abstractmethod
    def relu_(self) -> Any:
        """Return relu(self), which takes the place of self."""

    @abstractmethod
    def __add__(self, other: Any) -> Any:
        """Return self + other."""

    def __getattr__(self, name: str) -> Any:
        raise UnfitError(f"its forward uses {name} of a tensor")

    def __bool__(self) -> bool:
        raise UnfitError("its forward depends on a tensor's value")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        if function in _RELUS and isinstance(args[0], Value):
            in_place = name.endswith("_") or True in args[1:] or (kwargs or {}).get("inplace", False)
            return args[0].relu_() if in_place else args[0].relu()
        if function in _ADDS and len(args) == 2 and not kwargs and isinstance(args[0], Value):
            return args[0] + args[1]
        raise UnfitError(f"its forward calls {name}")


def _unsupported(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise UnfitError(f"its forward uses {name} of a tensor")

    return refuse


for _name in ("radd", "mul", "rmul", "sub", "rsub", "truediv", "matmul", "getitem", "len", "iter", "neg", "setitem"):
    setattr(Value, f"__{_name}__", _unsupported(_name))


_noting: dict[type[nn.Module], type[nn.Module]] = {}


def _noting_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose instances note the attributes that are read and the calls of parts."""

    def read(self: Any, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        state = object.__getattribute__(self, "__dict__")
        if name not in _OWN_ATTRIBUTES and not name.startswith("__"):
            notes, path, _ = state["_noted"]
            if name in state or type(value) in PLAIN_VALUES:
                notes.reads[path, name] = value
        return value

    def read_missing(self: Any, name: str) -> Any:
        value: Any = cls.__getattr__(self, name)
        if value is None:  # a child, parameter or buffer that is absent
            notes, path, _ = self.__dict__["_noted"]
            notes.reads[path, name] = value
        return value

    def write(self: Any, name: str, value: Any) -> None:
        raise UnfitError(f"its forward sets {name}")

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        notes, path, part = self.__dict__["_noted"]
        if part:
            return notes.call(path, cls, self, args, kwargs)
        return _call_through(path, cls, self, args, kwargs)

    if cls not in _noting:
        body = {"__getattribute__": read, "__getattr__": read_missing, "__setattr__": write, "__call__": call}
        _noting[cls] = type(cls.__name__, (cls,), body)
    return _noting[cls]


def _call_through(path: str, cls: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:
    """Run the forward of a container; if it is what does not fit, the error names the container."""
    try:
        return module.forward(*args, **kwargs)
    except UnfitError as error:
        if str(error).startswith("its forward"):
            raise UnfitError(f"{path} is a {cls.__name__}: {error}") from error
        raise


def noting_copy(module: nn.Module, notes: Notes, path: str = "") -> nn.Module:
    """Return a copy of a module, and of those below it, that notes what happens; tensors are shared.

    What fuse() has switched is copied with its stock class.
    """
    cls = stock_of(type(module))
    copy = object.__new__(_noting_class(cls))
    part = path != "" and notes.is_part(module)
    children = {
        name: None if child is None else noting_copy(child, notes, f"{path}.{name}".lstrip("."))
        for name, child in module._modules.items()
    }
    if not part and path:
        notes.containers.append(Container(path, cls, cls.forward, tuple(children)))
    state = dict(module.__dict__) | {"_modules": children, "_noted": (notes, path, part)}
    object.__setattr__(copy, "__dict__", state)
    return copy

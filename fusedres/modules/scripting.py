"""torch.jit.script compiles the source of forward, so it gets the stock class of a fused block or ResNet.

`torch.jit.script` calls __prepare_scriptable__ of every module, and may put the result in the module's place. So the
module itself is returned, with a class that has the stock forward, and that becomes the fused class again as soon as
Python uses the module.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# What torch.jit.script would take for attributes of the script and cannot convert.
_NOT_SCRIPTED = ("fused_frozen", "fused_calls", "fused_last_reason", "_parts")

_made: dict[type[nn.Module], type[nn.Module]] = {}  # fused class → the class for torch.jit.script


class Scriptable(nn.Module):
    """Mixin of fused classes."""

    _stock: type[nn.Module]  # the class with the unfused forward

    def __prepare_scriptable__(self) -> nn.Module:
        """Return this module with its stock forward, until it is called, copied or pickled."""
        cls = type(self)
        if cls not in _made:
            described = {"_fused": cls, "__module__": self._stock.__module__}
            _made[cls] = type(self._stock.__name__, (_Scripted, self._stock), described)
        for name in _NOT_SCRIPTED:
            self.__dict__.pop(name, None)
        object.__setattr__(self, "__class__", _made[cls])
        return self

    def restored(self) -> None:
        """Do what the fused class needs after torch.jit.script."""


class _Scripted(nn.Module):
    """Mixin of the classes for torch.jit.script."""

    _fused: type[Scriptable]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        restore(self)
        return self(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        restore(self)
        return self.__reduce_ex__(protocol)


def restore(module: nn.Module) -> None:
    """Give a module that torch.jit.script has seen its fused class again."""
    if isinstance(module, _Scripted):
        object.__setattr__(module, "__class__", module._fused)
        assert isinstance(module, Scriptable)
        module.restored()

"""What fused classes of other packages' modules share: their parts were read from the forward (tracing.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fusedres.modules.parts import Parts
from fusedres.modules.scripting import Scriptable

UNREAD = Parts(()).named()


class Foreign(Scriptable):
    """Mixin that comes first in the bases: a module keeps its parts, and reads them again when copied."""

    _stock: type[nn.Module]
    _read: Callable[[nn.Module], Parts | str]  # returns the parts, or why there are none
    _parts: Parts = UNREAD  # each module has its own; this is what is left when another thread calls unfuse()

    def __getstate__(self) -> Any:
        """Return the state without what was read from the forward."""
        state = self.__dict__ if not hasattr(super(), "__getstate__") else super().__getstate__()
        return {name: value for name, value in state.items() if name != "_parts"} if isinstance(state, dict) else state

    def __setstate__(self, state: Any) -> None:
        """Restore a copied or unpickled module, and read its forward again, which may be another version's."""
        super().__setstate__(state)
        self.restored()

    def restored(self) -> None:
        """Read the forward; if it is not one that can be fused any more, the module gets its stock class."""
        parts = type(self)._read(self)
        if isinstance(parts, str):
            object.__setattr__(self, "__class__", self._stock)
        else:
            self.__dict__["_parts"] = parts

"""What fused blocks and networks share that fusedres.freeze has frozen."""

from __future__ import annotations

from typing import Any

from typing_extensions import Self

from fusedres.modules.scripting import Scriptable

# Neither copied nor pickled with a module: folded weights, and what the last call left.
_OF_THIS_MODULE = ("fused_frozen", "fused_last_reason", "fused_calls")


class Freezable(Scriptable):
    """Mixin of fused classes: folded weights are kept in `fused_frozen` until the module is trained again."""

    fused_frozen: Any = None

    def train(self, mode: bool = True) -> Self:
        """Set the mode as torch does; with mode=True, also drop what fusedres.freeze kept."""
        if mode:
            self.fused_frozen = None
        return super().train(mode)

    def __getstate__(self) -> Any:
        """Return the state without the folded weights: a copy or a pickle of a frozen module is not frozen."""
        state = self.__dict__ if not hasattr(super(), "__getstate__") else super().__getstate__()
        if not isinstance(state, dict):  # a subclass has its own __getstate__
            return state
        return {name: value for name, value in state.items() if name not in _OF_THIS_MODULE}

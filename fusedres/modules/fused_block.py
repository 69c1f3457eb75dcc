"""What FusedBasicBlock and FusedBottleneck share: they read a block's current settings and run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fusedres.autograd import (
    BlockPlan,
    Frozen,
    UncheckedError,
    count_path,
    run_block,
    run_frozen,
    wants_gradients,
)
from fusedres.dispatch import Way
from fusedres.modules.anatomy import Anatomy, Parts, anatomy_of, gather
from fusedres.modules.calls import (
    holds_inference_tensors,
    input_of_call,
    keep_reason,
    options_of,
    reason_of_parts,
    unusual_input,
)
from fusedres.modules.choice import serving_backend
from fusedres.modules.reading import Tensors, read_block, read_input
from fusedres.modules.remembered import recall, remember

# Neither copied nor pickled with a block: folded weights, and what the last call left.
_OF_THIS_BLOCK = ("fused_frozen", "fused_last_reason", "fused_calls")


class FusedBlock(nn.Module):
    """Mixin that comes before a torchvision block in the bases: forward runs fused if that is the same computation.

    Everything is read from the children once per call. If a part is unusual (`unfused_reason`) or a functorch transform
    is active, the stock forward runs instead.
    """

    fused_memory: str = "auto"
    fused_conv: str = "auto"
    fused_frozen: Frozen | None = None
    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _stock: type[nn.Module] = nn.Module  # the class with the unfused forward
    _parts: Parts = Parts.of(None, ())

    def anatomy(self) -> Anatomy | str:
        """Return the block's parts, or why it runs unfused for every input."""
        gathered = gather(self, type(self), self._parts)
        return gathered if isinstance(gathered, str) else anatomy_of(gathered, self._parts)

    def unfused_reason(self) -> str | None:
        """Return why the stock forward runs on the parameters' device, or None if the block is fused."""
        return reason_of_parts(type(self).__name__, self.anatomy(), options_of(self))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + S(x)); see the class."""
        cls: Any = type(self)
        if not issubclass(cls, FusedBlock):  # another thread called unfuse() just now
            result: Tensor = cls.forward(self, x)
            return result
        options = options_of(self)
        reason = unusual_input(x)
        if reason is not None:
            return run_unfused(cls, self, x, reason)
        gathered = gather(self, cls, cls._parts)
        if isinstance(gathered, str):
            return run_unfused(cls, self, x, None)
        backend = serving_backend(x.device, options.conv, options.memory)
        remembers = backend == "cpu" and options.frozen is None and not torch.compiler.is_compiling()
        known = recall(self, gathered, x, options[:2]) if remembers else None
        if known is not None:
            try:
                return run_plan(cls, self, x, known.plan, known.tensors, None)
            except UncheckedError:
                pass
        anatomy = anatomy_of(gathered, cls._parts)
        if isinstance(anatomy, str):
            return run_unfused(cls, self, x, None)
        given = input_of_call(cls.__name__, x, anatomy, backend, options)
        found = given if isinstance(given, str) else read_block(given, anatomy, options.memory)
        if isinstance(found, str):
            return run_unfused(cls, self, x, found)
        if remembers:
            remember(self, gathered, x, options[:2], *found)
        return run_plan(cls, self, x, *found, options.frozen)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as torch does; with mode=True, also drop what fusedres.freeze kept."""
        if mode:
            self.fused_frozen = None
        return super().train(mode)

    def __getstate__(self) -> Any:
        """Return the state without the folded weights: a copy or a pickle of a frozen block is not frozen."""
        state = self.__dict__ if not hasattr(super(), "__getstate__") else super().__getstate__()
        if not isinstance(state, dict):  # a subclass has its own __getstate__
            return state
        return {name: value for name, value in state.items() if name not in _OF_THIS_BLOCK}


def plan_of(block: FusedBlock, x: Tensor, backend: str, way: Way | None = None) -> tuple[BlockPlan, Tensors]:
    """Return the plan of a call on a backend, and its tensors.

    Raises:
        RuntimeError: the block runs unfused.
        ShapeError, DtypeError: see reading.py.
    """
    anatomy, options = block.anatomy(), options_of(block)
    if not isinstance(anatomy, str):
        given = read_input(type(block).__name__, x, backend, options.conv, way)
        found = read_block(given, anatomy, options.memory)
        if not isinstance(found, str):
            return found
        anatomy = found
    raise RuntimeError(f"{type(block).__name__}: the block must be fused, got: {anatomy}; see report()")


def run_plan(
    cls: Any, block: FusedBlock, x: Tensor, plan: BlockPlan, tensors: Tensors, frozen: Frozen | None
) -> Tensor:
    """Run a block of the fused class cls by the plan of a call.

    Raises:
        UncheckedError: the plan is from an earlier call and does not fit; nothing was computed.
    """
    recorded = wants_gradients(x, tensors)
    if holds_inference_tensors(x, tensors, recorded or any(unit.update for unit in plan.all_units)):
        return run_unfused(cls, block, x, "a tensor was made in inference mode")
    if frozen is not None and not recorded and _is_constant(plan) and not torch.compiler.is_exporting():
        count_path("frozen_forward")
        result = run_frozen(x, plan, frozen.folded(x, plan, tensors))
    else:
        result = run_block(x, plan, tensors, recorded)
    keep_reason(block, "")
    return result


def run_unfused(cls: Any, block: FusedBlock, x: Tensor, reason: str | None) -> Tensor:
    """Run the stock forward of the fused class cls; reason: why, for report() (None: it is in the block's parts)."""
    count_path("unfused")
    keep_reason(block, reason)
    result: Tensor = cls._stock.forward(block, x)
    return result


def _is_constant(plan: BlockPlan) -> bool:
    """Whether no statistics depend on the batch."""
    return not any(unit.batch_statistics for unit in plan.all_units)

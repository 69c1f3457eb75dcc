"""What FusedBasicBlock and FusedBottleneck share: they read a block's current settings and run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.autograd import BlockPlan, Frozen, UncheckedError, count_path
from fusedres.dispatch import Way
from fusedres.modules.anatomy import Anatomy, anatomy_of
from fusedres.modules.calls import input_of_call, keep_reason, options_of, reason_of_parts, unusual_input
from fusedres.modules.choice import not_measured, serving_backend, unverified
from fusedres.modules.families import read_units
from fusedres.modules.foreign import Foreign
from fusedres.modules.freezable import Freezable
from fusedres.modules.gathering import gather
from fusedres.modules.parts import Parts
from fusedres.modules.reading import Tensors, read_block, read_input
from fusedres.modules.remembered import recall, remember
from fusedres.modules.running import run_filtered, run_plan, run_unfused
from fusedres.modules.stochastic_depth import StochasticRate, run_dropping


class FusedBlock(Freezable):
    """Mixin that comes before a torchvision block in the bases: forward runs fused if that is the same computation.

    Everything is read from the children once per call. If a part is unusual (`unfused_reason`) or a functorch transform
    is active, the stock forward runs instead.
    """

    fused_memory: str = "auto"
    fused_conv: str = "auto"
    fused_frozen: Frozen | None = None
    fused_stochastic_depth: StochasticRate | None = None
    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _stock: type[nn.Module] = nn.Module  # the class with the unfused forward
    _base: type[nn.Module] = nn.Module  # torchvision's class that it descends from
    _parts: Parts

    def anatomy(self) -> Anatomy | str:
        """Return the block's parts, or why it runs unfused for every input."""
        gathered = gather(self, type(self), self._parts)
        return gathered if isinstance(gathered, str) else anatomy_of(gathered)

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
        parts = self.__dict__.get("_parts", cls._parts)
        dropping = self.__dict__.get("fused_stochastic_depth")
        if dropping is not None and self.training:
            return run_dropping(cls, self, x, parts, dropping)
        reason = unusual_input(x)
        if reason is not None:
            return run_unfused(cls, self, x, reason)
        gathered = gather(self, cls, parts)
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
        anatomy = anatomy_of(gathered)
        if isinstance(anatomy, str):
            return run_unfused(cls, self, x, None)
        if anatomy.filters:
            reason = unverified(anatomy, x.device, options.conv, options.memory)
            if backend is None or reason is not None:
                return run_unfused(cls, self, x, reason or not_measured(x.device))
            return run_filtered(cls, self, x, anatomy, backend, options)
        given = input_of_call(cls.__name__, x, anatomy, backend, options)
        found = given if isinstance(given, str) else read_block(given, anatomy, options.memory)
        if isinstance(found, str):
            return run_unfused(cls, self, x, found)
        if remembers:
            remember(self, gathered, x, options[:2], *found)
        return run_plan(cls, self, x, *found, options.frozen)


class FusedForeignBlock(Foreign, FusedBlock):
    """Mixin of a fused block of another package or of a user: its parts were read from its forward (tracing.py)."""

    _read = staticmethod(read_units)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return relu(F(x) + S(x)); a call with anything but one tensor runs the stock forward."""
        cls: Any = type(self)
        if not issubclass(cls, FusedForeignBlock):  # another thread called unfuse() just now
            return cls.forward(self, *inputs, **named)
        if len(inputs) == 1 and not named:
            return FusedBlock.forward(self, *inputs)
        count_path("unfused")
        keep_reason(self, "it was called with more than one input, or by name")
        return cls._stock.forward(self, *inputs, **named)


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

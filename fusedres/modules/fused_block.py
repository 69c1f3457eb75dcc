"""What FusedBasicBlock and FusedBottleneck share: reading a block's live settings, and running it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
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
from fusedres.modules.choice import FASTER_UNFUSED, chosen_way, not_measured, serving_backend
from fusedres.modules.reading import Tensors, read_block, read_input, read_stem
from fusedres.modules.remembered import recall, remember
from fusedres.ops._sizes import FLOATING

# Not copied with a block nor pickled: folds, and what the last call left.
_OF_THIS_BLOCK = ("fused_frozen", "fused_last_reason", "fused_calls")
_ORDINARY = 256  # a side of images, in pixels, that any block takes


class Options(NamedTuple):
    """fuse()'s and freeze()'s settings of a block, read once a call: another thread may change them meanwhile."""

    memory: str
    conv: str
    frozen: Frozen | None


class FusedBlock(nn.Module):
    """Mixin in front of a torchvision block: forward runs fused wherever that is the same computation.

    Everything is read from the children once at each call. Where a part is unusual (`unfused_reason`), or a functorch
    transform is active, the stock forward runs instead.
    """

    fused_memory: str = "auto"
    fused_conv: str = "auto"
    fused_frozen: Frozen | None = None
    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _stock: type[nn.Module] = nn.Module  # the class of the forward that runs unfused
    _parts: Parts = Parts.of(None, ())

    def anatomy(self) -> Anatomy | str:
        """The block's parts, or why it runs unfused whatever the input."""
        gathered = gather(self, type(self), self._parts)
        return gathered if isinstance(gathered, str) else anatomy_of(gathered, self._parts)

    def unfused_reason(self) -> str | None:
        """Why the stock forward runs on the parameters' device, or None where the block is fused."""
        anatomy = self.anatomy()
        if isinstance(anatomy, str):
            return anatomy
        options = self._options()
        without = without_kernels(anatomy.units[0].conv_weight, options.conv, options.memory)
        return without or reason_of_shapes(type(self).__name__, anatomy)

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + S(x)); see the class."""
        cls: Any = type(self)
        if not issubclass(cls, FusedBlock):  # unfuse() in another thread came between
            result: Tensor = cls.forward(self, x)
            return result
        options = cls._options(self)
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
        chosen = chosen_way(backend, anatomy, x, options.conv, options.memory)
        if chosen == FASTER_UNFUSED and options.frozen is not None and x.is_cpu and backend is not None:
            chosen = backend, None  # freeze() asked for it, and the CPU's kernels are verified
        if isinstance(chosen, str):
            return run_unfused(cls, self, x, chosen)
        given = read_input(cls.__name__, x, chosen[0], options.conv, chosen[1])
        found = read_block(given, anatomy, options.memory)
        if isinstance(found, str):
            return run_unfused(cls, self, x, found)
        if remembers:
            remember(self, gathered, x, options[:2], *found)
        return run_plan(cls, self, x, *found, options.frozen)

    def train(self, mode: bool = True) -> Self:
        """Also drops what fusedres.freeze kept, where mode is True."""
        if mode:
            self.fused_frozen = None
        return super().train(mode)

    def __getstate__(self) -> Any:
        """A copy or a pickle of a frozen block is not frozen: folds stay with the block that they were made for."""
        state = self.__dict__ if not hasattr(super(), "__getstate__") else super().__getstate__()
        if not isinstance(state, dict):  # a subclass's own
            return state
        return {name: value for name, value in state.items() if name not in _OF_THIS_BLOCK}

    def _options(self) -> Options:
        settings = self.__dict__
        return Options(
            settings.get("fused_memory") or FusedBlock.fused_memory,
            settings.get("fused_conv") or FusedBlock.fused_conv,
            settings.get("fused_frozen"),
        )

    def _read(self, x: Tensor, backend: str, way: Way | None = None) -> tuple[BlockPlan, Tensors]:
        """The plan of a call and its tensors.

        Raises:
            RuntimeError: the block runs unfused. ShapeError, DtypeError: see reading.py.
        """
        anatomy, options = self.anatomy(), self._options()
        if not isinstance(anatomy, str):
            given = read_input(type(self).__name__, x, backend, options.conv, way)
            found = read_block(given, anatomy, options.memory)
            if not isinstance(found, str):
                return found
            anatomy = found
        raise RuntimeError(f"{type(self).__name__}: the block must be fused, got: {anatomy}; see report()")


def reason_of_shapes(op: str, anatomy: Anatomy) -> str | None:
    """Why a batch of ordinary images does not run fused: the parts do not fit each other, say."""
    first = anatomy.units[0]
    size = (2, first.conv_weight.shape[1] * first.settings.groups, _ORDINARY, _ORDINARY)
    x = first.conv_weight.detach().new_empty(1).expand(size)
    given = read_input(op, x, "reference", "library", None)
    norm = next((v.dtype for v in (first.weight, first.running_mean) if v is not None), None)
    if norm in (torch.float16, torch.bfloat16) and norm is not given.dtype:  # such a block is for autocast
        given = given._replace(dtype=norm, autocast=True)
    try:
        found = read_stem(given, anatomy) if len(anatomy.units) == 1 else read_block(given, anatomy, "auto")
    except (RuntimeError, ValueError) as error:
        return f"it raises: {error}"
    return found if isinstance(found, str) else None


def run_plan(
    cls: Any, block: FusedBlock, x: Tensor, plan: BlockPlan, tensors: Tensors, frozen: Frozen | None
) -> Tensor:
    """A block of a fused class by the plan of a call.

    Raises:
        UncheckedError: the plan is of an earlier call and does not fit; nothing was computed.
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
    """The stock forward of a fused class; the reason is kept for report() where it lies in the input."""
    count_path("unfused")
    keep_reason(block, reason)
    result: Tensor = cls._stock.forward(block, x)
    return result


def keep_reason(block: nn.Module, reason: str | None) -> None:
    """Keeps for report() why a call ran unfused: "" where it ran fused, None where the block's parts are the reason."""
    if not torch.compiler.is_compiling() and block.__dict__.get("fused_last_reason") != reason:
        block.__dict__["fused_last_reason"] = reason


def has_function_mode() -> bool:
    """Whether a TorchFunctionMode is active other than torch.device's."""
    modes = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def unusual_input(x: Any) -> str | None:
    """Why an input must run through torch's own operators: they are observed, or its values are not in its memory."""
    if type(x) not in (Tensor, nn.Parameter):
        return f"the input was a {type(x).__name__}, not a plain tensor"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func was active"
    if torch.compiler.is_compiling():
        return None
    if torch._C._len_torch_function_stack() and has_function_mode():
        return "a mode that sees torch's functions was active"
    if x.layout is not torch.strided or x.is_nested:
        return "the input was sparse or nested"
    if x.is_neg() or x._is_zerotensor():
        return "the input was lazily negated or zero"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace was recording"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation was active"
    return None


def holds_inference_tensors(x: Tensor, tensors: Tensors, written_or_saved: bool) -> bool:
    """Whether torch refuses a call outside inference mode, as tensors made inside it would be written or saved."""
    if not written_or_saved or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return x.is_inference() or any(tensor is not None and tensor.is_inference() for tensor in tensors)


def without_kernels(weight: Tensor, conv: str, memory: str) -> str | None:
    """Why nothing runs fused on a weight's dtype and device, or None where it does."""
    if weight.dtype not in FLOATING:
        return f"weights are {weight.dtype}"
    return None if serving_backend(weight.device, conv, memory) is not None else not_measured(weight.device)


def _is_constant(plan: BlockPlan) -> bool:
    """No statistics depend on the batch."""
    return not any(unit.batch_statistics for unit in plan.all_units)

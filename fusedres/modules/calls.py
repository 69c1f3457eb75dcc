"""What calls of a fused block and of a fused stem share: options, checks of the input, reasons to run unfused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from fusedres.backends import automatic
from fusedres.modules.anatomy import Anatomy
from fusedres.modules.choice import FASTER_UNFUSED, chosen_way, not_measured, serving_backend
from fusedres.modules.filters import filtered_like, split
from fusedres.modules.reading import Input, Tensors, read_block, read_input, read_stem
from fusedres.ops._sizes import FLOATING

_ORDINARY = 256  # height and width of images, in pixels, that any block accepts


class Options(NamedTuple):
    """The settings of fuse() and freeze(), read once per call, as another thread may change them during the call."""

    memory: str
    conv: str
    frozen: Any  # of a block: its Frozen; of a network with a fused stem: its FrozenModel; None: not frozen


def options_of(module: nn.Module) -> Options:
    """Return the options of a block, or of a model with a fused stem."""
    settings = module.__dict__
    return Options(
        settings.get("fused_memory") or "auto", settings.get("fused_conv") or "auto", settings.get("fused_frozen")
    )


def input_of_call(op: str, x: Tensor, anatomy: Anatomy, backend: str | None, options: Options) -> Input | str:
    """Return the checked input of a call, with its backend and its measured way, or why the call runs unfused.

    Args:
        op: the name of the module's class, for errors.
        backend: the result of serving_backend.

    Raises:
        ShapeError, DtypeError: see read_input.
    """
    chosen = chosen_way(backend, anatomy, x, options.conv, options.memory)
    if chosen == FASTER_UNFUSED and options.frozen is not None and x.is_cpu and backend is not None:
        chosen = backend, None  # freeze() asked for fused blocks, and the CPU's kernels are verified
    return chosen if isinstance(chosen, str) else read_input(op, x, chosen[0], options.conv, chosen[1])


def reason_of_parts(op: str, anatomy: Anatomy | str, options: Options) -> str | None:
    """Return why a block or stem runs unfused on its parameters' device, or None if it is fused.

    Args:
        op: the name of the module's class, for errors.
        anatomy: its parts, or why they are unusual.
    """
    if isinstance(anatomy, str):
        return anatomy
    without = without_kernels(anatomy.units[0].conv_weight, options.conv, options.memory)
    return without or _reason_of_shapes(op, anatomy)


def _reason_of_shapes(op: str, anatomy: Anatomy) -> str | None:
    """Return why a batch of ordinary images does not run fused (for example, parts that do not fit), or None."""
    first = anatomy.units[0]
    size = (2, first.conv_weight.shape[1] * first.settings.groups, _ORDINARY, _ORDINARY)
    x = first.conv_weight.detach().new_empty(1).expand(size)
    given = read_input(op, x, "reference", "library", None)
    norm = next((v.dtype for v in (first.weight, first.running_mean) if v is not None), None)
    if norm in (torch.float16, torch.bfloat16) and norm is not given.dtype:  # such a block runs under autocast
        given = given._replace(dtype=norm, autocast=True)
    try:
        if len(anatomy.units) == 1:
            found = read_stem(given, anatomy)
            return found if isinstance(found, str) else None
        return _reason_of_parts(given, anatomy)
    except (RuntimeError, ValueError) as error:
        return f"it raises: {error}"


def _reason_of_parts(given: Input, anatomy: Anatomy) -> str | None:
    """Return why a part of a block between its filters does not run fused, or None."""
    x = h = given.x
    for part in split(anatomy):
        h = filtered_like(part.filters, h)
        other = filtered_like(anatomy.filters[-1], x) if anatomy.filters and not part.anatomy.chained else None
        found = read_block(given._replace(x=h, other=other), part.anatomy, "auto")
        if isinstance(found, str):
            return found
        shape = tuple(h.shape)
        for unit in part.anatomy.units:
            shape = unit.settings.output_shape(shape, unit.conv_weight.shape)
        h = x.new_empty(1).expand(shape)
    return None


def keep_reason(block: nn.Module, reason: str | None) -> None:
    """Store for report() why a call ran unfused; "": it ran fused, None: the reason is in the block's parts."""
    if not torch.compiler.is_dynamo_compiling() and block.__dict__.get("fused_last_reason") != reason:
        block.__dict__["fused_last_reason"] = reason


def has_function_mode() -> bool:
    """Whether a TorchFunctionMode other than torch.device's is active."""
    modes = (torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack()))
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def unusual_input(x: Any) -> str | None:
    """Return why an input needs torch's own operators, or None.

    Something observes these operators, or the input's values are not in its memory.
    """
    if torch.compiler.is_exporting():
        return "torch.export was recording: exported programs have torch's own operators alone"
    if isinstance(x, fx.Proxy):
        return "torch.fx was tracing"
    if type(x) not in (Tensor, nn.Parameter):
        return f"the input was a {type(x).__name__}, not a plain tensor"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func was active"
    if torch.compiler.is_compiling():
        # The compiler fuses torch's operators, and cannot fuse the passes of this package with what is around them.
        inference = x.is_cpu and not torch.is_grad_enabled() and automatic()
        return "torch.compile makes faster code for inference on CPUs" if inference else None
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
    """Whether torch refuses this call outside inference mode: it would write or save tensors made in that mode."""
    if not written_or_saved or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return x.is_inference() or any(tensor is not None and tensor.is_inference() for tensor in tensors)


def without_kernels(weight: Tensor, conv: str, memory: str) -> str | None:
    """Return why nothing runs fused for the weight's dtype and device, or None if it does."""
    if weight.dtype not in FLOATING:
        return f"weights are {weight.dtype}"
    return None if serving_backend(weight.device, conv, memory) is not None else not_measured(weight.device)

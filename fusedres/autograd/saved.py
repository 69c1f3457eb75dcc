"""Checks of tensors that kernels take by their address: those of a call, and those that were saved for backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fusedres.autograd.plan import UNIT_PARAMS, UNIT_TENSORS, BlockPlan, Branch, ConvBN, Saved

_Found = tuple[str, Tensor, torch.dtype, tuple[int, ...]]  # what it is, and what it must be
_NAMES = ("convolution weight", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def require_memory(x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Raises where the memory of a call's input, or of a tensor of its units, was freed or is too small."""
    if torch.compiler.is_compiling() or x.is_meta:
        return
    for index, tensor in enumerate((x, *tensors)):
        if tensor is not None and not has_memory(tensor):
            name = "x" if index == 0 else f"a unit's {_NAMES[(index - 1) % UNIT_TENSORS]}"
            raise RuntimeError(
                f"fused block: {name} must have memory for its shape {tuple(tensor.shape)}, got a storage of "
                f"{tensor.untyped_storage().nbytes()} bytes; allocate it before the call (it was freed or resized)"
            )


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor's storage holds all of its elements."""
    if tensor.numel() == 0 or tensor.is_meta:
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= needed


@contextmanager
def statistics_kept_on_error(tensors: Sequence[Tensor | None], units: Sequence[ConvBN]) -> Iterator[None]:
    """Puts the running statistics back where a forward fails half-way (out of memory, say), on the CPU.

    On GPUs, where copies would cost launches, statistics updated before a failure stay updated, as torch's do.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    if not torch.compiler.is_compiling():
        for index, unit in enumerate(units):
            if unit.update:
                running = tensors[index * UNIT_TENSORS + UNIT_PARAMS : (index + 1) * UNIT_TENSORS]
                kept += [(tensor, tensor.clone()) for tensor in running if tensor is not None and tensor.is_cpu]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        raise


def check_saved(saved: Saved, grad_out: Tensor, x: Tensor, params: Sequence[Tensor | None], plan: BlockPlan) -> None:
    """Raises where a saved tensor is not of the kind that was saved: hooks on saved tensors may hand back others."""
    what = "backward of a fused block"
    if x.dim() != 4 or x.device != grad_out.device or not x.dtype.is_floating_point:
        _refuse(what, "x", x, f"a floating-point tensor of 4 dimensions on {grad_out.device}")
    found = list(_branch(saved, grad_out, x, params, plan))
    for name, tensor, dtype, shape in found:
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != grad_out.device:
            _refuse(what, name, tensor, f"{dtype} of shape {shape} on {grad_out.device}")
    if torch.compiler.is_compiling():
        return
    for name, tensor in [("grad_out", grad_out), ("x", x), *((name, tensor) for name, tensor, _, _ in found)]:
        if not has_memory(tensor):
            _refuse(what, name, tensor, "in memory")


def check_saved_stem(
    saved: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, x: Tensor, params: Sequence[Tensor | None], plan: ConvBN
) -> None:
    """The same of a stem's argmax, raw output and state."""
    what = "backward of a fused stem"
    argmax, y, state = saved
    weight = params[0]
    assert weight is not None
    if x.dim() != 4 or not x.dtype.is_floating_point:
        _refuse(what, "x", x, "a floating-point tensor of 4 dimensions")
    shape = convolved(tuple(x.shape), tuple(weight.shape), plan)
    n, channels, height, width = shape
    pooled = (n, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    found: list[_Found] = [
        ("a raw output", y, grad_out.dtype, shape),
        ("an argmax", argmax, torch.uint8, pooled),
        ("a state", state, _arithmetic(y.dtype), (4, channels)),
        ("grad_out", grad_out, grad_out.dtype, pooled),
        *_vectors(params, channels),
    ]
    for name, tensor, dtype, wanted in found:
        if tensor.dtype is not dtype or tensor.shape != wanted or tensor.device != grad_out.device:
            _refuse(what, name, tensor, f"{dtype} of shape {wanted} on {grad_out.device}")
    if torch.compiler.is_compiling():
        return
    for name, tensor in [("x", x), *((name, tensor) for name, tensor, _, _ in found)]:
        if not has_memory(tensor):
            _refuse(what, name, tensor, "in memory")


def convolved(shape: tuple[int, ...], weight: tuple[int, ...], unit: ConvBN) -> tuple[int, int, int, int]:
    """The shape of a convolution's output."""
    sizes = [
        (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for n, kernel, stride, padding, dilation in zip(
            shape[2:], weight[2:], unit.stride, unit.padding, unit.dilation, strict=True
        )
    ]
    return shape[0], weight[0], sizes[0], sizes[1]


def _branch(
    saved: Saved, grad_out: Tensor, x: Tensor, params: Sequence[Tensor | None], plan: BlockPlan
) -> Iterator[_Found]:
    """Every saved tensor with what it must be, from the shapes of x and of the weights on."""
    state_dtype = _arithmetic(plan.dtype)
    last = len(plan.units) - 1
    ends: list[Branch | None] = [saved.last, saved.projection]
    shape = tuple(x.shape)
    for index, unit in enumerate(plan.all_units):
        given = tuple(x.shape) if index > last else shape
        weight = params[UNIT_PARAMS * index]
        assert weight is not None
        yield f"unit {index}'s convolution weight", weight, weight.dtype, (
            weight.shape[0], given[1] // unit.groups, *weight.shape[2:],
        )  # fmt: skip
        shape = convolved(given, tuple(weight.shape), unit)
        channels = shape[1]
        branch = ends[index - last] if index >= last else Branch(saved.ys[index], saved.states[index], None)
        assert branch is not None
        yield f"unit {index}'s state", branch.state, state_dtype, (4, channels)
        if branch.y is not None:
            yield f"unit {index}'s raw output", branch.y, plan.dtype, shape
        if branch.one_pass is not None:
            pivot, total, projected, folded = branch.one_pass
            yield f"unit {index}'s pivot", pivot, state_dtype, (given[1],)
            yield f"unit {index}'s total", total, torch.float64, (given[1],)
            yield f"unit {index}'s projection", projected, state_dtype, (channels, given[1])
            if folded is not None:
                yield f"unit {index}'s folded weight", folded, plan.dtype, (channels, given[1])
        if index >= last:
            yield "grad_out", grad_out, grad_out.dtype, shape
        yield from _vectors(params[UNIT_PARAMS * index :], channels)
        own = saved.weights[index] if index < len(saved.weights) else None
        if own is not None:
            yield f"unit {index}'s converted weight", own, plan.dtype, tuple(weight.shape)
    n, channels, height, width = grad_out.shape
    yield "the mask", saved.mask, torch.uint8, (n, height, width, (channels + 7) // 8)


def _vectors(params: Sequence[Tensor | None], channels: int) -> Iterator[_Found]:
    for vector in params[1:UNIT_PARAMS]:
        if vector is not None:
            yield "a norm's parameter", vector, vector.dtype, (channels,)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _refuse(what: str, name: str, tensor: Tensor, expected: str) -> None:
    raise RuntimeError(
        f"{what}: {name} must be {expected}, got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; "
        "hooks on saved tensors must return what was packed"
    )

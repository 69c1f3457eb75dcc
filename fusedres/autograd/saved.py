"""Checks of the tensors saved for backward: hooks may return other tensors, and kernels read them by address."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fusedres.autograd.graph import are_plain
from fusedres.autograd.memory import has_memory
from fusedres.autograd.plan import UNIT_PARAMS, BlockPlan, Branch, ConvBN, Inputs, Saved
from fusedres.values import arithmetic_dtype, mask_shape

Found = tuple[str, Tensor, torch.dtype, tuple[int, ...]]  # name, tensor, and the dtype and shape that it must have


def check_saved(
    saved: Saved, grad_out: Tensor, inputs: Inputs, params: Sequence[Tensor | None], plan: BlockPlan
) -> None:
    """Raise if a saved tensor lost its memory, or has another dtype, shape or device than the one that was saved."""
    check_each("backward of a fused block", grad_out.device, _of_block(saved, grad_out, inputs, params, plan))


def check_saved_stem(
    saved: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, x: Tensor, params: Sequence[Tensor | None], unit: ConvBN
) -> None:
    """Check a stem's argmax, raw output and state in the same way."""
    check_each("backward of a fused stem", grad_out.device, _of_stem(saved, grad_out, x, params, unit))


def check_each(what: str, device: torch.device, found: Iterable[Found]) -> None:
    """Check one tensor after the other, as what the later ones must be follows from the earlier ones."""
    compiling = torch.compiler.is_compiling()
    for name, tensor, dtype, shape in found:
        wrong = tensor.dtype is not dtype or tensor.shape != shape or tensor.device != device
        if wrong or not are_plain(tensor) or not (compiling or has_memory(tensor)):
            raise RuntimeError(
                f"{what}: {name} must be {dtype} of shape {shape} on {device}, in memory, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)} on {tensor.device}, a {type(tensor).__name__}, or without its memory; "
                "hooks on saved tensors must return what was packed"
            )


def _images(name: str, x: Tensor) -> Found:
    """Return the check of a batch of floating-point images of any size."""
    dtype = x.dtype if x.dtype.is_floating_point else torch.float32
    return name, x, dtype, tuple(x.shape) if x.dim() == 4 else (-1, -1, -1, -1)


def _weight(index: int, weight: Tensor, channels: int, unit: ConvBN) -> Found:
    kernel = tuple(weight.shape[2:]) if weight.dim() == 4 else (-1, -1)
    kernel = (1, 1) if unit.pixelwise else kernel
    return (
        f"unit {index}'s convolution weight",
        weight,
        weight.dtype,
        (weight.shape[0], channels // unit.groups, *kernel),
    )


def _vectors(params: Sequence[Tensor | None], channels: int) -> Iterator[Found]:
    for vector in params[1:UNIT_PARAMS]:
        if vector is not None:
            yield "a norm's parameter", vector, vector.dtype, (channels,)


def _of_block(
    saved: Saved, grad_out: Tensor, inputs: Inputs, params: Sequence[Tensor | None], plan: BlockPlan
) -> Iterator[Found]:
    """Yield every saved tensor with what it must be, which follows from the shapes of the inputs and the weights."""
    x, other = inputs.x, inputs.shortcut
    yield _images("x", x)
    yield _images("the shortcut's input", other)
    last = len(plan.units) - 1
    ends: list[Branch | None] = [saved.last, saved.projection]
    shape = tuple(x.shape)
    for index, unit in enumerate(plan.all_units):
        given = tuple(other.shape) if index > last else shape
        weight = params[UNIT_PARAMS * index]
        assert weight is not None
        yield _weight(index, weight, given[1], unit)
        shape = unit.output_shape(given, weight.shape)
        branch = ends[index - last] if index >= last else Branch(saved.ys[index], saved.states[index], None)
        assert branch is not None
        yield from _of_branch(f"unit {index}'s", branch, plan.dtype, given[1], shape)
        if index >= last:
            yield "grad_out", grad_out, grad_out.dtype, shape
        yield from _vectors(params[UNIT_PARAMS * index :], shape[1])
        own = saved.weights[index] if index < len(saved.weights) else None
        if own is not None:
            yield f"unit {index}'s converted weight", own, plan.dtype, tuple(weight.shape)
    if saved.mask is not None:
        yield "the mask", saved.mask, torch.uint8, mask_shape(grad_out)


def _of_branch(
    owner: str, branch: Branch, dtype: torch.dtype, channels: int, shape: tuple[int, int, int, int]
) -> Iterator[Found]:
    """Yield what is saved of a convolution with this many input channels and this output shape."""
    wide = arithmetic_dtype(dtype)
    yield f"{owner} state", branch.state, wide, (4, shape[1])
    if branch.y is not None:
        yield f"{owner} raw output", branch.y, dtype, shape
    if branch.one_pass is not None:
        pivot, total, projected, folded = branch.one_pass
        yield f"{owner} pivot", pivot, wide, (channels,)
        yield f"{owner} total", total, torch.float64, (channels,)
        yield f"{owner} projection", projected, wide, (shape[1], channels)
        if folded is not None:
            yield f"{owner} folded weight", folded, dtype, (shape[1], channels)


def _of_stem(
    saved: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, x: Tensor, params: Sequence[Tensor | None], unit: ConvBN
) -> Iterator[Found]:
    argmax, y, state = saved
    weight = params[0]
    assert weight is not None
    yield _images("x", x)
    yield _weight(0, weight, x.shape[1], unit)
    shape = unit.output_shape(x.shape, weight.shape)
    n, channels, height, width = shape
    pooled = (n, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    yield "the raw output", y, grad_out.dtype, shape
    yield "the argmax", argmax, torch.uint8, pooled
    yield "the state", state, arithmetic_dtype(y.dtype), (4, channels)
    yield "grad_out", grad_out, grad_out.dtype, pooled
    yield from _vectors(params, channels)

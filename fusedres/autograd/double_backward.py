"""Gradients that can be differentiated again: torch's own differentiable operators compute the block or stem again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres.autograd.plan import BlockPlan, ConvBN, Inputs, Saved, StemPlan, Tensors


def differentiable_block(
    grad_out: Tensor,
    inputs: Inputs,
    plan: BlockPlan,
    params: Sequence[Tensor | None],
    saved: Saved,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of x, of every unit's parameters, and of the other input; what is not needed stays None."""
    states = [*saved.states, saved.last.state]
    if saved.projection is not None:
        states.append(saved.projection.state)
    constants = [None if unit.batch_statistics else state for unit, state in zip(plan.all_units, states, strict=True)]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x, *params, other = _aliases(inputs.x, *params, inputs.other)
        assert x is not None
        out = _block(Inputs(x, other), plan, tuple(params), constants)
    return _gradients(out, grad_out, (x, *params, other), needs, again)


def differentiable_stem(
    grad_out: Tensor, x: Tensor, plan: StemPlan, params: Sequence[Tensor | None], state: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x and of the unit's parameters; what is not needed stays None."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        images, *params = _aliases(x, *params)
        assert images is not None
        out = _stem(images, plan.unit, tuple(params), None if plan.unit.batch_statistics else state, plan.dtype)
    return _gradients(out, grad_out, (images, *params), needs, again)


def refuse_synchronised(what: str, units: Sequence[ConvBN]) -> None:
    """Raise if some statistics are those of several processes: torch's SyncBatchNorm has no such gradients either."""
    if any(unit.group is not None for unit in units):
        raise RuntimeError(
            f"backward of {what}: create_graph and batches of gradients must not be used with synchronised BatchNorm, "
            "got a group of processes; call backward without them"
        )


def _aliases(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors as views: a gradient with respect to one leaves out how others were computed from it.

    For example, x depends on the weights if the same block ran before. Not view_as: it changes the strides of a batch
    of one image, which torch's BatchNorm then differentiates wrongly.
    """
    return [None if tensor is None else torch.ops.aten.alias(tensor) for tensor in tensors]


def _gradients(
    out: Tensor, grad_out: Tensor, tensors: Tensors, needs: Sequence[bool], again: bool
) -> list[Tensor | None]:
    inputs = [tensor for tensor, need in zip(tensors, needs, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(out, inputs, grad_out.to(out.dtype), create_graph=again))
    return [next(found) if need else None for need in needs]


def _conv_bn(
    h: Tensor, unit: ConvBN, params: tuple[Tensor | None, ...], state: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return BatchNorm(conv(h)) with conv weight, BN weight, BN bias; state: of constant statistics (None: batch's)."""
    conv_weight, weight, bias = params
    assert conv_weight is not None
    y = torch.convolution(
        h.to(dtype),
        conv_weight.to(dtype),
        None,
        unit.stride,
        unit.padding,
        unit.dilation,
        False,
        (0, 0),
        unit.groups,
    )
    if state is None:
        return F.batch_norm(y, None, None, weight, bias, True, 0.0, unit.eps)
    normalised = (y.to(state.dtype) - state[0].view(1, -1, 1, 1)) * state[1].view(1, -1, 1, 1)
    if weight is not None:
        normalised = normalised * weight.to(state.dtype).view(1, -1, 1, 1)
    if bias is not None:
        normalised = normalised + bias.to(state.dtype).view(1, -1, 1, 1)
    return normalised.to(y.dtype)


def _stem(
    x: Tensor, unit: ConvBN, params: tuple[Tensor | None, ...], state: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the stem's output for the arguments of _conv_bn; running statistics are neither read nor updated."""
    return F.max_pool2d(_conv_bn(x, unit, params, state, dtype).relu(), 3, 2, 1)


def _block(inputs: Inputs, plan: BlockPlan, params: Tensors, constants: list[Tensor | None]) -> Tensor:
    """Return the block's output from its inputs and parameters; running statistics are neither read nor updated.

    params holds conv weight, BN weight and BN bias of every unit. constants holds the saved (4, C) state of every unit
    with constant statistics, and None for the others.
    """

    def normalised(h: Tensor, unit: ConvBN, index: int) -> Tensor:
        return _conv_bn(h, unit, params[3 * index : 3 * index + 3], constants[index], plan.dtype)

    h, x = inputs.x, inputs.shortcut
    for index, unit in enumerate(plan.units[:-1]):
        h = normalised(h, unit, index).relu()
    z = normalised(h, plan.units[-1], len(plan.units) - 1)
    if plan.reads == "none":
        return z.relu()
    if plan.projection is not None:
        return (z + normalised(x, plan.projection, len(plan.units))).relu()
    shortcut = x.to(z.dtype)[:, :, :: plan.pad_stride, :: plan.pad_stride]
    return (z + F.pad(shortcut, (0, 0, 0, 0, 0, z.shape[1] - shortcut.shape[1]))).relu()

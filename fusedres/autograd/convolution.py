"""The convolutions between the passes: torch's, or on a CPU this package's own where those were measured to be faster.

On a GPU, a plan says which convolutions are this package's own; they have BatchNorm on their load and store
(ops.conv_fprop and its gradients), and do not come here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.autograd.plan import ConvBN
from fusedres.kernels import cpu_convolution
from fusedres.kernels.cpu_convolution import Purpose
from fusedres.ops.launch import direct, launches
from fusedres.values import Geometry, Raw

_DENSE = (1, 1)


def convolution(h: Tensor, weight: Tensor, unit: ConvBN, backend: str, *, subsampled: bool = False) -> Tensor:
    """Return conv(h) in h's dtype and channels_last; subsampled: h has only the pixels that the stride takes."""
    if weight.dtype is not h.dtype:
        weight = weight.to(h.dtype)
    geometry = _geometry(unit, subsampled)
    if prefers_own(h.shape, weight, geometry, unit.groups, backend, Purpose.FORWARD):
        return cpu_convolution.convolve(h, weight, geometry)
    # Not torch.convolution: profilers count the operations of conv2d.
    y = torch.conv2d(h, weight, None, geometry.stride, geometry.padding, geometry.dilation, unit.groups)
    if not y.is_contiguous(memory_format=torch.channels_last):
        y = y.contiguous(memory_format=torch.channels_last)
    return y


def convolution_of(h: Raw, weight: Tensor, unit: ConvBN, backend: str, *, projects: bool) -> Tensor:
    """Return conv(h.y), with a state conv(relu(BN(h.y))); projects: the unit is a projection."""
    subsampled = unit.subsamples and projects
    source = h.y
    if h.state is not None or subsampled:
        source = launches(backend).bn_relu(h.y, h.state, None, unit.stride[0] if subsampled else 1)
    return convolution(source, weight, unit, backend, subsampled=subsampled)


def convolution_backward(
    grad: Tensor,
    h: Raw,
    weight: Tensor,
    unit: ConvBN,
    needs: tuple[bool, bool],
    backend: str,
    *,
    subsampled: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of what the convolution read (channels_last) and of weight (in its dtype).

    Each is None unless needed.

    Args:
        h: what it read, as h.y or with a state as relu(BN(h.y)).
        subsampled: it read only the pixels that the stride takes.
    """
    needs_input, needs_weight = needs
    if not (needs_input or needs_weight):
        return None, None
    same = weight if weight.dtype is grad.dtype else weight.to(grad.dtype)
    stride = unit.stride[0] if subsampled else 1
    geometry = _geometry(unit, subsampled)
    source = h
    if stride != 1:
        # Without the weight's gradient it is read for its size and layout alone.
        size = torch.empty_like(h.y[:, :, ::stride, ::stride], memory_format=torch.channels_last)
        source = Raw(launches(backend).bn_relu(h.y, h.state, None, stride) if needs_weight else size, None)

    def is_own(purpose: Purpose) -> bool:
        return prefers_own(source.y.shape, same, geometry, unit.groups, backend, purpose)

    own_weight = needs_weight and cpu_convolution.has_weight_gradient(same) and is_own(Purpose.WEIGHT_GRADIENT)
    own_input = needs_input and cpu_convolution.has_input_gradient(same, geometry) and is_own(Purpose.INPUT_GRADIENT)
    grad_h = cpu_convolution.input_gradient(grad, same, geometry) if own_input else None
    grad_weight = cpu_convolution.weight_gradient(grad, source, same, geometry) if own_weight else None
    missing = needs_input and not own_input, needs_weight and not own_weight
    if any(missing):
        if missing[1] and source.state is not None:
            source = Raw(launches(backend).bn_relu(source.y, source.state, None, 1), None)
        found = _library_backward(grad, source.y, same, unit, geometry, missing)
        grad_h, grad_weight = grad_h if own_input else found[0], grad_weight if own_weight else found[1]
    if grad_weight is not None and grad_weight.dtype is not weight.dtype:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_h, grad_weight


def prefers_own(
    x: Sequence[int], weight: Tensor, geometry: Geometry, groups: int, backend: str, purpose: Purpose
) -> bool:
    """Return whether this package's kernels run; what observes the ops sees torch's convolutions.

    Args:
        x: the shape of the input.
        weight: in the dtype of the convolution.
    """
    if backend != "cpu" or not direct():
        return False
    return cpu_convolution.is_faster(x, weight.shape, geometry, weight.dtype, groups, purpose)


def _geometry(unit: ConvBN, subsampled: bool) -> Geometry:
    return unit.geometry._replace(stride=_DENSE) if subsampled else unit.geometry


def _library_backward(
    grad: Tensor, h: Tensor, weight: Tensor, unit: ConvBN, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_h, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad,
        h,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        unit.groups,
        (*needs, False),
    )
    if grad_h is not None and not grad_h.is_contiguous(memory_format=torch.channels_last):
        grad_h = grad_h.contiguous(memory_format=torch.channels_last)
    return grad_h, grad_weight

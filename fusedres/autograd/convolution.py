"""The convolutions between the passes: torch's, or on a CPU what was measured to be faster.

That is this package's own in float32, and torch's product of matrices in bfloat16.

On a GPU, a plan says which convolutions are this package's own; they have BatchNorm on their load and store
(ops.conv_fprop and its gradients), and do not come here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.autograd import product
from fusedres.autograd.plan import ConvBN
from fusedres.kernels import cpu_convolution
from fusedres.kernels.cpu_convolution import Method, Purpose
from fusedres.ops.launch import direct, launches
from fusedres.values import Geometry, Raw

_DENSE = (1, 1)


def convolution(h: Tensor, weight: Tensor, unit: ConvBN, backend: str, *, subsampled: bool = False) -> Tensor:
    """Return conv(h) in h's dtype and channels_last; subsampled: h has only the pixels that the stride takes."""
    if weight.dtype is not h.dtype:
        weight = weight.to(h.dtype)
    geometry = _geometry(unit, subsampled)
    method = method_for(h.shape, weight, geometry, unit.groups, backend, Purpose.FORWARD)
    if method is Method.OWN:
        return cpu_convolution.convolve(h, weight, geometry)
    if method is Method.PRODUCT:
        return product.product(h, weight)
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

    def method(purpose: Purpose) -> Method:
        return method_for(source.y.shape, same, geometry, unit.groups, backend, purpose)

    grad_h: Tensor | None = None
    grad_weight: Tensor | None = None
    of_input = method(Purpose.INPUT_GRADIENT) if needs_input else Method.LIBRARY
    if of_input is Method.OWN and cpu_convolution.has_input_gradient(same, geometry):
        grad_h = cpu_convolution.input_gradient(grad, same, geometry)
    elif of_input is Method.PRODUCT:
        grad_h = product.input_gradient(grad, same)
    dense = needs_weight and cpu_convolution.has_weight_gradient(same)
    of_weight = method(Purpose.WEIGHT_GRADIENT) if dense else Method.LIBRARY
    if of_weight is Method.OWN:
        grad_weight = cpu_convolution.weight_gradient(grad, source, same, geometry)
    elif needs_weight and source.state is not None:
        source = Raw(launches(backend).bn_relu(source.y, source.state, None, 1), None)
    if of_weight is Method.PRODUCT:
        grad_weight = product.weight_gradient(grad, source.y, same, geometry)
    missing = needs_input and grad_h is None, needs_weight and grad_weight is None
    if any(missing):
        found = _library_backward(grad, source.y, same, unit, geometry, missing)
        grad_h, grad_weight = found[0] if missing[0] else grad_h, found[1] if missing[1] else grad_weight
    if grad_weight is not None and grad_weight.dtype is not weight.dtype:
        grad_weight = grad_weight.to(weight.dtype)
    return grad_h, grad_weight


def method_for(
    x: Sequence[int], weight: Tensor, geometry: Geometry, groups: int, backend: str, purpose: Purpose
) -> Method:
    """Return how a convolution runs; what observes the ops sees torch's convolutions.

    Args:
        x: the shape of the input.
        weight: in the dtype of the convolution.
    """
    if backend != "cpu" or not direct():
        return Method.LIBRARY
    return cpu_convolution.fastest_method(x, weight.shape, geometry, weight.dtype, groups, purpose)


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

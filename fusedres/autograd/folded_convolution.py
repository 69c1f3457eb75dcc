"""Convolutions with BatchNorm folded in, for inference: out = relu(scale⊙W * x + shift + S), S a shortcut or nothing.

There are three kinds. `PanelConvolution` is this package's own kernel for float32 on CPUs. `LibraryConvolution` is
oneDNN's, with a packed weight, and with the ReLU and the sum on its store. `PlainConvolution` is torch's, for every
other dtype and device, with a pass of this package after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.plan import ConvBN
from fusedres.kernels.cpu_convolution import Purpose, is_faster
from fusedres.kernels.packed_convolution import winograd_is_faster
from fusedres.ops.launch import launches
from fusedres.values import Packed, ShortcutInput, in_dtype


class PanelConvolution(NamedTuple):
    """This package's own kernel (ops.packed_convolution_out)."""

    packed: Packed
    identity: Tensor  # the state of a pass that only applies the ReLU
    unit: ConvBN

    def __call__(
        self, x: Tensor, shortcut: Tensor | None = None, relu: bool = True, out: Tensor | None = None
    ) -> Tensor:
        """Return the result in channels_last: out if it is given."""
        if out is None:
            shape = self.unit.output_shape(x.shape, (self.identity.shape[1], x.shape[1], *self.packed.kernel))
            out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        launches("cpu").packed_convolution_out(x, self.packed, self.unit.geometry, shortcut, relu, out)
        return out


_ADD_RELU: tuple[Any, ...] = ("add", 1.0, "relu", [], "")  # of oneDNN's store


class LibraryConvolution(NamedTuple):
    """oneDNN's, through the operators that torch keeps for compiled models."""

    weight: Tensor  # in oneDNN's own layout
    bias: Tensor
    identity: Tensor
    unit: ConvBN

    def __call__(
        self, x: Tensor, shortcut: Tensor | None = None, relu: bool = True, out: Tensor | None = None
    ) -> Tensor:
        """Return the result in channels_last: out if it is given."""
        if shortcut is None:
            after = "relu" if relu else "none"
            y: Tensor = torch.ops.mkldnn._convolution_pointwise.default(x, *self._arguments, after, [], "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(x, shortcut, *self._arguments, *_ADD_RELU)
        return _placed(y, out)

    def onto(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """Return the result with a shortcut in the shortcut's own memory."""
        y: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(shortcut, x, *self._arguments, *_ADD_RELU)
        return y

    @property
    def _arguments(self) -> tuple[Any, ...]:
        unit = self.unit
        return self.weight, self.bias, unit.padding, unit.stride, unit.dilation, unit.groups


class PlainConvolution(NamedTuple):
    """torch's, and a pass of this package after it."""

    weight: Tensor
    bias: Tensor
    identity: Tensor
    unit: ConvBN
    backend: str

    def __call__(
        self, x: Tensor, shortcut: Tensor | None = None, relu: bool = True, out: Tensor | None = None
    ) -> Tensor:
        """Return the result in channels_last: out if it is given."""
        unit = self.unit
        y = torch.conv2d(x, self.weight, self.bias, unit.stride, unit.padding, unit.dilation, unit.groups)
        y = y.contiguous(memory_format=torch.channels_last)
        if shortcut is not None:
            return add_shortcut(y, self.identity, ShortcutInput(shortcut), self.backend, out)
        if relu:
            launches(self.backend).bn_relu_(y, self.identity)
        return _placed(y, out)


FoldedConvolution = PanelConvolution | LibraryConvolution | PlainConvolution


def add_shortcut(y: Tensor, state: Tensor, shortcut: ShortcutInput, backend: str, out: Tensor | None) -> Tensor:
    """Run the add and the last ReLU; the result goes into out if it is given, else into y."""
    launch = launches(backend)
    if out is None:
        launch.bn_add_relu_(y, state, shortcut, False)
        return y
    launch.bn_add_relu_out(y, state, shortcut, out)
    return out


def fold(
    weight: Tensor,
    state: Tensor,
    unit: ConvBN,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
    *,
    purpose: Purpose,
) -> FoldedConvolution:
    """Fold a BatchNorm with constant statistics into the convolution before it, in float32 or wider; round once.

    Args:
        state: (4, K), of the BatchNorm.
        shape: (N, C, H, W) of the input. oneDNN packs weights for inputs of this shape: packed without one, a strided
            1x1 convolution of a few images took six times as long. Other shapes run too, some of them slower.
        dtype: of the convolution.
        purpose: FROZEN if the result is used for many calls, else FORWARD.
    """
    if uses_panels(shape, weight, unit, dtype, backend, purpose):
        return fold_panels(weight, state, unit, shape, backend, purpose)
    bias, identity = state[3].to(dtype), _identity_of(state)
    folded = (weight.detach().to(state.dtype) * state[2].view(-1, 1, 1, 1)).to(dtype)
    if weight.is_cpu and _onednn_packs(dtype):
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            folded.contiguous(), unit.padding, unit.stride, unit.dilation, unit.groups, list(shape)
        )
        return LibraryConvolution(packed, bias, identity, unit)
    return PlainConvolution(folded, bias, identity, unit, backend)


def uses_panels(
    shape: Sequence[int], weight: Tensor, unit: ConvBN, dtype: torch.dtype, backend: str, purpose: Purpose
) -> bool:
    """Return whether this package's own kernel runs a convolution of inference; shape: of the input."""
    if backend != "cpu":
        return False
    return is_faster(shape, weight.shape, unit.geometry, dtype, unit.groups, purpose)


def fold_panels(
    weight: Tensor, state: Tensor, unit: ConvBN, shape: Sequence[int], backend: str, purpose: Purpose
) -> PanelConvolution:
    """Fold as `fold` does, for this package's own kernel."""
    winograd = winograd_is_faster(shape, weight.shape, unit.geometry, packed_before=purpose is Purpose.FROZEN)
    panels = launches(backend).pack_weight(in_dtype(weight.detach(), state.dtype), unit.dilation, state[2], winograd)
    packed = Packed(panels, state[3].clone(), tuple(weight.shape[2:]), winograd)
    return PanelConvolution(packed, _identity_of(state), unit)


def _identity_of(state: Tensor) -> Tensor:
    identity = torch.zeros_like(state)
    identity[1:3] = 1
    return identity


@cache
def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether torch's oneDNN runs convolutions of this dtype on this CPU with packed weights."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def _placed(y: Tensor, out: Tensor | None) -> Tensor:
    y = y.contiguous(memory_format=torch.channels_last)
    return y if out is None else out.copy_(y)

"""What FusedBasicBlock and FusedBottleneck share: reading a block's live settings, checking its input, running it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from typing_extensions import Self

from fusedres.autograd import BlockPlan, ConvBN, Directions, count_path, run_block
from fusedres.backends import backend_for
from fusedres.dispatch import Way, measured
from fusedres.modules.anatomy import unusual
from fusedres.modules.choice import images_at_a_time, measured_way, one_pass_units, own_products
from fusedres.modules.frozen import FrozenBlock, fold, input_kind, run_frozen

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class FusedBlock(nn.Module):
    """Mixin in front of a torchvision block: forward runs fused wherever that is the same computation.

    Everything is read from the children at each call. Where a part is unusual (`unfused_reason`), or a functorch
    transform is active, the stock forward runs instead.
    """

    fused_memory: str = "auto"
    fused_conv: str = "auto"
    fused_frozen: FrozenBlock | Literal[True] | None = None  # True: to be folded at the next call
    _conv_names: tuple[str, ...] = ()
    _norm_names: tuple[str, ...] = ()

    def unfused_reason(self) -> str | None:
        """Why the stock forward runs on the parameters' device, or None where the block is fused."""
        reason = unusual(self, self._conv_names, self._norm_names)
        if reason is not None:
            return reason
        return without_kernels(self.__dict__["_modules"][self._conv_names[0]].weight)

    def forward(self, x: Tensor) -> Tensor:
        """relu(F(x) + S(x)); see the class."""
        if not is_plain(x):
            return self._unfused(x)
        if unusual(self, self._conv_names, self._norm_names) is not None:
            return self._unfused(x)
        device = x.device
        backend, way = backend_for(device), None
        if backend is None or (x.dim() == 4 and x.shape[0] == 0):
            return self._unfused(x)
        if measured(device) and x.dim() == 4:
            way = measured_way(self, self._conv_names, x, backend, self.fused_conv, self.fused_memory)
            if way is not None and way.backend is not None:
                backend = way.backend
            elif way is not None:
                if self.fused_frozen is None or not x.is_cpu:
                    return self._unfused(x)
                way = None  # freeze() asked for it, and the CPU's kernels are verified
        plan, tensors = self._read(x, backend, way)
        if self.fused_frozen is not None and self._is_constant(x, plan, tensors):
            if self.fused_frozen is True or self.fused_frozen.kind != input_kind(x, plan):
                self.fused_frozen = fold(x, plan, tensors)
            count_path("frozen_forward")
            return run_frozen(x, plan, self.fused_frozen)
        return run_block(x, plan, tensors)

    def train(self, mode: bool = True) -> Self:
        """Also drops what fusedres.freeze kept, where mode is True."""
        if mode:
            self.fused_frozen = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle of a frozen block is not frozen: folds stay with the block that they were made for."""
        return {name: value for name, value in self.__dict__.items() if name != "fused_frozen"}

    @staticmethod
    def _is_constant(x: Tensor, plan: BlockPlan, tensors: tuple[Tensor | None, ...]) -> bool:
        """No gradient is wanted, and no statistics depend on the batch."""
        units = plan.units if plan.projection is None else (*plan.units, plan.projection)
        if any(unit.batch_statistics for unit in units):
            return False
        return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, *tensors))

    def _unfused(self, x: Tensor) -> Tensor:
        count_path("unfused")
        result: Tensor = super().forward(x)
        return result

    def _read(self, x: Tensor, backend: str, way: Way | None = None) -> tuple[BlockPlan, tuple[Tensor | None, ...]]:
        """The plan of this call and its tensors, after every check: nothing is computed or updated before."""
        op = type(self).__name__
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
        dtype = convolution_dtype(op, x, autocast)
        modules = self.__dict__["_modules"]
        units: list[ConvBN] = []
        tensors: list[Tensor | None] = []
        shape = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        for conv_name, norm_name in zip(self._conv_names, self._norm_names, strict=True):
            shape = add_unit(
                op,
                conv_name,
                modules[conv_name],
                norm_name,
                modules[norm_name],
                x,
                dtype,
                autocast,
                shape,
                units,
                tensors,
                own_products(self.fused_conv, backend, modules[conv_name], way),
            )
        downsample = modules.get("downsample")
        projection: ConvBN | None = None
        pad_stride = 1
        reached = (x.shape[0], x.shape[1], x.shape[2], x.shape[3])
        if type(downsample) is nn.Sequential:
            conv, norm = downsample
            ends: list[ConvBN] = []
            own = own_products(self.fused_conv, backend, conv, way)
            reached = add_unit(
                op, "downsample.0", conv, "downsample.1", norm, x, dtype, autocast, reached, ends, tensors, own
            )
            projection = ends[0]
        elif downsample is not None:
            if x.shape[1] != downsample.in_channels:
                raise ValueError(
                    f"{op}: x must have {downsample.in_channels} channels for downsample, got shape {tuple(x.shape)}; "
                    f"use ZeroPadShortcut({x.shape[1]}, ...)"
                )
            pad_stride = downsample.stride
            reached = (
                x.shape[0],
                downsample.out_channels,
                -(-x.shape[2] // pad_stride),
                -(-x.shape[3] // pad_stride),
            )
        if reached != shape:
            raise ValueError(
                f"{op}: the shortcut must have shape {shape} like the residual branch, got {reached}; "
                "give the block a downsample (1x1 convolution + BatchNorm, or ZeroPadShortcut) that reaches it"
            )
        asked = self.fused_memory == "min"
        found = way is not None and way.one_pass and self.fused_conv == "auto"
        one_pass = one_pass_units(asked or found, units, projection, tensors, shape)
        images = images_at_a_time(x, shape)
        plan = BlockPlan(tuple(units), projection, pad_stride, one_pass, images, dtype, backend)
        return plan, tuple(tensors)


def is_plain(x: Tensor) -> bool:
    """No tensor subclass, no lazy negation, and nothing active that must see torch's own operators.

    That is a functorch transform, torch.jit.trace, or forward-mode differentiation.
    """
    if type(x) not in (Tensor, nn.Parameter) or torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    return not x.is_neg() and torch._C._get_tracing_state() is None and forward_ad._current_level < 0


def without_kernels(weight: Tensor) -> str | None:
    """Why nothing runs fused on a weight's dtype and device, or None where it does."""
    if weight.dtype not in _FLOATING:
        return f"weights are {weight.dtype}"
    device = weight.device
    if backend_for(device) is None:
        return (
            f"nothing was measured on this {device.type} device: `python -m fusedres tune` does, or select a backend "
            "with use_backend"
        )
    return None


def convolution_dtype(op: str, x: Tensor, autocast: bool) -> torch.dtype:
    """The dtype that convolutions of x run in, after a check of x."""
    if x.dim() != 4:
        raise ValueError(
            f"{op}: x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}; add a batch dimension"
        )
    if x.dtype not in _FLOATING:
        raise TypeError(
            f"{op}: x must be float32, float64, bfloat16 or float16, got {x.dtype}; convert it, e.g. x.float()"
        )
    if autocast and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def add_unit(
    op: str,
    conv_name: str,
    conv: Any,
    norm_name: str,
    norm: Any,
    x: Tensor,
    dtype: torch.dtype,
    autocast: bool,
    shape: tuple[int, int, int, int],
    units: list[ConvBN],
    tensors: list[Tensor | None],
    own: Directions,
) -> tuple[int, int, int, int]:
    """Appends a checked unit and its tensors; returns the shape behind it."""
    conv_weight: Tensor = conv.__dict__["_parameters"]["weight"]
    out_channels, in_channels, kernel_h, kernel_w = conv_weight.shape
    groups = conv.groups
    if shape[1] != in_channels * groups:
        raise ValueError(
            f"{op}: {'x' if shape == x.shape else 'its input'} must have {in_channels * groups} channels (dim 1) for "
            f"{conv_name}, got shape {shape}; give it a convolution of {shape[1]} input channels, or another input"
        )
    if conv_weight.device != x.device:
        raise RuntimeError(f"{op}: {conv_name}.weight must be on {x.device} like x, got {conv_weight.device}; move one")
    if conv_weight.dtype is not x.dtype and not autocast:
        raise TypeError(
            f"{op}: {conv_name}.weight must be {x.dtype} like x, got {conv_weight.dtype}; convert one or use autocast"
        )
    stride, padding, dilation = conv.stride, conv.padding, conv.dilation
    height = (shape[2] + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1
    width = (shape[3] + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: the input of {conv_name} must be larger than its kernel, got shape {shape}; use larger images"
        )

    parameters, buffers = norm.__dict__["_parameters"], norm.__dict__["_buffers"]
    running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    batches = buffers["num_batches_tracked"]
    vectors = (parameters["weight"], parameters["bias"], running_mean, running_var)
    for vector in vectors:
        if vector is None:
            continue
        if vector.shape != (out_channels,):
            raise ValueError(
                f"{op}: {norm_name} must have {out_channels} channels like {conv_name}, got {tuple(vector.shape)}; "
                f"replace it by BatchNorm2d({out_channels})"
            )
        if vector.dtype is not dtype and vector.dtype is not torch.float32:
            raise TypeError(f"{op}: {norm_name} must be {dtype} or float32, got {vector.dtype}; convert it")
        if vector.device != x.device:
            raise RuntimeError(f"{op}: {norm_name} must be on {x.device} like x, got {vector.device}; move one")
    batch_statistics = norm.training or running_mean is None
    if batch_statistics and shape[0] * height * width == 1:
        size = torch.Size((shape[0], out_channels, height, width))
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    update = norm.training and norm.track_running_stats
    momentum = norm.momentum
    if momentum is None and batches is None:
        momentum = 0.0  # as in torch: without a counter nothing is averaged in
    pixelwise = kernel_h == kernel_w == 1 == groups and padding == (0, 0) and stride[0] == stride[1]
    units.append(
        ConvBN(stride, padding, dilation, groups, pixelwise, batch_statistics, update, momentum, norm.eps, own)
    )
    tensors += (conv_weight, *vectors, batches)
    return shape[0], out_channels, height, width

"""torchvision's dense blocks and transitions (DenseNet), fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.utils import _pair
from torchvision.models.densenet import _DenseBlock, _DenseLayer, _Transition

from fusedres.autograd import count_path, run_dense_block, wants_gradients
from fusedres.modules.anatomy import Gathered, Unit, anatomy_of
from fusedres.modules.calls import holds_inference_tensors, keep_reason, options_of, unusual_input
from fusedres.modules.choice import not_measured, not_yet_run, serving_backend
from fusedres.modules.freezable import Freezable
from fusedres.modules.gathering import gather_unit
from fusedres.modules.genuine import class_attribute, replaced_code, replaced_on_block, touched
from fusedres.modules.norm_act_conv import run_unit, standing_reason
from fusedres.modules.reading import read_dense_block, read_input
from fusedres.modules.running import run_unfused
from fusedres.ops._sizes import FLOATING

_STEPS = (("conv1", "norm1", "relu1"), ("conv2", "norm2", "relu2"))
_OF_LAYER = tuple(name for step in _STEPS for name in step)
_OF_TRANSITION = ("norm", "relu", "conv", "pool")
_LAYER_METHODS = ("bn_function", "any_requires_grad", "call_checkpoint_bottleneck")
_AVERAGE = nn.AvgPool2d.forward
_ORDINARY = 64  # height and width of images, in pixels, that any dense block accepts


class FusedDense(Freezable):
    """Mixin of the fused classes of a DenseNet's parts; it comes before torchvision's class in the bases."""

    fused_memory: str = "auto"  # changes nothing on a CPU; see fuse()
    fused_conv: str = "auto"
    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _stock: type[nn.Module] = nn.Module  # the class with the unfused forward
    _base: type[nn.Module] = nn.Module  # torchvision's class that it descends from


def _backend(module: nn.Module, device: torch.device) -> tuple[str, None] | tuple[None, str]:
    """Return the backend that serves a device, or why the stock forward runs there."""
    options = options_of(module)
    reason = not_yet_run("a dense block has", device, options.conv, options.memory)
    backend = serving_backend(device, options.conv, options.memory)
    if backend is None or reason is not None:
        return None, not_measured(device) if backend is None else reason or ""
    return backend, None


def _replaced(module: nn.Module, cls: Any) -> str | None:
    """Return which code that a fused module bypasses was replaced, or None."""
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    return replaced_code(cls, cls._base) or replaced_on_block(module.__dict__)


class FusedDenseBlock(FusedDense, _DenseBlock):
    """torchvision's _DenseBlock on one buffer: same constructor, children, state_dict and results.

    x_l = conv2_l(relu(norm2_l(conv1_l(relu(norm1_l([x_0, …, x_{l−1}])))))), and the result is [x_0, …, x_L]. The layers
    read a prefix of the result and write a slice of it, so that no concatenation is copied. The statistics of a channel
    are computed once, although each later layer normalises it (Huang et al. 2017, https://arxiv.org/abs/1608.06993).

    Shape: x (N, C, H, W) to (N, C + layers·growth_rate, H, W) in x's memory format; channels_last is the fast one.
    Dtypes: float32, float64, bfloat16, float16.

    Saved for backward: the result, and the result of each layer's conv1. The result must not be changed in place before
    backward, else torch raises its error. memory_efficient is not needed and changes nothing: its checkpoints would
    save more, and would update the running statistics of each norm1 twice.

    Not fused, but run as torchvision's: layers with dropout in training, with hooks, or with other modules in them.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device; nothing is updated then.
    """

    _stock = _DenseBlock
    _base = _DenseBlock

    def unfused_reason(self) -> str | None:
        """Return why the stock forward runs on the parameters' device, or None if the block is fused."""
        units = _units_of(self, type(self))
        if isinstance(units, str):
            return units
        weight = units[0].conv_weight
        if weight.dtype not in FLOATING:
            return f"weights are {weight.dtype}"
        return _backend(self, weight.device)[1] or _reason_of_shapes(type(self).__name__, units)

    def forward(self, init_features: Tensor) -> Tensor:
        """Return the input and what each layer appends to it; see the class."""
        cls: Any = type(self)
        if not issubclass(cls, FusedDenseBlock):  # another thread called unfuse() just now
            result: Tensor = cls.forward(self, init_features)
            return result
        x = init_features
        reason = unusual_input(x)
        if reason is None and torch.compiler.is_compiling():
            reason = "torch.compile fuses torch's operators itself"
        if reason is not None:
            return run_unfused(cls, self, x, reason)
        backend, reason = _backend(self, x.device)
        if backend is None:
            return run_unfused(cls, self, x, reason)
        units = _units_of(self, cls)
        if isinstance(units, str):
            return run_unfused(cls, self, x, None)
        plan = read_dense_block(read_input(cls.__name__, x, backend, "library", None), units)
        if isinstance(plan, str) or x.numel() == 0:
            return run_unfused(cls, self, x, plan if isinstance(plan, str) else "the batch was empty")
        tensors = tuple(tensor for unit in units for tensor in unit.tensors)
        recorded = wants_gradients(x, tensors)
        if holds_inference_tensors(x, tensors, recorded or any(unit.update for unit in plan.units)):
            return run_unfused(cls, self, x, "a tensor was made in inference mode")
        out = run_dense_block(x, plan, tensors, recorded)
        keep_reason(self, "")
        return out


def _units_of(block: nn.Module, cls: Any) -> tuple[Unit, ...] | str:
    """Return two units of each layer, a convolution with the norm before it, or why no input runs fused."""
    reason = _replaced(block, cls) or class_attribute(_DenseLayer, _OF_LAYER)
    if reason is not None:
        return reason
    if "items" in block.__dict__:
        return "items is replaced on the instance"
    if not block._modules:
        return "it has no layers"
    raw = []
    for name, layer in block._modules.items():
        reason = _reason_of_layer(name, layer)
        if reason is not None:
            return reason
        assert layer is not None
        children = layer._modules
        for conv, norm, _ in _STEPS:
            unit = gather_unit(f"{name}.{conv}", f"{name}.{norm}", children[conv], children[norm])
            if isinstance(unit, str):
                return unit
            if unit.group is not None:
                return f"{unit.norm_name} is synchronised"
            raw.append(unit)
    anatomy = anatomy_of(Gathered(tuple(raw)))
    return anatomy if isinstance(anatomy, str) else anatomy.units


def _reason_of_layer(name: str, layer: nn.Module | None) -> str | None:
    """Return why a layer of a dense block is no plain _DenseLayer, or None."""
    if layer is None or type(layer) is not _DenseLayer:
        return f"{name} is a {type(layer).__name__}, not a _DenseLayer"
    reason = touched(name, layer)
    if reason is not None:
        return reason
    attributes = layer.__dict__
    for method in _LAYER_METHODS:
        if method in attributes:
            return f"{name}.{method} is replaced on the instance"
    children = layer._modules
    for child in _OF_LAYER:
        if child in attributes or children.get(child) is None:
            return f"{name}.{child} is not a module"
    for _, _, relu in _STEPS:
        module = children[relu]
        assert module is not None
        reason = touched(f"{name}.{relu}", module)
        if reason is not None or type(module) is not nn.ReLU:
            return reason or f"{name}.{relu} is a {type(module).__name__}, not a ReLU"
    drop_rate: Any = attributes.get("drop_rate")
    if type(drop_rate) not in (int, float) or (drop_rate > 0 and layer.training):
        return f"{name} has drop_rate {drop_rate} in training"
    return None


def _reason_of_shapes(op: str, units: tuple[Unit, ...]) -> str | None:
    """Return why a batch of ordinary images does not run fused (for example, parts that do not fit), or None."""
    first = units[0]
    x = first.conv_weight.detach().new_empty(1).expand(2, first.conv_weight.shape[1], _ORDINARY, _ORDINARY)
    given = read_input(op, x, "reference", "library", None)
    try:
        found = read_dense_block(given, units)
    except (RuntimeError, ValueError) as error:
        return f"it raises: {error}"
    return found if isinstance(found, str) else None


class FusedTransition(FusedDense, _Transition):
    """torchvision's _Transition with norm, ReLU and convolution as one step (NormActConv): same children and results.

    An average over 2x2 windows commutes with a 1x1 convolution: pool(conv(h)) = conv(pool(h)). So the convolution runs
    on a quarter of the pixels. Saved for backward is the input alone. Another pool is called after the convolution.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device; nothing is updated then.
    """

    _stock = _Transition
    _base = _Transition

    def unfused_reason(self) -> str | None:
        """Return why the stock forward runs on the parameters' device, or None if the module is fused."""
        reason = _of_transition(self, type(self))
        if reason is not None:
            return reason
        children: Any = self._modules
        reason = standing_reason(("norm", children["norm"]), children["relu"], {"conv": children["conv"]})
        return reason or _backend(self, children["conv"].weight.device)[1]

    def forward(self, input: Tensor) -> Tensor:
        """Return pool(conv(relu(norm(input)))); see the class."""
        cls: Any = type(self)
        if not issubclass(cls, FusedTransition):  # another thread called unfuse() just now
            result: Tensor = cls.forward(self, input)
            return result
        reason = unusual_input(input) or _of_transition(self, cls) or _backend(self, input.device)[1]
        if reason is not None:
            return run_unfused(cls, self, input, reason)
        children: Any = self._modules
        convs = {"conv": children["conv"]}
        pooled = _commutes(children["conv"], children["pool"]) and min(input.shape[-2:]) > 1
        (h,), reason = run_unit(cls.__name__, input, ("norm", children["norm"]), children["relu"], convs, pooled=pooled)
        if reason is not None:
            count_path("unfused")
        keep_reason(self, reason or "")
        result = h if pooled and reason is None else children["pool"](h)
        return result


def _commutes(conv: Any, pool: Any) -> bool:
    """Whether a pool is a plain average over 2x2 windows, after a 1x1 convolution of every pixel."""
    if type(pool) is not nn.AvgPool2d or type(conv) is not nn.Conv2d or touched("pool", pool) is not None:
        return False
    if type(pool).forward is not _AVERAGE or pool.ceil_mode or pool.divisor_override is not None:
        return False
    sizes = (pool.kernel_size, pool.stride, pool.padding, conv.kernel_size, conv.stride, conv.padding)
    return [_pair(size) for size in sizes] == [(2, 2), (2, 2), (0, 0), (1, 1), (1, 1), (0, 0)]


def _of_transition(module: nn.Module, cls: Any) -> str | None:
    """Return why a transition is no plain _Transition, or None."""
    reason = _replaced(module, cls)
    if reason is not None:
        return reason
    if tuple(module._modules) != _OF_TRANSITION or None in module._modules.values():
        return f"its children are {', '.join(module._modules)}"
    return None

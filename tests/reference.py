"""The oracle: torchvision's unfused residual block in float64, with its inputs and parameters.

Nothing of the tested package is imported here. One run of a block gives named tensors:

    out                                 the output
    grad_x, grad.<parameter>            every gradient
    stats.<norm>.running_mean, ...      running statistics and num_batches_tracked after the step

`oracle` runs the stock block in float64, from exactly the parameters and the input of the tested dtype. It adds to each
of these tensors what the tolerance rule (tolerance.py) needs, which rounding.py computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rounding import Bounds, Layer, Oracle, Values, record_layers
from shapes import Case
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

STOCK = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ZeroPad(nn.Module):
    """Shortcut of option A (He et al. 2015): strided subsampling; added channels are zero and come last."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.added = out_channels - in_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


def _projection(in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


def build(
    case: Case,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """Return a stock block with seeded parameters: BatchNorm weights of both signs, biases and statistics not 0 or 1.

    Any two values per channel normalise to ±1, so that the exact gradients are zero and only rounding is left. Such
    cases get an eps that keeps them well-posed.
    """
    if norm is None:
        norm = partial(nn.BatchNorm2d, eps=0.5) if case.values_a_channel == 2 else nn.BatchNorm2d
    downsample = None
    if case.shortcut == "projection":
        downsample = _projection(case.in_channels, case.out_channels, case.stride, norm)
    elif case.shortcut == "zeropad":
        downsample = ZeroPad(case.in_channels, case.out_channels, case.stride)
    block = STOCK[case.block](case.in_channels, case.planes, case.stride, downsample, norm_layer=norm)
    randomize(block, case.seed)
    return block.to(dtype=dtype, memory_format=memory_format)


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Set seeded parameters, drawn in float64, in every convolution and BatchNorm of a module."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 17)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.weight.copy_(draw(child.weight) * (2.0 / child.weight[0].numel()) ** 0.5)
        elif isinstance(child, nn.BatchNorm2d):
            if child.weight is not None:
                sign = torch.where(draw(child.weight) > -0.8, 1.0, -1.0)
                child.weight.copy_(sign * (0.75 + 0.5 * torch.sigmoid(draw(child.weight))))
            if child.bias is not None:
                child.bias.copy_(0.3 * draw(child.bias))
            if child.running_mean is not None:
                child.running_mean.copy_(0.2 * draw(child.running_mean))
                child.running_var.copy_(0.5 + torch.sigmoid(draw(child.running_var)))
    return module


def inputs(
    case: Case, dtype: torch.dtype = torch.float32, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, Tensor]:
    """Return the input of the block and the gradient of its output."""
    generator = torch.Generator().manual_seed(7_919 * case.seed + 5)
    x = torch.randn(case.batch, case.in_channels, case.height, case.width, generator=generator, dtype=torch.float64)
    size = (-(-case.height // case.stride), -(-case.width // case.stride))
    grad = torch.randn(case.batch, case.out_channels, *size, generator=generator, dtype=torch.float64)
    return x.to(dtype).to(memory_format=memory_format), grad.to(dtype).to(memory_format=memory_format)


@torch.no_grad()
def separate(model: nn.Module, x: Tensor) -> None:
    """Move BatchNorm biases by at most 0.5, so that no pre-activation lies near zero, where rounding flips a mask.

    In each channel, zero is put into the middle of the widest gap between two pre-activations. This works on blocks
    and on whole ResNets, in their current mode; only the biases change.
    """
    copied = copy.deepcopy(model).double()
    dtype = next(model.parameters()).dtype
    for parent in list(copied.modules()):
        relu = getattr(parent, "relu", None)
        if isinstance(relu, nn.ReLU):
            norms = iter([child for child in ("bn1", "bn2", "bn3") if hasattr(parent, child)])

            def shift(
                _: nn.Module, args: tuple[Tensor], parent: nn.Module = parent, norms: Iterator[str] = norms
            ) -> Tensor:
                bias = getattr(parent, next(norms)).bias
                if bias is None:
                    return args[0]
                moved = (bias - _widest_gap(args[0])).to(dtype).double()
                difference = moved - bias
                bias.copy_(moved)
                return args[0] + difference.view(1, -1, 1, 1)

            relu.register_forward_pre_hook(shift)
    copied(x.double())
    moved = dict(copied.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(moved[name])


def _widest_gap(values: Tensor) -> Tensor:
    """Return, for each channel of (N, C, H, W), the middle of the widest gap between two values within 0.5 of zero."""
    ordered = values.transpose(0, 1).flatten(1).sort(1).values
    middle = (ordered[:, 1:] + ordered[:, :-1]) / 2
    width = ordered.diff(dim=1) * (middle.abs() <= 0.5)
    # Zero itself is the last candidate; its width is twice the distance to the nearest value.
    middle = torch.cat([middle, torch.zeros_like(ordered[:, :1])], 1)
    width = torch.cat([width, 2 * ordered.abs().amin(1, keepdim=True)], 1)
    return middle.gather(1, width.argmax(1, keepdim=True)).flatten()


def set_mode(block: nn.Module, mode: str) -> nn.Module:
    """Set `train`, `eval`, `frozen` (a training block with all BatchNorms in eval) or `frozen:bn1,bn2` (only these)."""
    block.train(mode != "eval")
    frozen = [name for name, child in block.named_modules() if isinstance(child, nn.BatchNorm2d)]
    if mode.startswith("frozen:"):
        frozen = mode.removeprefix("frozen:").split(",")
    elif mode != "frozen":
        frozen = []
    for name in frozen:
        block.get_submodule(name).eval()
    return block


def run(block: nn.Module, x: Tensor, grad: Tensor, autocast: torch.dtype | None = None) -> Values:
    """Run the block forward and backward in its current state; return the tensors named in the file head."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    block.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = block(x)
    out.backward(grad.to(out.dtype))
    return collect(block, x, out)


def collect(block: nn.Module, x: Tensor, out: Tensor) -> Values:
    values: Values = {"out": out.detach()}
    if x.grad is not None:
        values["grad_x"] = x.grad
    values |= {f"grad.{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    values |= {f"stats.{name}": buffer.detach().clone() for name, buffer in block.named_buffers()}
    return values


def oracle(block: nn.Module, x: Tensor, grad: Tensor, unit: float = 2.0**-24) -> Oracle:
    """Run a float64 copy of a stock block. `unit` is the unit roundoff of the tested dtype, for `at_risk`."""
    block = copy.deepcopy(block).double().to(memory_format=torch.contiguous_format)
    before = {name: b.detach().clone() for name, b in block.named_buffers() if b.is_floating_point()}
    records = record_layers(block)
    x, grad = x.detach().double().contiguous(), grad.detach().double().contiguous()
    result = Oracle(run(block, x, grad), {}, {})
    if x.numel() and all(record.grad.numel() for record in records.values()):
        Bounds(block, records, before, result, unit).fill(x, grad)
    return result


def stem_oracle(model: nn.Module, x: Tensor, grad: Tensor) -> Oracle:
    """Do the same for a ResNet that is its stem alone: its layers, average pool and classifier are identities."""
    model = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
    before = {name: b.detach().clone() for name, b in model.named_buffers() if b.is_floating_point()}
    records = record_layers(model)
    result = Oracle(run(model, x.double().contiguous(), grad.double()), {}, {})
    layer = Layer("bn1", records, before)
    terms, squared = layer.forward(torch.zeros_like(layer.z))
    pooled = (F.max_pool2d(v, 3, 2, 1).flatten(1) for v in (terms, squared.sqrt()))
    bounds = {"out": tuple(pooled)} | {
        f"stats.bn1.{name}": (t, v.sqrt()) for name, (t, v) in layer.statistics().items()
    }
    for name, (t, v) in layer.backward(torch.zeros_like(layer.d)).items():
        bounds["grad_x" if name == "input" else f"grad.{name}"] = (t, v.sqrt())
    for name, (t, spread) in bounds.items():
        result.terms[name], result.spread[name] = t, spread
    return result

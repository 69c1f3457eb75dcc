"""The oracle: torchvision's unfused residual block in float64, and how far rounding may carry its numbers.

Nothing of the tested package is imported here. One run of a block gives named tensors:

    out                                 the output
    grad_x, grad.<parameter>            every gradient
    stats.<norm>.running_mean, ...      running statistics and num_batches_tracked after the step

`oracle` runs the stock block in float64 from the very parameters and input of the tested dtype and adds, tensor by
tensor, what the tolerance rule (tolerance.py) needs:

    terms    sum of |terms| of the last reduction that makes the value: a worst case for its accumulator,
    spread   first-order standard deviation, in unit roundoffs, if every stored value and every term carries an
             independent relative error of one unit roundoff; errors propagate through the block as its values do,
    at_risk  how many pre-activations lie within 4 of those deviations of zero: their ReLU masks are up to rounding
             (`separate` chooses BatchNorm biases so that there are next to none).

With z the input of a convolution of weight w, y its output, x̂ = (y - mean)·invstd over M values a channel, d the
gradient at the BatchNorm's output, dy the one at its input, and V(v) the squared spread of v, the rules are

    y       terms conv(|z|, |w|)                  V = conv(V(z) + z², w²) + y²
    x̂       terms invstd·(y's + |mean|)           V = invstd²·(V(y) + V(mean) + mean²) + x̂²·k²,
                                                  k² = sum (y - mean)²·V(y)/(M·(var + eps))², for invstd's own error
    out     |weight|·x̂'s + |bias|, branches summed
    dbias   sum |d|                               V = sum V(d) + d²
    dweight sum |d|·invstd·(|y| + |mean|)         V = sum (V(d) + d²)·x̂² + d²·V(x̂)
    dy      |weight|·invstd·(|d| + dbias's/M + |x̂|·dweight's/M), and V by the squares of the same
    dw      conv_weight(|z|, dy's)                V = conv_weight(V(z) + z², dy²) + conv_weight(z², V(dy))
    dx      conv_input(|w|, dy's), branches summed
    mean    sum |y|/M                             var  sum |y - mean|·(|y| + |mean|)/(M - 1)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from shapes import Case
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from torchvision.models.resnet import BasicBlock, Bottleneck

Values = dict[str, Tensor]
STOCK = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ZeroPad(nn.Module):
    """Shortcut of option A (He et al. 2015): strided subsampling; the channels it adds are zero and come last."""

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
    """A stock block with seeded parameters: BatchNorm weights of both signs, biases and running statistics off 0, 1.

    Two values a channel normalise to ±1 whatever they are, so that gradients vanish and rounding is all that is left
    of them: such cases get an eps that keeps them well-posed.
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
    """Seeded parameters for every convolution and BatchNorm of a module, drawn in float64."""
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
    """Input of the block and gradient of its output."""
    generator = torch.Generator().manual_seed(7_919 * case.seed + 5)
    x = torch.randn(case.batch, case.in_channels, case.height, case.width, generator=generator, dtype=torch.float64)
    size = (-(-case.height // case.stride), -(-case.width // case.stride))
    grad = torch.randn(case.batch, case.out_channels, *size, generator=generator, dtype=torch.float64)
    return x.to(dtype).to(memory_format=memory_format), grad.to(dtype).to(memory_format=memory_format)


@torch.no_grad()
def separate(model: nn.Module, x: Tensor) -> None:
    """Moves BatchNorm biases, by at most half, so that no pre-activation lies near zero where rounding flips a mask.

    Per channel, each ReLU's zero is put in the middle of the widest gap between two pre-activations. Works on blocks
    and on whole ResNets, in the mode they are in; nothing but the biases changes.
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
    """Per channel of (N, C, H, W), the middle of the widest gap between two values, sought within half of zero."""
    ordered = values.transpose(0, 1).flatten(1).sort(1).values
    middle = (ordered[:, 1:] + ordered[:, :-1]) / 2
    width = ordered.diff(dim=1) * (middle.abs() <= 0.5)
    # Zero itself is the last candidate, twice as wide as its nearest value is far.
    middle = torch.cat([middle, torch.zeros_like(ordered[:, :1])], 1)
    width = torch.cat([width, 2 * ordered.abs().amin(1, keepdim=True)], 1)
    return middle.gather(1, width.argmax(1, keepdim=True)).flatten()


def set_mode(block: nn.Module, mode: str) -> nn.Module:
    """`train`, `eval`, `frozen` (a training block whose BatchNorms are all in eval) or `frozen:bn1,bn2`."""
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
    """One forward and backward of the block as it stands; the named tensors of the file head."""
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


@dataclass
class Oracle:
    """Float64 values of a run with the ingredients of the error floor; see the file head."""

    values: Values
    terms: Values
    spread: Values
    at_risk: int = 0
    activations: int = 0
    unsure: Tensor | None = None  # outputs whose own mask is one of those


@dataclass
class _Record:
    """What passed through one convolution or BatchNorm, and the gradient that came back to its output."""

    module: nn.Module
    entered: Tensor = field(default_factory=lambda: torch.empty(0))
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    grad: Tensor = field(default_factory=lambda: torch.empty(0))


def _record(block: nn.Module) -> dict[str, _Record]:
    records: dict[str, _Record] = {}
    for name, child in block.named_modules():
        if isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
            record = records[name] = _Record(child)

            def keep(_: nn.Module, args: tuple[Tensor], out: Tensor, record: _Record = record) -> None:
                record.entered, record.left = args[0].detach().clone(), out.detach().clone()
                if out.requires_grad:
                    out.register_hook(lambda grad: setattr(record, "grad", grad.detach().clone()))

            child.register_forward_hook(keep)
        elif isinstance(child, nn.ReLU):
            child.inplace = False
    return records


def oracle(block: nn.Module, x: Tensor, grad: Tensor, unit: float = 2.0**-24) -> Oracle:
    """Runs a float64 copy of a stock block. `unit` is the unit roundoff of the tested dtype, for `at_risk`."""
    block = copy.deepcopy(block).double().to(memory_format=torch.contiguous_format)
    before = {name: b.detach().clone() for name, b in block.named_buffers() if b.is_floating_point()}
    records = _record(block)
    x, grad = x.detach().double().contiguous(), grad.detach().double().contiguous()
    result = Oracle(run(block, x, grad), {}, {})
    if x.numel() and all(record.grad.numel() for record in records.values()):
        _Bounds(block, records, before, result, unit).fill(x, grad)
    return result


def stem_oracle(model: nn.Module, x: Tensor, grad: Tensor) -> Oracle:
    """The same for a ResNet whose layers, average pool and classifier are identities: its stem, flattened."""
    model = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
    before = {name: b.detach().clone() for name, b in model.named_buffers() if b.is_floating_point()}
    records = _record(model)
    result = Oracle(run(model, x.double().contiguous(), grad.double()), {}, {})
    layer = _Layer("bn1", records, before)
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


def _column(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


AXES = (0, 2, 3)


class _Layer:
    """Convolution + BatchNorm of a recorded run: terms (t_*) and squared spreads (v_*), forward, then backward."""

    def __init__(self, name: str, records: dict[str, _Record], before: Values) -> None:
        self.name = name
        self.conv_name = "downsample.0" if name == "downsample.1" else name.replace("bn", "conv")
        conv, norm = records[self.conv_name].module, records[name].module
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        self.conv, self.norm, self.w = conv, norm, conv.weight.detach()
        self.z, self.y, self.d = records[self.conv_name].entered, records[name].entered, records[name].grad
        self.out = records[name].left
        self.count = self.y.numel() // self.y.shape[1]
        self.batch_statistics = norm.training or norm.running_mean is None
        self.old = {key: before.get(f"{name}.{key}") for key in ("running_mean", "running_var")}
        mean, var = self.y.mean(AXES), self.y.var(AXES, unbiased=False)
        if not self.batch_statistics:
            mean, var = self.old["running_mean"], self.old["running_var"]
        assert mean is not None and var is not None
        self.mean, self.var = _column(mean), _column(var)
        self.invstd = (self.var + norm.eps).rsqrt()
        self.weight = torch.ones_like(self.mean) if norm.weight is None else _column(norm.weight.detach())
        self.bias = torch.zeros_like(self.mean) if norm.bias is None else _column(norm.bias.detach())
        self.normalized = (self.y - self.mean) * self.invstd

    def _conv(self, z: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(z, w, None, self.conv.stride, self.conv.padding)

    def _conv_weight(self, z: Tensor, dy: Tensor) -> Tensor:
        return conv2d_weight(z, list(self.w.shape), dy, self.conv.stride, self.conv.padding)

    def _conv_input(self, w: Tensor, dy: Tensor) -> Tensor:
        return conv2d_input(list(self.z.shape), w, dy, self.conv.stride, self.conv.padding)

    def forward(self, v_z: Tensor) -> tuple[Tensor, Tensor]:
        """Terms and squared spread of the BatchNorm's output, from the squared spread of the convolution's input."""
        z, y, w = self.z, self.y, self.w
        self.v_z = v_z + z**2
        v_y = self._conv(self.v_z, w**2) + 2 * y**2
        self.v_mean, v_invstd = self.mean**2, torch.ones_like(self.mean)
        if self.batch_statistics:
            self.v_mean = self.v_mean + v_y.sum(AXES, keepdim=True) / self.count**2
            self.v_var = ((y - self.mean) ** 2 * (v_y + self.mean**2)).sum(AXES, keepdim=True) * (2 / self.count) ** 2
            v_invstd = v_invstd + self.v_var / (2 * (self.var + self.norm.eps)) ** 2
        self.v_normalized = self.invstd**2 * (v_y + self.v_mean) + self.normalized**2 * v_invstd
        terms = (self.weight * self.invstd).abs() * (self._conv(z.abs(), w.abs()) + self.mean.abs()) + self.bias.abs()
        return terms, self.weight**2 * self.v_normalized + self.bias**2 + self.out**2

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Terms and squared spreads of the running statistics that this step updates."""
        old_mean, old_var = self.old["running_mean"], self.old["running_var"]
        if not self.norm.training or old_mean is None or old_var is None:
            return {}
        steps = float(self.norm.num_batches_tracked)  # type: ignore[arg-type]
        m = 1 / steps if self.norm.momentum is None else self.norm.momentum
        unbiased = self.count / max(self.count - 1, 1)
        deviation = (self.y - self.mean).abs() * (self.y.abs() + self.mean.abs())
        kept_mean, kept_var = (1 - m) * old_mean, (1 - m) * old_var
        return {
            "running_mean": (
                kept_mean.abs() + m * self.y.abs().mean(AXES),
                2 * kept_mean**2 + 2 * m**2 * (self.v_mean.flatten() + self.mean.flatten() ** 2),
            ),
            "running_var": (
                kept_var + m * unbiased * deviation.mean(AXES),
                2 * kept_var**2 + (m * unbiased) ** 2 * (self.v_var + 2 * self.var**2).flatten(),
            ),
        }

    def backward(self, v_d: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Terms and squared spreads of the gradients, from the squared spread of the one at the BatchNorm's output."""
        d, normalized, M = self.d, self.normalized, self.count
        v_d = v_d + d**2
        t_bias, v_bias = d.abs().sum(AXES, keepdim=True), v_d.sum(AXES, keepdim=True) + d.sum(AXES, keepdim=True) ** 2
        value = (d * normalized).sum(AXES, keepdim=True)
        t_weight = (d.abs() * self.invstd * (self.y.abs() + self.mean.abs())).sum(AXES, keepdim=True)
        v_weight = (v_d * normalized**2 + d**2 * self.v_normalized).sum(AXES, keepdim=True) + value**2
        t_dy, v_dy = d.abs(), v_d
        gain = (self.weight * self.invstd).abs()
        dy = gain * d
        if self.batch_statistics:
            t_dy = t_dy + (t_bias + normalized.abs() * t_weight) / M
            v_dy = v_dy + (v_bias + normalized**2 * v_weight + self.v_normalized * value**2) / M**2
            dy = gain * (d - (d.sum(AXES, keepdim=True) + normalized * value) / M)
        t_dy, v_dy = gain * t_dy, gain**2 * v_dy + 2 * dy**2
        grads = {
            f"{self.conv_name}.weight": (
                self._conv_weight(self.z.abs(), t_dy),
                self._conv_weight(self.v_z, dy**2) + self._conv_weight(self.z**2, v_dy),
            ),
            "input": (self._conv_input(self.w.abs(), t_dy), self._conv_input(self.w**2, v_dy + dy**2)),
        }
        if self.norm.weight is not None:
            grads[f"{self.name}.weight"] = (t_weight.flatten(), v_weight.flatten())
        if self.norm.bias is not None:
            grads[f"{self.name}.bias"] = (t_bias.flatten(), v_bias.flatten())
        return grads


class _Bounds:
    """Walks the recorded block forward and backward and fills the terms and spreads of an oracle."""

    def __init__(
        self, block: nn.Module, records: dict[str, _Record], before: Values, result: Oracle, unit: float
    ) -> None:
        self.downsample = block.downsample
        assert self.downsample is None or isinstance(self.downsample, nn.Module)
        self.projected = "downsample.1" in records
        branch = [name for name in ("bn1", "bn2", "bn3") if name in records]
        self.branch = [_Layer(name, records, before) for name in branch]
        self.projection = _Layer("downsample.1", records, before) if self.projected else None
        self.result, self.unit = result, unit

    def fill(self, x: Tensor, grad: Tensor) -> None:
        exact = torch.zeros_like(x)
        v_z = exact
        for layer in self.branch:
            t_out, v_out = layer.forward(v_z)
            if layer is not self.branch[-1]:
                self._count(layer.out, v_out)
                v_z = v_out * (layer.out > 0)
        if self.projection is not None:
            shortcut = self.projection.out
            t_shortcut, v_shortcut = self.projection.forward(exact)
        else:
            shortcut = x if self.downsample is None else self.downsample(x)
            t_shortcut, v_shortcut = shortcut.abs(), torch.zeros_like(shortcut)
        before_relu = self.branch[-1].out + shortcut
        v_out = v_out + v_shortcut + before_relu**2
        self._count(before_relu, v_out)
        self.result.unsure = before_relu.abs() <= 4 * self.unit * v_out.sqrt()
        self._store("out", t_out + t_shortcut, v_out)

        masked = grad * (before_relu > 0)
        v_d = torch.zeros_like(grad)
        for layer in reversed(self.branch):
            grads = layer.backward(v_d)
            t_x, v_x = grads.pop("input")
            v_d = v_x * (layer.z > 0)
            self._store_all(layer, grads)
        if self.projection is not None:
            grads = self.projection.backward(torch.zeros_like(grad))
            t_shortcut, v_shortcut = grads.pop("input")
            self._store_all(self.projection, grads)
        else:
            t_shortcut, v_shortcut = (self._shortcut_gradient(x, g) for g in (masked.abs(), masked**2))
        self._store("grad_x", t_x + t_shortcut, v_x + v_shortcut)

    def _shortcut_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        if self.downsample is None:
            return grad
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.downsample(x), x, grad)[0]

    def _count(self, activation: Tensor, squared: Tensor) -> None:
        self.result.at_risk += int((activation.abs() <= 4 * self.unit * squared.sqrt()).sum())
        self.result.activations += activation.numel()

    def _store(self, name: str, terms: Tensor, squared: Tensor) -> None:
        self.result.terms[name], self.result.spread[name] = terms, squared.sqrt()

    def _store_all(self, layer: _Layer, grads: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, pair in grads.items():
            self._store(f"grad.{name}", *pair)
        for name, pair in layer.statistics().items():
            self._store(f"stats.{layer.name}.{name}", *pair)

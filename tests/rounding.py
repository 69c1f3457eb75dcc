"""How much rounding can change the numbers of a residual block, computed from a recorded float64 run of the block.

Nothing of the tested package is imported here. For each tensor of a run (reference.py names them) there is

    terms    the sum of |terms| of the last reduction that computes the value: a worst case for its accumulator,
    spread   the first-order standard deviation, in unit roundoffs, if every stored value and every term has an
             independent relative error of one unit roundoff; errors propagate through the block like values.

For the whole run there is

    at_risk  the number of pre-activations within 4 of these deviations of zero: rounding decides their ReLU masks
             (`separate` chooses BatchNorm biases so that there are almost none).

Let z be the input of a convolution with weight w, y its output, x̂ = (y - mean)·invstd over M values per channel, d the
gradient at the BatchNorm's output, dy the gradient at its input, and V(v) the squared spread of v. The rules are

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

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

Values = dict[str, Tensor]


@dataclass
class Oracle:
    """The float64 values of a run, and what the error floor is computed from; the file head explains the fields."""

    values: Values
    terms: Values
    spread: Values
    at_risk: int = 0
    activations: int = 0
    unsure: Tensor | None = None  # True for outputs whose own mask is at risk


@dataclass
class Record:
    """Input and output of one convolution or BatchNorm, and the gradient of the output."""

    module: nn.Module
    entered: Tensor = field(default_factory=lambda: torch.empty(0))
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    grad: Tensor = field(default_factory=lambda: torch.empty(0))


def record_layers(block: nn.Module) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for name, child in block.named_modules():
        if isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
            record = records[name] = Record(child)

            def keep(_: nn.Module, args: tuple[Tensor], out: Tensor, record: Record = record) -> None:
                record.entered, record.left = args[0].detach().clone(), out.detach().clone()
                if out.requires_grad:
                    out.register_hook(lambda grad: setattr(record, "grad", grad.detach().clone()))

            child.register_forward_hook(keep)
        elif isinstance(child, nn.ReLU):
            child.inplace = False
    return records


def _column(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


AXES = (0, 2, 3)


class Layer:
    """Terms (t_*) and squared spreads (v_*) of one recorded convolution + BatchNorm: forward, then backward."""

    def __init__(self, name: str, records: dict[str, Record], before: Values) -> None:
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
        """Return terms and squared spread of the BatchNorm's output; `v_z` is that of the convolution's input."""
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
        """Return terms and squared spreads of the running statistics that this step updates."""
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
        """Return terms and squared spreads of the gradients; `v_d` is the squared spread of the output's gradient."""
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


class Bounds:
    """Walks the recorded block forward and backward, and fills in the terms and spreads of an oracle."""

    def __init__(
        self, block: nn.Module, records: dict[str, Record], before: Values, result: Oracle, unit: float
    ) -> None:
        self.downsample = block.downsample
        assert self.downsample is None or isinstance(self.downsample, nn.Module)
        self.projected = "downsample.1" in records
        branch = [name for name in ("bn1", "bn2", "bn3") if name in records]
        self.branch = [Layer(name, records, before) for name in branch]
        self.projection = Layer("downsample.1", records, before) if self.projected else None
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

    def _store_all(self, layer: Layer, grads: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, pair in grads.items():
            self._store(f"grad.{name}", *pair)
        for name, pair in layer.statistics().items():
            self._store(f"stats.{layer.name}.{name}", *pair)

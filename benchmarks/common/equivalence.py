"""Check that a fused block gives the numbers of eager, judged against float64; tests/tolerance.py derives the rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Verdict:
    """The result for one tensor of the rule err(fused) ≤ factor·err(eager) + floor, in the max norm and in L2."""

    tensor: str
    error: float
    eager_error: float
    bound: float
    l2_error: float
    l2_bound: float
    worst: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and self.l2_error <= self.l2_bound  # False for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return (
            f"{self.tensor}: max error {self.error:.3g}, bound {self.bound:.3g} (eager {self.eager_error:.3g}), "
            f"worst at {self.worst}; L2 {self.l2_error:.3g}, bound {self.l2_bound:.3g}: {verdict}"
        )


def judge(
    name: str, fused: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype, terms: Tensor | None = None
) -> Verdict:
    """Apply the rule to one tensor.

    err is the distance from the float64 `oracle`. factor is 2, or 3 for parameter gradients in half precision. floor is
    64 units of rounding of the largest element in float32 and float64, where rounding is far smaller than the errors
    that are looked for, and 1 unit in half precision. `terms` is Σ|terms| of a sum in which terms may cancel. If it is
    given, floor is at least 4 units of it, except in half precision.
    """
    if fused.shape != oracle.shape or eager.shape != oracle.shape:
        raise ValueError(
            f"judge: {name} must have shape {tuple(oracle.shape)}, got {tuple(fused.shape)}, {tuple(eager.shape)}"
        )
    half = dtype in (torch.float16, torch.bfloat16)
    factor = 3.0 if half and name.endswith((".weight grad", ".bias grad")) else 2.0
    unit = torch.finfo(dtype).eps * (1 if half else 64)
    distance = [(t.double() - oracle).abs() for t in (fused, eager)]
    floor = unit * oracle.abs()
    if terms is not None and not half:
        floor = floor.maximum(4 * torch.finfo(dtype).eps * terms)
    worst = torch.unravel_index(distance[0].argmax(), oracle.shape)
    return Verdict(
        name,
        distance[0].max().item(),
        distance[1].max().item(),
        (factor * distance[1].max() + floor.max()).item(),
        distance[0].norm().item(),
        (factor * distance[1].norm() + floor.norm()).item(),
        tuple(int(i) for i in worst),
    )


def _watch_terms(block: nn.Module) -> dict[str, Tensor]:
    """Return a dict that the next backward fills: the name of each BatchNorm gradient → Σ|d·x̂| or Σ|d|."""
    found: dict[str, Tensor] = {}

    def watch(name: str, norm: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        normalised = (x - mean).mul_((variance + norm.eps).rsqrt())

        def sums(grad: Tensor) -> None:
            found[f"{name}.weight grad"] = (grad * normalised).abs().sum((0, 2, 3))
            found[f"{name}.bias grad"] = grad.abs().sum((0, 2, 3))

        output.register_hook(sums)

    for name, norm in block.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.training:
            norm.register_forward_hook(partial(watch, name))
    return found


class _ClearZero(nn.Module):
    """A ReLU that first shifts each channel of its input so that no value is close to 0; `shifts` keeps the shifts.

    Among the values within 0.05 root mean squares of 0, the middle of the widest gap between two values becomes 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shifts: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        window = 0.05 * x.square().mean().sqrt().clamp_min(1e-6)
        inside = x.abs() < window
        channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1).expand_as(x)[inside]
        ends = torch.arange(channels, device=x.device)
        # One sort for all channels: the keys of a channel lie within 1/4 of the number of the channel.
        key = torch.cat((channel + x[inside] / (4 * window), ends - 0.25, ends + 0.25)).sort().values
        gaps, left = key.diff(), key[:-1].round().long()
        gaps = torch.where(key[1:].round().long() == left, gaps, -1.0)
        widest = torch.zeros(channels, dtype=x.dtype, device=x.device).scatter_reduce(0, left, gaps, "amax")
        middle = torch.zeros_like(widest)
        chosen = gaps == widest[left]
        middle[left[chosen]] = (key[:-1] + gaps / 2 - left)[chosen]
        self.shifts.append(-middle * 4 * window)
        return (x + self.shifts[-1].view(1, -1, 1, 1)).relu()


@torch.no_grad()
def clear_masks(block: nn.Module, x: Tensor) -> None:
    """Change the biases of the BatchNorms a little, in place, so that rounding decides no ReLU of a training step on x.

    If a pre-activation is within rounding of 0, two correct implementations may take different sides, and their
    gradients then differ by far more than rounding. Afterwards every pre-activation is about 1e-4 or more away from 0.
    """
    probe = copy.deepcopy(block).double().train()
    clear = probe.relu = _ClearZero()
    probe(x.double())
    for shift, (name, _) in zip(clear.shifts, _main_norms(block), strict=True):
        getattr(block, name).bias += shift.to(block.conv1.weight.dtype)


def _main_norms(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in block.named_children() if isinstance(m, nn.BatchNorm2d)]


def check_block(
    fused: nn.Module,
    eager: nn.Module,
    oracle: nn.Module,
    x: Tensor,
    grad: Tensor | None,
    context: Callable[[], Any],
    input_grad: bool = True,
    judged_as: torch.dtype | None = None,
) -> list[Verdict]:
    """Run the three modules on x, and backward from `grad` if given; judge output, gradients and running statistics.

    `oracle` is a float64 copy of `eager`. The gradients and running statistics of all three change, so
    pass copies. `judged_as` is the dtype whose rounding is allowed, if it is not that of x.
    """

    def run(module: nn.Module, source: Tensor, upstream: Tensor | None, around: Callable[[], Any]) -> dict[str, Tensor]:
        source = source.detach().requires_grad_(input_grad and upstream is not None)
        with around(), torch.set_grad_enabled(upstream is not None):
            out = module(source)
        result = {"output": out.detach()}
        if upstream is not None:
            module.zero_grad(set_to_none=True)
            out.backward(upstream)
            result |= {"input grad": source.grad} if input_grad else {}
            result |= {f"{n} grad": p.grad for n, p in module.named_parameters()}
        return result | {n: b for n, b in module.named_buffers() if b.is_floating_point()}

    ours, theirs = (run(m, x, grad, context) for m in (fused, eager))
    terms = {} if grad is None else _watch_terms(oracle)
    exact = run(oracle, x.double(), None if grad is None else grad.double(), nullcontext)
    dtype = judged_as or x.dtype
    return [judge(n, ours[n], theirs[n], reference, dtype, terms.get(n)) for n, reference in exact.items()]

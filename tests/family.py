"""Blocks of the residual family against the equations of their papers in plain PyTorch, by the rule of tolerance.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from eager import trust
from reference import Values
from tolerance import HALF, PARTIAL_SUMS, check_tensor
from torch import Tensor, nn

ROUNDINGS = 256  # of the largest value: the floor of the rule
FLIPS = 0.1  # of a result's norm, in 16 bits
Equation = Callable[[Any, Tensor], Tensor]  # of a block's own children, on x


def randomised(block: nn.Module) -> nn.Module:
    """Give every parameter and running statistic of a block another value than its initial one, and return it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return block


def values(block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, autocast: bool = False) -> Values:
    """Return the output, the gradients and the running statistics of one step."""
    block.zero_grad(set_to_none=True)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        out = call(leaf)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    (out.double() * weight).sum().backward()
    found: Values = {"out": out.detach(), "grad_x": leaf.grad}
    found |= {f"grad.{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return found | {f"stats.{name}": buffer.clone() for name, buffer in block.named_buffers()}


class _Plain(nn.Module):
    def __init__(self, block: nn.Module, equation: Equation) -> None:
        super().__init__()
        self.block, self.equation = block, equation

    def forward(self, x: Tensor) -> Tensor:
        return self.equation(self.block, x)


def check_equation(block: nn.Module, equation: Equation, x: Tensor) -> None:
    """Assert that a block computes its equation, forward and backward, with errors like torch's own operators."""
    trust(_Plain(copy.deepcopy(block), equation), x)
    stock, exact = copy.deepcopy(block), copy.deepcopy(block).double()
    theirs = values(stock, lambda v: equation(stock, v), x)
    right = values(exact, lambda v: equation(exact, v), x.double())
    ours = values(block, block, x)
    assert ours.keys() == theirs.keys()
    for name, exact_value in right.items():
        if not exact_value.is_floating_point():
            assert torch.equal(ours[name], exact_value), name
            continue
        terms = torch.full_like(exact_value, ROUNDINGS / PARTIAL_SUMS * exact_value.abs().max().item())
        spread = torch.zeros_like(terms)
        if x.dtype in HALF:  # rounding flips some ReLUs, in both runs at different places; float32 judges each element
            error, eager = (float((run[name].double() - exact_value).norm()) for run in (ours, theirs))
            bound = 2 * eager + FLIPS * float(exact_value.norm()) + 1e-6
            assert error <= bound, f"{name}: L2 error {error:.3g} > {bound:.3g}"
            continue
        check_tensor(name, ours[name], theirs[name], exact_value, terms, spread, dtype=x.dtype)


def saved_bytes(call: Callable[[], Tensor], *except_for: Tensor) -> int:
    """Return the bytes that a forward saves for backward, in storages other than these tensors'."""
    held: dict[int, int] = {}
    kept: list[Any] = []  # an address may be used again otherwise

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.append(tensor)
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    for tensor in except_for:
        held.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(held.values())

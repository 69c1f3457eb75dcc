"""Runs a model once, forward and backward, and keeps what its residual blocks read, return and get as gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.analysis.blocks import ResidualBlock, residual_blocks

Loss = Callable[[Any, Tensor], Tensor]
# Two ways to the same number in a dtype differ by less than this share of it, unless random numbers are drawn.
_SAME = {torch.float64: 1e-9, torch.float32: 1e-3}
_SAME_IN_16_BITS = 0.1


class Call(NamedTuple):
    """One call of a block: its input and its output."""

    block: ResidualBlock
    x: Tensor
    output: Tensor


class Observed(NamedTuple):
    """A call, and the gradients of the loss: of x through this call alone, and of the output."""

    block: ResidualBlock
    x: Tensor
    output: Tensor
    grad_x: Tensor
    grad_output: Tensor


def run_observed(model: nn.Module, images: Tensor, names: Sequence[str] | None = None) -> tuple[Any, list[Call]]:
    """Return the model's result, and every call of a residual block in order. The tensors are part of its graph.

    The model runs as it is, fused or not, in the mode in which it is.

    Args:
        names: see residual_blocks.

    Raises: what residual_blocks raises; ValueError: no block was called.
    """
    blocks = residual_blocks(model, names)
    calls: list[Call] = []
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or not isinstance(args[0], Tensor):
            raise ValueError(f"observe: a {type(module).__name__} must be called with a tensor first, got {args!r:.60}")
        x = args[0].clone()  # of its own, for the gradient through this call alone
        inputs.append(x)
        return (x.clone(), *args[1:])  # the block may write over it

    def after_of(block: ResidualBlock) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            calls.append(Call(block, inputs.pop(), output))
            return output.clone()  # of its own, as later layers may overwrite it

        return after

    handles = [block.module.register_forward_pre_hook(before) for block in blocks]
    handles += [block.module.register_forward_hook(after_of(block)) for block in blocks]
    try:
        result = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(f"observe: the blocks of {type(model).__name__} must be called by its forward, got no call")
    return result, calls


def observe(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss = F.cross_entropy, names: Sequence[str] | None = None
) -> list[Observed]:
    """Return what happened at every call of a residual block when loss(model(images), labels) was differentiated.

    A copy of the model runs, so the model stays as it was; see run_observed.

    Raises: what run_observed raises; ValueError: the loss does not depend on a block that was called.
    """
    result, calls = run_observed(copy.deepcopy(model), images.detach().requires_grad_(), names)
    tensors = [tensor for call in calls for tensor in (call.x, call.output)]
    try:
        grads = torch.autograd.grad(loss(result, labels), tensors)
    except RuntimeError as error:
        raise ValueError(f"observe: the loss must depend on every block that is called: {error}") from error
    return [
        Observed(block, x.detach(), output.detach(), grads[2 * index], grads[2 * index + 1])
        for index, (block, x, output) in enumerate(calls)
    ]


class Split:
    """A call of a block, run again with PyTorch's own operators, to be differentiated along the two ways apart.

    Raises: ValueError: the block draws random numbers, or writes over its input.
    """

    def __init__(self, seen: Observed) -> None:
        self._has_shortcut = seen.block.has_shortcut
        self._of_branch, self._of_shortcut = (seen.x.detach().clone().requires_grad_() for _ in range(2))
        with torch.enable_grad():
            self._output = seen.block.apply(self._of_branch.clone(), self._of_shortcut.clone())
        _check_same(seen, self._output)

    def branch(self, grad_output: Tensor) -> Tensor:
        """Return the part of the gradient of the block's input that the branch brings, from that of the output."""
        return torch.autograd.grad(self._output, self._of_branch, grad_output, retain_graph=True)[0]

    def shortcut(self, grad_output: Tensor) -> Tensor:
        """Return the part that the shortcut brings."""
        if not self._has_shortcut:
            return torch.zeros_like(self._of_branch)
        return torch.autograd.grad(self._output, self._of_shortcut, grad_output, retain_graph=True)[0]


def _check_same(seen: Observed, output: Tensor) -> None:
    largest = seen.output.abs().max().item()
    if (output - seen.output).abs().max().item() > _SAME.get(output.dtype, _SAME_IN_16_BITS) * largest:
        raise ValueError(
            f"observe: {seen.block.name or 'the model'} must compute the same when it runs again, got another result; "
            "does it draw random numbers (call model.eval()), or write over its input?"
        )

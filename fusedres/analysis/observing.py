"""Runs a model forward and backward, and keeps what its residual blocks read and return, and their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres.analysis.blocks import ResidualBlock, copy_of, residual_blocks
from fusedres.analysis.results import AnalysisError

Loss = Callable[[Any, Tensor], Tensor]
# Two ways to the same branch differ by less than this share of it, unless random numbers are drawn.
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


def logits_of(result: Any) -> Tensor:
    """Return the logits in a model's result: the result itself, or its attribute `logits`, as in transformers."""
    found = getattr(result, "logits", result)
    if not isinstance(found, Tensor):
        raise AnalysisError(
            f"analysis: the model must return logits, got a {type(found).__name__}; give loss, or wrap it"
        )
    return found


def cross_entropy(result: Any, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a model's result."""
    return F.cross_entropy(logits_of(result), labels)


@contextmanager
def undisturbed() -> Any:
    """Record gradients inside, whatever the caller's mode, and leave the global random state as it was."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        yield


def check_images(images: Any) -> None:
    """Raise AnalysisError for what is no batch of floating-point inputs."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2 or not len(images):
        got = f"{images.dtype} of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise AnalysisError(f"analysis: images must be a floating-point tensor (N, …) with N at least 1, got {got}")


def run_observed(model: nn.Module, images: Tensor, names: Sequence[str] | None = None) -> tuple[Any, list[Call]]:
    """Return the result of a model, and every call of a residual block in order. The tensors are part of its graph.

    The model runs as it is, fused or not, in its mode. It should be a copy, as statistics may be updated.

    Args:
        names: see residual_blocks.

    Raises:
        what residual_blocks raises.
        ValueError: no block was called, one was called with more than a tensor, or its parts do not give its output.
    """
    blocks = residual_blocks(model, names)
    calls: list[Call] = []
    inputs: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not args or not isinstance(args[0], Tensor) or _given_beside_defaults(module, args, named):
            kinds = ", ".join([*(type(arg).__name__ for arg in args), *named]) or "nothing"
            raise ValueError(f"observe: a {type(module).__name__} must be called with one tensor, got {kinds}")
        x = args[0].clone()  # of its own, for the gradient through this call alone
        inputs.append(x)
        return (x.clone(), *args[1:]), named  # the block may write over it

    def after_of(block: ResidualBlock) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            calls.append(Call(block, inputs.pop(), output))
            return output.clone()  # of its own, as later layers may overwrite it

        return after

    handles = [block.module.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.module.register_forward_hook(after_of(block)) for block in blocks]
    try:
        result = model(images)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        raise ValueError(f"observe: the blocks of {type(model).__name__} must be called by its forward, got no call")
    for call in calls:
        _check_parts(call)
    return result, calls


def observe(
    model: nn.Module, images: Tensor, labels: Tensor, loss: Loss = cross_entropy, names: Sequence[str] | None = None
) -> list[Observed]:
    """Return what happened at every call of a residual block when loss(model(images), labels) was differentiated.

    A copy of the model runs, so the model stays as it was; see run_observed.

    Raises: what run_observed raises; ValueError: the loss does not depend on a block that was called.
    """
    check_images(images)
    with undisturbed():
        result, calls = run_observed(copy_of(model), images.detach().clone().requires_grad_(), names)
        tensors = [tensor for call in calls for tensor in (call.x, call.output)]
        value = loss(result, labels)
        try:
            grads = torch.autograd.grad(value, tensors)
        except RuntimeError as error:
            raise ValueError(f"observe: the loss must depend on every block that is called: {error}") from error
    return [
        Observed(block, x.detach(), output.detach(), grads[2 * index], grads[2 * index + 1])
        for index, (block, x, output) in enumerate(calls)
    ]


class Split:
    """A call of a block, run again with PyTorch's own operators, to be differentiated along the two ways apart."""

    def __init__(self, seen: Observed) -> None:
        with undisturbed():
            self._of_branch, self._of_shortcut = (seen.x.clone().requires_grad_() for _ in range(2))
            self._output = seen.block.apply(self._of_branch, self._of_shortcut)

    def branch(self, grad_output: Tensor) -> Tensor:
        """Return the part of the gradient of the block's input that the branch brings, from that of the output."""
        return self._gradient(self._of_branch, grad_output)

    def shortcut(self, grad_output: Tensor) -> Tensor:
        """Return the part that the shortcut brings."""
        return self._gradient(self._of_shortcut, grad_output)

    def _gradient(self, x: Tensor, grad_output: Tensor) -> Tensor:
        if not self._output.requires_grad:
            return torch.zeros_like(x)
        [found] = torch.autograd.grad(self._output, (x,), grad_output, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if found is None else found


def _given_beside_defaults(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether a call has arguments after the first that are not the defaults."""
    parameters = inspect.signature(module.forward).parameters
    given = {**dict(zip(list(parameters)[1:], args[1:], strict=False)), **named}
    defaults = {name: each.default for name, each in parameters.items()}
    return len(args) > len(parameters) or any(value is not defaults.get(name, given) for name, value in given.items())


@torch.no_grad()
def _check_parts(call: Call) -> None:
    """Raise where a block's parts, with PyTorch's operators, do not give its output up to rounding."""
    block, x, output = call.block, call.x.detach(), call.output.detach()
    branch = block.branch(x)
    total = branch + block.shortcut(x) if block.has_shortcut else branch
    largest = output.abs().max()
    rounding = 4 * torch.finfo(output.dtype).eps * largest
    share = branch.abs().max() / total.abs().max().clamp_min(torch.finfo(output.dtype).tiny)
    allowed = _SAME.get(output.dtype, _SAME_IN_16_BITS) * largest * share.clamp_max(1) + rounding
    difference = (block.after(total, x) - output).abs().nan_to_num()  # what is no number in both is the same
    if difference.max() > allowed:
        raise ValueError(
            f"observe: {block.name or 'the model'} must compute the same when it runs again, got another result; "
            "does it draw random numbers (call model.eval()), or write over its input?"
        )

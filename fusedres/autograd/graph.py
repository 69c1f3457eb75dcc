"""What autograd's engine wants of a fused block's node, and what it keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))  # classes of tensors with memory of their own
_PLAIN_OR_NONE = PLAIN | {type(None)}
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
_will_execute = torch._C._will_engine_execute_node


def wants_gradients(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call is recorded for backward."""
    return torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors))


def used_gradients(ctx: Any) -> tuple[bool, ...]:
    """Of a node's inputs, those whose gradients the running backward uses; needs_input_grad where that is not known.

    autograd.grad and backward(inputs=...) take a part of the graph: the rest is not worth its products.
    """
    needed: tuple[bool, ...] = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return needed
    nodes = [node for node, _ in ctx.next_functions if node is not None]  # one for every True in needed, in order
    try:
        if all(map(_will_execute, nodes)):
            return needed
    except RuntimeError:  # see _is_used
        pass
    following = iter(nodes)
    return tuple(need and _is_used(next(following)) for need in needed)


def _is_used(node: Any) -> bool:
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # a leaf whose gradient is asked for, or a node that is called outside of a backward
        return True


def donate_saved(ctx: Any) -> bool:
    """Whether a backward may overwrite what was saved for it; then no other backward finds it, as in torch.

    It may where the graph is not kept. A backward that fails half-way has overwritten a part: when it is called again,
    torch raises its "second time" error.
    """
    if torch.compiler.is_compiling() or _keeps_graph():
        return False
    ctx.maybe_clear_saved_tensors()
    return True


def materialized(tensor: Tensor) -> Tensor:
    """A tensor with its values in memory: not lazily negated, no lazy zero."""
    if torch.compiler.is_compiling():
        return tensor
    if tensor.is_neg():
        return tensor.resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether no tensor is of a subclass, which may have no memory of its own, or lazily negated."""
    if torch.compiler.is_compiling():
        return True
    if not _PLAIN_OR_NONE.issuperset(map(type, tensors)):
        return False
    return not any(map(Tensor.is_neg, [tensor for tensor in tensors if tensor is not None]))


def needs_composite(grad_out: Tensor) -> bool:
    """Whether a backward must run through torch's own operators.

    It must where its gradients are to be differentiated again, and where its own is of a tensor subclass, inside a
    transform of torch.func, or a batch of gradients (autograd.grad(is_grads_batched=True)).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return (
        type(grad_out) not in PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_out)
    )

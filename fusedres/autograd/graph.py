"""Questions to autograd about the node of a fused block: which gradients it needs, and what it may overwrite."""

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
    """Return whether a call is recorded for backward."""
    return torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors))


def used_gradients(ctx: Any) -> tuple[bool, ...]:
    """Return for each input of a node whether the running backward uses its gradient.

    autograd.grad and backward(inputs=...) run only a part of the graph, and gradients for the rest would be computed in
    vain. If autograd does not tell, the answer is that of needs_input_grad.
    """
    needed: tuple[bool, ...] = ctx.needs_input_grad
    if torch.compiler.is_compiling():
        return needed
    nodes = [node for node, _ in ctx.next_functions if node is not None]  # one for each True in needed, in order
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
    except RuntimeError:  # the gradient of a leaf is asked for, or the node is called outside a backward
        return True


def donate_saved(ctx: Any) -> bool:
    """Return whether a backward may overwrite the tensors that were saved for it: if autograd does not keep the graph.

    The saved tensors are then released, as torch does. So if a backward fails after it has overwritten some of them and
    is called again, torch raises its "second time" error.
    """
    if torch.compiler.is_compiling() or _keeps_graph():
        return False
    ctx.maybe_clear_saved_tensors()
    return True


def materialized(tensor: Tensor) -> Tensor:
    """Return the tensor with its values in memory: neither lazily negated nor a lazy zero."""
    if torch.compiler.is_compiling():
        return tensor
    if tensor.is_neg():
        return tensor.resolve_neg()
    return tensor.clone() if tensor._is_zerotensor() else tensor


def are_plain(*tensors: Tensor | None) -> bool:
    """Return whether all tensors are plain: no subclass, which may lack memory of its own, and not lazily negated."""
    if torch.compiler.is_compiling():
        return True
    if not _PLAIN_OR_NONE.issuperset(map(type, tensors)):
        return False
    return not any(map(Tensor.is_neg, [tensor for tensor in tensors if tensor is not None]))


def needs_composite(grad_out: Tensor) -> bool:
    """Return whether a backward must run through torch's own operators.

    It must if its results will be differentiated again, inside a transform of torch.func, and if grad_out is of a
    tensor subclass or a batch of gradients (autograd.grad(is_grads_batched=True)).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return (
        type(grad_out) not in PLAIN
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(grad_out)
    )

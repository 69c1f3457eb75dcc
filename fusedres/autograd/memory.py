"""Checks that a call's tensors have their memory; a call that fails leaves the running statistics unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

import torch
from torch import Tensor

from fusedres.autograd.plan import UNIT_PARAMS, UNIT_TENSORS, ConvBN, Inputs
from fusedres.ops._memory import needed_bytes

_NAMES = ("convolution weight", "weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def to_channels_last(x: Tensor) -> Tensor:
    """Return x as dense channels_last, without a copy if it is so already; raise if its memory is missing."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    if not torch.compiler.is_compiling() and not has_memory(x):
        refuse("x", x)  # torch's own conversion would read it
    return x.contiguous(memory_format=torch.channels_last)


def dense(inputs: Inputs) -> Inputs:
    """Return the inputs as dense channels_last."""
    other = None if inputs.other is None else to_channels_last(inputs.other)
    return Inputs(to_channels_last(inputs.x), other)


def require_memory(x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Raise if the memory of a call's input, or of a tensor of its units, was freed or is too small."""
    if torch.compiler.is_compiling() or x.is_meta:
        return
    for index, tensor in enumerate((x, *tensors)):
        if tensor is not None and not has_memory(tensor):
            refuse("x" if index == 0 else f"a unit's {_NAMES[(index - 1) % UNIT_TENSORS]}", tensor)


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor's storage holds all of its elements."""
    return tensor.numel() == 0 or tensor.is_meta or tensor.untyped_storage().nbytes() >= needed_bytes(tensor)


def statistics_kept_on_error(tensors: Sequence[Tensor | None], units: Sequence[ConvBN]) -> AbstractContextManager[None]:
    """Restore the running statistics of the units if a forward fails after it has updated them."""
    updated: list[Tensor | None] = []
    for index, unit in enumerate(units):
        if unit.update:
            updated += tensors[index * UNIT_TENSORS + UNIT_PARAMS : (index + 1) * UNIT_TENSORS]
    return kept_on_error(updated)


@contextmanager
def kept_on_error(updated: Sequence[Tensor | None]) -> Iterator[None]:
    """Restore these tensors if what runs inside fails (out of memory, for example).

    This is for the CPU. On a GPU the copies would cost launches, so updated statistics stay updated, as in torch.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    if not torch.compiler.is_compiling():
        kept = [(tensor, tensor.clone()) for tensor in updated if tensor is not None and tensor.is_cpu]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        raise


def refuse(name: str, tensor: Tensor, what: str = "fused block") -> NoReturn:
    """Raise that a tensor of a call has no memory."""
    raise RuntimeError(
        f"{what}: {name} must have memory for its shape {tuple(tensor.shape)}, got a storage of "
        f"{tensor.untyped_storage().nbytes()} bytes; allocate it before the call (it was freed or resized)"
    )

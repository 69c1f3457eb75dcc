"""Checks of the tensors of every call, for every op: their memory must be there, and may be written.

A table (_arguments.py) is checked once for each signature of a call; these checks run at each call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fusedres.errors import DtypeError


def fail(error: type[Exception], op: str, argument: str, expected: str, got: object, remedy: str = "") -> NoReturn:
    """Raise the error with the text `op: argument must expected, got got; remedy`."""
    raise error(f"{op}: {argument} must {expected}, got {got}" + (f"; {remedy}" if remedy else ""))


def tensors_of(names: Iterable[str], values: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor among the arguments and in their lists, with its name."""
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, list):
            yield from ((f"{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Tensor))


def check_kinds(op: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if a tensor has no strides, or if its memory does not hold its values."""
    for name, tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
            fail(DtypeError, op, name, "be a plain strided tensor", f"a tensor that is {kind}", "convert it first")
        if tensor.is_neg() or tensor.is_conj():
            got = "a view that is still to be negated or conjugated"
            fail(DtypeError, op, name, "hold its values", got, "call .resolve_neg() or .resolve_conj()")
        if tensor._is_zerotensor():
            fail(DtypeError, op, name, "hold its values", "a tensor of zeros without memory", "call .clone()")


def signature(value: Any) -> Any:
    """Everything of an argument that a table can depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, list | tuple):
        return tuple(signature(item) for item in value)
    return float if isinstance(value, float) else value


def check_memory(op: str, tensors: Iterable[tuple[str, Tensor]], written: Sequence[str]) -> None:
    """Raise if a storage is too small for its tensor, or if a written tensor shares memory or may not be written.

    Meta tensors have no memory, so theirs is not checked.
    """
    spans = {name: _span(op, name, tensor) for name, tensor in tensors if tensor.numel() and not tensor.is_meta}
    if not written:
        return
    for name, tensor in tensors:
        if name in written:
            _check_writable(op, name, tensor)
    for name in written:
        begin, end = spans.get(name, (0, 0))
        for other, (start, stop) in spans.items():
            if start < end and begin < stop and other != name:
                expected = f"share no memory with {other}, as it is written"
                fail(RuntimeError, op, name, expected, "views of the same memory", "clone one of them")


def needed_bytes(tensor: Tensor) -> int:
    """The bytes of a storage up to the end of its tensor's last element, for a tensor that is not empty."""
    elements = tensor.numel()
    if not (tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + elements) * tensor.itemsize


def _span(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    """The addresses from a tensor's first element to the end of its last; raise if they are missing or unaligned."""
    needed, held = needed_bytes(tensor), tensor.untyped_storage().nbytes()
    begin, itemsize = tensor.data_ptr(), tensor.itemsize
    if held < needed:
        remedy = "its storage was freed or resized; pass a tensor that has its values"
        fail(RuntimeError, op, name, f"have a storage of at least {needed} bytes", f"one of {held}", remedy)
    if begin % itemsize:
        expected = f"start at a multiple of {itemsize} bytes in memory"
        fail(RuntimeError, op, name, expected, f"address {begin:#x}", "call .clone()")
    return begin, begin + needed - int(tensor.storage_offset()) * itemsize


def _check_writable(op: str, name: str, tensor: Tensor) -> None:
    """Raise as torch does."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        expected = "be a normal tensor, as it is written outside of inference mode"
        fail(RuntimeError, op, name, expected, "an inference tensor", "clone it")
    if tensor.requires_grad and tensor.is_leaf and torch.is_grad_enabled():
        expected = "not be a leaf that requires grad, as it is written"
        fail(RuntimeError, op, name, expected, "one", "use torch.no_grad()")


def check_one_device(op: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if tensors are on several devices: the only check of fake tensors."""
    first = None
    for name, tensor in tensors:
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            fail(RuntimeError, op, name, f"be on {first[1]} like {first[0]}", tensor.device, "move one of them")

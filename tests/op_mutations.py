"""Make wrong arguments of an op from its table. Each is known to be wrong from its making, without calling the op.

A mutation that may still be right is left out: a size that no other argument shares may change, and so may the dtype of
the only tensor with the activations' dtype. A mutation that is `always` wrong is wrong with any other arguments.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from op_examples import Example
from torch import Tensor

from fusedres.ops import _arguments as rows
from fusedres.ops._library import OPS, Op

CHANNELS_LAST = torch.channels_last
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NO_FLOATING = (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64)
MORE = 17  # added to a size; enough to change also the packed bits of the channels and every second pixel


@dataclass(frozen=True)
class Mutation:
    """A wrong value of one argument, and what is wrong with it."""

    argument: str
    what: str
    value: Any
    always: bool = False
    lazy: bool = False  # the dispatcher makes a right tensor of it, so that only the check itself sees it


def described(op: Op, example: Example, name: str) -> tuple[rows.Argument, Tensor] | None:
    """Return the table's row of a tensor argument and the tensor; None if it is not given."""
    row, value = op.rows.get(name), example[name]
    if isinstance(row, rows.Gate):
        row = row.bits if isinstance(value, Tensor) and value.dtype is torch.uint8 else row.output
    return (row, value) if isinstance(row, rows.Argument) and isinstance(value, Tensor) else None


def optional(op: Op) -> set[str]:
    """Return the names of the arguments that may be None."""
    schema = getattr(torch.ops.fusedres, op.name).default._schema
    found = {argument.name for argument in schema.arguments if str(argument.type).startswith("Optional")}
    return {name for name in found if not is_required(op.rows.get(name))}


def is_required(row: rows.Row | None) -> bool:
    return row.output.required if isinstance(row, rows.Gate) else isinstance(row, rows.Argument) and row.required


def words(op: Op, example: Example, name: str) -> list[str]:
    """Return the words of an argument's shape: an empty list if the table has no shape or the argument is None."""
    found, row = described(op, example, name), op.rows.get(name)
    if found is not None:
        return [] if found[0].shape is None else [size.word for size in found[0].shape.sizes]
    if isinstance(row, rows.Integers) and row.shape is not None:
        return [size.word for size in row.shape.sizes]
    return []


def sharing(op: Op, example: Example) -> Counter[str]:
    """Count in how many arguments each named size occurs, other than as the most that another one may be."""
    count: Counter[str] = Counter()
    for name in example:
        count.update({part for word in words(op, example, name) for part in re.split(r"<=.*|>=|/|\*", word)})
    if any(isinstance(row, rows.Convolved) for row in op.rows.values()) and count["P"]:
        count.update("HWRS")  # another argument has the output's size
    return count


def copy_of(tensor: Tensor, **kind: Any) -> Tensor:
    """Return the tensor in a storage of its own."""
    return torch.empty_like(tensor, **kind).copy_(tensor)


def resized(tensor: Tensor, shape: list[int], layout: str) -> Tensor:
    out = torch.zeros(shape, dtype=tensor.dtype)
    return out.contiguous(memory_format=CHANNELS_LAST) if layout == "channels_last" and len(shape) == 4 else out


def shapes(op: Op, example: Example, name: str, row: rows.Argument, tensor: Tensor) -> Iterator[Mutation]:
    """Yield shapes with one dimension more or less, and with sizes that are 0 or larger."""
    if row.shape is None:
        return
    shape, shared = list(tensor.shape), sharing(op, example)
    yield Mutation(name, "a dimension more", resized(tensor, [*shape, 1], row.layout), True)
    yield Mutation(name, "a dimension more in front", resized(tensor, [1, *shape], row.layout), True)
    if shape:
        yield Mutation(name, "a dimension less", resized(tensor, shape[1:], row.layout), True)
        yield Mutation(name, "no dimension", resized(tensor, [], row.layout), True)
    for axis, size in enumerate(row.shape.sizes):
        first = re.split(r"<=|>=|/|\*", size.word)[0]
        empty, larger = list(shape), list(shape)
        empty[axis], larger[axis] = 0, shape[axis] + MORE
        alone = first == "N" and shared["N"] == 1 and row.empty
        if not alone:
            yield Mutation(name, f"{size.word} is 0", resized(tensor, empty, row.layout), first != "N")
        fixed = first.isdecimal()
        if fixed or "<=" in size.word or (shared[first] > 1 and ">=" not in size.word):
            yield Mutation(name, f"{size.word} is larger", resized(tensor, larger, row.layout), fixed)


def dtypes(op: Op, example: Example, name: str, row: rows.Argument, tensor: Tensor) -> Iterator[Mutation]:
    kinds = Counter(found[0].dtype for other in example if (found := described(op, example, other)) is not None)
    activations, all_related = (n + ("dtype" in example) for n in (kinds["x"], kinds["x"] + kinds["wide"]))
    for dtype in (*FLOATING, *NO_FLOATING):
        floating, other = dtype in FLOATING, dtype is not tensor.dtype
        if isinstance(row.dtype, torch.dtype):
            wrong = always = other and not (dtype is torch.uint8 and isinstance(op.rows[name], rows.Gate))
            if isinstance(op.rows[name], rows.Gate) and floating:
                wrong = always = False
        elif row.dtype == "wide":
            always = dtype not in (torch.float32, torch.float64)
            wrong = always or (other and all_related > 1)
        else:
            always = not floating and not (dtype is torch.uint8 and isinstance(op.rows[name], rows.Gate))
            widened = other and torch.float64 in (dtype, tensor.dtype)
            related = (other and activations > 1) or (widened and all_related > 1)
            wrong = always or (related and row.dtype == "x")
        if wrong:
            converted = tensor.to(dtype)
            yield Mutation(name, f"{dtype}", converted, always)


def layouts(name: str, row: rows.Argument, tensor: Tensor) -> Iterator[Mutation]:
    """Yield strides that the row does not allow."""
    if row.layout == "strided" or tensor.numel() < 2:
        return
    if row.layout == "channels_last":
        if not tensor.contiguous().is_contiguous(memory_format=CHANNELS_LAST):
            yield Mutation(name, "NCHW", tensor.contiguous(), True)
        wide = torch.cat((tensor, tensor), 1).contiguous(memory_format=CHANNELS_LAST)
        if tensor[0, 0].numel() > 1 or tensor.shape[0] > 1:
            yield Mutation(name, "half of the channels of another", wide[:, : tensor.shape[1]], True)
    elif tensor.dim() > 1 and not tensor.mT.is_contiguous():
        yield Mutation(name, "transposed", tensor.mT.contiguous().mT, True)
    axis = max(range(tensor.dim()), key=lambda a: tensor.shape[a])
    yield Mutation(name, "every second of another", tensor.repeat_interleave(2, axis)[_taken(tensor, axis)], True)
    yield Mutation(name, "expanded", tensor.narrow(axis, 0, 1).expand(tensor.shape), True)


def _taken(tensor: Tensor, axis: int) -> tuple[slice, ...]:
    return tuple(slice(None, None, 2 if a == axis else None) for a in range(tensor.dim()))


def memory(name: str, row: rows.Argument, tensor: Tensor) -> Iterator[Mutation]:
    """Yield tensors with too small a storage or none, and kinds of tensors that have no plain memory."""
    for left in (0, 1, tensor.untyped_storage().nbytes() - 1):
        short = copy_of(tensor)
        short.untyped_storage().resize_(left)
        yield Mutation(name, f"a storage of {left} bytes", short, True)
    if tensor.itemsize > 1:
        room = torch.empty(tensor.numel() * tensor.itemsize + 1, dtype=torch.uint8).numpy()
        shifted = torch.frombuffer(room, dtype=tensor.dtype, offset=1, count=tensor.numel())
        yield Mutation(name, "misaligned", shifted.as_strided(tensor.shape, tensor.stride()), True)
    if tensor.dim():
        yield Mutation(name, "sparse", tensor.contiguous().to_sparse(), True)
    if tensor.dtype is torch.float32:
        yield Mutation(name, "quantized", torch.quantize_per_tensor(tensor, 0.1, 3, torch.quint8), True)
        yield Mutation(name, "of oneDNN", tensor.contiguous().to_mkldnn(), True)
    if tensor.is_floating_point():
        yield Mutation(name, "to be negated", torch._neg_view(tensor), True, lazy=True)
        zeros = torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
        yield Mutation(name, "zeros without memory", zeros, True, lazy=True)


def presence(op: Op, example: Example, name: str) -> Iterator[Mutation]:
    row, value = op.rows[name], example[name]
    needed = name not in optional(op)
    row = row.output if isinstance(row, rows.Gate) else row
    tied = [
        other
        for other, it in op.rows.items()
        if isinstance(it, rows.Argument) and example[other] is not None and name in (it.given_with, it.only_with)
    ]
    if value is not None and (needed or tied or getattr(row, "given_with", "")):
        yield Mutation(name, "None", None, needed)
    for wrong in (3, 2.5, "tensor", [1.0]):
        yield Mutation(name, f"{wrong!r}", wrong, True)


def written(op: Op, example: Example, name: str, tensor: Tensor) -> Iterator[Mutation]:
    """Yield tensors that may not be written, and tensors that share memory with another argument."""
    if name not in op.written:
        for target in op.written:
            other = example[target]
            if other is not None and other.shape == tensor.shape and other.dtype is tensor.dtype:
                yield Mutation(name, f"the same as {target}, which is written", other)
        return
    with torch.inference_mode():
        yield Mutation(name, "an inference tensor", tensor.clone(), True)
    if tensor.is_floating_point():
        yield Mutation(name, "a leaf that requires grad", copy_of(tensor).requires_grad_(), True)


def integers(name: str, row: rows.Integer | rows.Integers, value: Any) -> Iterator[Mutation]:
    huge = (2**62 + 1, 2**63 - 1)
    if isinstance(row, rows.Integer):
        for wrong in (row.least - 1, -1, -(2**40), *huge):
            yield Mutation(name, f"{wrong}", wrong, True)
        if row.most < 2**62:
            yield Mutation(name, "2**40", 2**40, True)
    else:
        for axis in range(row.count):
            for wrong in (row.least - 1, -(2**40), 2**31, *huge):
                yield Mutation(name, f"{wrong} at {axis}", [*value[:axis], wrong, *value[axis + 1 :]], True)
            larger = [*value[:axis], value[axis] + MORE, *value[axis + 1 :]]
            if row.shape is not None:
                yield Mutation(name, f"larger at {axis}", larger)
        for wrong in ([], [1], [1, 1, 1], [1] * 5):
            if len(wrong) != row.count and not (row.count == 2 and len(wrong) == 1):  # int[2] takes one number for both
                yield Mutation(name, f"{wrong}", wrong, True)
    for other in (1.5, None, "1", [1.5, 1.5], 2**64):
        yield Mutation(name, f"{other!r}", other, True)


def items(name: str, row: rows.Items, value: list[Tensor]) -> Iterator[Mutation]:
    yield Mutation(name, "no tensors", [], True)
    yield Mutation(name, "five tensors", (value * 5)[:5], True)
    yield Mutation(name, "one tensor", value[0])
    for index, tensor in enumerate(value):
        changed = [
            *memory(name, row.item, tensor),
            *layouts(name, row.item, tensor),
            Mutation(name, "a dimension more", tensor[None], True),
            Mutation(name, "a dimension less", tensor[0], True),
            Mutation(name, "no rows", tensor[:0], True),
            *(Mutation(name, f"{dtype}", tensor.to(dtype), True) for dtype in NO_FLOATING),
        ]
        for it in changed:
            mixed = [*value[:index], it.value, *value[index + 1 :]]
            yield Mutation(name, f"{it.what} at {index}", mixed, it.always, it.lazy)
        yield Mutation(name, f"meta at {index}", [*value[:index], tensor.to("meta"), *value[index + 1 :]])


def mutations(name: str, example: Example) -> Iterator[Mutation]:
    """Yield wrong values of every argument of an op's example."""
    op = OPS[name]
    tensors = sum(isinstance(value, Tensor) for value in example.values())
    for argument, value in example.items():
        row, found = op.rows.get(argument), described(op, example, argument)
        if found is not None:
            yield from shapes(op, example, argument, *found)
            yield from dtypes(op, example, argument, *found)
            yield from layouts(argument, *found)
            yield from memory(argument, *found)
            yield from written(op, example, argument, found[1])
            if tensors > 1:
                yield Mutation(argument, "meta", found[1].to("meta"))
        if isinstance(row, rows.Argument | rows.Gate):
            yield from presence(op, example, argument)
        elif isinstance(row, rows.Integer | rows.Integers):
            yield from integers(argument, row, value)
        elif isinstance(row, rows.Items):
            yield from items(argument, row, value)
        elif isinstance(row, rows.ActivationDtype):
            for dtype in (*NO_FLOATING, torch.float8_e4m3fn, None, "float32"):
                yield Mutation(argument, f"{dtype}", dtype, True)
        elif isinstance(value, bool):
            yield from (Mutation(argument, f"{wrong!r}", wrong, True) for wrong in ("yes", [True]))
        elif isinstance(value, float):
            yield from (Mutation(argument, f"{wrong!r}", wrong, True) for wrong in ("x", [0.1], torch.bfloat16))
    for wrong in ("nonsense", "", "CPU", "auto", "cpu ", 3, None):
        yield Mutation("backend", f"{wrong!r}", wrong, True)

"""Count the bytes that operators move while they run, from their arguments and results, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedres.ops._library import OPS

# Arguments that an operator reads twice. BatchNorm in training takes the statistics before it applies them, and its
# backward takes the sums first. A convolution's backward is dgrad and wgrad, and each of them reads the gradient.
_TORCH_READS_AGAIN: dict[str, Callable[[tuple], list[Tensor | None]]] = {
    "aten::native_batch_norm": lambda a: [a[0]] if a[5] else [],
    "aten::_native_batch_norm_legit": lambda a: [a[0]] if a[5] else [],
    "aten::_batch_norm_with_update": lambda a: [a[0]],
    "aten::cudnn_batch_norm": lambda a: [a[0]] if a[5] else [],
    "aten::miopen_batch_norm": lambda a: [a[0]] if a[5] else [],
    "aten::native_batch_norm_backward": lambda a: [a[0], a[1]] if a[7] else [],
    "aten::batch_norm_backward": lambda a: [a[0], a[1]] if a[7] else [],
    "aten::cudnn_batch_norm_backward": lambda a: [a[0], a[1]],
    "aten::miopen_batch_norm_backward": lambda a: [a[0], a[1]],
    "aten::convolution_backward": lambda a: [a[0]] if a[-1][0] and a[-1][1] else [],
}

# The same for ops of fusedres: what they read again, and the arguments of which one must be true for that. BatchNorm's
# backward takes the sums first, unless its statistics are frozen and no sums are needed.
_SUMS = ("x_batch_statistics", "with_sums")
_OPS_READ_AGAIN = {
    "bn_add_relu_backward": (("grad", "gate", "x", "shortcut"), (*_SUMS, "shortcut_batch_statistics")),
    "bn_add_relu_backward_": (("grad", "gate", "x", "shortcut"), (*_SUMS, "shortcut_batch_statistics")),
    "bn_relu_backward_": (("grad", "x"), _SUMS),
    "bn_relu_backward_add_": (("grad", "x"), _SUMS),
    "bn_relu_maxpool_backward": (("grad", "argmax", "x"), _SUMS),
    "bn_relu_maxpool_backward_": (("grad", "argmax", "x"), _SUMS),
    # with dz: d and z each enter two products; dz, as large as z, is read and written once more for the second one
    "one_pass_backward": (("d", "z", "z", "z"), ("with_input",)),
}


# The channels of an argument that an op touches, where that is not all of them: of the buffer of a dense block.
_OPS_TOUCH: dict[str, Callable[[dict[str, Any]], dict[str, int]]] = {
    "dense_append_": lambda a: {"buffer": a["x"].shape[1]},
    "dense_bn_relu": lambda a: {"buffer": a["state"].shape[1]},
    "dense_bn_relu_backward_": lambda a: dict.fromkeys(("buffer", "grad_x"), a["grad"].shape[1]),
    "dense_gradient": lambda a: {"grad_x": a["channels"], "buffer": a["channels"] if a["moments"] is not None else 0},
}


@dataclass
class Launch:
    """One operator that ran: its name, the bytes read and the bytes written."""

    name: str
    read: int
    written: int


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes that a pass over `tensor` touches; a dimension of stride 0 counts as one element."""
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


class CountBytes(TorchDispatchMode):
    """Counts the bytes of the tensor arguments and results of every operator that runs inside, gradients included.

    An operator reads each distinct argument once and writes each result once. An argument that it changes in place is
    written, and also read unless the operator only fills it. Views and uninitialised allocations move nothing.
    Arguments that an operator reads again (`_read_again`) count again. An argument counts in full even if a stride
    skips part of it, but for the buffer of a dense block. Memory that an operator uses inside, such as the workspace of
    a library, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    @property
    def read(self) -> int:
        return sum(launch.read for launch in self.launches)

    @property
    def written(self) -> int:
        return sum(launch.written for launch in self.launches)

    @property
    def total(self) -> int:
        return self.read + self.written

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Sizes are taken before the call, as an operator may resize its arguments.
        inputs = _distinct(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        changed = _distinct(_written_arguments(func, args, kwargs))
        sizes = {key: tensor_bytes(t) for key, t in inputs.items()} | _touched(func, args)
        again = sum(tensor_bytes(t) for t in _read_again(func, args) if t is not None)
        result = func(*args, **kwargs)
        if _moves_nothing(func):
            return result
        results = _distinct(t for t in tree_leaves(result) if isinstance(t, Tensor))
        storages = {_memory(t) for t in inputs.values()}
        fresh = {k: t for k, t in results.items() if _memory(t) not in storages}
        if inputs and results and not fresh and not changed:
            return result  # a view, or an argument that is returned
        only_filled = changed.keys() if _only_fills(func) else ()
        read = again
        if not _makes_constants(func):
            read += sum(size for key, size in sizes.items() if key not in only_filled)
        written = sum(tensor_bytes(t) for t in fresh.values()) + sum(sizes[key] for key in changed)
        self.launches.append(Launch(func._schema.name, read, written))
        return result

    def by_operator(self) -> dict[str, tuple[int, int]]:
        """Return name → (calls, bytes), most bytes first."""
        table: dict[str, tuple[int, int]] = {}
        for launch in self.launches:
            calls, moved = table.get(launch.name, (0, 0))
            table[launch.name] = (calls + 1, moved + launch.read + launch.written)
        return dict(sorted(table.items(), key=lambda item: -item[1][1]))


class CountRun(CountBytes):
    """Counts operators. If an op of fusedres launches Triton kernels, the arguments of these launches count instead.

    Operators that such an op calls besides its kernels are counted too. The kernels of this package in C++ and CUDA do
    not record their launches, so their ops count like any other operator.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = OPS.get(func._schema.name.partition("::")[2]) if func.namespace == "fusedres" else None
        if op is None or op.serving(args[-1]) != "triton":
            return super().__torch_dispatch__(func, types, args, kwargs)
        from fusedres.kernels.triton_core.launch import record_launches

        with self, record_launches() as launches:
            result = op.checked(*args)
        self.launches += [Launch(launch.name, launch.bytes(), 0) for launch in launches]
        return result


def _read_again(func, args: tuple) -> list[Tensor | None]:
    """Return the arguments that an operator reads after its first read of them, one entry for each further read."""
    if func.namespace != "fusedres":
        found = _TORCH_READS_AGAIN.get(func._schema.name)
        return found(args) if found else []
    op = func._schema.name.partition("::")[2]
    again, conditions = _OPS_READ_AGAIN.get(op, ((), ()))
    given = dict(zip(OPS[op].arguments, args, strict=True))
    return [given[name] for name in again] if any(given[name] for name in conditions) else []


def _touched(func, args: tuple) -> dict[tuple, int]:
    """Return the bytes of the arguments that an operator touches in part."""
    op = func._schema.name.partition("::")[2]
    if func.namespace != "fusedres" or op not in _OPS_TOUCH:
        return {}
    given = dict(zip(OPS[op].arguments, args, strict=True))
    found = {}
    for name, channels in _OPS_TOUCH[op](given).items():
        (key,) = _distinct(iter([given[name]]))
        found[key] = tensor_bytes(given[name]) * channels // given[name].shape[1]
    return found


def _distinct(tensors: Iterator[Tensor]) -> dict[tuple, Tensor]:
    found = {}
    for t in tensors:
        place = (t.storage_offset(), tuple(t.shape), tuple(t.stride())) if t.layout is torch.strided else ()
        found.setdefault((_memory(t), *place), t)
    return found


def _memory(tensor: Tensor) -> int:
    """Return an id that views of the same memory share; an opaque tensor of a library is memory of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _written_arguments(func, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))


def _moves_nothing(func) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return name.startswith(("empty", "new_empty", "sym_")) or name in ("detach", "_local_scalar_dense", "is_same_size")


def _makes_constants(func) -> bool:
    name = func._schema.name
    return name.endswith("_like") or name.startswith("aten::new_")


def _only_fills(func) -> bool:
    name = func._schema.name
    return name in (
        "aten::copy_",
        "aten::fill_",
        "aten::zero_",
        "fusedres::dense_append_",
    ) or func._overloadname.endswith("out")

"""The table of an op's arguments, and the one check of a call against it, before anything is allocated or written.

A table has a row for each argument that decides what memory is touched, in the order of the checks. A row is data:

    "x": activation("N C H W"),                     # dense channels_last, any floating dtype, which is then that of x
    "state": wide("4 C"),                           # contiguous, in the arithmetic dtype of x
    "shortcut_state": wide("4 C", only_with="shortcut"),

The shapes' language is that of _shapes.py. Which arguments may be None, and which are written, the op's schema says
(`Tensor?`, `Tensor(a!)`); an argument that is written is read too, except where its op says otherwise. All tensors of a
call are on one device, which the backend serves. Their memory is the matter of _memory.py.

Messages: op and argument, expected, got, remedy. TypeErrors for the kind, ValueErrors for the value (both of them
RuntimeErrors as well where torch raises those, see errors.py), RuntimeErrors for device and storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from fusedres import backends
from fusedres.errors import DtypeError, ShapeError
from fusedres.ops._memory import fail
from fusedres.ops._shapes import Scope, Shape
from fusedres.ops._sizes import FLOATING, WIDE, wide_dtype
from fusedres.values import Geometry

_LARGEST = 2**31 - 1  # of an int argument: products of a few of them and a tensor's size stay inside of 64 bits
_MAKE_CHANNELS_LAST = "call .contiguous(memory_format=torch.channels_last)"


class Call:
    """A call of an op while it is checked: the arguments by name, and what they said so far."""

    def __init__(self, op: str, values: Mapping[str, Any], backend: str) -> None:
        self.op, self.values, self.backend = op, values, backend
        self.scope = Scope(values)
        self.device: torch.device | None = None
        self.first = ""  # the argument that set the device
        self._scopes: dict[int, Scope] = {}

    def __getitem__(self, argument: str) -> Any:
        return self.values[argument]

    def item(self, index: int) -> Scope:
        """The sizes and dtypes of one item of the lists of tensors, which say nothing of the other items."""
        return self._scopes.setdefault(index, Scope(self.values))

    def fail(self, error: type[Exception], argument: str, expected: str, got: object, remedy: str = "") -> NoReturn:
        """Raises the error: `op: argument must expected, got what it is; remedy`."""
        fail(error, self.op, argument, expected, got, remedy)


@dataclass(frozen=True)
class Argument:
    """A row of a tensor."""

    shape: Shape | None  # None: any
    dtype: str | torch.dtype  # "x": that of the activations; "wide": what they are computed in; "floating": any such
    layout: str  # "channels_last", "contiguous", or "strided": any
    empty: bool = True  # whether N may be 0; no other size may
    required: bool = False  # may not be None, although the value that it is a field of says so
    given_with: str = ""  # None exactly where this argument is None
    only_with: str = ""  # None where this argument is None
    not_with: str = ""  # None where this argument is not None
    remedy: str = ""  # for a wrong shape

    def check(self, call: Call, name: str) -> None:
        """Raises where the argument is not what this row says."""
        value = call[name]
        self._check_presence(call, name, value)
        if value is not None:
            self.check_tensor(call, name, value, call.scope)

    def _check_presence(self, call: Call, name: str, value: Tensor | None) -> None:
        if value is None:
            if self.required:
                call.fail(DtypeError, name, "be a tensor", "None", "this op needs it")
            if self.given_with and call[self.given_with] is not None:
                remedy = "pass both or neither"
                call.fail(ValueError, name, f"be given with {self.given_with}", "None", remedy)
            return
        for other in filter(None, (self.given_with, self.only_with)):
            if call[other] is None:
                call.fail(
                    ValueError, name, f"be None without {other}", "a tensor", f"pass {other} too, or none of them"
                )
        if self.not_with and call[self.not_with] is not None:
            call.fail(ValueError, name, f"be None with {self.not_with}", "both", "pass one of the two")

    def check_tensor(self, call: Call, name: str, tensor: Tensor, scope: Scope) -> None:
        """Raises where a tensor is not what this row says."""
        _check_device(call, name, tensor)
        self._check_dtype(call, name, tensor, scope)
        if self.shape is not None:
            self._check_shape(call, name, tensor, self.shape, scope)
        if self.layout == "channels_last" and not tensor.is_contiguous(memory_format=torch.channels_last):
            got = f"strides {tensor.stride()}"
            call.fail(ShapeError, name, "be dense and channels_last", got, _MAKE_CHANNELS_LAST)
        if self.layout == "contiguous" and not tensor.is_contiguous():
            call.fail(ShapeError, name, "be contiguous", f"strides {tensor.stride()}", "call .contiguous()")

    def _check_dtype(self, call: Call, name: str, tensor: Tensor, scope: Scope) -> None:
        dtype, wanted = tensor.dtype, self.dtype
        if isinstance(wanted, torch.dtype):
            if dtype is not wanted:
                call.fail(DtypeError, name, f"be {wanted}", dtype)
            return
        known = scope.dtypes.get(wanted)
        if known is not None:
            if dtype is not known:
                expected = f"be {known} {scope.reasons[wanted]}"
                call.fail(DtypeError, name, expected, dtype, "convert one of them")
            return
        allowed = WIDE if wanted == "wide" else FLOATING
        if dtype not in allowed:
            expected = f"be {' or '.join(', '.join(map(_short, allowed)).rsplit(', ', 1))}"
            call.fail(DtypeError, name, expected, dtype, "convert it first")
        if wanted != "floating":
            set_dtype(scope, dtype, name, activations=wanted == "x")

    def _check_shape(self, call: Call, name: str, tensor: Tensor, shape: Shape, scope: Scope) -> None:
        got = tensor.shape
        if not shape.fits(got, scope, name):
            call.fail(ShapeError, name, shape.expected(scope, name), tuple(got), self.remedy)
        if tensor.numel() == 0 and any(
            n == 0 and not (self.empty and s.word == "N") for n, s in zip(got, shape.sizes, strict=True)
        ):
            exception = ", only N may be 0" if self.empty and shape.sizes[0].word == "N" else ""
            call.fail(ShapeError, name, f"have shape {shape.text} and not be empty{exception}", tuple(got))


def set_dtype(scope: Scope, dtype: torch.dtype, setter: str, activations: bool) -> None:
    """The dtype of the call's activations, or the one that they are computed in, is known from now on."""
    if activations:
        scope.dtypes["x"], scope.reasons["x"] = dtype, f"like {setter}"
        scope.dtypes["wide"], scope.reasons["wide"] = wide_dtype(dtype), f"with {setter} of {dtype}"
    else:
        scope.dtypes["wide"], scope.reasons["wide"] = dtype, f"like {setter}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_device(call: Call, name: str, tensor: Tensor) -> None:
    device = tensor.device
    if call.device is None:
        served = backends.served_devices(call.backend, device.type)
        if device.type not in served:
            expected = f"be on {' or '.join(served)} for the {call.backend} backend"
            call.fail(RuntimeError, name, expected, device, "move it or use another backend")
        call.device, call.first = device, name
    elif device != call.device:
        call.fail(RuntimeError, name, f"be on {call.device} like {call.first}", device, "move one of them")


@dataclass(frozen=True)
class Items:
    """A row of a list of tensors, each of them with sizes and dtypes of its own."""

    item: Argument
    most: int

    def check(self, call: Call, name: str) -> None:
        """Raises where the list has another number of tensors, or one of them is not what this row says."""
        if not 1 <= len(call[name]) <= self.most:
            call.fail(ShapeError, name, f"be 1 to {self.most} tensors", len(call[name]))
        for index, tensor in enumerate(call[name]):
            self.item.check_tensor(call, f"{name}[{index}]", tensor, call.item(index))


@dataclass(frozen=True)
class Integer:
    """A row of an int."""

    least: int
    most: int = _LARGEST

    def check(self, call: Call, name: str) -> None:
        """Raises where the number is outside of its limits."""
        if not self.least <= call[name] <= self.most:
            limit = f"at least {self.least}" if call[name] < self.least else f"at most {self.most}"
            call.fail(ShapeError, name, f"be {limit}", call[name])


@dataclass(frozen=True)
class Integers:
    """A row of a list of ints, which may be sizes of the call."""

    count: int
    least: int
    shape: Shape | None = None

    def check(self, call: Call, name: str) -> None:
        """Raises where the list has another length, or a number is outside of its limits."""
        got = tuple(call[name])
        if len(got) != self.count or not all(self.least <= number <= _LARGEST for number in got):
            count = {2: "two", 4: "four"}[self.count]
            limit = "at most" if got and max(got) > _LARGEST else "at least"
            number = _LARGEST if limit == "at most" else self.least
            call.fail(ShapeError, name, f"be {count} integers of {limit} {number}", got)
        if self.shape is not None and not self.shape.fits(got, call.scope, name):
            call.fail(ShapeError, name, self.shape.expected(call.scope, name), got)


@dataclass(frozen=True)
class ActivationDtype:
    """A row of a dtype: that of the activations, none of which is an argument."""

    def check(self, call: Call, name: str) -> None:
        """Raises where the dtype is not one that activations have."""
        if call[name] not in FLOATING:
            call.fail(DtypeError, name, "be float32, float64, bfloat16 or float16", call[name])
        set_dtype(call.scope, call[name], name, activations=True)


@dataclass(frozen=True)
class Gate:
    """A row of packed bits, or of a ReLU's output."""

    bits: Argument
    output: Argument

    def check(self, call: Call, name: str) -> None:
        """Raises where the argument is neither of the two."""
        row = self.bits if call[name] is not None and call[name].dtype is torch.uint8 else self.output
        row.check(call, name)


@dataclass(frozen=True)
class Convolved:
    """A row of no argument: two sizes, those of a convolution's output.

    They are the call's P and Q from here on; where an argument has set those, it is checked to have what follows.
    """

    image: tuple[str, str]
    kernel: tuple[str, str]

    def check(self, call: Call, name: str) -> None:
        """Raises where the output has no pixels, or an argument other ones."""
        sizes, outputs = call.scope.sizes, tuple(name.split())
        image, kernel = (tuple(sizes[n] for n in names) for names in (self.image, self.kernel))
        geometry = Geometry(call["stride"], call["padding"], call["dilation"])
        reached = geometry.output_shape((0, 0, *image), (0, 0, *kernel))[2:]
        of_what = f"a convolution of {image[0]}x{image[1]} pixels with a kernel of {kernel[0]}x{kernel[1]}"
        setter = call.scope.setters[self.image[0]]
        if min(reached) < 1:
            got = f"{of_what} that reaches none"
            call.fail(ShapeError, setter, "be at least as large as the dilated weight less the padding", got)
        setter = call.scope.setters.get(outputs[0], "")
        if setter and tuple(sizes[n] for n in outputs) != reached:
            expected = f"have {reached[0]}x{reached[1]} pixels, which is what {of_what} gives"
            remedy = "do stride, padding and dilation belong to this convolution?"
            call.fail(ShapeError, setter, expected, call.scope.shapes[setter], remedy)
        call.scope.shapes["the output"] = reached
        for output, size in zip(outputs, reached, strict=True):
            call.scope.matches(output, size, "the output")


Row = Argument | Items | Integer | Integers | ActivationDtype | Gate | Convolved
Relations = Callable[[Call], None]


def activation(shape: str, dtype: str | torch.dtype = "x", **options: Any) -> Argument:
    """A dense channels_last tensor in the activations' dtype."""
    return Argument(Shape(shape), dtype, "channels_last", **options)


def dense(shape: str, dtype: str | torch.dtype, **options: Any) -> Argument:
    """A contiguous tensor."""
    return Argument(Shape(shape), dtype, "contiguous", **options)


def wide(shape: str, **options: Any) -> Argument:
    """A contiguous tensor in the dtype that activations are computed in: float64 for float64, else float32."""
    return dense(shape, "wide", **options)


def strided(shape: str | None, dtype: str, **options: Any) -> Argument:
    """A tensor of any strides."""
    return Argument(None if shape is None else Shape(shape), dtype, "strided", **options)


def bits(shape: str, **options: Any) -> Argument:
    """The packed bits of an activation of this shape: uint8 (N, H, W, ceil(C / 8))."""
    n, c, h, w = shape.split()
    return dense(f"{n} {h} {w} {c}/8", torch.uint8, **options)


def gate(shape: str, **options: Any) -> Gate:
    """Where a ReLU is open: packed bits, or its output."""
    return Gate(bits(shape, **options), activation(shape, **options))


def norm(channels: str, *, running: bool = False) -> dict[str, Argument]:
    """Rows of a Norm with this many channels; running: its running statistics may not be None."""
    vector = dense(channels, "floating")
    return {
        "weight": vector,
        "bias": vector,
        "running_mean": dense(channels, "floating", required=running),
        "running_var": dense(channels, "floating", given_with="running_mean"),
        "num_batches_tracked": dense("", torch.int64),
    }


def convolution(image: str, kernel: str) -> dict[str, Row]:
    """The geometry of a convolution of "H W" pixels with a kernel of "R S": sets P and Q, or checks them."""
    h, w = image.split()
    r, s = kernel.split()
    return {
        "stride": Integers(2, 1),
        "padding": Integers(2, 0),
        "dilation": Integers(2, 1),
        "P Q": Convolved((h, w), (r, s)),
    }

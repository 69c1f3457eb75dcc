"""The table of an op's arguments, and the one check of a call against it, before anything is allocated or written.

A table has a row for each argument that decides what memory is touched, in the order of the checks. A row is data:

    "x": activation("N C H W"),                     # dense channels_last, in the dtype of the activations
    "state": wide("4 C"),                           # contiguous, in the arithmetic dtype of x
    "shortcut_state": wide("4 C", only_with="shortcut"),

_shapes.py describes the language of the shapes. The op's schema says which arguments may be None and which are written;
an argument that is written is read too, unless its op says otherwise. All tensors of a call must be on one device that
the backend serves. _memory.py checks their memory.

A message has op and argument, expected, got, remedy. Errors are TypeErrors for the kind and ValueErrors for the value
(both also RuntimeErrors where torch raises those, see errors.py), and RuntimeErrors for device and storage.
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
from fusedres.ops._sizes import FLOATING, WIDE
from fusedres.values import Geometry, arithmetic_dtype

_LARGEST = 2**31 - 1  # of an int argument: products of a few of them and a tensor's size stay inside of 64 bits


class Call:
    """A call of an op while it is checked: the arguments by name, and what is known from them so far."""

    def __init__(self, op: str, values: Mapping[str, Any], backend: str) -> None:
        self.op, self.values, self.backend = op, values, backend
        self.scope = Scope(values)
        self.device: torch.device | None = None
        self.first = ""  # the argument that set the device
        self._scopes: dict[int, Scope] = {}

    def __getitem__(self, argument: str) -> Any:
        return self.values[argument]

    def item(self, index: int) -> Scope:
        """The sizes and dtypes of one item of the lists of tensors; the other items have their own."""
        return self._scopes.setdefault(index, Scope(self.values))

    def fail(self, error: type[Exception], argument: str, expected: str, got: object, remedy: str = "") -> NoReturn:
        """Raise the error with the text `op: argument must expected, got got; remedy`."""
        fail(error, self.op, argument, expected, got, remedy)


@dataclass(frozen=True)
class Argument:
    """The row of a tensor."""

    shape: Shape | None  # None: any
    dtype: str | torch.dtype  # "x": that of the activations; "wide": what they are computed in; "floating": any such
    layout: str  # "channels_last", "contiguous", or "strided": any
    empty: bool = True  # whether N may be 0; no other size may
    required: bool = False  # may not be None, although its type says that it may
    given_with: str = ""  # None exactly if this other argument is None
    only_with: str = ""  # None if this other argument is None
    not_with: str = ""  # None if this other argument is not None
    remedy: str = ""  # for a wrong shape

    def check(self, call: Call, name: str) -> None:
        value = call[name]
        self._check_presence(call, name, value)
        if value is not None:
            self.check_tensor(call, name, value, call.scope)

    def _check_presence(self, call: Call, name: str, value: Tensor | None) -> None:
        if value is None:
            if self.required:
                call.fail(DtypeError, name, "be a tensor", "None", "this op needs it")
            if self.given_with and call[self.given_with] is not None:
                call.fail(ValueError, name, f"be given with {self.given_with}", "None", "pass both or neither")
            return
        for other in filter(None, (self.given_with, self.only_with)):
            if call[other] is None:
                remedy = f"pass {other} too, or none of them"
                call.fail(ValueError, name, f"be None without {other}", "a tensor", remedy)
        if self.not_with and call[self.not_with] is not None:
            call.fail(ValueError, name, f"be None with {self.not_with}", "both", "pass one of the two")

    def check_tensor(self, call: Call, name: str, tensor: Tensor, scope: Scope) -> None:
        """Check a tensor that is given, with the sizes and dtypes that are known in this scope."""
        _check_device(call, name, tensor)
        self._check_dtype(call, name, tensor.dtype, scope)
        if self.shape is not None:
            self._check_shape(call, name, tensor, self.shape, scope)
        got = f"strides {tensor.stride()}"
        if self.layout == "channels_last" and not tensor.is_contiguous(memory_format=torch.channels_last):
            remedy = "call .contiguous(memory_format=torch.channels_last)"
            call.fail(ShapeError, name, "be dense and channels_last", got, remedy)
        if self.layout == "contiguous" and not tensor.is_contiguous():
            call.fail(ShapeError, name, "be contiguous", got, "call .contiguous()")

    def _check_dtype(self, call: Call, name: str, dtype: torch.dtype, scope: Scope) -> None:
        wanted = self.dtype
        if isinstance(wanted, torch.dtype):
            if dtype is not wanted:
                call.fail(DtypeError, name, f"be {wanted}", dtype)
            return
        known = scope.dtypes.get(wanted)
        if known is not None:
            if dtype is not known:
                call.fail(DtypeError, name, f"be {known} {scope.reasons[wanted]}", dtype, "convert one of them")
            return
        allowed = WIDE if wanted == "wide" else FLOATING
        if dtype not in allowed:
            names = ", ".join(str(each).removeprefix("torch.") for each in allowed).rsplit(", ", 1)
            call.fail(DtypeError, name, f"be {' or '.join(names)}", dtype, "convert it first")
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
    """Note the dtype of the call's activations, or the dtype that they are computed in."""
    if activations:
        scope.dtypes["x"], scope.reasons["x"] = dtype, f"like {setter}"
        scope.dtypes["wide"], scope.reasons["wide"] = arithmetic_dtype(dtype), f"with {setter} of {dtype}"
    else:
        scope.dtypes["wide"], scope.reasons["wide"] = dtype, f"like {setter}"


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
    """The row of a list of tensors, each of them with sizes and dtypes of its own."""

    item: Argument
    most: int

    def check(self, call: Call, name: str) -> None:
        if not 1 <= len(call[name]) <= self.most:
            call.fail(ShapeError, name, f"be 1 to {self.most} tensors", len(call[name]))
        for index, tensor in enumerate(call[name]):
            self.item.check_tensor(call, f"{name}[{index}]", tensor, call.item(index))


@dataclass(frozen=True)
class Integer:
    """The row of an int."""

    least: int
    most: int = _LARGEST

    def check(self, call: Call, name: str) -> None:
        if not self.least <= call[name] <= self.most:
            limit = f"at least {self.least}" if call[name] < self.least else f"at most {self.most}"
            call.fail(ShapeError, name, f"be {limit}", call[name])


@dataclass(frozen=True)
class Integers:
    """The row of a list of ints, which may be sizes of the call."""

    count: int
    least: int
    shape: Shape | None = None

    def check(self, call: Call, name: str) -> None:
        got = tuple(call[name])
        if len(got) != self.count or not all(self.least <= number <= _LARGEST for number in got):
            count = {2: "two", 4: "four"}[self.count]
            limit = f"at most {_LARGEST}" if got and max(got) > _LARGEST else f"at least {self.least}"
            call.fail(ShapeError, name, f"be {count} integers of {limit}", got)
        if self.shape is not None and not self.shape.fits(got, call.scope, name):
            call.fail(ShapeError, name, self.shape.expected(call.scope, name), got)


@dataclass(frozen=True)
class ActivationDtype:
    """The row of a dtype: that of the activations, none of which is an argument."""

    def check(self, call: Call, name: str) -> None:
        if call[name] not in FLOATING:
            call.fail(DtypeError, name, "be float32, float64, bfloat16 or float16", call[name])
        set_dtype(call.scope, call[name], name, activations=True)


@dataclass(frozen=True)
class Gate:
    """The row of packed bits, or of a ReLU's output."""

    bits: Argument
    output: Argument

    def check(self, call: Call, name: str) -> None:
        row = self.bits if call[name] is not None and call[name].dtype is torch.uint8 else self.output
        row.check(call, name)


@dataclass(frozen=True)
class Convolved:
    """The row of two sizes that are no argument: those of a convolution's output.

    They are the call's P and Q from here on. If an argument has set these before, it must have this size.
    """

    image: tuple[str, ...]
    kernel: tuple[str, ...]

    def check(self, call: Call, name: str) -> None:
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


@dataclass(frozen=True)
class NormalisedShortcut:
    """The row of a ShortcutInput as a whole: with a state, it has the shape of the output, (N, channels, P, Q)."""

    channels: str

    def check(self, call: Call, name: str) -> None:
        out = tuple(call.scope.sizes[size] for size in ("N", self.channels, "P", "Q"))
        got = None if call["shortcut_state"] is None else tuple(call["shortcut"].shape)
        if got not in (None, out):
            remedy = "a normalised shortcut is neither strided nor padded"
            call.fail(ShapeError, "shortcut", f"have shape {out} like the output", got, remedy)


Row = Argument | Items | Integer | Integers | ActivationDtype | Gate | Convolved | NormalisedShortcut
Rows = dict[str, Row]
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


def strided(shape: str | None, dtype: str | torch.dtype, **options: Any) -> Argument:
    """A tensor of any strides."""
    return Argument(None if shape is None else Shape(shape), dtype, "strided", **options)


def bits(shape: str, **options: Any) -> Argument:
    """The packed bits of an activation of this shape: uint8 (N, H, W, ceil(C / 8))."""
    n, c, h, w = shape.split()
    return dense(f"{n} {h} {w} {c}/8", torch.uint8, **options)


def gate(shape: str, **options: Any) -> Gate:
    """What says where a ReLU is open: packed bits, or its output."""
    return Gate(bits(shape, **options), activation(shape, **options))


def shortcut_input(channels: str, **options: Any) -> Rows:
    """The rows of a ShortcutInput, for an output with this many channels."""
    shape = f"N L<={channels} P*shortcut_stride Q*shortcut_stride"
    return {
        "shortcut_stride": Integer(1),
        "shortcut": activation(shape, remedy="was the downsample branch skipped?", **options),
        "shortcut_state": wide(f"4 {channels}", only_with="shortcut"),
        "the normalised shortcut": NormalisedShortcut(channels),
    }


def norm(channels: str, *, running: bool = False) -> dict[str, Argument]:
    """The rows of a Norm with this many channels; running: its running statistics may not be None."""
    vector = dense(channels, "floating")
    affine, count = {"weight": vector, "bias": vector}, {"num_batches_tracked": dense("", torch.int64)}
    if running:  # they say how many channels there are
        needed = dense(channels, "floating", required=True)
        return {"running_mean": needed, "running_var": needed} | affine | count
    variance = dense(channels, "floating", given_with="running_mean")
    return affine | {"running_mean": vector, "running_var": variance} | count


def convolution(image: str, kernel: str) -> Rows:
    """The rows of a Geometry, for "H W" pixels and a kernel of "R S"; they set P and Q, or check them."""
    numbers = {"stride": Integers(2, 1), "padding": Integers(2, 0), "dilation": Integers(2, 1)}
    return {**numbers, "P Q": Convolved(tuple(image.split()), tuple(kernel.split()))}

"""A device's measured choices: what "auto" runs for each shape of block, and the tile sizes of each GEMM problem.

As JSON, one object:

    format, device, versions, date, backend    what was measured where; `backend` serves shapes without an entry
    blocks     one object per Shape: its fields, `way`, `eager_over_way`
    configs    launch.problem_key → label of the fastest config

A way is "unfused" or {"backend", "1x1", "larger", "one_pass"}. "1x1" and "larger" list which of fprop, dgrad and wgrad
run in this package's own kernels, for 1x1 convolutions and for larger ones. "one_pass" says whether BatchNorm
statistics are computed before the convolution.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, log2
from reprlib import repr as _short
from typing import Any, NamedTuple

FORMAT = 1
BACKENDS = ("reference", "cpu", "triton", "cuda")
SHORTCUTS = ("identity", "projection", "zero_pad", "none")
DTYPES = ("float32", "tf32", "bfloat16", "float16", "float64")
PHASES = ("train", "infer")
LARGEST_SIZE = 2**63 - 1  # the largest possible size of a tensor


class Directions(NamedTuple):
    """Which of a convolution's three products run in this package's own kernels; the library runs the others."""

    fprop: bool
    dgrad: bool
    wgrad: bool


LIBRARY = Directions(False, False, False)


class Way(NamedTuple):
    """How a block or a stem runs: unfused, or on a backend, with these products in this package's own kernels."""

    backend: str | None  # None: unfused
    pixelwise: Directions = LIBRARY  # for 1x1 convolutions
    larger: Directions = LIBRARY  # for larger convolutions
    one_pass: bool = False

    def __str__(self) -> str:
        if self.backend is None:
            return "unfused"
        own = [
            f"{kernels} {'+'.join(_names(directions))}"
            for kernels, directions in (("1x1", self.pixelwise), ("larger", self.larger))
            if any(directions)
        ]
        return ", ".join([self.backend, *own, *(["one pass"] if self.one_pass else [])])


UNFUSED = Way(None)


class Shape(NamedTuple):
    """Everything that the fastest way depends on."""

    kind: str  # basic, bottleneck, "stem 7x7"
    shortcut: str  # identity, projection, zero_pad; none for a stem
    in_channels: int
    channels: int  # after the first convolution
    out_channels: int
    groups: int
    stride: int
    dilation: int
    height: int  # of the input
    width: int
    batch: int  # rounded to a power of two, see batch_class
    dtype: str  # of the convolutions: float32, tf32, bfloat16, float16, float64
    phase: str  # train if gradients are recorded, else infer


class Entry(NamedTuple):
    """The result of the measurements of a shape."""

    way: Way
    eager_over_way: float | None  # eager's time / that of the fastest fused way; None: no fused way was correct


@dataclass(frozen=True, eq=False)
class Table:
    """The choices of one device; see the head of this file."""

    device: str
    backend: str
    versions: dict[str, str | None]
    date: str
    blocks: dict[Shape, Entry]
    configs: dict[str, str]

    @property
    def backends(self) -> frozenset[str]:
        """All backends that the table names."""
        return frozenset({self.backend, *(e.way.backend for e in self.blocks.values() if e.way.backend is not None)})

    def way(self, shape: Shape) -> Way:
        """Return the way of this shape, else that of a similar one; see `_nearest`."""
        return _nearest(self, shape)


def batch_class(batch: int) -> int:
    """Return the power of two nearest to a batch; an empty batch counts as one image."""
    return 1 << round(log2(max(1, batch)))


# The largest distance of an entry with other sizes, in factors of two over channels, height, width and batch together.
_FAR = 3.0
_FAR_BATCH = 2.0  # the same for the batch alone, in factors of two


@lru_cache(maxsize=4096)
def _nearest(table: Table, shape: Shape) -> Way:
    """Return the way of the most similar entry.

    Only entries of the same kind, shortcut, groups, stride, dilation, dtype and phase count, with a batch at most
    _FAR_BATCH away. Of those with exactly these sizes, take the nearest batch; else the nearest in sizes, up to _FAR.
    If there is none, return the table's backend with the library's convolutions; but unfused if a GPU's table has no
    entry with its backend.
    """
    alike = [
        other
        for other in table.blocks
        if _kinds(other) == _kinds(shape) and abs(log2(other.batch) - log2(shape.batch)) <= _FAR_BATCH
    ]
    if alike:
        nearest = min(alike, key=lambda other: (_sizes(other) != _sizes(shape), _distance(other, shape)))
        if _sizes(nearest) == _sizes(shape) or _distance(nearest, shape) <= _FAR:
            return table.blocks[nearest].way
    known = table.backend == "cpu" or any(entry.way.backend == table.backend for entry in table.blocks.values())
    return Way(table.backend) if known else UNFUSED


def _kinds(shape: Shape) -> tuple[str | int, ...]:
    return shape.kind, shape.shortcut, shape.groups, shape.stride, shape.dilation, shape.dtype, shape.phase


def _sizes(shape: Shape) -> tuple[int, ...]:
    return shape.in_channels, shape.channels, shape.out_channels, shape.height, shape.width


def _distance(a: Shape, b: Shape) -> float:
    """Return the distance of two shapes in factors of two; sizes of 0, which a call may have, count as 1."""
    pairs = zip((*_sizes(a), a.batch), (*_sizes(b), b.batch), strict=True)
    return sum(abs(log2(max(1, x)) - log2(max(1, y))) for x, y in pairs)


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(table: Table) -> dict[str, Any]:
    """Return the object that `parse` reads."""
    blocks = [
        shape._asdict() | {"way": _way_as_json(entry.way), "eager_over_way": entry.eager_over_way}
        for shape, entry in sorted(table.blocks.items())
    ]
    about = {"format": FORMAT, "device": table.device, "versions": table.versions, "date": table.date}
    return about | {"backend": table.backend, "blocks": blocks, "configs": dict(sorted(table.configs.items()))}


def decode(data: bytes) -> Any:
    """Read JSON strictly by the standard: UTF-8, no NaN, and no name twice in an object.

    Raises:
        ValueError: the data is not such JSON, or is nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number in JSON")

    try:
        return json.loads(data.decode(), object_pairs_hook=_once, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse(data: Any, device: str | None) -> Table:
    """Return the table in decoded JSON; device: the family that it must be for, None: any.

    Raises:
        ValueError: the table has another format, is for another device, or is broken; the message says why.
    """
    if not isinstance(data, dict):
        raise ValueError("it holds no JSON object")
    version, measured_on = data.get("format"), data.get("device")
    if type(version) is not int or version != FORMAT:
        raise ValueError(f"its format is {_short(version)}, expected {FORMAT}")
    if device is None:
        device = _text(measured_on)
    if measured_on != device:
        raise ValueError(f"it was measured on {_short(measured_on)}, this is {device!r}")
    try:
        blocks = _once(_block(_object(block)) for block in _list(data["blocks"]))
        configs = {_text(problem): _text(label) for problem, label in _object(data["configs"]).items()}
        found = _object(data["versions"])
        versions = {_text(name): None if version is None else _text(version) for name, version in found.items()}
        return Table(device, _one_of(data["backend"], BACKENDS), versions, _text(data["date"]), blocks, configs)
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise ValueError(f"it is broken: {type(error).__name__}: {error}") from error


def _names(directions: Directions) -> list[str]:
    return [name for name, own in directions._asdict().items() if own]


def _way_as_json(way: Way) -> Any:
    if way.backend is None:
        return "unfused"
    own = {"1x1": _names(way.pixelwise), "larger": _names(way.larger)}
    return {"backend": way.backend, **own, "one_pass": way.one_pass}


def _block(data: dict[str, Any]) -> tuple[Shape, Entry]:
    allowed = {"shortcut": SHORTCUTS, "dtype": DTYPES, "phase": PHASES}
    fields = [
        _one_of(data[name], allowed[name]) if name in allowed
        else _text(data[name]) if name == "kind"
        else _size(data[name])
        for name in Shape._fields
    ]  # fmt: skip
    return Shape._make(fields), Entry(_way(data["way"]), _ratio(data["eager_over_way"]))


def _way(data: Any) -> Way:
    if data == "unfused":
        return UNFUSED
    data = _object(data)
    backend, one_pass = _one_of(data["backend"], BACKENDS), data["one_pass"]
    if not isinstance(one_pass, bool):
        raise ValueError(f"one_pass is {_short(one_pass)}")
    way = Way(backend, _directions(data["1x1"]), _directions(data["larger"]), one_pass)
    if backend == "cpu" and (any(way.pixelwise) or any(way.larger)):
        raise ValueError("the cpu backend has no products to choose: the instruction set decides")
    return way


def _directions(names: Any) -> Directions:
    found = _once((_one_of(name, Directions._fields), True) for name in _list(names))
    return Directions(*(name in found for name in Directions._fields))


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a dict of the pairs; raise if a name occurs twice."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{_short(name)} occurs twice")
        found[name] = value
    return found


def _one_of(value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"expected one of {', '.join(allowed)}, got {_short(value)}")
    return str(value)


def _size(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST_SIZE:
        raise ValueError(f"expected a positive integer of at most 63 bits, got {_short(value)}")
    return value


def _ratio(value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not (isfinite(value) and value >= 0):
        raise ValueError(f"eager_over_way is {_short(value)}")
    return float(value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {_short(value)}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {_short(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {_short(value)}")
    return value

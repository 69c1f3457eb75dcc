"""Checks an op's results element by element against the reference composite in wider arithmetic.

    max |ours − wide| <= 2·max |same − wide| + 4·max |wide(inputs·(1 ± u)) − wide| + 32·u_acc·max |terms|

wide: the reference backend on the same arguments in float32 (float64 for float32 and float64).
same: the reference backend in the op's own dtype, which rounds at the same places as the op.
terms: wide; for means and what depends on them the larger of wide and wide(|inputs|), because a mean near 0 has the
error of the values that cancel in it.

On the right, the second term is the effect of rounding each input once; u is the unit roundoff of the operands of the
products. The third term allows for the order of sums; u_acc is the unit roundoff of the accumulator. This is the rule
of tests/tolerance.py, but both spreads are measured on the device instead of derived. Maxima are over the pixels of
each channel of an activation, over each row of a state, and over all elements of anything else. A norm would not show
one wrong element in 10,000.

An op that recomputes a ReLU's gate may decide differently if the pre-activation is within rounding of 0. Therefore one
element in a million of these ops' gradients may be off, and sums over a gradient may be off by two elements. Bits and
positions must equal those of `same`, with the same exception of one in a million.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from fusedres.dispatch import uses_tf32

if TYPE_CHECKING:  # calls.py needs Triton
    from fusedres.tune.calls import Call

_UNIT = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_UNIT_TF32 = 2.0**-10  # products truncate operands to ten bits
_FLIPPED = 1e-6  # share of a gradient's elements that may be off
_ORDER = 32  # error that the order of a long sum may cause, in unit roundoffs of the accumulator
# Ops that recompute a gate, and the arguments they use. These are not multiplied by 1 ± u, which would flip gates.
_REGATED = {
    "conv_dgrad": ("input", "input_state"),
    "one_pass_dgrad": ("z", "z_state"),
    "bn_relu_backward_": ("x", "x_state"),
    "bn_relu_backward_add_": ("x", "x_state"),
}


def off_by(ours: Tensor, reference: Tensor) -> float:
    """Return ‖ours − reference‖ / ‖reference‖, NaN if either tensor has a NaN; for gradients after many gates."""
    wide = torch.float64 if reference.dtype == torch.float64 else torch.float32
    ours, reference = ours.to(wide), reference.to(wide)
    scale = reference.norm()
    return float((ours - reference).norm() / scale) if scale > 0 else float(ours.norm())


class ExpectedOutput:
    """The output that a whole block or stem must return. Masks near 0 do not matter here, only in backward.

        max |ours − wide| <= 3·max |eager − wide| + 8·unit·max |wide|    over the pixels of each channel

    wide: the stock module's output in wider arithmetic. eager: its output in the precision that is checked, with unit
    roundoff `unit`.
    """

    def __init__(self, eager: Tensor, wide: Tensor, dtype: torch.dtype, tf32: bool) -> None:
        unit = _UNIT_TF32 if tf32 else _UNIT[dtype]
        bound = 3 * _largest(_distance(eager, wide)) + 8 * unit * wide.abs().max()
        self._result = _Result(wide, bound, 0)

    def wrong(self, ours: Tensor) -> str | None:
        """Return what is wrong with an output, in words, or None if it is right."""
        return self._result.wrong(ours)


def wide_output(module: nn.Module, x: Tensor) -> Tensor:
    """Return the output of a copy of a stock module, in float32 if x is in half precision, else in float64; no TF32."""
    wide = torch.float32 if x.dtype.itemsize == 2 else torch.float64
    with true_float32(), torch.autocast(x.device.type, enabled=False), torch.no_grad():
        found: Tensor = copy.deepcopy(module).to(wide)(x.detach().to(wide))
    return found


@dataclass(frozen=True)
class _Result:
    """What one result must be."""

    expected: Tensor  # the wide result; for integers the result in the op's own dtype
    bound: Tensor  # one bound per group of _largest
    flipped: int  # number of elements that may be off

    def wrong(self, ours: Tensor) -> str | None:
        """Return what is wrong with a result, in words, or None if it is right."""
        if ours.shape != self.expected.shape:
            return f"has shape {tuple(ours.shape)}, the reference {tuple(self.expected.shape)}"
        if not ours.is_floating_point():
            count = int((ours != self.expected).sum())
            return f"has {count:,} of {ours.numel():,} elements that differ" if count > self.flipped else None
        error = _distance(ours, self.expected)
        if not bool((_largest(error) > self.bound).any()):
            return None
        beyond = error > _spread(self.bound, error)
        count = int(beyond.sum())
        if count <= self.flipped:
            return None
        at = tuple(int(i) for i in torch.unravel_index(torch.where(beyond, error, -1).argmax(), error.shape))
        return (
            f"has {count:,} of {ours.numel():,} elements off by more than {float(_spread(self.bound, error)[at]):.3g}; "
            f"at {at} it is {float(ours[at]):.6g}, the reference {float(self.expected[at]):.6g}"
        )


class Expected:
    """The results that an op must return for the arguments of a call."""

    def __init__(self, call: Call) -> None:
        narrow = call.dtype
        wide = torch.float32 if narrow.itemsize == 2 else torch.float64
        unit = _UNIT_TF32 if uses_tf32(narrow) else _UNIT[narrow]
        same = call.results("reference")
        with true_float32():
            expected = _widened(call, narrow, wide, 0.0).results("reference")
            moved = _widened(call, narrow, wide, unit).results("reference")
            terms = _absolute(_widened(call, narrow, wide, 0.0)).results("reference") if _has_mean(call) else expected
        regated = call.op.name in _REGATED
        self._results: list[_Result] = []
        slack = 0.0  # added to the bounds of sums over gradients
        for a, b, c, d in zip(same, expected, moved, terms, strict=True):
            if not a.is_floating_point():
                self._results.append(_Result(a, torch.zeros(()), int(_FLIPPED * a.numel())))
                continue
            order = _ORDER * _UNIT[torch.float32 if narrow.itemsize == 2 else narrow]
            of_terms = b.abs() if b.dim() == 4 else torch.maximum(b.abs(), d.abs())
            largest = float(of_terms.nan_to_num(0, 0, 0).max()) if b.numel() else 0.0
            bound = 2 * _largest(_distance(a, b)) + 4 * _largest(_distance(c, b)) + order * largest
            flipped = int(_FLIPPED * b.numel()) if regated and b.dim() == 4 else 0
            if flipped:
                slack = 2 * largest
            elif b.dim() != 4:
                bound = bound + slack
            self._results.append(_Result(b, bound, flipped))

    def wrong(self, ours: Sequence[Tensor]) -> str | None:
        """Return what is wrong with a backend's results, in words, or None if they are right."""
        for position, (result, found) in enumerate(zip(self._results, ours, strict=True)):
            reason = result.wrong(found)
            if reason is not None:
                return f"result {position} {reason}"
        return None


def repeats(call: Call, backend: str, times: int) -> str | None:
    """Return which bits differ between calls with the same arguments, in words, or None if none differ."""
    first = call.results(backend)
    for _ in range(times - 1):
        found = differing(first, call.results(backend))
        if found is not None:
            return f"{found} from call to call"
    return None


def differing(first: Sequence[Tensor], second: Sequence[Tensor]) -> str | None:
    """Return which result differs in its bits, and in how many elements, or None if all are equal."""
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(_bits(a), _bits(b)):
            count = int((_bits(a) != _bits(b)).sum())
            return f"result {position} has {count:,} of {a.numel():,} elements that differ"
    return None


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(values: Tensor) -> Tensor:
    return values.view(_INTEGERS[values.itemsize]) if values.is_floating_point() else values


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return |a − b| in b's dtype; 0 if both elements are NaN or the same infinity, infinite if only one is."""
    a = a.to(b.dtype)
    distance = (a - b).abs()
    return distance.nan_to_num_(torch.inf).masked_fill_((a == b) | (a.isnan() & b.isnan()), 0)


def _largest(values: Tensor) -> Tensor:
    """Return the maximum of each group in which errors are compared."""
    if not values.numel():
        return values.new_zeros(())
    if values.dim() == 4:
        return values.amax((0, 2, 3))
    return values.amax(1) if values.dim() == 2 and values.shape[0] <= 4 else values.amax()


def _spread(bound: Tensor, values: Tensor) -> Tensor:
    """Return the bounds of the groups, expanded to the shape of values."""
    if values.dim() == 4:
        return bound.view(1, -1, 1, 1).expand_as(values)
    return bound.view(-1, 1).expand_as(values) if bound.dim() == 1 else bound.expand_as(values)


def _widened(call: Call, narrow: torch.dtype, wide: torch.dtype, unit: float) -> Call:
    """Return the call in wide arithmetic, with its narrow tensors multiplied by 1 ± unit; signs are always the same."""
    random: dict[torch.device, torch.Generator] = {}

    def convert(value: object, unit: float) -> object:
        if value is narrow:
            return wide
        if not isinstance(value, Tensor) or value.dtype is not narrow:
            return value
        converted = value.to(wide)
        if not unit:
            return converted
        generator = random.setdefault(value.device, torch.Generator(value.device).manual_seed(0))
        signs = torch.empty_like(converted).bernoulli_(0.5, generator=generator)
        return converted * signs.mul_(2 * unit).add_(1 - unit)

    kept = _REGATED.get(call.op.name, ())
    args = (
        tree_map(partial(convert, unit=0.0 if name in kept else unit), value)
        for name, value in zip(call.op.arguments, call.args, strict=True)
    )
    return dataclasses.replace(call, args=tuple(args))


def _has_mean(call: Call) -> bool:
    """Whether a result is the mean of values of either sign."""
    return call.op.name == "conv_fprop" or "running_mean" in call.op.written


def _absolute(call: Call) -> Call:
    """Return the call with the absolute values of its floating-point tensors."""
    args = tree_map_only(Tensor, lambda t: t.abs() if t.is_floating_point() else t, call.args)
    return dataclasses.replace(call, args=args)


class true_float32:  # noqa: N801 - used like a function
    """A context without TF32 in convolutions and matrix products."""

    def __enter__(self) -> None:
        self._before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self._before

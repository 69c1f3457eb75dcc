"""The one rule that compares numbers, for each tensor, in the max norm and in L2:

    err(got) <= factor·err(eager) + floor        err(v) = |v - oracle|, the oracle in float64

Eager is the stock block in the same dtype and memory format. The factor is 2, or 3 for parameter gradients in float16
and bfloat16: there the rounding of stored activations, not of sums, sets the error, and few of these errors enter one
value.

The floor is needed because eager is sometimes right by luck, and always in float64, where it is its own oracle:

    floor = 8·u_acc·sum |terms| + 4·u_store·spread

The terms are those of the last reduction that computes the value. The spread is the standard deviation that rounding
causes in it, to first order through the whole block. Both come from the oracle (reference.py). u_acc is the unit
roundoff of the accumulator: rounding one partial sum costs at most u_acc·sum |terms|. A two-stage sum of n terms rounds
about log2(n) times, here up to 10 times, with errors of either sign; 8 errors of one sign are not expected. u_store is
the unit roundoff of what is kept in memory; 6 of 100,000 values of a Gaussian lie beyond 4 deviations.

Measured with 15,264 errors per dtype (11,424 in bfloat16), for stock blocks in one memory format against eager in the
other: err(got) - factor·err(eager) is at most 0.79 of the floor in float64, where eager helps least, 0.53 in float32,
0.33 in bfloat16 and 0.32 in float16. test_tolerance.py repeats a part of that. The rule does not cover masks that
rounding flips: reference.separate keeps pre-activations away from zero.

Values without a reduction (statistics that are not updated, counters, empty batches) must equal eager's bit by bit.
Infinities and NaN must be at the same places as in eager.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from reference import Oracle, Values
from torch import Tensor

PARTIAL_SUMS = 8.0
DEVIATIONS = 4.0
HALF = (torch.float16, torch.bfloat16)
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 / 2}
ACCUMULATOR = {dtype: UNIT[torch.float64 if dtype == torch.float64 else torch.float32] for dtype in UNIT}


@dataclass(frozen=True)
class Measure:
    """The errors of one tensor in one norm, and the bound for them."""

    norm: str
    error: float
    eager: float
    floor: float
    factor: float

    @property
    def bound(self) -> float:
        return self.factor * self.eager + self.floor

    @property
    def kept(self) -> bool:
        return self.error <= self.bound


def factor_of(name: str, dtype: torch.dtype) -> float:
    return 3.0 if dtype in HALF and name.startswith("grad.") else 2.0


def measure(
    name: str, got: Tensor, eager: Tensor, ref: Tensor, terms: Tensor, spread: Tensor, dtype: torch.dtype
) -> tuple[Measure, Measure]:
    """Return the errors in the max norm and in L2; see the file head."""
    floor = PARTIAL_SUMS * ACCUMULATOR[dtype] * terms + DEVIATIONS * UNIT[dtype] * spread
    got_error, eager_error = (got.double() - ref).abs(), (eager.double() - ref).abs()
    factor = factor_of(name, dtype)
    return (
        Measure("max", got_error.max().item(), eager_error.max().item(), floor.max().item(), factor),
        Measure("L2", got_error.norm().item(), eager_error.norm().item(), floor.norm().item(), factor),
    )


def complaint(
    name: str,
    got: Tensor,
    eager: Tensor,
    ref: Tensor,
    terms: Tensor | None = None,
    spread: Tensor | None = None,
    *,
    dtype: torch.dtype,
) -> str | None:
    """Say what is wrong with one tensor; None if nothing is. `spread` defaults to |ref|: one rounding of the result."""
    if got.shape != eager.shape or got.dtype != eager.dtype:
        return f"{name}: {tuple(got.shape)} {got.dtype}, eager has {tuple(eager.shape)} {eager.dtype}"
    if terms is None or not got.is_floating_point():
        if torch.equal(got.nan_to_num(7.0), eager.nan_to_num(7.0)) and torch.equal(got.isnan(), eager.isnan()):
            return None
        return f"{name}: not equal to eager's bit by bit: {got.flatten()[:8]} against {eager.flatten()[:8]}"
    finite = eager.isfinite()
    if not torch.equal(got.isfinite(), finite):
        where = _index((got.isfinite() != finite).double())
        return f"{name}: got {got[where]} at {where}, eager has {eager[where]}"
    for measured in measure(name, got, eager, ref, terms, ref.abs() if spread is None else spread, dtype):
        if not measured.kept:
            where = _index((got.double() - ref).abs())
            return (
                f"{name}: {measured.norm} error {measured.error:.3e} > {measured.bound:.3e} = {measured.factor:g}·"
                f"{measured.eager:.3e} (eager) + {measured.floor:.3e} (floor); worst at {where}: "
                f"got {got[where].item():.9g}, eager {eager[where].item():.9g}, oracle {ref[where].item():.9g}"
            )
    return None


def _index(error: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))


def complaints(got: Values, eager: Values, oracle: Oracle, dtype: torch.dtype) -> list[str]:
    """Return a message for every broken bound of a run, with the worst index; an empty list is a pass."""
    if got.keys() != eager.keys():
        return [f"tensors {sorted(got.keys() ^ eager.keys())} are in one run only"]
    found = (
        complaint(
            name,
            got[name],
            eager[name],
            oracle.values[name],
            oracle.terms.get(name),
            oracle.spread.get(name),
            dtype=dtype,
        )
        for name in eager
    )
    return [line for line in found if line]


def check(got: Values, eager: Values, oracle: Oracle, dtype: torch.dtype, context: object = "") -> None:
    """Assert the rule for every tensor of a run."""
    found = complaints(got, eager, oracle, dtype)
    assert not found, "\n".join([f"{context}: {len(found)} of {len(eager)} tensors break the rule", *found])


def check_tensor(
    name: str,
    got: Tensor,
    eager: Tensor,
    ref: Tensor,
    terms: Tensor,
    spread: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Assert the rule for one tensor, e.g. of one op. A name that starts with `grad.` is a parameter gradient."""
    found = complaint(name, got, eager, ref, terms, spread, dtype=dtype or eager.dtype)
    assert found is None, found


def check_model(got: Values, eager: Values, exact: Values, dtype: torch.dtype, context: str) -> None:
    """Assert the rule for every tensor of a whole model, with 64 unit roundoffs of the largest value as the floor."""
    assert got.keys() == eager.keys() == exact.keys()
    for name, ref in exact.items():
        if ref.is_floating_point():
            terms = torch.full_like(ref, 8 * ref.abs().max().item())
            nothing = torch.zeros_like(ref)
            check_tensor(f"{context} {name}", got[name], eager[name], ref, terms, nothing, dtype=dtype)
        else:
            assert torch.equal(got[name], ref), name

"""Medians over rounds, and their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Summary:
    """The median and the 20th and 80th percentiles of `rounds` samples."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Interval:
    """An estimate with the two ends of its 95% interval."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


def summarize(samples: Sequence[float]) -> Summary:
    """Return the median and the 20th and 80th percentiles, interpolated linearly between samples."""
    if not samples:
        raise ValueError("summarize: expected at least one sample, got none")
    values = torch.tensor(samples, dtype=torch.float64)
    p20, median, p80 = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Summary(median, p20, p80, len(samples))


def ratio_interval(base: Sequence[float], other: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the median over rounds of base/other (above 1: `other` is faster), with its bootstrap interval."""
    a, b = _paired(base, other)
    ratios = a / b
    draws = ratios[_resample(len(ratios), resamples, seed)]
    return _interval(ratios.quantile(0.5), draws.quantile(0.5, dim=1))


def removed_interval(
    base: Sequence[float], other: Sequence[float], bound: Sequence[float], resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the percentage of (base - bound) that `other` removes, with its bootstrap interval.

    Both differences are medians over rounds, and the rounds are resampled jointly. The result is NaN if `base` is not
    slower than `bound`, as there is nothing to remove.
    """
    a, b, c = _paired(base, other, bound)
    gain, room = a - b, a - c
    if room.quantile(0.5) <= 0:
        return Interval(math.nan, math.nan, math.nan)
    draw = _resample(len(a), resamples, seed)
    gains, rooms = gain[draw].quantile(0.5, dim=1), room[draw].quantile(0.5, dim=1)
    percents = 100 * (gains / rooms)[rooms > 0]
    return _interval(100 * gain.quantile(0.5) / room.quantile(0.5), percents)


def _paired(*columns: Sequence[float]) -> list[Tensor]:
    lengths = {len(c) for c in columns}
    if len(lengths) != 1 or not lengths.pop():
        raise ValueError(f"expected samples of the same rounds, got {[len(c) for c in columns]}")
    return [torch.tensor(c, dtype=torch.float64) for c in columns]


def _resample(count: int, resamples: int, seed: int) -> Tensor:
    return torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))


def _interval(estimate: Tensor, draws: Tensor) -> Interval:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(estimate), low, high)

"""Statistics of train.py --compare: final accuracies of eager and fused runs, paired by seed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95%, for 1 to 30 degrees of freedom.
_T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def interval95(values: Sequence[float]) -> float | None:
    """Return the half-width of the 95% interval of the mean, t·s/√n; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    # Beyond the table its last entry is used; the interval is then at most 4% wider than the exact one.
    t = _T95[min(n - 1, len(_T95)) - 1]
    return t * statistics.stdev(values) / math.sqrt(n)


@dataclass(frozen=True)
class Comparison:
    """Final held-out accuracies in [0, 1] of two variants, for each of the same seeds."""

    seeds: Sequence[int]
    eager: Sequence[float]
    fused: Sequence[float]

    @property
    def differences(self) -> list[float]:
        """fused - eager, for each seed."""
        return [f - e for e, f in zip(self.eager, self.fused, strict=True)]

    @property
    def mean_difference(self) -> float:
        """Mean over the seeds of fused - eager."""
        return statistics.fmean(self.differences)

    @property
    def half_width(self) -> float | None:
        """Half-width of the 95% interval of mean_difference; None for one seed."""
        return interval95(self.differences)

    @property
    def equal(self) -> bool | None:
        """Whether zero lies in the interval of the mean difference; None for one seed, which has no interval."""
        return None if self.half_width is None else abs(self.mean_difference) <= self.half_width

    def verdict(self) -> str:
        """The conclusion in one sentence."""
        if self.half_width is None:
            return f"fused - eager: {100 * self.mean_difference:+.2f} points; one seed has no interval, use --seeds 5"
        interval = (
            f"{100 * self.mean_difference:+.2f} ± {100 * self.half_width:.2f} points (95%, {len(self.seeds)} seeds)"
        )
        return f"fused - eager: {interval}: {'equal within the interval' if self.equal else 'NOT equal'}"

    def table(self, eager_seconds: Sequence[float], fused_seconds: Sequence[float]) -> str:
        """Return a table with a row for each seed, then the means with their 95% intervals."""
        rows = [f"{'seed':>6} {'eager %':>14} {'fused %':>14} {'difference':>14} {'eager s':>9} {'fused s':>9}"]
        cells = zip(self.seeds, self.eager, self.fused, self.differences, eager_seconds, fused_seconds, strict=True)
        for seed, e, f, d, te, tf in cells:
            rows.append(f"{seed:>6} {100 * e:>14.2f} {100 * f:>14.2f} {100 * d:>+14.2f} {te:>9.1f} {tf:>9.1f}")
        means = [_mean_and_interval(v, s) for v, s in ((self.eager, ""), (self.fused, ""), (self.differences, "+"))]
        times = [f"{statistics.fmean(v):>9.1f}" for v in (eager_seconds, fused_seconds)]
        rows.append(" ".join([f"{'mean':>6}", *(f"{m:>14}" for m in means), *times]))
        return "\n".join(rows)


def _mean_and_interval(values: Sequence[float], sign: str) -> str:
    half = interval95(values)
    mean = f"{100 * statistics.fmean(values):{sign}.2f}"
    return mean if half is None else f"{mean} ± {100 * half:.2f}"

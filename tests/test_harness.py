"""benchmarks/common/harness.py: statistics, interleaved timing, memory, and what a row holds."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


pytestmark = pytest.mark.usefixtures("benchmark_scripts")


@pytest.fixture(scope="module")
def harness():
    from common import harness

    return harness


def test_summary_interpolates_percentiles(harness):
    s = harness.summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (s.median, s.p20, s.p80, s.rounds) == pytest.approx((3.5, 2.0, 5.0, 6))
    with pytest.raises(ValueError, match="at least one sample"):
        harness.summarize([])


def test_ratio_is_taken_within_rounds(harness):
    # Half way, the machine becomes three times slower; within each round `fast` takes two thirds of the time of `slow`.
    slow = [3.0] * 10 + [9.0] * 10
    fast = [2.0] * 10 + [6.0] * 10
    interval = harness.ratio_interval(slow, fast)
    assert (interval.median, interval.low, interval.high) == pytest.approx((1.5, 1.5, 1.5))
    with pytest.raises(ValueError, match="same rounds"):
        harness.ratio_interval(slow, fast[:-1])


def test_ratio_interval_covers_the_truth(harness):
    """In about 95% of 200 experiments, the 95% interval contains the true median ratio of 1.25."""
    source = torch.Generator().manual_seed(0)
    covered = 0
    for experiment in range(200):
        slow = 1.25 * torch.exp(0.2 * torch.randn(30, generator=source))
        fast = torch.exp(0.2 * torch.randn(30, generator=source))
        interval = harness.ratio_interval(slow.tolist(), fast.tolist(), resamples=400, seed=experiment)
        assert interval.low <= interval.median <= interval.high
        covered += interval.low <= 1.25 <= interval.high
    assert 180 <= covered <= 199


def test_removed_share(harness):
    interval = harness.removed_interval([10.0, 20.0, 30.0], [8.0, 16.0, 24.0], [5.0, 10.0, 15.0])
    assert (interval.median, interval.low, interval.high) == pytest.approx((40, 40, 40))
    nothing = harness.removed_interval([10.0, 10.0], [8.0, 8.0], [11.0, 12.0])
    assert math.isnan(nothing.median)


def test_interleaving_rotates_and_times_every_variant_once_a_round(harness):
    order: list[str] = []
    variants = [harness.Variant(n, lambda n=n: order.append(n)) for n in "abc"]
    timer = harness.Timer(torch.device("cpu"), least=0.0)
    samples = harness.interleave(variants, timer, rounds=6, warmup=1)
    assert {n: len(s) for n, s in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert order[:3] == ["a", "b", "c"]  # warm-up
    rounds = ["".join(order[3 + 3 * k : 6 + 3 * k]) for k in range(6)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_timer_measures_the_run_and_not_the_cleanup(harness, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    variant = harness.Variant("v", lambda: spend(0.002), lambda: spend(5.0))
    timer = harness.Timer(torch.device("cpu"))
    assert timer.sample(variant, 3) == pytest.approx(0.002)
    assert timer.calls(variant, 0.0002) == 5
    # A budget ends the rounds, but only after the minimal number of rounds.
    assert len(harness.interleave([variant], timer, rounds=50, at_least=7, budget=1.0)["v"]) == 7
    assert len(harness.interleave([variant], timer, rounds=50, at_least=1, budget=60.0)["v"]) in range(8, 13)


def test_saved_bytes_counts_storages_once(harness):
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)

    def run() -> torch.Tensor:
        y = x @ w  # saves x and w
        z = y.sigmoid()  # saves z
        return z[:4] * z[4:]  # saves two views of z

    assert harness.saved_bytes(run) == 4 * (8 * 16 + 16 * 16 + 8 * 16)
    assert harness.saved_bytes(run, [x, w]) == 4 * 8 * 16


def test_rows_have_all_keys_and_no_others(harness, tmp_path):
    where = harness.machine(torch.device("cpu"))
    row = harness.row(where, harness.Summary(2.0, 1.0, 3.0, 9), counted_bytes=10, floor_bytes=4, copy_bytes_per_s=8.0)
    assert tuple(row) == harness.ROW_KEYS
    assert (row["bytes_per_s"], row["percent_of_floor"]) == (5.0, 25.0)
    with pytest.raises(ValueError, match="unknown fields"):
        harness.row(where, harness.Summary(2.0, 1.0, 3.0, 9), sped=1)
    harness.write_rows(tmp_path / "rows.json", [row, row | {"ratio": {"median": math.nan}}])
    assert json.loads((tmp_path / "rows.json").read_text())[1]["ratio"] == {"median": None}
    with pytest.raises(ValueError, match="missing or unknown"):
        harness.write_rows(tmp_path / "rows.json", [{"op": "x"}])


def test_a_cpu_has_a_ceiling_in_every_precision(tmp_path, monkeypatch):
    """A training step in bfloat16 on a CPU once ended in a KeyError."""
    from suite import ceilings
    from suite.precision import PRECISIONS
    from suite.settings import Settings

    monkeypatch.setattr(ceilings, "matmul_rate", lambda device, dtype, rounds: float(dtype.itemsize))
    settings = Settings("models", tmp_path, torch.device("cpu"), True, math.inf)
    for precision in PRECISIONS.values():
        assert settings.ceilings_of(precision)["matmul_flops_per_s"] == precision.dtype.itemsize

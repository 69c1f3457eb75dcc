"""Timing and memory; with the statistics, rows and checks that all benchmarks share.

Every comparison is made inside one process, round by round: each round times every variant once, in an order that
rotates, so that drift of the machine falls on all of them alike. A claim is the median over rounds of the ratio within
a round, with a bootstrap interval. Times of separate runs are never compared.

On a GPU a sample is the time between two CUDA events after the L2 cache has been flushed. On a CPU it is wall time,
page faults of freshly allocated memory included, as a user pays them.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from equivalence import Verdict, check_block, clear_masks, judge
from rows import ROOT, ROW_KEYS, busy_note, commit, machine, row, write_rows
from stats import Interval, Summary, ratio_interval, removed_interval, summarize
from terminal import Progress, print_table
from torch import Tensor

__all__ = [
    "ROOT",
    "ROW_KEYS",
    "Interval",
    "Progress",
    "Summary",
    "Timer",
    "Variant",
    "Verdict",
    "busy_note",
    "check_block",
    "clear_masks",
    "commit",
    "copy_bandwidth",
    "copy_variant",
    "interleave",
    "judge",
    "keep_pages",
    "machine",
    "matmul_rate",
    "peak_bytes",
    "print_table",
    "ratio_interval",
    "removed_interval",
    "rotation",
    "row",
    "saved_bytes",
    "summarize",
    "write_rows",
]


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """Something to be timed: `run` is timed, `cleanup` runs after it and is not."""

    name: str
    run: Callable[[], Any]
    cleanup: Callable[[], Any] | None = None


class Timer:
    """Seconds of one call: CUDA events after an L2 flush on a GPU, wall time on a CPU.

    A short call on a CPU is repeated until about `least` seconds are filled; the sample is the mean of the calls. A GPU
    waits `lead` seconds before the first event, so that what is launched within them costs no time of its own.
    """

    def __init__(self, device: torch.device, least: float = 1e-3, lead: float = 0.0) -> None:
        self.device = device
        self.least = least
        self._wait = int(lead * 1.9e9)  # cycles, about
        self._flush: Tensor | None = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            size = max(2 * getattr(properties, "L2_cache_size", 0), 64 << 20)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, variant: Variant) -> float:
        """One timed call."""
        if self._flush is None:
            start = time.perf_counter()
            result = variant.run()
            seconds = time.perf_counter() - start
            del result
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            if self._wait:
                torch.cuda._sleep(self._wait)
            begin.record()
            result = variant.run()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
            del result
        if variant.cleanup:
            variant.cleanup()
        return seconds

    def sample(self, variant: Variant, calls: int = 1) -> float:
        """The mean of `calls` timed calls."""
        return sum(self.once(variant) for _ in range(calls)) / calls

    def calls(self, variant: Variant, cost: float) -> int:
        """How many calls of `cost` seconds make one sample."""
        return 1 if self._flush is not None else max(1, min(100, math.ceil(self.least / max(cost, 1e-9))))


def interleave(
    variants: Sequence[Variant],
    timer: Timer,
    *,
    rounds: int = 30,
    at_least: int = 5,
    budget: float | None = None,
    warmup: int = 2,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Times every variant once a round, in rotating order; returns the samples by variant, one a round.

    Args:
        rounds: how many rounds.
        at_least: with a `budget` in seconds, rounds stop once it is spent, but never before this many.
        warmup: untimed calls of each variant beforehand.
        on_round: called after each round with the number of rounds done.
    """
    names = [v.name for v in variants]
    if len(set(names)) != len(names):
        raise ValueError(f"interleave: variants must have distinct names, got {names}")
    start = time.perf_counter()
    calls = {}
    for v in variants:
        cost = min(timer.once(v) for _ in range(max(1, warmup)))
        calls[v.name] = timer.calls(v, cost)
    samples: dict[str, list[float]] = {v.name: [] for v in variants}
    for done in range(rounds):
        for v in rotation(variants, done):
            samples[v.name].append(timer.sample(v, calls[v.name]))
        if on_round:
            on_round(done + 1)
        if budget is not None and done + 1 >= at_least and time.perf_counter() - start > budget:
            break
    return samples


def rotation(items: Sequence, turn: int) -> list:
    """`items` rotated by `turn`; every other full cycle runs backwards, so that no item always follows the same one."""
    count = len(items)
    turned = [items[(turn + k) % count] for k in range(count)]
    return turned[::-1] if (turn // count) % 2 else turned


def copy_variant(total_bytes: int, device: torch.device, name: str = "copy") -> Variant:
    """A copy between two preallocated buffers that reads and writes `total_bytes` together."""
    count = max(1, total_bytes // 8)  # float32, half of the bytes are read
    source = torch.ones(count, device=device)
    target = torch.zeros(count, device=device)
    return Variant(name, lambda: target.copy_(source))


def copy_bandwidth(device: torch.device, rounds: int = 15) -> float:
    """Bytes a second, read and written, of a copy that no cache holds; the median of `rounds`."""
    size = (2 << 30) if device.type == "cuda" else (128 << 20)
    variant = copy_variant(size, device)
    samples = interleave([variant], Timer(device), rounds=rounds)["copy"]
    return size / summarize(samples).median


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 15) -> float:
    """Operations a second of a product of large random matrices; the median of `rounds`."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    samples = interleave([Variant("matmul", lambda: a @ b)], Timer(device), rounds=rounds, warmup=3)["matmul"]
    return 2 * size**3 / summarize(samples).median


def keep_pages() -> bool:
    """Makes the C library keep freed memory mapped, for the rest of the process; False where it cannot (not glibc).

    A large allocation is otherwise mapped anew each time, and its first touch costs a page fault every 4 KiB, which on
    virtual machines can exceed the time of a pass over it several times.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes that `run`, a forward pass, saves for backward: each storage once, without those of `leave_out`.

    Parameters and buffers of the caller belong into `leave_out`, as does the input: they live anyway.
    """
    skipped = {t.untyped_storage()._cdata for t in leave_out}
    kept: list[Tensor] = []  # alive until the end, so that no storage's address is used twice
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in skipped:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(sizes.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Device memory that `run` needs at its peak beyond what is allocated already; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before

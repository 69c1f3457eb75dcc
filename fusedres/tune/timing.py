"""Times variants side by side.

Every comparison is made in one process, round by round. Each round times every variant once, in rotating order, so that
drift of the machine affects all variants equally. Times of separate runs are never compared.

On a GPU a sample is the time between two CUDA events after the L2 cache was flushed. On a CPU it is wall time,
including page faults of newly allocated memory, as for a user; the CPU's caches are flushed only if requested.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CPU_FLUSH_BYTES = 128 << 20  # more than the last-level cache of one socket


@dataclass
class Variant:
    """Something to time: only `run` is timed; `prepare` runs before it, after the flush of caches, `cleanup` after."""

    name: str
    run: Callable[[], Any]
    cleanup: Callable[[], Any] | None = None
    prepare: Callable[[], Any] | None = None


class Timer:
    """Measures the seconds of one call: by CUDA events after an L2 flush on a GPU, by wall time on a CPU.

    Args:
        device: where the calls run.
        least: on a CPU, a short call is repeated for about this many seconds; the sample is the mean of the calls.
        lead: a GPU waits this many seconds before the first event, so that launches in this time do not count.
        cold: also flush the CPU's caches before each call.
    """

    def __init__(self, device: torch.device, least: float = 1e-3, lead: float = 0.0, cold: bool = False) -> None:
        self.device = device
        self.least = least
        self._wait = int(lead * 1.9e9)  # cycles, about
        self._flush: Tensor | None = None
        if device.type == "cpu" and cold:
            self._flush = torch.zeros(_CPU_FLUSH_BYTES, dtype=torch.int8)
        elif device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            size = max(2 * getattr(properties, "L2_cache_size", 0), 64 << 20)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, variant: Variant) -> float:
        """Time one call and return its seconds."""
        if self.device.type == "cpu":
            if self._flush is not None:
                self._flush.add_(1)
            if variant.prepare:
                variant.prepare()
            start = time.perf_counter()
            result = variant.run()
            seconds = time.perf_counter() - start
            del result
        else:
            assert self._flush is not None
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            if self._wait:
                torch.cuda._sleep(self._wait)
            if variant.prepare:
                variant.prepare()
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
        """Return the mean of `calls` timed calls."""
        return sum(self.once(variant) for _ in range(calls)) / calls

    def calls(self, variant: Variant, cost: float) -> int:
        """Return how many calls of `cost` seconds make one sample."""
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
    """Time every variant once per round, in rotating order, and return the samples of each variant, one per round.

    Args:
        rounds: the number of rounds.
        at_least: the smallest number of rounds, if there is a budget.
        budget: seconds after which no new round starts, once `at_least` rounds are done.
        warmup: number of calls of each variant before the first round.
        on_round: called after each round with the number of finished rounds.
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


def rotation(items: Sequence[Variant], turn: int) -> list[Variant]:
    """Return `items` rotated by `turn`; every second full cycle is reversed, so that neighbours change."""
    count = len(items)
    turned = [items[(turn + k) % count] for k in range(count)]
    return turned[::-1] if (turn // count) % 2 else turned

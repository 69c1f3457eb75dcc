"""One training step of ResNet-50 by kernel: the time of each kernel, and the least time that it can take."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fusedres.kernels.triton_core.launch import Launch, record_launches
from suite.arithmetic import flops
from suite.models import Run, Work, build, random_batch
from suite.precision import PRECISIONS
from suite.settings import Case, Settings, floor_seconds

WAY = "fused min"


def cases(settings: Settings) -> list[Case]:
    """Return one case."""
    usual = PRECISIONS["bfloat16" if settings.on_gpu else "float32"]
    work = Work("tiny", "train", 2, usual, 32, 10) if settings.tiny else Work("resnet50", "train", 256, usual)
    return [Case(f"{work.model} {WAY}", lambda: _profile(settings, work), 120)]


def _profile(settings: Settings, work: Work) -> None:
    torch.backends.cudnn.benchmark = settings.on_gpu
    run = Run(settings, work, WAY, build(settings, work), *random_batch(settings, work))
    with work.precision.switched(), torch.autograd.set_multithreading_enabled(False):
        run.step()
        with record_launches() as launches:
            run.step()
        taken = _timed(run) if settings.on_gpu else {}
    for row in by_kernel(taken, launches, settings.ceilings):
        settings.row(f"{work.model} {WAY}", **work.about, **row)


def _timed(run: Run) -> dict[str, tuple[float, int]]:
    """Return kernel → seconds and calls in one step."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run.step()
        torch.cuda.synchronize()
    return {event.key: (event.device_time_total / 1e6, event.count) for event in profiled.key_averages()}


def by_kernel(
    taken: Mapping[str, tuple[float, int]], launches: Iterable[Launch], ceilings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return one row per kernel, the longest first. Rows of our kernels have the least seconds of their launches.

    taken: seconds and calls of each kernel that the profiler saw.
    """
    least: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for launch in launches:
        least[launch.name] += floor_seconds(ceilings, launch.bytes(), flops([launch]))
        calls[launch.name] += 1
    rows = [
        {"kernel": name, "s": taken[name][0] if name in taken else None, "calls": calls[name], "floor_s": least[name]}
        for name in least
    ]
    rows += [{"kernel": n, "s": s, "calls": c, "floor_s": None} for n, (s, c) in taken.items() if n not in least]
    return sorted(rows, key=lambda row: -(row["s"] or 0.0))

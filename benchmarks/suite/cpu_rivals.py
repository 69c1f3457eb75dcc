"""Whole models on a CPU against everything that people would pick, each in a process of its own.

The processes take turns. While one runs, the others wait for a line from the parent, so that their threads do not spin
into its time. Before and after each sample a probe checks that the machine is about as fast as it has been: virtual
machines change their speed with their neighbours. A sample that was slow is taken again, for a while; one that is still
slow then is counted in its row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import harness

from suite.cpu_rival import INFERENCE, TRAINING
from suite.models import BOUNDS, Work
from suite.settings import first_lines

OURS: dict[str, dict[str, Any]] = {
    "library": {"conv": "library"},
    "library min": {"conv": "library", "memory": "min"},
    "library kept": {"conv": "library"},
    "frozen": {"conv": "auto", "frozen": True},
}
SLOW = 1.15  # a probe that takes longer than this times the fastest one says that the machine is slow
PATIENCE = 3.0  # seconds to wait for the fast state, for each sample
DTYPES = ("float32", "bfloat16")  # of the whole model, without autocast


class Probe:
    """Says whether the machine is in its fast state: small products of matrices in a dtype, on each core.

    The units that multiply bfloat16 can be slow while the others are fast, and one core while another is fast.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._a = torch.ones(384, 384, dtype=dtype)
        self._cores = sorted(os.sched_getaffinity(0))
        self._fastest = [min(times) for times in zip(*(self._seconds() for _ in range(30)), strict=True)]

    def _seconds(self) -> list[float]:
        """Return the time of a product on each core."""
        found = []
        try:
            for core in self._cores:
                os.sched_setaffinity(0, {core})
                times = []
                for _ in range(3):
                    begin = time.perf_counter()
                    self._a @ self._a
                    times.append(time.perf_counter() - begin)
                found.append(min(times))
        finally:
            os.sched_setaffinity(0, self._cores)
        return found

    def is_fast(self) -> bool:
        """Return whether the machine is in its fast state now."""
        seconds = self._seconds()
        self._fastest = [min(pair) for pair in zip(self._fastest, seconds, strict=True)]
        return all(now <= SLOW * best for now, best in zip(seconds, self._fastest, strict=True))

    def sample(self, take: Callable[[], float]) -> tuple[float, bool]:
        """Return what `take` measures, and whether the machine was fast before and after; wait for that for a while."""
        until = time.perf_counter() + PATIENCE
        while True:
            before = self.is_fast()
            patient = time.perf_counter() < until
            if patient and not before:
                time.sleep(0.05)
                continue
            found = take()
            fast = before and self.is_fast()
            if fast or not patient:
                return found, fast


class Rival:
    """A way in its own process."""

    def __init__(self, way: str, work: Work, threads: int) -> None:
        command = [sys.executable, "-m", "suite.cpu_rival"]
        command += [way, work.phase, work.model, str(work.batch), str(work.size), work.precision.name, str(threads)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - not a pipe, which could be full
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self.faults = 0.0
        self.told: dict[str, Any] = self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{' '.join(self._process.args[3:])}: {first_lines(self._errors.read()[-900:])}")  # type: ignore[index]
        return json.loads(line)

    def seconds(self, repeats: int) -> float:
        """Return the seconds of one call, the average of a few."""
        print(repeats, file=self._process.stdin, flush=True)
        seconds, self.faults = self._answer()
        return float(seconds)

    def close(self) -> None:
        """End the process."""
        self._process.communicate("")
        self._errors.close()


def ways(work: Work) -> list[str]:
    """Return the ways of a phase."""
    return list(TRAINING if work.train else INFERENCE)


def measure(work: Work, names: list[str], rounds: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each way that could be timed, and what is to be said about the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of the probe
    rivals: dict[str, Rival] = {}
    notes: list[str] = []
    try:
        for name in names:
            rival = Rival(name, work, threads)
            if "not_here" in rival.told:
                notes.append(f"{name}: {rival.told['not_here']}")
            elif not rival.told["off_by"] <= BOUNDS[work.precision.name]:
                notes.append(f"{name}: its scores are off by {rival.told['off_by']:.3g} of eager's norm")
            else:
                rivals[name] = rival
        samples, slow = _samples(rivals, rounds, Probe(getattr(torch, work.precision.name)))
    finally:
        torch.set_num_threads(threads)
        for rival in rivals.values():
            rival.close()
    where = harness.machine(torch.device("cpu"))
    rows = []
    for name, times in samples.items():
        summary = harness.summarize(times)
        timed = harness.row(
            where, summary, **work.about, variant=name, memory_format="channels_last", data="synthetic",
            ratio=harness.ratio_interval(samples["eager"], times, resamples=500).as_dict(),
            images_per_s=work.batch / summary.median, slow_percent=100 * slow[name] / len(times),
            page_faults=rivals[name].faults, backend="cpu" if name in OURS else None, **OURS.get(name, {}),
        )  # fmt: skip
        rows.append(timed)
    return rows, notes


def _samples(rivals: dict[str, Rival], rounds: int, probe: Probe) -> tuple[dict[str, list[float]], dict[str, int]]:
    repeats = {name: max(1, round(0.2 / rival.seconds(1))) for name, rival in rivals.items()}
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    slow = dict.fromkeys(rivals, 0)
    order = list(rivals)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds, fast = probe.sample(lambda name=name: rivals[name].seconds(repeats[name]))
            samples[name].append(seconds)
            slow[name] += not fast
    return samples, slow


@dataclass(frozen=True)
class Goal:
    """How fast one way is to be against another."""

    ours: str
    rival: str
    least: float
    phase: str = "infer"
    dtype: str | None = None  # None: of every dtype


GOALS = (
    Goal("frozen", "compile freezing", 1.0),
    Goal("frozen", "openvino", 0.95),
    Goal("frozen", "onnxruntime", 0.95),
    Goal("library", "eager", 1.15),
    Goal("library", "eager", 1.5, "train", "bfloat16"),
    Goal("library", "eager", 1.0, "train", "float32"),
    Goal("library", "compile", 1.0, "train"),
    Goal("library min", "library", 0.95, "train"),
)
GOALS_HEADER = ["model", "phase", "batch", "dtype", "goal", "asked", "measured", ""]


def goals(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return a line for each goal that the rows say something about."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        case = (row["name"], row["phase"], row["shape"][0], row["dtype"])
        found.setdefault(case, {})[row["variant"]] = row["ratio"]["median"]
    lines = []
    for (model, phase, batch, dtype), ratios in found.items():
        for goal in GOALS:
            wanted = goal.phase == phase and goal.dtype in (None, dtype)
            if wanted and goal.ours in ratios and goal.rival in ratios:
                value = ratios[goal.ours] / ratios[goal.rival]
                verdict = "met" if value >= goal.least else "missed"
                name = f"{goal.ours} over {goal.rival}"
                asked = f">= {goal.least:.2f}x"
                lines.append([model, phase, str(batch), dtype, name, asked, f"{value:.2f}x", verdict])
    return lines

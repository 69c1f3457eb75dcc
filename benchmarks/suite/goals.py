"""The goals of the project as data: the targets, how to find the reached values in rows, and the bounds.

The goals and the rows that count are for an H100 or H200, bfloat16, channels_last, batch 256. A value compares the best
time of this package with the best time of a rival in the same interleaved run; of several runs the worst one counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

Row = dict[str, Any]
Rows = Mapping[str, list[Row]]  # name of a step → its rows
BATCH = 256
LEAST_BYTES = 16 << 20  # the time of an op that moves less depends on its launch
DEVICES = ("H100", "H200")


class Found(NamedTuple):
    """A measured value and what was measured; the bound from counted bytes, None if there is none."""

    value: float
    of: str
    bound: float | None


@dataclass(frozen=True)
class Goal:
    """A goal; `measure` finds the value in rows, and returns None if these are missing."""

    name: str
    at_least: bool
    target: float
    unit: str
    measure: Callable[[Rows], Found | None]

    def met(self, value: float) -> bool:
        """Whether `value` reaches the target."""
        return value >= self.target if self.at_least else value <= self.target

    def line(self, rows: Rows) -> list[str]:
        """Return name, target, measured value, bound of the traffic model and verdict, as text."""
        found = self.measure(rows)
        asked = f"{'≥' if self.at_least else '≤'} {self._text(self.target)}"
        if found is None:
            return [self.name, asked, "not measured", "–", ""]
        bound = "–" if found.bound is None else self._text(found.bound)
        verdict = "met" if self.met(found.value) else "missed"
        return [self.name, asked, f"{self._text(found.value)} ({found.of})", bound, verdict]

    def _text(self, value: float) -> str:
        return f"{value:,.0f}{self.unit}" if self.unit in ("%", " images/s") else f"{value:.2f}{self.unit}"


def _timed(rows: Rows, model: str, phase: str, device: Iterable[str] = DEVICES) -> list[Row]:
    return [
        row
        for step in ("train", "models", "all-models")
        for row in rows.get(step, [])
        if row.get("median_s")
        and (row["name"], row["phase"], row["shape"][0], row["dtype"]) == (model, phase, BATCH, "bfloat16")
        and any(name in row["device"] for name in device)
    ]


def _ours(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.get("conv")]


def _best(rows: Iterable[Row]) -> Row:
    return max(rows, key=lambda row: row["ratio"]["median"])


def _over_eager(model: str, phase: str, rows: Rows) -> Found | None:
    """Return fused over eager, both without graphs, in the run that compares these two."""
    timed = [row for row in _timed(rows, model, phase) if row["kind"] == "plain"]
    ours, eager = _ours(timed), [row for row in timed if row["variant"] == "eager"]
    if not ours or not eager:
        return None
    best = _best(ours)
    return Found(best["ratio"]["median"], best["variant"], max(row["median_s"] / row["bound_s"] for row in eager))


def _over_compile(model: str, phase: str, rows: Rows) -> Found | None:
    """Return fused over compiled, of the worst run with a compiled model; graphs count if compiled uses them."""
    runs: dict[str, list[Row]] = defaultdict(list)
    for row in _timed(rows, model, phase):
        runs[row["case"]].append(row)
    found = []
    for run in runs.values():
        compiled = [row for row in run if "compile" in row["variant"]]
        graphs = any(row["variant"].startswith("graphed ") for row in compiled)
        ours = [row for row in _ours(run) if graphs or not row["variant"].startswith("graphed ")]
        if compiled and ours:
            best, rival = _best(ours), _best(compiled)
            value = best["ratio"]["median"] / rival["ratio"]["median"]
            words = f"{best['variant']} over {rival['variant']}"
            found.append(Found(value, words, rival["median_s"] / rival["bound_s"]))
    return min(found, key=lambda one: one.value, default=None)


def _memory(model: str, rows: Rows) -> Found | None:
    timed = [row for row in _timed(rows, model, "train") if row.get("peak_bytes")]
    eager = min((row for row in timed if row["variant"] == "eager"), key=lambda row: row["peak_bytes"], default=None)
    if eager is None or not _ours(timed):
        return None
    least = min(_ours(timed), key=lambda row: row["peak_bytes"])
    kept, of_eager = least.get("saved_bytes"), eager.get("saved_bytes")
    # Only what is saved for backward: weights, gradients and the state of the optimizer come on top on both sides.
    bound = kept / of_eager if kept and of_eager else None
    return Found(least["peak_bytes"] / eager["peak_bytes"], least["variant"], bound)


def _copy_share(rows: Rows) -> Found | None:
    """Return the worst op without a product; of each op the faster backend counts."""
    by_call: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row in rows.get("all-ops", []):
        counted = row.get("median_s") and row.get("variant") is None and not row.get("flops")
        on = any(name in row.get("device", "") for name in DEVICES)
        if counted and on and row.get("backend") != "library" and row["counted_bytes"] >= LEAST_BYTES:
            by_call[row["name"]].append((row["percent_of_copy"], f"{row['op']}, {row['backend']}"))
    share, worst = min((max(found) for found in by_call.values()), default=(None, ""))
    return None if share is None else Found(share, worst, 100.0)


def _images(device: str, rows: Rows) -> Found | None:
    timed = _timed(rows, "resnet50", "train", (device,))
    ours = _ours(row for row in timed if row["kind"] in ("plain", "graphs"))
    if not ours:
        return None
    best = max(ours, key=lambda row: row["images_per_s"])
    return Found(best["images_per_s"], best["variant"], BATCH / best["bound_s"])


def _auto(rows: Rows) -> Found | None:
    """Return the slowest block, over all batches, that follows the proposed table."""
    found = [
        (row["ratio"]["median"], f"{row['name']} {row['phase']} batch {row['shape'][0]}")
        for row in rows.get("dispatch", [])
        if row.get("variant") == "auto" and row.get("median_s") and any(name in row["device"] for name in DEVICES)
    ]
    return Found(*min(found), None) if found else None


GOALS = (
    Goal("ResNet-50 training over eager", True, 2.0, "x", partial(_over_eager, "resnet50", "train")),
    Goal("ResNet-50 training over torch.compile", True, 1.5, "x", partial(_over_compile, "resnet50", "train")),
    Goal("ResNet-18 training over eager", True, 1.6, "x", partial(_over_eager, "resnet18", "train")),
    Goal("ResNet-18 training over torch.compile", True, 1.25, "x", partial(_over_compile, "resnet18", "train")),
    Goal("ResNet-50 inference over torch.compile", True, 1.1, "x", partial(_over_compile, "resnet50", "infer")),
    Goal("ResNet-18 inference over torch.compile", True, 1.1, "x", partial(_over_compile, "resnet18", "infer")),
    Goal("ResNet-50 peak training memory over eager's", False, 0.6, "x", partial(_memory, "resnet50")),
    Goal("ResNet-18 peak training memory over eager's", False, 0.6, "x", partial(_memory, "resnet18")),
    Goal("each op without a product, of a copy's rate", True, 85, "%", _copy_share),
    Goal("auto over eager, slowest block", True, 0.98, "x", _auto),
    Goal("ResNet-50 training on an H100", True, 8500, " images/s", partial(_images, "H100")),
    Goal("ResNet-50 training on an H200", True, 9500, " images/s", partial(_images, "H200")),
    Goal("ResNet-50 training, MLPerf 4.0 on an H100", True, 7160, " images/s", partial(_images, "H100")),
    Goal("ResNet-50 training, MLPerf 4.0 on an H200", True, 7950, " images/s", partial(_images, "H200")),
)
HEADER = ["goal (bfloat16, channels_last, batch 256)", "asked", "measured", "bound", ""]


def table(rows: Rows) -> list[list[str]]:
    """Return one line per goal, for HEADER. The bound follows from the traffic model and the measured rates."""
    return [goal.line(rows) for goal in GOALS]

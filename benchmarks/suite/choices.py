"""What was measured as fastest, from rows: configs by problem, backends by op, ways by block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from memory_traffic.launched import WAYS

from fusedres import dispatch
from fusedres.dispatch import LIBRARY, UNFUSED, Directions, Entry, Shape, Way, batch_class, store
from fusedres.kernels.triton_core import launch
from fusedres.tune.ways import SLOWER
from suite.journal import Journal, Row
from suite.settings import Settings


def table(settings: Settings) -> launch.Pick | None:
    """Return the configs that the step ops measured as fastest on this device, for later steps."""
    found = configs(row for row in Journal(settings.out, "ops").rows() if row.get("device") == settings.where["device"])
    return launch.measured({problem: best["config"] for problem, best in found.items()}) if found else None


def path(settings: Settings) -> Path:
    """Return the path of the table that the step dispatch proposes."""
    return settings.out / "dispatch.json"


def follow(settings: Settings) -> None:
    """Make "auto" follow the proposed table, if there is one, for the rest of this process."""
    if path(settings).exists():
        device = torch.empty(0, device=settings.device).device  # with its index, like the device of a tensor
        dispatch.install(device, store.read(path(settings), store.family(device)))


def configs(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return problem → the fastest of its candidates, and how much faster than the first one it is."""
    by_problem: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("variant") == "candidate" and "error" not in row:
            by_problem[row["problem"]].append(row)
    found = {}
    for problem, measured in by_problem.items():
        best = min(measured, key=lambda row: row["median_s"])
        first = next((row["median_s"] for row in measured if row["first"]), None)
        gain = first / best["median_s"] if first else None
        found[problem] = {"config": best["config"], "op": best["op"], "first_over_best": gain, "of": len(measured)}
    return found


def backends(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return signature of an op → the fastest backend, and the seconds of each, the library's bare product included."""
    by_call: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if "op" in row and row.get("variant") != "candidate" and "error" not in row:
            by_call[row["name"]][row["backend"]] = row["median_s"]
    found = {}
    for call, seconds in by_call.items():
        ours = {name: s for name, s in seconds.items() if name != "library"}
        if ours:
            found[call] = {"backend": min(ours, key=lambda name: ours[name]), "seconds": seconds}
    return found


def blocks(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Return block, phase and batch → the fastest way that agreed with eager; eager itself if no way is faster.

    A case is left out if it was stopped before the row of eager was written, as there is nothing to compare with.
    """
    by_case: dict[str, dict[str, float]] = defaultdict(dict)
    timed = [row for row in rows if "median_s" in row]
    for row in timed:
        if all(row.get(key) == timed[0].get(key) for key in ("dtype", "tf32")):  # rows of other dtypes come later
            by_case[f"{row['name']} {row['phase']} batch {row['shape'][0]}"].setdefault(row["variant"], row["median_s"])
    found = {}
    for case, seconds in by_case.items():
        if "eager" not in seconds:
            continue
        taken = {way: s for way, s in seconds.items() if way == "eager" or way in WAYS}
        best = min(taken, key=lambda way: taken[way])
        found[case] = {"way": best, "eager_over_best": seconds["eager"] / taken[best], "seconds": seconds}
    return found


# --- the table of the package -----------------------------------------------------------------------------------------


def shape(row: Row) -> Shape:
    """Return the key of a row of the step blocks."""
    batch, channels, height, width = row["shape"]
    planes, stride, shortcut = (row["geometry"][name] for name in ("planes", "stride", "shortcut"))
    kind, out_channels = {
        "basic_block": ("basic", planes),
        "bottleneck": ("bottleneck", 4 * planes),
        "stem": ("stem 7x7", planes),
    }[row["op"]]
    dtype = "tf32" if row.get("tf32") else row["dtype"]
    shortcut = "none" if row["op"] == "stem" else shortcut
    sizes = (channels, planes, out_channels, 1, stride, 1, height, width, batch_class(batch))
    return Shape(kind, shortcut, *sizes, dtype, row["phase"])


def way(row: Row) -> Way:
    """Return the Way that the arguments of fuse() in a row stand for."""
    arguments, backend = WAYS[row["variant"]][0], row["backend"]
    train, stem = row["phase"] == "train", row["op"] == "stem"
    own = Directions(True, train and not stem, train) if arguments["conv"] == "fused" and backend != "cpu" else LIBRARY
    one_pass = arguments.get("memory") == "min" and train and not stem
    return Way(backend, LIBRARY if stem else own, own, one_pass)


def entries(rows: Iterable[Row]) -> dict[Shape, Entry]:
    """Return block, phase, batch and dtype → the fastest way; unfused if eager is more than 2% faster."""
    found: dict[Shape, Entry] = {}
    for row in rows:
        if row.get("variant") in WAYS and "median_s" in row and row.get("kind", "plain") == "plain":
            key, ratio = shape(row), row["ratio"]["median"]
            if key not in found or ratio > (found[key].eager_over_way or 0):
                found[key] = Entry(way(row) if ratio >= SLOWER else UNFUSED, ratio)
    return found

"""The row of one measurement: what was measured, on which machine, and with which versions."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.stats import Summary
from fusedres import processor

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600  # seconds for git and nvidia-smi: long, so that a row has their answer even on a busy machine

# The keys of every row. The value is None if a key does not apply or its value is not known.
ROW_KEYS = (
    "op",  # the name of an op, or basic_block, bottleneck, stem, model
    "name",  # the shape's name, e.g. resnet50.layer1.1
    "variant",  # eager_nchw, eager, conv_only, fused, a way of fuse(), a rival; or the variant of an op
    "backend",
    "conv",
    "memory",
    "frozen",  # weights folded once, for inference
    "shape",  # of the input, N C H W
    "geometry",  # planes, stride, shortcut of a block
    "dtype",
    "tf32",  # whether float32 products may round their operands to TF32; None for other dtypes
    "memory_format",
    "phase",  # train, infer; forward, backward for ops
    "device",
    "driver",
    "threads",
    "versions",
    "commit",
    "date",
    "rounds",
    "median_s",
    "p20_s",
    "p80_s",
    "ratio",  # time of eager channels_last (for ops: of a copy) / this time, within rounds: median, low, high
    "removed_percent",  # of (eager - conv_only), in the same form
    "peak_bytes",
    "saved_bytes",
    "counted_bytes",
    "bytes_per_s",
    "copy_bytes_per_s",
    "floor_bytes",
    "percent_of_floor",
    "percent_of_conv_only",
    "flops",  # of the products (a multiply-add counts 2); for an op, of all arithmetic
    "flops_per_s",
    "matmul_flops_per_s",  # measured rate of a large product in this dtype
    "bound_s",  # lower bound: the larger of floor_bytes / copy_bytes_per_s and flops / matmul_flops_per_s
    "percent_of_bound",
    "images_per_s",  # only for models
    "isa",  # instruction sets of a CPU that make a difference
    "slow_percent",  # of the samples that were taken while a probe said that the machine was slow
    "page_faults",  # of one call
    "data",  # synthetic: random numbers that are already on the device
)


def machine(device: torch.device) -> dict[str, Any]:
    """Return the fields of a row that name the machine, the versions, the commit and the date."""
    return {
        "device": _name(device),
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "isa": None if device.type == "cuda" else processor.instruction_sets(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("torchvision", "triton", "fusedres")},
            **({"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if device.type == "cuda" else {}),
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def busy_note(device: torch.device) -> str | None:
    """Return a warning if other processes use the cores while a CPU is timed, else None."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cores:
        return None
    return (
        f"note: the machine is busy (load {load:.1f} on {cores} cores); threads that wait for a core scatter the times"
    )


def commit() -> str | None:
    """Return the commit of the checkout, marked if tracked files differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def row(where: dict[str, Any], summary: Summary, **fields: Any) -> dict[str, Any]:
    """Return a row with every key of ROW_KEYS, computed rates included. Unknown fields raise ValueError."""
    unknown = fields.keys() - set(ROW_KEYS)
    if unknown:
        raise ValueError(f"row: unknown fields {sorted(unknown)}")
    fields |= {"rounds": summary.rounds, "median_s": summary.median, "p20_s": summary.p20, "p80_s": summary.p80}
    moved, bandwidth, floor = (fields.get(k) for k in ("counted_bytes", "copy_bytes_per_s", "floor_bytes"))
    if moved:
        fields["bytes_per_s"] = moved / summary.median
    if bandwidth and floor:
        fields["percent_of_floor"] = 100 * floor / bandwidth / summary.median
        if fields.get("flops") is not None and fields.get("matmul_flops_per_s"):
            fields.setdefault("bound_s", max(floor / bandwidth, fields["flops"] / fields["matmul_flops_per_s"]))
    if fields.get("flops") is not None:
        fields["flops_per_s"] = fields["flops"] / summary.median
    if fields.get("bound_s"):
        fields["percent_of_bound"] = 100 * fields["bound_s"] / summary.median
    return {key: (where | fields).get(key) for key in ROW_KEYS}


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as one JSON list with one row per line."""
    for r in rows:
        missing = set(ROW_KEYS) ^ r.keys()
        if missing:
            raise ValueError(f"write_rows: fields missing or unknown: {sorted(missing)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_finite(r), ensure_ascii=False) for r in rows)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor.name()} ({torch.get_num_threads()} threads)"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None

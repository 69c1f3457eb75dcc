"""The package's commands.

`python -m fusedres info [--json]` shows what is installed, what the kernels were built for, what runs where and why.
`python -m fusedres tune` measures what is fastest on this device; "auto" then follows the result.
`python -m fusedres analyze EXPERIMENT` shows why residual connections work.

Exit codes besides 0 and 1: 2 for wrong arguments and for files that the system refuses to read or write, 130 after
Ctrl-C, 141 if the reader of the output is gone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torchvision

import fusedres
from fusedres import _C, backends, cuda_support, dispatch, processor, terminal
from fusedres.analysis import command as analyze
from fusedres.analysis.results import AnalysisError
from fusedres.kernels import serving
from fusedres.ops._library import OPS, Op
from fusedres.tune import command as tune


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _devices() -> dict[str, dict[str, Any]]:
    """Return every device that torch sees, with its name and the backend that "auto" selects there."""
    sets = processor.instruction_sets() or "none"
    cpu = {"name": processor.name(), "instruction_sets": sets, "threads": torch.get_num_threads()}
    devices: dict[str, dict[str, Any]] = {"cpu": cpu}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices[f"cuda:{index}"] = {"name": properties.name, "capability": capability}
    with backends.use_backend("auto"):
        for name, entry in devices.items():
            device = torch.device(name)
            measured = dispatch.table(device)
            entry["measured"] = f"{len(measured.blocks)} shapes" if measured else "nothing"
            entry["backend"] = (
                backends.backend_for(device) or "none: blocks run unfused unless fuse() is given conv or memory"
            )
    return devices


def _cuda() -> dict[str, Any]:
    """Return what the CUDA kernels were built for, the CUDA versions, and what keeps the kernels from running here."""
    module = cuda_support.module()
    driver = module.driver_version() if module else 0
    return {
        "built_for": module.build_info()["archs"] if module else None,
        "runtime": cuda_support.version(module.build_info()["runtime"]) if module else None,
        "driver": cuda_support.version(driver) if driver else None,
        "obstacle": cuda_support.unsupported() or "none",
    }


def _serving(op: Op, device_type: str) -> dict[str, str]:
    """Return which backend's kernel runs for an op in this context ("none": PyTorch's operators run), and why."""
    name = backends.backend_for(device_type)
    if name is None:
        found = "none", "nothing was measured on this device: blocks run unfused unless fuse() is given conv or memory"
    elif name not in serving.STAND_INS and serving.find(op.folder, op.name, name) is None:
        found = "none", f"there is no {name} kernel, and blocks use PyTorch's operators there"
    else:
        found = serving.explain(op.folder, op.name, name)
    return {"backend": found[0], "why": found[1]}


def _ops(devices: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Return for each op what "auto" runs on each device, and what use_backend("cuda") would run on a GPU."""
    with backends.use_backend("auto"):
        ops = {name: {device: _serving(op, device.partition(":")[0]) for device in devices} for name, op in OPS.items()}
    try:
        with backends.use_backend("cuda"):
            for name, op in OPS.items():
                ops[name]["cuda selected"] = _serving(op, "cuda")
    except RuntimeError as error:
        for columns in ops.values():
            columns["cuda selected"] = {"backend": "none", "why": str(error)}
    return ops


def info() -> dict[str, Any]:
    """Return what a report of a problem needs, as JSON types."""
    devices = _devices()
    return {
        "fusedres": fusedres.__version__,
        "location": str(Path(fusedres.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": _triton_version(),
        "core": _C.build_info(),
        "cuda": _cuda(),
        "devices": devices,
        "ops": _ops(list(devices)),
    }


def as_text(values: dict[str, Any]) -> str:
    """Return `info()` as aligned lines, one per device; ops with the same backend and reason share a line."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(item)}" for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return "+".join(map(str, value)) or "none"
        if value is None:
            return "not installed"
        return ("yes" if value else "no") if isinstance(value, bool) else str(value)

    rows = [(key, value) for key, value in values.items() if key not in ("devices", "ops")]
    rows += list(values["devices"].items())
    width = max(len(key) for key, _ in rows)
    lines = [f"{key:<{width}}  {text(value)}" for key, value in rows]
    alike: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for op, columns in values["ops"].items():
        for where, served in columns.items():
            alike[where, served["backend"], served["why"]].append(op)
    for (where, backend, why), ops in sorted(alike.items()):
        lines += [
            f"ops, {where}: {backend} ({why})",
            f"  {'all ops' if len(ops) == len(values['ops']) else ' '.join(ops)}",
        ]
    return "\n".join(lines)


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fusedres", description="Fused residual blocks for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="show versions, devices, and how the native core was built")
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    tune_parser = commands.add_parser("tune", help=tune.HELP)
    tune.add_arguments(tune_parser)
    analyze_parser = commands.add_parser("analyze", help=analyze.HELP)
    analyze.add_arguments(analyze_parser)
    arguments = parser.parse_args()
    if arguments.command == "tune":
        try:
            return tune.main(arguments)
        except ValueError as error:
            tune_parser.error(str(error))
    if arguments.command == "analyze":
        try:
            return analyze.main(arguments)
        except AnalysisError as error:
            analyze_parser.error(str(error))
    values = info()
    print(json.dumps(values, indent=2) if arguments.json else as_text(values))
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main, "python -m fusedres"))

"""`python -m fusedres info [--json]`: what is installed, what the native core was built with, what runs where."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import torchvision

import fusedres
from fusedres import _C, backends


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _devices() -> dict[str, dict[str, Any]]:
    """Every device torch sees, with its name and the backend that "auto" means there."""
    devices: dict[str, dict[str, Any]] = {"cpu": {"name": platform.machine(), "threads": torch.get_num_threads()}}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices[f"cuda:{index}"] = {"name": properties.name, "capability": capability}
    with backends.use_backend("auto"):
        for name, entry in devices.items():
            entry["backend"] = backends.backend_for(torch.device(name).type) or "none: blocks run unfused"
    return devices


def info() -> dict[str, Any]:
    """What a report of a problem needs, as JSON types."""
    return {
        "fusedres": fusedres.__version__,
        "location": str(Path(fusedres.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "triton": _triton_version(),
        "core": _C.build_info(),
        "devices": _devices(),
    }


def as_text(values: dict[str, Any]) -> str:
    """`info()` as aligned lines, one a device."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {text(item)}" for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return "+".join(map(str, value)) or "none"
        if value is None:
            return "not installed"
        return ("yes" if value else "no") if isinstance(value, bool) else str(value)

    rows = [(key, value) for key, value in values.items() if key != "devices"] + list(values["devices"].items())
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {text(value)}" for key, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusedres", description="Fused residual blocks for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser("info", help="versions, devices, what the native core was built with")
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    values = info()
    print(json.dumps(values, indent=2) if arguments.json else as_text(values))


if __name__ == "__main__":
    main()

"""The machine and its ceilings: the rates of a large copy and of a large matrix product, each after an L2 flush."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from typing import Any

import torch

from fusedres import cuda_support
from suite.ceilings import measure_ceilings
from suite.settings import Case, Settings


def cases(settings: Settings) -> list[Case]:
    """Return the cases machine and ceilings."""
    return [Case("machine", lambda: _machine(settings)), Case("ceilings", lambda: _ceilings(settings))]


def _machine(settings: Settings) -> None:
    about: dict[str, Any] = {
        "host": platform.platform(),
        "cores": os.cpu_count(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cuda_kernels": cuda_support.unsupported() or "run here",
        "tools": {name: shutil.which(name) for name in ("compute-sanitizer", "ncu", "nvcc")},
    }
    if settings.on_gpu:
        found = torch.cuda.get_device_properties(settings.device)
        about |= {
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
        }
        query = "name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        about["nvidia_smi"] = done.stdout.strip()
    settings.row("machine", **about)


def _ceilings(settings: Settings) -> None:
    settings.row("ceilings", **measure_ceilings(settings.device, settings.tiny))

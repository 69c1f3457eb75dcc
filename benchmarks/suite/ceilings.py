"""How fast a machine can be: the rates of a large copy and of large matrix products."""

from __future__ import annotations

from typing import Any

import torch
from common.harness import copy_bandwidth, matmul_rate

from suite.precision import PRECISIONS, Precision

CEILINGS = ("copy_bytes_per_s", "matmul_flops_per_s")


def measure_ceilings(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return bytes per second of a copy, read and written, and operations per second of a product of random matrices.

    tiny: few rounds, for a run on toy shapes.
    """
    on_gpu = device.type == "cuda"
    wanted = [precision for precision in PRECISIONS.values() if on_gpu or precision.name == "float32"]
    rates = {precision.name: rate_of(device, precision, tiny) for precision in wanted}
    return {
        "copy_bytes_per_s": copy_bandwidth(device, _rounds(device, tiny)),
        "matmul_flops_per_s": rates["bfloat16" if on_gpu else "float32"],
        "matmul_by_precision": rates,
    }


def rate_of(device: torch.device, precision: Precision, tiny: bool) -> float:
    """Return operations per second of a large product in this precision."""
    with precision.switched():
        return matmul_rate(device, precision.dtype, _rounds(device, tiny))


def _rounds(device: torch.device, tiny: bool) -> int:
    return 20 if device.type == "cuda" else 2 if tiny else 10

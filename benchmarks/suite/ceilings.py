"""How fast a machine can be: the rates of a large copy and of large matrix products."""

from __future__ import annotations

from typing import Any

import torch
from common.harness import copy_bandwidth, matmul_rate

from suite.precision import PRECISIONS

CEILINGS = ("copy_bytes_per_s", "matmul_flops_per_s")


def measure_ceilings(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return bytes per second of a copy, read and written, and operations per second of a product of random matrices.

    tiny: few rounds, for a run on toy shapes.
    """
    on_gpu = device.type == "cuda"
    rounds = 20 if on_gpu else 2 if tiny else 10
    rates = {}
    for precision in PRECISIONS.values():
        if on_gpu or precision.dtype == torch.float32:
            with precision.switched():
                rates[precision.name] = matmul_rate(device, precision.dtype, rounds)
    return {
        "copy_bytes_per_s": copy_bandwidth(device, rounds),
        "matmul_flops_per_s": rates["bfloat16" if on_gpu else "float32"],
        "matmul_by_precision": rates,
    }

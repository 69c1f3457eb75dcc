"""The arithmetic of the GEMM-shaped kernels, from the arguments of a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fusedres.kernels.triton_core.launch import Launch


def _conv(a: dict[str, Any]) -> int:
    return 2 * a["rows"] * a["C"] * a["K"] * a["R"] * a["S"]


_FLOPS: dict[str, Callable[[dict[str, Any]], int]] = {
    "conv_fprop_kernel": _conv,
    "conv_fprop_descriptor_kernel": _conv,
    "conv_bn_add_relu_kernel": _conv,
    "conv_dgrad_kernel": lambda a: 2 * a["N"] * a["P"] * a["Q"] * a["C"] * a["K"] * a["R"] * a["S"],
    "conv_wgrad_kernel": lambda a: 2 * a["M"] * a["C"] * a["K"] * a["TAPS"],
    "bn_relu_maxpool_wgrad_kernel": lambda a: 2 * a["y_ptr"].numel() * a["C"] * a["TAPS_H"] * a["TAPS_W"],
    "gram_tiles_kernel": lambda a: a["M"] * a["C"] * (a["C"] + 1),
    "one_pass_tail_kernel": lambda a: 2 * a["M"] * a["K"] * (a["C"] + a["X_C"]),
    "one_pass_reduce_kernel": lambda a: 2 * a["M"] * a["K"] * (a["C"] + a["X_C"]),
    "one_pass_dgrad_kernel": lambda a: 2 * a["M"] * a["C"] * (a["C"] + a["K"]),
}


GEMMS = frozenset(_FLOPS)


def flops(launches: Sequence[Launch]) -> int:
    """Return the operations of the GEMM-shaped kernels; the arithmetic of other kernels is negligible."""
    return sum(_FLOPS[launch.name](launch.arguments) for launch in launches if launch.name in _FLOPS)

"""The kernels in which the main loop of a product has no full pipeline by design, and why.

A product of 16-bit operands should have a full pipeline: operands are copied ahead asynchronously, and the loop stores
nothing to shared memory. LACKS lists the exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusedres.kernels.triton_core.launch import Config, Launch

COPIES = "no asynchronous copies in the main loop"
STORES = "shared-memory stores in the main loop"


@dataclass(frozen=True)
class Lack:
    """An exception: the kernels, what they lack, the condition on arguments, config and arch, and the reason."""

    kernels: tuple[str, ...]
    what: tuple[str, ...]
    when: Callable[[Mapping[str, Any], Config, int], bool]
    why: str


def _gated(arguments: Mapping[str, Any], config: Config, arch: int) -> bool:
    return arguments["gate_ptr"] is not None


def _always(arguments: Mapping[str, Any], config: Config, arch: int) -> bool:
    return True


LACKS = (
    Lack(
        ("conv_fprop_kernel", "conv_bn_add_relu_kernel"),
        (COPIES, STORES),
        lambda arguments, config, arch: config["FLAT"],
        "neighbours in a tile of x belong to different taps: single elements, but a copy has at least 4 bytes",
    ),
    Lack(
        ("conv_fprop_kernel",),
        (STORES,),
        lambda arguments, config, arch: arch < 90 and arguments["state_ptr"] is not None and arguments["PADDED"],
        "padding is masked by indices after the affine map; reading the mask from a table would double the loop",
    ),
    Lack(
        ("bn_relu_maxpool_wgrad_kernel",),
        (STORES,),
        _always,
        "x is loaded by single elements for the same reason, and dy is formed from windows",
    ),
    Lack(
        ("gram_tiles_kernel", "one_pass_reduce_kernel"),
        (STORES,),
        _always,
        "both operands are computed on load, and the second one can only come from shared memory",
    ),
    Lack(
        ("conv_wgrad_kernel",),
        (STORES,),
        lambda arguments, *_: (
            arguments["y_ptr"] is not None and (arguments["state_ptr"] is not None or arguments["gate_ptr"] is not None)
        ),
        "both operands are computed on load, or one of them with bits that other threads hold; dy is read once",
    ),
    Lack(
        ("one_pass_tail_kernel",),
        (STORES,),
        lambda arguments, config, arch: 0 < arguments["X_C"] <= config["BLOCK_C"] >= arguments["C"],
        "two products of one step each, one after the other: there is no loop",
    ),
    Lack(
        ("one_pass_dgrad_kernel",),
        (STORES,),
        lambda arguments, config, arch: arguments["C"] <= config["BLOCK_K"],
        "the product of z is a single step, unrolled after the loop of the other product",
    ),
    Lack(
        ("conv_dgrad_kernel", "one_pass_dgrad_kernel"),
        (STORES,),
        _gated,
        "the eight bits of one byte of the gate go to eight lanes",
    ),
)


def lacks(launch: Launch, config: Config, arch: int) -> dict[str, str]:
    """Return what this launch may lack → why."""
    return {
        what: lack.why
        for lack in LACKS
        if launch.name in lack.kernels and lack.when(launch.arguments, config, arch)
        for what in lack.what
    }

"""What the main loop of a product may lack by the design of its kernel, and why.

A product of 16-bit operands is held to a full pipeline: operands are copied ahead asynchronously, and nothing is stored
to shared memory in the loop. LACKS names where the design has it otherwise.
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
    """Kernels, what they lack where `when` holds of a launch's arguments, config and arch, and why."""

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
        "neighbours in a tile of x are of other taps: single elements, and the least that is copied is 4 bytes",
    ),
    Lack(
        ("conv_fprop_kernel",),
        (STORES,),
        lambda arguments, config, arch: arch < 90 and arguments["state_ptr"] is not None and arguments["PADDED"],
        "padding is masked from indices behind the affine map: reading it from a table would double the loop",
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
        "both operands are computed on load, or one behind bits that other threads hold; dy is read once",
    ),
    Lack(
        ("one_pass_tail_kernel",),
        (STORES,),
        lambda arguments, config, arch: 0 < arguments["X_C"] <= config["BLOCK_C"] >= arguments["C"],
        "two products of one step each, behind each other: there is no loop",
    ),
    Lack(
        ("one_pass_dgrad_kernel",),
        (STORES,),
        lambda arguments, config, arch: arguments["C"] <= config["BLOCK_K"],
        "the product of z is one step, unrolled behind the loop of the other one",
    ),
    Lack(
        ("conv_dgrad_kernel", "one_pass_dgrad_kernel"),
        (STORES,),
        _gated,
        "the eight bits of a byte of the gate go to eight lanes",
    ),
)


def lacks(launch: Launch, config: Config, arch: int) -> dict[str, str]:
    """What this launch may lack → why."""
    return {
        what: lack.why
        for lack in LACKS
        if launch.name in lack.kernels and lack.when(launch.arguments, config, arch)
        for what in lack.what
    }

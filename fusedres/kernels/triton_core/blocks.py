"""Sizes of the blocks of channels, or of other columns, that a program takes."""

from __future__ import annotations

import triton

from fusedres.kernels.triton_core.launch import ceil_div


def column_block(columns: int, most: int) -> int:
    """Return the block of at most `most` columns that leaves the fewest lanes idle; of several, the widest."""
    return min((block for block in (256, 128, 64, 32, 16) if block <= most), key=lambda b: ceil_div(columns, b) * b)


def largest_block(columns: int) -> int:
    """Return the smallest block that holds all columns: no larger one is of use."""
    return max(16, int(triton.next_power_of_2(columns)))

"""A step of a matrix product; its first operand may be computed in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.triton_core.launch import INTERPRETED

# Before Triton 3.9, the next step may write the first operand's registers while this step's wgmma still reads them
# (triton#9433). Using the sums makes the next step wait for the wgmma, so the two no longer overlap.
# benchmarks/inspect_kernels.py --hazards finds in SASS where this is needed.
_WAITS = tl.constexpr(not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


@triton.jit
def add_product(acc, a, b, COMPUTED: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + a·b in acc's type; COMPUTED: a was computed after its load, so it comes from registers."""
    acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if _WAITS and COMPUTED and acc.dtype == tl.float32:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc

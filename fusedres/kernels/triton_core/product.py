"""A step of a matrix product whose first operand is computed in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.triton_core.launch import INTERPRETED

# Triton before 3.9 lets the next step write the first operand's registers while the wgmma of this one may still read
# them (triton#9433). A use of the sums makes it wait for the wgmma first, at the price of the overlap between the two.
# benchmarks/inspect_kernels.py --hazards reads from SASS where that is needed.
_WAITS = tl.constexpr(not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


@triton.jit
def add_product(acc, a, b, COMPUTED: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a·b, in acc's type; COMPUTED: a is no tile as it was loaded, so it comes from registers."""
    acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    if _WAITS and COMPUTED and acc.dtype == tl.float32:
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=False, pack=1)
    return acc

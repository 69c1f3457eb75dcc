"""The shortcut's share of the input gradient, added to the branch's in place."""

from __future__ import annotations

from torch import Tensor

from fusedres.ops._arguments import Integer, activation, gate
from fusedres.ops._library import op
from fusedres.values import ShortcutGradient


@op(
    "shortcut_grad",
    {
        "shortcut_stride": Integer(1),
        "grad_x": activation("N C H W"),
        "shortcut": activation(
            "N D>=C H/shortcut_stride W/shortcut_stride", remedy="was the downsample branch skipped?"
        ),
        "shortcut_gate": gate("N D H/shortcut_stride W/shortcut_stride"),
    },
    writes=("grad_x",),
)
def shortcut_grad_(grad_x: Tensor, shortcut: ShortcutGradient, *, backend: str) -> None:
    """grad_x[n, c, p·stride, q·stride] += d[n, c, p, q], with d of Gated.

    The transpose of the identity, of strided subsampling and of zero-padded channels: dL/dx = S'(x)ᵀd + F'(x)ᵀd.

    Args:
        grad_x: (N, C', H, W), updated in place.
        shortcut: (N, C, P, Q), C >= C', P = ceil(H / stride), Q = ceil(W / stride), in grad_x's dtype.
    """

"""Whether results agree: rounding apart, which is another one in every way of computing them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def off_by(ours: Tensor, reference: Tensor) -> float:
    """‖ours − reference‖ / ‖reference‖, NaN where either has one."""
    wide = torch.float64 if reference.dtype == torch.float64 else torch.float32
    ours, reference = ours.to(wide), reference.to(wide)
    scale = reference.norm()
    return float((ours - reference).norm() / scale) if scale > 0 else float(ours.norm())


def disagreement(ours: Sequence[Tensor], reference: Sequence[Tensor], bound: float) -> str | None:
    """In words, None where they agree."""
    for position, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if a.shape != b.shape:
            return f"result {position} has shape {tuple(a.shape)}, the reference {tuple(b.shape)}"
        if not a.numel():
            continue
        if not b.is_floating_point():  # mask bits and positions of maxima: ties and rounding
            share = float((a != b).float().mean())
            if not share <= 2e-2:
                return f"result {position}: {share:.2%} of the elements differ"
            continue
        error = off_by(a, b)
        if not error <= bound:
            return f"result {position} is off by {error:.3g} of its norm, allowed {bound:.3g}"
    return None

"""The constants of one call of a gated residual tail, and its tensors in one flat order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TermTensors(NamedTuple):
    """The tensors of one term; all but x are optional. Factors are (1 or N, C) in the arithmetic type."""

    x: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    factor: Tensor | None = None
    logits: Tensor | None = None


class TermNorm(NamedTuple):
    """The settings of a term's BatchNorm."""

    batch_statistics: bool
    update: bool
    momentum: float | None
    eps: float


class TailPlan(NamedTuple):
    """The constants of one call of a tail."""

    norms: tuple[TermNorm | None, TermNorm | None]  # of the branch, of the shortcut
    has_shortcut: bool
    kind: str
    before_add: bool
    coupled: bool
    backend: str
    excitation: torch.dtype | None = None  # of the products that make the branch's factor; None: it is given, or absent

    @property
    def is_plain_sum(self) -> bool:
        """Whether the gradient of the sum of both terms is that of out."""
        return self.before_add or self.kind == "identity"


TERM = len(TermTensors._fields)
States = tuple[Tensor | None, Tensor | None]  # of the BatchNorms of both terms


def split(tensors: Sequence[Tensor | None]) -> tuple[TermTensors, TermTensors, Tensor | None]:
    """Return the branch's tensors, the shortcut's, and the slope, from the flat order of the Function's inputs.

    Those of an excitation follow; see excitation.py.
    """
    return TermTensors(*tensors[:TERM]), TermTensors(*tensors[TERM : 2 * TERM]), tensors[2 * TERM]


def as_image(tensor: Tensor) -> Tensor:
    """Return (N, C) as images of one pixel."""
    return tensor[:, :, None, None] if tensor.dim() == 2 else tensor

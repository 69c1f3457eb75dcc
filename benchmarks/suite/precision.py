"""The dtypes in which blocks and models run: mixed precision by autocast, and float32 with and without TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """`dtype`: the dtype of autocast, or float32. `tf32`: whether float32 products may round their operands to TF32."""

    name: str
    dtype: torch.dtype
    tf32: bool | None = None

    @contextmanager
    def switched(self) -> Iterator[None]:
        """Inside, TF32 is on or off, for the convolutions and products of the library and of this package."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        before = cudnn.allow_tf32, matmul.allow_tf32
        if self.tf32 is not None:
            cudnn.allow_tf32 = matmul.allow_tf32 = self.tf32
        try:
            yield
        finally:
            cudnn.allow_tf32, matmul.allow_tf32 = before

    @property
    def about(self) -> dict[str, Any]:
        """Return the fields of a row."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "tf32": self.tf32}


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bfloat16", torch.bfloat16),
        Precision("float16", torch.float16),
        Precision("tf32", torch.float32, True),
        Precision("float32", torch.float32, False),
    )
}

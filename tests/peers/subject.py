"""The small network that every tool of model_tools.py is tried on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from sharded_worker import model
from torch import Tensor, nn

import fusedres


class Subject:
    """A stock model, its fused twin, images, and what the stock model computes."""

    def __init__(self) -> None:
        self.stock = model()
        self.fused = fusedres.fuse(copy.deepcopy(self.stock))
        self.x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def single(self) -> Subject:
        """Use float32 and eval mode, for tools that do not know float64."""
        self.stock, self.fused, self.x = self.stock.float(), self.fused.float(), self.x.float()
        return self.eval()

    def eval(self) -> Subject:
        """Put both models into eval mode."""
        self.stock.eval()
        self.fused.eval()
        return self

    def step(self, call: Callable[[Tensor], Tensor] | None = None) -> None:
        """Compare one training step of the fused model, called in some way, with the stock model's."""
        got = self.gradients(self.fused, self.fused if call is None else call)
        for found, expected in zip(got, self.gradients(self.stock, self.stock), strict=True):
            close(found, expected)

    def gradients(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the output and the gradients of a step."""
        model.zero_grad()
        out = call(self.x)
        out.sin().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    def infer(self, call: Callable[[Tensor], Any] | None = None) -> None:
        """Compare an inference of the fused model, called in some way, with the stock model's."""
        self.eval()
        with torch.no_grad():
            close((self.fused if call is None else call)(self.x), self.stock(self.x))


def close(found: Tensor, expected: Tensor) -> None:
    """Assert that two results are equal but for rounding."""
    exact = found.dtype is torch.float64
    tolerance = 1e-9 if exact else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))

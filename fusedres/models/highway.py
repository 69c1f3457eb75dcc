"""Fully connected highway networks."""

from __future__ import annotations

from torch import Tensor, nn

from fusedres.modules import HighwayLinear


class HighwayNetwork(nn.Module):
    """A linear layer to `width` features, depth − 2 highway layers, and a linear classifier: Highway-n of the paper.

    Shape: x (N, …) with in_features numbers a sample, to (N, num_classes).

    Args:
        depth: n, at least 2.
        gate_bias: see HighwayLinear; −1 to −4 in the paper, lower for deeper networks.

    Raises: ValueError: depth is less than 2.

    Source: Srivastava, Greff and Schmidhuber 2015, Highway Networks, https://arxiv.org/abs/1505.00387, section 4.
    """

    def __init__(
        self, depth: int, in_features: int, width: int = 50, num_classes: int = 10, gate_bias: float = -2.0
    ) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"HighwayNetwork: depth must be at least 2, got {depth!r}")
        self.first = nn.Linear(in_features, width)
        self.relu = nn.ReLU()
        self.layers = nn.Sequential(*(HighwayLinear(width, gate_bias) for _ in range(depth - 2)))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; see the class."""
        result: Tensor = self.classifier(self.layers(self.relu(self.first(x.flatten(1)))))
        return result

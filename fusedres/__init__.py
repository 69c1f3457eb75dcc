"""Fused residual blocks for PyTorch."""

from fusedres._version import __version__

__all__ = ["__version__"]

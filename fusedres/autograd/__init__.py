"""Autograd of the fused blocks: which ops run in which order, and what is saved."""

from fusedres.autograd.plan import BlockPlan, ConvBN
from fusedres.autograd.residual_block import count_path, path_counts, run_block

__all__ = ["BlockPlan", "ConvBN", "count_path", "path_counts", "run_block"]

"""Autograd of the fused blocks: which ops run in which order, and what is saved."""

from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, ConvBN
from fusedres.autograd.residual_block import count_path, path_counts, run_block

__all__ = ["UNIT_TENSORS", "BlockPlan", "ConvBN", "count_path", "path_counts", "run_block"]

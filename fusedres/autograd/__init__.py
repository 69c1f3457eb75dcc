"""Autograd of the fused blocks: which ops run in which order, and what is saved."""

from fusedres.autograd.graph import PLAIN, are_plain, wants_gradients
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.memory import to_channels_last
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, ConvBN
from fusedres.autograd.residual_block import UncheckedError, count_path, path_counts, run_block
from fusedres.autograd.stem import StemPlan, run_stem
from fusedres.dispatch import LIBRARY, Directions

__all__ = [
    "LIBRARY",
    "PLAIN",
    "UNIT_TENSORS",
    "BlockPlan",
    "ConvBN",
    "Directions",
    "StemPlan",
    "UncheckedError",
    "are_plain",
    "count_path",
    "in_format",
    "path_counts",
    "run_block",
    "run_stem",
    "suggests_channels_last",
    "to_channels_last",
    "wants_gradients",
]

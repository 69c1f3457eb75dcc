"""Forward and backward of the fused blocks: the order of their ops, and what is saved between the two."""

from fusedres.autograd.dense_block import DensePlan, run_dense_block
from fusedres.autograd.folded_block import run_folded
from fusedres.autograd.frozen import Frozen, FrozenBlock, run_frozen
from fusedres.autograd.frozen_network import FoldedStem, FrozenNetwork, fold_linear, fold_stem
from fusedres.autograd.gated_tail import run_tail
from fusedres.autograd.graph import PLAIN, are_plain, wants_gradients
from fusedres.autograd.layout import in_format, suggests_channels_last
from fusedres.autograd.norm_act_conv import NormActConvPlan, NormActConvTensors, run_norm_act_conv
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, ConvBN, Inputs, StemPlan
from fusedres.autograd.residual_block import UncheckedError, count_path, path_counts, run_block
from fusedres.autograd.stem import run_stem
from fusedres.autograd.sum_statistics import run_sum
from fusedres.autograd.tail_plan import TailPlan, TermNorm, TermTensors

__all__ = [
    "PLAIN",
    "UNIT_TENSORS",
    "BlockPlan",
    "ConvBN",
    "DensePlan",
    "FoldedStem",
    "Frozen",
    "FrozenBlock",
    "FrozenNetwork",
    "Inputs",
    "NormActConvPlan",
    "NormActConvTensors",
    "StemPlan",
    "TailPlan",
    "TermNorm",
    "TermTensors",
    "UncheckedError",
    "are_plain",
    "count_path",
    "fold_linear",
    "fold_stem",
    "in_format",
    "path_counts",
    "run_block",
    "run_dense_block",
    "run_folded",
    "run_frozen",
    "run_norm_act_conv",
    "run_stem",
    "run_sum",
    "run_tail",
    "suggests_channels_last",
    "wants_gradients",
]

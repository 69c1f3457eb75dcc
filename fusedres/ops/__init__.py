"""The fused operators, as torch.library ops of the namespace fusedres.

Each op takes its backend as the keyword argument `backend`; `python -m fusedres info` lists which backend has which op.
The rows above an op's function say shape, dtype and memory format of every tensor that it takes. An activation is a
dense channels_last tensor (N, C, H, W) in float32, float64, bfloat16 or float16; sums and states are in float64 for
float64 activations, else in float32. A tensor that is not what the rows say is a ValueError, TypeError or RuntimeError
that names op and argument, raised before anything is computed or written.
"""

from fusedres.ops.bn_add_relu import bn_add_relu, bn_add_relu_, bn_add_relu_out
from fusedres.ops.bn_add_relu_backward import bn_add_relu_backward, bn_add_relu_backward_, bn_relu_backward_
from fusedres.ops.bn_backward import bn_backward_apply, bn_backward_coefficients, bn_backward_reduce
from fusedres.ops.bn_relu import bn_relu, bn_relu_
from fusedres.ops.bn_relu_maxpool import (
    bn_relu_maxpool,
    bn_relu_maxpool_backward,
    bn_relu_maxpool_backward_,
    bn_relu_maxpool_reduce,
    bn_relu_maxpool_wgrad,
)
from fusedres.ops.bn_statistics import bn_finalize, bn_frozen, bn_statistics
from fusedres.ops.conv_dgrad import conv_dgrad
from fusedres.ops.conv_fprop import conv_bn_add_relu, conv_fprop
from fusedres.ops.conv_weights import conv_weights
from fusedres.ops.conv_wgrad import conv_wgrad, conv_wgrad_finalize
from fusedres.ops.empty_batch import empty_batch
from fusedres.ops.gram import gram, gram_statistics
from fusedres.ops.one_pass import one_pass_backward, one_pass_statistics
from fusedres.ops.one_pass_tail import one_pass_fold, one_pass_tail
from fusedres.ops.one_pass_tail_backward import one_pass_dgrad, one_pass_products, one_pass_reduce
from fusedres.ops.relu_backward import relu_backward
from fusedres.ops.shortcut_grad import shortcut_grad_

__all__ = [
    "bn_add_relu",
    "bn_add_relu_",
    "bn_add_relu_backward",
    "bn_add_relu_backward_",
    "bn_add_relu_out",
    "bn_backward_apply",
    "bn_backward_coefficients",
    "bn_backward_reduce",
    "bn_finalize",
    "bn_frozen",
    "bn_relu",
    "bn_relu_",
    "bn_relu_backward_",
    "bn_relu_maxpool",
    "bn_relu_maxpool_backward",
    "bn_relu_maxpool_backward_",
    "bn_relu_maxpool_reduce",
    "bn_relu_maxpool_wgrad",
    "bn_statistics",
    "conv_bn_add_relu",
    "conv_dgrad",
    "conv_fprop",
    "conv_weights",
    "conv_wgrad",
    "conv_wgrad_finalize",
    "empty_batch",
    "gram",
    "gram_statistics",
    "one_pass_backward",
    "one_pass_dgrad",
    "one_pass_fold",
    "one_pass_products",
    "one_pass_reduce",
    "one_pass_statistics",
    "one_pass_tail",
    "relu_backward",
    "shortcut_grad_",
]

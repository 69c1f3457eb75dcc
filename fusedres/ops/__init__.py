"""The fused operators, as torch.library ops of the namespace fusedres.

Each op takes its backend as the keyword argument `backend`; `python -m fusedres info` lists which backend has which op.
The rows above an op's function say shape, dtype and memory format of every tensor that it takes. An activation is a
dense channels_last tensor (N, C, H, W) in float32, float64, bfloat16 or float16; sums and states are in float64 for
float64 activations, else in float32. A tensor that is not what the rows say is a ValueError, TypeError or RuntimeError
that names op and argument, raised before anything is computed or written.
"""

from fusedres.ops.bn_add_relu import bn_add_relu as bn_add_relu
from fusedres.ops.bn_add_relu import bn_add_relu_ as bn_add_relu_
from fusedres.ops.bn_add_relu import bn_add_relu_out as bn_add_relu_out
from fusedres.ops.bn_add_relu_backward import bn_add_relu_backward as bn_add_relu_backward
from fusedres.ops.bn_add_relu_backward import bn_add_relu_backward_ as bn_add_relu_backward_
from fusedres.ops.bn_add_relu_backward import bn_relu_backward_ as bn_relu_backward_
from fusedres.ops.bn_add_relu_backward import bn_relu_backward_add_ as bn_relu_backward_add_
from fusedres.ops.bn_backward import bn_backward_apply as bn_backward_apply
from fusedres.ops.bn_backward import bn_backward_coefficients as bn_backward_coefficients
from fusedres.ops.bn_backward import bn_backward_reduce as bn_backward_reduce
from fusedres.ops.bn_relu import bn_relu as bn_relu
from fusedres.ops.bn_relu import bn_relu_ as bn_relu_
from fusedres.ops.bn_relu_maxpool import bn_relu_maxpool as bn_relu_maxpool
from fusedres.ops.bn_relu_maxpool import bn_relu_maxpool_backward as bn_relu_maxpool_backward
from fusedres.ops.bn_relu_maxpool import bn_relu_maxpool_backward_ as bn_relu_maxpool_backward_
from fusedres.ops.bn_relu_maxpool import bn_relu_maxpool_reduce as bn_relu_maxpool_reduce
from fusedres.ops.bn_relu_maxpool import bn_relu_maxpool_wgrad as bn_relu_maxpool_wgrad
from fusedres.ops.bn_statistics import bn_finalize as bn_finalize
from fusedres.ops.bn_statistics import bn_frozen as bn_frozen
from fusedres.ops.bn_statistics import bn_statistics as bn_statistics
from fusedres.ops.bn_statistics import bn_statistics_and_means as bn_statistics_and_means
from fusedres.ops.bn_statistics import bn_statistics_of_sum_ as bn_statistics_of_sum_
from fusedres.ops.conv_dgrad import conv_dgrad as conv_dgrad
from fusedres.ops.conv_fprop import conv_bn_add_relu as conv_bn_add_relu
from fusedres.ops.conv_fprop import conv_fprop as conv_fprop
from fusedres.ops.conv_weights import conv_weights as conv_weights
from fusedres.ops.conv_wgrad import conv_wgrad as conv_wgrad
from fusedres.ops.conv_wgrad import conv_wgrad_finalize as conv_wgrad_finalize
from fusedres.ops.dense_block import bn_from_moments as bn_from_moments
from fusedres.ops.dense_block import dense_append_ as dense_append_
from fusedres.ops.dense_block import dense_bn_relu as dense_bn_relu
from fusedres.ops.dense_block import dense_bn_relu_backward_ as dense_bn_relu_backward_
from fusedres.ops.dense_block import dense_gradient as dense_gradient
from fusedres.ops.empty_batch import empty_batch as empty_batch
from fusedres.ops.gated_tail import gated_tail as gated_tail
from fusedres.ops.gated_tail import gated_tail_ as gated_tail_
from fusedres.ops.gated_tail import gated_tail_apply as gated_tail_apply
from fusedres.ops.gated_tail import gated_tail_reduce as gated_tail_reduce
from fusedres.ops.gram import gram as gram
from fusedres.ops.gram import gram_statistics as gram_statistics
from fusedres.ops.one_pass import one_pass_backward as one_pass_backward
from fusedres.ops.one_pass import one_pass_statistics as one_pass_statistics
from fusedres.ops.one_pass_tail import one_pass_dgrad as one_pass_dgrad
from fusedres.ops.one_pass_tail import one_pass_fold as one_pass_fold
from fusedres.ops.one_pass_tail import one_pass_products as one_pass_products
from fusedres.ops.one_pass_tail import one_pass_reduce as one_pass_reduce
from fusedres.ops.one_pass_tail import one_pass_tail as one_pass_tail
from fusedres.ops.packed_convolution import pack_weight as pack_weight
from fusedres.ops.packed_convolution import packed_convolution_out as packed_convolution_out
from fusedres.ops.relu_backward import relu_backward as relu_backward
from fusedres.ops.shortcut_grad import shortcut_grad_ as shortcut_grad_

"""The ops for callers that have checked their arguments: those of torch.ops.fusedres.<op>, straight to the kernel."""

from fusedres.ops.bn_add_relu import BN_ADD_RELU, BN_ADD_RELU_, BN_ADD_RELU_OUT
from fusedres.ops.bn_add_relu_backward import BN_ADD_RELU_BACKWARD, BN_ADD_RELU_BACKWARD_, BN_RELU_BACKWARD_
from fusedres.ops.bn_frozen import BN_FROZEN
from fusedres.ops.bn_relu import BN_RELU, BN_RELU_
from fusedres.ops.bn_statistics import BN_STATISTICS
from fusedres.ops.empty_batch import EMPTY_BATCH
from fusedres.ops.gram import GRAM
from fusedres.ops.one_pass import ONE_PASS_BACKWARD, ONE_PASS_STATISTICS
from fusedres.ops.relu_backward import RELU_BACKWARD
from fusedres.ops.shortcut_grad import SHORTCUT_GRAD_

bn_add_relu = BN_ADD_RELU.launch
bn_add_relu_ = BN_ADD_RELU_.launch
bn_add_relu_out = BN_ADD_RELU_OUT.launch
bn_add_relu_backward = BN_ADD_RELU_BACKWARD.launch
bn_add_relu_backward_ = BN_ADD_RELU_BACKWARD_.launch
bn_frozen = BN_FROZEN.launch
bn_relu = BN_RELU.launch
bn_relu_ = BN_RELU_.launch
bn_relu_backward_ = BN_RELU_BACKWARD_.launch
bn_statistics = BN_STATISTICS.launch
empty_batch = EMPTY_BATCH.launch
gram = GRAM.launch
one_pass_backward = ONE_PASS_BACKWARD.launch
one_pass_statistics = ONE_PASS_STATISTICS.launch
relu_backward = RELU_BACKWARD.launch
shortcut_grad_ = SHORTCUT_GRAD_.launch

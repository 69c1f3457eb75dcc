"""Arguments as both extensions read them (csrc/bindings_values.h): addresses, and tuples of addresses and numbers.

C++ cannot check a tensor by its address: the ops check every tensor first, and the caller keeps it alive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres import values

# The numbers of DType (csrc/common/dtype.h) and GateKind (csrc/common/gate.h).
DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_BITS, _OUTPUT = 1, 2
NO_GATE = (0, 0)
RECOMPUTED_GATE = (3, 0)  # the kernel computes BatchNorm's output again from x and its state

Vector = tuple[int, int]
Gate = tuple[int, int]
Tiles = tuple[int, int, int]
ConvolutionMap = tuple[int, ...]
BnBranch = tuple[int, int, bool, int]
Norm = tuple[Vector, Vector, Vector, Vector, int, bool, float, float]


def address(tensor: Tensor | None) -> int:
    """Return the address of the tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def vector_of(tensor: Tensor | None) -> Vector:
    """Return address and dtype."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), DTYPE_CODE[tensor.dtype])


def matrix_of(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return address, dtype, rows and columns; the columns are the second dimension, as for NHWC pixels."""
    columns = tensor.shape[1]
    return tensor.data_ptr(), DTYPE_CODE[tensor.dtype], tensor.numel() // columns, columns


def pixels_of(x: Tensor, stride: int = 1) -> tuple[int, int, int, int, int, int, int]:
    """Return address, dtype, batch, height, width, stride and channels of an activation."""
    n, c, h, w = x.shape
    return x.data_ptr(), DTYPE_CODE[x.dtype], n, h, w, stride, c


def gate_of(gate: Tensor | None) -> Gate:
    """Return what a gate tensor holds (nothing, bits as uint8, or a ReLU's output), and its address."""
    return NO_GATE if gate is None else (_BITS if gate.dtype is torch.uint8 else _OUTPUT, gate.data_ptr())


def tiles_of(tile_rows: int, partials: Tensor) -> Tiles:
    """Return the rows of a tile, the number of tiles, and the address of their sums."""
    return tile_rows, partials.shape[0], partials.data_ptr()


def branch_of(branch: values.BnBranch | None, grad_x: Tensor | None) -> BnBranch:
    """Return a branch with the address of the gradient of its x; nothing for None."""
    if branch is None:
        return 0, 0, False, 0
    return branch.x.data_ptr(), branch.state.data_ptr(), branch.batch_statistics, address(grad_x)


def norm_of(norm: values.Norm) -> Norm:
    """Return a BatchNorm's tensors and settings; momentum None averages cumulatively."""
    return (
        vector_of(norm.weight),
        vector_of(norm.bias),
        vector_of(norm.running_mean),
        vector_of(norm.running_var),
        address(norm.num_batches_tracked),
        norm.momentum is None,
        0.0 if norm.momentum is None else norm.momentum,
        norm.eps,
    )


def convolution_map(x: Sequence[int], weight: Sequence[int], geometry: values.Geometry) -> ConvolutionMap:
    """Return the sizes of a convolution of x (N, C, H, W) with a weight (K, C, R, S), and how it moves."""
    n, c, h, w = x
    k, _, *kernel = weight
    return n, h, w, c, k, *kernel, *geometry.stride, *geometry.padding, *geometry.dilation


def weight_map(weight: Sequence[int], dilation: Sequence[int] = (1, 1)) -> ConvolutionMap:
    """Return the same where only the sizes of the weight and the dilation are read."""
    return convolution_map((0, weight[1], 0, 0), weight, values.DENSE._replace(dilation=dilation))

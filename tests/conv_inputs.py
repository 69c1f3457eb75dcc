"""Inputs, float64 results and comparisons shared by the tests of conv_fprop and conv_bn_add_relu."""

from __future__ import annotations

import torch
from op_inputs import activation, device, state
from torch.nn import functional as F

from fusedres.values import Geometry

BACKENDS = ("reference", "triton")
# N, C, H, W, K, (R, S), stride, padding, dilation
CONVOLUTIONS = (
    (2, 16, 7, 9, 65, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 65, 9, 7, 16, (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 33, 8, 5, 3, (3, 3), (1, 1), (2, 2), (2, 2)),
    (2, 129, 5, 7, 127, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 127, 7, 5, 129, (1, 1), (2, 2), (0, 0), (1, 1)),
    (1, 40, 5, 6, 24, (1, 1), (1, 2), (1, 0), (1, 1)),
    (5, 64, 1, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 1, 6, 5, 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 3, 15, 13, 20, (7, 7), (2, 2), (3, 3), (1, 1)),
    (2, 33, 6, 7, 5, (3, 2), (1, 2), (0, 1), (2, 1)),
)
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}


def random_weight(k, c, kernel, dtype, seed=3):
    values = torch.randn((k, c, *kernel), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values / (c * kernel[0] * kernel[1]) ** 0.5).to(dtype).contiguous(memory_format=torch.channels_last)


def inputs(backend, convolution, dtype, with_state):
    """Return x, weight and state on the backend's device, and the geometry."""
    n, c, h, w, k, kernel, *geometry = convolution
    affine = None
    if with_state:
        affine = state(c, dtype)
        affine[3] = affine[3].abs() + 0.5  # relu(shift) > 0, so that padding with it instead of 0 would be seen
    where = device(backend, dtype)
    tensors = (activation((n, c, h, w), dtype), random_weight(k, c, kernel, dtype), affine)
    return *(None if t is None else t.to(where) for t in tensors), Geometry(*geometry)


def normalised(x, affine):
    """Return relu(scale·x + shift), rounded to x's dtype as in the op, as float64."""
    if affine is None:
        return x.double()
    wide = x.to(affine.dtype)
    return (wide * affine[2].view(1, -1, 1, 1) + affine[3].view(1, -1, 1, 1)).relu().to(x.dtype).double()


def expected(x, weight, affine, geometry):
    """Return the convolution in float64, and the sum of the magnitudes of its terms."""
    h, weight = normalised(x, affine).cpu(), weight.double().cpu()
    return F.conv2d(h, weight, None, *geometry), F.conv2d(h.abs(), weight.abs(), None, *geometry)


def assert_conv_near(name, got, want, terms, dtype, ulps=1.0):
    """Allow errors of 32 eps of the arithmetic times the terms, plus the rounding of the stored result.

    A half-precision h is rounded after its affine map. With a fused multiply-add it may be rounded to the other
    neighbour; then one of the many terms is off by an ulp.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 32 * EPS[wide] * terms + ulps * EPS[got.dtype] * (want.abs() + 0.1 * terms) + 1e-30
    got = got.double().cpu()
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, want {tuple(want.shape)}"
    wrong = ~((got - want).abs() <= bound) & ~(got.isnan() & want.isnan())
    index = torch.unravel_index(((got - want).abs() / bound).nan_to_num(1e30).mul(wrong).argmax(), wrong.shape)
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, worst at {[int(i) for i in index]}: "
        f"got {got[index]}, want {want[index]}, allowed error {bound[index]}"
    )


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

"""conv_bn_add_relu, the inference op, against torch's convolution and the same epilogue in float64."""

from __future__ import annotations

import pytest
import torch
from conv_inputs import BACKENDS, CONVOLUTIONS, assert_conv_near, expected, inputs, zeros
from op_inputs import activation, call, channels, state

from fusedres import ops
from fusedres.values import ShortcutInput

pytestmark = pytest.mark.usefixtures("full_precision")

SHORTCUTS = ("none", "plain", "strided", "padded", "normalised")


def _shortcut(kind, n, k, p, q, dtype):
    """Return the shortcut, its state and stride, and what it adds in float64."""
    if kind == "none":
        return None, None, 1, torch.zeros(n, k, p, q, dtype=torch.float64)
    if kind in ("plain", "normalised"):
        shortcut = activation((n, k, p, q), dtype, seed=5)
        if kind == "plain":
            return shortcut, None, 1, shortcut.double()
        affine = state(k, dtype, seed=6)
        return shortcut, affine, 1, shortcut.double() * channels(affine[2]) + channels(affine[3])
    c = k if kind == "strided" else max(1, k // 2)
    shortcut = activation((n, c, 2 * p - 1, 2 * q), dtype, seed=5)
    added = torch.zeros(n, k, p, q, dtype=torch.float64)
    added[:, :c] = shortcut.double()[:, :, ::2, ::2]
    return shortcut, None, 2, added


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SHORTCUTS)
@pytest.mark.parametrize(
    ("convolution", "dtype"),
    [
        (CONVOLUTIONS[0], torch.float32),
        (CONVOLUTIONS[4], torch.float32),
        (CONVOLUTIONS[1], torch.float64),
        (CONVOLUTIONS[9], torch.float16),
        (CONVOLUTIONS[0], torch.bfloat16),
    ],
)
def test_conv_bn_add_relu(backend, kind, convolution, dtype):
    x, weight, _, geometry = inputs(backend, convolution, dtype, False)
    y, terms = expected(x, weight, None, geometry)
    affine = state(weight.shape[0], dtype)
    shortcut, other, stride, added = _shortcut(kind, *y.shape, dtype)
    moved = (None if t is None else t.to(x.device) for t in (shortcut, other))
    shortcut = None if shortcut is None else ShortcutInput(*moved, stride)
    got = ops.conv_bn_add_relu(x, weight, geometry, affine.to(x.device), shortcut, backend=backend)
    want = (y * channels(affine[2]) + channels(affine[3]) + added).relu()
    terms = terms * channels(affine[2]).abs() + channels(affine[3]).abs() + added.abs()
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert_conv_near("out", got, want, terms, dtype, ulps=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_the_relu(backend):
    x, weight, _, geometry = inputs(backend, CONVOLUTIONS[0], torch.float32, False)
    x[0, 3, 2, 2] = torch.nan
    affine = state(65, torch.float32).to(x.device)
    out = ops.conv_bn_add_relu(x, weight, geometry, affine, backend=backend)
    assert torch.equal(out.isnan().cpu(), expected(x, weight, None, geometry)[0].isnan())


def test_conv_bn_add_relu_errors():
    x, weight, affine = zeros(2, 8, 6, 6), zeros(4, 8, 3, 3), torch.zeros(4, 4)
    geometry = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    cases = [
        (ValueError, r"state must have shape \(4, 4\)", (torch.zeros(4, 8), None, None, 1)),
        (ValueError, "was the downsample branch skipped", (affine, zeros(2, 4, 6, 6), None, 1)),
        (ValueError, "was the downsample branch skipped", (affine, zeros(2, 5, 3, 3), None, 1)),
        (ValueError, "neither strided nor padded", (affine, zeros(2, 4, 6, 6), affine, 2)),
        (ValueError, "shortcut_state must be None without shortcut", (affine, None, affine, 1)),
        (TypeError, r"shortcut must be torch\.float32 like x", (affine, zeros(2, 4, 3, 3).double(), None, 1)),
        (ValueError, "shortcut_stride must be at least 1", (affine, zeros(2, 4, 3, 3), None, 0)),
    ]
    names = ("state", "shortcut", "shortcut_state", "shortcut_stride")
    for error, message, arguments in cases:
        values = dict(zip(names, arguments, strict=True))
        with pytest.raises(error, match=f"conv_bn_add_relu: .*{message}"):
            call("conv_bn_add_relu", "reference", x=x, weight=weight, **geometry, **values)

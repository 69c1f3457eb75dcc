"""relu_backward and shortcut_grad_: the gradient of the last ReLU's input and the shortcut's part of it, exactly."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, SHAPES, activation, assert_near, backends_of, device

from fusedres import ops
from fusedres.kernels.reference_core import pack_bits
from fusedres.values import Gated, ShortcutGradient


def _gate(active, kind, dtype):
    if kind == "bits":
        return pack_bits(active)
    return active.to(dtype).contiguous(memory_format=torch.channels_last) if kind == "output" else None


@pytest.mark.parametrize("backend", backends_of("relu_backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["bits", "output"])
def test_relu_backward(backend, dtype, shape, kind):
    where = device(backend, dtype)
    grad, active = activation(shape, dtype).to(where), activation(shape, torch.float32, 4).to(where) > 0
    d, total = ops.relu_backward(Gated(grad, _gate(active, kind, dtype)), backend=backend)
    assert torch.equal(d, grad * active)
    want = d.double()
    assert_near("sum", total, want.sum((0, 2, 3)), want.abs().sum((0, 2, 3)), dtype, 16)


@pytest.mark.parametrize("backend", backends_of("relu_backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bits", "output", None])
@pytest.mark.parametrize(
    ("c_in", "c_out", "h", "w", "stride"),
    [(8, 8, 5, 5, 1), (3, 8, 7, 5, 2), (16, 33, 6, 6, 2), (17, 40, 5, 9, 3), (65, 65, 4, 3, 2)],
)
def test_shortcut_grad(backend, dtype, kind, c_in, c_out, h, w, stride):
    where = device(backend, dtype)
    grad_x = activation((2, c_in, h, w), dtype).to(where)
    shape = (2, c_out, -(-h // stride), -(-w // stride))
    grad, active = activation(shape, dtype, 2).to(where), activation(shape, torch.float32, 4).to(where) > 0
    gate = _gate(active, kind, dtype)
    want = grad_x.double()
    want[:, :, ::stride, ::stride] += (grad * active if gate is not None else grad).double()[:, :c_in]
    terms = torch.ones_like(want)
    ops.shortcut_grad_(grad_x, ShortcutGradient(grad, gate, stride), backend=backend)
    assert_near("grad_x", grad_x, want, terms, dtype, 8)


def test_errors():
    grad_x, grad = activation((2, 8, 6, 6), torch.float32), activation((2, 8, 6, 6), torch.float32)
    with pytest.raises(ValueError, match="was the downsample branch skipped"):
        ops.shortcut_grad_(grad_x, ShortcutGradient(grad, None, 2), backend="cpu")
    with pytest.raises(ValueError, match="shortcut_grad_: shortcut_gate must have shape"):
        ops.shortcut_grad_(grad_x, ShortcutGradient(grad, grad[:1]), backend="cpu")
    with pytest.raises(ValueError, match="relu_backward: gate must have shape"):
        ops.relu_backward(Gated(grad, torch.zeros(2, 6, 6, 2, dtype=torch.uint8)), backend="cpu")

"""bn_add_relu with its mask, in place and into a given tensor, against float64."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, SHAPES, activation, assert_near, backends_of, channels, device, state

from fusedres import ops
from fusedres.kernels.reference_core import unpack_bits
from fusedres.kernels.triton_core.launch import record_launches
from fusedres.ops.launch import launches
from fusedres.values import ShortcutInput


def _affine(x, affine):
    return x.double() * channels(affine[2]) + channels(affine[3])


def _terms(x, affine):
    return x.double().abs() * channels(affine[2]).abs() + channels(affine[3]).abs()


@pytest.mark.parametrize("backend", backends_of("bn_add_relu"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projection", [False, True])
def test_same_shape(backend, dtype, shape, projection):
    where = device(backend, dtype)
    x, shortcut = activation(shape, dtype).to(where), activation(shape, dtype, seed=7).to(where)
    affine = state(shape[1], dtype).to(where)
    other = state(shape[1], dtype, seed=5).to(where) if projection else None
    got, mask = ops.bn_add_relu(x, affine, ShortcutInput(shortcut, other), True, backend=backend)
    branch = _affine(shortcut, other) if projection else shortcut.double()
    terms = _terms(x, affine) + (_terms(shortcut, other) if projection else shortcut.double().abs())
    want = _affine(x, affine) + branch
    assert_near("out", got, want.relu(), terms, dtype)
    active = unpack_bits(mask, shape[1])
    clear = want.abs() > 8 * torch.finfo(torch.float32).eps * terms
    assert torch.equal(active[clear], (want > 0)[clear])
    assert torch.equal(ops.bn_add_relu(x, affine, ShortcutInput(shortcut, other), backend=backend)[0], got)
    out = torch.empty_like(x)
    ops.bn_add_relu_out(x, affine, ShortcutInput(shortcut, other), out, backend=backend)
    assert torch.equal(out, got)
    assert torch.equal(ops.bn_add_relu_(x, affine, ShortcutInput(shortcut, other), True, backend=backend), mask)
    assert torch.equal(x, got)


@pytest.mark.parametrize("backend", backends_of("bn_add_relu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("c_in", "c_out", "h", "w", "stride"),
    [(3, 8, 7, 5, 2), (16, 32, 6, 6, 2), (17, 40, 5, 9, 3), (4, 4, 5, 5, 2), (5, 70, 4, 4, 1)],
)
def test_zero_padded_shortcut(backend, dtype, c_in, c_out, h, w, stride):
    where = device(backend, dtype)
    shortcut = activation((2, c_in, h, w), dtype).to(where)
    x = activation((2, c_out, -(-h // stride), -(-w // stride)), dtype, seed=3).to(where)
    affine = state(c_out, dtype).to(where)
    got, mask = ops.bn_add_relu(x, affine, ShortcutInput(shortcut, None, stride), True, backend=backend)
    branch = torch.zeros(x.shape, dtype=torch.float64, device=where)
    branch[:, :c_in] = shortcut.double()[:, :, ::stride, ::stride]
    want, terms = _affine(x, affine) + branch, _terms(x, affine) + branch.abs()
    assert_near("out", got, want.relu(), terms, dtype)
    clear = want.abs() > 8 * torch.finfo(torch.float32).eps * terms
    assert torch.equal(unpack_bits(mask, c_out)[clear], (want > 0)[clear])
    assert not unpack_bits(mask, mask.shape[-1] * 8)[:, c_out:].any()


@pytest.mark.parametrize("backend", backends_of("bn_add_relu"))
def test_nan_is_active_and_passes(backend):
    where = device(backend)
    x = activation((1, 20, 2, 2), torch.float32).to(where)
    shortcut = activation((1, 20, 2, 2), torch.float32, seed=1).to(where)
    shortcut[0, 3, 1, 1] = torch.nan
    out, mask = ops.bn_add_relu(x, state(20, torch.float32).to(where), ShortcutInput(shortcut), True, backend=backend)
    assert out.isnan().sum() == 1 and out[0, 3, 1, 1].isnan() and unpack_bits(mask, 20)[0, 3, 1, 1]


@pytest.mark.parametrize("with_mask", [True, False])
def test_counted_bytes(with_mask):
    """There is one launch with exact views of what it touches: of a strided shortcut only the used pixels."""
    x, shortcut = torch.empty((2, 32, 7, 7), device="meta"), torch.empty((2, 16, 14, 14), device="meta")
    x, shortcut = (t.to(memory_format=torch.channels_last) for t in (x, shortcut))
    with record_launches() as made:
        launches("triton").bn_add_relu(
            x, torch.empty(4, 32, device="meta"), ShortcutInput(shortcut, None, 2), with_mask
        )
    pixels = 2 * 7 * 7
    assert [launch.bytes() for launch in made] == [4 * (4 * 32 + pixels * (2 * 32 + 16)) + with_mask * pixels * 4]


def test_errors():
    x = activation((2, 8, 3, 3), torch.float32)
    affine = state(8, torch.float32)
    with pytest.raises(ValueError, match="was the downsample branch skipped"):
        ops.bn_add_relu(x, affine, ShortcutInput(activation((2, 8, 6, 6), torch.float32)), backend="cpu")
    with pytest.raises(ValueError, match="was the downsample branch skipped"):
        ops.bn_add_relu(x, affine, ShortcutInput(activation((2, 9, 3, 3), torch.float32)), backend="cpu")
    with pytest.raises(TypeError, match=r"bn_add_relu: shortcut must be torch\.float32 like x"):
        ops.bn_add_relu(x, affine, ShortcutInput(x.double()), backend="cpu")
    with pytest.raises(ValueError, match="neither strided nor padded"):
        ops.bn_add_relu(x, affine, ShortcutInput(activation((2, 4, 3, 3), torch.float32), affine), backend="cpu")

"""bn_relu, forward and in place, against float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from op_inputs import DTYPES, SHAPES, activation, assert_near, backends_of, channels, device, state, vector

from fusedres import ops
from fusedres.kernels.triton_core.launch import record_launches
from fusedres.kernels.triton_core.rows import pixel_offsets, tile
from fusedres.ops.launch import launches
from fusedres.values import Norm, ShortcutGradient, ShortcutInput


def _want(x, affine, pivot, stride):
    z = x.double()[:, :, ::stride, ::stride]
    terms = z.abs()
    if affine is not None:
        terms = z.abs() * channels(affine[2]).abs() + channels(affine[3]).abs()
        z = (z * channels(affine[2]) + channels(affine[3])).relu()
    if pivot is not None:
        z, terms = z - channels(pivot), terms + channels(pivot).abs()
    return z, terms


@pytest.mark.parametrize("backend", backends_of("bn_relu"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("with_state", "with_pivot", "stride"), [(1, 0, 1), (1, 1, 1), (0, 1, 2), (0, 0, 2), (0, 0, 3)]
)
def test_forward(backend, dtype, shape, with_state, with_pivot, stride):
    where, wide = device(backend, dtype), torch.float64 if dtype == torch.float64 else torch.float32
    x = activation(shape, dtype).to(where)
    affine = state(shape[1], dtype).to(where) if with_state else None
    pivot = vector(shape[1], wide).to(where) if with_pivot else None
    got = ops.bn_relu(x, affine, pivot, stride, backend=backend)
    want, terms = _want(x, affine, pivot, stride)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert_near("z", got, want, terms, dtype)


@pytest.mark.parametrize("backend", backends_of("bn_relu"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits(backend, dtype):
    where = device(backend, dtype)
    x = activation((3, 37, 5, 6), dtype).to(where)
    affine = state(37, dtype).to(where)
    want = ops.bn_relu(x, affine, backend=backend)
    ops.bn_relu_(x, affine, backend=backend)
    assert torch.equal(x, want)


@pytest.mark.parametrize("backend", backends_of("bn_relu"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_pass_as_in_torch(backend, dtype):
    where = device(backend, dtype)
    x = activation((2, 33, 3, 3), dtype).to(where)
    x[0, :, 0, 0], x[1, :, 1, 1], x[1, :, 2, 2] = torch.nan, torch.inf, -torch.inf
    affine = state(33, dtype).to(where)
    want = (x.double() * channels(affine[2]) + channels(affine[3])).relu()
    got = ops.bn_relu(x, affine, backend=backend)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert int(got.isnan().sum()) == 33


def test_every_bfloat16_and_float16_value_survives():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 32, 32)
        x = x.contiguous(memory_format=torch.channels_last)
        got = ops.bn_relu(x, None, backend="cpu")
        assert torch.equal(got.isnan(), x.isnan())
        assert torch.equal(got[~x.isnan()], x[~x.isnan()])


@pytest.mark.parametrize("backend", backends_of("bn_relu"))
def test_no_images(backend):
    where = device(backend)
    x = torch.empty((0, 8, 5, 5), device=where).contiguous(memory_format=torch.channels_last)
    assert ops.bn_relu(x, state(8, torch.float32).to(where), None, 2, backend=backend).shape == (0, 8, 3, 3)


@triton.jit
def _offsets_kernel(
    out_ptr, pid, C, P, Q, stride_n, stride_h, stride_w, IS_STRIDED: tl.constexpr, BLOCK_M: tl.constexpr
):
    row, column = tile(pid, C, BLOCK_M, 16)
    pixel = pixel_offsets(row, P, Q, stride_n, stride_h, stride_w, IS_STRIDED, BLOCK_M)
    tl.store(out_ptr + tl.arange(0, BLOCK_M), pixel + column)


@pytest.mark.parametrize("pid", [0, 5, 2**27 + 7, 2**31 - 1])
@pytest.mark.parametrize(("p", "q", "stride"), [(7, 5, 1), (7, 5, 2), (1, 1, 2), (1, 3, 3), (40_000, 30_000, 2)])
def test_offsets_beyond_32_bits(pid, p, q, stride):
    c, block_m = 40, 64
    strides = (stride * p * stride * q * c, stride * stride * q * c, stride * c)
    out = torch.empty(block_m, dtype=torch.int64, device=device("triton"))
    _offsets_kernel[(1,)](out, pid, c, p, q, *strides, IS_STRIDED=stride > 1, BLOCK_M=block_m)
    rows = range(pid // 3 * block_m, pid // 3 * block_m + block_m)
    pixels = [(m // (p * q), m // q % p, m % q) if stride > 1 else (0, 0, m) for m in rows]
    want = [sum(i * s for i, s in zip(pixel, strides, strict=True)) + pid % 3 * 16 for pixel in pixels]
    assert out.tolist() == want


@pytest.mark.skipif(not torch.cuda.is_available(), reason="more than 2^31 elements, on a GPU")
@pytest.mark.parametrize("stride", [1, 2])
def test_more_than_32_bits_of_elements(stride):
    x = torch.empty((33, 64, 1024, 1024), dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
    for image in x:
        image.copy_(torch.randn_like(image))
    affine = state(64, torch.float16).cuda()
    got = ops.bn_relu(x, affine, None, stride, backend="triton")
    for n in (0, 15, 31, 32):
        assert torch.equal(got[n : n + 1], ops.bn_relu(x[n : n + 1], affine, None, stride, backend="triton"))


@pytest.mark.parametrize("stride", [2**11, 2**12])
def test_cuda_reads_beyond_32_bits_of_elements(stride):
    """Only a few pixels of three images with 2^30 values each are used; most of the memory is never touched."""
    where = device("cuda")
    try:
        x = torch.empty((3, 16, 2**14, 2**12), dtype=torch.float16, device=where, memory_format=torch.channels_last)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
        pytest.skip(f"no room for 6 GiB: {error}")
    pixels = activation((3, 16, 2**14 // stride, 2**12 // stride), torch.float16).to(where)
    x[:, :, ::stride, ::stride] = pixels
    assert torch.equal(ops.bn_relu(x, None, None, stride, backend="cuda"), pixels)
    identity = torch.zeros(4, 16, device=where)
    assert torch.equal(
        ops.bn_add_relu(pixels, identity, ShortcutInput(x, None, stride), backend="cuda")[0], pixels.relu()
    )
    ops.shortcut_grad_(x, ShortcutGradient(pixels, None, stride), backend="cuda")
    assert torch.equal(x[:, :, ::stride, ::stride], 2 * pixels)


@pytest.mark.parametrize("n", [1, 70_000, 140_000])
def test_grids_stay_below_their_limits(n):
    """The second and third axes of a grid have a limit of 65,535 programs, so all programs are on the first."""
    x = torch.empty((n, 3, 1, 1), device="meta")
    with record_launches() as made:
        launches("triton").bn_relu(x, torch.empty(4, 3, device="meta"), None, 1)
        launches("triton").bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5))
    assert len(made) == 3 and all(len(launch.grid) == 1 and launch.grid[0] < 2**31 for launch in made)


def test_errors():
    x = activation((2, 4, 3, 3), torch.float32)
    with pytest.raises(ValueError, match="bn_relu: state must have shape"):
        ops.bn_relu(x, torch.ones(4, 5), backend="cpu")
    with pytest.raises(TypeError, match=r"bn_relu: state must be torch\.float32"):
        ops.bn_relu(x, torch.ones(4, 4, dtype=torch.float64), backend="cpu")
    with pytest.raises(ValueError, match="bn_relu: stride must be at least 1"):
        ops.bn_relu(x, None, None, 0, backend="cpu")

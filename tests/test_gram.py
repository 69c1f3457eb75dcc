"""gram and the one-pass tail against float64 autograd of convolution and BatchNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_inputs import DTYPES, activation, assert_near, backends_of, channels, device, state, vector

from fusedres import ops
from fusedres.values import Gram, GramState, Norm

SHAPES = ((2, 1, 5, 3), (3, 3, 4, 4), (1, 65, 9, 7), (2, 129, 5, 5), (5, 64, 14, 13), (2, 33, 40, 31), (1, 136, 9, 7))


@pytest.mark.parametrize("backend", backends_of("gram"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("with_state", "stride"), [(True, 1), (False, 2)])
def test_gram(backend, dtype, shape, with_state, stride):
    where = device(backend, dtype)
    x = activation(shape, dtype)
    affine = state(shape[1], dtype) if with_state else None
    got = ops.gram(x.to(where), None if affine is None else affine.to(where), stride, backend=backend)
    out, pivot, total, matrix = (t.cpu() for t in got)
    z = x.double()[:, :, ::stride, ::stride]
    if affine is not None:
        z = (z * channels(affine[2]) + channels(affine[3])).relu()
    assert_near("z", out, z - channels(pivot), z.abs() + channels(pivot).abs() + 1, dtype, 8)
    first = z.permute(0, 2, 3, 1).reshape(-1, shape[1])[:8]
    assert_near("pivot", pivot, first.mean(0), first.abs().mean(0) + 1, dtype, 8)
    rows = out.double().permute(0, 2, 3, 1).reshape(-1, shape[1])  # of the stored values
    assert_near("sum", total, rows.sum(0), rows.abs().sum(0), dtype, 128)
    assert_near("gram", matrix, rows.T @ rows, rows.abs().T @ rows.abs(), dtype, 512)
    assert backend == "reference" or torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("backend", backends_of("gram", "gram_statistics"))
def test_statistics_are_those_of_gram(backend):
    x, affine = activation((2, 24, 9, 7), torch.float32), state(24, torch.float32)
    where = device(backend)
    _, *want = ops.gram(x.to(where), affine.to(where), 2, backend=backend)
    got = ops.gram_statistics(x.to(where), affine.to(where), 2, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", backends_of("gram"))
def test_nan_stays_in_its_channel(backend):
    x = activation((2, 40, 6, 5), torch.float32)
    x[1, 7, 3, 2] = float("nan")
    where = device(backend)
    out, _, total, matrix = (
        t.cpu() for t in ops.gram(x.to(where), state(40, torch.float32).to(where), backend=backend)
    )
    assert out.isnan().sum() == 1 and total.isnan().nonzero().tolist() == [[7]]
    wrong = matrix.isnan()
    assert wrong[7].all() and wrong[:, 7].all() and wrong.sum() == 79


@pytest.mark.parametrize(("dtype", "shape"), [(torch.bfloat16, (3, 64, 14, 13)), (torch.float16, (2, 136, 14, 13))])
def test_cuda_one_split_of_many_steps(dtype, shape, monkeypatch):
    from fusedres.kernels.gram import cuda

    where = device("cuda")
    monkeypatch.setattr(cuda, "_split", lambda rows, channels: (-(-rows // 64) * 64, 1))
    out, _, total, matrix = (t.cpu() for t in ops.gram(activation(shape, dtype).to(where), None, backend="cuda"))
    rows = out.double().permute(0, 2, 3, 1).reshape(-1, shape[1])
    assert_near("sum", total, rows.sum(0), rows.abs().sum(0), dtype, 128)
    assert_near("gram", matrix, rows.T @ rows, rows.abs().T @ rows.abs(), dtype, 512)


def test_cuda_takes_tf32_where_torch_does():
    where = device("cuda")
    x = activation((2, 68, 9, 7), torch.float32).to(where)

    def error(precision):
        torch.backends.cudnn.conv.fp32_precision = precision
        out, _, _, matrix = (t.cpu() for t in ops.gram(x, None, backend="cuda"))
        rows = out.double().permute(0, 2, 3, 1).reshape(-1, 68)
        return ((matrix - rows.T @ rows).abs() / (rows.abs().T @ rows.abs())).max().item()

    before = torch.backends.cudnn.conv.fp32_precision
    try:
        assert error("ieee") < 1e-6
        assert 1e-5 < error("tf32") < 2.0**-10
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("backend", backends_of("gram"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("c_in", "c_out", "h", "w"), [(3, 12, 6, 5), (16, 64, 7, 7), (65, 33, 9, 8)])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (30.0, 1.0), (1e4, 0.1)])
def test_one_pass_is_convolution_and_batch_norm(backend, dtype, c_in, c_out, h, w, mean, std):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, c_in, h, w, generator=generator, dtype=torch.float64) * std + mean
    z = z.to(dtype).contiguous(memory_format=torch.channels_last)
    conv_weight = (torch.randn(c_out, c_in, 1, 1, generator=generator, dtype=torch.float64) / c_in**0.5).to(dtype)
    weight, bias = vector(c_out, dtype, 1), vector(c_out, dtype, 2)
    running = [torch.zeros(c_out, dtype=dtype), torch.ones(c_out, dtype=dtype), torch.tensor(0)]
    where = device(backend, dtype)
    on_device = [t.to(where) for t in (conv_weight, weight, bias)]
    running = [t.to(where) for t in running]
    centred, pivot, total, matrix = ops.gram(z.to(where), None, backend=backend)
    count = z.numel() // c_in
    got_state, projected = ops.one_pass_statistics(
        on_device[0], Gram(pivot, total, matrix), count, Norm(*on_device[1:], *running, 0.1, 1e-5), backend=backend
    )
    out = F.conv2d(centred, on_device[0]) * got_state[2].view(1, -1, 1, 1) + got_state[3].view(1, -1, 1, 1)

    leaves = [t.double().requires_grad_() for t in (z, conv_weight, weight, bias)]
    want_mean, want_var = torch.zeros(c_out).double(), torch.ones(c_out).double()
    want = F.batch_norm(F.conv2d(leaves[0], leaves[1]), want_mean, want_var, leaves[2], leaves[3], True, 0.1, 1e-5)
    exact = 1e-6 if mean == 1e4 else 1e-11  # the oracle, not centred, itself loses a factor of (mean / std)²
    tolerance = exact if dtype == torch.float64 else 5e-5

    def close(name, a, b, scale=1.0):
        error = ((a.double().cpu() - b).abs().max() / b.abs().max()).item()
        assert error < tolerance * scale, f"{name}: relative error {error:.2e}"

    close("out", out, want.detach())
    close("running_mean", running[0], want_mean)
    close("running_var", running[1], want_var)
    assert int(running[2]) == 1

    d = activation(tuple(want.shape), dtype, 5)
    want.backward(d.double())
    grad_z, grad_conv, grad_weight = ops.one_pass_backward(
        d.to(where),
        d.sum((0, 2, 3)).to(where),
        centred,
        on_device[0],
        GramState(got_state, projected, total),
        backend=backend,
    )
    for name, got, leaf in zip(("z", "conv", "weight"), (grad_z, grad_conv, grad_weight), leaves, strict=False):
        close(f"grad_{name}", got, leaf.grad, 10.0)
    gram_state = GramState(got_state, projected, total)
    empty, *others = ops.one_pass_backward(
        d.to(where), d.sum((0, 2, 3)).to(where), centred, on_device[0], gram_state, False, backend=backend
    )
    assert empty.numel() == 0
    for name, got, leaf in zip(("conv", "weight"), others, leaves[1:], strict=False):
        close(f"grad_{name} alone", got, leaf.grad, 10.0)


def test_errors():
    x = activation((2, 4, 3, 3), torch.float32)
    with pytest.raises(ValueError, match=r"gram: x must have shape .* and not be empty"):
        ops.gram(x[:0], None, backend="cpu")
    _, pivot, total, matrix = ops.gram(x, None, backend="cpu")
    with pytest.raises(ValueError, match="one_pass_statistics: gram must have shape"):
        ops.one_pass_statistics(
            torch.ones(8, 4, 1, 1),
            Gram(pivot, total, matrix[:2]),
            18,
            Norm(None, None, None, None, None, 0.1, 1e-5),
            backend="cpu",
        )

"""The fused stem of a ResNet against torchvision's: numbers, gradients, layouts, what is saved, and autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from eager import trust
from fusion import FORMATS, expect_paths, label
from reference import run, stem_oracle
from stems import DTYPES, FUSED, NCHW, NHWC, Listing, off_the_interpreter, stem, twin_of
from tolerance import HALF, check
from torch import Tensor, nn

import fusedres
from fusedres.autograd import path_counts


@pytest.mark.parametrize("size", [(15, 18), (9, 2), (1, 1), (4, 30)])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_outputs_gradients_and_statistics(
    dtype: torch.dtype, memory_format: torch.memory_format, mode: str, size: tuple[int, int]
) -> None:
    model, x, grad = stem(dtype, memory_format, mode, size)
    eager = run(copy.deepcopy(model), x, grad)
    with expect_paths(**FUSED):
        got = run(twin_of(model), x, grad)
    check(got, eager, stem_oracle(model, x, grad), dtype, f"{mode} {size}")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_backends(backend: str, mode: str) -> None:
    off_the_interpreter(backend)
    model, x, grad = stem(torch.float32, NHWC, mode)
    eager = run(copy.deepcopy(model), x, grad)
    with fusedres.use_backend(backend), expect_paths(**FUSED):
        got = run(twin_of(model), x, grad)
    check(got, eager, stem_oracle(model, x, grad), torch.float32, backend)


@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast(dtype: torch.dtype, mode: str) -> None:
    """With float32 parameters and float32 or half images, the output and every gradient have eager's dtypes."""
    model, x, grad = stem(torch.float32, NHWC, mode)
    for entered in (x, x.to(dtype)):
        trust(model, entered, dtype)
        eager = run(copy.deepcopy(model), entered, grad, autocast=dtype)
        with expect_paths(**FUSED):
            got = run(twin_of(model), entered, grad, autocast=dtype)
        check(got, eager, stem_oracle(model, entered, grad), dtype, f"{mode}, input {entered.dtype}")


@pytest.mark.parametrize(
    "norm",
    [{"momentum": None}, {"momentum": 0.7}, {"eps": 0.1}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_options(norm: dict[str, object], mode: str) -> None:
    model, x, grad = stem(torch.float64, NHWC, mode, **norm)
    twin = twin_of(model)
    for _ in range(2):
        eager, got = run(model, x, grad), run(twin, x, grad)
        assert got.keys() == eager.keys()
        for name, value in eager.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("wanted", [(), ("x",), ("conv1",), ("bn1",), ("x", "bn1"), ("conv1", "bn1")], ids=str)
def test_only_wanted_gradients_are_made(wanted: tuple[str, ...]) -> None:
    model, x, grad = stem(torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in wanted)
    twin = twin_of(model)
    grads = []
    for each in (model, twin):
        leaf = x.clone().requires_grad_("x" in wanted)
        out = each(leaf)
        assert out.requires_grad == bool(wanted)
        if wanted:
            out.backward(grad)
        grads.append({"x": leaf.grad} | {name: p.grad for name, p in each.named_parameters()})
    for name, value in grads[0].items():
        assert (grads[1][name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(grads[1][name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_images_without_gradient_cost_no_dgrad_and_nothing_pointwise_runs() -> None:
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model)
    with Listing() as listing:
        twin(x).backward(grad)
    assert listing.masks == [[False, True, False]]
    ours = {name for name in listing.ran if name.startswith("fusedres::")}
    assert ours == {"fusedres::bn_statistics", "fusedres::bn_relu_maxpool", "fusedres::bn_relu_maxpool_backward_"}
    assert not any(
        word in name for name in listing.ran for word in ("batch_norm", "aten::relu", "threshold", "max_pool")
    )


def test_saved_bytes_against_eager() -> None:
    """Eager saves y, its ReLU and 64-bit indices: 2.5 times y. Fused saves y and one byte per pooled element: 1.1."""
    model, x, _ = stem(memory_format=NHWC, size=(64, 64), channels=(3, 64))

    def saved(each: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            each(x)
        return sum(sizes.values())

    assert saved(twin_of(model)) < 0.5 * saved(model)


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
def test_layouts_are_torchs(memory_format: torch.memory_format, weight_format: torch.memory_format) -> None:
    """The output is NCHW if images and weight are; the gradient of the images has their layout."""
    model, x, _ = stem()
    model.to(memory_format=weight_format)
    twin, seen = twin_of(model), []
    twin.layer1.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    x = x.to(memory_format=memory_format).requires_grad_()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            out = twin(x)
        expected = NCHW if memory_format == weight_format == NCHW else NHWC
        assert seen.pop().is_contiguous(memory_format=expected)
        if out.requires_grad:
            out.sum().backward()
            assert x.grad.is_contiguous(memory_format=memory_format)


# --- autograd


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
def test_gradcheck(mode: str, memory_format: torch.memory_format) -> None:
    model, x, _ = stem(torch.float64, memory_format, mode, (7, 9), (2, 3))
    x = (x + 0.3 * torch.randn_like(x)).requires_grad_()  # avoids ties, where no derivative exists
    twin = twin_of(model)
    parameters = list(twin.parameters())
    with torch.no_grad():
        parameters[0].add_(0.1 * torch.randn_like(parameters[0]))
    before = path_counts.copy()
    assert torch.autograd.gradcheck(lambda x, *_: twin(x), (x, *parameters))
    assert path_counts["stem_backward"] > before["stem_backward"]
    assert path_counts["stem_composite_backward"] == before["stem_composite_backward"]
    assert torch.autograd.gradgradcheck(lambda x, *_: twin(x), (x, *parameters), fast_mode=True)
    assert path_counts["stem_composite_backward"] > before["stem_composite_backward"]
    assert path_counts["stem_unfused"] == before["stem_unfused"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_create_graph_and_batched_gradients_change_nothing(mode: str) -> None:
    model, x, grad = stem(torch.float64, NHWC, mode)
    twin = twin_of(model)
    leaves = (x.requires_grad_(), *twin.parameters())
    statistics = {name: buffer.clone() for name, buffer in run_buffers(copy.deepcopy(twin), x)}
    out = twin(x)
    with expect_paths(stem_composite_backward=1):
        second = torch.autograd.grad(out, leaves, grad, create_graph=True)
    with expect_paths(stem_composite_backward=1):
        batched = torch.autograd.grad(
            out, leaves, torch.stack([grad, 2 * grad]), is_grads_batched=True, retain_graph=True
        )
    with expect_paths(stem_backward=2):
        kept = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        last = torch.autograd.grad(out, leaves, grad)
    for a, b, c, d in zip(second, batched, kept, last, strict=True):
        assert a.requires_grad and torch.equal(c, d)
        torch.testing.assert_close(a.detach(), c, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b[1], 2 * c, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in twin.named_buffers())


def run_buffers(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    model(x)
    return list(model.named_buffers())


def test_the_gradient_that_comes_in_is_left_as_it_is() -> None:
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model)
    out = twin(x)
    kept, result = grad.clone(), out.detach().clone()
    out.backward(grad)
    assert torch.equal(grad, kept) and torch.equal(out, result)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_whole(mode: str) -> None:
    model, x, grad = stem(memory_format=NHWC, mode=mode)
    eager = run(copy.deepcopy(model), x, grad)
    twin = twin_of(model)
    got = run(torch.compile(twin, fullgraph=True, backend="aot_eager"), x, grad)
    got = {name.replace("_orig_mod.", ""): value for name, value in got.items()}
    check(got, eager, stem_oracle(model, x, grad), torch.float32, mode)
    torch.compiler.reset()


def test_launches_of_a_training_step() -> None:
    """On meta tensors Triton's launches are recorded: after the statistics one in forward, and three in backward."""
    from fusedres.kernels.triton_core.launch import record_launches

    model, x, _ = stem(memory_format=NHWC)
    twin, x = twin_of(model).to("meta"), x.to("meta")
    with fusedres.use_backend("triton"), record_launches() as launches:
        out = twin(x)
        out.backward(torch.empty_like(out))
    launches = [launch for launch in launches if "maxpool" in launch.name or "backward" in launch.name]
    assert [launch.name for launch in launches] == [
        "bn_relu_maxpool_kernel",
        "bn_relu_maxpool_reduce_kernel",
        "bn_backward_coefficients_kernel",
        "bn_relu_maxpool_apply_kernel",
    ]
    y, pooled = 4 * 19 * 8 * 9, 4 * 19 * 4 * 5  # elements of 4 bytes; the place of a maximum takes 1 byte
    forward, reduce, _, apply = (launch.bytes() for launch in launches)
    assert 0 <= forward - (4 * y + 5 * pooled) < 1000
    assert 0 <= reduce - (4 * y + 5 * pooled) < 1000
    assert 0 <= apply - (8 * y + 5 * pooled) < 1000

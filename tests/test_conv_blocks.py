"""Blocks with this package's own convolutions (fuse(conv="fused")) against torchvision, by the rule of tolerance.py.

The order of the passes is tested with the reference kernels, which are fast, in every case. The Triton kernels run the
same comparison in fewer, smaller cases: on a GPU, or in Triton's interpreter if there is no GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from eager import trust
from fusion import MEMORY, expect_paths, fused_twin, label, stock_case
from op_inputs import device
from reference import run
from shapes import CHANNELS, CORE, SIZES, STRIDE_ONE, Case, case, modes
from test_blocks import prepared
from test_gradcheck import TINY, function_of
from tolerance import check

import fusedres
from fusedres import backends
from fusedres.dispatch import Directions
from fusedres.modules import choice
from fusedres.modules.fused_block import plan_of

# Small enough for the interpreter, which takes milliseconds per tile.
SMALL = tuple(
    case(block, shortcut, planes=8, batch=2, height=5, width=6)
    for block in ("basic", "bottleneck")
    for shortcut in ("identity", "projection", "zeropad")
)


@pytest.fixture(autouse=True)
def _one_pass_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks one-pass with memory="min" at any size; blocks as small as these would not be."""
    monkeypatch.setattr(choice, "_MIN_ROWS_A_CHANNEL", 1)


def compare(
    block_case: Case,
    dtype: torch.dtype,
    mode: str,
    memory: str,
    backend: str = "reference",
    memory_format: torch.memory_format = torch.channels_last,
    conv: str = "fused",
) -> None:
    block, x, grad, eager, truth = prepared(block_case, dtype, memory_format, mode)
    where = device(backend, dtype)
    twin = fused_twin(block, memory, conv).to(where)
    with fusedres.use_backend(backend), expect_paths(fused_forward=1, fused_backward=1):
        got = run(twin, x.to(where), grad.to(where))
    got = {name: value.cpu() for name, value in got.items()}
    if not x.is_contiguous(memory_format=torch.contiguous_format):
        assert got["out"].is_contiguous(memory_format=memory_format), f"strides {got['out'].stride()}"
    check(got, eager, truth, dtype, f"{block_case} {mode} {memory} {backend}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=label)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("block_case", CORE, ids=label)
def test_every_shortcut(block_case: Case, mode: str, dtype: torch.dtype, memory: str) -> None:
    compare(block_case, dtype, mode, memory)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    ("block_case", "mode"), [(c, mode) for c in CORE for mode in modes(c) if ":" in mode], ids=label
)
def test_each_batch_norm_frozen_alone(block_case: Case, mode: str, memory: str) -> None:
    compare(block_case, torch.float64, mode, memory)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("block_case", STRIDE_ONE + SIZES[::2] + CHANNELS, ids=label)
def test_sizes_and_channels(block_case: Case, mode: str, memory: str) -> None:
    compare(block_case, torch.float32, mode, memory, memory_format=torch.contiguous_format)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("own", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("block_case", CORE, ids=label)
def test_any_product_may_be_the_librarys(
    block_case: Case, own: tuple[bool, bool, bool], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_OWN", Directions(*own))
    for mode in ("train", "eval"):
        compare(block_case, torch.float32, mode, memory)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("block_case", CORE, ids=label)
def test_any_set_of_wanted_gradients(block_case: Case, memory: str, mode: str) -> None:
    """One parameter alone is frozen, or one alone gets a gradient, or only the input does."""
    block, x, grad, eager, truth = prepared(block_case, torch.float32, torch.channels_last, mode)
    names = [name for name, _ in block.named_parameters()]
    everything = set(names)
    for wanted in [everything - {name} for name in names] + [{name} for name in names] + [set()]:
        for needs_x in (True, False):
            if not (wanted or needs_x):
                continue
            twin = fused_twin(block, memory, "fused")
            for name, parameter in twin.named_parameters():
                parameter.requires_grad_(name in wanted)
            with fusedres.use_backend("reference"):
                leaf = x.detach().clone().requires_grad_(needs_x)
                twin(leaf).backward(grad)
            assert (leaf.grad is None) is not needs_x
            got = {f"grad.{name}": p.grad for name, p in twin.named_parameters() if p.grad is not None}
            assert got.keys() == {f"grad.{name}" for name in wanted}
            if leaf.grad is not None:
                got["grad_x"] = leaf.grad
            check(got, {name: eager[name] for name in got}, truth, torch.float32, f"{block_case}, {sorted(wanted)}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("block_case", CORE, ids=label)
def test_without_gradients(block_case: Case, mode: str, memory: str) -> None:
    block, x, _, eager, truth = prepared(block_case, torch.float32, torch.channels_last, mode)
    expected = {name: value for name, value in eager.items() if name == "out" or name.startswith("stats.")}
    twin = fused_twin(block, memory, "fused")
    with fusedres.use_backend("reference"), torch.no_grad(), expect_paths(fused_forward=1):
        out = twin(x)
    got = {"out": out} | {f"stats.{name}": buffer for name, buffer in twin.named_buffers()}
    check(got, expected, truth, torch.float32, f"{block_case} {mode}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=label)
@pytest.mark.parametrize("block_case", CORE, ids=label)
def test_autocast(block_case: Case, dtype: torch.dtype, memory: str) -> None:
    """With float32 input and parameters, products are in the autocast dtype and gradients in float32."""
    block, x, grad = stock_case(block_case, torch.float32, torch.channels_last)
    trust(block, x, dtype)
    results = []
    for model in (block, fused_twin(block, memory, "fused")):
        leaf = x.detach().clone().requires_grad_()
        with fusedres.use_backend("reference"), torch.autocast("cpu", dtype):
            out = model(leaf)
        out.backward(grad.to(out.dtype))
        assert leaf.grad is not None
        results.append({"out": out, "x": leaf.grad} | {name: p.grad for name, p in model.named_parameters()})
    for name, want in results[0].items():
        got = results[1][name]
        assert got.dtype == want.dtype or name == "out", name
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.02), f"{name}: {error:.3g}"


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("block_case", TINY, ids=label)
def test_gradcheck(block_case: Case, mode: str, memory: str) -> None:
    block, x, _ = stock_case(block_case, torch.float64, torch.channels_last, mode)
    function, leaves = function_of(fused_twin(block, memory, "fused"))
    with fusedres.use_backend("reference"):
        assert torch.autograd.gradcheck(function, (x.requires_grad_(), *leaves))


@pytest.mark.parametrize(("backend", "conv"), [("reference", "fused"), ("reference", "library"), ("cpu", "library")])
@pytest.mark.parametrize("memory", MEMORY)
def test_a_last_convolution_with_a_stride(memory: str, backend: str, conv: str) -> None:
    block, x, grad = stock_case(case("bottleneck", "projection", stride=2, height=9, width=8), torch.float64)
    block.conv2.stride, block.conv3.stride = (1, 1), (2, 2)
    twin = fused_twin(block, memory, conv)
    with fusedres.use_backend(backend), expect_paths(fused_forward=1, fused_backward=1):
        got = run(twin, x, grad)
    torch.testing.assert_close(got, run(block, x, grad))


@pytest.mark.parametrize("block_case", CORE, ids=label)
def test_a_retained_graph_gives_the_same_gradients_twice(block_case: Case) -> None:
    block, x, grad = stock_case(block_case, torch.float32, torch.channels_last)
    twin = fused_twin(block, conv="fused")
    leaves = [x.requires_grad_(), *twin.parameters()]
    with fusedres.use_backend("reference"):
        out = twin(x)
        first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_grouped_convolutions_stay_the_librarys() -> None:
    block = fusedres.FusedBottleneck(32, 8, groups=4, base_width=64)
    block.fused_conv = "fused"
    with fusedres.use_backend("reference"):
        plan, _ = plan_of(block, torch.randn(2, 32, 5, 5), "reference")
    assert [any(unit.own) for unit in plan.units] == [True, False, True]


def test_the_cpu_backend_keeps_the_librarys() -> None:
    block = fusedres.FusedBasicBlock(8, 8)
    block.fused_conv = "fused"
    plan, _ = plan_of(block, torch.randn(2, 8, 5, 5), "cpu")
    assert not plan.own_convolutions


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("conv", ["fused", "library"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("block_case", SMALL, ids=label)
def test_triton(block_case: Case, mode: str, conv: str, memory: str) -> None:
    compare(block_case, torch.float32, mode, memory, "triton", conv=conv)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("block_case", SMALL, ids=label)
def test_triton_in_other_dtypes(block_case: Case, dtype: torch.dtype) -> None:
    compare(block_case, dtype, "train", "min", "triton")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("block_case", SMALL, ids=label)
def test_triton_without_gradients(block_case: Case, mode: str) -> None:
    block, x, _, eager, truth = prepared(block_case, torch.float32, torch.channels_last, mode)
    expected = {name: value for name, value in eager.items() if name == "out" or name.startswith("stats.")}
    where = device("triton")
    twin = fused_twin(block, conv="fused").to(where)
    with fusedres.use_backend("triton"), torch.no_grad(), expect_paths(fused_forward=1):
        out = twin(x.to(where)).cpu()
    got = {"out": out} | {f"stats.{name}": buffer.cpu() for name, buffer in twin.named_buffers()}
    check(got, expected, truth, torch.float32, f"{block_case} {mode}")


@pytest.mark.parametrize(
    ("block_case", "memory"),
    [(c, memory) for c, memory in zip(TINY, ("auto", "min", "", "min", "auto", ""), strict=True) if memory],
    ids=label,
)
def test_triton_gradcheck(block_case: Case, memory: str) -> None:
    block, x, _ = stock_case(block_case, torch.float64, torch.channels_last)
    where = device("triton")
    function, leaves = function_of(fused_twin(block, memory, "fused").to(where))
    with fusedres.use_backend("triton"):
        assert torch.autograd.gradcheck(function, (x.to(where).requires_grad_(), *leaves), fast_mode=True)


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._DEVICES, "triton", ("cuda", "meta"))
    block = fusedres.FusedBasicBlock(8, 8)
    with (
        fusedres.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"triton backend serves cuda.*TRITON_INTERPRET"),
    ):
        block(torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("block_case", SMALL, ids=label)
def test_cuda(block_case: Case, mode: str, dtype: torch.dtype) -> None:
    """Memory-bound passes run in CUDA, convolutions in the library; ops without a CUDA kernel use Triton's."""
    compare(block_case, dtype, mode, "auto", "cuda", conv="library")

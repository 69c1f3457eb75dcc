"""The shortcut's gradient: the term of dL/dx that passes no weight, which makes deep networks trainable.

dL/dx = S'(x)ᵀd + F'(x)ᵀd with d = dL/dout where NOT (out <= 0), else 0 (He et al. 2016, section 2).
"""

from __future__ import annotations

import copy

import pytest
import torch
from fusion import BACKENDS, FORMATS, MEMORY, expect_paths, fused_twin, label, stock_case
from reference import build, oracle, run, separate
from shapes import CORE, STRIDE_ONE, Case, case
from tolerance import UNIT, check_tensor
from torch import Tensor, nn

import fusedres

UNWEIGHTED = tuple(c for c in CORE + STRIDE_ONE if c.shortcut != "projection")


def masked(grad: Tensor, out: Tensor) -> Tensor:
    return torch.where(out <= 0, 0, grad)


def through_shortcut(block: nn.Module, x: Tensor, d: Tensor) -> Tensor:
    """Return S'(x)ᵀd by autograd, with batch or running statistics as in the block's mode."""
    if block.downsample is None:
        return d
    shortcut = copy.deepcopy(block.downsample)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return torch.autograd.grad(shortcut(x), x, d)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", UNWEIGHTED, ids=label)
def test_a_silent_branch_leaves_exactly_the_masked_gradient(
    case: Case, mode: str, dtype: torch.dtype, memory_format: torch.memory_format, memory: str, backend: str
) -> None:
    """If the last BatchNorm's weight is 0, out = relu(bias + S(x)) and dL/dx equals S'(x)ᵀd bit by bit."""
    block, x, grad = stock_case(case, dtype, memory_format, mode)
    nn.init.zeros_(block.get_submodule(case.last_norm).weight)
    twin = fused_twin(block, memory)
    with fusedres.use_backend(backend), expect_paths(fused_forward=1, fused_backward=1):
        got = run(twin, x, grad)
    bias = block.get_submodule(case.last_norm).bias.view(1, -1, 1, 1)
    shortcut = x if block.downsample is None else block.downsample(x)
    assert torch.equal(got["out"], torch.relu(bias + shortcut))
    assert torch.equal(got["grad_x"], through_shortcut(block, x, masked(grad, got["out"])))
    for name, value in got.items():
        if name.startswith("grad.") and name.split(".")[1] != case.last_norm:
            assert not value.any(), f"{name} must be zero because the branch does not reach the output"


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=label)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_the_parts_add_up_to_the_whole(case: Case, mode: str, dtype: torch.dtype, memory: str) -> None:
    """Fused dL/dx minus the shortcut part of the oracle is its branch part, and the reverse."""
    block, x, grad = stock_case(case, dtype, torch.channels_last, mode)
    truth = oracle(block, x, grad, UNIT[dtype])
    exact = copy.deepcopy(block).double()
    d = masked(grad.double(), truth.values["out"])
    shortcut = through_shortcut(exact, x.double(), d)
    branch = truth.values["grad_x"] - shortcut
    eager = run(copy.deepcopy(block), x, grad)["grad_x"].double()
    whole = run(fused_twin(block, memory), x, grad)["grad_x"].double()
    terms, spread = truth.terms["grad_x"], truth.spread["grad_x"]
    check_tensor("branch part", whole - shortcut, eager - shortcut, branch, terms, spread, dtype=dtype)
    check_tensor("shortcut part", whole - branch, eager - branch, shortcut, terms, spread, dtype=dtype)
    assert shortcut.norm() > 0.1 * branch.norm()
    assert branch.norm() > 0.01 * shortcut.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_nan_and_inf_in_the_input_go_where_torch_takes_them(case: Case, mode: str, value: float, backend: str) -> None:
    """Output, gradients and statistics have NaN at the same places and infinities with the same signs as torch."""
    block, x, grad = stock_case(case, torch.float32, torch.channels_last, mode)
    x[1, 0, 2, 2] = value
    twins = {memory: fused_twin(block, memory) for memory in MEMORY}
    eager = run(block, x, grad)
    assert eager["out"].isnan().any() or eager["out"].isinf().any()
    for memory, twin in twins.items():
        with fusedres.use_backend(backend):
            got = run(twin, x, grad)
            if mode == "eval":
                with torch.no_grad():
                    same_places("out without gradients", twin(x), eager["out"])
        for name, expected in eager.items():
            same_places(f"{name}, memory={memory}", got[name], expected)


def same_places(name: str, got: Tensor, expected: Tensor) -> None:
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differ = kind(got) != kind(expected)
        assert not differ.any(), f"{name}: {kind.__name__} differs at {differ.nonzero()[:3].tolist()}"


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("case", [c for c in CORE if c.shortcut == "identity"], ids=label)
def test_nan_passes_the_backward_of_relu(case: Case, memory_format: torch.memory_format, memory: str) -> None:
    """Where the output is NaN its gradient passes, as in torch: d is zero only where out <= 0 is true.

    The last BatchNorm's weight is 0 and its bias is NaN in one channel, so that dL/dx is d itself.
    """
    block, x, grad = stock_case(case, torch.float32, memory_format, "eval")
    norm = block.get_submodule(case.last_norm)
    nn.init.zeros_(norm.weight)
    with torch.no_grad():
        norm.bias[3] = torch.nan
    twin = fused_twin(block, memory)
    eager, got = run(block, x, grad), run(twin, x, grad)
    assert got["out"][:, 3].isnan().all()
    assert torch.equal(got["grad_x"][:, 3], grad[:, 3])
    assert torch.equal(got["grad_x"], eager["grad_x"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_nan_and_inf_in_the_gradient_go_where_torch_takes_them(case: Case, value: float) -> None:
    for mode in ("train", "eval"):
        block, x, grad = stock_case(case, torch.float32, torch.channels_last, mode)
        out = block(x)
        place = (out > 0).nonzero()[0].tolist()
        grad[tuple(place)] = value
        masked_place = (out == 0).nonzero()[5].tolist()
        if masked_place[1] != place[1]:
            grad[tuple(masked_place)] = value
        twin = fused_twin(block)
        eager, got = run(block, x, grad), run(twin, x, grad)
        for name, expected in eager.items():
            same_places(f"{name} in {mode}", got[name], expected)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=label)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_fifty_blocks_keep_the_gradient_norm(block: str, dtype: torch.dtype, memory: str) -> None:
    """The gradient norm after a chain of 50 fused identity blocks equals that of the unfused chain."""
    link = case(block, "identity", 8 if block == "basic" else 4, batch=3, height=4, width=4)
    chain = nn.Sequential(*(build(Case(**{**vars(link), "seed": seed})) for seed in range(50)))
    for child in chain.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.ones_(child.weight)
    for unit in chain:
        nn.init.constant_(unit.get_submodule(link.last_norm).weight, 0.25)  # branch smaller than its shortcut
    chain.to(dtype)
    x = torch.randn(3, link.in_channels, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    separate(chain, x)
    grad = torch.randn(3, link.out_channels, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact = run(copy.deepcopy(chain).double(), x.double(), grad.double())["grad_x"]
    twin = fused_twin(chain, memory)
    eager = run(chain, x, grad)["grad_x"]
    with expect_paths(fused_forward=50, fused_backward=50):
        got = run(twin, x, grad)["grad_x"]
    floor = 50 * 64 * UNIT[dtype] * exact.norm()  # 64 unit roundoffs per block
    assert (got - exact).norm() <= 2 * (eager - exact).norm() + floor
    assert abs(got.norm() - exact.norm()) <= 2 * abs(eager.norm() - exact.norm()) + floor
    assert 0.1 < got.norm() / grad.norm() < 100

"""gradcheck and gradgradcheck in float64 of the code that users run, and which path runs in which case.

gradgradcheck differentiates the composite path, which a backward under create_graph uses; it would pass even if the
fused backward was wrong. So gradients with create_graph=True are also compared with those without, for each path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fusion import BACKENDS, FORMATS, MEMORY, expect_paths, fused_twin, label, stock_case
from reference import oracle, run
from shapes import CORE, Case, modes
from tolerance import UNIT, check
from torch import Tensor, nn

import fusedres
from fusedres.autograd import path_counts

# So few values that a whole Jacobian is fast, but enough that every BatchNorm is well-posed.
TINY = tuple(
    replace(
        case,
        planes=2 if case.block == "basic" else 1,
        in_channels={"identity": 2, "projection": 3, "zeropad": 1}[case.shortcut]
        if case.block == "basic"
        else {"identity": 4, "projection": 3, "zeropad": 3}[case.shortcut],
        batch=2,
        height=4,
        width=3,
    )
    for case in CORE
)


def function_of(block: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return the block as a function of x and its parameters, which gradcheck changes in place."""
    parameters: list[Tensor] = list(block.parameters())
    return lambda x, *_: block(x), parameters


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", TINY, ids=label)
def test_gradcheck(case: Case, mode: str, memory: str) -> None:
    block, x, _ = stock_case(case, torch.float64, torch.channels_last, mode)
    function, parameters = function_of(fused_twin(block, memory))
    before = path_counts.copy()
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters))
    assert path_counts["fused_backward"] > before["fused_backward"]
    assert path_counts["composite_backward"] == before["composite_backward"]
    assert path_counts["unfused"] == before["unfused"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "mode"), [(case, mode) for case in TINY for mode in modes(case) if ":" in mode], ids=label
)
def test_gradcheck_with_one_batch_norm_frozen(case: Case, mode: str, backend: str) -> None:
    block, x, _ = stock_case(case, torch.float64, torch.contiguous_format, mode)
    function, parameters = function_of(fused_twin(block, "min"))
    with fusedres.use_backend(backend):
        assert torch.autograd.gradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", TINY, ids=label)
def test_gradgradcheck(case: Case, mode: str, memory: str) -> None:
    block, x, _ = stock_case(case, torch.float64, torch.channels_last, mode)
    function, parameters = function_of(fused_twin(block, memory))
    before = path_counts.copy()
    assert torch.autograd.gradgradcheck(function, (x.requires_grad_(), *parameters), fast_mode=True)
    assert path_counts["composite_backward"] > before["composite_backward"]
    assert path_counts["unfused"] == before["unfused"]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=label)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_create_graph_changes_no_gradient(
    case: Case, mode: str, dtype: torch.dtype, memory_format: torch.memory_format, memory: str
) -> None:
    """Both ways keep the rule, and each batch updates the running statistics once."""
    block, x, grad = stock_case(case, dtype, memory_format, mode)
    truth = oracle(block, x, grad, UNIT[dtype])
    with_graph, without = fused_twin(block, memory), fused_twin(block, memory)
    eager = run(block, x, grad)
    with expect_paths(fused_forward=1, composite_backward=1):
        got = gradients(with_graph, x, grad, create_graph=True)
    check(got, eager, truth, dtype, f"{case} {mode}, create_graph")
    with expect_paths(fused_forward=1, fused_backward=1):
        got = gradients(without, x, grad, create_graph=False)
    check(got, eager, truth, dtype, f"{case} {mode}, no graph")


def gradients(block: nn.Module, x: Tensor, grad: Tensor, create_graph: bool) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    names = [name for name, _ in block.named_parameters()]
    out = block(x)
    values = torch.autograd.grad(out, (x, *block.parameters()), grad, create_graph=create_graph)
    assert all(value.requires_grad == create_graph for value in values)
    named = dict(zip(["grad_x", *(f"grad.{name}" for name in names)], (v.detach() for v in values), strict=True))
    return {"out": out.detach()} | named | {f"stats.{name}": buffer.clone() for name, buffer in block.named_buffers()}


@pytest.mark.parametrize("case", CORE, ids=label)
def test_a_gradient_penalty_trains_as_stock(case: Case) -> None:
    """The loss contains the norm of a gradient; the parameters get the stock block's gradients."""
    block, x, grad = stock_case(case, torch.float64, torch.channels_last)
    twin = fused_twin(block)
    for model in (block, twin):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = model(leaf)
        (slope,) = torch.autograd.grad(out, leaf, grad, create_graph=True)
        (out.square().mean() + slope.square().mean()).backward()
    for (name, mine), theirs in zip(twin.named_parameters(), block.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9 * scale.item(), msg=name)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_retain_graph_gives_the_same_gradients_twice(mode: str) -> None:
    for case in CORE:
        block, x, grad = stock_case(case, torch.float32, torch.channels_last, mode)
        twin = fused_twin(block)
        x = x.requires_grad_()
        out = twin(x)
        leaves = (x, *twin.parameters())
        first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        second = torch.autograd.grad(out, leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("case", [case for case in TINY if case.shortcut == "identity"], ids=label)
def test_a_block_that_runs_twice_has_the_same_gradients_with_create_graph(case: Case) -> None:
    """The second input depends on the weights; their gradients must not count that twice."""
    block, x, grad = stock_case(case, torch.float64)
    twin = fused_twin(block)
    tensors = (x.requires_grad_(), *twin.parameters())
    expected = torch.autograd.grad(block(block(x)), (x, *block.parameters()), grad)
    for create_graph in (False, True):
        found = torch.autograd.grad(twin(twin(x)), tensors, grad, create_graph=create_graph)
        for got, other in zip(found, expected, strict=True):
            torch.testing.assert_close(got.detach(), other, rtol=1e-9, atol=1e-9)

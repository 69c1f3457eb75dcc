"""Mixed precision: autocast with float32 parameters, BatchNorm in float32 or half, and whole blocks in half."""

from __future__ import annotations

import copy

import pytest
import torch
from eager import trust
from fusion import BACKENDS, FORMATS, MEMORY, expect_paths, fused_twin, label, stock_case
from reference import Values, oracle, run
from shapes import CORE, Case
from tolerance import HALF, UNIT, check
from torch import nn

import fusedres


def half_norms(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    for child in block.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.to(dtype)
    return block


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_autocast(case: Case, dtype: torch.dtype, mode: str, memory_format: torch.memory_format, memory: str) -> None:
    """With float32 parameters and float32 or half input, the output and every gradient have eager's dtypes."""
    block, x, grad = stock_case(case, memory_format=memory_format, mode=mode)
    for entered in (x, x.to(dtype)):
        trust(block, entered, dtype)
        truth = oracle(block, entered, grad, UNIT[dtype])
        assert truth.at_risk <= 0.02 * truth.activations
        eager = run(copy.deepcopy(block), entered, grad, autocast=dtype)
        with expect_paths(fused_forward=1, fused_backward=1):
            got = run(fused_twin(block, memory), entered, grad, autocast=dtype)
        check(got, eager, truth, dtype, f"{case} {mode}, input {entered.dtype}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_autocast_with_batch_norms_in_half(case: Case, dtype: torch.dtype, mode: str, backend: str) -> None:
    block, x, grad = stock_case(case, memory_format=torch.channels_last, mode=mode)
    half_norms(block, dtype)
    trust(block, x, dtype)
    truth = oracle(block, x, grad, UNIT[dtype])
    eager = run(copy.deepcopy(block), x, grad, autocast=dtype)
    for memory in MEMORY:
        with fusedres.use_backend(backend), expect_paths(fused_forward=1, fused_backward=1):
            got = run(fused_twin(block, memory), x, grad, autocast=dtype)
        check(got, eager, truth, dtype, f"{case} {mode} {memory}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_convolutions_in_half_batch_norms_in_float32(case: Case, dtype: torch.dtype, mode: str, memory: str) -> None:
    """This is `model.bfloat16()` with its BatchNorms kept in float32, without autocast."""
    block, x, grad = stock_case(case, dtype, torch.channels_last, mode)
    half_norms(block, torch.float32)
    truth = oracle(block, x, grad, UNIT[dtype])
    eager = run(copy.deepcopy(block), x, grad)
    got = run(fused_twin(block, memory), x, grad)
    check(got, eager, truth, dtype, f"{case} {mode}")


@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_inference_under_autocast(case: Case, dtype: torch.dtype) -> None:
    block, x, grad = stock_case(case, memory_format=torch.channels_last, mode="eval")
    trust(block, x, dtype)
    truth = oracle(block, x, grad, UNIT[dtype])
    twin = fused_twin(block)
    results: list[Values] = []
    for model in (twin, block):
        with torch.inference_mode(), torch.autocast("cpu", dtype):
            results.append({"out": model(x)})
    check(*results, truth, dtype, str(case))


def test_autocast_leaves_float64_alone() -> None:
    """Neither torch nor a fused block casts float64 tensors under autocast."""
    for case in CORE:
        block, x, grad = stock_case(case, torch.float64)
        truth = oracle(block, x, grad, UNIT[torch.float64])
        eager = run(copy.deepcopy(block), x, grad, autocast=torch.bfloat16)
        got = run(fused_twin(block), x, grad, autocast=torch.bfloat16)
        assert eager["out"].dtype == torch.float64
        check(got, eager, truth, torch.float64, case)


def test_backward_outside_of_autocast_is_backward_inside() -> None:
    """Both are common. The dtypes are those that the forward pass chose."""
    for case in CORE:
        block, x, grad = stock_case(case, memory_format=torch.channels_last)
        trust(block, x, torch.bfloat16)
        gradients = []
        for inside in (False, True):
            twin = fused_twin(block)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = twin(leaf)
                if inside:
                    out.backward(grad.to(out.dtype))
            if not inside:
                out.backward(grad.to(out.dtype))
            gradients.append([leaf.grad, *(p.grad for p in twin.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), case


@pytest.mark.parametrize(("backend", "conv"), [("cpu", "library"), ("reference", "library"), ("reference", "fused")])
@pytest.mark.parametrize("case", [case for case in CORE if case.shortcut == "projection"], ids=label)
def test_the_gradients_of_a_projection_block_are_added_in_half(case: Case, backend: str, conv: str) -> None:
    """In x's dtype, both terms and their sum would be held twice as wide."""
    block, x, grad = stock_case(case, memory_format=torch.channels_last)
    with fusedres.use_backend(backend):
        got = run(fused_twin(block, conv=conv), x, grad, autocast=torch.bfloat16)["grad_x"]
    assert got.dtype == torch.float32 and torch.equal(got, got.bfloat16().float())


@pytest.mark.parametrize("dtype", HALF, ids=label)
def test_a_training_loop_under_autocast_with_a_gradient_scaler(dtype: torch.dtype) -> None:
    """Loss scaling and unscaling find finite gradients, and the loss falls as much as eager's."""
    case = CORE[1]
    block, x, grad = stock_case(case, memory_format=torch.channels_last)
    trust(block, x, dtype)
    losses = {}
    for name, model in (("stock", block), ("fused", fused_twin(block))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        history = []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = (model(x).float() - grad.abs()).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(loss.item())
        losses[name] = history
    assert losses["fused"][-1] < losses["fused"][0]
    torch.testing.assert_close(torch.tensor(losses["fused"]), torch.tensor(losses["stock"]), rtol=0.02, atol=0)

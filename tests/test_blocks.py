"""Fused blocks against torchvision: output, gradients, running statistics and counters, by the rule of tolerance.py.

The oracle and eager are computed once for each case, dtype, memory format and mode; memory modes and backends share
them.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from eager import trust_all
from fusion import BACKENDS, FORMATS, MEMORY, expect_paths, fused_twin, label, made_by, stock_case
from reference import Oracle, Values, oracle, run
from shapes import BATCHES, CHANNELS, CORE, SIZES, STRIDE_ONE, Case, modes
from tolerance import HALF, UNIT, check
from torch import Tensor, nn

import fusedres

Prepared = tuple[nn.Module, Tensor, Tensor, Values, Oracle]


def prepared(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, mode: str) -> Prepared:
    """Return stock block, input, output gradient, eager's results and the oracle; torch's convolutions are sound."""
    trust_all(made_by(case, dtype, memory_format))
    return _prepared(case, dtype, memory_format, mode)


@cache
def _prepared(case: Case, dtype: torch.dtype, memory_format: torch.memory_format, mode: str) -> Prepared:
    block, x, grad = stock_case(case, dtype, memory_format, mode)
    truth = oracle(block, x, grad, UNIT[dtype])
    if dtype in HALF and truth.unsure is not None:  # the output gradient is zero where rounding decides the mask
        grad = grad.masked_fill(truth.unsure, 0)
        truth = oracle(block, x, grad, UNIT[dtype])
    allowed = 0.02 * truth.activations if dtype in HALF else 0
    assert truth.at_risk <= allowed, f"{truth.at_risk} of {truth.activations} ReLU masks are up to rounding"
    return block, x, grad, run(copy.deepcopy(block), x, grad), truth


def compare(
    case: Case, dtype: torch.dtype, memory_format: torch.memory_format, mode: str, memory: str, backend: str
) -> None:
    block, x, grad, eager, truth = prepared(case, dtype, memory_format, mode)
    twin = fused_twin(block, memory)
    with fusedres.use_backend(backend), expect_paths(fused_forward=1, fused_backward=1):
        got = run(twin, x, grad)
    assert got["out"].stride() == eager["out"].stride(), f"strides {got['out'].stride()}, eager {eager['out'].stride()}"
    check(got, eager, truth, dtype, f"{case} {mode}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=label)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_every_shortcut(
    case: Case, mode: str, dtype: torch.dtype, memory_format: torch.memory_format, memory: str, backend: str
) -> None:
    compare(case, dtype, memory_format, mode, memory, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=label)
@pytest.mark.parametrize(
    ("case", "mode"), [(case, mode) for case in CORE for mode in modes(case) if ":" in mode], ids=label
)
def test_each_batch_norm_frozen_alone(case: Case, mode: str, dtype: torch.dtype, memory: str, backend: str) -> None:
    compare(case, dtype, torch.channels_last, mode, memory, backend)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", STRIDE_ONE + SIZES + CHANNELS, ids=label)
def test_sizes_and_channels(case: Case, mode: str, memory_format: torch.memory_format, memory: str) -> None:
    compare(case, torch.float32, memory_format, mode, memory, "cpu")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=label)
@pytest.mark.parametrize("case", STRIDE_ONE + SIZES[::5] + CHANNELS, ids=label)
def test_sizes_and_channels_in_other_dtypes(case: Case, dtype: torch.dtype, memory: str) -> None:
    compare(case, dtype, torch.channels_last, "train", memory, "cpu")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", BATCHES, ids=label)
def test_batches_of_one_pixel(case: Case, mode: str, memory: str) -> None:
    if mode == "train" and case.values_a_channel == 1:
        pytest.skip("one value per channel has no batch statistics: see test_errors.py")
    compare(case, torch.float32, torch.channels_last, mode, memory, "cpu")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_the_input_gradient_may_be_unwanted(case: Case, dtype: torch.dtype, memory: str) -> None:
    block, x, grad, eager, truth = prepared(case, dtype, torch.channels_last, "train")
    twin = fused_twin(block, memory)
    twin(x).backward(grad)
    assert x.grad is None
    got = {f"grad.{name}": p.grad for name, p in twin.named_parameters() if p.grad is not None}
    wanted = {name: value for name, value in eager.items() if name.startswith("grad.")}
    check(got, wanted, truth, dtype, case)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_any_set_of_wanted_gradients(case: Case, memory: str, mode: str) -> None:
    """One parameter alone is frozen, or one alone gets a gradient, or only the input does."""
    block, x, grad, eager, truth = prepared(case, torch.float32, torch.channels_last, mode)
    names = [name for name, _ in block.named_parameters()]
    everything = set(names)
    for wanted in [everything - {name} for name in names] + [{name} for name in names] + [set()]:
        twin = fused_twin(block, memory)
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in wanted)
        got = run(twin, x, grad)
        expected = {n: v for n, v in eager.items() if not n.startswith("grad.") or n.removeprefix("grad.") in wanted}
        check(got, expected, truth, torch.float32, f"{case}, wanted: {sorted(wanted)}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_without_gradients(case: Case, mode: str, memory: str) -> None:
    """no_grad and inference_mode give the same output, and training mode still updates running statistics."""
    block, x, _, eager, truth = prepared(case, torch.float32, torch.channels_last, mode)
    expected = {name: value for name, value in eager.items() if name == "out" or name.startswith("stats.")}
    for context in (torch.no_grad, torch.inference_mode):
        twin = fused_twin(block, memory)
        with context(), expect_paths(fused_forward=1):
            out = twin(x)
        got = {"out": out} | {f"stats.{name}": buffer for name, buffer in twin.named_buffers()}
        check(got, expected, truth, torch.float32, f"{case} {mode} {context.__name__}")


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_empty_batch(case: Case, mode: str, memory_format: torch.memory_format) -> None:
    """As in torch, the output is empty, gradients are zero, and running statistics are what torch makes them."""
    block, x, grad = stock_case(case, torch.float32, memory_format, mode)
    twin = fused_twin(block)
    x, grad = x[:0], grad[:0]
    try:
        eager = run(block, x, grad)
    except ValueError as error:
        before = {name: buffer.clone() for name, buffer in twin.named_buffers() if "num_batches" not in name}
        with pytest.raises(ValueError, match=str(error).split(",")[0]):
            run(twin, x, grad)
        assert all(torch.equal(twin.get_buffer(name), buffer) for name, buffer in before.items())
        return
    got = run(twin, x, grad)
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        assert got[name].shape == value.shape, name
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_three_steps_of_training_and_an_evaluation(case: Case, memory: str) -> None:
    """Compare running statistics, counters and weights over several optimizer steps, then an evaluation with them."""
    block, x, grad = stock_case(case, torch.float64, torch.channels_last)
    twin = fused_twin(block, memory)
    for model in (block, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).backward(grad)
            optimizer.step()
        model.eval()
    assert int(twin.bn1.num_batches_tracked) == 3
    for (name, mine), theirs in zip(twin.state_dict().items(), block.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(twin(x), block(x), rtol=1e-9, atol=1e-9)

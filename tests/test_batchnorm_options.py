"""Every setting of BatchNorm against torchvision's block; fused blocks read the settings at each call."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from itertools import product

import pytest
import torch
from eager import trust
from fusion import MEMORY, expect_paths, fused_twin, label, stock_case
from reference import build, inputs, oracle, randomize, run, separate, set_mode
from shapes import CORE, Case, case
from tolerance import UNIT, check
from torch import nn

GRID = tuple(
    dict(zip(("momentum", "affine", "track_running_stats", "eps"), values, strict=True))
    for values in product((0.1, None, 0.0, 1.0), (True, False), (True, False), (1e-5, 1e-2))
)
TWO = (case("basic", "projection"), case("bottleneck", "identity"))


def settings(options: dict[str, object]) -> str:
    return "-".join(f"{key[:5]}={value}" for key, value in options.items())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("options", GRID, ids=settings)
def test_the_full_grid(options: dict[str, object], mode: str) -> None:
    for shape, memory in product(TWO, MEMORY):
        block = set_mode(build(shape, torch.float64, norm=partial(nn.BatchNorm2d, **options)), mode)  # type: ignore[arg-type]
        x, grad = inputs(shape, torch.float64)
        separate(block, x)
        twin = fused_twin(block, memory)
        for step in (1, 2):  # step 2: other running statistics; other average if momentum is None
            truth = oracle(block, x, grad, UNIT[torch.float64])
            assert truth.at_risk == 0
            eager = run(block, x, grad)
            with expect_paths(fused_forward=1, fused_backward=1):
                got = run(twin, x, grad)
            check(got, eager, truth, torch.float64, f"{shape} {options} step {step}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_settings_are_read_at_each_call(case: Case, memory: str) -> None:
    """Changes of eps, momentum and track_running_stats after fuse() take effect, for each BatchNorm alone."""
    block, x, grad = stock_case(case, torch.float64)
    twin = fused_twin(block, memory)
    for name in case.norms:
        for attribute, value in (("eps", 0.3), ("momentum", None), ("momentum", 0.7), ("track_running_stats", False)):
            for model in (block, twin):
                setattr(model.get_submodule(name), attribute, value)
            eager, got = run(block, x, grad), run(twin, x, grad)
            for key, expected in eager.items():
                change = f"{name}.{attribute} = {value}: {key}"
                torch.testing.assert_close(got[key], expected, rtol=1e-8, atol=1e-9, msg=change)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_weight_without_bias(case: Case, mode: str) -> None:
    if "bias" not in inspect.signature(nn.BatchNorm2d).parameters:
        pytest.skip("this torch has no BatchNorm2d(bias=False)")
    block = set_mode(build(case, torch.float64, norm=partial(nn.BatchNorm2d, bias=False)), mode)
    x, grad = inputs(case, torch.float64)
    truth = oracle(block, x, grad, UNIT[torch.float64])
    twin = fused_twin(block)
    check(run(twin, x, grad), run(block, x, grad), truth, torch.float64, case)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("weight", [-1.0, 0.0, 1e-30])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_weights_that_cannot_be_inverted(case: Case, mode: str, weight: float, memory: str) -> None:
    """Each BatchNorm in turn gets weights that are negative, zero, or so small that results are denormal."""
    for name in case.norms:
        block = set_mode(build(case, torch.float32, torch.channels_last), mode)
        nn.init.constant_(block.get_submodule(name).weight, weight)
        x, grad = inputs(case, torch.float32, torch.channels_last)
        separate(block, x)
        truth = oracle(block, x, grad)
        twin = fused_twin(block, memory)
        check(run(twin, x, grad), run(block, x, grad), truth, torch.float32, f"{case} {name}.weight = {weight}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("spread", [0.1, 0.0])
@pytest.mark.parametrize("case", [c for c in CORE if c.shortcut == "identity"], ids=label)
def test_a_mean_far_from_zero(case: Case, spread: float, memory: str) -> None:
    """With mean 1e4 and deviation 0.1 (or a constant channel), E[x²] - E[x]² in float32 would lose all digits.

    The images are 1x1, so that padding does not widen the distribution of the first convolution's output.
    """
    far = Case(**{**vars(case), "batch": 512, "height": 1, "width": 1})
    for mode in ("train", "eval"):
        block = set_mode(build(far, torch.float32, torch.channels_last), mode)
        with torch.no_grad():
            block.conv1.weight.abs_()  # so that the means of the inputs do not cancel
        x, grad = inputs(far, torch.float32, torch.channels_last)
        x = 1e4 + spread * x
        for name in far.norms:
            if mode == "eval":
                block.get_submodule(name).running_var.fill_(0.01)
        eager = run(copy.deepcopy(block), x, grad)
        truth = oracle(block, x, grad)
        check(run(fused_twin(block, memory), x, grad), eager, truth, torch.float32, f"{far} {mode}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
def test_more_values_than_half_precision_counts(dtype: torch.dtype, memory: str) -> None:
    """With 66,000 values per channel, counts and the Bessel factor must not be computed in half precision."""
    many = case("bottleneck", "identity", planes=1, batch=66_000, height=1, width=1)
    block = build(many, dtype, torch.channels_last)
    x, grad = inputs(many, dtype, torch.channels_last)
    trust(block, x)
    truth = oracle(block, x, grad, UNIT[dtype])
    twin = fused_twin(block, memory)
    eager, got = run(block, x, grad), run(twin, x, grad)
    assert all(bool(value.isfinite().all()) for value in got.values())
    statistics = [name for name in eager if name.startswith("stats.")]
    kept = {name: got[name] for name in ("out", *statistics)}
    check(kept, {name: eager[name] for name in kept}, truth, dtype, many)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_zero_init_residual(case: Case, mode: str) -> None:
    """The last BatchNorm's weight starts at zero; it still gets a gradient and trains like the stock block's."""
    block, x, grad = stock_case(case, torch.float64, mode=mode)
    nn.init.zeros_(block.get_submodule(case.last_norm).weight)
    separate(block, x)
    twin = fused_twin(block)
    for model in (block, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).backward(grad)
            optimizer.step()
    moved = twin.get_submodule(case.last_norm).weight
    assert moved.any()
    torch.testing.assert_close(moved, block.get_submodule(case.last_norm).weight, rtol=1e-9, atol=1e-10)


def test_running_statistics_of_a_frozen_batch_norm_stay() -> None:
    for shape in CORE:
        for name in shape.norms:
            block = set_mode(randomize(build(shape), 5), f"frozen:{name}")
            twin = fused_twin(block)
            before = {key: buffer.clone() for key, buffer in twin.get_submodule(name).named_buffers()}
            run(twin, *inputs(shape))
            after = dict(twin.get_submodule(name).named_buffers())
            assert all(torch.equal(after[key], buffer) for key, buffer in before.items())
            others = [twin.get_submodule(other) for other in shape.norms if other != name]
            assert all(int(other.num_batches_tracked) == 1 for other in others)

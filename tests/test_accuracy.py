"""The limits of docs/accuracy.md: for random blocks in float32, no kind of tensor is less accurate than eager's.

benchmarks/accuracy.py says what a random block is and what is measured. Geometric means show errors that a kernel makes
in all its results; they may be a quarter above eager's. The bound for each tensor shows errors that come from
correlated channels, small variances or means far from zero.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from eager import require_no_crash

from fusedres import _C, ops
from fusedres.values import BnBranch, Gated, Gram, GramState, Norm

pytestmark = pytest.mark.usefixtures("benchmark_scripts")

MEAN = 1.25  # limit for the geometric mean of |fused - exact| / |eager - exact|
ABOVE = 4.0  # limit for a tensor's error above the rule's floor, as a multiple of eager's error


def _errors(seeds: Iterable[int], memory_format: str) -> list[Any]:
    import accuracy

    return [error for seed in seeds for error in accuracy.measure(accuracy.draw(seed, (memory_format,)))]


@pytest.fixture(scope="module")
def channels_last(benchmark_scripts: None) -> tuple[list[Any], list[Any]]:
    """Return the errors of 250 random blocks, twice."""
    require_no_crash()
    return _errors(range(250), "channels_last"), _errors(range(250, 500), "channels_last")


@pytest.fixture(scope="module")
def contiguous(benchmark_scripts: None) -> list[Any]:
    """Return the errors of 250 random blocks."""
    return _errors(range(1000, 1250), "contiguous")


def _check(errors: list[Any], widest: int = 64) -> None:
    """Assert the limits of every mean and of every tensor."""
    import accuracy

    above = [error for error in errors if not error.above_floor <= ABOVE]
    assert not above, "\n".join(f"{e.memory} {e.above_floor:.1f} times eager's error: {e.where}" for e in above)
    found = accuracy.budget(errors)
    means = {key: accuracy.geometric_mean(ratios) for key, ratios in found.items() if key[1] <= widest}
    high = {key: round(mean, 2) for key, mean in means.items() if not mean <= MEAN}
    assert not high, f"geometric means above {MEAN}: {high}"
    assert {kind for _, _, kind in means} == set(accuracy.KINDS)


def test_no_less_accurate_than_eager_over_500_random_blocks(channels_last):
    """The input is channels_last, the layout in which the blocks run."""
    errors = [*channels_last[0], *channels_last[1]]
    _check(errors)
    assert {(error.width, error.memory) for error in errors} >= {(1, "min"), (64, "min"), (1, "auto"), (64, "auto")}


def test_no_less_accurate_than_eager_over_500_blocks_of_both_formats(channels_last, contiguous):
    _check([*channels_last[0], *contiguous])


def test_no_less_accurate_than_eager_on_contiguous_input(contiguous):
    """Here eager sums in float64. In wider blocks, torch's channels_last 3x3 convolutions alone are 1.6 times worse."""
    _check(contiguous, widest=16)


@pytest.mark.parametrize("apart", [0.1, 0.01])
@pytest.mark.parametrize("channels", [16, 64])
def test_statistics_before_the_convolution_of_correlated_channels(channels, apart):
    """With a Gram matrix in float32, var = W·Cov·Wᵀ had tens to hundreds of times eager's error here."""
    generator = torch.Generator().manual_seed(channels)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    z = (random(8, 1, 14, 14) + apart * random(8, channels, 14, 14)).to(memory_format=torch.channels_last)
    weight = random(4 * channels, channels, 1, 1) / channels**0.5
    weight -= weight.mean(1, keepdim=True)
    _, pivot, total, gram = ops.gram(z, None, backend="cpu")
    count = z.numel() // channels
    state, _ = ops.one_pass_statistics(
        weight, Gram(pivot, total, gram), count, Norm(None, None, None, None, None, 0.1, 0.0), backend="cpu"
    )
    exact = torch.conv2d(z.double(), weight.double()).var((0, 2, 3), unbiased=False).rsqrt()
    eager = torch.conv2d(z, weight).double().var((0, 2, 3), unbiased=False).rsqrt()
    error, least = (state[1].double() - exact).norm(), 2.0**-24 * exact.norm()
    assert error <= 2 * (eager - exact).norm() + least, f"{error / exact.norm():.1e}"


@pytest.mark.parametrize("channels", [1, 3, 16, 40])
def test_sums_of_a_backward_round_once(channels):
    """Σd and Σd·x̂ of every gradient that a block reduces are summed in float64 and rounded once."""
    generator = torch.Generator().manual_seed(channels)
    d, y = (
        torch.randn(8, channels, 13, 11, generator=generator).to(memory_format=torch.channels_last) for _ in range(2)
    )
    state = ops.bn_statistics(y, Norm(None, None, None, None, None, 0.1, 1e-5), backend="cpu")
    centred = y.double() - state[0].double().view(1, -1, 1, 1)
    terms = d * centred * state[1].double().view(1, -1, 1, 1)
    total, product = d.double().sum((0, 2, 3)), terms.sum((0, 2, 3))
    grad = d.clone(memory_format=torch.preserve_format)
    sums = ops.bn_relu_backward_(grad, BnBranch(y, state, True), False, backend="cpu")
    mask = torch.full((8, 13, 11, (channels + 7) // 8), 255, dtype=torch.uint8)
    assert ((sums[0].double() - total).abs() <= 2.0**-24 * total.abs()).all()
    assert (
        (ops.relu_backward(Gated(d, mask), backend="cpu")[1].double() - total).abs() <= 2.0**-24 * total.abs()
    ).all()
    of_terms = 1.5 * terms.square().sum((0, 2, 3)).sqrt()  # x - mean is rounded in each term
    assert ((sums[1].double() - product).abs() <= 2.0**-24 * (product.abs() + of_terms)).all()


def test_few_input_channels_take_their_cross_products_in_float64():
    """In dγ of a one-pass unit Σd·mean cancels; with one input channel, errors of float32 products were seen."""
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(40):
        z = torch.randn(4, 1, 9, 8, generator=generator).relu().to(memory_format=torch.channels_last)
        d = torch.randn(4, 4, 9, 8, generator=generator).to(memory_format=torch.channels_last)
        weight = torch.randn(4, 1, 1, 1, generator=generator)
        z, pivot, total, gram = ops.gram(z, None, backend="cpu")
        state, projected = ops.one_pass_statistics(
            weight, Gram(pivot, total, gram), 288, Norm(None, None, None, None, None, 0.1, 1e-5), backend="cpu"
        )
        _, _, got = ops.one_pass_backward(
            d, d.sum((0, 2, 3)), z, weight, GramState(state, projected, total), backend="cpu"
        )
        y = torch.conv2d(z.double(), weight.double())
        normalised = (y - y.mean((0, 2, 3), keepdim=True)) * state[1].double().view(1, -1, 1, 1)
        exact = (d * normalised).sum((0, 2, 3))
        ratios.append(((got - exact).abs() / exact.abs()).max().item() * 2**24)
    assert math.exp(sum(math.log(max(ratio, 0.1)) for ratio in ratios) / len(ratios)) <= 1.5
    assert _C.ONE_PASS_NARROW >= 1


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_on_lower_instruction_sets(isa):
    if isa not in _C.build_info()["isa_built"] or _C.build_info()["isa_used"] in ("portable", isa):
        pytest.skip(f"this processor has no {isa} below what the other tests use")
    selection = ("-k", "correlated or backward or few_input")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", Path(__file__).name, *selection],
        cwd=Path(__file__).parent,
        env={**os.environ, "FUSEDRES_ISA": isa, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout

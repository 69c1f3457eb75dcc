"""conv_wgrad's cpu kernel: many pixels and channels, Winograd's algorithm and AMX, any number of threads."""

from __future__ import annotations

import pytest
import torch
from test_conv_wgrad import Case

# More pixels than a block of the cpu kernel, more channels than a task, lines that are longer than a block.
LARGE = (
    ((2, 19, 17, 19), 33, 3, 1, 1, 1),
    ((3, 40, 15, 13), 300, 1, 1, 0, 1),
    ((2, 3, 40, 37), 20, 7, 2, 3, 1),
    ((9, 300, 7, 7), 13, 3, 1, 1, 1),
    ((1, 6, 2, 700), 7, (1, 3), 1, (0, 1), 1),
    ((2, 3, 3, 700), 7, 3, 2, 1, 1),
    ((2, 17, 33, 31), 18, 3, 2, 2, 2),
    ((2, 5, 40, 40), 4, 3, 1, 1, 1),
)
# In float32, the cpu kernel computes these by Winograd's algorithm: odd and even images, any padding, several tasks.
WINOGRAD = (
    ((2, 64, 33, 31), 64, 3, 1, 1, 1),
    ((1, 64, 40, 41), 96, 3, 1, 0, 1),
    ((2, 96, 25, 24), 64, 3, 1, (2, 1), 1),
    ((30, 192, 5, 6), 160, 3, 1, 1, 1),
)
# In bfloat16, a CPU with AMX computes these in several strips of lines or of images, with odd lines and ragged tiles.
STRIPS = (
    ((2, 40, 29, 41), 50, 3, 1, 1, 1),
    ((2, 70, 37, 35), 33, 3, 2, 1, 1),
    ((1, 20, 50, 47), 20, 3, 3, 2, 2),
    ((40, 24, 7, 5), 48, 5, 1, 2, 1),
    ((2, 3, 61, 59), 65, 7, 2, 3, 1),
    ((2, 2, 45, 51), 3, (2, 5), (2, 3), (0, 4), 1),
    ((1, 24, 4, 1100), 33, 3, 1, 1, 1),
    ((70, 17, 1, 1), 16, 3, 1, 1, 1),
)


@pytest.mark.parametrize("h", [False, True])
@pytest.mark.parametrize("geometry", STRIPS, ids=str)
def test_strips_of_the_cpu_kernel(geometry, h):
    case = Case(geometry, torch.bfloat16, h=h)
    case.check(case.run("cpu"), 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("h", [False, True])
@pytest.mark.parametrize("geometry", LARGE, ids=str)
def test_blocks_of_the_cpu_kernel(geometry, h, dtype):
    case = Case(geometry, dtype, h=h)
    case.check(case.run("cpu"), 32)  # hundreds of terms


@pytest.mark.parametrize("h", [False, True])
@pytest.mark.parametrize("geometry", WINOGRAD, ids=str)
def test_winograd_of_the_cpu_kernel(geometry, h):
    case = Case(geometry, torch.float32, h=h)
    case.check(case.run("cpu"), 16)


@pytest.mark.parametrize("values", ["one", "all"])
@pytest.mark.parametrize("h", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_spread_no_further_than_their_taps(dtype, h, values):
    """Winograd's algorithm and AMX's strips multiply them by what other taps read.

    With one value, other parts of the pixels, and other channels, have finite sums.
    """
    case = Case(WINOGRAD[0], dtype, h=h)
    case.input[1, 63, 32, 17] = torch.inf  # an edge
    if values == "all":
        case.input[0, 5, 0, 0] = torch.nan  # a corner
        case.grad[0, 9, 30, 4] = -torch.inf
    if h:
        case.input_state[2] = case.input_state[2].abs()
    want, terms = case.want()
    got = case.run("cpu").sum(0)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert torch.equal(got.isnan(), want.isnan())
    finite = want.isfinite()
    if dtype is torch.float32:
        torch.testing.assert_close(got[finite], want[finite].float(), rtol=1e-4, atol=1e-3)
    else:  # the kernel rounds relu(BN(h))
        assert ((got - want).abs() <= 2**-8 * terms)[finite].all()
    assert 0 < finite.sum() < finite.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_gradient_does_not_meet_padding(dtype):
    case = Case(WINOGRAD[0], dtype)
    case.grad[0, 9, 32, 4] = torch.inf  # of the lowest line, for which the lowest taps read padding
    got = case.run("cpu").sum(0)
    case.grad[0, 9, 32, 4] = 0
    want, terms = case.want()
    finite = got.isfinite()
    assert finite[9, 2].all() and not finite[9, :2].any() and finite[torch.arange(64) != 9].all()
    assert ((got - want).abs() <= 1e-6 * terms)[finite].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", [*LARGE, *WINOGRAD, *STRIPS], ids=str)
def test_threads_of_the_cpu_kernel_do_not_change_a_bit(geometry, dtype):
    case, threads = Case(geometry, dtype, h=True), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(case.run("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_small_gradients_of_many_pixels_are_split_on_the_cpu():
    case = Case(LARGE[-1], torch.float32)
    partials = case.run("cpu")
    assert partials.shape[0] > 1
    case.check(partials)

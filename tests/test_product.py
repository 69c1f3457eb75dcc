"""Convolutions as products of matrices, against autograd in float64: all geometries and layouts of weights."""

from __future__ import annotations

import pytest
import torch
from test_cpu_convolution import GEOMETRIES, LAYOUTS, Case

from fusedres.autograd import product


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convolution", GEOMETRIES, ids=str)
def test_the_gradient_of_every_weight(convolution, layout):
    case = Case(convolution, layout)
    x, weight, grad = case.x.double(), case.weight.double(), case.grad.double()
    got = product.weight_gradient(grad, x, weight, case.geometry)
    assert got.stride() == torch.empty_like(weight).stride()
    torch.testing.assert_close(got, case.wanted()[0][2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_the_gradient_of_the_input(layout):
    case = Case((2, 6, 5, 4, 7, (1, 1), (1, 1), (0, 0), (1, 1)), layout)
    y, grad_x, _ = case.wanted()[0]
    got = product.product(case.x.double(), case.weight.double())
    torch.testing.assert_close(got, y)
    assert got.is_contiguous(memory_format=torch.channels_last)
    got = product.input_gradient(case.grad.double(), case.weight.double())
    torch.testing.assert_close(got, grad_x)
    assert got.is_contiguous(memory_format=torch.channels_last)

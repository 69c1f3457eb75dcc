"""Highway layers against the equation of Srivastava et al. 2015 in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedres import Highway, HighwayConv2d, HighwayLinear
from fusedres.autograd import path_counts

LAYERS = {
    "fully connected": (lambda: HighwayLinear(20), (7, 20)),
    "tanh-like": (lambda: HighwayLinear(20, -1.0, nn.SiLU()), (7, 20)),
    "convolutional": (lambda: HighwayConv2d(16), (3, 16, 6, 5)),
    "normalised": (lambda: HighwayConv2d(16, 5, with_norm=True), (3, 16, 6, 5)),
}


def equation(layer: Highway, x: Tensor) -> Tensor:
    h = layer.transform(x)
    if layer.tail.norm is not None:
        h = layer.tail.norm(h)
    gate = torch.sigmoid(layer.gate(x))
    return gate * layer.tail.activation(h) + (1 - gate) * x


def _gradients(layer: Highway, run, x: Tensor) -> list[Tensor]:
    leaf = x.detach().clone().requires_grad_()
    out = run(leaf)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [leaf, *layer.parameters()])]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", LAYERS)
def test_equation(name, mode):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().train(mode == "train")
    x = torch.randn(shape)
    wide = copy.deepcopy(layer).double()
    plain = copy.deepcopy(layer)
    before = path_counts["tail_backward"]
    got = _gradients(layer, layer, x)
    assert path_counts["tail_backward"] == before + 1
    eager = _gradients(plain, lambda v: equation(plain, v), x)
    exact = _gradients(wide, lambda v: equation(wide, v), x.double())
    for ours, theirs, right in zip(got, eager, exact, strict=True):
        floor = 64 * 2.0**-24 * right.abs().max()
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + floor
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_numerically(name):
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.randn(shape[0], *shape[1:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: layer(v), (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_closed_gates_carry_the_input(name):
    """With T = 0 the layer is the identity, bit by bit, and so is its gradient."""
    make, shape = LAYERS[name]
    layer = make()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(-1e4)
    x = torch.randn(shape, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, x)
    grad = torch.randn(shape)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], grad)


def test_gates_start_closed_as_asked():
    for layer in (HighwayLinear(8, -3.0), HighwayConv2d(8, gate_bias=-3.0)):
        assert (layer.gate.bias == -3.0).all()
    assert HighwayConv2d(8, with_norm=True).transform.bias is None


def test_fifty_layers_train():
    """The paper's claim: with closed gates at the start, fifty layers learn; here, to tell two clusters apart."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(HighwayLinear(16, -3.0) for _ in range(50)), nn.Linear(16, 2))
    x = torch.randn(256, 16)
    target = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(layers.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(layers(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_errors():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        HighwayConv2d(8, 4)
    with pytest.raises(ValueError, match="shortcut must have shape"):
        Highway(nn.Linear(8, 4), nn.Linear(8, 4))(torch.randn(3, 8))

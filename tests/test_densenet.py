"""torchvision's transitions between dense blocks, and whole DenseNets, fused, against their stock forward."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torchvision
from family import check_equation, randomised, saved_bytes, values
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock, _Transition

import fusedres
from fusedres.modules.densenet import FusedDenseBlock, FusedTransition

C, GROWTH = 16, 8
NHWC = torch.channels_last


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, C, 6, 5).to(dtype).to(memory_format=NHWC)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transition(dtype, mode):
    module = fusedres.fuse(randomised(_Transition(C, GROWTH))).to(dtype).train(mode == "train")
    assert type(module) is FusedTransition
    check_equation(module, lambda m, x: nn.Sequential.forward(m, x), _x(dtype))
    assert module.fused_last_reason == "" and fusedres.report(module)[0].fused
    called: list[int] = []
    hook = module.pool.register_forward_hook(lambda *_: called.append(1))
    module(_x(dtype))
    assert called and module.fused_last_reason == ""
    hook.remove()
    module.pool = nn.MaxPool2d(2)  # whatever follows the convolution is called
    check_equation(module, lambda m, x: nn.Sequential.forward(m, x), _x(dtype))
    module.append(nn.Identity())
    assert "its children are norm, relu, conv, pool, 4" in fusedres.report(module)[0].reason


def test_transitions_save_their_input_alone():
    module, x = fusedres.fuse(_Transition(C, GROWTH)), _x().requires_grad_()
    assert saved_bytes(lambda: module(x), x, *module.parameters()) == 4 * C * 4
    assert saved_bytes(lambda: nn.Sequential.forward(module, x), x, *module.parameters()) > x.nbytes


def test_gradients_of_transitions():
    module = fusedres.fuse(randomised(_Transition(C, GROWTH))).double()
    for size in ((6, 5), (3, 3)):  # a row or column of pixels is left out
        x = torch.randn(2, C, *size, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v, *_: module(v), (x, *module.parameters()), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda v, *_: module(v), (x, *module.parameters()), fast_mode=True)
    with torch.autocast("cpu"):
        out, stock = module.float()(_x()), nn.Sequential.forward(module, _x() * 0)
    assert out.dtype is stock.dtype is torch.bfloat16


def _network() -> nn.Module:
    return torchvision.models.densenet121(num_classes=10)


def test_gradients_of_a_network():
    """In a whole network some masks of ReLUs flip by rounding, so the errors are compared over all tensors and runs."""
    ratios, worst = [], [0.0, 0.0]
    for seed in range(4):
        torch.manual_seed(seed)
        stock = _network().double()
        fused, single = fusedres.fuse(copy.deepcopy(stock).float()), copy.deepcopy(stock).float()
        x = torch.randn(2, 3, 64, 64).to(memory_format=NHWC)
        right = values(stock, stock, x.double())
        found = values(fused, fused, x), values(single, single, x)
        assert all(row.fused for row in fusedres.report(fused))
        for name, value in right.items():
            assert found[0][name].dtype is found[1][name].dtype and found[0][name].shape == value.shape
            if not value.is_floating_point():
                assert torch.equal(found[0][name], value), name
                continue
            errors = [(each[name] - value).norm().item() for each in found]
            ratios.append(math.log((errors[0] + 1e-30) / (errors[1] + 1e-30)))
            if value.norm() > 1e-6:
                worst = [max(w, e / value.norm().item()) for w, e in zip(worst, errors, strict=True)]
    assert math.exp(sum(ratios) / len(ratios)) < 1.5 and worst[0] <= 2 * worst[1], worst


def test_fuse_and_unfuse_a_network():
    stock = _network()
    names = list(stock.state_dict())
    fused = fusedres.fuse(copy.deepcopy(stock))
    rows = fusedres.report(fused)
    kinds = [row.kind for row in rows]
    assert (kinds.count("_DenseBlock"), kinds.count("_Transition"), kinds.count("stem")) == (4, 3, 1)
    assert all(row.fused for row in rows), rows
    x = torch.randn(2, 3, 64, 64)
    fused(x).sum().backward()
    assert list(fused.state_dict()) == names
    stock.load_state_dict(fused.state_dict())
    fusedres.fuse(copy.deepcopy(stock)).load_state_dict(stock.state_dict())
    unfused = fusedres.unfuse(copy.deepcopy(fused)).eval()
    torch.testing.assert_close(fused.eval()(x), unfused(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stock.eval()(x), unfused(x))
    assert not any(isinstance(module, FusedDenseBlock | FusedTransition) for module in unfused.modules())


class _Tagged(_DenseBlock):
    tag = "mine"


def test_subclasses_and_frozen_networks():
    block = fusedres.fuse(randomised(_Tagged(2, C, 2, GROWTH, 0.0)))
    assert isinstance(block, _Tagged) and type(block) is not _Tagged and fusedres.report(block)[0].fused
    other, x = pickle.loads(pickle.dumps(block)), _x()
    assert type(other) is type(block) and torch.equal(other.eval()(x), block.eval()(x))
    assert type(fusedres.unfuse(other)) is _Tagged
    network = fusedres.fuse(_network()).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        scores = network(images)
        torch.testing.assert_close(fusedres.freeze(network)(images), scores, rtol=1e-4, atol=1e-4)


def test_meta_tensors():
    """Shapes alone, by the reference backend."""
    block = fusedres.fuse(_DenseBlock(2, C, 2, GROWTH, 0.0)).to("meta")
    x = torch.empty(2, C, 6, 5, device="meta", requires_grad=True)
    with fusedres.use_backend("reference"):
        out = block(x)
        out.sum().backward()
    assert out.shape == (2, C + 2 * GROWTH, 6, 5) and x.grad.shape == x.shape and block.fused_last_reason == ""

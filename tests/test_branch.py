"""Branches of any layers: which convolutions run as units, and that everything else is as if each layer was called."""

from __future__ import annotations

import pytest
import torch
from family import randomised
from torch import nn
from torch.nn import functional as F

from fusedres import LayerScale, PlainBlock, ReZero
from fusedres.autograd import path_counts
from fusedres.modules.branch import run_branch

C = 16


def _normed() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(C), nn.SiLU(), nn.Conv2d(C, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, C, 3, padding=1, bias=False), nn.Dropout(0.0),
    )  # fmt: skip


def _rezero(branch: nn.Module) -> ReZero:
    block = ReZero(branch)
    nn.init.constant_(block.scale, 0.5)
    return block


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_convolutions_of_a_branch_run_as_units(mode):
    block = randomised(_rezero(_normed())).train(mode == "train")
    x = torch.randn(2, C, 6, 6, requires_grad=True)
    before = path_counts["norm_act_conv_forward"]
    out = block(x)
    assert path_counts["norm_act_conv_forward"] == before + 2
    seen = []
    block.branch[3].register_forward_hook(lambda module, given, result: seen.append(result))  # of the second norm
    again = block(x)
    assert path_counts["norm_act_conv_forward"] == before + 4 and len(seen) == 1  # the second convolution alone
    torch.testing.assert_close(again, out)
    block.branch.register_forward_hook(lambda module, given, result: 2 * result)
    torch.testing.assert_close(block(x) - x, 2 * (out - x), rtol=1e-4, atol=1e-5)
    assert path_counts["norm_act_conv_forward"] == before + 4 and len(seen) == 2


class _Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


_INNER = {
    "complex": (
        nn.Conv2d(C, C, 1, bias=False, dtype=torch.complex64), torch.fft.fft2, lambda t: torch.fft.ifft2(t).real,
    ),
    "one image": (nn.Conv2d(C, C, 1, bias=False), lambda t: t[0], lambda t: t[None]),
    "pair": (nn.Identity(), lambda t: (t, t), lambda pair: pair[1]),
}  # fmt: skip


@pytest.mark.parametrize("name", _INNER)
def test_inner_tensors_of_a_branch_are_what_torch_takes(name):
    layer, before, after = _INNER[name]
    block = _rezero(nn.Sequential(_Call(before), layer, _Call(after)))
    x = torch.randn(1, C, 5, 5)
    torch.testing.assert_close(block(x), x + 0.5 * block.branch(x))


def test_strides_are_those_of_the_layers():
    """One channel in strides that mean channels_last: BatchNorm would return NCHW, a convolution does not."""
    branch = nn.Sequential(nn.Conv2d(6, 1, 3, padding=1, bias=False), nn.ReLU(True), nn.Conv2d(1, 16, 1, bias=False))
    x = torch.randn(2, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    assert run_branch("ReZero", "branch", branch, x).stride() == branch(x).stride()


def test_a_missing_child_is_called_as_torch_does():
    branch = _normed()
    branch.register_module("7", None)
    with pytest.raises(TypeError, match="not callable"):
        ReZero(branch)(torch.randn(2, C, 5, 5))


def test_replaced_and_global_code_sees_the_calls(monkeypatch):
    block, x = _rezero(_normed()), torch.randn(2, C, 5, 5)
    plain = PlainBlock(C, C, 1)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    block(x)
    hook.remove()
    assert seen.count(nn.Sequential) == 1 and seen.count(nn.Conv2d) == 2
    base, forward = block(x) - x, nn.Sequential.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.Sequential, "forward", lambda self, given: 2 * forward(self, given))
        torch.testing.assert_close(block(x) - x, 2 * base, rtol=1e-4, atol=1e-5)
    calls, silu = [], F.silu
    with monkeypatch.context() as patch:
        patch.setattr(F, "silu", lambda *given, **more: calls.append(1) or silu(*given, **more))
        block(x)
        assert calls == [1]
    norm = F.batch_norm
    with monkeypatch.context() as patch:
        patch.setattr(F, "batch_norm", lambda *given, **more: calls.append(2) or norm(*given, **more))
        plain(x)
        assert calls == [1, 2, 2]


def test_a_traced_layer_scale_keeps_the_dtype():
    block = LayerScale(nn.Conv2d(C, C, 1).bfloat16(), C, 0.3)
    x = torch.randn(2, C, 5, 5).bfloat16()
    traced = torch.fx.symbolic_trace(block)(x)
    assert traced.dtype == block(x).dtype == torch.bfloat16
    torch.testing.assert_close(traced, block(x), rtol=2e-2, atol=2e-2)


def test_wrong_channels_of_a_branch():
    with pytest.raises(RuntimeError, match=r"ReZero.*16.*3"):
        ReZero(_normed())(torch.zeros(2, 3, 5, 5))

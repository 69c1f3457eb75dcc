"""Function transforms of a fused block: batched gradients, torch.func, and a node that is called by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad
from torchvision.models.resnet import BasicBlock

import fusedres
from fusedres.autograd import path_counts


@pytest.fixture
def blocks():
    stock = BasicBlock(4, 4).double()
    return stock, fusedres.fuse(copy.deepcopy(stock)), torch.randn(2, 4, 3, 3, dtype=torch.double)


def test_batched_gradients_take_the_composite(blocks):
    stock, fused, x = blocks
    x.requires_grad_()
    grads = torch.randn(5, *stock(x).shape, dtype=torch.double)
    before = path_counts["composite_backward"]
    got = torch.autograd.grad(fused(x), [x, fused.conv1.weight], grads, is_grads_batched=True)
    want = torch.autograd.grad(stock(x), [x, stock.conv1.weight], grads, is_grads_batched=True)
    assert path_counts["composite_backward"] == before + 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_func_grad_runs_unfused(blocks):
    stock, fused, x = blocks
    stock.eval()
    fused.eval()
    before = path_counts["unfused"]

    def gradients(block):
        parameters = {name: p.detach() for name, p in block.named_parameters()}
        return grad(lambda p: functional_call(block, p, (x,)).square().sum())(parameters)

    got, want = gradients(fused), gradients(stock)
    assert path_counts["unfused"] == before + 1
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_a_node_applied_by_hand_keeps_what_it_saved(blocks):
    _, fused, x = blocks
    x.requires_grad_()
    out = fused(x)
    with torch.no_grad():
        first = out.grad_fn.apply(torch.ones_like(out))[0]
    again = torch.autograd.grad(out, x, torch.ones_like(out))[0]
    assert torch.equal(first, again)


def test_retained_graph_gives_the_same_gradients_again(blocks):
    _, fused, x = blocks
    x.requires_grad_()
    out = fused(x)
    g = torch.randn_like(out)
    first = torch.autograd.grad(out, x, g, retain_graph=True)[0]
    second = torch.autograd.grad(out, x, g, retain_graph=True)[0]
    last = torch.autograd.grad(out, x, g)[0]
    assert torch.equal(first, second)
    assert torch.equal(first, last)

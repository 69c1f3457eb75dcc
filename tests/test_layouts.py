"""Inputs and gradients with any strides give the same numbers as dense ones, and are not written to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from fusion import FORMATS, MEMORY, fused_twin, label, stock_case
from reference import oracle, run, separate
from shapes import CORE, Case, with_size
from tolerance import check, check_tensor
from torch import Tensor

NCHW, NHWC = FORMATS


def embedded(x: Tensor, offset: int) -> Tensor:
    """Return the same values and strides at an odd storage offset, so that vector loads are unaligned."""
    buffer = torch.full((x.numel() + offset + 3,), float("nan"), dtype=x.dtype)
    return torch.as_strided(buffer, x.shape, x.stride(), offset).copy_(x)


def every_other_channel(x: Tensor) -> Tensor:
    wide = torch.full((x.shape[0], 2 * x.shape[1], *x.shape[2:]), float("nan"), dtype=x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def cropped(x: Tensor) -> Tensor:
    framed = torch.full((x.shape[0], x.shape[1], x.shape[2] + 2, x.shape[3] + 3), float("nan"), dtype=x.dtype)
    framed = framed.to(memory_format=NHWC)
    framed[:, :, 1:-1, 2:-1] = x
    return framed[:, :, 1:-1, 2:-1]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "offset 1": lambda x: embedded(x.contiguous(memory_format=NHWC), 1),
    "offset 3, NCHW": lambda x: embedded(x.contiguous(), 3),
    "every other channel": every_other_channel,
    "cropped": cropped,
    "transposed": transposed,
    "batch last": batch_last,
}


def run_with(block: torch.nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Do what reference.run does, but keep the strides of x: the view itself becomes the leaf."""
    leaf = x.detach().requires_grad_()
    block.zero_grad(set_to_none=True)
    out = block(leaf)
    out.backward(grad)
    parameters = {f"grad.{name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    stats = {f"stats.{name}": buffer.clone() for name, buffer in block.named_buffers()}
    assert leaf.grad is not None
    return {"out": out.detach(), "grad_x": leaf.grad} | parameters | stats


@pytest.mark.parametrize("grad_format", FORMATS, ids=label)
@pytest.mark.parametrize("x_format", FORMATS, ids=label)
@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_all_pairs_of_layouts(
    mode: str, weight_format: torch.memory_format, x_format: torch.memory_format, grad_format: torch.memory_format
) -> None:
    """The cases include N = 1, C = 1 and 1x1, where strides do not determine a layout."""
    small = tuple(with_size(c, 1, 4, 4) for c in CORE) + tuple(with_size(c, 6, 1, 1) for c in CORE)
    single = tuple(Case("basic", "identity", 1, 1, batch=n, height=h, width=h) for n, h in ((3, 4), (5, 1)))
    for case in CORE + small + single:
        block, x, grad = stock_case(case, mode=mode)
        block = block.to(memory_format=weight_format)
        truth = oracle(block, x, grad)
        x, grad = x.to(memory_format=x_format), grad.to(memory_format=grad_format)
        for memory in MEMORY:
            twin = fused_twin(block, memory)
            check(run_with(twin, x, grad), run_with(copy.deepcopy(block), x, grad), truth, x.dtype, f"{case} {memory}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_any_strides_of_the_input_and_the_gradient(case: Case, mode: str, view: str, memory: str) -> None:
    block, x, grad = stock_case(case, mode=mode)
    truth = oracle(block, x, grad)
    eager = run(copy.deepcopy(block), x, grad)
    for x_view, grad_view in ((VIEWS[view](x), grad), (x, VIEWS[view](grad)), (VIEWS[view](x), VIEWS[view](grad))):
        assert torch.equal(x_view, x)
        assert torch.equal(grad_view, grad)
        check(run_with(fused_twin(block, memory), x_view, grad_view), eager, truth, x.dtype, f"{case} {view}")


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_expanded_and_stride_zero_gradients(case: Case, mode: str, memory_format: torch.memory_format) -> None:
    """Such gradients come from sum(), from mean() over some axes, and from a broadcast."""
    block, x, grad = stock_case(case, memory_format=memory_format, mode=mode)
    scalars = torch.ones(()).expand_as(grad)
    rows = grad[:1, :, :1].expand_as(grad)
    channels = grad[:, :1].expand_as(grad)
    for expanded in (scalars, rows, channels):
        assert 0 in expanded.stride()
        truth = oracle(block, x, expanded)
        eager = run(copy.deepcopy(block), x, expanded)
        check(run_with(fused_twin(block), x, expanded), eager, truth, x.dtype, case)
    twin = fused_twin(block)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    twin(leaf).sum().backward()
    truth = oracle(block, x, scalars)
    got = {"grad_x": leaf.grad} | {f"grad.{name}": p.grad for name, p in twin.named_parameters()}
    eager = run(copy.deepcopy(block), x, scalars)
    check(got, {name: eager[name] for name in got}, truth, x.dtype, f"{case} sum().backward()")


@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_expanded_inputs(case: Case, mode: str, axis: int) -> None:
    """The stride is 0 along the batch, the channels or the rows; memory is shared with the expanded tensor."""
    block, x, grad = stock_case(case, mode=mode)
    base = x.narrow(axis, 0, 1).clone()
    expanded = base.expand_as(x)
    separate(block, expanded)
    truth = oracle(block, expanded, grad)
    results = []
    for model in (fused_twin(block), block):
        leaf = base.clone().requires_grad_()
        out = model(leaf.expand_as(x))
        out.backward(grad)
        grads = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
        summed = {"out": out.detach(), **grads}
        results.append((summed, leaf.grad))
    (got, got_base), (eager, eager_base) = results
    check(got, eager, truth, x.dtype, case)
    terms = truth.terms["grad_x"].sum(axis, keepdim=True)
    check_tensor("grad of the base", got_base, eager_base, truth.values["grad_x"].sum(axis, keepdim=True), terms, terms)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_inputs_and_gradients_are_not_written_to(
    case: Case, mode: str, memory_format: torch.memory_format, memory: str
) -> None:
    """x, the output gradient, the output and every parameter keep their values in forward and backward."""
    block, x, grad = stock_case(case, memory_format=memory_format, mode=mode)
    twin = fused_twin(block, memory)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    given = grad.clone(memory_format=torch.preserve_format)
    parameters = {name: p.detach().clone() for name, p in twin.named_parameters()}
    out = twin(leaf)
    assert torch.equal(leaf, x)
    kept = out.detach().clone()
    versions = leaf._version, given._version, out._version
    out.backward(given)
    assert torch.equal(leaf, x)
    assert torch.equal(given, grad)
    assert torch.equal(out, kept)
    assert (leaf._version, given._version, out._version) == versions
    assert all(torch.equal(p, parameters[name]) for name, p in twin.named_parameters())
    storages = {t.untyped_storage().data_ptr() for t in (leaf, given, out)}
    assert len(storages) == 3
    assert leaf.grad is not None
    assert leaf.grad.untyped_storage().data_ptr() not in storages


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_output_keeps_the_layout_of_the_input(mode: str, memory_format: torch.memory_format) -> None:
    for case in CORE:
        block, x, grad = stock_case(case, memory_format=memory_format, mode=mode)
        twin = fused_twin(block)
        with torch.no_grad():
            assert twin(x).is_contiguous(memory_format=memory_format)
        got = run(twin, x, grad)
        assert got["out"].is_contiguous(memory_format=memory_format)
        for name, parameter in twin.named_parameters():
            assert got[f"grad.{name}"].stride() == parameter.stride(), name

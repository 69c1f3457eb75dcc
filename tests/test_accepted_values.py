"""Blocks accept what torch accepts, whether they run fused or not, and refuse the rest with torch's error class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion import expect_paths, stock_case
from reference import run
from shapes import CORE, Case, case
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fusedres
from fusedres.errors import DtypeError, ShapeError

SMALL = case("basic", "projection")
Alter = Callable[[nn.Module], object]


def matches(alter: Alter, *, fused: bool, mode: str = "train", steps: int = 3, block_case: Case = SMALL) -> str:
    """Assert that a fused block equals the stock one over some steps, buffers included; return the report's reason."""
    block, x, _ = stock_case(block_case, torch.float64, mode=mode)
    alter(block)
    grad = torch.randn_like(copy.deepcopy(block)(x))
    twin = fusedres.fuse(copy.deepcopy(block))
    (row,) = fusedres.report(twin)
    assert row.fused == fused, row.reason
    for _ in range(steps):
        expected = run(block, x, grad)
        with expect_paths(**({"fused_forward": 1, "fused_backward": 1} if fused else {"unfused": 1})):
            got = run(twin, x, grad)
        for name, value in expected.items():
            assert got[name].dtype is value.dtype, name
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)
    return row.reason


@pytest.mark.parametrize("value", [1, (1,), [1], (1, 1), [1, 1]], ids=str)
@pytest.mark.parametrize("option", ["stride", "padding", "dilation"])
def test_one_number_or_a_sequence(option: str, value: Any) -> None:
    matches(lambda b: setattr(b.conv2, option, value), fused=True)
    matches(lambda b: setattr(b.downsample[0], "stride", 2), fused=True)


def test_stride_taken_out_after_construction() -> None:
    """Segmentation and re-identification networks change a stride in this way."""

    def last_stride_one(block: nn.Module) -> None:
        block.conv1.stride = 1
        block.downsample[0].stride = 1

    matches(last_stride_one, fused=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [("stride", 0), ("stride", (1, -1)), ("padding", -1), ("dilation", 0), ("stride", 1.0), ("stride", (1, 2, 3))],
)
def test_settings_that_torch_refuses(option: str, value: Any) -> None:
    block, x, _ = stock_case(SMALL)
    setattr(block.conv1, option, value)
    twin = fusedres.fuse(copy.deepcopy(block))
    assert option in fusedres.report(twin)[0].reason
    with pytest.raises((RuntimeError, TypeError)) as expected:
        block(x)
    with pytest.raises(type(expected.value)):
        twin(x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_counters_of_any_dtype(dtype: torch.dtype, momentum: float | None) -> None:
    def alter(block: nn.Module) -> None:
        for norm in (block.bn1, block.bn2):
            norm.momentum = momentum
            norm.num_batches_tracked = torch.full((4,), 5).to(dtype)[1]  # one element of a larger storage

    reason = matches(alter, fused=False)
    assert "num_batches_tracked" in reason and str(dtype) in reason
    matches(alter, fused=True, mode="eval")  # eval mode does not read it


def test_a_counter_of_one_dimension() -> None:
    reason = matches(lambda b: setattr(b.bn1, "num_batches_tracked", torch.tensor([3])), fused=False)
    assert "num_batches_tracked" in reason
    matches(lambda b: setattr(b.bn1, "num_batches_tracked", torch.tensor([3, 3])[1]), fused=True)


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_buffers_that_are_none(momentum: float | None) -> None:
    def without(*names: str) -> Alter:
        def alter(block: nn.Module) -> None:
            block.bn1.momentum = momentum
            for name in names:
                setattr(block.bn1, name, None)

        return alter

    matches(without("num_batches_tracked"), fused=True)
    matches(without("running_mean", "running_var"), fused=True)
    matches(without("running_mean", "running_var", "num_batches_tracked"), fused=True, mode="eval")


@pytest.mark.parametrize(
    "names", [("num_batches_tracked",), ("running_mean", "running_var"), ("running_mean",)], ids=str
)
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_buffers_that_were_deleted(names: tuple[str, ...], tracks: bool, mode: str) -> None:
    """Fused blocks need them only if torch does, and then raise torch's error."""
    block, x, grad = stock_case(SMALL, torch.float64, mode=mode)
    block.bn2.track_running_stats = tracks
    for name in names:
        delattr(block.bn2, name)
    twin = fusedres.fuse(copy.deepcopy(block))
    try:
        expected = run(block, x, grad)
    except AttributeError:
        assert not fusedres.report(twin)[0].fused
        with pytest.raises(AttributeError):
            twin(x)
        return
    for name, value in run(twin, x, grad).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=name)
    assert fusedres.report(twin)[0].fused


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("owner", ["bn1", "conv1"])
def test_a_parameter_that_became_an_attribute(owner: str, name: str) -> None:
    """Older pruning, weight normalisation and meta-learning replace a parameter by an attribute, which torch reads."""
    if (owner, name) == ("conv1", "bias"):
        pytest.skip("a convolution without bias has none to move")

    def alter(block: nn.Module) -> None:
        module = block.get_submodule(owner)
        value = getattr(module, name).detach() * 2
        delattr(module, name)
        module.__dict__[name] = value

    block, x, grad = stock_case(SMALL, torch.float64)
    alter(block)
    twin = fusedres.fuse(copy.deepcopy(block))
    assert fusedres.report(twin)[0].fused
    expected = run(block, x, grad)
    with expect_paths(fused_forward=1, fused_backward=1):
        found = run(twin, x, grad)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=key)


def lazily_negated(tensor: Tensor) -> Tensor:
    found = torch._neg_view(-tensor.detach())
    assert found.is_neg()
    return found


LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": lazily_negated,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


@pytest.mark.parametrize("what", LAZY)
@pytest.mark.parametrize("where", ["conv1.weight", "conv2.weight", "bn1.weight", "bn2.bias", "downsample.0.weight"])
def test_values_that_are_not_in_memory(where: str, what: str) -> None:
    def alter(block: nn.Module) -> None:
        owner, _, name = where.rpartition(".")
        module = block.get_submodule(owner)
        setattr(module, name, nn.Parameter(LAZY[what](getattr(module, name)), requires_grad=False))

    block, x, grad = stock_case(SMALL, torch.float64)
    alter(block)
    twin = fusedres.fuse(stock_case(SMALL, torch.float64)[0])
    alter(twin)
    assert "lazily negated or zero" in fusedres.report(twin)[0].reason
    expected, got = run(block, x, grad), run(twin, x, grad)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    # Assigned to a parameter's data, it keeps the parameter's class and address.
    twin, data = fusedres.fuse(stock_case(SMALL, torch.float64)[0]), LAZY[what](block.get_parameter(where))
    twin.get_parameter(where).data = data
    with expect_paths(unfused=1), torch.no_grad():
        twin(x)


@pytest.mark.parametrize("what", LAZY)
@pytest.mark.parametrize("block_case", CORE[:2], ids=str)
def test_lazy_inputs_and_gradients(block_case: Case, what: str) -> None:
    block, x, grad = stock_case(block_case, torch.float64)
    twin = fusedres.fuse(copy.deepcopy(block))
    with torch.no_grad():
        torch.testing.assert_close(twin(LAZY[what](x)), block(LAZY[what](x)))
    for model in (block, twin):
        model.zero_grad()
        out = model(x)
        out.backward(LAZY[what](grad))
    for (name, parameter), other in zip(twin.named_parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_shortcut_that_broadcasts(mode: str) -> None:
    """Without a downsample, torch adds an input of one channel to every output channel."""
    torch.manual_seed(0)
    block = BasicBlock(1, 6).double().train(mode == "train")
    twin = fusedres.fuse(copy.deepcopy(block))
    assert "broadcast" in fusedres.report(twin)[0].reason
    x = torch.randn(3, 1, 5, 4, dtype=torch.float64)
    with expect_paths(unfused=1):
        torch.testing.assert_close(twin(x), block(x))
    narrow = fusedres.fuse(
        BasicBlock(6, 6, downsample=nn.Sequential(nn.Conv2d(6, 1, 1, bias=False), nn.BatchNorm2d(1)))
    )
    with expect_paths(unfused=1):
        narrow(torch.randn(3, 6, 5, 4))


# --- errors have torch's class and come before anything is updated


def one_channel_more(block: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], 1)


def norm_of_another_width(block: nn.Module, x: Tensor) -> Tensor:
    block.bn2 = nn.BatchNorm2d(block.bn2.num_features + 1)
    return x


def norm_of_another_dtype(block: nn.Module, x: Tensor) -> Tensor:
    block.bn2.double()
    return x


def norm_of_two_dtypes(block: nn.Module, x: Tensor) -> Tensor:
    block.bn2.weight.data = block.bn2.weight.data.double()
    return x


def float_norm_of_a_double_block(block: nn.Module, x: Tensor) -> Tensor:
    block.double()
    block.bn2.float()
    return x.double()


def no_downsample(block: nn.Module, x: Tensor) -> Tensor:
    block.downsample = None
    return x


def two_dimensions(block: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(1)


WRONG: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], type[Exception]]] = {
    "channels": (one_channel_more, ShapeError),
    "norm's width": (norm_of_another_width, ShapeError),
    "norm's dtype": (norm_of_another_dtype, DtypeError),
    "norm of two dtypes": (norm_of_two_dtypes, DtypeError),
    "float norm of a double block": (float_norm_of_a_double_block, DtypeError),
    "input's dtype": (lambda _, x: x.double(), DtypeError),
    "integers": (lambda _, x: x.long(), DtypeError),
    "shortcut's shape": (no_downsample, ShapeError),
    "dimensions": (two_dimensions, ShapeError),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", WRONG)
def test_errors_are_torchs_too(what: str, mode: str) -> None:
    alter, ours = WRONG[what]
    block, x, _ = stock_case(SMALL, mode=mode)
    x = alter(block, x)
    twin = fusedres.fuse(copy.deepcopy(block))
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    with pytest.raises(RuntimeError):
        block(x)
    with pytest.raises(ours) as raised:
        twin(x)
    assert isinstance(raised.value, RuntimeError)
    assert all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())


@pytest.mark.parametrize("what", ["norm's width", "norm's dtype", "norm of two dtypes", "shortcut's shape"])
def test_a_block_that_will_raise_is_reported(what: str) -> None:
    block, x, _ = stock_case(SMALL)
    WRONG[what][0](block, x)
    row = fusedres.report(fusedres.fuse(block))[0]
    assert not row.fused and row.reason.startswith("it raises: FusedBasicBlock: ")


@pytest.mark.parametrize("eps", [0, 0.0, -1.0])
def test_eps_that_is_not_positive(eps: float) -> None:
    block, x, _ = stock_case(SMALL)
    block.bn2.eps = eps
    twin = fusedres.fuse(copy.deepcopy(block))
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    for model in (block, twin):
        with pytest.raises(ValueError, match="eps must be positive during training"):
            model(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())


@pytest.mark.parametrize(("name", "value"), [("momentum", torch.tensor(0.2)), ("eps", torch.tensor(1e-3))], ids=str)
def test_numbers_that_are_tensors(name: str, value: Tensor) -> None:
    assert name in matches(lambda b: setattr(b.bn1, name, value), fused=False)


# --- tensors made in inference mode


@pytest.mark.parametrize("block_case", CORE[:2], ids=str)
def test_inference_tensors_outside_inference_mode(block_case: Case) -> None:
    """torch refuses to save or to write them. Its own error is raised, and fused blocks update no statistics."""
    ordinary_block, x, _ = stock_case(block_case)
    with torch.inference_mode():
        made, x = copy.deepcopy(ordinary_block), x.clone()
        twins = [fusedres.fuse(copy.deepcopy(made)) for _ in range(5)]
    assert twins[0].conv1.weight.is_inference()
    for train, wanted, context in (
        (True, True, torch.enable_grad),
        (True, False, torch.no_grad),
        (False, True, torch.enable_grad),
    ):
        twin = twins.pop().train(train)
        ordinary = torch.randn(x.shape, requires_grad=wanted)
        mean = twin.bn1.running_mean.clone()
        with context(), pytest.raises(RuntimeError, match=r"[Ii]nference"):
            twin(ordinary)
        assert torch.equal(twin.bn1.running_mean, mean)
    with torch.no_grad(), expect_paths(fused_forward=1):
        twins.pop().eval()(x)
    with torch.inference_mode(), expect_paths(fused_forward=1):
        twins.pop().train()(x)
    block = fusedres.fuse(stock_case(block_case)[0])
    mean = block.bn1.running_mean.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        block(x)
    assert torch.equal(block.bn1.running_mean, mean)

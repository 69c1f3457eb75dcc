"""fuse(), unfuse() and report() on the stem of a ResNet; which stems and calls run unfused, and why."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from fusion import expect_paths
from reference import randomize, run, set_mode
from stems import FUSED, NHWC, shape_of, stem, twin_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres

# --- fuse, unfuse, report


def test_names_of_the_report_and_the_filter() -> None:
    model = stem()[0]
    nest = nn.ModuleDict({"backbone": model, "other": nn.Linear(2, 2)})
    before = set(ResNet.__dict__), set(model.__dict__)
    fusedres.fuse(nest, filter=lambda name, _: name != "backbone")
    assert [tuple(row) for row in fusedres.report(nest)] == [("backbone stem", "stem", False, "not selected by fuse()")]
    fusedres.fuse(nest, memory="min", conv="fused")
    assert [tuple(row) for row in fusedres.report(nest)] == [("backbone stem", "stem", True, "")]
    assert type(model) is fusedres.FusedResNet and model.fused_conv == "measured"
    fusedres.unfuse(nest)
    assert type(model) is ResNet and (set(ResNet.__dict__), set(model.__dict__)) == before


def test_copies_and_files_are_fused_and_independent() -> None:
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    copies = copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), torch.load(file, weights_only=False)
    want = run(twin, x, grad)
    for copied in copies:
        assert type(copied) is fusedres.FusedResNet
        with expect_paths(**FUSED):
            got = run(copied, x, grad)
        assert all(torch.equal(value, got[name]) for name, value in want.items())
    again = stem()[0]
    again.load_state_dict(twin.state_dict(), strict=True)


def test_a_frozen_stem() -> None:
    model, x, _ = stem(mode="eval")
    twin = twin_of(model)
    with torch.no_grad():
        want = twin(x)
        fusedres.freeze(twin)
        with expect_paths(frozen_stem=1):
            got = twin(x)
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()
        twin.train().eval()
        with expect_paths(stem_forward=1):
            assert torch.equal(twin(x), want)


def test_a_subclass_and_a_forward_on_the_instance_are_left_alone() -> None:
    class Mine(ResNet):
        def _forward_impl(self, x: Tensor) -> Tensor:
            return x

    for name in ("forward", "_forward_impl"):
        model = stem()[0]
        setattr(model, name, lambda x: 2 * x)
        fusedres.fuse(model)
        assert type(model) is ResNet and "instance" in fusedres.report(model)[0].reason
    with torch.device("meta"):
        mine = Mine(BasicBlock, [1, 1, 1, 1])
    fusedres.fuse(mine)
    assert type(mine) is Mine and "Mine" in fusedres.report(mine)[0].reason


# --- what runs unfused


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Marked(Tensor):
    """A tensor subclass."""


def with_pool(**options: object) -> Callable[[nn.Module], object]:
    return lambda m: setattr(m, "maxpool", nn.MaxPool2d(**{"kernel_size": 3, "stride": 2, "padding": 1, **options}))


# Changes that make a stem unusual, and words that the reason must contain.
UNUSUAL: dict[str, tuple[Callable[[nn.Module], object], tuple[str, ...]]] = {
    "hook on conv1": (lambda m: m.conv1.register_forward_hook(lambda _, __, out: out * 2), ("hook", "conv1")),
    "hook on bn1": (lambda m: m.bn1.register_forward_pre_hook(lambda _, a: (a[0] + 1,)), ("hook", "bn1")),
    "hook on relu": (lambda m: m.relu.register_forward_hook(lambda _, __, out: out + 1), ("hook", "relu")),
    "hook on maxpool": (lambda m: m.maxpool.register_forward_hook(lambda _, __, out: out + 1), ("hook", "maxpool")),
    "average for maxpool": (lambda m: setattr(m, "maxpool", nn.AvgPool2d(3, 2, 1)), ("maxpool", "AvgPool2d")),
    "kernel of 2": (with_pool(kernel_size=2, padding=0), ("maxpool", "kernel_size")),
    "stride of 1": (with_pool(stride=1), ("maxpool", "stride")),
    "no padding": (with_pool(padding=0), ("maxpool", "padding")),
    "dilation": (with_pool(dilation=2), ("maxpool", "dilation")),
    "ceil_mode": (with_pool(ceil_mode=True), ("maxpool", "ceil_mode")),
    "conv bias": (lambda m: setattr(m, "conv1", nn.Conv2d(3, 19, 7, 2, 3)), ("conv1", "bias")),
    "group norm": (lambda m: setattr(m, "bn1", nn.GroupNorm(1, 19)), ("bn1", "GroupNorm")),
    "other activation": (lambda m: setattr(m, "relu", nn.LeakyReLU(0.1)), ("relu", "LeakyReLU")),
    "parametrized": (lambda m: parametrize.register_parametrization(m.conv1, "weight", Doubled()), ("parametriz",)),
    "instance forward": (lambda m: setattr(m.maxpool, "forward", lambda x: x[:, :, ::2]), ("maxpool", "forward")),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_stem_runs_unfused_with_identical_numbers(what: str, mode: str) -> None:
    alter, words = UNUSUAL[what]
    model, x, _ = stem(mode=mode)
    twin = twin_of(model)
    for each in (model, twin):
        torch.manual_seed(0)
        alter(each)
    (row,) = fusedres.report(twin)
    assert not row.fused
    assert all(word in row.reason for word in words), row.reason
    grad = torch.randn(shape_of(model, x))
    eager = run(model, x, grad)
    with expect_paths(stem_unfused=1):
        got = run(twin, x, grad)
    assert got.keys() == eager.keys()
    assert all(torch.equal(got[name], value) for name, value in eager.items())


def test_return_indices_are_a_reason() -> None:
    twin = twin_of(stem()[0])
    with_pool(return_indices=True)(twin)
    assert "return_indices" in fusedres.report(twin)[0].reason
    with_pool()(twin)
    assert fusedres.report(twin)[0].fused


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_stem_of_cifar_has_no_pool(mode: str) -> None:
    model = set_mode(randomize(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), 3).double(), mode)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False).double(), nn.Identity()
    twin = fusedres.fuse(copy.deepcopy(model))
    assert all(row.fused for row in fusedres.report(twin))
    x, grad = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    with expect_paths(fused_forward=5, fused_backward=5):
        got = run(twin, x, grad)
    for name, value in run(model, x, grad).items():
        torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-10)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-8, atol=1e-10)
    twin.maxpool.register_forward_hook(lambda *_: None)
    assert fusedres.report(twin)[0].reason == "a hook on maxpool"


def test_another_convolution_is_fine() -> None:
    """The convolution is CIFAR's 3x3 with stride 1, and has one input channel."""
    model, _, _ = stem(torch.float64)
    model.conv1 = nn.Conv2d(1, 19, 3, 1, 1, bias=False).double()
    x = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    twin = twin_of(model)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-10, atol=1e-11)


def test_calls_that_run_unfused() -> None:
    model, x, _ = stem(mode="eval")
    twin = twin_of(model)
    with expect_paths(stem_unfused=1):
        assert type(twin(x.as_subclass(Marked))) is Marked
    with expect_paths(stem_unfused=1):
        torch.testing.assert_close(torch.func.vmap(twin)(x[None]), model(x)[None])
    with expect_paths(stem_unfused=1):
        assert twin(x[:0]).shape == model(x[:0]).shape
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with expect_paths(stem_unfused=1):
            assert torch.equal(twin(x), model(x))
    finally:
        handle.remove()


def test_errors_come_before_anything_is_updated() -> None:
    model, x, _ = stem()
    twin = twin_of(model)
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    with pytest.raises(ValueError, match=r"FusedResNet: x must have 3 channels .*got shape .*; "):
        twin(x[:, :2])
    with pytest.raises(TypeError, match=r"FusedResNet: conv1.weight must be torch.float64 like x, got torch.float32; "):
        twin(x.double())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        twin(x[:1, :, :1, :1])
    assert all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())

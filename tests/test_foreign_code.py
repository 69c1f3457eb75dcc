"""If somebody replaces code of torch or torchvision, the replacement runs, and report() says what was replaced."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion import expect_paths, stock_case
from reference import run
from shapes import case
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres

SMALL = case("basic", "projection")
PATCHES: dict[str, tuple[Any, str]] = {
    "BasicBlock.forward": (BasicBlock, "forward"),
    "Conv2d.forward": (nn.Conv2d, "forward"),
    "Conv2d._conv_forward": (nn.Conv2d, "_conv_forward"),
    "Conv2d.__call__": (nn.Conv2d, "__call__"),
    "BatchNorm2d.forward": (nn.BatchNorm2d, "forward"),
    "BatchNorm2d._check_input_dim": (nn.BatchNorm2d, "_check_input_dim"),
    "_BatchNorm.forward": (nn.modules.batchnorm._BatchNorm, "forward"),
    "ReLU.forward": (nn.ReLU, "forward"),
    "Sequential.forward": (nn.Sequential, "forward"),
    "Module.__call__": (nn.Module, "__call__"),
    "Module._call_impl": (nn.Module, "_call_impl"),
    "functional.batch_norm": (nn.functional, "batch_norm"),
    "functional.conv2d": (nn.functional, "conv2d"),
    "functional.relu": (nn.functional, "relu"),
    "torch.batch_norm": (torch, "batch_norm"),
}


def wrapping(function: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def replacement(*args: Any, **options: Any) -> Any:
        seen.append("ran")
        out = function(*args, **options)
        return out * 1.5 if isinstance(out, Tensor) else out

    return replacement


@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("what", PATCHES)
def test_what_is_replaced_on_a_class_runs(what: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = PATCHES[what]
    block, x, grad = stock_case(SMALL, torch.float64)
    twin = copy.deepcopy(block)
    if not before:
        fusedres.fuse(twin)
        assert fusedres.report(twin)[0].fused
    seen: list[str] = []
    monkeypatch.setattr(owner, name, wrapping(getattr(owner, name), seen))
    fusedres.fuse(twin)
    (row,) = fusedres.report(twin)
    assert not row.fused
    assert name in row.reason and "replaced" in row.reason and __name__ in row.reason
    expected = run(block, x, grad)
    calls = len(seen)
    assert calls
    with expect_paths(unfused=1):
        got = run(twin, x, grad)
    assert len(seen) == 2 * calls
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    monkeypatch.undo()
    assert fusedres.report(twin)[0].fused
    with expect_paths(fused_forward=1, fused_backward=1):
        run(twin, x, grad)


SHADOWS: dict[str, Callable[[nn.Module], object]] = {
    "downsample is an attribute of the instance": lambda b: b.__dict__.update(downsample=lambda x: x.mean()),
    "relu is an attribute of the instance": lambda b: b.__dict__.update(relu=nn.functional.gelu),
}
SHADOWED_TENSORS: dict[str, Callable[[nn.Module], object]] = {
    "conv1.weight": lambda b: b.conv1.__dict__.update(weight=b.conv1.weight.detach() * 2),
    "bn2.bias": lambda b: b.bn2.__dict__.update(bias=b.bn2.bias.detach() + 1),
    "bn1.running_mean": lambda b: b.bn1.__dict__.update(running_mean=b.bn1.running_mean + 1),
}


def hiding(hide: Callable[[nn.Module], object], before: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a stock block and a fused one in which an attribute hides a part, and an input.

    If not before, the fused block has remembered a call with the hidden part.
    """
    block, x, _ = stock_case(SMALL, torch.float64, mode="eval")
    twin = copy.deepcopy(block)
    if not before:
        fusedres.fuse(twin)(x)
    for model in (block, twin):
        hide(model)
    return block, fusedres.fuse(twin), x


@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("what", SHADOWS)
def test_attributes_that_hide_parts(what: str, before: bool) -> None:
    """Python finds these attributes before the module's parts."""
    block, twin, x = hiding(SHADOWS[what], before)
    assert what in fusedres.report(twin)[0].reason
    with torch.no_grad(), expect_paths(unfused=1):
        assert torch.equal(twin(x), block(x))


@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("what", SHADOWED_TENSORS)
def test_attributes_that_hide_tensors(what: str, before: bool) -> None:
    """The fused block finds them first, too."""
    block, twin, x = hiding(SHADOWED_TENSORS[what], before)
    with torch.no_grad(), expect_paths(fused_forward=1):
        torch.testing.assert_close(twin(x), block(x), rtol=1e-9, atol=1e-9)


def test_a_class_attribute_that_hides_a_part() -> None:
    class Gelu(BasicBlock):
        relu = staticmethod(nn.functional.gelu)

    block = Gelu(4, 4).eval()
    x = torch.randn(2, 4, 5, 5)
    expected = block(x)
    assert "relu is an attribute of the class" in fusedres.report(fusedres.fuse(block))[0].reason
    assert torch.equal(block(x), expected)


def test_a_mode_that_sees_functions() -> None:
    class Twice(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            return out * 2 if function is nn.functional.conv2d else out

    block, x, _ = stock_case(SMALL, torch.float64, mode="eval")
    twin = fusedres.fuse(copy.deepcopy(block))
    with torch.no_grad(), Twice(), expect_paths(unfused=1):
        assert torch.equal(twin(x), block(x))
    with torch.no_grad(), torch.device("meta"), expect_paths(fused_forward=1):
        twin(x)


def test_a_class_that_refuses_subclasses_stays() -> None:
    class Final(BasicBlock):
        def __init_subclass__(cls, **options: Any) -> None:
            raise ValueError("final")

    block = fusedres.fuse(Final(4, 4))
    assert type(block) is Final
    assert "cannot be subclassed: final" in fusedres.report(block)[0].reason


@pytest.mark.parametrize("name", ["forward", "_forward_impl"])
@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
def test_a_resnets_own_method(name: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).double().eval()
    twin = copy.deepcopy(model)
    if not before:
        fusedres.fuse(twin)
    original = getattr(ResNet, name)
    monkeypatch.setattr(ResNet, name, lambda self, x: original(self, x) + 1)
    fusedres.fuse(twin)
    row = fusedres.report(twin)[0]
    assert row.kind == "stem" and not row.fused and f"ResNet.{name} is replaced" in row.reason
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with expect_paths(stem_unfused=1, fused_forward=4):
        got = twin(x)
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("before", [True, False], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize(
    ("child", "name"),
    [
        ("conv1", "forward"),
        ("conv2", "_conv_forward"),
        ("bn1", "_check_input_dim"),
        ("bn2", "_call_impl"),
        ("relu", "forward"),
        ("downsample", "forward"),
        ("downsample.1", "forward"),
        ("", "forward"),
        ("", "_call_impl"),
    ],
)
def test_what_is_replaced_on_an_instance_runs(child: str, name: str, before: bool) -> None:
    """It also runs if it calls the replaced function, as offloading libraries do."""
    block, x, grad = stock_case(SMALL, torch.float64)
    twin = copy.deepcopy(block)
    if not before:
        fusedres.fuse(twin)
    for model in (block, twin):
        target = model.get_submodule(child)
        setattr(target, name, wrapping(getattr(target, name), []))
    fusedres.fuse(twin)
    (row,) = fusedres.report(twin)
    assert not row.fused
    assert f"{child}.{name}".lstrip(".") in row.reason and "replaced on the instance" in row.reason
    expected, got = run(block, x, grad), run(twin, x, grad)
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_a_compiled_child_is_called() -> None:
    block, x, _ = stock_case(SMALL)
    fusedres.fuse(block)
    block.bn1.compile(backend="eager")
    assert "bn1._compiled_call_impl" in fusedres.report(block)[0].reason
    with expect_paths(unfused=1):
        block(x)


def test_a_bound_method_put_on_one_block_leaves_the_others_fused() -> None:
    model = fusedres.fuse(ResNet(BasicBlock, [2, 1, 1, 1]))
    chosen = model.layer1[1]
    chosen.forward = types.MethodType(lambda self, x: BasicBlock.forward(self, x) * 2, chosen)
    rows = {row.name: row.fused for row in fusedres.report(model)}
    assert [name for name, fused in rows.items() if not fused] == ["layer1.1"]
    with expect_paths(stem_forward=1, fused_forward=4):
        model.eval()(torch.randn(1, 3, 32, 32))


def test_what_was_replaced_before_the_import_is_seen() -> None:
    code = """
import torch, torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock
old = nn.BatchNorm2d.forward
nn.BatchNorm2d.forward = lambda self, x: old(self, x) + 1
import fusedres
block = fusedres.fuse(BasicBlock(4, 4)).eval()
stock = fusedres.unfuse(fusedres.fuse(BasicBlock(4, 4))).eval()
stock.load_state_dict(block.state_dict())
x = torch.randn(2, 4, 5, 5)
assert torch.equal(block(x), stock(x))
row = fusedres.report(block)[0]
assert not row.fused and "BatchNorm2d.forward is replaced by __main__" in row.reason, row
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- subclasses


class Tagged(BasicBlock):
    """A subclass that only adds something; it is fused."""

    tag = "mine"

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self(x)


class TaggedBottleneck(Bottleneck):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.note = 3


class Net(ResNet):
    def __init__(self) -> None:
        super().__init__(Tagged, [1, 1, 1, 1], num_classes=5)


class Scaled(BasicBlock):
    """A subclass with a forward of its own; it is not fused."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("make", [lambda: Tagged(8, 8), lambda: TaggedBottleneck(16, 4), Net])
def test_a_subclass_without_a_forward_of_its_own_is_fused(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    cls = type(model)
    channels = 3 if cls is Net else model.conv1.in_channels
    x = torch.randn(2, channels, 33, 33, dtype=torch.float64)
    twin = fusedres.fuse(copy.deepcopy(model))
    rows = fusedres.report(twin)
    assert rows and all(row.fused for row in rows), rows
    assert isinstance(twin, cls) and type(twin) is not cls
    copies = [copy.deepcopy(twin)]
    for each in (twin, *copies):
        torch.testing.assert_close(each(x), model(x), rtol=1e-9, atol=1e-9)
    assert type(fusedres.unfuse(twin)) is cls
    assert type(fusedres.fuse(twin)) is type(copies[0])


def test_a_fused_subclass_is_pickled(tmp_path: Any) -> None:
    for model in (Net(), Tagged(8, 8)):
        fusedres.fuse(model)
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(again) is type(model) and all(row.fused for row in fusedres.report(again))
    assert again.twice(torch.ones(1, 8, 3, 3).expand(2, 8, 3, 3)).shape == (2, 8, 3, 3)


def test_a_subclass_with_a_forward_of_its_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    block, tagged = fusedres.fuse(Scaled(4, 4)), fusedres.fuse(Tagged(4, 4))
    assert type(block) is Scaled
    assert "Scaled is a subclass with a forward of its own" in fusedres.report(block)[0].reason
    monkeypatch.setattr(Tagged, "forward", Scaled.forward, raising=False)
    assert "Tagged.forward is replaced" in fusedres.report(tagged)[0].reason


def test_a_users_subclass_of_a_fused_class() -> None:
    class Mine(fusedres.FusedBasicBlock):
        pass

    class Own(fusedres.FusedBasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    assert fusedres.report(Mine(4, 4))[0].fused
    assert "forward of its own" in fusedres.report(Own(4, 4))[0].reason
    assert type(fusedres.unfuse(Mine(4, 4))) is Mine

"""Blocks of convolutions and tails: YOLO's, iresnet's and others, registered; the same numbers, uses and reasons."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from foreign import ConvAct, ConvActs, IBasicBlock, PreActivated
from fusion import BACKENDS, FORMATS, expect_paths, label
from reference import randomize, run
from tolerance import check_model
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

import fusedres
from fusedres.modules.families import read_tails


class NormAct(Conv2dNormActivation):
    """A class of torchvision that has no forward of its own, but that of nn.Sequential."""


for _cls in (ConvAct, ConvActs, IBasicBlock, PreActivated, NormAct):
    fusedres.register(_cls)

BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # a block, and how many tails it has
    "convolution": (lambda: ConvAct(6, 16), 1),
    "convolution without activation": (lambda: ConvAct(6, 9, act=nn.Identity()), 1),
    "bottleneck": (lambda: ConvActs(16, 16), 2),
    "bottleneck without sum": (lambda: ConvActs(6, 16), 2),
    "iresnet": (lambda: IBasicBlock(6, 6), 3),
    "iresnet projection": (lambda: IBasicBlock(6, 16, 2), 3),
    "pre-activation": (lambda: PreActivated(6), 2),
    "torchvision": (lambda: NormAct(6, 9, activation_layer=nn.Hardswish), 1),
}


def stock(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    block = randomize(BLOCKS[name][0](), 5).to(dtype)
    generator = torch.Generator().manual_seed(3)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(3, channels, 8, 6, generator=generator, dtype=torch.float64).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        shape = copy.deepcopy(block).eval()(x).shape
    return block, x, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def fused(block: nn.Module) -> nn.Module:
    twin = fusedres.fuse(copy.deepcopy(block))
    rows = fusedres.report(twin)
    assert rows and all(row.fused for row in rows), rows
    return twin


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=label)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_same_numbers(
    name: str, training: bool, dtype: torch.dtype, memory_format: torch.memory_format, backend: str
) -> None:
    block, x, grad = stock(name, dtype)
    block.train(training)
    x = x.to(memory_format=memory_format)
    twin, tails = fused(block), BLOCKS[name][1]
    with fusedres.use_backend(backend), expect_paths(tail_forward=tails, tail_backward=tails):
        got = run(twin, x, grad)
    eager = run(copy.deepcopy(block), x, grad)
    assert got["out"].stride() == eager["out"].stride()
    assert got["grad_x"].stride() == eager["grad_x"].stride()
    truth = run(copy.deepcopy(block).double(), x.double(), grad.double())
    if dtype is torch.bfloat16:  # rounding decides some masks
        assert (got["out"] - truth["out"]).norm() <= 1.5 * (eager["out"] - truth["out"]).norm()
        assert {name: value.dtype for name, value in got.items()} == {name: v.dtype for name, v in eager.items()}
    else:
        check_model(got, eager, truth, dtype, name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradcheck_and_second_derivatives(name: str, training: bool) -> None:
    block, x, _ = stock(name, torch.float64)
    twin = fused(block.train(training))
    parameters = [p for p in twin.parameters() if p.dim() == 1]
    x = x[:2, :, :4, :3].clone().requires_grad_()
    function: Callable[..., Tensor] = lambda x, *_: twin(x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *parameters))
    found = []
    for each in (block, twin):
        source = x.detach().requires_grad_()
        first = torch.autograd.grad(each(source).sin().sum(), (source, *each.parameters()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (source, *each.parameters())))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast(name: str) -> None:
    """Convolutions make bfloat16 of float32, which meets float32 parameters of BatchNorm, or autocast decides."""
    block, x, grad = stock(name)
    twin = fused(block)
    eager, got = (run(copy.deepcopy(each), x, grad, autocast=torch.bfloat16) for each in (block, twin))
    truth = run(copy.deepcopy(block).double(), x.double(), grad.double())
    assert {name: value.dtype for name, value in got.items()} == {name: v.dtype for name, v in eager.items()}
    assert (got["out"] - truth["out"]).norm() <= 1.5 * (eager["out"] - truth["out"]).norm()
    assert (got["grad_x"] - truth["grad_x"]).norm() <= 1.5 * (eager["grad_x"] - truth["grad_x"]).norm()


@pytest.mark.parametrize("name", BLOCKS)
def test_copies_pickles_and_unfuse(name: str) -> None:
    block, x, grad = stock(name)
    cls, keys = type(block), set(block.__dict__)
    twin = fused(block)
    assert isinstance(twin, cls) and type(twin) is not cls
    assert list(twin.state_dict()) == list(block.state_dict())
    twin.load_state_dict(block.state_dict())
    expected = run(copy.deepcopy(twin), x, grad)
    for other in (copy.deepcopy(twin), copy.copy(twin), pickle.loads(pickle.dumps(twin)), fusedres.fuse(twin)):
        assert all(row.fused for row in fusedres.report(other))
        assert type(other) is type(twin)
        found = run(copy.deepcopy(other), x, grad)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    fusedres.unfuse(twin)
    assert type(twin) is cls and set(twin.__dict__) == keys
    assert not any(row.fused for row in fusedres.report(twin))


def test_hooks() -> None:
    """One on the block or a convolution runs; one on a norm, an activation or a module in between is a reason."""
    block, x, _ = stock("bottleneck")
    twin, seen = fused(block), []
    expected = block(x)
    for path, reason, paths in (
        ("", "", {"tail_forward": 2}),
        ("cv2.conv", "", {"tail_forward": 2}),
        ("cv1.bn", "a hook on cv1.bn", {"tail_forward": 1, "tail_unfused": 1}),
        ("cv2", "a hook on cv2", {"unfused": 1, "tail_forward": 2}),  # the stock forward calls fused children
    ):
        handle = twin.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
        assert fusedres.report(twin)[0].reason == reason
        with expect_paths(**paths):
            torch.testing.assert_close(twin(x), expected)
        assert seen == [path]
        handle.remove()
        seen.clear()
    handle = twin.cv1.act.register_forward_hook(lambda *_: seen.append("act"))
    try:
        assert fusedres.report(twin)[0].reason == "a hook on cv1.act"
        with expect_paths(tail_unfused=2):
            twin(x)
        assert seen == ["act", "act"]
    finally:
        handle.remove()
    assert fusedres.report(twin)[0].fused


def without_norm(block: nn.Module) -> None:
    del block.cv1.bn
    block.cv1.forward = block.cv1.forward_fuse


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "no sum": (lambda b: setattr(b, "add", False), "add was True when fuse() read the block, and has changed"),
    "unknown activation": (lambda b: setattr(b.cv1, "act", nn.Mish()), "there is no kernel for Mish()"),
    "other norm": (lambda b: setattr(b.cv2, "bn", nn.GroupNorm(4, 16)), "there is no kernel for GroupNorm"),
    "folded norm": (without_norm, "cv1 has changed: call fuse() again"),
    "replaced forward": (lambda b: setattr(b, "forward", lambda x: x), "forward is replaced on the instance"),
    "added child": (lambda b: b.cv2.add_module("more", nn.ReLU()), "cv2 has changed: call fuse() again"),
    "hidden child": (
        lambda b: b.__dict__.update(cv2=lambda x: torch.cat((x, x), 1)),
        "cv2 is an attribute of the instance, not a module",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_fuse_is_seen(change: str) -> None:
    block, x, grad = stock("bottleneck")
    twin = fused(block)
    fusedres.unfuse(twin.cv1), fusedres.unfuse(twin.cv2)  # what the bottleneck says, not its convolutions
    for each in (block, twin):
        CHANGES[change][0](each)
    row = fusedres.report(twin)[0]
    assert row.name == "(model)" and not row.fused and CHANGES[change][1] in row.reason
    got, expected = run(twin, x, grad), run(block, x, grad)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-5)


def test_another_activation_that_has_a_kernel_runs_fused() -> None:
    block, x, _ = stock("convolution")
    twin = fused(block)
    block.act = twin.act = nn.GELU()
    with expect_paths(tail_forward=1):
        torch.testing.assert_close(twin(x), block(x))


def test_replaced_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _ = stock("bottleneck")
    twin = fused(block)
    for owner, name in ((nn.BatchNorm2d, "forward"), (nn.SiLU, "forward"), (ConvAct, "forward"), (ConvActs, "forward")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, x, original=original: 2 * original(self, x))
        assert f"{owner.__name__}.forward is replaced" in fusedres.report(twin)[0].reason
        torch.testing.assert_close(twin(x), block(x))
        monkeypatch.undo()
    assert fusedres.report(twin)[0].fused


def test_inputs_that_run_unfused() -> None:
    """The numbers, or the error, are torch's; report() says why the last input ran unfused."""
    block, x, _ = stock("iresnet")
    twin = fused(block)
    with expect_paths(unfused=1):
        torch.testing.assert_close(twin(x=x), block(x=x))
    assert "by name" in fusedres.report(twin)[0].reason
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        twin(x[:1, :, :1, :1])
    with pytest.raises(RuntimeError):
        twin(x[:, :2])
    for each in (block, twin):
        each.eval()
    with torch.autocast("cpu", torch.bfloat16), expect_paths(tail_forward=1, tail_unfused=2):
        twin(x)  # the sum in place is one of bfloat16 and float32
    assert fusedres.report(twin)[0].reason == "its last input ran unfused: autocast chooses the dtype of PReLU"
    with expect_paths(tail_forward=3), torch.no_grad():
        torch.testing.assert_close(twin(x), block(x))
    assert fusedres.report(twin)[0].fused


def test_contiguous_tensors_run_fused_where_that_is_asked_for() -> None:
    block, x, _ = stock("bottleneck")
    x = x.contiguous()
    twin = fused(block)
    with expect_paths(tail_unfused=2):
        torch.testing.assert_close(twin(x), block(x))
    assert "not channels_last" in fusedres.report(twin)[0].reason
    fusedres.fuse(twin, memory="min")
    with expect_paths(tail_forward=2):
        assert twin(x).is_contiguous()
    fusedres.fuse(twin)
    with expect_paths(tail_forward=2), fusedres.use_backend("cpu"):
        twin(x)


def test_a_shortcut_of_another_shape_is_broadcast_as_in_torch() -> None:
    block, x, _ = stock("iresnet projection")
    block.downsample = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 16, 1))
    twin = fused(block)
    with expect_paths(tail_forward=2, tail_unfused=1):
        torch.testing.assert_close(twin(x), block(x))


@pytest.mark.parametrize("name", ["bottleneck", "iresnet projection"])
def test_compiled_and_traced(name: str) -> None:
    block, x, _ = stock(name)
    twin = fused(block)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(twin), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), copy.deepcopy(block)(x))
    traced = torch.jit.trace(twin.eval(), x)
    torch.testing.assert_close(traced(x), block.eval()(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(twin)(x), block(x))
    torch.testing.assert_close(torch.export.export(twin, (x,)).module()(x), block(x))


def in_place_on_input(self: ConvAct, x: Tensor) -> Tensor:
    x += self.bn(self.conv(x))
    return x


def norm_twice(self: ConvAct, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)) + self.bn(self.conv(x))


def overwritten(self: ConvAct, x: Tensor) -> Tensor:
    h = self.bn(self.conv(x))
    return self.act(h) + h


def pooled(self: ConvAct, x: Tensor) -> Tensor:
    return self.act(self.bn(self.conv(x))).mean((2, 3))


@pytest.mark.parametrize("forward", [in_place_on_input, norm_twice, overwritten, pooled], ids=lambda f: f.__name__)
def test_forwards_that_are_no_tails_stay_as_they_are(forward: Callable[[ConvAct, Tensor], Tensor]) -> None:
    cls = fusedres.register(type("Mine", (ConvAct,), {"forward": forward}))
    block = cls(4, 4)
    with pytest.warns(UserWarning, match="nothing in Mine was changed"):
        fusedres.fuse(block)
    assert type(block) is cls
    with pytest.raises(ValueError, match=r"register: .*Mine must compute"):
        fusedres.register(block)


def test_values_that_are_read_twice_are_no_parts_of_a_tail() -> None:
    def forward(self: ConvAct, x: Tensor) -> Tensor:
        h = self.bn(self.conv(x))
        return torch.relu(h) + h

    block = fusedres.register(type("Mine", (ConvAct,), {"forward": forward}))(4, 4)
    twin = fused(block)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    with expect_paths(tail_forward=1):
        torch.testing.assert_close(twin(x), block(x))


def test_two_activated_norms_are_summed_by_the_last() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = ConvAct(4, 4), ConvAct(4, 4)
            self.last = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.a(x) + self.b(x))

    block = fusedres.register(Two)()
    twin = fused(block)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    with expect_paths(tail_forward=2):
        torch.testing.assert_close(twin(x), block(x))


class _TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)) + self.bn2(self.conv2(x))


def test_a_norm_with_two_names_is_not_read():
    """Its running statistics depend on the order of its two uses, which a tail does not keep."""
    assert read_tails(_TwoNorms()) == "its forward uses bn2 twice"

"""Blocks of other classes, registered: same numbers as unfused, everything that users do around them, and reasons."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from foreign import Blurred, ConvLayer, Named, Nested, Shortcut
from fusion import BACKENDS, FORMATS, MEMORY, expect_paths, label
from reference import Values, randomize, run
from tolerance import check_model
from torch import Tensor, nn

import fusedres

CLASSES = (Shortcut, Named, Nested, Blurred)
for _cls in CLASSES:
    fusedres.register(_cls)


def named_projection() -> nn.Module:
    return nn.Sequential(nn.Conv2d(5, 16, 1, 2, bias=False), nn.BatchNorm2d(16))


def pooled_shortcut() -> nn.Module:
    block = Shortcut(6, 6)
    block.shortcut = nn.AvgPool2d(3, 1, 1)
    return block


BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # a block, and in how many parts it runs
    "functional": (lambda: Shortcut(6, 6), 1),
    "functional projection": (lambda: Shortcut(6, 9, 2), 1),
    "named": (lambda: Named(16, 4), 1),
    "named projection": (lambda: Named(5, 4, 2, named_projection()), 1),
    "zero-padded": (lambda: Named(6, 4, 2, fusedres.ZeroPadShortcut(6, 16, 2)), 1),
    "nested": (lambda: Nested(6, 6), 1),
    "nested projection": (lambda: Nested(6, 9, 2), 1),
    "blurred": (lambda: Blurred(6, 9), 2),
    "three units, blurred": (lambda: Blurred(6, 9, 3), 2),
    "pooled shortcut": (pooled_shortcut, 1),
}


def stock(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    block = randomize(BLOCKS[name][0](), 5).to(dtype)
    generator = torch.Generator().manual_seed(3)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(3, channels, 7, 6, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        shape = copy.deepcopy(block).eval()(x).shape
    return block, x, torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def fused(block: nn.Module, memory: str = "auto") -> nn.Module:
    twin = fusedres.fuse(copy.deepcopy(block), memory=memory)
    assert fusedres.report(twin)[0].fused, fusedres.report(twin)
    return twin


def exact(block: nn.Module, x: Tensor, grad: Tensor) -> Values:
    return run(copy.deepcopy(block).double(), x.double(), grad.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=label)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_same_numbers(
    name: str, training: bool, dtype: torch.dtype, memory_format: torch.memory_format, memory: str, backend: str
) -> None:
    block, x, grad = stock(name, dtype)
    block.train(training)
    x = x.to(memory_format=memory_format)
    twin, parts = fused(block, memory), BLOCKS[name][1]
    with fusedres.use_backend(backend), expect_paths(fused_forward=parts, fused_backward=parts):
        got = run(twin, x, grad)
    eager = run(copy.deepcopy(block), x, grad)
    assert got["out"].stride() == eager["out"].stride()
    assert got["grad_x"].stride() == eager["grad_x"].stride()
    truth = exact(block, x, grad)
    if dtype is torch.bfloat16:  # rounding decides some ReLU masks, and so gradients
        assert (got["out"] - truth["out"]).norm() <= 1.5 * (eager["out"] - truth["out"]).norm()
        assert {name: value.dtype for name, value in got.items()} == {name: v.dtype for name, v in eager.items()}
    else:
        check_model(got, eager, truth, dtype, name)


@pytest.mark.parametrize("name", BLOCKS)
def test_inference_and_frozen_inference(name: str) -> None:
    block, x, _ = stock(name)
    twin = fused(block.eval())
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(twin(x), expected)
        fusedres.freeze(twin)
        for _ in range(2):
            with expect_paths(frozen_forward=BLOCKS[name][1]):
                torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradcheck_and_second_derivatives(name: str, training: bool) -> None:
    block, x, _ = stock(name, torch.float64)
    twin, parameters = fused(block.train(training)), []
    parameters = [p for p in twin.parameters() if p.dim() == 1]  # convolutions are checked by the numbers above
    x = x[:2, :, :4, :3].clone().requires_grad_()
    function: Callable[..., Tensor] = lambda x, *_: twin(x)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, *parameters))
    once = torch.autograd.grad(twin(x).sin().sum(), (x, *parameters))
    again = torch.autograd.grad(twin(x).sin().sum(), (x, *parameters), create_graph=True)
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-9)
    twice = torch.autograd.grad(sum(g.square().sum() for g in again), x)[0]
    source = x.detach().requires_grad_()
    stock_grads = torch.autograd.grad(
        block(source).sin().sum(),
        (source, *(p for p in block.parameters() if p.dim() == 1)),
        create_graph=True,
    )
    expected = torch.autograd.grad(sum(g.square().sum() for g in stock_grads), source)[0]
    torch.testing.assert_close(twice, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", BLOCKS)
def test_any_input_or_parameter_may_want_no_gradient(name: str) -> None:
    block, x, grad = stock(name, torch.float64)
    twin = fused(block)
    for wanted in ["x", *dict(block.named_parameters())]:
        results = []
        for each in (block, twin):
            for parameter_name, parameter in each.named_parameters():
                parameter.requires_grad_(parameter_name == wanted)
                parameter.grad = None
            source = x.clone().requires_grad_(wanted == "x")
            each(source).backward(grad)
            results.append([source.grad, *(p.grad for p in each.parameters())])
        for got, expected in zip(results[1], results[0], strict=True):
            assert (got is None) == (expected is None), wanted
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["functional projection", "named projection", "nested", "blurred"])
def test_compiled_whole(name: str) -> None:
    block, x, grad = stock(name)
    twin = fused(block)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected = run(copy.deepcopy(twin), x, grad)
    source = x.clone().requires_grad_()
    out = compiled(source)
    out.backward(grad)
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(source.grad, expected["grad_x"])


@pytest.mark.parametrize("name", BLOCKS)
def test_copies_pickles_and_unfuse(name: str) -> None:
    block, x, grad = stock(name)
    cls = type(block)
    twin = fused(block)
    assert isinstance(twin, cls)
    assert list(twin.state_dict()) == list(block.state_dict())
    expected = run(copy.deepcopy(twin), x, grad)
    for other in (copy.deepcopy(twin), copy.copy(twin), pickle.loads(pickle.dumps(twin))):
        assert fusedres.report(other)[0].fused
        assert type(other) is type(twin)
        found = run(copy.deepcopy(other), x, grad)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    keys = set(block.__dict__)
    fusedres.unfuse(twin)
    assert type(twin) is cls and set(twin.__dict__) == keys


def test_a_hook_on_the_block_runs_and_one_on_a_part_keeps_it_unfused() -> None:
    block, x, _ = stock("nested projection")
    seen: list[str] = []
    block.register_forward_hook(lambda *_: seen.append("block"))
    twin = fused(block)
    twin(x)
    assert seen == ["block"]
    for path in ("layer", "layer.0", "layer.0.convolution", "layer.1.activation", "shortcut"):
        handle = twin.get_submodule(path).register_forward_hook(lambda *_: seen.append("part"))
        (row,) = fusedres.report(twin)
        assert not row.fused and row.reason == f"a hook on {path}"
        with expect_paths(unfused=1):
            twin(x)
        assert seen[-2:] == ["part", "block"]
        handle.remove()
    with expect_paths(fused_forward=1):
        twin(x)


def with_other_activation(block: nn.Module) -> None:
    block.activation = nn.SiLU()


def with_another_child(block: nn.Module) -> None:
    block.layer.append(nn.ReLU())


def with_another_shortcut(block: nn.Module) -> None:
    block.shortcut = ConvLayer(6, 9, 1, 2)


def with_dropout(block: nn.Module) -> None:
    block.layer[1].activation = nn.Dropout(0.5)


def with_another_class(block: nn.Module) -> None:
    block.shortcut.__class__ = type("Other", (ConvLayer,), {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_other_activation, "activation is a SiLU"),
        (with_another_child, "layer has changed"),
        (with_another_shortcut, "shortcut.activation is a ReLU"),
        (with_dropout, "drops values in training"),
        (with_another_class, "shortcut has changed"),
    ],
)
def test_what_changes_after_fuse_is_seen(change: Callable[[nn.Module], None], reason: str) -> None:
    block, x, grad = stock("nested projection")
    twin = fused(block)
    for each in (block, twin):
        change(randomize(each, 5))
        randomize(each, 5)
    (row,) = fusedres.report(twin)
    assert not row.fused and reason in row.reason
    with expect_paths(unfused=1):
        torch.manual_seed(1)
        got = run(twin, x, grad)
    torch.manual_seed(1)
    expected = run(block, x, grad)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_attributes_that_the_forward_reads_are_conditions() -> None:
    """They are compared at each call; another value runs the stock forward until fuse() has read the block again."""
    block, x, grad = stock("named")
    twin = fused(block)
    twin.with_cp = True
    (row,) = fusedres.report(twin)
    assert not row.fused and row.reason.startswith("with_cp was False")
    with expect_paths(unfused=1):
        run(twin, x, grad)
    twin.with_cp = False
    assert fusedres.report(twin)[0].fused
    twin.bn4 = twin.bn1
    twin.norm1_name = "bn4"
    assert not fusedres.report(twin)[0].fused
    assert fusedres.report(fusedres.fuse(twin))[0].fused
    with expect_paths(fused_forward=1, fused_backward=1):
        run(twin, x, grad)
    twin.drop_path = nn.Dropout(0.3)
    twin.norm1_name = "bn1"
    fusedres.fuse(twin)
    assert fusedres.report(twin)[0].reason == "drop_path (a Dropout) drops values in training"
    assert fusedres.report(twin.eval())[0].fused


def test_a_replaced_forward_of_the_class_or_of_a_container_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _ = stock("nested")
    twin = fused(block)
    for cls in (Nested, ConvLayer):
        original = cls.forward
        monkeypatch.setattr(cls, "forward", lambda self, x, original=original: 2 * original(self, x))
        (row,) = fusedres.report(twin)
        assert not row.fused and f"{cls.__qualname__}.forward is replaced" in row.reason
        with expect_paths(unfused=1):
            assert torch.equal(twin(x), block(x))
        monkeypatch.undo()
    assert fusedres.report(twin)[0].fused


def test_a_call_by_name_runs_the_stock_forward() -> None:
    block, x, _ = stock("functional")
    twin = fused(block)
    with expect_paths(unfused=1):
        assert torch.equal(twin(x=x), block(x))
    assert (
        fusedres.report(twin)[0].reason
        == "its last input ran unfused: it was called with more than one input, or by name"
    )

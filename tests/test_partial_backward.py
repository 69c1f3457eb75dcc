"""Backward computes only the gradients that are asked for, e.g. those of the input or of one parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres
from fusedres import _C

Ask = Callable[[nn.Module, Tensor], list[Tensor | None]]


def of_input(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    return [*torch.autograd.grad(model(x).sum(), x)]


def of(*names: str) -> Ask:
    def ask(model: nn.Module, x: Tensor) -> list[Tensor | None]:
        return [*torch.autograd.grad(model(x).square().sum(), [model.get_parameter(name) for name in names])]

    return ask


def of_input_and(*names: str) -> Ask:
    def ask(model: nn.Module, x: Tensor) -> list[Tensor | None]:
        wanted = [x, *(model.get_parameter(name) for name in names)]
        return [*torch.autograd.grad(model(x).square().sum(), wanted)]

    return ask


def saliency(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    scores = model(x)
    scores[0, int(scores[0].argmax())].backward(inputs=[x])
    return [x.grad, *(p.grad for p in model.parameters())]


def attack(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    step = x.detach().clone().requires_grad_()
    for _ in range(2):
        (grad,) = torch.autograd.grad(model(step).logsumexp(1).sum(), step)
        step = (step + 0.01 * grad.sign()).detach().requires_grad_()
    return [grad]


def backward_of_one(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    chosen = model.layer3[0].conv1.weight  # type: ignore[index, union-attr]
    model(x).square().sum().backward(inputs=[chosen])
    return [chosen.grad, *(p.grad for p in model.parameters())]


def frozen_layers(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layer4", "fc")))
    model(x.detach()).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.requires_grad_(True)
    return found


def of_a_feature(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Return the gradient of an inner activation, as class activation maps use it."""
    kept: list[Tensor] = []
    handle = model.layer2.register_forward_hook(lambda *args: kept.append(args[-1]))  # type: ignore[union-attr]
    scores = model(x)
    handle.remove()
    return [*torch.autograd.grad(scores[:, 0].sum(), kept)]


def everything(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


CALLS: dict[str, Ask] = {
    "input": of_input,
    "saliency": saliency,
    "attack": attack,
    "first convolution": of("conv1.weight"),
    "an inner convolution": of("layer2.0.conv2.weight"),
    "a projection": of("layer3.0.downsample.0.weight"),
    "a norm": of("layer1.0.bn1.weight"),
    "a projection's norm": of("layer4.0.downsample.1.bias"),
    "several": of("layer2.0.bn2.bias", "layer4.0.conv1.weight", "fc.weight"),
    "input and a convolution": of_input_and("layer4.0.conv2.weight"),
    "backward of one": backward_of_one,
    "frozen layers": frozen_layers,
    "a feature": of_a_feature,
    "everything": everything,
}


@pytest.fixture(scope="module", params=[BasicBlock, Bottleneck], ids=["BasicBlock", "Bottleneck"])
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = ResNet(request.param, [1, 1, 1, 1], num_classes=5).double().to(memory_format=torch.channels_last)
    return model, fusedres.fuse(copy.deepcopy(model))


def projected() -> nn.Module:
    """Return a Bottleneck; with memory="min" its last convolution and its projection are one-pass units."""
    torch.manual_seed(0)
    downsample = nn.Sequential(nn.Conv2d(12, 64, 1, 2, bias=False), nn.BatchNorm2d(64))
    return Bottleneck(12, 16, 2, downsample)


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of backward passes."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch._C._current_graph_task_id() != -1 and func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def counted(model: nn.Module, ask: Ask) -> tuple[list[Tensor | None], int]:
    """Return the gradients, and the number of operations of backward."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64, generator=generator).to(memory_format=torch.channels_last)
    with Operations() as counter:
        grads = ask(model, x.requires_grad_())
    return grads, counter.total


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", CALLS)
def test_gradients_and_operations_are_eagers(models: tuple[nn.Module, nn.Module], what: str, mode: str) -> None:
    stock, fused = (model.train(mode == "train") for model in models)
    expected, operations = counted(stock, CALLS[what])
    got, spent = counted(fused, CALLS[what])
    assert len(got) == len(expected)
    for index, (grad, value) in enumerate(zip(got, expected, strict=True)):
        assert (grad is None) == (value is None), index
        if value is not None:
            torch.testing.assert_close(grad, value, rtol=1e-7, atol=1e-9 * value.abs().max().item(), msg=str(index))
    assert spent <= 1.02 * operations, f"{what}: {spent} operations, eager {operations}"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("conv", ["library", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [BasicBlock(8, 8), Bottleneck(16, 4), projected()], ids=lambda b: type(b).__name__)
def test_every_parameter_alone(block: nn.Module, dtype: torch.dtype, conv: str, backend: str) -> None:
    """With the passes of every backend, and with memory="min", it equals the gradient from a full backward."""
    block = copy.deepcopy(block).to(dtype)
    tolerance = {"rtol": 1e-8, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for memory in ("auto", "min"):
        twin = fusedres.fuse(copy.deepcopy(block), memory=memory, conv=conv)
        x = torch.randn(8, block.conv1.in_channels, 6, 6, dtype=dtype, requires_grad=True)
        wanted = {"x": x, **dict(twin.named_parameters())}
        with fusedres.use_backend(backend):
            whole = torch.autograd.grad(twin(x).square().sum(), list(wanted.values()))
            for (name, tensor), value in zip(wanted.items(), whole, strict=True):
                (alone,) = torch.autograd.grad(twin(x).square().sum(), tensor)
                torch.testing.assert_close(alone, value, **tolerance, msg=f"{memory} {name}")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("conv3.weight", [False]), ("bn3.bias", [False]), ("downsample.0.weight", [False]), ("conv1.weight", [True]),
     ("x", [True, True])],
)  # fmt: skip
def test_one_pass_units_form_no_gradient_that_leads_nowhere(name: str, wanted: list[bool]) -> None:
    """The gradient of a convolution's input takes two of the three products; it is formed only if it is used."""
    block = fusedres.fuse(projected(), memory="min")
    asked = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.fusedres.one_pass_backward.default:
                asked.append(args[-2])
            return func(*args, **(kwargs or {}))

    def backward() -> Tensor:
        x = torch.randn(8, 12, 12, 12, generator=torch.Generator().manual_seed(0)).requires_grad_(name == "x")
        loss = block(x).square().sum()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            (grad,) = torch.autograd.grad(loss, x if name == "x" else block.get_parameter(name))
        products.append(sum(event.name == "aten::_convolution" for event in profiled.events()))
        return grad

    products: list[int] = []
    plain = backward()  # in C++, if torch has the functions that this needs
    with Asked():
        torch.testing.assert_close(backward(), plain)
    own = _C.build_info()["isa_used"] == "avx2"  # then torch's profiler sees no convolution in C++
    assert asked == wanted and products[0] == (0 if own else sum(wanted)), (asked, products)


def test_nothing_that_was_not_asked_for_is_accumulated(models: tuple[nn.Module, nn.Module]) -> None:
    fused = models[1].train()
    fused.zero_grad(set_to_none=True)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    fused(x).sum().backward(inputs=[x])
    assert x.grad is not None and all(p.grad is None for p in fused.parameters())


def test_a_retained_graph_asked_for_one_after_another(models: tuple[nn.Module, nn.Module]) -> None:
    stock, fused = (model.train() for model in models)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    results = []
    for model in (stock, fused):
        leaf = x.clone().requires_grad_()
        loss = model(leaf).square().sum()
        parameters = [leaf, *model.parameters()]
        results.append([torch.autograd.grad(loss, p, retain_graph=True)[0] for p in parameters])
    for got, value in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, value, rtol=1e-7, atol=1e-9 * value.abs().max().item())


def test_checkpointed_blocks_give_all_gradients(models: tuple[nn.Module, nn.Module]) -> None:
    """A reentrant checkpoint runs a backward of its own inside the outer one."""
    models[1].load_state_dict(models[0].state_dict())
    for reentrant in (True, False):
        grads = []
        for model in models:
            block = model.eval().layer1[0]  # type: ignore[index, union-attr]
            model.zero_grad(set_to_none=True)
            x = torch.linspace(-1, 1, 2 * 64 * 36, dtype=torch.float64).view(2, 64, 6, 6).requires_grad_()
            checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
            grads.append([x.grad, *(p.grad for p in block.parameters())])
        for got, value in zip(*grads, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-9)

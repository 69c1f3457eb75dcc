"""A failed step leaves nothing broken: no half-overwritten tensors that a second backward reads, and no half-updated
statistics."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion import stock_case
from reference import run
from shapes import CORE, case
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres.autograd import cpu_passes
from fusedres.autograd import stem as stem_passes
from fusedres.autograd.backward import Backward
from fusedres.ops.launch import launches

AGAIN = "backward through the graph a second time"


class OutOfMemoryError(RuntimeError):
    """The error that an allocation in the middle of the passes raises."""


def failing(after: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a failure at call number `after`."""
    calls = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            raise OutOfMemoryError("no memory left")
        return function(*args, **options)

    return call


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("memory", ["auto", "min"])
@pytest.mark.parametrize(("backend", "conv"), [("cpu", "library"), ("reference", "library"), ("reference", "fused")])
def test_a_backward_that_failed_cannot_be_called_again(
    backend: str, conv: str, memory: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_passes, "backward", lambda *_: None)  # use the passes in Python, which a test can make fail
    block, x, grad = stock_case(case("bottleneck", "projection", planes=4, batch=8), torch.float64)
    twin = fusedres.fuse(copy.deepcopy(block), memory=memory, conv=conv)
    with fusedres.use_backend(backend):
        out = twin(x.requires_grad_())
        with monkeypatch.context() as patch:
            patch.setattr(Backward, "_convolution", failing(after, Backward._convolution))
            with pytest.raises(OutOfMemoryError):
                out.backward(grad)
        with pytest.raises(RuntimeError, match=AGAIN):
            out.backward(grad)
        # The tensors of a kept graph are not overwritten, so that backward may be called again after a failure.
        twin.zero_grad()
        out = twin(x)
        with monkeypatch.context() as patch:
            patch.setattr(Backward, "_convolution", failing(after, Backward._convolution))
            with pytest.raises(OutOfMemoryError):
                out.backward(grad, retain_graph=True)
        twin.zero_grad()
        x.grad = None
        out.backward(grad)
        expected = run(fusedres.fuse(copy.deepcopy(block), memory=memory, conv=conv), x.detach(), grad)
    torch.testing.assert_close(x.grad, expected["grad_x"])
    for parameter_name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[f"grad.{parameter_name}"])


def test_a_backward_that_failed_in_the_core_cannot_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, grad = stock_case(CORE[0])
    out = fusedres.fuse(block)(x)

    def half_way(*args: Any) -> Any:
        native_backward(*args)
        raise OutOfMemoryError("no memory left")

    native_backward = cpu_passes.backward
    with monkeypatch.context() as patch:
        patch.setattr(cpu_passes, "backward", half_way)
        with pytest.raises(OutOfMemoryError):
            out.backward(grad)
    with pytest.raises(RuntimeError, match=AGAIN):
        out.backward(grad)


def test_a_stems_backward_that_failed_cannot_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fusedres.fuse(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), filter=lambda name, _: not name)
    model.layer1 = model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Identity()
    out = model(torch.randn(2, 3, 24, 24))
    with monkeypatch.context() as patch:
        patch.setattr(stem_passes, "convolution_backward", failing(1, stem_passes.convolution_backward))
        with pytest.raises(OutOfMemoryError):
            out.sum().backward()
    with pytest.raises(RuntimeError, match=AGAIN):
        out.sum().backward()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("op", "after"), [("bn_statistics", 2), ("bn_statistics", 3), ("bn_add_relu", 1)])
def test_statistics_are_put_back_where_a_forward_fails(
    op: str, after: int, recorded: bool, momentum: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_passes, "forward", lambda *_: None)
    block, x, _ = stock_case(case("basic", "projection"))
    for norm in (block.bn1, block.bn2):
        norm.momentum = momentum
    twin = fusedres.fuse(block)
    before = buffers(twin)
    launch = launches("cpu")
    monkeypatch.setattr(launch, op, failing(after, getattr(launch, op)), raising=False)
    with torch.set_grad_enabled(recorded), pytest.raises(OutOfMemoryError):
        twin(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())


LITTLE_MEMORY = """
import resource, torch, fusedres
from torchvision.models.resnet import BasicBlock
torch.set_num_threads(1)
block = fusedres.fuse(BasicBlock(64, 64)).to(memory_format=torch.channels_last)
x = torch.randn(16, 64, 112, 112).contiguous(memory_format=torch.channels_last)
messages = []
for more in range(40, 240, 20):  # MB; a tensor has 51
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (more << 20), -1))
    try:
        block(x)
        raise SystemExit(f"no failure with {more} MB")
    except RuntimeError as error:
        messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers()), more
    if more >= 100 and len(messages) >= 4:
        break
assert all("fusedres: torch's" in message for message in messages), messages
print(len(messages))
"""


def test_statistics_are_put_back_where_memory_ends_in_the_core() -> None:
    """Memory may end anywhere in the core; the error always contains torch's own message."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LITTLE_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) >= 4


def test_a_stems_statistics_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fusedres.fuse(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3))
    before = buffers(model)
    launch = launches("cpu")
    monkeypatch.setattr(launch, "bn_relu_maxpool", failing(1, launch.bn_relu_maxpool), raising=False)
    with pytest.raises(OutOfMemoryError):
        model(torch.randn(2, 3, 24, 24))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

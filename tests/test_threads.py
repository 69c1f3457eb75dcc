"""While one thread calls fuse(), unfuse(), freeze() or train(), others infer: old or new results, but no errors."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres

THREADS, CALLS = 8, 2000


class Tagged(BasicBlock):
    """A subclass of a block, for which a new fused class is made."""


@pytest.fixture
def switching() -> Iterator[None]:
    """Switch between threads every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def build(kind: type) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if kind is ResNet:
        model, x = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), torch.randn(2, 3, 8, 8)
    elif kind is Bottleneck:
        model, x = nn.Sequential(Bottleneck(8, 2)), torch.randn(2, 8, 3, 3)
    else:
        model, x = nn.Sequential(kind(4, 4)), torch.randn(2, 4, 3, 3)
    return model.double().eval(), x.double()


def unfuse_and_fuse(model: nn.Module) -> None:
    fusedres.unfuse(model)
    fusedres.fuse(model, memory="min")
    fusedres.fuse(model, conv="library")


def freeze_and_thaw(model: nn.Module) -> None:
    fusedres.freeze(model)
    for module in model.modules():  # like train(), but without batch statistics
        if isinstance(module, BasicBlock | Bottleneck):
            module.fused_frozen = None
    model.eval()


def train_and_eval(model: nn.Module) -> None:
    model.train()
    model.eval()
    fusedres.freeze(model)


def everything(model: nn.Module) -> None:
    unfuse_and_fuse(model)
    freeze_and_thaw(model)
    fusedres.report(model)
    copy.deepcopy(model)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "unfuse and fuse": unfuse_and_fuse,
    "freeze": freeze_and_thaw,
    "train and eval": train_and_eval,
    "everything": everything,
}


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize(
    ("kind", "change"),
    [*((BasicBlock, change) for change in CHANGES), *((kind, "everything") for kind in (Tagged, Bottleneck, ResNet))],
)
def test_inference_while_another_thread_changes_the_model(kind: type, change: str) -> None:
    model, x = build(kind)
    expected = model(x)
    fusedres.fuse(model)
    errors: list[BaseException] = []
    done = threading.Event()

    def infer() -> None:
        try:
            for _ in range((CALLS if kind is not ResNet else CALLS // 5) // THREADS):
                with torch.no_grad():
                    got = model(x)
                if change != "train and eval":  # in that case some calls use batch statistics, as in torch
                    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        except BaseException as error:  # the main thread reports it
            errors.append(error)

    def alter() -> None:
        try:
            while not done.is_set():
                CHANGES[change](model)
                time.sleep(1e-4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=infer) for _ in range(THREADS)]
    changer = threading.Thread(target=alter)
    for thread in (changer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    changer.join()
    assert not errors, errors[0]


@pytest.mark.usefixtures("switching")
def test_train_mode_drops_folds_that_another_thread_was_making() -> None:
    """After train() and an update of the weights, no thread infers with folds of the old weights."""
    model, x = build(BasicBlock)
    fusedres.fuse(model)
    stop = threading.Event()
    errors: list[BaseException] = []

    def infer() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    model(x)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=infer) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for step in range(30):
            fusedres.freeze(model)
            with torch.no_grad():
                model(x)
            for block in model:
                block.fused_frozen = None  # what train() does first
            with torch.no_grad():
                model[0].conv1.weight.mul_(1.1 if step % 2 else 0.9)
                got = model(x)
                expected = fusedres.unfuse(copy.deepcopy(model))(x)
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]


def test_folds_of_a_dropped_freeze_are_not_kept() -> None:
    model, x = build(BasicBlock)
    fusedres.fuse(model)
    fusedres.freeze(model)
    frozen = model[0].fused_frozen
    model.train()
    model.eval()
    assert model[0].fused_frozen is None
    with torch.no_grad():
        model(x)
    assert frozen is not model[0].fused_frozen

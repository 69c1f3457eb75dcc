"""freeze() on whole networks: the same scores as eager's, and modules that are called one by one where it matters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fusion import expect_paths
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

import fusedres
from fusedres.autograd import folded_convolution, path_counts
from fusedres.kernels import cpu_convolution

NHWC = torch.channels_last
FORMATS = (torch.contiguous_format, NHWC)
WHOLE = {"frozen_network": 1}


def network(name: str = "resnet18", **options: Any) -> nn.Module:
    """Return a stock network in eval mode whose BatchNorms change something."""
    torch.manual_seed(0)
    model: nn.Module = getattr(models, name)(**{"num_classes": 10} | options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


def frozen(model: nn.Module) -> nn.Module:
    return fusedres.freeze(fusedres.fuse(copy.deepcopy(model)))


def images(count: int = 3, size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_same_scores(got: Tensor, model: nn.Module, x: Tensor) -> None:
    """Assert that the error is at most twice eager's, and a rounding of the largest score for each layer."""
    with torch.no_grad():
        eager, oracle = model(x), copy.deepcopy(model).double()(x.double())
    assert got.shape == eager.shape and got.dtype == eager.dtype and got.stride() == eager.stride()
    bound = 2 * (eager - oracle).abs().max() + 32 * torch.finfo(x.dtype).eps * oracle.abs().max()
    error = (got - oracle).abs().max()
    assert error <= bound, f"error {error}, allowed {bound}"


@pytest.fixture(params=["measured", "panels", "onednn"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with each kind of folded convolution."""

    def is_faster(x: Any, weight: Any, geometry: Any, dtype: torch.dtype, groups: int, purpose: Any) -> bool:
        return request.param == "panels" and cpu_convolution.takes(dtype, groups)

    if request.param != "measured":
        monkeypatch.setattr(folded_convolution, "is_faster", is_faster)
    return request.param


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_a_frozen_network_has_eagers_scores(name: str, kind: str) -> None:
    model = network(name)
    twin = frozen(model)
    for memory_format in FORMATS:
        x = images().to(memory_format=memory_format)
        before = x.clone()
        for given in (x, x[:1], x, images(2, 96)):
            with torch.no_grad(), expect_paths(**WHOLE):
                got = twin(given)
            assert_same_scores(got, model, given)
        assert torch.equal(x, before)


def test_a_batch_runs_a_few_images_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedres.autograd.frozen_network._PART_BYTES", 3 * 64 * 32 * 32 * 4)
    model = network()
    twin, x = frozen(model), images(8)
    with torch.no_grad(), expect_paths(**WHOLE):
        got = twin(x)
    assert twin.fused_frozen.made.network.stem.images == 3
    assert_same_scores(got, model, x)
    twin = frozen(model)
    with torch.no_grad():
        twin(x[:1])
        assert_same_scores(twin(x), model, x)
    assert twin.fused_frozen.made.network.stem.images == 3  # whatever the first batch was


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = network()
    twin, x = frozen(model).to(dtype), images().to(dtype)
    with torch.no_grad(), expect_paths(**WHOLE):
        got = twin(x)
    if dtype is torch.float64:
        assert_same_scores(got, model.double(), x)
        return
    with torch.no_grad():
        oracle = copy.deepcopy(model).to(dtype).double()(x.double())
        error, eager = ((scores - oracle).abs().max() for scores in (got, model.to(dtype)(x)))
    assert got.dtype is dtype and error <= 2 * eager


def test_autocast_and_without_by_turns() -> None:
    model = network()
    twin, x = frozen(model), images()
    for enabled in (False, True, False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled), expect_paths(**WHOLE):
            got = twin(x)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            eager = model(x)
        assert got.dtype is eager.dtype
        torch.testing.assert_close(got, eager, rtol=0.05, atol=0.05 * float(eager.abs().max()))


@contextmanager
def module_by_module() -> Iterator[None]:
    """Assert that no network runs as a whole inside."""
    before = path_counts["frozen_network"]
    yield
    assert path_counts["frozen_network"] == before


def with_child_hook(model: Any, fired: list[str]) -> None:
    model.layer3[1].register_forward_hook(lambda *_: fired.append("block"))


def with_inner_hook(model: Any, fired: list[str]) -> None:
    model.layer2[0].bn2.register_forward_pre_hook(lambda *_: fired.append("norm"))


def with_pool_hook(model: Any, fired: list[str]) -> None:
    model.avgpool.register_forward_hook(lambda *_: fired.append("pool"))


def with_other_block(model: Any, fired: list[str]) -> None:
    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            fired.append("other")
            return x

    model.layer1.append(Noted().eval())


def with_replaced_forward(model: Any, fired: list[str]) -> None:
    forward = model.layer4[0].forward

    def noted(x: Tensor) -> Tensor:
        fired.append("forward")
        return forward(x)

    model.layer4[0].forward = noted


CHANGES = [with_child_hook, with_inner_hook, with_pool_hook, with_other_block, with_replaced_forward]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after a call"])
def test_what_sees_the_modules_is_called(change: Callable[[Any, list[str]], None], called: bool) -> None:
    model = network()
    twin, x = frozen(model), images()
    fired: list[str] = []
    with torch.no_grad():
        if called:
            twin(x)
        change(twin, fired)
        with module_by_module():
            got = twin(x)
    assert len(fired) == 1
    torch.testing.assert_close(got, model(x).detach(), rtol=1e-4, atol=1e-4)


def test_global_hooks_and_modes_see_the_modules() -> None:
    model = network()
    twin, x, fired = frozen(model), images(), []
    with torch.no_grad():
        want = twin(x)
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.append(type(module)))
        try:
            torch.testing.assert_close(twin(x), want, rtol=1e-4, atol=1e-4)
        finally:
            handle.remove()
        with FlopCounterMode(display=False) as flops, module_by_module():
            twin(x)
    assert nn.Conv2d in fired and flops.get_total_flops() > 0


def test_gradients_train_and_batch_statistics_run_as_if_not_frozen() -> None:
    model = network()
    twin, x = frozen(model), images()
    with torch.no_grad():
        twin(x)
    with module_by_module():
        assert twin(x).requires_grad
    for parameter in twin.parameters():
        parameter.requires_grad_(False)
    with expect_paths(**WHOLE):
        assert not twin(x).requires_grad
    with module_by_module():
        assert twin(x.clone().requires_grad_()).requires_grad
    with torch.no_grad(), module_by_module():
        twin.layer2.train()
        twin.layer2.eval()
        nn.init.constant_(twin.layer2[0].bn1.weight, 0.5)
        got = twin(x)
        nn.init.constant_(model.layer2[0].bn1.weight, 0.5)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
        twin.layer3[0].bn1.train()
        twin(x)
    twin.train()
    assert twin.fused_frozen is None
    twin.eval()
    with torch.no_grad(), module_by_module():
        twin(x)


def test_copies_pickles_and_unfuse() -> None:
    model = network()
    twin, x = frozen(model), images()
    keys = list(twin.state_dict())
    with torch.no_grad():
        want = twin(x)
        assert list(twin.state_dict()) == keys
        for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            assert copied.fused_frozen is None
            nn.init.constant_(copied.fc.bias, 2.0)
            copied(x)
        assert torch.equal(twin(x), want)
        fusedres.unfuse(twin)
        assert "fused_frozen" not in twin.__dict__ and torch.equal(twin(x), model(x))


def test_other_ends() -> None:
    """The classifier may be any module, and is called once with the features of the whole batch."""
    for end in (nn.Identity(), nn.Sequential(nn.Dropout(), nn.Linear(512, 7)), nn.Linear(512, 5, bias=False)):
        model = network()
        model.fc = end.eval()
        twin, x = frozen(model), images()
        with torch.no_grad(), expect_paths(**WHOLE):
            got = twin(x)
        assert_same_scores(got, model, x)
    model = network()
    model.avgpool = nn.AdaptiveMaxPool2d(1)
    twin, x = frozen(model), images()
    with torch.no_grad(), module_by_module():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_network_whose_blocks_are_not_all_fused() -> None:
    model = network()
    twin = copy.deepcopy(model)
    fusedres.freeze(fusedres.fuse(twin, filter=lambda name, _: name != "layer2.1"))
    x = images()
    with torch.no_grad(), expect_paths(frozen_stem=1, frozen_forward=7):
        got = twin(x)
    assert_same_scores(got, model, x)


def test_wrong_images_raise_and_an_empty_batch_runs() -> None:
    twin = frozen(network())
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="channels"):
            twin(torch.randn(2, 4, 64, 64))
        twin(images())
        with pytest.raises(RuntimeError, match="channels"):
            twin(torch.randn(2, 4, 64, 64))
        with pytest.raises(RuntimeError):
            twin(images().double())
        assert twin(images()[:0]).shape == (0, 10)
        twin.fc.double()
        with pytest.raises(RuntimeError, match="dtype"):
            frozen(twin)(images())


@pytest.mark.parametrize("whole", [True, False])
def test_images_that_were_freed(whole: bool) -> None:
    twin = frozen(network())
    if not whole:
        twin.avgpool.register_forward_hook(lambda *_: None)
    for memory_format in FORMATS:
        x = images().to(memory_format=memory_format)
        with torch.no_grad():
            twin(x)
            x.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match="x"):
                twin(x)


def test_the_report_of_a_frozen_network() -> None:
    twin = frozen(network())
    with torch.no_grad():
        twin(images())
    assert all(row.fused for row in fusedres.report(twin))

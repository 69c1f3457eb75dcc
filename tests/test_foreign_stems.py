"""Stems outside the forward of torchvision's ResNet: backbones, Sequential, timm, deep stems, stems without a pool."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import segmentation_models_pytorch
import timm
import torch
from fusion import FORMATS, MEMORY, expect_paths, label
from reference import randomize
from torch import Tensor, nn
from torchvision.models import densenet121
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock, ResNet
from transformers import ResNetConfig, ResNetModel

import fusedres
from fusedres.autograd import path_counts


def small() -> ResNet:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def timm_resnet(**options: Any) -> nn.Module:
    return timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=5, **options
    )


# A network, its stem's name in the report, and how many parts it runs in beside the max-pool's.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, int]]] = {
    "getter": (lambda: IntermediateLayerGetter(small(), {"layer2": "a", "layer4": "b"}), "(model) stem", (0, 1)),
    "sequential": (lambda: nn.Sequential(*list(small().children())[:-2]), "(model) stem", (0, 1)),
    "inside": (lambda: nn.Sequential(nn.Identity(), nn.Sequential(*list(small().children())[:5])), "1 stem", (0, 1)),
    "timm": (timm_resnet, "(model) stem", (0, 1)),
    "timm deep": (lambda: timm_resnet(stem_type="deep", stem_width=8), "(model) stem", (1, 1)),
    "timm blurred": (lambda: timm_resnet(aa_layer=timm.layers.BlurPool2d), "(model) stem", (1, 0)),
    "timm replaced pool": (lambda: timm_resnet(replace_stem_pool=True), "(model) stem", (1, 0)),
    "dense": (lambda: densenet121(num_classes=5).features[:5], "(model) stem", (0, 1)),
}


def tensors_in(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for each in found.values() if isinstance(found, dict) else found:
            yield from tensors_in(each)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    source = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    outs = list(tensors_in(model(source)))
    sum(out.sin().sum() for out in outs).backward()  # type: ignore[union-attr]
    values = {f"out{index}": out.detach() for index, out in enumerate(outs)} | {"grad_x": source.grad}
    values |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return values | {name: buffer.clone() for name, buffer in model.named_buffers()}


def prepared(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = randomize(NETWORKS[name][0](), 3).double()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model, fusedres.fuse(copy.deepcopy(model)), x


def stem_rows(model: nn.Module) -> list[fusedres.BlockReport]:
    return [row for row in fusedres.report(model) if row.kind == "stem"]


def stem_counts(step: Callable[[], object], model: nn.Module) -> tuple[int, int]:
    """Return how many parts of a stem ran forward: chains of convolutions, and ones with a max-pool."""
    others = ("stem", "_DenseBlock", "_Transition")  # these count other paths
    blocks = sum(row.kind not in others and row.fused for row in fusedres.report(model))
    before = path_counts.copy()
    step()
    ran = path_counts - before
    assert not ran["stem_unfused"]
    return ran["fused_forward"] - blocks, ran["stem_forward"]


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NETWORKS)
def test_same_numbers(name: str, training: bool, memory_format: torch.memory_format) -> None:
    model, twin, x = prepared(name)
    model.train(training), twin.train(training)
    x = x.to(memory_format=memory_format)
    (row,) = stem_rows(twin)
    assert row == (NETWORKS[name][1], "stem", True, "")
    got: dict[str, Tensor] = {}
    if name != "timm blurred":  # its blocks run in more parts
        assert stem_counts(lambda: got.update(results(twin, x)), twin) == NETWORKS[name][2]
    else:
        got = results(twin, x)
    expected = results(model, x)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-7, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
    with torch.no_grad():
        for one, other in zip(tensors_in(twin(x)), tensors_in(model(x)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_pickles_and_unfuse(name: str) -> None:
    model, twin, x = prepared(name)
    expected = results(copy.deepcopy(twin), x)
    for other in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert type(other) is type(twin) and isinstance(other, type(model)) and stem_rows(other)[0].fused
        found = results(other, x)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    classes = [type(module) for module in model.modules()]
    keys = [set(module.__dict__) for module in model.modules()]
    fusedres.unfuse(twin)
    assert [type(module) for module in twin.modules()] == classes
    assert [set(module.__dict__) for module in twin.modules()] == keys


def test_what_cannot_be_fused_has_a_reason() -> None:
    getter = IntermediateLayerGetter(small(), {"relu": "a", "layer1": "b"})
    returned = nn.Sequential(*list(small().children())[:5])
    returned[3] = nn.MaxPool2d(2)
    unet = segmentation_models_pytorch.Unet("resnet18", encoder_weights=None)
    transformers = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    for model, name, reason in (
        (unet, "encoder stem", "its input is used more than once"),
        (transformers, "embedder stem", "depends on a tensor's value or shape"),
    ):
        fusedres.fuse(model)
        (row,) = stem_rows(model)
        assert row.name == name and not row.fused and reason in row.reason, row.reason
    x = torch.randn(2, 3, 64, 64)
    for model, parts in ((getter, (0, 0)), (returned, (1, 0))):  # the stem ends before its ReLU's result is used
        twin = fusedres.fuse(copy.deepcopy(model))
        if model is getter:
            assert stem_counts(lambda twin=twin: twin(x), twin) == (1, 0) and parts == (0, 0)
        else:
            assert stem_counts(lambda twin=twin: twin(x), twin) == parts
        for one, other in zip(tensors_in(twin(x)), tensors_in(copy.deepcopy(model)(x)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_changes_after_fuse_is_seen() -> None:
    model, twin, x = prepared("timm")
    handle = twin.bn1.register_forward_hook(lambda *_: None)
    assert stem_rows(twin)[0].reason == "a hook on bn1"
    with expect_paths(stem_unfused=1, fused_forward=4):
        twin(x)
    handle.remove()
    twin.act1 = nn.SiLU()
    assert "act1 is a SiLU" in stem_rows(twin)[0].reason
    twin.act1 = nn.ReLU()
    twin.set_grad_checkpointing()
    assert stem_rows(twin)[0].reason.startswith("grad_checkpointing was False")
    fusedres.fuse(twin)
    assert stem_rows(twin)[0].fused
    twin.set_grad_checkpointing(False)
    fusedres.fuse(twin)
    for key, value in results(model, x).items():
        torch.testing.assert_close(results(copy.deepcopy(twin), x)[key], value, rtol=1e-6, atol=1e-9)
        break
    twin.bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(twin.bn1)
    assert stem_rows(twin)[0].fused
    backbone = fusedres.fuse(IntermediateLayerGetter(small(), {"layer4": "out"}))
    backbone.return_layers["relu"] = "more"
    assert "return_layers was" in stem_rows(backbone)[0].reason
    assert set(backbone(torch.randn(1, 3, 64, 64))) == {"out", "more"}


def test_other_calls_and_compiled_code_run_the_stock_forward() -> None:
    _, twin, x = prepared("timm")
    with expect_paths(stem_unfused=1, fused_forward=4):
        twin(x=x)
    features = twin.forward_features(x)
    assert features.shape[1] == 8
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-6, atol=1e-8)


def test_a_forward_that_needs_what_the_stem_hides_is_left_alone() -> None:
    class Reads(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * x.shape[0]

    stem = list(small().children())[:5]
    assert stem_rows(fusedres.fuse(nn.Sequential(*stem)))
    assert not stem_rows(fusedres.fuse(nn.Sequential(Reads(*stem))))  # another class than Sequential
    with pytest.warns(UserWarning, match="nothing in Sequential was changed"):
        assert not stem_rows(fusedres.fuse(nn.Sequential(*stem[:4])))  # nothing after the stem


@pytest.mark.parametrize("memory", MEMORY)
def test_options_reach_the_stem(memory: str) -> None:
    model, _, x = prepared("timm deep")
    twin = fusedres.fuse(copy.deepcopy(model), memory=memory, conv="fused")
    assert twin.fused_memory == memory and twin.fused_conv == "measured"
    for key, value in results(model, x).items():
        torch.testing.assert_close(results(twin, x)[key], value, rtol=1e-6, atol=1e-8)
        break
    unfused = fusedres.fuse(copy.deepcopy(model), filter=lambda name, _: name != "")
    assert stem_rows(unfused)[0].reason == "not selected by fuse()"


@pytest.mark.parametrize("name", ["timm", "timm deep", "sequential"])
def test_torch_fx_traces_the_stock_network(name: str) -> None:
    """The root's forward has the stock signature, so that each argument is a node of its own."""
    model, twin, x = prepared(name)
    assert inspect.signature(twin.forward) == inspect.signature(model.forward)
    traced, expected = (torch.fx.symbolic_trace(each.eval()) for each in (twin, model))
    assert traced.code == expected.code
    torch.testing.assert_close(traced(x), model(x), rtol=1e-9, atol=1e-9)


def test_exported_inputs_keep_their_names() -> None:
    model, twin, x = prepared("timm")
    inputs = [torch.export.export(each, (x,)).graph_signature.user_inputs for each in (twin, model)]
    assert inputs[0] == inputs[1] == ("x",)

"""Models of timm, transformers and segmentation_models_pytorch: plain blocks are fused, the others have a reason."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import segmentation_models_pytorch
import timm
import torch
from fusion import MEMORY, expect_paths
from reference import randomize, run
from timm.layers import BlurPool2d, DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.models import regnet_x_400mf
from torchvision.ops import FrozenBatchNorm2d
from transformers import ResNetConfig, ResNetForImageClassification, RTDetrResNetConfig
from transformers.models.rt_detr.modeling_rt_detr_resnet import RTDetrResNetBackbone

import fusedres

PLAIN = {
    "resnet18": 8,
    "resnet26": 8,
    "resnet34": 16,
    "resnet50": 16,
    "resnet101": 33,
    "resnext50_32x4d": 16,
    "wide_resnet50_2": 16,
    "resnet18d": 8,
    "resnet50d": 16,
    "resnetblur50": 16,
    "resnet50c": 16,
    "hrnet_w18_small": 23,
}


def rows_of(model: nn.Module) -> list[fusedres.BlockReport]:
    return [row for row in fusedres.report(fusedres.fuse(model)) if row.kind != "stem"]


@pytest.mark.parametrize("name", PLAIN)
def test_every_plain_block_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = {name: type(module) for name, module in model.named_modules()}
    fusedres.fuse(model)
    switched = [module for module in model.modules() if type(module).__name__ in ("FusedBasicBlock", "FusedBottleneck")]
    assert len(switched) == PLAIN[name]
    assert all(isinstance(block, BasicBlock | Bottleneck) for block in switched)
    fusedres.unfuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("seresnet18", "se is a SEModule"),
        ("ecaresnet26t", "se is a EcaModule"),
        ("resnet26t", "act2 is a SiLU"),
    ],
)
def test_other_blocks_of_timm_have_a_reason(name: str, reason: str) -> None:
    if name == "resnet26t":
        model = ResNet(BasicBlock, (1, 1, 1, 1), act_layer=nn.SiLU)
    else:
        model = timm.create_model(name)
    rows = rows_of(model)
    assert rows and not any(row.fused for row in rows)
    assert all(row.reason.startswith(reason) for row in rows)


SMALL: dict[str, Callable[[], nn.Module]] = {
    "timm basic": lambda: ResNet(BasicBlock, (2, 1, 1, 1), channels=(8, 12, 16, 24), num_classes=5),
    "timm bottleneck": lambda: ResNet(Bottleneck, (2, 1, 1, 1), channels=(4, 6, 8, 12), num_classes=5),
    "timm D": lambda: ResNet(
        Bottleneck, (2, 1, 1, 1), channels=(4, 6, 8, 12), num_classes=5, stem_width=8, stem_type="deep", avg_down=True
    ),
    "timm blur": lambda: ResNet(
        BasicBlock, (1, 2, 1, 1), channels=(8, 12, 16, 24), num_classes=5, aa_layer=BlurPool2d, zero_init_last=False
    ),
    "timm dilated": lambda: ResNet(Bottleneck, (1, 1, 2, 2), channels=(4, 6, 8, 12), num_classes=5, output_stride=8),
    "timm dilated D": lambda: ResNet(
        Bottleneck, (1, 1, 2, 2), channels=(4, 6, 8, 12), num_classes=5, output_stride=8, avg_down=True
    ),
    "timm grouped": lambda: ResNet(
        Bottleneck, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=5, cardinality=4, base_width=16
    ),
    "torchvision RegNet": lambda: regnet_x_400mf(num_classes=5),
    "RT-DETR basic": lambda: Features(RTDetrResNetBackbone(small_config("basic", RTDetrResNetConfig))),
    "RT-DETR bottleneck": lambda: Features(RTDetrResNetBackbone(small_config("bottleneck", RTDetrResNetConfig))),
    "transformers basic": lambda: ResNetForImageClassification(small_config("basic")),
    "transformers bottleneck": lambda: ResNetForImageClassification(small_config("bottleneck")),
}


def small_config(layer_type: str, config: type = ResNetConfig) -> object:
    return config(
        layer_type=layer_type, embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[2, 1, 1, 1], num_labels=5
    )


class Features(nn.Module):
    """Makes five scores of the features of a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).feature_maps[-1].flatten(2).mean(2)[:, :5]


class Scores(nn.Module):
    """Makes a tensor of what a model of transformers returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SMALL)
def test_same_numbers_in_a_whole_model(name: str, training: bool, memory: str) -> None:
    model = Scores(randomize(SMALL[name](), 7)).double().train(training)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
    grad = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    twin = fusedres.fuse(copy.deepcopy(model), memory=memory)
    rows = rows_of(twin)
    assert len(rows) >= 4 and all(row.fused for row in rows), fusedres.report(twin)
    before = fusedres.autograd.path_counts.copy()
    got = run(twin, x, grad)
    ran = fusedres.autograd.path_counts - before
    assert ran["fused_forward"] == ran["fused_backward"] >= len(rows) and not ran["unfused"]
    expected = run(model, x, grad)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-7, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def test_drop_path_is_fused_where_it_drops_nothing() -> None:
    model = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), drop_path_rate=0.2, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    twin = fusedres.fuse(copy.deepcopy(model))
    reasons = [row.reason for row in rows_of(twin)]
    assert reasons == ["", *3 * ["drop_path (a DropPath) drops values in training"]]
    with expect_paths(stem_forward=1, fused_forward=1, unfused=3):
        torch.manual_seed(1)
        got = twin(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, model(x))
    model.eval(), twin.eval()
    with expect_paths(stem_forward=1, fused_forward=4), torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
    assert any(isinstance(module, DropPath) for module in twin.modules())


def test_frozen_norms_of_timm() -> None:
    model = timm.layers.freeze_batch_norm_2d(ResNet(BasicBlock, (1, 1, 1, 1)))
    assert isinstance(model.layer1[0].bn1, FrozenBatchNorm2d)
    assert all(row.fused for row in rows_of(model))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_encoders_of_segmentation_models(name: str) -> None:
    model = segmentation_models_pytorch.Unet(name, encoder_weights=None).double().eval()
    twin = fusedres.fuse(copy.deepcopy(model))
    rows = [row for row in fusedres.report(twin) if row.kind in ("BasicBlock", "Bottleneck")]
    assert len(rows) == {"resnet18": 8}.get(name, 16) and all(row.fused for row in rows)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)


def test_the_packages_stay_strangers() -> None:
    """Only the names of their classes are known: fusedres itself imports none of them."""
    code = "import fusedres, sys; print([n for n in ('timm', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

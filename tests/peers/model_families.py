"""Families of residual networks: for each, how much of its models is fused, with which reasons for the rest.

A family is right if its models have stock models' outputs, gradients and statistics in float64, in training mode.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import compatibility_page as page
import torch
from reference import randomize
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import fusedres
from fusedres.autograd import path_counts

HEADING = ("family", "tried", "works fused", "works unfused, and why", "does not work")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "segmentation_models_pytorch", "ultralytics")
Build = Callable[[], nn.Module]


class Family(NamedTuple):
    """Models of one package, by name."""

    label: str
    package: str
    build: dict[str, Build]
    size: tuple[int, ...] = (3, 64, 64)


def _torchvision(*names: str, **options: Any) -> dict[str, Build]:
    return {name: partial(models.get_model, name, weights=None, **options) for name in names}


def _timm(*names: str) -> dict[str, Build]:
    def build(name: str) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name)
        return model

    return {name: partial(build, name) for name in names}


def _encoders(*names: str) -> dict[str, Build]:
    def build(name: str) -> nn.Module:
        import segmentation_models_pytorch

        model: nn.Module = segmentation_models_pytorch.encoders.get_encoder(name, weights=None)
        return model

    return {name: partial(build, name) for name in names}


def _transformers(kind: str, config: str) -> dict[str, Build]:
    def build(layer_type: str) -> nn.Module:
        import transformers

        sizes = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 48], "depths": [2, 1, 1, 1]}
        model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(layer_type=layer_type, **sizes))
        return model

    return {layer_type: partial(build, layer_type) for layer_type in ("basic", "bottleneck")}


def _yolo(*names: str) -> dict[str, Build]:
    def build(name: str) -> nn.Module:
        os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # it writes its settings when it is imported
        from ultralytics.nn.tasks import DetectionModel

        model: nn.Module = DetectionModel(f"{name}.yaml", verbose=False)
        return model

    return {name: partial(build, name) for name in names}


def _for_tiny_images() -> nn.Module:
    model = models.resnet18(weights=None)
    model.maxpool = nn.Identity()
    return model


def _frozen() -> nn.Module:
    return resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )  # fmt: skip


def _children() -> nn.Module:
    return nn.Sequential(*list(models.resnet18(weights=None).children())[:-2])


FAMILIES = (
    Family(
        "torchvision ResNet, ResNeXt, Wide ResNet",
        "torchvision",
        _torchvision("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    ),
    Family("torchvision ResNet without max-pool", "torchvision", {"resnet18": _for_tiny_images}),
    Family("`nn.Sequential` of a ResNet's children", "torchvision", {"resnet18": _children}),
    Family(
        "torchvision segmentation",
        "torchvision",
        _torchvision("fcn_resnet50", "deeplabv3_resnet50", weights_backbone=None),
    ),
    Family("torchvision detection, backbone with FrozenBatchNorm2d", "torchvision", {"resnet50 with FPN": _frozen}),
    Family("torchvision RegNet-X", "torchvision", _torchvision("regnet_x_400mf")),
    Family("torchvision RegNet-Y", "torchvision", _torchvision("regnet_y_400mf")),
    Family("torchvision DenseNet", "torchvision", _torchvision("densenet121")),
    Family("torchvision video ResNets", "torchvision", _torchvision("r3d_18"), (3, 4, 32, 32)),
    Family(
        "timm ResNet, ResNeXt, Wide ResNet",
        "timm",
        _timm("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    ),
    Family("timm ResNet-C and -D, with BlurPool", "timm", _timm("resnet50c", "resnet18d", "resnet50d", "resnetblur50")),
    Family("timm HRNet", "timm", _timm("hrnet_w18_small")),
    Family("timm ResNet with attention or SE", "timm", _timm("seresnet18", "ecaresnet26t", "skresnet18")),
    Family("timm ResNetV2", "timm", _timm("resnetv2_18")),
    Family("transformers ResNet", "transformers", _transformers("ResNetModel", "ResNetConfig")),
    Family(
        "transformers RT-DETR, backbone", "transformers", _transformers("RTDetrResNetBackbone", "RTDetrResNetConfig")
    ),
    Family(
        "segmentation_models_pytorch encoders",
        "segmentation_models_pytorch",
        _encoders("resnet18", "resnet50", "resnext50_32x4d"),
    ),
    Family("ultralytics YOLO, channels_last", "ultralytics", _yolo("yolo11n", "yolov8n")),
)


def installed(family: Family) -> bool:
    """Whether the package of a family can be imported."""
    return find_spec(family.package) is not None


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif found is not None:
        for each in found.values() if hasattr(found, "values") else found:
            yield from _tensors(each)


def _results(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Return everything that one training step computes."""
    torch.manual_seed(2)  # of dropout
    outs = [out for out in _tensors(model(x)) if out.requires_grad]
    sum(out.sin().mean() for out in outs).backward()  # type: ignore[union-attr]
    values: dict[str, Tensor | None] = {f"output {index}": out.detach() for index, out in enumerate(outs)}
    return values | {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


def _wrong(build: Build, size: tuple[int, ...], label: str) -> tuple[fusedres.Report, str | None]:
    """Return the report of a fused model, and in what it differs from the stock model, or None."""
    torch.manual_seed(0)
    model = randomize(build(), 1).double()
    x = torch.randn(2, *size, dtype=torch.float64)
    if "channels_last" in label:
        model, x = (each.to(memory_format=torch.channels_last) for each in (model, x))
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fuse: nothing in")
        fusedres.fuse(twin)
    before = path_counts.copy()
    got, ran = _results(twin, x), path_counts - before
    rows = fusedres.report(twin)
    for name, expected in _results(model, x).items():
        try:
            torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-10)
        except AssertionError as error:
            return rows, f"{name}: {error}"
    blocks = [row.name for row in rows if row.fused and row.kind != "stem"]
    whole = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    paths = ("fused_forward", "tail_forward", "dense_block_forward", "norm_act_conv_forward")
    enough = sum(ran[path] for path in paths) >= len(whole)
    return rows, None if enough else f"{ran} ran for {len(whole)} blocks"


def row_of(family: Family) -> page.Row:
    """Return the row of a family in the table."""
    rows: list[fusedres.BlockReport] = []
    failures = []
    for name, build in family.build.items():
        try:
            found, wrong = _wrong(build, family.size, family.label)
        except Exception as error:  # whatever a model raises is its entry in the table
            failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        rows += found
        failures += [] if wrong is None else [f"{name}: {wrong}"]
    stems = [row for row in rows if row.kind == "stem"]
    blocks = [row for row in rows if row.kind != "stem"]
    fused = [
        f"{sum(row.fused for row in each)} of {len(each)} {what}"
        for each, what in ((blocks, "blocks"), (stems, "stems"))
        if any(row.fused for row in each)
    ]
    reasons = [
        f"{what}: {reason}"
        for each, what in ((blocks, "blocks"), (stems, "stems"))
        for reason in sorted({row.reason for row in each if not row.fused})
    ]
    return (
        family.label,
        ", ".join(family.build),
        ", ".join(fused),
        "; ".join(reasons) or ("" if rows else "it has no residual blocks of 2-D convolutions"),
        "; ".join(failures),
    )


def write() -> None:
    """Replace the table in docs/compatibility.md."""
    page.write("models", HEADING, [row_of(family) for family in FAMILIES], PACKAGES)

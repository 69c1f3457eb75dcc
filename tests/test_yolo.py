"""YOLO11n of ultralytics, fused: the numbers of eager, less memory, and what ultralytics itself does with a model."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from collections.abc import Iterator

import pytest
import torch
from family import saved_bytes
from fusion import FORMATS, expect_paths, label
from reference import Values, randomize
from tolerance import check_model
from torch import Tensor, nn

import fusedres

os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())  # it writes its settings when it is imported
conv = pytest.importorskip("ultralytics.nn.modules.conv", reason="ultralytics is not installed")
block = pytest.importorskip("ultralytics.nn.modules.block")
tasks = pytest.importorskip("ultralytics.nn.tasks")

TAILS = 81  # Conv and DWConv modules


def yolo() -> nn.Module:
    torch.manual_seed(0)
    return tasks.DetectionModel("yolo11n.yaml", verbose=False).to(memory_format=torch.channels_last)


def images(size: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)
    return x.to(memory_format=torch.channels_last)


def tensors(found: object) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for each in found.values() if isinstance(found, dict) else found:  # type: ignore[attr-defined]
            yield from tensors(each)


def step(model: nn.Module, x: Tensor) -> Values:
    """Return the outputs, gradients and buffers of a training step."""
    outs = list(tensors(model(x)))
    sum(out.square().mean() for out in outs).backward()
    found = {f"out {index}": out.detach() for index, out in enumerate(outs)}
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_gradients_and_statistics() -> None:
    model, x = yolo(), images()
    twin, exact = fusedres.fuse(copy.deepcopy(model)), copy.deepcopy(model).double()
    with expect_paths(tail_forward=TAILS, tail_backward=TAILS):
        got = step(twin, x)
    check_model(got, step(model, x), step(exact, x.double()), torch.float32, "YOLO11n")


def test_every_convolution_and_bottleneck_is_fused() -> None:
    model = yolo()
    fusedres.fuse(model)
    rows = fusedres.report(model)
    assert {row.kind for row in rows} == {"Conv", "DWConv", "Bottleneck", "PSABlock"}
    assert sum(row.kind in ("Conv", "DWConv") for row in rows) == TAILS
    assert [row.kind for row in rows if not row.fused] == ["PSABlock"]
    assert all(isinstance(model.get_submodule(row.name), conv.Conv) for row in rows if row.kind.endswith("Conv"))
    assert isinstance(model.model[2].m[0], block.Bottleneck)


def test_saved_bytes() -> None:
    model, x = yolo(), images(64)
    twin = fusedres.fuse(copy.deepcopy(model))
    with expect_paths(tail_forward=TAILS):
        twin(x)
    ours, theirs = (saved_bytes(lambda m=m: m(x), x, *m.parameters(), *m.buffers()) for m in (twin, model))
    assert ours <= 0.72 * theirs


def test_unfuse_copies_and_pickles() -> None:
    model = yolo()
    state, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    fusedres.fuse(model)
    model.load_state_dict(state)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        with expect_paths(tail_forward=TAILS):
            other(images(64))
    fusedres.unfuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
def test_inference_and_folding_by_ultralytics(memory_format: torch.memory_format) -> None:
    """DetectionModel.fuse deletes the norms, and replaces forward on each Conv: nothing of them runs fused then."""
    model, x = randomize(yolo(), 3).eval(), images(64).contiguous(memory_format=memory_format)
    twin = fusedres.fuse(copy.deepcopy(model))
    with torch.no_grad():
        expected = list(tensors(model(x)))
        with fusedres.use_backend("cpu"), expect_paths(tail_forward=TAILS):
            found = list(tensors(twin(x)))
        for got, out in zip(found, expected, strict=True):
            torch.testing.assert_close(got, out, rtol=1e-3, atol=1e-3)
            assert got.stride() == out.stride()
        model.fuse(verbose=False), twin.fuse(verbose=False)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
        for got, out in zip(tensors(twin(x)), tensors(model(x)), strict=True):
            assert torch.equal(got, out)
    rows = fusedres.report(twin)
    assert not any(row.fused for row in rows)
    assert {row.reason for row in rows if row.kind.endswith("Conv")} == {"forward is replaced on the instance"}
    fusedres.unfuse(twin)
    assert torch.equal(next(tensors(twin(x))), next(tensors(model(x))))


def test_moving_average_of_the_trainer() -> None:
    """ModelEMA deep-copies the model, and updates the copy from its state_dict."""
    torch_utils = pytest.importorskip("ultralytics.utils.torch_utils")
    model = fusedres.fuse(yolo())
    average = torch_utils.ModelEMA(model)
    step(model, images(64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    average.update(model)
    assert not average.ema.training and sum(row.fused for row in fusedres.report(average.ema)) > TAILS
    with torch.no_grad(), expect_paths(tail_forward=TAILS):
        average.ema(images(64))

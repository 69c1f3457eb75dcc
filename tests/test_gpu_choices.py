"""What runs on a GPU with its own table of measured choices, with another GPU's, or without one; needs no GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from measured import bottleneck, following
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres.dispatch import LIBRARY, Directions, Entry, Table, Way, store
from fusedres.modules import choice
from fusedres.modules.calls import without_kernels
from fusedres.modules.reading import own_products

CUDA = torch.device("cuda", 0)
H100, H200, A100 = "NVIDIA H100 80GB HBM3, sm_90", "NVIDIA H200, sm_90", "NVIDIA A100-SXM4-80GB, sm_80"
REMEDY = 'run `python -m fusedres tune`, or choose with fuse(model, conv="fused") or use_backend'


def table(device: str, **versions: str) -> Table:
    entries = {bottleneck(): Entry(Way("triton", one_pass=True), 1.5)}
    return Table(device, "triton", store.versions() | versions, "2026-01-01", entries, {})


# --- explicit choices -------------------------------------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Simulate a GPU without a table, about which nothing has been warned yet."""
    monkeypatch.setattr(choice, "_warned", set())
    with following(None, CUDA), fusedres.use_backend("auto"):
        yield


@pytest.mark.parametrize(
    ("conv", "memory", "expected"),
    [
        ("auto", "auto", None),
        ("fused", "auto", "triton"),
        ("measured", "auto", "triton"),
        ("library", "auto", "triton"),
        ("auto", "min", "triton"),
    ],
)
def test_an_explicit_choice_acts_on_a_gpu_that_nothing_was_measured_on(
    unmeasured: None, monkeypatch: pytest.MonkeyPatch, conv: str, memory: str, expected: str | None
) -> None:
    weight = SimpleNamespace(dtype=torch.bfloat16, device=CUDA)
    assert choice.serving_backend(CUDA, conv, memory) == expected
    reason = without_kernels(weight, conv, memory)
    assert reason == (None if expected else f"nothing was measured on this GPU: {REMEDY}")
    assert choice.serving_backend(torch.device("xpu"), conv, memory) is None  # there are no kernels for it
    with fusedres.use_backend("reference"):
        assert choice.serving_backend(CUDA, conv, memory) == "reference"
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    assert choice.serving_backend(CUDA, conv, memory) is None
    assert without_kernels(weight, conv, memory) == "GPUs need Triton, which is not installed"


def test_a_gpu_that_runs_unfused_is_told_of_once(unmeasured: None) -> None:
    x = SimpleNamespace(device=CUDA)
    with pytest.warns(UserWarning, match="run unfused") as caught:
        reasons = [choice.chosen_way(None, None, x, "auto", "auto") for _ in range(3)]
    assert [str(each.message) for each in caught] == [
        f"fusedres: fused blocks run unfused, as nothing was measured on this GPU: {REMEDY}"
    ]
    assert set(reasons) == {f"nothing was measured on this GPU: {REMEDY}"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.chosen_way(None, None, SimpleNamespace(device=torch.device("xpu")), "auto", "auto")


def test_a_stems_convolution_is_the_librarys_unless_measured_otherwise() -> None:
    """fuse(conv="fused") only concerns the blocks of such a model."""
    model = fusedres.fuse(ResNet(BasicBlock, [1, 1, 1, 1]), conv="fused")
    assert model.fused_conv == "measured" and model.layer1[0].fused_conv == "fused"
    own = Directions(True, False, True)
    for conv, way, expected in (
        ("measured", None, LIBRARY),
        ("measured", Way("triton", larger=own), own),
        ("library", Way("triton", larger=own), LIBRARY),
        ("fused", None, Directions(True, True, True)),
    ):
        assert own_products(conv, "triton", 1, (7, 7), way) == expected


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """Return empty folders for the tables of the package and of the user."""
    found = {name: tmp_path / name for name in ("package", "user")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setattr(store, "PACKAGED", found["package"])
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(found["user"]))
    return found


def loaded(monkeypatch: pytest.MonkeyPatch, device: str) -> str | None:
    """Return the device that the table for this device was measured on."""
    monkeypatch.setattr(store, "family", lambda _: device)
    found = store.load(CUDA)
    return None if found is None else found.device


def write(folder: Path, found: Table) -> Path:
    path = folder / store.file_name(found.device)
    store.update(path, found)
    return path


def test_a_gpu_without_a_table_follows_another_of_its_capability(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    write(folders["package"], table(H200))
    assert loaded(monkeypatch, H200) == loaded(monkeypatch, H100) == H200
    assert loaded(monkeypatch, A100) is None and loaded(monkeypatch, "AMD EPYC, 2 threads") is None
    write(folders["user"], table("NVIDIA GH200 480GB, sm_90"))
    assert loaded(monkeypatch, H100) == "NVIDIA GH200 480GB, sm_90"  # the user's own measurement comes first
    write(folders["user"], table(H100))
    assert loaded(monkeypatch, H100) == H100 and loaded(monkeypatch, H200) == H200


def test_a_table_that_only_seems_to_be_of_the_capability_is_not_followed(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    text = write(folders["package"], table(A100)).read_text()
    (folders["package"] / store.file_name(H200)).write_text(text)
    assert loaded(monkeypatch, H100) is None


@pytest.mark.parametrize(
    ("versions", "ignored"),
    [
        ({}, False),
        ({"triton": "2.9.1"}, False),  # the kernels are the measured ones
        ({"kernels": "other"}, False),  # the compiler is the measured one
        ({"kernels": "other", "triton": "2.9.1"}, True),
    ],
)
def test_a_packaged_table_of_other_kernels_and_another_triton_is_ignored(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], versions: dict[str, str], ignored: bool
) -> None:
    write(folders["package"], table(H200, **versions))
    for device in (H200, H100):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert loaded(monkeypatch, device) == (None if ignored else H200)
        assert [("triton 2.9.1" in str(each.message), "fusedres tune" in str(each.message)) for each in caught] == (
            [(True, True)] * ignored
        )


def test_a_packaged_table_of_a_cpu_does_not_ask_for_triton(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    device = "Some CPU, 2 threads"
    entries = {bottleneck(dtype="float32"): Entry(Way("cpu"), 1.5)}
    found = replace(table(device, kernels="other", triton="2.9.1"), backend="cpu", blocks=entries)
    write(folders["package"], found)
    assert loaded(monkeypatch, device) == device

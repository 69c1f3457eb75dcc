"""python -m fusedres tune: what it measures, how it decides, and what it writes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fusion import expect_paths
from measured import CPU, HERE
from processes import HANG
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres
from fusedres import backends, dispatch
from fusedres.__main__ import main
from fusedres.dispatch import LIBRARY, UNFUSED, Directions, Way, store
from fusedres.tune import command, ways
from fusedres.tune.command import Tuning
from fusedres.tune.shapes import Stem, Subject, subjects
from fusedres.tune.timing import Timer
from fusedres.tune.ways import Bench, Case, faster, fastest, settle

OWN = Directions(True, True, True)
interpreted = pytest.mark.skipif(not backends._INTERPRETED, reason="toy shapes are for Triton's interpreter")


def meta(module: nn.Module, channels: int, size: int = 6, name: str = "toy") -> Subject:
    return Subject(name, module.to("meta"), (channels, size, size))


def bottleneck(name: str = "toy") -> Subject:
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    return meta(Bottleneck(8, 4, 2, shortcut), 8, name=name)


def stem(size: int = 10) -> Subject:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    model.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(8)
    return Subject("toy.stem", Stem(model).to("meta"), (3, size, size))


@pytest.fixture
def kept() -> Iterator[None]:
    """Restore the table after a test that installs another one."""
    before = dispatch.table(CPU)
    yield
    dispatch.install(CPU, before)


class Synthetic:
    """Replaces `interleave`: gives seconds for each variant, with some scatter, equal for all variants of a round."""

    def __init__(self, seconds: Callable[[str], float]) -> None:
        self.seconds, self.asked = seconds, []

    def __call__(self, variants, timer, *, rounds, **_):
        self.asked.append([variant.name for variant in variants])
        scatter = [1 + 0.1 * (turn % 3) for turn in range(rounds)]
        return {variant.name: [self.seconds(variant.name) * s for s in scatter] for variant in variants}


# Shapes


def test_the_shapes_of_a_model() -> None:
    found = subjects(["resnet50", "resnet18"], 224)
    assert [subject.name for subject in found][:4] == [
        "resnet50.stem", "resnet50.layer1.0", "resnet50.layer1.1", "resnet50.layer2.0",
    ]  # fmt: skip
    assert len(found) == 1 + 8 + 7  # both models have the same stem
    by_name = {subject.name: subject.shape for subject in found}
    assert by_name["resnet50.stem"] == ("stem 7x7", "none", 3, 64, 64, 1, 2, 1, 224, 224)
    assert by_name["resnet50.layer2.0"] == ("bottleneck", "projection", 256, 128, 512, 1, 2, 1, 56, 56)
    assert by_name["resnet18.layer1.0"] == ("basic", "identity", 64, 64, 64, 1, 1, 1, 56, 56)
    (grouped,) = {subject.shape[5] for subject in subjects(["resnext50_32x4d"], 97)[1:]}
    assert grouped == 32


@pytest.mark.parametrize("name", ["vgg11", "resnet51"])
def test_another_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"tune: model must be .*, got '{name}'"):
        subjects([name], 64)


# The rule


def test_slower_than_eager_by_more_than_two_percent_is_unfused() -> None:
    best, eager = Way("cpu"), [1.0, 1.1, 1.2]
    for factor, way in ((0.5, best), (1.0, best), (1.02, best), (1.021, UNFUSED), (2.0, UNFUSED)):
        entry = settle(best, eager, [factor * seconds for seconds in eager])
        assert entry.way == way and entry.eager_over_way == pytest.approx(1 / factor)


@pytest.mark.parametrize(("seconds", "way"), [(0.999, Way("cpu")), (1.0, Way("cpu")), (1.001, UNFUSED)])
def test_a_cpu_stays_unfused_if_eager_is_faster_at_all(
    seconds: float, way: Way, monkeypatch: pytest.MonkeyPatch, kept: None
) -> None:
    found, _ = found_with(
        monkeypatch, lambda name: 1.0 if name == "eager" else seconds, meta(BasicBlock(8, 8), 8), backend="cpu"
    )
    assert found.entry.way == way


def test_the_time_is_shared_among_the_cases_and_their_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: None
) -> None:
    budgets: list[float] = []

    def interleaved(variants, timer, *, rounds, budget):
        budgets.append(budget)
        return {variant.name: [1.0] * rounds for variant in variants}

    monkeypatch.setattr(ways, "interleave", interleaved)
    cases = [Case(meta(BasicBlock(8, 8), 8, size), 1, "float32", "infer") for size in (4, 5)]
    ticks: list[int] = []
    tuning = Tuning(
        CPU, "cpu", tmp_path / "table.json", 1000.0, say=lambda line: None, measured=lambda: ticks.append(1)
    )
    tuning.run(cases)
    # Two cases share the time; in inference on a CPU, each compares at its start and at its end.
    assert budgets == [pytest.approx(250, rel=0.1)] * 2 + [pytest.approx(500, rel=0.1)] * 2
    assert len(ticks) == 2


def test_faster_is_faster_in_four_of_five_rounds() -> None:
    base = [1.0] * 10
    assert faster([0.9] * 8 + [1.1] * 2, base)
    assert not faster([0.5] * 7 + [1.1] * 3, base)
    assert not faster(base, base)


def command_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def found_with(monkeypatch: pytest.MonkeyPatch, seconds, subject=None, phase="train", backend="reference"):
    clock = Synthetic(seconds)
    monkeypatch.setattr(ways, "interleave", clock)
    bench = Bench(Case(subject or bottleneck(), 2, "float32", phase), CPU, backend)
    return fastest(bench, {}, Timer(CPU), 10), clock


def test_each_product_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    """Here this package's 1x1 fprop and larger wgrad are faster, and the library's other products."""

    def seconds(name: str) -> float:
        if name == "eager":
            return 20
        pixelwise, _, larger = name.partition("larger")
        slow = sum(product in pixelwise for product in ("dgrad", "wgrad")) - ("fprop" in pixelwise)
        return 10 + slow + sum(product in larger for product in ("fprop", "dgrad")) - ("wgrad" in larger)

    found, clock = found_with(monkeypatch, seconds)
    assert found.entry.way == Way("reference", Directions(True, False, False), Directions(False, False, True))
    assert found.entry.eager_over_way == pytest.approx(20 / 8) and found.wrong == []
    assert clock.asked[0] == ["eager", "reference", "reference, 1x1 fprop+dgrad+wgrad, larger fprop+dgrad+wgrad"]
    assert all(asked[0] == "eager" for asked in clock.asked)


def test_it_starts_from_the_faster_of_both(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    """All of this package's products together are fastest, although none of them is faster alone."""
    found, _ = found_with(monkeypatch, lambda name: 10 if name == "eager" else 5 if name.count("+") == 4 else 12)
    assert found.entry.way == Way("reference", OWN, OWN)


def test_statistics_before_the_convolution_where_faster(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    subject = meta(Bottleneck(16, 4), 16, 8)
    for gain in (0.9, 1.1):
        found, clock = found_with(
            monkeypatch, lambda name, gain=gain: gain if "one pass" in name else 1.0, subject, backend="cpu"
        )
        assert clock.asked[1] == ["eager", "cpu", "cpu, one pass"]
        assert found.entry.way == Way("cpu", one_pass=gain < 1)


def test_nothing_faster_is_unfused(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    found, _ = found_with(monkeypatch, lambda name: 1.0 if name == "eager" else 1.05)
    assert found.entry.way == UNFUSED and found.entry.eager_over_way == pytest.approx(1 / 1.05)


def test_inference_and_stems_choose_among_what_they_run(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    _, clock = found_with(monkeypatch, lambda name: 1.0, phase="infer")
    assert {name for asked in clock.asked for name in asked} == {
        "eager", "reference", "reference, 1x1 fprop", "reference, larger fprop", "reference, 1x1 fprop, larger fprop",
    }  # fmt: skip
    _, clock = found_with(monkeypatch, lambda name: 1.0, stem())
    assert {name for asked in clock.asked for name in asked} == {
        "eager", "reference", "reference, larger fprop", "reference, larger wgrad", "reference, larger fprop+wgrad",
    }  # fmt: skip
    _, clock = found_with(monkeypatch, lambda name: 1.0, stem(), backend="cpu")
    assert clock.asked == [["eager", "cpu"], ["eager", "cpu"]]


# Ways that compute wrong results


def test_a_wrong_way_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    launches = fusedres.autograd.forward.launches("reference")
    right = launches.conv_dgrad
    monkeypatch.setattr(launches, "conv_dgrad", lambda *args: [1.5 * right(*args)[0], right(*args)[1]])
    found, clock = found_with(monkeypatch, lambda name: 10 - name.count("grad"))
    assert found.entry.way == Way("reference", Directions(False, False, True), Directions(False, False, True))
    assert not any("dgrad" in name for asked in clock.asked for name in asked)
    assert all("is off by" in wrong and "dgrad" in wrong.partition(":")[0] for wrong in found.wrong) and found.wrong


def test_a_way_that_raises_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    def broken(*args):
        raise RuntimeError("out of registers\nand more")

    for name in ("bn_statistics", "bn_finalize"):
        monkeypatch.setattr(fusedres.autograd.forward.launches("reference"), name, broken)
    found, _ = found_with(monkeypatch, lambda name: 1.0)
    assert found.entry == (UNFUSED, None)
    assert found.wrong[0] == "reference: RuntimeError: out of registers" and len(found.wrong) == 2


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: None) -> None:
    said: list[str] = []
    tuning = Tuning(CPU, "cpu", tmp_path / "table.json", rounds=1, say=said.append)
    too_small = Case(meta(BasicBlock(8, 8), 8, 0), 2, "float32", "train")
    tuning.run([too_small, Case(meta(BasicBlock(8, 8), 8), 2, "float32", "train")])
    assert tuning.finish(2) == 1
    assert said[0].startswith("left out: toy batch 2 float32 train: ") and said[-1].startswith("1 of 2 measured")
    assert dispatch.table(CPU) is None


# The whole command


def test_what_is_written_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    def seconds(name: str) -> float:
        return 2.0 if name == "eager" else 1.0 if "train" in running else 3.0

    monkeypatch.setattr(ways, "interleave", Synthetic(seconds))
    path = tmp_path / "table.json"
    cases = [Case(meta(BasicBlock(8, 8), 8), 2, "float32", phase) for phase in ("train", "infer")]
    for case in cases:
        running = case.phase
        tuning = Tuning(CPU, "cpu", path, rounds=1, say=lambda line: None)
        tuning.run([case])
        assert tuning.finish(1) == 0
    dispatch.install(CPU, store.read(path, HERE))
    block = fusedres.fuse(BasicBlock(8, 8))
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    with expect_paths(fused_forward=1, unfused=1):
        block(x)
        with torch.no_grad():
            block(x)


def test_what_the_file_lacks_comes_first_and_the_time_is_kept(tmp_path: Path, kept: None) -> None:
    path, said = tmp_path / "table.json", []
    cases = [Case(meta(BasicBlock(8, 8), 8, size), 1, "float32", "infer") for size in (4, 5, 6)]

    def tuned(cases: list[Case], seconds: float | None = None) -> list[int]:
        tuning = Tuning(CPU, "cpu", path, seconds, rounds=1, say=said.append)
        tuning.run(cases)
        return [shape.height for shape in tuning.entries]

    assert tuned(cases[1:2]) == [5]
    assert tuned(cases) == [4, 6, 5]
    assert tuned(cases, 1e-9) == []
    assert {shape.height for shape in store.read(path, HERE).blocks} == {4, 5, 6}


def test_a_full_disk_ends_the_command_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: None, capsys
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    path = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["fusedres", "tune", "--device", "cpu", "--out", str(path)])
    monkeypatch.setattr(command, "subjects", lambda models, size: [meta(BasicBlock(8, 8), 8)])
    monkeypatch.setattr(ways, "interleave", Synthetic(lambda name: 1.0))
    monkeypatch.setattr(store.files, "write", full)
    with pytest.raises(SystemExit) as left:
        main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and f"tune: {path} cannot be written" in last and "choose --out" in last


def test_an_interruption_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    said: list[str] = []
    options = command_options(["--device", "cpu", "--out", str(tmp_path / "table.json"), "--phase", "infer", "train"])
    monkeypatch.setattr(command, "subjects", lambda models, size: [meta(BasicBlock(8, 8), 8)])
    monkeypatch.setattr(ways, "interleave", Synthetic(lambda name: 1.0))
    monkeypatch.setattr(Tuning, "finish", lambda self, of: said.append(f"{len(self.entries)} of {of}"))
    right = Tuning._keep

    def keep(self: Tuning, case: Case, found: ways.Found) -> None:
        right(self, case, found)
        raise KeyboardInterrupt

    monkeypatch.setattr(Tuning, "_keep", keep)
    with pytest.raises(KeyboardInterrupt):
        command.main(options)
    assert said == ["1 of 2"] and len(store.read(tmp_path / "table.json", HERE).blocks) == 1


@interpreted
def test_products_and_tile_sizes_in_the_interpreter(tmp_path: Path, kept: None) -> None:
    """With the real kernels every way agrees with eager, and every problem with candidates gets one of them."""
    said: list[str] = []
    tuning = Tuning(CPU, "triton", tmp_path / "table.json", rounds=1, say=said.append)
    tuning.run([Case(bottleneck(), 1, "float32", "infer"), Case(stem(), 1, "float32", "train")])
    assert tuning.finish(2) == 0, said
    found = store.read(tmp_path / "table.json", HERE)
    assert len(found.blocks) == 2 and found.backend == "triton" and found.configs == tuning.configs


@interpreted
def test_the_fastest_candidate_that_is_right_is_kept(monkeypatch: pytest.MonkeyPatch, kept: None) -> None:
    from fusedres.tune import configs

    asked = []

    def times(variants, timer, *, rounds, warmup):
        asked.append([variant.name for variant in variants])
        return {variant.name: [float(10 - at)] * 5 for at, variant in enumerate(variants)}

    monkeypatch.setattr(configs, "interleave", times)
    bench = Bench(Case(meta(Bottleneck(16, 4), 16, 8), 2, "float32", "train"), CPU, "triton")
    sizes = configs.Configs(CPU, 5, lambda: 60.0, {})
    sizes.visit(bench, [Way("triton", LIBRARY, LIBRARY, True)])
    assert asked and all(len(labels) > 1 for labels in asked) and not sizes.wrong
    assert list(sizes.found.values()) == [labels[-1] for labels in asked]
    assert any(problem.startswith("gram_pivot float32 4") for problem in sizes.found)
    late = configs.Configs(CPU, 5, lambda: 0.0, {})
    late.visit(bench, [Way("triton", LIBRARY, LIBRARY, True)])
    assert late.found == {}


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusedres", "tune", "--model", "resnet18", "--batch", "1", "--phase", "infer"]
    command += ["--image-size", "32", "--device", "cpu", "--minutes", "60"]
    cache = tmp_path / "of the user"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=HANG,
        env={**os.environ, "FUSEDRES_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = cache.glob("*.json")
    data = json.loads(path.read_text())
    assert data["device"].startswith(done.stdout.partition(", backend cpu; writing")[0]) and data["blocks"]
    assert data["versions"] == store.versions() and {block["phase"] for block in data["blocks"]} == {"infer"}
    assert str(path) in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "vgg11"], "must be a residual network"),
        (["--device", "meta"], "--device must be cpu or a CUDA device"),
        (["--device", "gpu"], "--device must be one that torch sees"),
        (["--device", "cpu", "--dtype", "tf32"], "tf32 is for GPUs"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--minutes", "0"], "--minutes must be positive"),
        (["--device", "cpu", "--out", "."], "must be a file that can be written"),
    ],
)
def test_arguments_are_refused(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["fusedres", "tune", *arguments])
    monkeypatch.setattr(command, "Tuning", None)  # nothing is measured
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_a_backend_that_does_not_serve_the_device_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("it serves cuda tensors")

    monkeypatch.setattr(sys, "argv", ["fusedres", "tune", "--device", "cpu", "--backend", "cpu"])
    monkeypatch.setattr(command, "backend_for", refuse)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "--backend cpu: it serves cuda tensors" in capsys.readouterr().err

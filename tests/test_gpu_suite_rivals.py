"""The GPU-only parts of gpu_suite.py, with stand-ins for CUDA graphs and the compiler: every variant gets its row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the suite itself does this")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Return settings of a step that treats the CPU as a GPU and times one round."""
    from common import harness
    from suite import block_rows, models
    from suite.settings import Settings

    def captured(step, pool):
        assert pool == "pool"
        return step, step()

    def once(variants, timer, **options):
        return interleave(variants, timer, **options | {"rounds": 1, "budget": None})

    interleave = harness.interleave
    monkeypatch.setattr(harness, "interleave", once)
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(torch, "compile", lambda module, mode: module)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(block_rows, "ways", lambda _: {"library": "cpu", "library min": "cpu"})
    for module in (block_rows, models):
        monkeypatch.setattr(module, "captured", captured)
    made = Settings("step", tmp_path, torch.device("cpu"), tiny=False, until=float("inf"))
    rates = dict.fromkeys(("bfloat16", "float16", "tf32", "float32"), 1e12)
    made.__dict__["ceilings"] = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": 1e12, "matmul_by_precision": rates}
    return made


@pytest.mark.parametrize("phase", ["train", "infer"])
@pytest.mark.parametrize("kind", ["", "stock", "compile", "graphs", "max-autotune"])
@pytest.mark.parametrize("name", ["tiny.bottleneck.projection", "tiny.stem"])
def test_every_variant_of_a_kind_is_timed(name, kind, phase, settings):
    from common import blocks, harness
    from suite.block_rows import _Measurement, variants
    from suite.precision import PRECISIONS
    from suite.timed_block import BlockCase

    case = BlockCase(name, blocks.TINY[name], 2, phase)
    _Measurement(settings, "case", case, kind, PRECISIONS["float32"]).measure()
    rows = settings.journal.rows()
    wanted = ["eager", *variants(settings, kind, phase)]
    assert sorted(row["variant"] for row in rows) == sorted(wanted)
    told = {row["variant"]: row for row in rows if "median_s" not in row}
    assert set(told) == ({"cudnn"} if "cudnn" in wanted else set()) and all("skipped" in row for row in told.values())
    for row in rows:
        if row["variant"] not in told:
            assert set(harness.ROW_KEYS) <= row.keys() and row["kind"] == (kind or "plain")
            assert (row["backend"] == "cpu") == ("library" in row["variant"])
            counted = not row["variant"].startswith("graphed ") and "compile" not in row["variant"]
            assert (row["counted_bytes"] is not None) == counted


def test_a_wrong_graph_is_not_timed(settings, monkeypatch):
    """The replay is checked again: its gradients in training, its output in inference."""
    from common import blocks
    from suite import block_rows
    from suite.precision import PRECISIONS
    from suite.timed_block import BlockCase

    def wrong(step, pool):
        def replay():
            step()
            for parameter in held["module"].parameters():
                parameter.grad.mul_(2)

        return replay, step()

    held = {}
    module_of = block_rows._Measurement._module
    monkeypatch.setattr(block_rows, "captured", wrong)
    monkeypatch.setattr(
        block_rows._Measurement, "_module", lambda self, way: held.setdefault("module", module_of(self, way))
    )
    monkeypatch.setattr(block_rows, "variants", lambda *_: ["graphed eager"])
    case = BlockCase("tiny.basic", blocks.TINY["tiny.basic"], 2, "train")
    block_rows._Measurement(settings, "case", case, "graphs", PRECISIONS["float32"]).measure()
    rows = {row["variant"]: row for row in settings.journal.rows()}
    assert "grad is off by 1 of its norm from eager" in rows["graphed eager"]["error"]
    assert rows["eager"]["median_s"] > 0


def test_what_the_process_died_of_is_not_tried_again(settings, monkeypatch):
    """The other variants of its case are tried again."""
    from common import blocks
    from suite import right
    from suite.block_rows import _Measurement
    from suite.models import Work, measure
    from suite.precision import PRECISIONS
    from suite.settings import DIED
    from suite.timed_block import BlockCase

    def died(what):
        settings.journal.append(case="case", event="trying", what=what)
        settings.journal.append(case="case", event="crash")

    died("case, library")
    case = BlockCase("tiny.basic", blocks.TINY["tiny.basic"], 2, "train")
    _Measurement(settings, "case", case, "", PRECISIONS["float32"]).measure()
    measure(settings, "case", Work("tiny", "train", 2, PRECISIONS["float32"], 32, 10), ["library"], 1, 1)
    rows = [(row["name"], row["variant"], row.get("error")) for row in settings.journal.rows()]
    assert rows == [
        ("tiny.basic", "library", DIED), ("tiny.basic", "eager", None),
        ("tiny", "library", DIED), ("tiny", "eager", None),
    ]  # fmt: skip

    monkeypatch.setattr(right, "_wrong", lambda settings, call, backend, expected: None)
    settings.tiny = True
    first = right._cases(settings, {"float32": ["library"]}, (2,))[0]
    first.run()
    tried = [row["what"] for row in settings.journal.lines() if row.get("event") == "trying"][-2:]
    settings.journal.path.unlink()
    died(tried[0])
    right._cases(settings, {"float32": ["library"]}, (2,))[0].run()
    errors = [row["error"] for row in settings.journal.rows() if "error" in row]
    counts = [(row["right"] > 0, row["wrong"]) for row in settings.journal.rows() if "wrong" in row]
    assert errors == [DIED] and counts == [(True, 1)]


@pytest.mark.parametrize("phase", ["train", "infer"])
def test_models_in_graphs_and_compiled(phase, settings):
    from suite.models import Work, measure
    from suite.precision import PRECISIONS

    names = ["compile", "compile max-autotune", "graphed eager", "graphed compile"]
    work = Work("tiny", phase, 2, PRECISIONS["float32"], 32, 10)
    measure(settings, "case", work, names, rounds=1, budget=1)
    rows = settings.journal.rows()
    assert [row["variant"] for row in rows] == ["eager", *names]
    assert all(row["images_per_s"] > 0 for row in rows)


@pytest.mark.parametrize("module", ["block_rows", "models", "right", "miscompiled"])
def test_cases_on_a_gpu(module, settings):
    """The cases of both calls and of neither have unique names; bfloat16 and the large batch come first."""
    from suite.schedule import STEPS

    words = {"float16", "tf32", "float32"}
    for step in (step for step in STEPS.values() if step.module == module):
        names = [case.name for case in step.list_cases(settings)]
        assert max(Counter(names).values()) == 1
        of_words = [bool(words & set(name.replace(",", "").split())) for name in names]
        if step.name.startswith("all-"):
            assert all(any(word in name.replace(",", "").split() for name in names) for word in words)
        else:
            assert not any(of_words)
    if module == "models":
        names = [case.name for case in STEPS["train"].list_cases(settings)]
        assert names == [f"resnet50 train batch 256{kind}" for kind in ("", " compile", " graphs")]
        names = [case.name for case in STEPS["models"].list_cases(settings)]
        assert names[:2] == ["resnet50 train batch 256", "resnet50 infer batch 256"] and len(names) == 12

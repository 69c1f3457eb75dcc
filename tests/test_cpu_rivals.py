"""bench_model.py --rivals: ways of inference and training on a CPU, each in its own process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from suite import cpu_rivals

    return cpu_rivals


def work_of(batch: int, dtype: str, phase: str = "infer", size: int = 32) -> Any:
    from suite.models import Work
    from suite.precision import PRECISIONS

    return Work("resnet18", phase, batch, PRECISIONS[dtype], size)


def test_ways_are_timed_in_processes_of_their_own(rivals: Any) -> None:
    from common.rows import ROW_KEYS

    work = work_of(2, "float32")
    rows, notes = rivals.measure(work, ["eager", "library", "frozen"], rounds=2)
    assert [row["variant"] for row in rows] == ["eager", "library", "frozen"] and notes == []
    for row in rows:
        assert tuple(row) == ROW_KEYS and row["rounds"] == 2 and row["shape"] == [2, 3, 32, 32]
        assert row["images_per_s"] == pytest.approx(2 / row["median_s"])
        assert 0 <= row["slow_percent"] <= 100 and row["page_faults"] >= 0
    assert [row["conv"] is None for row in rows] == [True, False, False] and rows[2]["frozen"]
    goals = rivals.goals(rows)
    assert [line[4] for line in goals] == ["library over eager"] and goals[0][-1] in ("met", "missed")


def test_training_is_timed_in_processes_too(rivals: Any) -> None:
    work = work_of(4, "float32", "train", 64)
    assert rivals.ways(work) == ["eager", "library", "library min", "compile", "eager kept", "library kept"]
    names = ["eager", "library", "library min", "library kept"]
    rows, notes = rivals.measure(work, names, rounds=2)
    assert [row["variant"] for row in rows] == names and notes == []
    assert {row["phase"] for row in rows} == {"train"} and rows[2]["memory"] == "min"
    kept, default = (
        next(row["page_faults"] for row in rows if row["variant"] == name) for name in (names[3], names[0])
    )
    assert kept < default
    assert [line[4] for line in rivals.goals(rows)] == ["library over eager", "library min over library"]


def test_what_is_missing_or_wrong_is_said(rivals: Any) -> None:
    work = work_of(1, "bfloat16")
    if not pytest.importorskip("onnx", reason="a package that may be missing"):
        return
    rows, notes = rivals.measure(work, ["eager", "onnxruntime"], rounds=1)
    assert [row["variant"] for row in rows] == ["eager"] and notes[0].startswith("onnxruntime: ")
    with pytest.raises(RuntimeError, match="unheard"):
        rivals.Rival("unheard of", work, 1)


def test_goals_compare_ratios_of_the_same_case(rivals: Any) -> None:
    def row(variant: str, ratio: float, batch: int = 8) -> dict[str, Any]:
        about = {"name": "resnet50", "phase": "infer", "shape": [batch, 3, 224, 224], "dtype": "float32"}
        return about | {"variant": variant, "ratio": {"median": ratio}}

    lines = rivals.goals([row("eager", 1.0), row("frozen", 1.5), row("openvino", 1.6), row("library", 1.1)])
    assert [(line[4], line[6], line[7]) for line in lines] == [
        ("frozen over openvino", "0.94x", "missed"),
        ("library over eager", "1.10x", "missed"),
    ]
    assert rivals.goals([row("frozen", 1.5), row("openvino", 1.0, batch=1)]) == []


def _probe(rivals: Any, monkeypatch: pytest.MonkeyPatch, times: list[list[float]]) -> Any:
    """Return a probe of two cores that finds these times, after the fastest ones are known to be 1."""
    found = iter([[1.0, 1.0]] * 30 + times)
    monkeypatch.setattr(rivals.Probe, "_seconds", lambda self: next(found))
    return rivals.Probe(torch.float32)


def test_a_probe_notices_a_slow_core(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = _probe(rivals, monkeypatch, [[1.1, 1.0], [1.0, 1.3], [0.8, 1.0], [0.9, 1.1], [0.95, 1.0]])
    assert [probe.is_fast() for _ in range(5)] == [True, False, True, True, False]


def test_a_slow_sample_is_taken_again_while_there_is_patience(rivals: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = [1.0, 1.0], [1.0, 3.0]
    seconds = iter([10.0, 11.0])
    probe = _probe(rivals, monkeypatch, [fast, slow, slow, fast, fast])  # slow after the first, before the second
    assert probe.sample(lambda: next(seconds)) == (11.0, True)
    monkeypatch.setattr(rivals, "PATIENCE", -1.0)
    probe = _probe(rivals, monkeypatch, [fast, slow])
    assert probe.sample(lambda: 12.0) == (12.0, False)


def test_a_probe_times_each_core_and_leaves_the_process_on_all(rivals: Any) -> None:
    cores = os.sched_getaffinity(0)
    assert len(rivals.Probe(torch.bfloat16)._seconds()) == len(cores)
    assert os.sched_getaffinity(0) == cores


def test_options(rivals: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_model

    assert bench_model.parse(["--device", "cpu", "--batch", "1", "8"]).batch == [1, 8]
    with pytest.raises(SystemExit, match="2"):
        bench_model.parse(["--device", "cpu", "--rivals", "--dtype", "float16"])
    assert "--rivals: --dtype must be one of float32, bfloat16" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bench_model.parse(["--device", "cpu", "--rivals", "--keep-pages"])

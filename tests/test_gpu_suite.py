"""gpu_suite.py: a whole run on toy shapes, its arguments, and what it installs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from processes import HANG

from fusedres.dispatch import store
from fusedres.dispatch.table import parse
from fusedres.kernels.triton_core import launch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def suite(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu", "--tiny", *arguments]
    # without the variables of pytest-xdist's workers, because the suite starts its own pytest
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)


def rows_of(folder: Path, *steps: str) -> dict[str, list[dict]]:
    """Return the rows of these steps, all of which must have finished."""
    from suite.journal import Journal

    assert all(Journal(folder, name).finished() for name in steps)
    return {name: Journal(folder, name).rows() for name in steps}


def test_both_calls_run_and_nothing_runs_again(tmp_path):
    from common import harness

    first, second = tmp_path / "first", tmp_path / "second"
    done = suite("--call", "first", "--out", str(first))
    assert done.returncode == 0, done.stdout + done.stderr + (first / "log.txt").read_text()[-3000:]
    assert len(done.stdout.splitlines()) < 80
    names = ("compile", "facts", "right", "miscompiled", "train", "profile", "tests")
    assert sorted(path.name for path in first.iterdir()) == sorted([*(f"{name}.jsonl" for name in names), "log.txt"])
    rows = rows_of(first, *names)

    outcomes = {row["outcome"] for row in rows["tests"] if "test" in row}
    assert "passed" in outcomes and "failed" not in outcomes
    assert {row["dtype"] for row in rows["right"]} == {"float32", "float16"}
    assert all(row["right"] > 0 and row["wrong"] == 0 for row in rows["right"])
    assert sum(row["right"] for row in rows["right"]) > 50 and "ops at full size\nfloat32: " in done.stdout
    looked = rows["miscompiled"]
    assert {row["op"] for row in looked if row.get("waits") == "right"} >= {"conv_fprop", "conv_wgrad", "one_pass_tail"}
    assert {row["op"] for row in looked if row.get("eight_warps") == "right"} >= {"conv_fprop", "conv_dgrad"}
    assert "every wgmma waited for: " in done.stdout and "eight warps: " in done.stdout
    assert {(row["variant"], row["kind"], "skipped" in row) for row in rows["train"]} == {
        ("eager", "plain", False), ("library", "plain", False), ("eager", "compile", False),
        ("compile", "compile", False), ("library", "compile", False), ("eager", "graphs", False),
        ("graphed compile", "graphs", True), ("graphed library", "graphs", True),
    }  # fmt: skip
    assert rows["profile"] == rows["compile"] == []  # nothing is launched on a CPU; compile reports nothing
    assert "14 of 14 goals were not measured" in done.stdout  # the goals are not about toy shapes on a CPU

    sizes = {path.name: path.stat().st_size for path in first.iterdir()}
    again = suite("--call", "first", "--out", str(first))
    assert again.returncode == 0 and "--- tests" in again.stdout and "finished" not in again.stdout
    assert sizes == {path.name: path.stat().st_size for path in first.iterdir()}

    done = suite("--call", "second", "--after", str(first), "--out", str(second))
    assert done.returncode == 0, done.stdout + done.stderr + (second / "log.txt").read_text()[-3000:]
    assert len(done.stdout.splitlines()) < 80
    names = ("compile", "again", "ops", "blocks", "dispatch", "models")
    files = [*(f"{name}.jsonl" for name in names), "log.txt", "dispatch.json"]
    assert sorted(path.name for path in second.iterdir()) == sorted(files) and len(files) <= 8
    rows = rows_of(second, *names)
    assert rows["again"] == []  # nothing failed
    in_checkout = harness.commit() is not None
    assert all(row["median_s"] > 0 and (row["commit"] is not None) == in_checkout for row in rows["ops"])
    candidates = [row for row in rows["ops"] if row.get("variant") == "candidate"]
    assert {row["problem"] for row in candidates} == {"gram_pivot tf32 8"}  # only it has several here
    assert len({row["config"] for row in candidates}) == 2 and "--- candidates" in done.stdout
    assert {(row["variant"], row["phase"]) for row in rows["blocks"]} == {
        (variant, phase) for variant in ("eager", "library", "fused min") for phase in ("train", "infer")
    }  # fmt: skip
    assert all(set(harness.ROW_KEYS) <= row.keys() and row["percent_of_bound"] > 0 for row in rows["blocks"])
    assert rows["dispatch"][0]["configs"] and rows["dispatch"][0]["blocks"]
    auto = [row for row in rows["dispatch"] if row.get("variant") == "auto"]
    assert {(row["phase"], row["conv"], row["memory"]) for row in auto} == {
        ("train", "auto", "auto"), ("infer", "auto", "auto"),
    }  # fmt: skip
    data = json.loads((second / "dispatch.json").read_text())
    table = parse(data, data["device"])
    assert rows["dispatch"][0]["table"].endswith(store.file_name(table.device))
    assert table.configs and {"bottleneck"} == {shape.kind for shape in table.blocks}
    timed = [row for row in rows["models"] if "skipped" not in row]
    assert {(row["variant"], row["phase"]) for row in timed if row["kind"] == "plain"} == {
        (variant, phase) for variant in ("eager", "library", "auto") for phase in ("train", "infer")
    }  # fmt: skip
    assert {row["variant"] for row in timed if row["kind"] == "compile"} == {"eager", "compile", "library", "auto"}
    assert all(row["images_per_s"] > 0 and row["data"] == "synthetic" for row in timed)
    assert all(set(harness.ROW_KEYS) <= row.keys() for row in timed)
    skipped = {row["variant"] for row in rows["models"] if "skipped" in row}
    assert skipped == {f"graphed {variant}" for variant in ("eager", "compile", "library", "auto")}


def test_steps_of_neither_call_run_by_name(tmp_path):
    names = ("compile", "all-right", "sanitizer", "all-ops", "all-blocks", "all-models")
    done = suite("--only", *names, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    rows = rows_of(tmp_path, *names)
    assert all(row["right"] > 0 and row["wrong"] == 0 for row in rows["all-right"])
    assert [row["skipped"] for row in rows["sanitizer"]] == ["no GPU", "no GPU"]
    ops = {row["op"] for row in rows["all-ops"]}
    assert {"conv_fprop", "bn_add_relu", "bn_relu_maxpool", "shortcut_grad_"} <= ops
    timed, skipped = ([row for row in rows["all-blocks"] if ("skipped" in row) is flag] for flag in (False, True))
    variants = {"eager", "eager_nchw", "conv_only", "library", "fused min", "compile", "compile max-autotune"}
    assert {row["variant"] for row in timed} == variants
    assert {row["tf32"] for row in timed} == {True, False}
    assert all(row["counted_bytes"] > 0 for row in timed if "compile" not in row["variant"])
    graphed = {f"graphed {way}" for way in ("eager", "compile", "compile max-autotune", "library", "fused min")}
    assert {row["variant"] for row in skipped} == graphed | {"cudnn"}
    timed, skipped = ([row for row in rows["all-models"] if ("skipped" in row) is flag] for flag in (False, True))
    assert {row["variant"] for row in timed} == {"eager", "eager_nchw", "library", "compile max-autotune"}
    assert {row["variant"] for row in skipped} == {"graphed compile max-autotune", "graphed library"}
    assert all(row["images_per_s"] > 0 for row in timed)


def test_what_was_wrong_is_run_again(tmp_path):
    from suite.journal import Journal

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    Journal(first, "right").append(case="tiny, fused min, batch 2, float16", op="conv_fprop", error="wrong")
    test = "tests/test_gram.py::test_no_such_test"
    Journal(first, "tests").append(case="test", test="tests/test_gram.py", outcome="passed")
    Journal(first, "tests").append(case="test", test=test, outcome="failed", error="wrong")
    second.mkdir()
    done = suite("--only", "again", "--after", str(first), "--out", str(second))
    said = (second / "log.txt").read_text()
    assert done.returncode == 1 and "test_no_such_test" in said, done.stdout + said  # pytest does not find that test
    events = [(row["case"], row["event"]) for row in Journal(second, "again").lines() if row.get("event") == "done"]
    assert events == [("tiny, fused min, batch 2, float16", "done"), ("pytest", "done")]
    (row,) = (row for row in Journal(second, "again").rows() if row["case"].startswith("tiny"))
    assert row["right"] > 0 and row["wrong"] == 0 and "ops at full size\nfloat16: " in done.stdout


def test_bits_that_depend_on_waits_are_told(tmp_path, monkeypatch):
    """A small change of one value simulates such a result."""
    from contextlib import contextmanager

    from suite import miscompiled
    from suite.settings import Settings

    from fusedres.tune.calls import Call

    results = Call.results

    def nudged(call, backend):
        first, *rest = results(call, backend)
        first.view(-1 if first.is_contiguous() else first.shape)[(0,) * (1 if first.is_contiguous() else 4)] += 1e-3
        return [first, *rest]

    @contextmanager
    def waiting(folder, kernels):
        assert kernels and folder.exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Call, "results", nudged)
            yield

    monkeypatch.setattr(miscompiled, "waiting", waiting)
    settings = Settings("miscompiled", tmp_path, torch.device("cpu"), True, time.time() + 600)
    (case,) = (case for case in miscompiled.cases(settings) if case.name.startswith("waits"))
    case.run()
    rows = settings.journal.rows()
    assert rows and {row["waits"] for row in rows} == {"wrong"}
    assert all(
        "result 0 has 1 of " in row["error"] and "where every wgmma is waited for" in row["error"] for row in rows
    )


def test_a_step_by_kernel_says_what_each_could_take():
    from types import SimpleNamespace

    from suite.profile import by_kernel
    from suite.summary import _profile

    ceilings = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9}
    launches = [SimpleNamespace(name="ours", bytes=lambda: 2_000_000, arguments={}) for _ in range(2)]
    found = by_kernel({"ours": (0.008, 2), "theirs": (0.01, 3)}, launches, ceilings)
    assert found == [
        {"kernel": "theirs", "s": 0.01, "calls": 3, "floor_s": None},
        {"kernel": "ours", "s": 0.008, "calls": 2, "floor_s": 0.004},
    ]
    lines = _profile(found)
    assert lines[1].split() == ["theirs", "3", "10.00", "–"] and lines[2].split() == ["ours", "2", "8.00", "50"]
    assert lines[-1] == "2 kernels, 18.0 ms" and _profile([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "DIR"], "one of --call and --only is needed"),
        (["--out", "DIR", "--call", "first", "--only", "ops"], "one of --call and --only is needed"),
        (["--call", "first"], "--out DIR is needed"),
        (["--only", "ops", "--dry-run"], "--dry-run needs --call"),
        (["--out", "DIR", "--call", "first", "--device", "cpu"], "add --tiny"),
        (["--out", "DIR", "--call", "second", "--after", "/nowhere"], "no folder /nowhere"),
    ],
)
def test_arguments_are_refused(arguments, message, capsys):
    import gpu_suite

    with pytest.raises(SystemExit) as refused:
        gpu_suite.main(arguments)
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_a_pack_that_does_not_fit_is_not_taken(tmp_path):
    from suite.pack import MANIFEST, about

    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / MANIFEST).write_text(json.dumps(about(90)))
    done = suite("--out", str(tmp_path / "out"), "--only", "facts", "--pack", str(tmp_path / "pack"))
    assert done.returncode == 0, done.stderr
    assert "--pack is not taken: it is for capability 90, here 0" in done.stdout and "facts: finished" in done.stdout


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("fits", [True, False, None])
def test_the_package_and_the_kernels_come_from_a_pack_or_are_built(fits, installed, tmp_path, monkeypatch):
    """None means that there is no pack."""
    import gpu_suite
    from suite import pack

    did = []

    def pip(log, *arguments):
        did.append(arguments[-1])
        return True

    monkeypatch.setattr(gpu_suite, "find_spec", lambda name: installed or (name if did else None))
    monkeypatch.setattr(gpu_suite, "_pip", pip)
    monkeypatch.setattr(gpu_suite, "_built", lambda folder, call, log: did.append(f"kernels of {call}") or folder)
    monkeypatch.setattr(gpu_suite, "capability_of", lambda device: 90)
    monkeypatch.setattr(pack, "misfit", lambda folder, capability: None if fits else "it is for another")
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "fusedres.whl").touch()
    given = None if fits is None else folder
    options = Namespace(out=tmp_path, device="cuda", tiny=False, pack=given, call="first", after=None)
    with gpu_suite.ready(options) as building:
        assert (options.pack == folder) is bool(fits) and options.pack.is_dir() and 0 <= building < 60
    wanted = [] if installed else [str(folder / "fusedres.whl") if fits else str(BENCHMARKS.parent)]
    assert did == [*wanted, *([] if fits else ["kernels of first"])]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("tiny.bottleneck.projection", "fused min"),
        ("tiny.basic", "fused"),
        ("tiny.bottleneck", "library min"),
        ("tiny.basic.projection", "library"),
        ("tiny.stem", "fused"),
        ("tiny.stem", "library"),
    ],
)
def test_what_is_compiled_ahead_is_what_training_launches(name, way):
    """Launches recorded on meta tensors and under real autocast have the same kernels, with the same dtypes or None."""
    from common import blocks
    from compiled_code.candidates import cases, record
    from memory_traffic.launched import WAYS
    from suite.timed_block import Bench, BlockCase, BlockSettings

    import fusedres

    def arguments(launches: list) -> list[tuple]:
        return sorted(
            (made.name, *((key, str(getattr(value, "dtype", type(value)))) for key, value in made.arguments.items()))
            for made in launches
        )

    (run,) = cases(name, (way,), 2, torch.float16, mixed=True).values()
    ahead, real = record(run), []
    for phase in ("train", "infer"):
        bench = Bench(BlockCase(name, blocks.TINY[name], 2, phase), BlockSettings(torch.device("cpu"), torch.float16))
        module = fusedres.fuse(bench.stock, **WAYS[way][0])
        if isinstance(module, blocks.StemOnly):
            module.model.fused_conv = WAYS[way][0]["conv"]
        source = bench.x.requires_grad_(bench.input_grad)
        on_this_thread = torch.autograd.set_multithreading_enabled(False)
        with fusedres.use_backend("triton"), on_this_thread, launch.record_launches() as launches:
            with torch.inference_mode(phase == "infer"), bench.settings.autocast():
                out = module(source)
            if phase == "train":
                out.backward(bench.grad)
        real += launches
    assert arguments(ahead) == arguments(real) and real


def test_calls_end_in_time():
    from suite.schedule import CALLS, INSTALL

    for call, seconds in (("first", 330), ("second", 350)):
        times = [step.by for step in CALLS[call] if not step.beside]
        assert [INSTALL, *times] == sorted([INSTALL, *times]) and times[-1] + 12 <= seconds  # 12: imports, table
        assert all(step.by <= next(s.by for s in CALLS[call] if s.timed) for step in CALLS[call] if step.beside)

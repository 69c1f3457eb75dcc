"""Files of measured choices: where they are, which ones are read, warnings for the others, and how they are written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fusion import expect_paths, fused_twin, stock_case
from measured import CPU, HERE, bottleneck, empty_cache, table
from shapes import case

from fusedres import dispatch
from fusedres.dispatch import UNFUSED, Directions, Entry, Table, Way, store
from fusedres.dispatch.table import as_json, parse

FPROP = Directions(True, False, False)
BASIC = case("basic", "identity", planes=8, batch=2, height=5, width=6)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_cache(monkeypatch, tmp_path)


def test_the_users_table_is_read_once_and_goes_before_the_packages(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path / "packaged"
    monkeypatch.setattr(store, "PACKAGED", packaged)
    a, b, c = (bottleneck(batch=batch) for batch in (16, 64, 256))
    reference = Way("reference", FPROP)
    old = replace(table({a: reference, b: reference}, "reference", {"x": "1", "y": "1"}), versions={"torch": "0"})
    store.update(packaged / cache.name, old)
    assert set(store.load(CPU).blocks) == {a, b}  # the versions of the package's table do not matter
    store.update(cache, table({b: UNFUSED, c: Way("cpu")}, "cpu", {"y": "2"}))
    found = dispatch.table(CPU)
    assert {shape: entry.way for shape, entry in found.blocks.items()} == {a: reference, b: UNFUSED, c: Way("cpu")}
    assert (found.backend, found.configs) == ("cpu", {"x": "1", "y": "2"})
    cache.unlink()
    assert dispatch.table(CPU) is found


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert store.cache_folder() == Path("/a")
    monkeypatch.delenv("FUSEDRES_CACHE_DIR")
    assert store.cache_folder() == Path("/b/fusedres")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path("/c/.cache/fusedres")


GPU = "NVIDIA H100 80GB HBM3, sm_90"
GOOD = as_json(table({bottleneck(): Way("reference", FPROP, one_pass=True)}))
BLOCK = GOOD["blocks"][0]
BROKEN = {
    "cut": json.dumps(GOOD)[:-40],
    "empty": "",
    "binary": b"\xff\xfe\x00",
    "a list": "[1]",
    "an older format": json.dumps(GOOD | {"format": 0}),
    "another device": json.dumps(GOOD | {"device": GPU}),
    "other versions": json.dumps(GOOD | {"versions": {"torch": "1.0"}}),
    "no entries": json.dumps({key: value for key, value in GOOD.items() if key != "blocks"}),
    "an impossible size": json.dumps(GOOD | {"blocks": [BLOCK | {"height": 0}]}),
    "no valid way": json.dumps(GOOD | {"blocks": [BLOCK | {"way": "fast"}]}),
    "an unknown backend": json.dumps(GOOD | {"blocks": [BLOCK | {"way": BLOCK["way"] | {"backend": "metal"}}]}),
    "an unknown product": json.dumps(GOOD | {"blocks": [BLOCK | {"way": BLOCK["way"] | {"1x1": ["bprop"]}}]}),
    "no valid configs": json.dumps(GOOD | {"configs": ["a"]}),
}


def test_a_good_file_is_silent(cache: Path) -> None:
    cache.write_text(json.dumps(GOOD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_json(dispatch.table(CPU)) == GOOD == as_json(parse(json.loads(cache.read_text()), HERE))


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_used_is_told_once_and_ignored(cache: Path, content: str | bytes) -> None:
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    with warnings.catch_warnings(record=True) as caught, expect_paths(fused_forward=2):
        warnings.simplefilter("always")
        twin(x)
        twin(x)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(cache) in message and "python -m fusedres tune" in message and "is ignored" in message


def test_a_table_that_needs_triton_is_told_where_there_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "family", lambda device: GPU)
    monkeypatch.setitem(sys.modules, "triton", None)
    path = cache.with_name(store.file_name(GPU))
    store.update(path, replace(table({bottleneck(): Way("reference")}, "reference"), device=GPU))
    assert store.load(CPU) is not None
    store.update(path, replace(table({bottleneck(batch=16): Way("triton")}, "triton"), device=GPU))
    with pytest.warns(UserWarning, match="it needs Triton"):
        assert store.load(CPU) is None


def test_a_folder_in_its_place_is_told(cache: Path) -> None:
    cache.mkdir()
    with pytest.warns(UserWarning, match="is ignored"):
        assert dispatch.table(CPU) is None


def test_writing_keeps_what_others_wrote_of_the_same_versions(cache: Path) -> None:
    a, b = bottleneck(batch=16), bottleneck(batch=64)
    store.update(cache, replace(table({a: UNFUSED}), versions={"torch": "0"}))
    store.update(cache, table({b: Way("cpu")}, configs={"x": "1"}))
    assert set(store.read(cache, HERE).blocks) == {b}
    store.update(cache, table({a: Way("cpu")}))
    store.update(cache, table({b: UNFUSED}))
    found = store.read(cache, HERE)
    assert {shape: entry.way for shape, entry in found.blocks.items()} == {a: Way("cpu"), b: UNFUSED}
    assert found.configs == {"x": "1"}
    cache.write_text("broken")
    with pytest.warns(UserWarning, match="is ignored"):
        store.update(cache, table({a: UNFUSED}))
    assert set(store.read(cache, HERE).blocks) == {a}


def test_another_backends_entry_gives_way_to_what_gains_more(cache: Path) -> None:
    a, b, c, d = (bottleneck(batch=1 << batch) for batch in range(4))

    def gains(backend: str, **found: tuple[Way, float]) -> Table:
        shapes = {"a": a, "b": b, "c": c, "d": d}
        blocks = {shapes[name]: Entry(*entry) for name, entry in found.items()}
        return replace(table({}, backend), blocks=blocks, device=GPU)

    triton, cuda = Way("triton"), Way("cuda")
    store.update(cache, gains("triton", a=(triton, 1.5), b=(triton, 1.1), c=(triton, 1.2), d=(UNFUSED, 0.9)))
    store.update(cache, gains("cuda", a=(cuda, 1.3), b=(cuda, 1.4), c=(UNFUSED, 0.8), d=(cuda, 0.99)))
    ways = {shape: entry.way for shape, entry in store.read(cache, GPU).blocks.items()}
    assert ways == {a: triton, b: cuda, c: triton, d: cuda}
    store.update(cache, gains("triton", a=(triton, 1.0), c=(UNFUSED, 0.9)))  # for one backend the newest entry counts
    ways = {shape: entry.way for shape, entry in store.read(cache, GPU).blocks.items()}
    assert ways == {a: triton, b: cuda, c: UNFUSED, d: cuda}


def _write_some(path: Path, offset: int, start: object) -> None:
    start.wait()
    for batch in range(20):
        store.update(path, table({bottleneck(batch=1 << batch, in_channels=offset): Way("cpu")}))


def test_two_processes_at_once_both_end_in_the_file(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    writers = [context.Process(target=_write_some, args=(cache, offset, start)) for offset in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = store.read(cache, HERE)
    assert Counter(shape.in_channels for shape in found.blocks) == {1: 20, 2: 20}


def _die_writing(path: Path, at: str) -> None:
    setattr(os, at, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    store.update(path, table({bottleneck(): UNFUSED}))


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file_whole(cache: Path, at: str) -> None:
    store.update(cache, table({bottleneck(): Way("cpu")}))
    before = cache.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(cache, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert cache.read_bytes() == before
    store.update(cache, table({bottleneck(batch=16): UNFUSED}))  # neither the lock nor the left-over file prevents it
    assert len(store.read(cache, HERE).blocks) == 2


def test_devices_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.file_name("NVIDIA H100 80GB HBM3, sm_90") == "nvidia-h100-80gb-hbm3-sm-90.json"
    assert store.family(torch.device("meta")) is None
    torch.set_num_threads(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    one = store.family(CPU)
    torch.set_num_threads(2)
    assert one.endswith("1 threads") and store.family(CPU).endswith("2 threads")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in store.family(CPU)


def test_processors_of_one_name_with_other_instruction_sets_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedres.processor._CPUINFO", tmp_path / "cpuinfo")
    torch.set_num_threads(2)
    found = []
    for flags in ("fpu avx2", "fpu avx2 avx512f avx512_bf16 amx_bf16_extra", "fpu"):
        (tmp_path / "cpuinfo").write_text(f"model name\t: Made Up\nflags\t\t: {flags}\n\n" * 2)
        found.append(store.family(CPU).removesuffix(", Triton interpreted"))
    made_up = ("Made Up with avx2", "Made Up with avx2 avx512f avx512_bf16", "Made Up")
    assert found == [f"{name}, 2 threads" for name in made_up]
    (tmp_path / "cpuinfo").unlink()
    assert ", 2 threads" in store.family(CPU)


def test_the_tests_never_read_or_write_the_users_cache() -> None:
    assert os.environ["FUSEDRES_CACHE_DIR"] == "/dev/null/no-cache"
    with pytest.raises(NotADirectoryError):
        store.update(store.cache_folder() / "x.json", table())

"""The files that examples/train.py writes and reads: checkpoints, curves and results, also on full or broken disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")

STATE = {"settings": {"arch": "resnet10"}, "model": {"w": torch.arange(5.0)}, "epoch": 1}
SMALL = ["--arch", "resnet10", "--image-size", "8", "--batch", "4", "--epochs", "1", "--no-fused"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write ten images in two classes."""
    root = tmp_path_factory.mktemp("pictures")
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(5):
            Image.new("RGB", (50, 40), (20 * i, 0, 0)).save(root / label / f"{i}.png")
    return root


@pytest.fixture
def saved(example: SimpleNamespace, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "checkpoint.pt"
    example.checkpoint.save(STATE, path)
    return path


def is_state(found: dict[str, Any]) -> bool:
    return found["settings"] == STATE["settings"] and torch.equal(found["model"]["w"], torch.arange(5.0))


def refused(example: SimpleNamespace, path: Path) -> str:
    """Return the message for a checkpoint that cannot be used: a sentence that names the file."""
    with pytest.raises(example.data.UsageError) as caught:
        example.checkpoint.load(path)
    said = str(caught.value)
    assert said.startswith(str(path)) and said.endswith(": delete it or omit --resume") and "\n" not in said
    return said


# Checkpoints: reading


def test_every_single_bit_is_checked(example: SimpleNamespace, saved: Path) -> None:
    data = saved.read_bytes()
    assert is_state(example.checkpoint.load(saved)) and is_state(torch.load(saved, weights_only=True))
    with saved.open("r+b", buffering=0) as file:
        for bit in range(8 * len(data)):
            at = bit // 8
            os.pwrite(file.fileno(), bytes([data[at] ^ 1 << bit % 8]), at)
            with pytest.raises(example.data.UsageError):
                example.checkpoint.load(saved)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert is_state(example.checkpoint.load(saved)) and saved.read_bytes() == data


def test_damage_of_all_kinds_is_found(example: SimpleNamespace, tmp_path: Path) -> None:
    path, rng = tmp_path / "checkpoint.pt", random.Random(0)
    example.checkpoint.save(STATE | {"large": torch.randn(50_000)}, path)
    data = path.read_bytes()
    damaged = [data[:at] + bytes(4096) + data[at + 4096 :] for at in range(0, len(data) - 4096, 4096)]
    damaged += [data[: rng.randrange(len(data))] for _ in range(20)] + [data + b"x", data + data, data[1:], b""]
    damaged += [data[4096:8192] + data[:4096] + data[8192:], rng.randbytes(5000), rng.randbytes(3), bytes(5000)]
    for content in damaged:
        path.write_bytes(content)
        refused(example, path)


class Raises:
    def __init__(self, error: str) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"(_ for _ in ()).throw({self.error})",)


def test_strange_pickles_are_refused_and_never_run(example: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    contents = [b"hello", b"}q\x00.", b"\x80\x02K", b"(" * 100_000, pickle.dumps(STATE["settings"])]
    contents += [
        pickle.dumps(Raises(error)) for error in ("ZeroDivisionError()", "KeyboardInterrupt()", "SystemExit(3)")
    ]
    contents.append(b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".")
    for content in contents:
        path.write_bytes(content)
        refused(example, path)


@pytest.mark.parametrize(
    "content",
    [Raises("SystemExit(3)"), {"settings": 1}, {"some": 1}, [1], 3],
    ids=["raises", "settings", "another", "list", "number"],
)
def test_a_whole_file_of_something_else_is_refused(example: SimpleNamespace, tmp_path: Path, content: Any) -> None:
    """Its checksum is right, so it is not damaged."""
    example.checkpoint.save(content, tmp_path / "checkpoint.pt")
    refused(example, tmp_path / "checkpoint.pt")


OTHERS: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_file_is_refused_with_resume(
    example: SimpleNamespace, tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "checkpoint.pt")
    refused(example, tmp_path / "checkpoint.pt")
    before = os.lstat(tmp_path / "checkpoint.pt")
    assert example.train.main([*SMALL, "--resume", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("train.py: error: ")
    assert os.path.samestat(os.lstat(tmp_path / "checkpoint.pt"), before)


def test_a_file_that_may_not_be_read_is_refused(
    example: SimpleNamespace, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    assert "(Permission denied)" in refused(example, saved)


def test_a_checkpoint_of_another_version_is_refused(
    example: SimpleNamespace, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--data", str(pictures), "--out", str(tmp_path / "out")]
    assert example.train.main(options) == 0
    path = tmp_path / "out" / "checkpoint.pt"
    whole = example.checkpoint.load(path)
    for change in ({"model": {}}, {"ranks": []}, {"optimizer": 3}, {"ranks": [{"sums": None, "rng": None}]}):
        example.checkpoint.save(whole | change, path)
        assert example.train.main([*options, "--resume"]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"train.py: error: {path} was made by another version of this script")


# Writing


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("at", "number"),
    [
        *(("write", errno.ENOSPC), ("write", errno.EDQUOT), ("fsync", errno.EIO), ("replace", errno.EACCES)),
        ("open", errno.EROFS),
    ],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    example: SimpleNamespace, saved: Path, monkeypatch: pytest.MonkeyPatch, at: str, number: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, at, failing(number))
        with pytest.raises(example.data.UsageError) as caught:
            example.checkpoint.save(STATE | {"epoch": 2}, saved)
        assert str(caught.value) == (
            f"{saved} cannot be written ({os.strerror(number)}): make room there or pass another --out"
        )
    assert os.listdir(saved.parent) == [saved.name]
    assert example.checkpoint.load(saved)["epoch"] == 1


def test_a_limit_of_the_system_is_told(example: SimpleNamespace, saved: Path) -> None:
    """With a real limit, part of a write succeeds, and then no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(example.data.UsageError, match="cannot be written"):
            example.checkpoint.save(STATE | {"large": torch.zeros(10_000)}, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(saved.parent) == [saved.name] and is_state(example.checkpoint.load(saved))


def test_a_full_disk_ends_the_script_with_a_sentence(
    example: SimpleNamespace,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The disk is full when the checkpoint, the curves or the results are written."""
    out, report, files = tmp_path / "out", tmp_path / "result.json", example.shared.files
    report.write_text("old")
    options = [*SMALL, "--data", str(pictures), "--out", str(out), "--json", str(report)]
    write = files.write
    for name in ("checkpoint.pt", "curves.png", "result.json"):

        def full(path: Path, data: bytes, name: str = name) -> None:
            failing(errno.ENOSPC)() if path.name == name else write(path, data)

        monkeypatch.setattr(files, "write", full)
        assert example.train.main(options) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("train.py: error: ") and f"{name} cannot be written (No space left on device)" in last
        assert not (out / name).exists() and report.read_text() == "old"


@pytest.mark.parametrize("place", ["out", "json"])
def test_what_cannot_be_written_is_said_before_anything_is_trained(
    example: SimpleNamespace,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    options = [*SMALL, "--data", str(pictures), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "r.json")]
    monkeypatch.setattr(example.trainer.Trainer, "run", None)
    name = {"out": "checkpoint.pt", "json": "r.json"}[place]
    right = os.open

    def open_(path: Any, *args: Any, **more: Any) -> int:
        return failing(errno.EROFS)() if f".{name}." in str(path) else right(path, *args, **more)

    monkeypatch.setattr(os, "open", open_)
    assert example.train.main(options) == 2
    assert f"{name} cannot be written (Read-only file system)" in capsys.readouterr().err


def test_results_go_through_links_and_to_devices(example: SimpleNamespace, tmp_path: Path) -> None:
    train = example.train
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        path = train._json_file(str(tmp_path / name))
        train._check_json(path)
        train._write_json(name, path)
        assert (tmp_path / "file").read_text() == name
    assert (tmp_path / "link").is_symlink()
    before = os.stat("/dev/null")
    train._check_json(train._json_file("/dev/null"))
    train._write_json("text", train._json_file("/dev/null"))
    assert os.path.samestat(before, os.stat("/dev/null"))
    with pytest.raises(example.data.UsageError, match="No space left on device"):
        train._write_json("text", train._json_file("/dev/full"))
    with pytest.raises(example.data.UsageError, match="it is a folder"):
        train._check_json(train._json_file(str(tmp_path)))


def _save_often(save: Callable[..., None], path: Path, number: int) -> None:
    for _ in range(30):
        save({"settings": {}, "all": torch.full((20_000,), float(number))}, path)


def test_two_processes_write_one_checkpoint(example: SimpleNamespace, tmp_path: Path) -> None:
    path, context = tmp_path / "checkpoint.pt", multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_often, args=(example.checkpoint.save, path, k)) for k in (1, 2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            found = example.checkpoint.load(path)["all"]
            assert torch.equal(found, found[:1].expand_as(found))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def _die_writing(save: Callable[..., None], path: Path) -> None:
    os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    save(STATE | {"epoch": 2}, path)


def test_what_a_killed_process_leaves_is_removed_and_what_a_live_one_writes_is_not(
    example: SimpleNamespace, saved: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(example.checkpoint.save, saved))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(os.listdir(saved.parent)) == 2 and is_state(example.checkpoint.load(saved))
    others = [saved.with_name(name) for name in (".checkpoint.pt.unfinished", "checkpoint.pt.tmp", ".checkpoint.pt.x")]
    for other in others:
        other.touch()
    with example.shared.files._unfinished(saved) as (alive, _):
        example.checkpoint.save(STATE | {"epoch": 3}, saved)
        assert set(saved.parent.iterdir()) == {saved, alive, *others}
    assert set(saved.parent.iterdir()) == {saved, *others}
    assert example.checkpoint.load(saved)["epoch"] == 3


def test_a_file_taken_for_a_leftover_is_made_anew(
    example: SimpleNamespace, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes the file after it was made and before it is locked."""
    files, right, made = example.shared.files, os.open, []

    def open_(path: Any, *args: Any, **more: Any) -> int:
        descriptor = right(path, *args, **more)
        if str(path).endswith(".unfinished"):
            made.append(path)
            if len(made) == 1:
                os.unlink(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_)
    files.write(saved, b"new")
    assert saved.read_bytes() == b"new" and len(made) == 2 and os.listdir(saved.parent) == [saved.name]

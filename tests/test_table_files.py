"""A wrong file instead of a table of measured choices causes one warning and no effect, and changes no other file."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion import expect_paths, fused_twin, stock_case
from measured import CPU, HERE, bottleneck, empty_cache, following, table
from shapes import case

from fusedres.dispatch import LIBRARY, Directions, Shape, Table, Way, store
from fusedres.dispatch.table import as_json, batch_class

BASIC = case("basic", "identity", planes=8, batch=2, height=5, width=6)
OWN = Directions(True, True, True)
FOUND = table(
    {
        bottleneck(): Way("reference", OWN, LIBRARY, one_pass=True),
        bottleneck(batch=16): Way("cpu"),
        bottleneck(phase="infer"): Way(None),
    },
    configs={"gram float32 8": "BLOCK_C=16 w4 s1"},
)
GOOD = as_json(FOUND)
BLOCK = next(block for block in GOOD["blocks"] if isinstance(block["way"], dict) and block["way"]["one_pass"])


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return empty_cache(monkeypatch, tmp_path)


def loaded() -> tuple[Table | None, list[str]]:
    """Return the table of the CPU, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = store.load(CPU)
    return found, [str(warning.message) for warning in caught]


def is_told_once_and_ignored(cache: Path) -> None:
    found, said = loaded()
    assert found is None
    (message,) = said
    assert message.startswith(f"fusedres: {cache} is ignored: ") and "\n" not in message
    assert len(message) < 1000


# Contents


def block(**fields: object) -> str:
    return json.dumps(GOOD | {"blocks": [BLOCK | fields]})


def way(**fields: object) -> str:
    return block(way=BLOCK["way"] | fields)


CONTENTS = {
    "nested lists": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "nested within": json.dumps(GOOD)[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}",
    "latin-1": json.dumps(GOOD | {"date": "é"}, ensure_ascii=False).encode("latin-1"),
    "utf-16": json.dumps(GOOD).encode("utf-16"),
    "a byte order mark": json.dumps(GOOD).encode("utf-8-sig"),
    "nulls": bytes(5000),
    "a number": "1",
    "null": "null",
    "format true": json.dumps(GOOD | {"format": True}),
    "format 1.0": json.dumps(GOOD | {"format": 1.0}),
    "a long format": json.dumps(GOOD | {"format": "x" * 1_000_000}),
    "long versions": json.dumps(GOOD | {"versions": {"torch": "x" * 1_000_000}}),
    "blocks an object": json.dumps(GOOD | {"blocks": {"a": BLOCK}}),
    "a block a list": json.dumps(GOOD | {"blocks": [[BLOCK]]}),
    "the same shape twice": json.dumps(GOOD | {"blocks": [BLOCK, BLOCK]}),
    "a name twice": json.dumps(GOOD)[:-1] + ', "format": 1}',
    "configs of numbers": json.dumps(GOOD | {"configs": {"gram float32 8": 1}}),
    "versions a list": json.dumps(GOOD | {"versions": []}),
    "date a number": json.dumps(GOOD | {"date": 1}),
    "backend null": json.dumps(GOOD | {"backend": None}),
    "a backend for other shapes": json.dumps(GOOD | {"backend": "cuda", "blocks": []}),
    "size 10^400": block(channels=10**400),
    "size 10^5000": block().replace('"channels": 64', '"channels": 1' + "0" * 5000),
    "size 2^63": block(height=2**63),
    "size true": block(batch=True),
    "size 1.0": block(batch=1.0),
    "size of text": block(width="56"),
    "size -1": block(stride=-1),
    "size null": block(groups=None),
    "ratio 10^400": block(eager_over_way=10**400),
    "ratio 1e400": block().replace('"eager_over_way": 1.0', '"eager_over_way": 1e400'),
    "ratio NaN": block(eager_over_way=float("nan")),
    "ratio Infinity": block(eager_over_way=float("inf")),
    "ratio -1": block(eager_over_way=-1),
    "ratio true": block(eager_over_way=True),
    "ratio of text": block(eager_over_way="1.5"),
    "an unknown phase": block(phase="training"),
    "an unknown dtype": block(dtype="float8"),
    "an unknown shortcut": block(shortcut="long"),
    "an unknown kind": block(kind=1),
    "a way a list": block(way=["unfused"]),
    "a way null": block(way=None),
    "a backend of a list": way(backend=["cpu"]),
    "cuda on a cpu": way(backend="cuda"),
    "products of the cpu backend": way(backend="cpu"),
    "larger products of the cpu backend": way(backend="cpu", **{"1x1": [], "larger": ["dgrad"]}),
    "products of text": way(larger="fprop"),
    "a product twice": way(larger=["fprop", "fprop"]),
    "products an object": way(larger={"fprop": True}),
    "one_pass 1": way(one_pass=1),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_contents_that_are_no_table(cache: Path, content: str | bytes) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    assert data != json.dumps(GOOD).encode()
    cache.write_bytes(data)
    is_told_once_and_ignored(cache)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        here = store.family(CPU)
        path = cache.with_name(store.file_name(here))
        path.write_text(
            json.dumps(GOOD | {"device": here, "blocks": [BLOCK | {"way": BLOCK["way"]}], "backend": "triton"})
        )
        if interpreted == "0":
            is_told_once_and_ignored(path)
        else:
            assert loaded()[1] == []
    assert store.serving("NVIDIA H100 80GB HBM3, sm_90") == {"reference", "triton", "cuda"}


def test_a_table_too_large_is_not_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cache.open("wb") as file:
        file.truncate(1 << 40)  # takes no disk space
    is_told_once_and_ignored(cache)
    text = json.dumps(GOOD)
    cache.write_text(text)
    monkeypatch.setattr(store, "LARGEST", len(text) - 1)
    is_told_once_and_ignored(cache)
    monkeypatch.setattr(store, "LARGEST", len(text))
    assert loaded()[1] == []


def changed(value: Any, random_: random.Random) -> Any:
    """Return the value with a part of it replaced, removed or doubled."""
    strange: list[Any] = [
        *(None, True, False, 0, -1, 1, 2**62, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
        *("", "cpu", "cuda", "triton", "unfused", "fprop", "x" * 5000, "\ud800", [], {}, [[]], {"a": 1}, [1, 2]),
    ]
    if random_.random() < 0.2 or not isinstance(value, dict | list) or not value:
        return random_.choice(strange)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random_.choice(keys)
    how = random_.random()
    if how < 0.1:
        del value[key]
    elif how < 0.2 and isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    elif how < 0.3 and isinstance(value, dict):
        value[random_.choice(["", "x", "backend", key + key])] = value[key]
    else:
        value[key] = changed(value[key], random_)
    return value


CALLS = [bottleneck(), bottleneck(7, 3), bottleneck(batch=1, height=0), bottleneck(phase="infer", in_channels=2**62)]


def test_mutated_tables_are_read_as_tables_or_told(cache: Path) -> None:
    """Values are replaced, removed or doubled; bytes are flipped, cut or doubled. Look-ups never fail."""
    random_, refused, taken = random.Random(0), 0, 0
    for turn in range(600):
        if turn % 2:
            data = bytearray(json.dumps(GOOD).encode())
            at = random_.randrange(len(data))
            for _ in range(random_.randint(1, 3)):
                data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
            content = bytes(data[:at] if turn % 8 == 1 else data[:at] + data[at // 2 :] if turn % 8 == 3 else data)
        else:
            value: Any = copy.deepcopy(GOOD)
            for _ in range(random_.randint(1, 3)):
                value = changed(value, random_)
            content = json.dumps(value).encode()
        cache.write_bytes(content)
        found, said = loaded()
        assert len(said) == (found is None), (content, said)
        refused, taken = refused + (found is None), taken + (found is not None)
        if found is not None:
            assert found.backends <= store.serving(HERE)
            assert all(isinstance(found.way(call), Way) for call in CALLS)
    assert refused > 300 and taken > 20


# Not a regular file


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as found:
        os.chdir(path.parent)  # because the path of a socket must be short
        found.bind(path.name)


OTHERS: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "pipe": pipe,
    "socket": listening,
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to a folder": lambda path: path.symlink_to("."),
    "link to text": lambda path: path.symlink_to("/proc/self/status"),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_what_is_no_file_is_told_and_never_waited_for(
    cache: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache.parent)
    make(cache)
    is_told_once_and_ignored(cache)


def test_a_table_that_may_not_be_read_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text(json.dumps(GOOD))

    def refuse(*args: object) -> int:
        raise PermissionError(13, "Permission denied", str(cache))

    monkeypatch.setattr(os, "open", refuse)  # root may read every file, so a permission cannot be used
    is_told_once_and_ignored(cache)


def test_a_link_to_a_table_is_followed(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text(json.dumps(GOOD))
    cache.symlink_to(tmp_path / "elsewhere.json")
    found, said = loaded()
    assert said == [] and as_json(found) == GOOD


@pytest.mark.parametrize("content", [CONTENTS["nested lists"], CONTENTS["cuda on a cpu"], CONTENTS["size 10^400"]])
def test_blocks_run_as_without_a_table(cache: Path, content: str) -> None:
    cache.write_text(content)
    stock, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(stock)
    with warnings.catch_warnings(record=True) as caught, expect_paths(fused_forward=2):
        warnings.simplefilter("always")
        torch.testing.assert_close(twin(x), stock(x), rtol=1e-4, atol=1e-4)
        twin(x)
    assert len(caught) == 1


# Look-ups


def test_empty_batches_and_images_are_looked_up() -> None:
    assert batch_class(0) == 1
    assert all(isinstance(FOUND.way(bottleneck(batch=1, **{name: 0})), Way) for name in ("height", "width"))
    stock, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(stock)
    with following(FOUND):
        assert twin(x[:0]).shape == stock(x[:0]).shape


def test_sizes_of_all_magnitudes_are_compared() -> None:
    largest = dict.fromkeys(("in_channels", "channels", "out_channels", "height", "width", "batch"), 2**63 - 1)
    found = table({bottleneck(**largest): Way("reference")}, "cpu")
    assert found.way(bottleneck(1, 1)) == Way("cpu")
    assert found.way(Shape._make(bottleneck(**largest))) == Way("reference")


# Writing


def test_the_lock_leaves_what_it_is_a_link_to(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    lock = cache.with_name(cache.name + ".lock")
    lock.symlink_to(precious)
    for write in (lambda: store.writable(cache), lambda: store.update(cache, FOUND)):
        with pytest.raises(OSError, match="symbolic link"):
            write()
    assert precious.read_text() == "precious" and not cache.exists()
    lock.unlink()
    lock.hardlink_to(precious)
    store.update(cache, FOUND)
    assert precious.read_text() == "precious" and as_json(store.read(cache, HERE)) == GOOD


@pytest.mark.parametrize("make", [pipe, Path.mkdir], ids=["pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(cache: Path, make: Callable[[Path], None]) -> None:
    make(cache.with_name(cache.name + ".lock"))
    with pytest.raises(OSError, match="lock"):
        store.update(cache, FOUND)


@pytest.mark.filterwarnings("ignore:fusedres")
def test_only_files_are_replaced(cache: Path) -> None:
    pipe(cache)
    for write in (lambda: store.writable(cache), lambda: store.update(cache, FOUND)):
        with pytest.raises(OSError, match="no regular file"):
            write()
    assert stat.S_ISFIFO(cache.lstat().st_mode)
    with pytest.raises(OSError, match="no regular file"):
        store.writable(Path("/dev/null"))


def test_a_link_is_replaced_and_not_what_it_points_to(cache: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    cache.symlink_to(precious)
    with pytest.warns(UserWarning, match="is ignored"):
        store.update(cache, FOUND)
    assert precious.read_text() == "precious" and not cache.is_symlink()
    assert as_json(store.read(cache, HERE)) == GOOD


def test_measuring_anew_heals_a_table_that_is_refused(cache: Path) -> None:
    cache.write_text(CONTENTS["cuda on a cpu"])
    with pytest.warns(UserWarning, match="names the backend cuda, which does not serve this device"):
        store.update(cache, FOUND)
    assert loaded()[1] == []


def test_a_full_disk_leaves_the_old_table(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.update(cache, FOUND)
    before = cache.read_bytes()

    def full(*args: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            store.update(cache, table({bottleneck(batch=1): Way("cpu")}))
    assert cache.read_bytes() == before
    assert {path.name for path in cache.parent.iterdir()} == {cache.name, cache.name + ".lock"}

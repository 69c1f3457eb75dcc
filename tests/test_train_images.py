"""examples/train.py names an image that it cannot read in one sentence, whatever the decoder raises."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")

SMALL = ["--arch", "resnet10", "--image-size", "8", "--batch", "4", "--epochs", "1", "--no-fused"]


def png(picture: Image.Image | None = None, form: str = "PNG") -> bytearray:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    (picture or Image.fromarray(pixels)).save(file, form)
    return bytearray(file.getvalue())


def with_byte(data: bytearray, at: int, value: int) -> bytearray:
    data[at] = value
    return data


def header(width: int, height: int) -> bytes:
    """Return a PNG file that claims to have this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end


IMAGES: dict[str, tuple[str, bytes | bytearray]] = {
    "nothing": ("png", b""),
    "text": ("jpg", b"hello"),
    "cut PNG": ("png", png()[:3000]),
    "cut JPEG": ("jpg", png(form="JPEG")[:300]),
    "cut TIFF": ("tiff", png(form="TIFF")[:100]),
    "length of IHDR": ("png", with_byte(png(), 11, 5)),
    "length of IDAT": ("png", with_byte(png(), png().find(b"IDAT") - 1, 7)),
    "compression": ("png", with_byte(png(), png().find(b"IDAT") + 30, 0)),
    "PPM of no size": ("ppm", b"P6\nQ0 40\n255\n" + bytes(6000)),
    "PPM 0 by 0": ("ppm", b"P6\n0 0\n255\n"),
    "PPM huge": ("ppm", b"P6\n99999999999999999999 40\n255\n" + bytes(600)),
    "PNG 0 by 5": ("png", header(0, 5)),
    "PNG 2^31 by 2^31": ("png", header(2**31 - 1, 2**31 - 1)),
    "PNG without pixels": ("png", header(5, 5)),
    "4e8 pixels": ("png", png(Image.new("1", (20_000, 20_000)))),
    "BMP of size 0": ("bmp", with_byte(with_byte(png(form="BMP"), 18, 0), 22, 0)),
}


def images(example: SimpleNamespace, root: Path, name: str, data: bytes | bytearray) -> Any:
    (root / "a").mkdir()
    (root / "a" / name).write_bytes(data)
    return example.data.FolderImages(example.data._image_folder(root), 16)


def is_refused_image(example: SimpleNamespace, found: Any, path: Path) -> None:
    for rng in (None, np.random.default_rng(0)):
        with pytest.raises(example.data.UsageError) as caught:
            found.image(0, rng)
        assert str(caught.value) == f"{path} cannot be read as an image: repair or remove it"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("ending", "data"), IMAGES.values(), ids=IMAGES.keys())
def test_broken_images_are_named(example: SimpleNamespace, tmp_path: Path, ending: str, data: bytes) -> None:
    is_refused_image(example, images(example, tmp_path, f"x.{ending}", data), tmp_path / "a" / f"x.{ending}")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_mutated_images_are_read_or_named(example: SimpleNamespace, tmp_path: Path, form: str) -> None:
    whole, random_ = png(form=form), random.Random(0)
    name = f"x.{'tiff' if form == 'TIFF' else form.lower()}"
    found, refused_ = images(example, tmp_path, name, whole), 0
    assert found.image(0, None).isfinite().all()
    for turn in range(40):
        data = bytearray(whole)
        for _ in range(8):
            near = turn % 2 and random_.randrange(min(100, len(data)))
            data[near or random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        (tmp_path / "a" / name).write_bytes(data[: random_.randrange(len(data))] if turn % 4 == 0 else data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert found.image(0, None).shape == (3, 16, 16)
            except example.data.UsageError:
                refused_ += 1
    assert refused_ > 3


@pytest.mark.parametrize(
    "error", [SyntaxError("broken"), struct.error("x"), EOFError(), MemoryError(), OverflowError(), zlib.error("x"),
              Image.DecompressionBombWarning("large"), RecursionError(), KeyError(3), AssertionError()], ids=repr,
)  # fmt: skip
def test_whatever_a_decoder_raises_names_the_image(
    example: SimpleNamespace, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*args: object) -> None:
        raise error

    found = images(example, tmp_path, "x.png", png())
    monkeypatch.setattr(Image, "open", decode)
    is_refused_image(example, found, tmp_path / "a" / "x.png")


def test_a_pipe_among_the_images_is_not_waited_for(example: SimpleNamespace, tmp_path: Path) -> None:
    found = images(example, tmp_path, "x.png", png())
    (tmp_path / "a" / "x.png").unlink()
    os.mkfifo(tmp_path / "a" / "x.png")
    is_refused_image(example, found, tmp_path / "a" / "x.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1), (3, 40)])
def test_images_of_every_form_are_read(example: SimpleNamespace, tmp_path: Path, size: tuple[int, int]) -> None:
    found = images(example, tmp_path, "x.png", png(Image.new("RGB", size, "white")))
    white = found.image(0, None)
    assert white.shape == (3, 16, 16) and torch.equal(white, found.image(0, np.random.default_rng(0)))


def test_a_name_with_strange_characters_is_told_in_one_line(
    example: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    for i in range(10):
        (tmp_path / "a" / f"{i}\nerror\udce9\x1b.png").write_bytes(b"no image")
    options = [*SMALL, "--data", str(tmp_path), "--workers", "2", "--out", str(tmp_path / "out")]
    assert example.train.main(options) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"train.py: error: {tmp_path}/a/")
    assert last.endswith("\\nerror\\udce9\\x1b.png cannot be read as an image: repair or remove it")

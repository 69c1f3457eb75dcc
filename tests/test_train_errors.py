"""examples/train.py says in one sentence what is wrong with arguments, images, devices and checkpoints."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn", reason="the handwritten digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
pytest.importorskip("tqdm", reason="the progress bar is tqdm's")

SMALL = ["--arch", "resnet10", "--image-size", "8", "--batch", "8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no/such/place"], "there is no folder no/such/place"),
        (["--data", "{tmp}"], "must hold one sub-folder per class"),
        (["--data", "cifar10", "--data-root", "{tmp}"], "pass --data-root or --download"),
        (["--data", "{folder}", "--batch", "1000"], "96 training images do not fill a batch of 1000"),
        (["--data", "{folder}", "--json", "{tmp}/none/x.json"], "there is no folder {tmp}/none to write to"),
        (["--seeds", "3"], "--seeds needs --compare"),
        (["--holdout", "1.5"], "must lie between 0 and 1, got 1.5"),
        (["--epochs", "0"], "must be at least 1, got 0"),
        (["--lr", "nan"], "must be positive and finite, got nan"),
        (["--workers", "-1"], "must not be negative, got -1"),
        (["--arch", "vgg11"], "invalid choice"),
    ],
)
def test_bad_arguments_end_in_one_sentence(
    example: SimpleNamespace,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = [a.format(tmp=tmp_path, folder=image_folder) for a in arguments]
    try:
        code = example.train.main([*given, "--no-fused", "--out", str(tmp_path / "out")])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: error: ")
    assert message.format(tmp=tmp_path) in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_named(
    example: SimpleNamespace, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: str
) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(10):
            (tmp_path / label / f"{i}.png").write_bytes(b"no image")
    options = ["--data", str(tmp_path), *SMALL, "--no-fused", "--workers", workers, "--out", str(tmp_path / "out")]
    assert example.train.main(options) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"train.py: error: {tmp_path}/")
    assert last.endswith(".png cannot be read as an image: repair or remove it")


def test_out_must_be_a_folder(
    example: SimpleNamespace, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    options = ["--data", str(image_folder), *SMALL, "--no-fused", "--out", str(tmp_path / "file")]
    assert example.train.main(options) == 2
    assert "cannot be made a folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said(example: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.train.main(["--device", "cuda"]) == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_resume_refuses_what_is_not_its_checkpoint(
    example: SimpleNamespace, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(image_folder), *SMALL, "--epochs", "1", "--no-fused", "--out", str(tmp_path)]
    assert example.train.main(options) == 0
    assert example.train.main([*options, "--resume", "--lr", "0.5"]) == 2
    assert "was made with lr = 0.02, not 0.5" in capsys.readouterr().err
    assert example.train.main([*options, "--resume", "--fused"]) == 2
    assert "was made with fused = False, not True" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert example.train.main([*options, "--resume"]) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err
    torch.save({"something": 1}, tmp_path / "checkpoint.pt")
    assert example.train.main([*options, "--resume"]) == 2
    assert "is not a checkpoint of this script" in capsys.readouterr().err

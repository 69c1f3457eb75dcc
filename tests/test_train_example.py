"""examples/train.py: trains, resumes exactly after SIGKILL, runs under torchrun, and compares eager with fused."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import HANG

pytest.importorskip("sklearn", reason="the handwritten digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
pytest.importorskip("tqdm", reason="the progress bar is tqdm's")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# One thread per process: the processes of a test share the machine's cores, and threads that wait for a core spin.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["--arch", "resnet10", "--image-size", "8", "--batch", "8"]


def command(*arguments: str | Path, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, *launcher, str(EXAMPLES / "train.py"), *map(str, arguments)]


def start(*arguments: str | Path) -> "subprocess.Popen[str]":
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert "batch/s" not in err, "the progress bar must be quiet where standard error is no terminal"
    return out


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Return where two checkpoints differ in any bit, without times; None if nowhere."""
    if path.endswith("/seconds"):
        return None
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return None if same and a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes() else path
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return path
        pairs = [(a[k], b[k], f"{path}/{k}") for k in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return path
        pairs = [(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if type(a) is type(b) and a == b else path
    return next((found for pair in pairs if (found := first_difference(*pair)) is not None), None)


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_picture(path: Path, width: int) -> None:
    """Assert that this is a PNG of at least that width with many colours, so that something is drawn."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width >= width
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50


# train.py, killed when it would write its second checkpoint, five batches after the first.
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import checkpoint, train

save, saved = checkpoint.save, []

def save_once(state, path):
    if saved:
        os.kill(os.getpid(), signal.SIGKILL)
    saved.append(path)
    save(state, path)

checkpoint.save = save_once
train.main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("variant", "resume_with"),
    [(["--fused"], ["--workers", "1"]), (["--no-fused"], [])],
    ids=["fused-resumed-with-a-worker", "eager"],
)
def test_killed_in_mid_epoch_and_resumed_is_bitwise_the_uninterrupted_run(
    image_folder: Path, tmp_path: Path, variant: list[str], resume_with: list[str]
) -> None:
    options = ["--data", image_folder, *SMALL, "--epochs", "2", "--checkpoint-every", "5", *variant]
    whole = start(*options, "--out", tmp_path / "whole")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    arguments = [sys.executable, script, EXAMPLES, *options, "--out", tmp_path / "broken"]
    broken = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, timeout=HANG, env=ENVIRONMENT)
    assert broken.returncode == -signal.SIGKILL, broken.stderr
    saved = tmp_path / "broken" / "checkpoint.pt"
    state = read(saved)
    assert (state["epoch"], state["batch"]) == (0, 5)

    resumed = start(*options, *resume_with, "--out", tmp_path / "broken", "--resume")
    finish(whole)
    out = finish(resumed)
    assert f"resumed in epoch {state['epoch'] + 1} after {state['batch']} of 12 batches" in out
    expected, got = read(tmp_path / "whole" / "checkpoint.pt"), read(saved)
    assert len(got["history"]) == 2
    assert first_difference(expected, got) is None
    assert first_difference(state["model"], got["model"]) is not None


def test_digits_are_learnt_and_everything_is_written(example: SimpleNamespace, tmp_path: Path) -> None:
    out, report = tmp_path / "run", tmp_path / "result.json"
    options = ["--arch", "resnet10", "--batch", "32", "--epochs", "2", "--out", str(out), "--json", str(report)]
    assert example.train.main(options) == 0
    result = json.loads(report.read_text())
    (run,) = result["runs"]
    assert (run["variant"], run["blocks_fused"]) == ("fused", 5)
    assert [row["epoch"] for row in run["history"]] == [1, 2]
    assert run["final_accuracy"] == run["history"][-1]["test_accuracy"] > 0.8
    assert run["history"][1]["train_loss"] < run["history"][0]["train_loss"] < math.log(10)
    assert_picture(out / "curves.png", 1000)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "curves.png"]
    state = read(out / "checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (2, 0)
    model = example.trainer.build_model("resnet10", 10, 1, True)  # stock blocks load the weights of fused ones
    model.load_state_dict(state["model"], strict=True)


def test_two_processes(image_folder: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    options = ["--data", image_folder, *SMALL, "--epochs", "2", "--out", tmp_path, "--json"]
    done = subprocess.run(
        command(*options, launcher=launcher), capture_output=True, text=True, timeout=HANG, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # only one process prints
    assert result["processes"] == 2
    assert done.stderr.count("epoch   2/2") == 1
    state = read(tmp_path / "checkpoint.pt")
    assert len(state["ranks"]) == 2
    assert state["model"]["bn1.num_batches_tracked"] == 2 * (96 // 2 // 8)
    assert state["history"][-1]["test_accuracy"] > 0.6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png"]


# train.py under torchrun: the second process is killed in its ninth step, but not after torchrun has started it again.
KILLED_WORKER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train, trainer

step, steps = trainer.Trainer.step, []

def step_or_die(*arguments):
    steps.append(None)
    if len(steps) == 9 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    step(*arguments)

trainer.Trainer.step = step_or_die
train.main(sys.argv[2:])
"""


def test_a_killed_worker_is_started_again_and_loses_nothing(image_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WORKER)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    options = ["--data", image_folder, *SMALL, "--epochs", "2", "--checkpoint-every", "2", "--resume"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for more in (
        [EXAMPLES / "train.py", *options, "--out", whole],
        ["--max-restarts", "1", script, EXAMPLES, *options, "--out", broken],
    ):
        arguments = [str(argument) for argument in (*launcher, *more)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=HANG, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
    assert "resumed in epoch 2" in done.stdout
    assert first_difference(read(whole / "checkpoint.pt"), read(broken / "checkpoint.pt")) is None


def test_compare(
    example: SimpleNamespace, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(image_folder), *SMALL, "--epochs", "2", "--compare", "--seeds", "2"]
    options += ["--out", str(tmp_path)]
    assert example.train.main([*options, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [(r["variant"], r["seed"]) for r in result["runs"]] == [
        *(("eager", 0), ("eager", 1)),
        *(("fused", 0), ("fused", 1)),
    ]
    assert [r["blocks_fused"] for r in result["runs"]] == [0, 0, 5, 5]
    final = [r["final_accuracy"] for r in result["runs"]]
    mean = (final[2] + final[3] - final[0] - final[1]) / 2
    assert result["comparison"]["mean_difference"] == pytest.approx(mean, abs=1e-12)
    assert "eager %" in captured.err
    assert "fused - eager" in captured.err
    assert_picture(tmp_path / "compare.png", 1500)
    # A finished comparison is not trained again.
    capsys.readouterr()
    assert example.train.main([*options, "--json", "--resume"]) == 0
    again = capsys.readouterr()
    assert json.loads(again.out)["runs"] == result["runs"]
    assert "epoch   2/2" not in again.err


def test_eager_and_fused_start_from_the_same_weights_and_see_the_same_images(
    example: SimpleNamespace, image_folder: Path, tmp_path: Path
) -> None:
    args = example.train.parse(["--data", str(image_folder), *SMALL])
    processes = example.trainer.Processes(0, 1, torch.device("cpu"))
    data = example.train.prepare_data(args, processes)
    first = []
    for fused in (False, True):
        trainer = example.trainer.Trainer(args, data, fused, 3, tmp_path, processes, sys.stderr)
        seen: list[torch.Tensor] = []
        trainer.step = lambda x, y, seen=seen: seen.append(x)
        trainer.train_epoch(SimpleNamespace(update=lambda: None))
        first.append((trainer.model.state_dict(), torch.cat(seen)))
    assert first_difference(first[0][0], first[1][0]) is None
    assert torch.equal(first[0][1], first[1][1])


def test_random_states_come_back(example: SimpleNamespace) -> None:
    import random

    device = torch.device("cpu")
    kept = example.checkpoint.rng_state(device)
    try:
        example.checkpoint.seed_all(7)
        state = example.checkpoint.rng_state(device)
        drawn = [(random.random(), np.random.rand(), torch.rand(1).item()) for _ in range(2)]
        example.checkpoint.set_rng_state(state, device)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn[0] != drawn[1]
    finally:
        example.checkpoint.set_rng_state(kept, device)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_the_fused_network(
    example: SimpleNamespace, image_folder: Path, tmp_path: Path, amp: str
) -> None:
    args = example.train.parse(["--data", str(image_folder), *SMALL, "--amp", amp])
    processes = example.trainer.Processes(0, 1, torch.device("cpu"))
    data = example.train.prepare_data(args, processes)
    trainer = example.trainer.Trainer(args, data, True, 0, tmp_path, processes, sys.stderr)
    assert trainer.blocks_fused == 5
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    batch = torch.stack([data.train.image(i, None) for i in range(0, 120, 15)])
    labels = torch.tensor([data.train.labels[i] for i in range(0, 120, 15)])
    for _ in range(16):  # fp16 skips steps until the loss scale fits
        trainer.step(*trainer.to_device(batch, labels))
        if trainer.scheduler.last_epoch > 0:
            break
    assert trainer.scheduler.last_epoch == 1
    loss, _, images = trainer.sums.tolist()
    assert 0.1 < loss / images < 10  # about ln(2) before the first step
    for name, p in trainer.model.named_parameters():
        assert p.dtype == torch.float32
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name


def test_loss_scaler_skips_and_is_restored(example: SimpleNamespace, image_folder: Path, tmp_path: Path) -> None:
    args = example.train.parse(["--data", str(image_folder), *SMALL, "--amp", "fp16", "--no-fused"])
    processes = example.trainer.Processes(0, 1, torch.device("cpu"))
    data = example.train.prepare_data(args, processes)
    trainer = example.trainer.Trainer(args, data, False, 0, tmp_path, processes, sys.stderr)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    scale, rate = trainer.scaler.get_scale(), trainer.scheduler.get_last_lr()
    trainer.step(torch.full((8, 3, 8, 8), math.inf), torch.zeros(8, dtype=torch.long))
    assert trainer.scaler.get_scale() == scale / 2
    assert trainer.scheduler.get_last_lr() == rate
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    trainer.save()
    resumed = example.trainer.Trainer(args, data, False, 0, tmp_path, processes, sys.stderr)
    resumed.restore()
    assert resumed.scaler.state_dict() == trainer.scaler.state_dict()
    assert resumed.scaler.get_scale() == scale / 2


def test_interval_is_students(example: SimpleNamespace) -> None:
    stats = pytest.importorskip("scipy.stats", reason="the reference quantiles are scipy's")
    rng = np.random.default_rng(0)
    for n in (2, 5, 10, 31):
        values = rng.normal(size=n)
        low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
        assert example.compare.interval95(values.tolist()) == pytest.approx((high - low) / 2, rel=1e-4)
    assert example.compare.interval95([0.5]) is None


def test_verdict(example: SimpleNamespace) -> None:
    comparison = example.compare.Comparison
    equal = comparison([0, 1, 2], [0.97, 0.98, 0.99], [0.98, 0.98, 0.98])
    assert equal.equal is True
    assert equal.verdict().endswith("equal within the interval")
    worse = comparison([0, 1, 2], [0.97, 0.98, 0.99], [0.90, 0.911, 0.92])
    assert worse.equal is False
    assert worse.verdict().endswith("NOT equal")
    assert comparison([0, 1], [0.97, 0.98], [0.97, 0.98]).equal is True
    assert comparison([0], [0.97], [0.98]).equal is None

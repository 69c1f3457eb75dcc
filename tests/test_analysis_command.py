"""`python -m fusedres analyze`: files, conclusions, one sentence for every error, and a page that a browser shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import HANG

from fusedres import terminal
from fusedres.__main__ import main
from fusedres.analysis import AnalysisError, Recipe, Result, load, unrolling_of_designs
from fusedres.analysis import command as analyze
from fusedres.analysis.page import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SMALL = analyze.QUICK._replace(
    flow_depths=(8,),
    unrolling_depth=8,
    degradation_depths=(8, 14),
    degradation=Recipe(1, 0.1),
    shortcuts_depth=8,
    shortcuts=Recipe(1, 0.1),
    highway_depth=10,
    highway=Recipe(1, 0.1),
    ensembles_depths=(8, 8),
    ensembles=Recipe(1, 0.1),
    ensembles_trials=2,
    shattered_seeds=2,
)


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process and return its exit code, its output and its errors."""

    def analysed(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["fusedres", "analyze", *arguments])
        handler = signal.getsignal(signal.SIGINT)
        try:
            code = terminal.run(main, "python -m fusedres")
        finally:
            signal.signal(signal.SIGINT, handler)
        return code, *capfd.readouterr()

    return analysed


def test_an_experiment_leaves_a_picture_its_data_and_a_conclusion(
    tmp_path: Path, analysed: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = analysed("unrolling", "--quick", "--images", "64", "--out", str(tmp_path / "a" / "b"))
    assert code == 0
    found = json.loads((tmp_path / "a" / "b" / "unrolling.json").read_text())
    assert " ".join(out.split()).count(found["conclusion"]) == 1
    assert (tmp_path / "a" / "b" / "unrolling.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["unrolling.json", "unrolling.png"]


def options(**given: object) -> object:
    """Return the arguments of a command."""
    import argparse

    parser = argparse.ArgumentParser()
    analyze.add_arguments(parser)
    return argparse.Namespace(**{**vars(parser.parse_args(["all", "--quick"])), **given})


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `analyze all` at a small size."""
    folder = tmp_path_factory.mktemp("everything")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "QUICK", SMALL)
        assert analyze.main(options(out=folder, images=128)) == 0
    return folder


def test_all_makes_every_file_and_leaves_nothing_else(everything: Path) -> None:
    expected = {f"{name}.{kind}" for name in analyze.EXPERIMENTS for kind in ("png", "json")}
    assert {path.name for path in everything.iterdir()} == {"report.html", *expected}


def test_the_page_has_every_conclusion_and_needs_no_other_file(everything: Path) -> None:
    from html import unescape

    text = (everything / "report.html").read_text(encoding="utf-8")
    for name, (kind, _) in analyze.EXPERIMENTS.items():
        found = json.loads((everything / f"{name}.json").read_text())
        assert found["conclusion"] in unescape(text)
        assert found["made_by"]["command"] == "python -m fusedres analyze all --quick --data digits --images 128"
        assert found["made_by"]["command"] in text
        assert f'id="{name}"' in text and kind.title in unescape(text)
    assert set(re.findall(r'(?:src|href)="([^"]{5})', text)) == {
        "data:",
        *(f"#{name[:4]}" for name in analyze.EXPERIMENTS),
    }
    assert "http" not in text and "<script" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page_without_errors(everything: Path, tmp_path: Path) -> None:
    """A copy of the page gets a script that writes down what the browser has made of it."""
    probe = """<script>addEventListener("load", () => {
      const seen = [...document.images].map((image) => [image.complete, image.naturalWidth, image.width]);
      const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
      const links = [...document.querySelectorAll("nav a")].map((a) => !!document.querySelector(a.hash));
      document.body.innerHTML = `<pre>${JSON.stringify({seen, wide, links})}</pre>`;
    });</script></body>"""
    copied = tmp_path / "page.html"
    copied.write_text(
        (everything / "report.html").read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8"
    )
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--enable-logging=stderr", "--window-size=1000,800", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", copied.as_uri()], capture_output=True, text=True, timeout=HANG, check=True
    )
    match = re.search(r"<pre>(.*)</pre>", done.stdout)
    assert match is not None, done.stderr
    found = json.loads(match[1])
    assert len(found["seen"]) == len(found["links"]) == len(analyze.EXPERIMENTS)
    assert all(complete and natural > 300 and shown > 300 for complete, natural, shown in found["seen"])
    assert all(found["links"]) and not found["wide"]
    assert "CONSOLE" not in done.stderr


def test_text_in_the_page_is_escaped() -> None:
    class Odd(Result):
        name = "odd"
        title = "a < b & c"

        def conclusion(self) -> str:
            return "<script>1</script>."

        def draw(self, figure: object) -> None: ...

    text = page([(Odd(), b"")], {"command": "a > b"})
    assert "a &lt; b &amp; c" in text and "a &gt; b" in text and "<script>" not in text


def test_a_killed_command_goes_on_to_the_same_result(
    tmp_path: Path, analysed: Callable[..., tuple[int, str, str]]
) -> None:
    arguments = ["highway", "--quick", "--images", "128", "--out"]
    command = [sys.executable, "-m", "fusedres", "analyze", *arguments, str(tmp_path / "killed")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    work = tmp_path / "killed" / "unfinished" / "highway" / "fusedres-runs.json"
    for _ in range(5):  # on a busy machine it may end before it is killed
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | threads) as process:
            while process.poll() is None and not work.exists():
                time.sleep(0.01)
            process.kill()
        if process.returncode == -signal.SIGKILL:
            break
    assert work.exists() and process.returncode == -signal.SIGKILL
    for folder in ("whole", "killed"):
        assert analysed(*arguments, str(tmp_path / folder))[0] == 0
    first, second = ((tmp_path / folder / "highway.json").read_text() for folder in ("whole", "killed"))
    assert first == second
    assert not work.parent.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["degradaton"], r"argument EXPERIMENT: invalid choice: 'degradaton'"),
        (["unrolling", "--seeds", "0"], "analyze: --seeds must be at least 1, got 0"),
        (["unrolling", "--images", "-3"], "analyze: --images must be at least 1, got -3"),
        (
            ["unrolling", "--data", "cifar10"],
            "load: cifar10 needs root (--data-root), the folder that holds CIFAR-10",
        ),
        (
            ["unrolling", "--data", "cifar10", "--data-root", "/nowhere"],
            "load: root (--data-root) must be a folder with CIFAR-10",
        ),
        (["unrolling", "--data", "imagenet"], "argument --data: invalid choice: 'imagenet'"),
    ],
)
def test_wrong_arguments_are_said_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, analysed: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, errors = analysed(*arguments, "--out", str(tmp_path / "out"))
    lines = errors.strip().splitlines()
    assert code == 2
    assert lines[0].startswith("usage: python -m fusedres analyze EXPERIMENT") and len(lines) == 2, errors
    assert message in lines[1]
    assert not (tmp_path / "out").exists()


def test_a_folder_in_a_files_place_is_said_before_anything_runs(
    tmp_path: Path, analysed: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "highway.png").mkdir()
    code, out, errors = analysed("highway", "--quick", "--out", str(tmp_path))
    assert code == 2 and "it is a folder" in errors and "highway.png" in errors and out == ""


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_a_folder_that_cannot_be_written_is_said_in_one_sentence(
    kind: str, tmp_path: Path, analysed: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" if kind == "file" else tmp_path / "file" / "below"
    code, out, errors = analysed("shattered", "--quick", "--out", str(folder))
    [line] = errors.strip().splitlines()
    assert code == 2 and line.startswith("python -m fusedres: error: ") and str(folder) in line
    assert out == ""


def test_a_package_that_is_missing_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AnalysisError, match=r"analyze needs matplotlib: pip install 'fusedres\[analysis\]'"):
        analyze.main(options(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_result_is_written_by_itself(tmp_path: Path) -> None:
    result = unrolling_of_designs(load(images=32).in_colour(), depth=8)
    picture = result.write(str(tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "unrolling.json").read_text()) == result.to_dict()
    assert (tmp_path / "new" / "unrolling.png").read_bytes() == picture

"""The examples in the documents work: every Python block runs, and every command is run here or by .ci/run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import HANG

import fusedres
import fusedres.analysis
import fusedres.models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PATHS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the commands in a document's bash blocks, each on one line."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", "").splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


# Too long to be repeated here; it runs unchanged.
CALL_COST = next(command for command in commands(DOCUMENTS["docs/numbers.md"]) if "timeit" in command)

# How each documented command is run here: unchanged, or shortened if it takes minutes; .ci/run runs those in full.
# None means that only .ci/run runs it, because it installs something or is .ci/run itself.
COMMANDS: dict[str, str | None] = {
    "pip install '.[analysis]'": None,
    "pip install '.[bench]'": None,
    "pip install '.[test]'": None,
    "pip install -e '.[dev]'": None,
    "pytest": "pytest --collect-only -q -p no:cacheprovider tests/test_readme.py",
    "python benchmarks/bench_block.py": "python benchmarks/bench_block.py --help",
    "python benchmarks/gpu_pack.py --out PACK": "python benchmarks/gpu_pack.py --help",
    "python benchmarks/gpu_suite.py --call first --out DIR --pack PACK": "python benchmarks/gpu_suite.py --help",
    "python benchmarks/gpu_suite.py --call second --after DIR --out DIR2 --pack PACK": None,
    "python benchmarks/report.py --add DIR": "python benchmarks/report.py --help",
    "python -m fusedres analyze all": "python -m fusedres analyze --help",
    "python -m fusedres info": "python -m fusedres info",
    "python -m fusedres tune": "python -m fusedres tune --help",
    "python benchmarks/traffic.py --launched": "python benchmarks/traffic.py --launched fused --batch 4",
    "python benchmarks/inspect_kernels.py --help": "python benchmarks/inspect_kernels.py --help",
    "python examples/train.py --help": "python examples/train.py --help",
    "python examples/language_model.py": "python examples/language_model.py --steps 10 --seeds 1",
    "python examples/sentence_pairs.py": "python examples/sentence_pairs.py --epochs 1 --hidden 4 --holdout 0.8",
    "bash .ci/run": "bash -n .ci/run",
    CALL_COST: CALL_COST,
}


def test_every_documented_command_is_known_here() -> None:
    assert {command for text in DOCUMENTS.values() for command in commands(text)} == set(COMMANDS)


@pytest.mark.parametrize("command", sorted(filter(None, COMMANDS.values())))
def test_command_runs_from_the_root(command: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "pip install '.[test]' && pytest",
        "pip install '.[bench]' && python benchmarks/bench_block.py",
        "python -m fusedres info",
        "python benchmarks/traffic.py --launched",
    ],
)
def test_ci_takes_the_command_from_the_documents(command: str) -> None:
    assert [text for text in DOCUMENTS.values() if command in text.splitlines()]
    assert f'$(documented "{command}")' in (ROOT / ".ci" / "run").read_text()


def test_first_screen_has_the_example_and_both_commands() -> None:
    screen = "\n".join(README.splitlines()[:50])
    assert "pip install '.[bench]' && python benchmarks/bench_block.py" in screen
    assert "pip install '.[test]' && pytest" in screen
    assert 5 <= len(blocks(screen, "python")[0].splitlines()) <= 12


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(block, id=f"{name} {i}")
        for name, text in DOCUMENTS.items()
        for i, block in enumerate(blocks(text, "python"))
    ],
)
def test_python_block_runs(source: str) -> None:
    torch.manual_seed(0)
    exec(compile(source, "a block of a document", "exec"), {"__name__": "readme"})


def test_documented_names_exist() -> None:
    names = {name for text in DOCUMENTS.values() for name in re.findall(r"\bfusedres\.([A-Za-z]\w*)", text)}
    assert {"fuse", "report", "FusedBottleneck"} <= names
    assert [name for name in sorted(names) if not hasattr(fusedres, name)] == []


def test_every_public_name_is_documented() -> None:
    undocumented = [name for name in fusedres.__all__ if name not in README and not name.startswith("__")]
    assert undocumented == []


def test_documented_files_exist() -> None:
    for document, text in DOCUMENTS.items():
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        paths = re.findall(r"`((?:tests|csrc|benchmarks|examples|fusedres)/[\w./]*\w\.\w+)`", text)
        linked = [str((ROOT / document).parent / name) for name in links]
        missing = [name for name in linked + paths if "my_op" not in name and not (ROOT / name).exists()]
        assert not missing, f"{document}: {missing}"

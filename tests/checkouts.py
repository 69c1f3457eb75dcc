"""Copy the package, run commands in the copy, and list what a source file imports."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from processes import HANG

import fusedres

ROOT = Path(__file__).parents[1]
INSTALLED = Path(fusedres.__file__).parent


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command with this environment's variables plus `env`, and capture its output."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=HANG
    )


def python(*arguments: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """Return the standard output of a Python command, which must succeed."""
    done = run(sys.executable, *arguments, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_package(folder: Path, *, core: bool) -> Path:
    """Copy the package into `folder`, with or without its compiled core."""
    built = [f"{name}{suffix}" for name in ("_C", "_CUDA") for suffix in EXTENSION_SUFFIXES]
    ignore = ["__pycache__"] if core else ["__pycache__", *built]
    shutil.copytree(INSTALLED, folder / "fusedres", ignore=shutil.ignore_patterns(*ignore))
    return folder


def imported(path: Path, root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Yield every module that a file below `root` imports from, also inside functions, with the name that it takes.

    The name is empty if the file imports the module itself.
    """
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((module, alias.name) for alias in node.names)


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Return the absolute names of everything that a file below `root` imports: modules, and names in a module."""
    return {f"{module}.{name}" if name else module for module, name in imported(path, root)}

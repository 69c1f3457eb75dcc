"""Limits that keep the code readable, checked by reading the source."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkouts import ROOT, imported

import fusedres.ops
from fusedres.ops._library import OPS

MOST_LINES = 400
MOST_PARAMETERS = 8
SOURCES = (".py", ".h", ".inc", ".cpp", ".cu", ".cuh")
DEVICE_CODE = {"triton.jit", "jit_for_any_batch"}  # decorators


def sources(*folders: str) -> list[Path]:
    return [path for name in folders for path in sorted((ROOT / name).rglob("*")) if path.suffix in SOURCES]


def python_sources(folder: str) -> list[Path]:
    return [path for path in sources(folder) if path.suffix == ".py"]


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def parameters(function: ast.FunctionDef) -> list[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def decorators(function: ast.FunctionDef) -> set[str]:
    return {ast.unparse(each.func if isinstance(each, ast.Call) else each) for each in function.decorator_list}


def test_no_file_is_long() -> None:
    lines = {
        path: path.read_text().count("\n") for path in sources("fusedres", "csrc", "tests", "benchmarks", "examples")
    }
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MOST_LINES} == {}


def test_no_function_has_many_parameters() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {function.name}": len(parameters(function))
        for path in python_sources("fusedres")
        for function in functions(path)
        if len(parameters(function)) > MOST_PARAMETERS and not DEVICE_CODE & decorators(function)
    }
    assert found == {}


def module_of(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def import_graph(root: Path, folder: str) -> dict[str, set[str]]:
    """The modules below root/folder, each with those of them that it imports anywhere in its code."""
    paths = {module_of(path, root): path for path in sorted((root / folder).rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = imported(path, root)
        reached = {f"{base}.{name}" if f"{base}.{name}" in paths else base for base, name in names}
        graph[module] = {other for other in reached if other in paths and other != module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A circle through each module that is in one, each circle once."""
    found: dict[frozenset[str], list[str]] = {}

    def visit(module: str, path: list[str], done: set[str]) -> None:
        if module in path:
            circle = path[path.index(module) :]
            found.setdefault(frozenset(circle), circle)
        elif module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module], done)
            done.add(module)

    done: set[str] = set()
    for module in graph:
        visit(module, [], done)
    return list(found.values())


@pytest.mark.parametrize(("root", "folder"), [(".", "fusedres"), ("benchmarks", ".")])
def test_no_imports_go_in_a_circle(root: str, folder: str) -> None:
    graph = import_graph(ROOT / root, folder)
    # A package's __init__ collects its modules, which import each other by their own names.
    graph = {module: others - {"fusedres"} for module, others in graph.items()}
    assert circles(graph) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.py").write_text("from p import b\n")
    (tmp_path / "p" / "b.py").write_text("def f():\n    from p.c import g\n")
    (tmp_path / "p" / "c.py").write_text("from .a import h\n")
    assert circles(import_graph(tmp_path, "p")) == [["p.a", "p.b", "p.c"]]


@pytest.mark.parametrize(
    ("root", "folder"), [(".", "fusedres"), ("benchmarks", "."), ("tests", "."), ("examples", ".")]
)
def test_private_names_stay_in_their_module(root: str, folder: str) -> None:
    ours = import_graph(ROOT / root, folder)
    found = [
        f"{path.relative_to(ROOT)}: {base}.{name}"
        for path in sorted((ROOT / root / folder).rglob("*.py"))
        for base, name in imported(path, ROOT / root)
        if base in ours and name.startswith("_") and f"{base}.{name}" not in ours and not name.startswith("__")
    ]
    assert [each for each in found if each.rpartition(".")[2] not in ("_C", "_CUDA")] == []


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_signature_stands_at_its_op_and_at_each_kernel(name: str) -> None:
    declared = list(inspect.signature(getattr(fusedres.ops, name)).parameters)
    defined = {
        path: function
        for folder in ("ops", "kernels")
        for path in python_sources(f"fusedres/{folder}")
        for function in functions(path)
        if function.name == name and not DEVICE_CODE & decorators(function)
    }
    declarations = [path for path in defined if path.is_relative_to(ROOT / "fusedres/ops")]
    assert len(declarations) == 1
    for path, function in defined.items():
        if path.stem != "configs" and path not in declarations:
            assert [*parameters(function), "backend"] == declared, path

"""What an installation promises: one version, a light import, a build without torch, imports that point downward, and
commands that work from the root of a checkout although the source folder there has the package's name.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from processes import HANG

import fusedres
from fusedres import _C
from fusedres.__main__ import as_text, info

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
INSTALLED = Path(fusedres.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

BUILD_FILES = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", ".clang-format"]
BUILD_FILES += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]

# A core of one function, quick to build: setup.py is what is tested, not csrc/.
SMALL_CORE = """
#include <Python.h>
#include "common/answer.h"
#ifdef _OPENMP
const long openmp = 1;
#else
const long openmp = 0;
#endif
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddIntConstant(m, "answer", answer());
  PyModule_AddIntConstant(m, "openmp", openmp);
  return m;
}
"""

# A CUDA core of one function, and its bindings.
SMALL_KERNEL = """
#include <cuda_runtime.h>
__global__ void nothing_kernel() {}
int cuda_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : -1;
}
"""
SMALL_CUDA_BINDINGS = """
#include <Python.h>
int cuda_version();
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__CUDA() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddIntConstant(m, "runtime", cuda_version());
  PyModule_AddStringConstant(m, "archs", FUSEDRES_CUDA_ARCHS);
  return m;
}
"""

# Runs argv[1:] as a script; importing torch is an error.
WITHOUT_TORCH = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError("torch was imported")
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command, output captured, with this environment's variables plus `env`."""
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=HANG
    )


def python(*arguments: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """Standard output of a Python command that must succeed."""
    done = run(sys.executable, *arguments, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_package(folder: Path, *, core: bool) -> Path:
    """Copies the package below `folder`, with or without its compiled core."""
    built = [f"{name}{suffix}" for name in ("_C", "_CUDA") for suffix in EXTENSION_SUFFIXES]
    ignore = ["__pycache__"] if core else ["__pycache__", *built]
    shutil.copytree(INSTALLED, folder / "fusedres", ignore=shutil.ignore_patterns(*ignore))
    return folder


def without_public_names(folder: Path) -> Path:
    """Cuts __init__.py after the search for the installed copy, so that nothing imports torch, which takes seconds."""
    init = folder / "fusedres" / "__init__.py"
    call = "\n_use_installed_copy()\n"
    head, found, _ = init.read_text().partition(call)
    assert found
    init.write_text(head + call + "from fusedres._version import __version__\n")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as a fresh checkout has it: the package's sources, no compiled core."""
    return copy_package(tmp_path / "checkout", core=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as site-packages has it: the package with its core."""
    return copy_package(tmp_path / "site", core=True)


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """The project's build files around a core of one function."""
    project = copy_package(tmp_path / "project", core=False)
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, project)
    for name in (".ci", "tests"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    (project / "csrc" / "common").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "nvcc.py", project / "csrc")
    (project / "csrc" / "bindings.cpp").write_text(SMALL_CORE)
    (project / "csrc" / "common" / "answer.h").write_text("int answer();\n")
    (project / "csrc" / "common" / "answer.cpp").write_text("int answer() { return 42; }\n")
    return project


# The checkout and the installed package


def test_the_installed_copy_is_used_from_a_checkout(checkout: Path, site: Path) -> None:
    out = python("-m", "fusedres", "info", "--json", cwd=checkout, PYTHONPATH=str(site))
    assert Path(json.loads(out)["location"]).samefile(site / "fusedres")


def test_every_module_comes_from_the_installed_copy(checkout: Path, site: Path) -> None:
    without_public_names(checkout)
    without_public_names(site)
    code = "import sys, fusedres._C; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('fusedres')))"
    files = [Path(name) for name in python("-c", code, cwd=checkout, PYTHONPATH=str(site)).split()]
    assert len(files) > 2
    assert all(file.is_relative_to(site.resolve()) or file.is_relative_to(site) for file in files), files


def test_a_folder_with_a_core_is_used_itself(tmp_path: Path, site: Path) -> None:
    built = without_public_names(copy_package(tmp_path / "built", core=True))
    out = python("-c", "import fusedres; print(fusedres.__file__)", cwd=built, PYTHONPATH=str(site))
    assert Path(out.strip()).samefile(built / "fusedres" / "__init__.py")


def test_nothing_installed_is_said(checkout: Path) -> None:
    done = run(sys.executable, "-S", "-c", "import fusedres", cwd=checkout, PYTHONPATH="")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fusedres is not installed: run 'pip install .' in the checkout"
    )


def test_another_version_installed_is_said(checkout: Path, site: Path) -> None:
    without_public_names(site)
    (checkout / "fusedres" / "_version.py").write_text('__version__ = "999.0"\n')
    done = run(sys.executable, "-c", "import fusedres", cwd=checkout, PYTHONPATH=str(site))
    expected = (
        rf"ImportError: fusedres {re.escape(fusedres.__version__)} is installed, the checkout in .* is 999\.0: .*"
    )
    assert re.fullmatch(expected, done.stderr.splitlines()[-1]), done.stderr


def test_python_m_pytest_works_from_the_root() -> None:
    collect = ["--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_packaging.py"]
    out = python("-m", "pytest", *collect, PYTEST_ADDOPTS="")
    assert "test_python_m_pytest_works_from_the_root" in out


# The version and the dependencies


def test_version_has_one_source() -> None:
    assert "version" in PROJECT["dynamic"]
    sources = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "fusedres").rglob("*.py")]
    holders = [path.name for path in sources if f'"{fusedres.__version__}"' in path.read_text()]
    assert holders == ["_version.py"]
    assert importlib.metadata.version("fusedres") == fusedres.__version__


def requirement_names(requirements: list[str]) -> set[str]:
    """Import names of `requirements`; extras of this project are followed."""
    modules = {"scikit-learn": "sklearn", "pytest-xdist": "xdist"}
    names: set[str] = set()
    for requirement in requirements:
        own_extras = re.fullmatch(r"fusedres\[(.*)\]", requirement)
        if own_extras:
            for extra in own_extras[1].split(","):
                names |= requirement_names(PROJECT["optional-dependencies"][extra])
        else:
            name = re.match(r"[\w.-]+", requirement)[0]
            names.add(modules.get(name, name))
    return names


@pytest.mark.parametrize(("folder", "extra"), [("fusedres", None), ("tests", "test"), ("benchmarks", "bench")])
def test_what_is_imported_is_required(folder: str, extra: str | None) -> None:
    required = requirement_names(PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else []))
    required |= {"numpy", "PIL", "typing_extensions"}  # torchvision and torch require them
    required |= {"triton"}  # comes with torch, imported only where a kernel needs it
    required |= {"tomli"} if extra == "test" else set()  # pytest requires it where the standard library lacks tomllib
    folders = [ROOT / name for name in (folder, "benchmarks", "tests")]
    own = {"fusedres"} | {path.stem for where in folders for path in where.glob("*.py")}
    own |= {path.parent.name for where in folders for path in where.glob("*/__init__.py")}
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    foreign = {
        (path.name, name)
        for path in files
        for module in imports(path)
        if (name := module.partition(".")[0]) not in required | own | set(sys.stdlib_module_names)
    }
    assert not foreign


# The import


def test_triton_is_not_needed() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, torchvision, fusedres
model = fusedres.fuse(torchvision.models.resnet18())
model(torch.randn(2, 3, 32, 32)).sum().backward()
print(all(block.fused for block in fusedres.report(model)))
"""
    assert python("-c", code).strip() == "True"


def test_info_says_what_is_installed() -> None:
    values = info()
    assert json.loads(json.dumps(values)) == values
    assert values["fusedres"] == fusedres.__version__
    assert values["torch"] == torch.__version__
    assert values["core"]["isa_used"] in values["core"]["isa_built"]
    assert values["devices"]["cpu"]["backend"] == "cpu"
    text = as_text(values | {"triton": None, "core": {"openmp": False, "isa_built": ["portable", "avx2"]}})
    assert re.search(r"^triton +not installed$", text, re.MULTILINE), text
    assert re.search(r"^core +openmp no, isa_built portable\+avx2$", text, re.MULTILINE), text
    assert re.search(r"^cpu +.*threads \d+, measured nothing, backend cpu$", text, re.MULTILINE), text


# The build


def test_build_needs_no_torch(small_project: Path) -> None:
    python("-c", WITHOUT_TORCH, "setup.py", "build_ext", "--inplace", cwd=small_project)
    probe = "import _C; print(_C.answer, _C.openmp)"
    answer, openmp = python("-S", "-c", probe, PYTHONPATH=str(small_project / "fusedres")).split()
    assert answer == "42"
    assert bool(int(openmp)) == _C.build_info()["openmp"]


def test_measured_tables_are_installed(small_project: Path) -> None:
    measured = small_project / "fusedres" / "dispatch" / "measured"
    measured.mkdir(exist_ok=True)
    (measured / "a-gpu.json").write_text("{}")
    python("setup.py", "build_py", "--build-lib", small_project / "lib", cwd=small_project)
    assert (small_project / "lib" / "fusedres" / "dispatch" / "measured" / "a-gpu.json").exists()


def test_only_what_changed_is_compiled(small_project: Path) -> None:
    build = ["setup.py", "build_ext", "--inplace"]
    python(*build, cwd=small_project)
    objects = {path.stem: path for path in small_project.glob("build/**/*.o")}
    before = {name: path.stat().st_mtime_ns for name, path in objects.items()}
    (small_project / "csrc" / "common" / "answer.cpp").write_text("int answer() { return 43; }\n")
    python(*build, cwd=small_project, MAX_JOBS="1")
    changed = {name for name, path in objects.items() if path.stat().st_mtime_ns != before[name]}
    assert changed == {"answer"}
    (small_project / "csrc" / "common" / "answer.h").write_text("int answer();  // a header is everyone's\n")
    before = {name: path.stat().st_mtime_ns for name, path in objects.items()}
    python(*build, cwd=small_project)
    changed = {name for name, path in objects.items() if path.stat().st_mtime_ns != before[name]}
    assert changed == {"answer", "bindings"}


@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "false"])
def test_a_missing_compiler_is_one_sentence(small_project: Path, compiler: str) -> None:
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=small_project, CXX=compiler)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith(f"error: fusedres needs a C++17 compiler and '{compiler}' does not work as one: install g++")


@pytest.fixture
def small_cuda_project(small_project: Path) -> Path:
    """The same with a CUDA core of one function."""
    (small_project / "csrc" / "bindings_cuda.cpp").write_text(SMALL_CUDA_BINDINGS)
    (small_project / "csrc" / "common" / "nothing.cu").write_text(SMALL_KERNEL)
    return small_project


BUILD = ["setup.py", "build_ext", "--inplace"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc was not found")
def test_cuda_is_built_without_a_gpu(small_cuda_project: Path) -> None:
    python(*BUILD, cwd=small_cuda_project, TORCH_CUDA_ARCH_LIST="9.0a;8.0+PTX", FUSEDRES_BUILD_CUDA="1")
    probe = "import _CUDA; print(_CUDA.archs, _CUDA.runtime)"
    archs, runtime = python("-S", "-c", probe, PYTHONPATH=str(small_cuda_project / "fusedres")).split()
    assert archs == "9.0a;8.0+PTX" and int(runtime) >= 12000
    (library,) = (small_cuda_project / "fusedres").glob("_CUDA.*.so")
    assert b"libcudart.so" not in library.read_bytes()  # the runtime is linked in
    (made,) = small_cuda_project.glob("build/**/nothing.cu.o")
    before = made.stat().st_mtime_ns
    python(*BUILD, cwd=small_cuda_project, TORCH_CUDA_ARCH_LIST="9.0a;8.0+PTX")
    assert made.stat().st_mtime_ns == before
    python(*BUILD, cwd=small_cuda_project, TORCH_CUDA_ARCH_LIST="8.0")
    assert made.stat().st_mtime_ns != before


def test_without_nvcc_it_is_built_all_the_same(small_cuda_project: Path) -> None:
    out = python(*BUILD, cwd=small_cuda_project, CUDA_HOME="/nonexistent", FUSEDRES_BUILD_CUDA="")
    (line,) = [line for line in out.splitlines() if line.startswith("fusedres: ")]
    assert line.startswith(
        "fusedres: built without CUDA kernels, nvcc was not found in CUDA_HOME=/nonexistent: install"
    )
    assert not list((small_cuda_project / "fusedres").glob("_CUDA.*"))
    assert list((small_cuda_project / "fusedres").glob("_C.*.so"))


def test_cuda_can_be_left_out(small_cuda_project: Path) -> None:
    out = python(*BUILD, cwd=small_cuda_project, FUSEDRES_BUILD_CUDA="0")
    assert not [line for line in out.splitlines() if line.startswith("fusedres: ")]
    assert not list((small_cuda_project / "fusedres").glob("_CUDA.*"))


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FUSEDRES_BUILD_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "FUSEDRES_BUILD_CUDA=1, but nvcc was not found in"),
        ({"FUSEDRES_BUILD_CUDA": "yes"}, "FUSEDRES_BUILD_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_sentence(
    small_cuda_project: Path, variables: dict[str, str], message: str
) -> None:
    done = run(sys.executable, *BUILD, cwd=small_cuda_project, **variables)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith(f"fusedres: {message}")


def test_distributions_hold_what_they_should(small_project: Path) -> None:
    python("setup.py", "-q", "bdist_wheel", "sdist", cwd=small_project)
    archives = sorted((small_project / "dist").iterdir())
    assert {archive.suffix for archive in archives} == {".whl", ".gz"}
    assert "hold what they should" in python(".ci/check_dist.py", *archives, cwd=small_project)


def test_a_wrong_distribution_is_refused(small_project: Path) -> None:
    (small_project / "fusedres" / "py.typed").unlink()
    (small_project / "fusedres" / "stray").mkdir()
    (small_project / "fusedres" / "stray" / "left_over.o").touch()
    manifest = small_project / "MANIFEST.in"
    manifest.write_text(manifest.read_text().replace("global-exclude", "recursive-include fusedres *.o\n#"))
    python("setup.py", "-q", "bdist_wheel", "sdist", cwd=small_project)
    done = run(sys.executable, ".ci/check_dist.py", *(small_project / "dist").iterdir(), cwd=small_project)
    assert done.returncode == 1
    assert ".whl: fusedres/py.typed is missing" in done.stderr
    assert ".tar.gz: fusedres/stray/left_over.o does not belong there" in done.stderr


# The layers


def imports(path: Path, root: Path = ROOT) -> set[str]:
    """Absolute names of all that a file below `root` imports, anywhere in it."""
    package = path.relative_to(root).parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}  # a module, or a name in one
    return names


LAYERS = ["kernels", "ops", "autograd", "modules", "convert", "tune"]  # from the bottom up


def layer(module: str) -> int | None:
    """The height of a module of fusedres, None outside the layers."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "fusedres" and len(parts) > 1 and parts[1] in LAYERS else None


def upward_imports(root: Path) -> set[str]:
    """`a -> b` for every import in root/fusedres that points upward or out of a layer's sight.

    A layer imports itself and those below, never the package as a whole; a module outside the layers imports no layer.
    """
    found = set()
    modules = {path.name.partition(".")[0] for path in (root / "fusedres").iterdir()}
    for path in (root / "fusedres").rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if module in ("fusedres.__init__", "fusedres.__main__"):  # the front doors
            continue
        height = layer(module)
        for name in imports(path, root):
            first, _, rest = name.partition(".")
            whole = first == "fusedres" and rest.partition(".")[0] not in modules  # e.g. `from fusedres import fuse`
            other = layer(name)
            if whole or (other is not None and (height is None or other > height)):
                found.add(f"{module} -> {name}")
    return found


def test_imports_point_downward() -> None:
    assert {path.stem for path in (ROOT / "fusedres").iterdir()} >= set(LAYERS)
    assert upward_imports(ROOT) == set()


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    package = copy_package(tmp_path, core=False) / "fusedres"
    (package / "ops" / "upward.py").write_text("def f():\n    from ..autograd import block\n")
    (package / "kernels" / "upward.py").write_text("from fusedres import modules\n")
    (package / "kernels" / "whole.py").write_text("import fusedres\nfrom fusedres import fuse\n")
    (package / "loose.py").write_text("import fusedres.ops.gram\n")
    found = upward_imports(tmp_path)
    for expected in (
        "fusedres.ops.upward -> fusedres.autograd.block",
        "fusedres.kernels.upward -> fusedres.modules",
        "fusedres.kernels.whole -> fusedres",
        "fusedres.kernels.whole -> fusedres.fuse",
        "fusedres.loose -> fusedres.ops.gram",
    ):
        assert expected in found


def test_only_kernels_touch_the_core() -> None:
    users = {
        path.relative_to(ROOT / "fusedres").parts[0]
        for path in (ROOT / "fusedres").rglob("*.py")
        if "fusedres._C" in imports(path)
    }
    assert users <= {"kernels", "__main__.py"}
    loads = {path.name for path in (ROOT / "fusedres").rglob("*.py") if '"fusedres._CUDA"' in path.read_text()}
    assert loads == {"cuda_support.py"}

"""The build of a small core: without torch, with and without nvcc, only changed files; and the distributions."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from checkouts import ROOT, copy_package, python, run

from fusedres import _C

BUILD_FILES = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", ".clang-format"]
BUILD_FILES += ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]

# A core of one function, which builds quickly: these tests are about setup.py, not csrc/.
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

# Runs the script argv[1] with the arguments after it; importing torch is an error.
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
    """The small project with a CUDA core of one function added."""
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

"""Builds fusedres._C, the C++ core, out of csrc/; the rest of the configuration is in pyproject.toml.

Needs setuptools and pybind11. Torch is neither imported nor linked: the core takes raw pointers and sizes.
MAX_JOBS bounds the parallel compilations (default: one a core).
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError

SOURCES = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inc"})

# Not -ffast-math: NaN, infinities and the order of sums are kept. No -march: the sources carry their own targets and
# choose at run time, so one binary runs on every CPU of the architecture.
CXXFLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]

CPP_PROBE = "#include <vector>\nint probe() { return static_cast<int>(std::vector<int>(1).size()); }\n"
PYTHON_PROBE = "#include <Python.h>\n"
# GCC only: its OpenMP runtime is torch's (libgomp.so.1, one copy in the process); clang's would be a second one.
OPENMP_PROBE = """
#ifdef __clang__
#error "another OpenMP runtime than torch's"
#endif
#include <omp.h>
int probe() { return omp_get_max_threads(); }
"""


class BuildExt(build_ext):
    """Checks the compiler first, so that what is missing is said in one sentence, then adds OpenMP where it has it."""

    def build_extensions(self) -> None:
        compiler = getattr(self.compiler, "compiler_so_cxx", None)
        if not compiler or not self._compiles(CPP_PROBE):
            name = compiler[0] if compiler else self.compiler.compiler_type
            raise CompileError(
                f"fusedres needs a C++17 compiler and '{name}' does not work as one: "
                "install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install gxx) "
                "or set CXX to its path"
            )
        if not self._compiles(PYTHON_PROBE):
            raise CompileError(
                "fusedres needs the headers of this Python and Python.h was not found: "
                "install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
            )
        if self._compiles(OPENMP_PROBE, "-fopenmp"):
            for ext in self.extensions:
                ext.extra_compile_args.append("-fopenmp")
                ext.extra_link_args.append("-fopenmp")
        else:
            print("fusedres: the compiler has no libgomp OpenMP; the core will use one thread")
        super().build_extensions()

    def _compiles(self, source: str, *flags: str) -> bool:
        """Whether `source` compiles and links to a shared library."""
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text(source)
            include = f"-I{sysconfig.get_path('include')}"
            command = [*self.compiler.compiler_so_cxx, "-std=c++17", "-shared", *flags, include]
            command += [str(probe), "-o", str(probe.with_suffix(".so"))]
            try:
                return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0
            except OSError:
                return False


def _stale(obj: str, source: str) -> bool:
    """An object is kept only if it is newer than its source and than every header."""
    return os.stat(obj).st_mtime <= max(os.stat(path).st_mtime for path in (source, *HEADERS, __file__))


ParallelCompile("MAX_JOBS", needs_recompile=_stale).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "fusedres._C",
            SOURCES,
            depends=HEADERS,
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=CXXFLAGS,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)

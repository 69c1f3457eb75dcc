"""Builds fusedres._C, the C++ core, from csrc/, and if nvcc is found also fusedres._CUDA, the CUDA kernels.

The rest of the configuration is in pyproject.toml. The build needs setuptools and pybind11. It neither imports nor
links torch, as both modules take raw pointers and sizes. FUSEDRES_BUILD_CUDA=0 leaves the CUDA kernels out; with 1 it
is an error if nvcc is missing. csrc/nvcc.py lists the other variables.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import nvcc

BINDINGS_CUDA = str(Path("csrc", "bindings_cuda.cpp"))
SOURCES = sorted(path for path in map(str, Path("csrc").rglob("*.cpp")) if path != BINDINGS_CUDA)
CUDA_SOURCES = sorted(map(str, Path("csrc").rglob("*.cu")))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inc", ".cuh"})

# No -ffast-math, to keep NaN, infinities and the order of sums. No -march: the sources set their own targets and choose
# at run time, so one binary runs on every CPU of the architecture.
CXXFLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]

CPP_PROBE = "#include <vector>\nint probe() { return static_cast<int>(std::vector<int>(1).size()); }\n"
PYTHON_PROBE = "#include <Python.h>\n"
# Only GCC: its OpenMP runtime is torch's (libgomp.so.1, one copy per process); clang's would be a second runtime.
OPENMP_PROBE = """
#ifdef __clang__
#error "another OpenMP runtime than torch's"
#endif
#include <omp.h>
int probe() { return omp_get_max_threads(); }
"""


class BuildExt(build_ext):
    """Checks the compiler first, to report what is missing in one sentence, then adds OpenMP if the compiler has it."""

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
                if not isinstance(ext, CudaExtension):
                    ext.extra_compile_args.append("-fopenmp")
                    ext.extra_link_args.append("-fopenmp")
        else:
            print("fusedres: the compiler has no libgomp OpenMP; the core will use one thread")
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, CudaExtension):
            ext.extra_objects = self._cuda_objects(ext)
        super().build_extension(ext)

    def _cuda_objects(self, ext: CudaExtension) -> list[str]:
        """Compile the kernels and return the objects; a changed header or list of targets recompiles all of them."""
        folder = Path(self.build_temp, "cuda")
        options = nvcc.gencode(ext.archs)
        record = folder / "options"
        if not record.exists() or record.read_text() != shlex.join(options):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.rglob("*.o"):
                old.unlink()
            record.write_text(shlex.join(options))
        newest = max(os.stat(path).st_mtime for path in (*HEADERS, __file__))
        try:
            return nvcc.compile_all(ext.nvcc, CUDA_SOURCES, str(folder), "csrc", options, newest)
        except RuntimeError as error:
            raise CompileError(str(error)) from error

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
    """Whether an object must be compiled again: it is not newer than its source and every header."""
    return os.stat(obj).st_mtime <= max(os.stat(path).st_mtime for path in (source, *HEADERS, __file__))


class CudaExtension(Pybind11Extension):
    """fusedres._CUDA: nvcc compiles its kernels, and the CUDA runtime is linked statically."""

    def __init__(self, nvcc_path: str) -> None:
        self.nvcc = nvcc_path
        try:
            self.archs = nvcc.archs(nvcc_path)
        except ValueError as error:
            raise SystemExit(f"fusedres: {error}") from error
        super().__init__(
            "fusedres._CUDA",
            [BINDINGS_CUDA],
            depends=[*HEADERS, *CUDA_SOURCES],
            include_dirs=["csrc"],
            define_macros=[("FUSEDRES_CUDA_ARCHS", f'"{nvcc.as_text(self.archs)}"')],
            library_dirs=nvcc.library_dirs(nvcc_path),
            libraries=["cudart_static", "rt", "pthread", "dl"],
            cxx_std=17,
            extra_compile_args=CXXFLAGS,
        )


def cuda_extensions() -> list[CudaExtension]:
    """Return the extension with the CUDA kernels if it is wanted and nvcc is found, else nothing."""
    wanted = os.environ.get("FUSEDRES_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"fusedres: FUSEDRES_BUILD_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0" or not CUDA_SOURCES:
        return []
    path = nvcc.find()
    if path is None:
        where = f"in CUDA_HOME={os.environ['CUDA_HOME']}" if os.environ.get("CUDA_HOME") else "on PATH"
        missing = f"nvcc was not found {where}: install the CUDA toolkit and set CUDA_HOME to its folder"
        if wanted == "1":
            raise SystemExit(f"fusedres: FUSEDRES_BUILD_CUDA=1, but {missing}")
        print(f"fusedres: built without CUDA kernels, {missing} to have them; Triton serves the GPU")
        return []
    extension = CudaExtension(path)
    print(f"fusedres: compiling CUDA kernels with {path} for {nvcc.as_text(extension.archs)}")
    return [extension]


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
        ),
        *cuda_extensions(),
    ],
    cmdclass={"build_ext": BuildExt},
)

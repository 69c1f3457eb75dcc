"""The CUDA kernels compiled by nvcc: the list of architectures, warnings, spills, and the width of memory accesses."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cuda_on_cpu
import pytest

CSRC = cuda_on_cpu.CSRC

# Kernels that work on a few values; loads and stores of 16 bytes are not required of them.
SMALL = {"bn_frozen_kernel", "count_batch_kernel"}


def _nvcc_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvcc", CSRC / "nvcc.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = _nvcc_module()


# The list of architectures


@pytest.mark.parametrize(
    ("listed", "want"),
    [
        ("8.0", [("80", False)]),
        ("8.0;9.0a+PTX", [("80", False), ("90a", True)]),
        ("8.6 12.0+PTX", [("86", False), ("120", True)]),
        ("Hopper", [("90", False)]),
        ("Ampere+PTX", [("80", False), ("86", True)]),
        ("10.0f, 10.3a", [("100f", False), ("103a", False)]),
    ],
)
def test_the_list_is_read_as_torch_reads_it(listed: str, want: list[tuple[str, bool]]) -> None:
    assert nvcc.parse_archs(listed) == want
    assert nvcc.parse_archs(nvcc.as_text(want)) == want


@pytest.mark.parametrize("listed", ["sm_80", "80", "8.0+ptx", "9.0b", "8.0;;9", ""])
def test_a_wrong_list_is_said(listed: str) -> None:
    with pytest.raises(ValueError, match=r"TORCH_CUDA_ARCH_LIST: expected entries like 8\.0, 9\.0a or 9\.0\+PTX, got"):
        nvcc.parse_archs(listed)


def test_options_of_the_default_list() -> None:
    made = nvcc.gencode(nvcc.parse_archs(nvcc.DEFAULT_ARCHS))
    codes = [option.rpartition("=")[2] for option in made]
    assert codes == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_90"]
    assert nvcc.gencode([("90", True)]) == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_only_what_this_nvcc_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\nprintf 'sm_80\\nsm_86\\nsm_90\\ncompute_90\\n'\n")
    old.chmod(0o755)
    assert nvcc.as_text(nvcc.archs(str(old))) == "8.0;8.6;9.0a;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")  # not shortened: nvcc reports what it cannot do
    assert nvcc.as_text(nvcc.archs(str(old))) == "12.0"


def test_cuda_home_goes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert nvcc.find() == str(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert nvcc.find() == str(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert nvcc.find() is None


# The kernels as compiled

ARCHS = "8.0;9.0a"
STRICT = ["-Werror=all-warnings", "-Xptxas=-warn-spills,-Werror"]


class Compiled(NamedTuple):
    """One instantiation of a kernel for one architecture."""

    arch: str
    kernel: str  # without its arguments
    usage: str  # registers, stack, shared memory
    code: str  # SASS

    @property
    def name(self) -> str:
        return self.kernel.partition("<")[0].rpartition("::")[2]

    @property
    def vector(self) -> int:
        """Return the second template argument: the number of values per access."""
        found = re.search(r"<[\w:]+, (\d+)[,>]", self.kernel)
        return int(found[1]) if found else 1


def found_nvcc() -> str:
    path = nvcc.find()
    if path is None:
        pytest.skip("nvcc was not found")
    return path


def compiled(path: str, sources: list[str], folder: Path, include: Path) -> list[str]:
    options = [*STRICT, *nvcc.gencode(nvcc.parse_archs(ARCHS))]
    return nvcc.compile_all(path, sources, str(folder), str(include), options, newest_header=0)


def tool(name: str) -> str:
    """Return the path of a tool of the CUDA toolkit, or of the copy that comes with Triton."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    path = shutil.which(name) or shutil.which(name, path=str(bundled))
    if path is None:
        pytest.skip(f"{name} was not found")
    return path


def text_of(*command: str, given: str | None = None) -> str:
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def objects() -> list[str]:
    """Compile every CUDA source for two architectures; warnings and spills are errors. Results are kept by a hash."""
    path = found_nvcc()
    key = hashlib.sha256(" ".join([path, *STRICT, ARCHS]).encode())
    for file in sorted(file for file in CSRC.rglob("*") if file.suffix in {".cu", ".cuh", ".h", ".py"}):
        key.update(str(file.relative_to(CSRC)).encode() + file.read_bytes())
    with cuda_on_cpu.locked() as kept:
        return compiled(path, list(map(str, cuda_on_cpu.sources())), kept / f"nvcc-{key.hexdigest()[:20]}", CSRC)


@pytest.fixture(scope="module")
def kernels(objects: list[str]) -> list[Compiled]:
    cuobjdump, demangle = tool("cuobjdump"), tool("c++filt")
    found = []
    for file in objects:
        usage: dict[tuple[str, str], str] = {}
        arch = kernel = ""
        for line in text_of(demangle, given=text_of(cuobjdump, "-res-usage", file)).splitlines():
            if line.startswith("arch = "):
                arch = line.removeprefix("arch = ")
            elif line.startswith(" Function "):
                kernel = line.removeprefix(" Function ").rstrip(":")
            elif "REG:" in line:
                usage[arch, kernel] = line.strip()
        code: dict[tuple[str, str], list[str]] = defaultdict(list)
        arch = kernel = ""
        for line in text_of(demangle, given=text_of(cuobjdump, "-sass", file)).splitlines():
            if line.startswith("arch = "):
                arch, kernel = line.removeprefix("arch = "), ""
            elif "Function : " in line:
                kernel = line.partition("Function : ")[2]
            elif kernel:
                code[arch, kernel].append(line)
        assert code.keys() == usage.keys()
        for key, lines in code.items():
            short = key[1].removeprefix("void ").rpartition("(")[0]
            found.append(Compiled(key[0], short, usage[key], "\n".join(lines)))
    return found


def test_everything_compiles_for_both(kernels: list[Compiled]) -> None:
    assert {kernel.arch for kernel in kernels} == {"sm_80", "sm_90a"}
    defined = {
        name
        for path in CSRC.rglob("*.cuh")
        for name in re.findall(r"__global__\s[^;{]*?(\w+_kernel)\(", path.read_text())
    }
    assert defined
    for arch in ("sm_80", "sm_90a"):
        assert {kernel.name for kernel in kernels if kernel.arch == arch} == defined


def test_nothing_spills(kernels: list[Compiled]) -> None:
    """ptxas already refuses spills; local arrays must not be in memory either."""
    assert [kernel[:3] for kernel in kernels if "STACK:0 " not in kernel.usage or "LOCAL:0 " not in kernel.usage] == []


def test_memory_is_accessed_16_bytes_at_a_time(kernels: list[Compiled]) -> None:
    vectorised = [kernel for kernel in kernels if kernel.vector > 1]
    assert {kernel.name for kernel in vectorised} == {kernel.name for kernel in kernels} - SMALL
    narrow = [
        kernel[:2]
        for kernel in vectorised
        if not re.search(r"\b(LDG|LDGSTS)\.\S*128", kernel.code) or not re.search(r"\bSTG\.\S*128", kernel.code)
    ]
    assert narrow == []


def test_scalar_kernels_would_be_seen(kernels: list[Compiled]) -> None:
    """A scalar kernel does not have what the test above looks for."""
    scalar = [kernel for kernel in kernels if kernel.name == "bn_finalize_kernel" and kernel.vector == 1]
    assert scalar
    assert not any(re.search(r"\b(LDG|STG)\.\S*128", kernel.code) for kernel in scalar)


def test_gram_multiplies_on_the_tensor_cores(kernels: list[Compiled]) -> None:
    """This holds for bfloat16, float16, and float32 as tf32, and for nothing else."""
    tiles = [kernel for kernel in kernels if kernel.name == "gram_tiles_kernel"]
    on_tensor_cores = {kernel[:2]: "HMMA" in kernel.code for kernel in tiles}
    assert on_tensor_cores == {
        kernel[:2]: bool(re.search(r"Float16|true>|\(bool\)1>", kernel.kernel)) for kernel in tiles
    }
    assert set(on_tensor_cores.values()) == {True, False}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("int unused = 0; x[0] = 1;", "never referenced"),
        ("float v[200]; for (int i = 0; i < 200; ++i) v[i] = x[i] * x[i + 1]; __syncthreads(); "
         "for (int i = 0; i < 200; ++i) x[199 - i] = v[i];", "spill"),
    ],
)  # fmt: skip
def test_warnings_and_spills_are_errors(tmp_path: Path, body: str, message: str) -> None:
    path = found_nvcc()
    source = tmp_path / "wrong.cu"
    source.write_text(f"__global__ void __launch_bounds__(1024) wrong_kernel(float* x) {{ {body} }}\n")
    with pytest.raises(RuntimeError, match=message):
        compiled(path, [str(source)], tmp_path / "objects", tmp_path)

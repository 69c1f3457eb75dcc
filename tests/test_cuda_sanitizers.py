"""The CUDA kernels on the host (tests/cuda_shim) under the address, undefined-behaviour and thread sanitizers.

The driver compares every kernel on small inputs with double loops. Mutants of the sources show that a missing barrier,
an overrun of shared memory and a wrong result are found.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import cuda_on_cpu
import pytest
from processes import HANG

SANITIZERS = {
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-pthread"],
    "thread": ["-O1", "-g", "-fsanitize=thread", "-pthread"],
}
DRIVER = sorted(cuda_on_cpu.SHIM.glob("driv*.cpp"))


def build(
    folder: Path,
    sanitizer: str,
    csrc: Path = cuda_on_cpu.CSRC,
    files: list[Path] | None = None,
    kept: Path | None = None,
) -> Path:
    """Build the driver of all kernels or of some files; skip if this compiler does not have the sanitizer."""
    if cuda_on_cpu.COMPILER is None:
        pytest.skip("g++ was not found")
    flags = SANITIZERS[sanitizer]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    made = subprocess.run([cuda_on_cpu.COMPILER, *flags, probe, "-o", folder / "probe"], capture_output=True, text=True)
    if made.returncode or subprocess.run([folder / "probe"], capture_output=True).returncode:
        reason = made.stderr.strip()[-200:]
        pytest.skip(f"{cuda_on_cpu.COMPILER} has no runtime of -fsanitize={sanitizer} here: {reason}")
    files = files or [*DRIVER, *cuda_on_cpu.sources(csrc)]
    objects = cuda_on_cpu.compile_objects(files, flags, kept or folder, csrc)
    program = folder / f"driver-{sanitizer}"
    subprocess.run([cuda_on_cpu.COMPILER, *flags, *objects, "-o", program], check=True)
    return program


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=HANG)
    return done.returncode, done.stdout + done.stderr


def run_mutant(folder: Path, sanitizer: str, file: str, old: str, new: str) -> tuple[int, str]:
    """Run the driver of bn_finalize on a copy of csrc with `old` replaced in one file."""
    csrc = folder / "csrc"
    shutil.copytree(cuda_on_cpu.CSRC, csrc, ignore=shutil.ignore_patterns("__pycache__"))
    text = (csrc / file).read_text()
    assert old in text, f"{file} no longer has {old!r}"
    (csrc / file).write_text(text.replace(old, new))
    files = [cuda_on_cpu.SHIM / "driver.cpp", cuda_on_cpu.SHIM / "drive_bn_statistics.cpp"]
    return run(build(folder, sanitizer, csrc, [*files, csrc / "bn_statistics" / "bn_statistics.cu"]), "bn_finalize")


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_every_kernel_is_clean(tmp_path: Path, sanitizer: str) -> None:
    status, output = run(build(tmp_path, sanitizer, kept=cuda_on_cpu.kept()))
    assert status == 0, output
    assert output.count("right") >= 3 and "wrong" not in output


def test_every_launch_is_driven() -> None:
    """The driver calls each launch function of bindings_cuda.cpp."""
    bindings = (cuda_on_cpu.CSRC / "bindings_cuda.cpp").read_text()
    launched = set(re.findall(r"\b(cuda_\w+)\(\{", bindings))
    assert launched >= {"cuda_bn_finalize", "cuda_bn_frozen"}
    driver = "".join(path.read_text() for path in DRIVER)
    assert not {name for name in launched if f"{name}(" not in driver}


@pytest.mark.parametrize("barrier", ["written", "read"])
def test_a_removed_barrier_is_a_race(tmp_path: Path, barrier: str) -> None:
    change = ("common/cuda_reduce.cuh", f"__syncthreads();  // {barrier}", "")
    status, output = run_mutant(tmp_path, "thread", *change)
    assert status != 0
    assert "WARNING: ThreadSanitizer: data race" in output


def test_too_little_shared_memory_is_an_overrun(tmp_path: Path) -> None:
    change = ("common/cuda_reduce.cuh", "block_x * (block_y / 2)", "block_x * (block_y / 4)")
    status, output = run_mutant(tmp_path, "address", *change)
    assert status != 0
    assert "heap-buffer-overflow" in output


def test_a_wrong_sum_is_wrong(tmp_path: Path) -> None:
    status, output = run_mutant(tmp_path, "address", "common/cuda_moments.cuh", "gap * weight * gap", "gap * weight")
    assert status == 1
    assert "bn_finalize: wrong" in output

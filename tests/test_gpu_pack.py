"""gpu_pack.py: its kernels are launched on a stubbed driver without compiling, and missing kernels are reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from processes import HANG

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def compiling(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script in a process where Triton compiles; the tests themselves use its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)


def pack(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return compiling("gpu_pack.py", "--out", str(folder), "--blocks", "tiny.basic", *arguments)


def counted(done: subprocess.CompletedProcess) -> dict[str, int]:
    """Return the counts that a rehearsal prints."""
    return {name: int(count) for name, _, count in (part.rpartition(" ") for part in done.stdout.split(", "))}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton links with it")
def test_a_packed_block_is_launched_without_a_compilation(tmp_path: Path) -> None:
    done = pack(tmp_path, "--no-wheel", "--processes", "1")
    assert done.returncode == 0, done.stderr
    with ZipFile(tmp_path / "kernels.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    kernels = sorted({name.rpartition("/")[0] for name in files if not name.startswith("launchers/")})
    assert len(kernels) > 10 and f"{len(kernels)} kernels, " in done.stdout
    for kernel in kernels:
        assert sorted(Path(name).suffix for name in files if name.startswith(f"{kernel}/")) == [".cubin", ".json"]
    waits = {name: binary for name, binary in files.items() if name.startswith("waits/") and name.endswith(".cubin")}
    assert any(binary != files[name.replace("waits/", "kernels/")] for name, binary in waits.items())

    launched = pack(tmp_path, "--rehearse")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    counts = counted(launched)
    assert counts["packed"] == len(kernels) < counts["launches"] and not counts.get("compiled")
    of_second = counted(pack(tmp_path, "--rehearse", "--call", "second"))
    assert 0 < of_second["packed"] < counts["packed"]  # the second call forces no waits and has no float32

    lacking = {kernels[0], kernels[-1]}
    with ZipFile(tmp_path / "kernels.zip", "w") as archive:
        for name, content in files.items():
            if name.rpartition("/")[0] not in lacking:
                archive.writestr(name, content)
    launched = pack(tmp_path, "--rehearse")
    assert launched.returncode == 1 and counted(launched)["compiled"] == 2

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"triton": "2.9.1"}))
    refused = pack(tmp_path, "--rehearse")
    assert refused.returncode == 2 and "it is for triton 2.9.1, here " in refused.stderr
    refused = compiling("gpu_suite.py", "--call", "first", "--dry-run", "--pack", str(tmp_path))
    assert refused.returncode == 1 and "it is for triton 2.9.1, here " in refused.stderr
    refused = pack(tmp_path / "nowhere", "--rehearse")
    assert refused.returncode == 2 and "has no manifest" in refused.stderr


@pytest.mark.parametrize(("call", "last"), [("first", ["tests", "205", "318"]), ("second", ["models", "250", "338"])])
def test_a_dry_run_prints_the_schedule(call: str, last: list[str]) -> None:
    done = compiling("gpu_suite.py", "--call", call, "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert [word for word in lines[last[0]] if word in last] == last
    assert ("right" in lines) == (call == "first")
    if call == "second":
        assert lines["ops"][1] == "one_pass_dgrad" and lines["ops"][-4] == "12"  # the heaviest of twelve problems

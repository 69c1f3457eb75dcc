"""gpu_pack.py: what it compiled is launched on a stubbed driver without a compilation, and what is missing is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANG

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_pack.py"


def pack(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Where Triton compiles: the tests themselves run in its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--out", str(folder), "--blocks", "tiny.basic", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton links with it")
def test_a_packed_block_is_launched_without_a_compilation(tmp_path: Path) -> None:
    done = pack(tmp_path, "--no-wheel", "--processes", "1")
    assert done.returncode == 0, done.stderr
    kernels = sorted((tmp_path / "kernels").iterdir())
    assert len(kernels) > 10 and f"{len(kernels)} kernels, " in done.stdout
    for kernel in kernels:
        assert sorted(file.suffix for file in kernel.iterdir()) == [".cubin", ".json"]

    launched = pack(tmp_path, "--rehearse")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    counts = {name: int(count) for name, _, count in (part.rpartition(" ") for part in launched.stdout.split(", "))}
    assert counts["packed"] == len(kernels) < counts["launches"] and not counts.get("compiled")

    shutil.rmtree(kernels[0])
    launched = pack(tmp_path, "--rehearse")
    assert launched.returncode == 1 and "compiled 1" in launched.stdout

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"triton": "2.9.1"}))
    refused = pack(tmp_path, "--rehearse")
    assert refused.returncode == 2 and "it is for triton 2.9.1, here " in refused.stderr
    refused = pack(tmp_path / "nowhere", "--rehearse")
    assert refused.returncode == 2 and "has no manifest" in refused.stderr

"""The compiled code of the Triton kernels, compiled here without a GPU; and that bad kernels are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import HANG, once

from fusedres.kernels.triton_core.launch import Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from compiled_code.pipelines import COPIES, STORES, lacks

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "inspect_kernels.py"
SHARED_MEMORY_LIMIT = 232_448
BLOCKS = ("resnet50.layer2.0", "resnet50.layer1.1")  # C >= 128 with a projection; C = 64


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script in a process where Triton compiles; the tests themselves use its interpreter."""
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=ROOT,
        env=without | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """Compile for minutes, in one worker of pytest-xdist only, and return what was found."""

    def compiled() -> str:
        done = run(str(ROOT / "tests" / "inspect_worker.py"), *BLOCKS)
        assert done.returncode == 0, done.stderr
        assert "has no triton kernel" not in done.stderr
        return done.stdout

    return json.loads(once(tmp_path_factory, "inspected", compiled))


@pytest.fixture(scope="module")
def products(inspected):
    """Return the rows of a matrix product with configs that are wrong on purpose."""
    return inspected["products"]


def test_no_kernel_has_a_problem(inspected):
    """Problems are spills, too much shared memory, products without wgmma or asynchronous copies, drained pipelines."""
    found = {f"{r['kernel']} [{r['problem']}] {r['config']}": r["problems"] for r in inspected["rows"] if r["problems"]}
    assert not found


def test_products_run_on_tensor_cores_and_load_ahead(inspected):
    rows = [r for r in inspected["rows"] if r["product"]]
    assert {"conv_fprop_kernel", "conv_dgrad_kernel", "conv_wgrad_kernel", "gram_tiles_kernel"} <= {
        r["kernel"] for r in rows
    }
    for r in rows:
        assert "HGMMA" in r["tensor_core"] and r["shared"] <= SHARED_MEMORY_LIMIT and r["spilled"] == 0, r
        if not r["unrolled"]:
            assert r["loop_async_copies"] > 0, r


def test_pipelines_stay_full(inspected):
    """This holds for all kernels without an exception in benchmarks/compiled_code/pipelines.py."""
    rows = [r for r in inspected["rows"] if r["product"] and not r["lacks"]]
    assert {
        "conv_fprop_kernel",
        "conv_fprop_descriptor_kernel",
        "conv_bn_add_relu_kernel",
        "conv_dgrad_kernel",
        "conv_wgrad_kernel",
        "one_pass_tail_kernel",
    } <= {r["kernel"] for r in rows}
    for r in rows:
        assert r["loop_shared_stores"] == 0, r


def test_nothing_touches_what_a_wgmma_in_flight_uses(inspected):
    """This covers its registers (triton#9433) and its shared memory after another warpgroup's wait (triton#11047)."""
    rows = [r for r in inspected["rows"] if "HGMMA" in (r["tensor_core"] or "")]
    assert len({r["kernel"] for r in rows}) >= 9 and any(r["wgmma_waits"] for r in rows)
    assert not [r for r in rows if r["overwrites"] or r["races"]]


def test_a_missing_barrier_is_noticed(inspected):
    """Two products, one with copies ahead and one with stores to shared memory, as compiled and without barriers."""
    copied, copied_bare, stored, stored_bare = inspected["races"]
    assert copied == stored == 0 and copied_bare > 0 and stored_bare > 0


def test_waits_can_be_forced(inspected):
    """The GPU suite forces them to find results that depend on them."""
    as_compiled, forced = inspected["waits"]
    assert as_compiled == [1] and forced == [0]


def test_a_smaller_batch_compiles_nothing_new(inspected):
    compiled = {int(batch): counts for batch, counts in inspected["by_batch"].items()}
    assert list(compiled) == [256, 250, 64, 7, 1] and min(count for count, _ in compiled.values()) > 50
    assert not any(new for _, new in compiled.values()), compiled


def test_fp_fusion_is_set_explicitly(inspected):
    """Triton's default changes with its version."""
    assert {r["fp_fusion"] for r in inspected["rows"]} == {True}


def test_products_have_at_least_four_candidates(inspected):
    assert {80, 90} == {arch for arch, *_ in inspected["candidates"]}
    assert not [few for few in inspected["candidates"] if few[-1] < 4]


@pytest.mark.parametrize(
    ("kernel", "arguments", "blocks", "arch", "expected"),
    [
        ("conv_fprop_kernel", {"state_ptr": 1, "PADDED": True}, {"FLAT": False}, 90, set()),
        ("conv_fprop_kernel", {"state_ptr": None, "PADDED": True}, {"FLAT": True}, 90, {COPIES, STORES}),
        ("conv_fprop_kernel", {"state_ptr": None, "PADDED": True}, {"FLAT": False}, 80, set()),
        ("conv_fprop_kernel", {"state_ptr": 1, "PADDED": True}, {"FLAT": False}, 80, {STORES}),
        ("conv_fprop_kernel", {"state_ptr": 1, "PADDED": False}, {"FLAT": False}, 80, set()),
        ("conv_wgrad_kernel", {"y_ptr": 1, "gate_ptr": None, "state_ptr": None}, {}, 90, set()),
        ("conv_wgrad_kernel", {"y_ptr": None, "gate_ptr": None, "state_ptr": 1}, {}, 90, set()),
        ("conv_wgrad_kernel", {"y_ptr": 1, "gate_ptr": None, "state_ptr": 1}, {}, 90, {STORES}),
        ("conv_dgrad_kernel", {"y_ptr": 1, "gate_ptr": None}, {}, 90, set()),
        ("conv_dgrad_kernel", {"y_ptr": 1, "gate_ptr": 1}, {}, 90, {STORES}),
        ("one_pass_tail_kernel", {"C": 64, "X_C": 0}, {"BLOCK_C": 64}, 90, set()),
        ("one_pass_tail_kernel", {"C": 64, "X_C": 128}, {"BLOCK_C": 64}, 90, set()),
        ("one_pass_tail_kernel", {"C": 64, "X_C": 64}, {"BLOCK_C": 64}, 90, {STORES}),
    ],
)
def test_what_a_pipeline_may_lack(kernel, arguments, blocks, arch, expected):
    launch = SimpleNamespace(name=kernel, arguments=arguments)
    found = lacks(launch, Config(blocks), arch)
    assert set(found) == expected and all(found.values())


def test_a_good_product_is_read_right(products):
    good, old = products["good"], products["sm_80"]
    assert good["problems"] == old["problems"] == []
    assert good["config"] == "BLOCK_M=128 BLOCK_N=128 BLOCK_K=64 w8 s3"
    assert good["problem"] == "bf16 no-bias M=65536 N=256 K=512 MASK_PROLOGUE=False"
    assert good["shared"] == 3 * (128 + 128) * 64 * 2
    assert (good["tensor_core"], good["tensor_core_count"]) == ("HGMMA", 4)  # BLOCK_K is 64; one instruction takes 16
    assert old["tensor_core"] == "HMMA"
    # 256 threads copy (128 + 128)·64·2 bytes per step, 16 bytes at a time
    assert good["loop_async_copies"] == old["loop_async_copies"] == 8
    assert good["loop_shared_stores"] == 0 and good["wgmma_waits"] == [1]
    assert good["stores_16"] == good["stores"] == 8
    assert 0 < good["registers"] <= 128 and good["resident"] == 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("spilling", "spills "),
        ("shared memory", "shared memory 262,144 over 232,448"),
        ("drained", STORES),
        ("small", "a 16-bit dot without wgmma"),
        ("one stage", COPIES),
        ("invalid", "does not compile: CompilationError: "),
    ],
)
def test_a_bad_product_is_noticed(products, name, problem):
    assert any(problem in found for found in products[name]["problems"]), products[name]


def test_arguments_are_specialised_as_at_a_launch(inspected):
    """Alignment, ones, multiples of 16, sizes above 2³¹ and None give the same signature and attributes."""
    assert inspected["specialised"] == {
        "aligned_ptr": "*bf16 [['tt.divisibility', 16]]",
        "shifted_ptr": "*bf16",
        "missing_ptr": "constexpr None",
        "out_ptr": "*fp32 [['tt.divisibility', 16]]",
        "ONE": "constexpr 1",
        "SIXTEENS": "i32 [['tt.divisibility', 16]]",
        "ODD": "i32",
        "HUGE": "i64",
        "FLAG": "constexpr True",
        "BLOCK": "constexpr 64",
    }


def test_the_command_prints_and_writes_rows(tmp_path):
    path = tmp_path / "rows.json"
    done = run(
        str(SCRIPT),
        "--blocks",
        "tiny.basic",
        "--kernel",
        "bn_relu",
        "--ways",
        "library",
        "--limit",
        "1",
        "--json",
        str(path),
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    assert rows and {r["kernel"] for r in rows} == {"bn_relu_kernel"}
    assert all(r["verdict"] == "ok" and r["versions"]["triton"] and r["date"] and "commit" in r for r in rows)
    assert "bn_relu_kernel [sm_90] bf16" in done.stdout
    assert f"{len(rows)} compilations of 1 kernels, 0 with a problem" in done.stdout


def test_the_interpreter_is_refused():
    done = run(str(SCRIPT), TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set, so there is nothing to compile; unset it" in done.stderr

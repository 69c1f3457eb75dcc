"""benchmarks/compiled_code/hazards.py and ptx.py, tried on right and wrong code that is written here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from compiled_code import ptx
from compiled_code.hazards import overwrites
from compiled_code.ptx import races
from compiled_code.sass import Instruction

NO_SCOREBOARD = 7 << 49


def sass(*lines: str, control: dict[int, int] | None = None) -> list[Instruction]:
    """Return SASS with instructions 16 bytes apart, each "[@predicate] opcode operands"."""
    found = []
    for at, line in enumerate(lines):
        predicate = ""
        if line.startswith("@"):
            predicate, line = line[1:].split(" ", 1)
        opcode, _, operands = line.partition(" ")
        found.append(Instruction(16 * at, predicate, opcode, operands, (control or {}).get(at, NO_SCOREBOARD)))
    return found


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR8], R24, gsb0"  # sums: R24 to R87, operand: R100 to R103
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


@pytest.mark.parametrize(
    ("line", "hazard"),
    [
        ("MOV R100, R5", True),
        ("MOV R103, R5", True),
        ("MOV R104, R5", False),
        ("MOV R99, R5", False),
        ("LDS.64 R102, [R5]", True),
        ("LDS.128 R96, [R5]", False),
        ("LDS.128 R100, [R5]", True),
        ("LDSM.16.M88.4 R100, [R5]", True),
        ("LDSM.16.M88.2 R98, [R5]", False),
        ("IMAD.WIDE R102, R5, 0x4, R6", True),
        ("IMAD.WIDE.U32 R98, R5, 0x4, R6", False),
        ("CS2R R102, SRZ", True),
        ("SHFL.BFLY PT, R101, R5, 0x1, 0x1f", True),
        ("IADD3 R101, P0, PT, R5, R6, RZ", True),
        ("F2FP.BF16.F32.PACK_AB R100, R5, R6", True),
        ("STS.128 [R100], R104", False),  # the operand may be read
        ("ISETP.GE.AND P0, PT, R100, R101, PT", False),
        ("FADD R5, R100, R101", False),
        ("FADD R5, R24, R6", True),  # the sums are not ready yet
        ("FADD R5, R87, R6", True),
        ("FADD R5, R88, R6", False),
        ("STG.E.128 desc[UR4][R2.64], R24", True),
        ("MOV R40, R5", True),
        (PRODUCT, False),  # it adds to the same sums, in order
    ],
)
def test_what_may_not_stand_before_the_wait(line, hazard):
    assert bool(overwrites(sass(PRODUCT, line, WAIT, "EXIT"))) is hazard
    assert not overwrites(sass(PRODUCT, WAIT, line, WAIT, "EXIT"))


def test_the_next_iteration_is_read_too():
    """Triton 3.6 compiles this: a wait leaves one product in flight, with the operand loaded again before the wait."""
    leaves_one = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    body = ("LDS.64 R102, [R5]", PRODUCT, leaves_one, "@P0 BRA 0x0", WAIT, "EXIT")
    (found,) = overwrites(sass(*body))
    assert found.by.text == "LDS.64 R102, [R5]" and found.distance == 3
    assert "3 instructions after HGMMA" in str(found)
    assert not overwrites(sass(*(WAIT if line == leaves_one else line for line in body)))


def test_a_wait_counts_products():
    """Two products are issued; a wait that leaves one in flight completes only the older one."""
    younger = PRODUCT.replace("R100", "R104")
    for register, hazard in (("R100", False), ("R104", True)):
        code = sass(PRODUCT, younger, "WARPGROUP.DEPBAR.LE gsb0, 0x1", f"MOV {register}, R5", WAIT, "EXIT")
        assert bool(overwrites(code)) is hazard, register


def test_products_are_committed_by_the_last_of_a_group():
    """A wait does not see a product that is not committed."""
    alone = PRODUCT.removesuffix(", gsb0")
    assert overwrites(sass(alone, WAIT, "MOV R100, R5", "EXIT"))
    assert not overwrites(sass(alone, PRODUCT.replace("R100", "R104"), WAIT, "MOV R100, R5", "EXIT"))


def test_every_path_is_read():
    wait_on_one_side = ("@P0 BRA 0x30", WAIT, "MOV R100, R5", "EXIT")
    assert not overwrites(sass(PRODUCT, "BRA 0x20", *wait_on_one_side[1:]))
    assert overwrites(sass(PRODUCT, *wait_on_one_side))
    assert not overwrites(sass(PRODUCT, "EXIT", "MOV R100, R5"))
    assert overwrites(sass(PRODUCT, "@P0 EXIT", "MOV R100, R5", "EXIT"))
    with pytest.raises(NotImplementedError, match="BRX"):
        overwrites(sass(PRODUCT, "BRX R2 -0x10", "EXIT"))


def test_a_scoreboard_tells_that_operands_were_read():
    """The product sets scoreboard 2, and the write waits for it; the sums are still in flight."""
    reads, waits = 2 << 49, NO_SCOREBOARD | 1 << (52 + 2)
    for line, hazard in (("MOV R100, R5", False), ("MOV R24, R5", True)):
        assert bool(overwrites(sass(PRODUCT, line, WAIT, "EXIT", control={0: reads, 1: waits}))) is hazard
    assert overwrites(sass(PRODUCT, "MOV R100, R5", WAIT, "EXIT", control={0: reads}))


# --- shared memory ----------------------------------------------------------------------------------------------------

# A ring of two tiles with 64 rows of 128 bytes: each iteration multiplies one tile and copies into the other.
RING = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid {threads}
{{
	.reg .pred %p<3>;
	.reg .b32 %r<9>;
	.reg .b64 %rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;
	shl.b32 	%r3, %r2, 4;
	mov.b32 	%r4, 0;
$L__BB0_1:
	and.b32 	%r5, %r4, 1;
	shl.b32 	%r6, %r5, 13;
	cvt.u64.u32 	%rd2, %r6;
	shr.u64 	%rd3, %rd2, 4;
	or.b64 	%rd4, %rd3, 4611686293372403712;
	bar.sync 	0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%f0,%f1}}, {{%r90,%r91,%r92,%r93}}, %rd4, %p1, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned {pending};
	{barrier}
	xor.b32 	%r7, %r6, {other};
	add.s32 	%r7, %r7, %r3;
	cp.async.cg.shared.global [ %r7 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;
	cp.async.commit_group;
	add.s32 	%r4, %r4, 1;
	setp.lt.s32 	%p2, %r4, %r1;
	@%p2 bra 	$L__BB0_1;
	wgmma.wait_group.sync.aligned 0;
	ret;
}}
"""
FENCE = "bar.sync 	0;"
OTHER, SAME = 8192, 0


def ring(threads: int = 256, pending: int = 0, barrier: str = "", other: int = OTHER) -> str:
    return RING.format(threads=threads, pending=pending, barrier=barrier, other=other)


@pytest.mark.parametrize("thread", [0, 128])
@pytest.mark.parametrize(
    ("text", "raced"),
    [
        (ring(), False),  # the overwritten tile was multiplied before the barrier at the top
        (ring(other=SAME), True),  # another warpgroup may still be multiplying it
        (ring(other=SAME, barrier=FENCE), False),
        (ring(threads=128, other=SAME), False),  # there is no other warpgroup
        (ring(pending=1), True),  # the previous iteration may still be in flight
        (ring(pending=1, threads=128, other=SAME), True),
        (ring(pending=1, barrier=FENCE), False),
        (ring(pending=1, barrier=FENCE, other=SAME), True),  # the wait is for the wrong product
    ],
)
def test_shared_memory_is_free_behind_the_barrier_that_follows_the_wait(text, raced, thread):
    found = races(text, [1 << 33, 6], thread)
    assert bool(found) is (raced and thread in (0, 128))
    for race in found:
        assert race.write.startswith("cp.async.cg") and race.product.startswith("wgmma.mma_async")


def test_one_turn_cannot_race_with_the_next():
    assert not races(ring(pending=1), [1 << 33, 1], 0)


def test_what_is_not_known_is_said(monkeypatch):
    monkeypatch.setattr(ptx, "MOST_STEPS", 1000)
    with pytest.raises(NotImplementedError, match="depends on popc"):
        races(ring().replace("shl.b32 	%r3, %r2, 4;", "popc.b32 	%r3, %r2;"), [1 << 33, 6], 0)
    with pytest.raises(RuntimeError, match="does not end"):
        races(ring().replace("add.s32 	%r4, %r4, 1;", ""), [1 << 33, 6], 0)

"""Resources and instructions of a cubin, read with cuobjdump of the triton package.

The main loops of a kernel are the innermost loops with tensor-core instructions. If these stand in no loop (unrolled),
the main loop is the code from the first to the last of them. If there are none, the main loops are the innermost loops
with accesses to global memory. Counts are of instructions in the SASS, not of executed instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import triton

_ASYNC = ("LDGSTS", "UBLKCP", "UTMALDG")
TENSOR_CORE = ("HGMMA", "HMMA", "DMMA")
_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);\s*"
    r"/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
)


@dataclass(frozen=True)
class Instruction:
    """One instruction with its control word, which has the scoreboards."""

    address: int
    predicate: str  # "" if there is none
    opcode: str  # with modifiers
    operands: str
    control: int  # the upper half of the encoding

    @property
    def text(self) -> str:
        """Opcode and operands."""
        return f"{self.opcode} {self.operands}".rstrip()

    @property
    def read_scoreboard(self) -> int:
        """The scoreboard that says when the operands have been read; 7: none."""
        return self.control >> 49 & 7

    @property
    def waits(self) -> int:
        """One bit for each scoreboard that it waits for."""
        return self.control >> 52 & 63


class Binary:
    """A cubin, disassembled with cuobjdump of the triton package when it is first needed."""

    def __init__(self, cubin: bytes) -> None:
        self._cubin = cubin

    @cached_property
    def _text(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @property
    def resources(self) -> tuple[int, int]:
        """Registers and spilled bytes per thread. Stack that no instruction touches does not count."""
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", self._text))
        touched = any(op.startswith(("LDL", "STL")) for op in self.opcodes)
        return int(found["REG"]), (int(found["STACK"]) + int(found["LOCAL"])) * touched

    @cached_property
    def instructions(self) -> list[Instruction]:
        """All instructions, in order."""
        return [
            Instruction(int(address, 16), predicate, opcode, operands.strip(), int(control, 16))
            for address, predicate, opcode, operands, control in _INSTRUCTION.findall(self._text)
        ]

    @property
    def opcodes(self) -> list[str]:
        """The opcode of every instruction."""
        return [line.opcode for line in self.instructions]

    def count(self, opcode: str) -> int:
        """Return how many instructions have this opcode, with any modifiers."""
        return sum(op.partition(".")[0] == opcode for op in self.opcodes)

    @cached_property
    def lines(self) -> list[str]:
        """Every instruction as text."""
        return [line.text for line in self.instructions]

    @cached_property
    def loops(self) -> list[list[str]]:
        """The instructions of every innermost loop."""
        spans = []
        for line in self.instructions:
            target = re.search(r"0x([0-9a-f]+)$", line.operands)
            if line.opcode.startswith("BRA") and target and int(target[1], 16) < line.address:
                spans.append((int(target[1], 16), line.address))
        return [
            [line.text for line in self.instructions if low <= line.address <= high] for low, high in _innermost(spans)
        ]

    @cached_property
    def unrolled(self) -> bool:
        """Whether there are tensor-core instructions, but none in a loop."""
        return not _with(self.loops, TENSOR_CORE) and bool(_with([self.lines], TENSOR_CORE))

    @cached_property
    def main_loops(self) -> list[list[str]]:
        """The instructions of each main loop."""
        if self.unrolled:
            products = [i for i, line in enumerate(self.lines) if line.startswith(TENSOR_CORE)]
            return [self.lines[products[0] : products[-1] + 1]]
        return _with(self.loops, TENSOR_CORE) or _with(self.loops, ("LDG", *_ASYNC, "STG"))

    @property
    def async_copies(self) -> int | None:
        """Asynchronous copies in the main loop: the fewest of several loops; of the whole kernel if it is unrolled."""
        loops = [self.lines] if self.unrolled else self.main_loops
        return min((len([line for line in loop if line.startswith(_ASYNC)]) for loop in loops), default=None)

    @property
    def shared_stores(self) -> int | None:
        """Shared-memory stores in the main loop: the most of several loops."""
        return max((len([line for line in loop if line.startswith("STS")]) for loop in self.main_loops), default=None)

    @property
    def wgmma_waits(self) -> list[int]:
        """For every wait in main loops, how many groups of wgmma may stay in flight."""
        found = (
            re.match(r"WARPGROUP\.DEPBAR\.LE\s+gsb0, 0x([0-9a-f]+)", line) for loop in self.main_loops for line in loop
        )
        return [int(wait[1], 16) for wait in found if wait]


def _with(loops: Iterable[list[str]], opcodes: tuple[str, ...]) -> list[list[str]]:
    """Return the loops that contain one of the opcodes."""
    return [loop for loop in loops if any(line.startswith(opcodes) for line in loop)]


def _innermost(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans that contain no other span."""
    distinct = sorted(set(spans))
    return [s for s in distinct if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in distinct)]

"""Find registers in SASS that a kernel touches while a wgmma may still use them.

A wgmma is asynchronous. Until a wait retires it, PTX forbids to write the registers of its first operand and to read or
write its accumulator. Triton 3.6 breaks this rule (triton#9433), and then a few elements are sometimes wrong.

Every path of the control flow is followed from each HGMMA to the waits that retire it. In SASS a wait counts HGMMAs,
not groups: DEPBAR.LE gsb0, 3 leaves the last three in flight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from compiled_code.sass import Instruction

# The first operand of these may be a register that is not a result.
_NO_RESULT = ("BAR", "BRX", "JMX", "NANOSLEEP", "R2B", "R2P", "R2UR", "RET", "WARPSYNC", "REDUX")
_NO_SCOREBOARD = 7


@dataclass(frozen=True)
class Hazard:
    """An instruction that touches registers that a wgmma may still use."""

    product: Instruction  # the HGMMA
    by: Instruction
    distance: int  # instructions from one to the other, on the shortest path

    def __str__(self) -> str:
        return f"{self.by.text} {self.distance} instructions after {self.product.text}"


@dataclass(frozen=True)
class _State:
    """A position on a path that started at one HGMMA."""

    at: int
    younger: int | None  # later HGMMAs; None: the first one is not committed yet
    operand_read: bool  # a scoreboard said that its first operand has been read


def overwrites(code: Sequence[Instruction]) -> list[Hazard]:
    """Return the writes to the first operand of a wgmma in flight, and the accesses to its accumulator by no wgmma."""
    found = []
    for start, product in _products(code):
        sums, operand = _registers(product)
        for state, distance in _in_flight(code, start):
            by = code[state.at]
            if by.opcode.startswith("HGMMA"):
                continue
            touched = sums & (_written(by) | _named(by))
            if not state.operand_read:
                touched |= operand & _written(by)
            if touched:
                found.append(Hazard(product, by, distance))
    return found


def _products(code: Sequence[Instruction]) -> Iterator[tuple[int, Instruction]]:
    return ((at, line) for at, line in enumerate(code) if line.opcode.startswith("HGMMA"))


def _in_flight(code: Sequence[Instruction], start: int) -> Iterator[tuple[_State, int]]:
    """Yield every instruction that may run after the HGMMA at `start` and before a wait retires it, with its distance
    from the HGMMA, nearest first.
    """
    scoreboard = code[start].read_scoreboard
    committed = 0 if "gsb0" in code[start].operands else None
    index = {line.address: at for at, line in enumerate(code)}
    front = [_State(at, committed, False) for at in _next(code, start, index)]
    seen = set(front)
    distance = 1
    while front:
        reached = []
        for state in front:
            line = code[state.at]
            younger = state.younger
            pending = re.match(r"gsb0, 0x([0-9a-f]+)", line.operands) if "DEPBAR" in line.opcode else None
            if pending and younger is not None and younger >= int(pending[1], 16):
                continue
            waited = scoreboard != _NO_SCOREBOARD and bool(line.waits >> scoreboard & 1)
            here = _State(state.at, younger, state.operand_read or waited)
            yield here, distance
            if line.opcode.startswith("HGMMA") and "gsb0" in line.operands:
                younger = 0 if younger is None else min(younger + 1, 255)
            reached += [_State(at, younger, here.operand_read) for at in _next(code, state.at, index)]
        front = [state for state in dict.fromkeys(reached) if state not in seen]
        seen.update(front)
        distance += 1


def _next(code: Sequence[Instruction], at: int, index: dict[int, int]) -> list[int]:
    """Return the instructions that may run next."""
    line = code[at]
    kind = line.opcode.partition(".")[0]
    if kind in ("BRX", "JMX", "JMP"):
        raise NotImplementedError(f"a jump to where registers say: {line.text}")
    following = [at + 1] if at + 1 < len(code) else []
    if kind in ("EXIT", "RET"):
        return following if line.predicate else []
    if kind in ("BRA", "CALL"):
        target = re.search(r"0x([0-9a-f]+)\s*$", line.operands)
        if target is None or int(target[1], 16) not in index:
            raise NotImplementedError(f"a branch to an unknown place: {line.text}")
        alone = kind == "BRA" and not line.predicate and line.operands.strip().startswith("0x")
        return [index[int(target[1], 16)], *([] if alone else following)]
    return following


def _registers(product: Instruction) -> tuple[set[int], set[int]]:
    """Return the registers of the accumulator, and of the first operand if it is in registers."""
    rows, columns = map(int, re.findall(r"(\d+)x(\d+)x", product.opcode)[0])
    each = rows * columns // 128 // (1 if ".F32" in product.opcode else 2)
    sums, operand = (part.strip() for part in product.operands.split(",")[:2])
    return _from(sums, each), _from(operand, 4)


def _from(operand: str, count: int) -> set[int]:
    first = re.fullmatch(r"R(\d+)", operand.partition(".")[0])
    return set(range(int(first[1]), int(first[1]) + count)) if first else set()


def _named(line: Instruction) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", line.operands)}


def _written(line: Instruction) -> set[int]:
    """Return the registers that an instruction writes."""
    if line.opcode.startswith(_NO_RESULT) or "SETP" in line.opcode:
        return set()
    for operand in map(str.strip, line.operands.split(",")):
        if not re.fullmatch(r"!?U?P(\d+|T)", operand):  # predicates come first
            return _from(operand, _width(line.opcode))
    return set()


def _width(opcode: str) -> int:
    """Return how many registers an instruction writes."""
    kind = opcode.partition(".")[0]
    if kind == "LDSM":
        matrices = re.search(r"M[T]?88\.(\d)", opcode)
        return int(matrices[1]) if matrices else 1
    if ".128" in opcode or kind in ("HMMA", "DMMA", "IMMA"):
        return 4
    wide = re.search(r"\.(64|WIDE)\b|^CS2R(?!\.32)|^D(ADD|MUL|FMA)\b|^(F2F|I2F)\.F64|^F2I.*[SU]64", opcode)
    return 2 if wide else 1

"""Run one thread of a kernel from its PTX and find writes to shared memory that a wgmma may still read.

A wgmma reads operands from shared memory for its warpgroup until a wait retires it. With several warpgroups the wait of
one says nothing about the others, so the bytes may be written again only after a barrier that follows the wait
(triton#11047). `races` runs a thread through the whole kernel and finds writes that come too early.

Only the integers that addresses and branches depend on are computed. Every loaded value is taken as 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

MOST_STEPS = 20_000_000  # instructions of a thread
MOST_PROGRAMS = 64
_WARPGROUP = 128  # threads
_LABEL = re.compile(r"(\$?\w+):")
_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);")
_STORES = ("st.shared", "stmatrix", "cp.async.cg", "cp.async.ca", "cp.async.bulk.tensor")
_EVENTS = (*_STORES, "wgmma.", "bar.sync", "barrier.cta.sync")
_FLOW = ("bra", "brx", "ret", "exit")
_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor: bytes of a row


@dataclass(frozen=True)
class Race:
    """A write to bytes that a wgmma of another warpgroup may still read."""

    write: str
    product: str
    waited: bool  # whether the wait of this thread had retired the wgmma


@dataclass
class _Line:
    negated: bool
    predicate: str
    opcode: str
    text: str
    written: list[str]
    read: list[str]
    operands: list[str]


@dataclass(frozen=True)
class _Kernel:
    lines: list[_Line | None]  # None: no address and no branch depends on it
    labels: dict[str, int]
    tables: dict[str, list[str]]  # of indexed branches
    alone: bool  # the program has a single warpgroup


@dataclass
class _Product:
    text: str
    regions: list[range]
    retired: bool = False


@dataclass
class _Thread:
    registers: dict[str, int]
    alone: bool  # a single warpgroup: its own wait is enough
    open: list[_Product] = field(default_factory=list)  # not committed
    groups: list[list[_Product]] = field(default_factory=list)
    unfenced: list[_Product] = field(default_factory=list)  # in flight, or retired but not yet followed by a barrier

    def value(self, operand: str) -> int:
        if operand in self.registers:
            return self.registers[operand]
        try:
            return int(operand, 0)
        except ValueError:
            return 0  # the start of shared memory, or a register that no address depends on


def races(ptx: str, arguments: Sequence[int], thread: int) -> list[Race]:
    """Return the writes of `thread` that come too early, in as many programs as run every wgmma of the kernel.

    arguments: the arguments of the kernel; a pointer is any aligned number.

    Raises:
        NotImplementedError: an address or a branch depends on an instruction that is not known here.
        RuntimeError: the thread does not end, or a wgmma runs in none of the first MOST_PROGRAMS programs.
    """
    kernel = _parse(ptx)
    left = {at for at, line in enumerate(kernel.lines) if line is not None and line.opcode.startswith("wgmma.mma")}
    found: dict[tuple[str, str], Race] = {}
    program = 0
    while left:
        if program == MOST_PROGRAMS:
            raise RuntimeError(f"no program runs the wgmma of line {min(left)}")
        ran, raced = _run(kernel, arguments, thread, program)
        if ran & left:
            left -= ran
            found |= raced
        program += 1
    return list(found.values())


def _run(
    kernel: _Kernel, arguments: Sequence[int], thread: int, program: int
) -> tuple[set[int], dict[tuple[str, str], Race]]:
    """Run one thread; return the lines of the wgmmas that ran, and the races."""
    at_start = {"%tid.x": thread, "%ctaid.x": program, "%ctaid.y": 0, "%ctaid.z": 0, "%laneid": thread % 32}
    state = _Thread(at_start, kernel.alone)
    ran: set[int] = set()
    found: dict[tuple[str, str], Race] = {}
    at = steps = 0
    while at < len(kernel.lines):
        steps += 1
        if steps > MOST_STEPS:
            raise RuntimeError("the thread does not end")
        line = kernel.lines[at]
        at += 1
        if line is None or (line.predicate and bool(state.value(line.predicate)) == line.negated):
            continue
        kind = line.opcode.partition(".")[0]
        if kind in ("ret", "exit"):
            break
        if kind == "bra":
            at = kernel.labels[line.operands[0]]
        elif kind == "brx":
            at = kernel.labels[kernel.tables[line.operands[1]][state.value(line.operands[0])]]
        elif line.opcode.startswith(_EVENTS):
            if line.opcode.startswith("wgmma.mma"):
                ran.add(at - 1)
            for race in _event(state, line):
                found.setdefault((race.write, race.product), race)
        else:
            _compute(state, line, arguments)
    return ran, found


def _parse(ptx: str) -> _Kernel:
    body = ptx[ptx.index(".entry") :]
    body = re.sub(r"//[^\n]*", "", body[body.index("{") :])
    for number, scope in enumerate(re.findall(r"\{\s*\.reg \.pred complete;.*?\}", body, re.DOTALL)):
        body = body.replace(
            scope, f"mbarrier_wait {number};", 1
        )  # the loop that waits for a copy; taken as one instruction
    lines: list[_Line] = []
    labels: dict[str, int] = {}
    tables: dict[str, list[str]] = {}
    for table in re.findall(r"(\$?\w+):\s*\.branchtargets\s([^;]*);", body):
        tables[table[0]] = re.findall(r"\$?\w+", table[1])
    for raw in body.splitlines():
        text = raw.strip()
        if label := _LABEL.match(text):
            labels[label[1]] = len(lines)
            text = text[label.end() :].strip()
        found = _LINE.match(text)
        if found and not text.startswith("."):
            lines.append(_line(found))
    needed = _needed(lines)
    kept = [
        line if line.opcode.startswith((*_EVENTS, *_FLOW)) or set(line.written) & needed else None for line in lines
    ]
    threads = re.search(r"\.reqntid (\d+)", ptx)
    assert threads is not None
    return _Kernel(kept, labels, tables, int(threads[1]) <= _WARPGROUP)


def _line(found: re.Match[str]) -> _Line:
    negated, predicate, opcode, rest = found.groups()
    operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)
    stores = opcode.startswith((*_EVENTS, "st.", "bra", "brx", "red.", "mbarrier", "cp.", "fence", "prefetch"))
    written = [] if stores else re.findall(r"%\w+", operands[0]) if operands else []
    read = re.findall(r"%[\w.]+", " ".join(operands if stores else operands[1:]))
    text = re.sub(r"\{[^}]*\}", "{…}", f"{opcode} {rest}")
    return _Line(
        bool(negated), predicate or "", opcode, text, written, [*read, *([predicate] if predicate else [])], operands
    )


def _needed(lines: Iterable[_Line]) -> set[str]:
    """Return the registers that addresses and branches depend on."""
    lines = list(lines)
    needed: set[str] = set()
    for line in lines:
        if line.opcode.startswith(_STORES):
            needed.update(re.findall(r"%\w+", line.operands[0]), [line.predicate])
        elif line.opcode.startswith("wgmma.mma"):
            needed.update(*(re.findall(r"%\w+", operand) for operand in _descriptors(line)))
        elif line.opcode.startswith(("bra", "brx")):
            needed.update(line.read)
    while True:
        more = {name for line in lines if needed & set(line.written) for name in line.read} - needed
        if not more:
            return needed
        needed |= more


def _descriptors(line: _Line) -> list[str]:
    """Return the operands of a wgmma that are in shared memory."""
    return [operand for operand in line.operands[1:3] if operand.startswith("%rd")]


def _event(state: _Thread, line: _Line) -> Iterator[Race]:
    opcode = line.opcode
    if opcode.startswith("wgmma.mma"):
        state.open.append(_Product(line.text, [_region(state, line, operand) for operand in _descriptors(line)]))
        state.unfenced.append(state.open[-1])
    elif opcode.startswith("wgmma.commit"):
        state.groups.append(state.open)
        state.open = []
    elif opcode.startswith("wgmma.wait"):
        pending = int(line.operands[0])
        done = state.groups[: len(state.groups) - pending]
        for product in (product for group in done for product in group):
            product.retired = True
        state.groups = state.groups[len(done) :]
        if state.alone:
            state.unfenced = [product for product in state.unfenced if not product.retired]
    elif opcode.startswith(("bar.sync", "barrier.cta.sync")):
        state.unfenced = [product for product in state.unfenced if not product.retired]
    elif opcode.startswith(_STORES):
        address = _address(state, line.operands[0])
        for product in state.unfenced:
            if any(address in region for region in product.regions):
                yield Race(line.text, product.text, product.retired)


def _address(state: _Thread, operand: str) -> int:
    return sum(state.value(part) for part in re.findall(r"%?-?[\w.]+", operand))


def _region(state: _Thread, line: _Line, operand: str) -> range:
    """Return the bytes of an operand that a wgmma reads: rows of a swizzled tile, from a start of its 8-row pattern."""
    shape = re.search(r"m(\d+)n(\d+)k(\d+)", line.opcode)
    assert shape is not None
    descriptor = state.value(operand)
    row = _SWIZZLES[descriptor >> 62]
    start = (descriptor & 0x3FFF) << 4
    second = operand is line.operands[2]
    transposed = line.operands[-1 if second else -2] == "1" and len(line.operands) > 6
    rows = 16 if transposed else int(shape[2 if second else 1])
    start -= start % (8 * row)
    return range(start, start + rows * row)


_MASKS = {"8": 0xFF, "16": 0xFFFF, "32": 0xFFFFFFFF, "64": 0xFFFFFFFFFFFFFFFF}


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _quotient(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else 0


_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "min": min,
    "max": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << min(b, 64),
    "shr": lambda a, b: a >> min(b, 64),
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lo": lambda a, b: a < b,
    "hi": lambda a, b: a > b,
}


def _compute(state: _Thread, line: _Line, arguments: Sequence[int]) -> None:
    """Run one instruction that only changes registers."""
    parts = line.opcode.split(".")
    kind, type_ = parts[0], parts[-1]
    out = line.written[0]
    bits = int(re.sub(r"\D", "", type_) or 1)
    sources = [state.value(operand) for operand in line.operands[1:] if not operand.startswith(("[", "{"))]
    if type_.startswith("s") and kind not in ("bfe", "cvt"):
        sources = [_signed(value, bits) for value in sources]
    if kind == "ld":
        parameter = re.search(r"_param_(\d+)", line.operands[1])
        results = [arguments[int(parameter[1])] if parameter else 0] * len(line.written)
    elif kind in ("ldmatrix", "shfl", "match", "atom", "elect", "activemask", "vote"):
        results = [0] * len(line.written)
        if kind == "shfl":
            results[0] = sources[0]  # a value that all lanes share
        if kind == "elect":
            results[-1] = int(state.registers["%laneid"] == 0)
    elif kind in ("mov", "cvta"):
        packed = [state.value(part) for part in re.findall(r"[^{},\s]+", line.operands[1])]
        width = bits // max(len(packed), 1)
        joined = sum((value & ((1 << width) - 1)) << (width * n) for n, value in enumerate(packed))
        each = bits // len(line.written)
        results = [joined >> (each * n) & ((1 << each) - 1) for n in range(len(line.written))]
    elif kind == "cvt":
        source = int(re.sub(r"\D", "", type_))
        value = _signed(sources[0], source) if type_.startswith("s") else sources[0] & _MASKS[str(source)]
        results, bits = [value], int(re.sub(r"\D", "", parts[-2]))
    elif kind == "selp":
        results = [sources[0] if state.value(line.operands[3]) else sources[1]]
    elif kind == "setp":
        results = [int(_COMPARE[parts[1]](sources[0], sources[1]))]
        bits = 1
    elif kind == "bfe":
        value = sources[0] >> sources[1] & ((1 << sources[2]) - 1)
        results = [_signed(value, sources[2]) if type_.startswith("s") and sources[2] else value]
    elif kind in ("not", "neg"):
        results = [(1 - sources[0] if bits == 1 else ~sources[0]) if kind == "not" else -sources[0]]
    elif kind in ("mul", "mad"):
        product = sources[0] * sources[1]
        if parts[1] == "hi":
            product >>= bits
        if parts[1] == "wide":
            bits *= 2
        results = [product + (state.value(line.operands[3]) if kind == "mad" else 0)]
    elif kind in _BINARY:
        results = [_BINARY[kind](sources[0], sources[1])]
    else:
        raise NotImplementedError(f"an address or a branch depends on {line.text}")
    mask = (1 << bits) - 1
    for name, value in zip(line.written or [out], results, strict=True):
        state.registers[name] = value & mask

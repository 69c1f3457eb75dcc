"""Check every element of every op at every problem of ResNet-50 and ResNet-18, and that all calls give equal bits.

Nothing is timed. An op is checked once for each dtype, on the arguments of the first call of a block. A wrong result
has a row with an error; one row per case counts the right and the wrong results.
"""

from __future__ import annotations

from functools import partial

import torch
from common import blocks
from memory_traffic.launched import WAYS

from fusedres import cuda_support
from fusedres.kernels import serving
from fusedres.tune.calls import Call, Visit
from fusedres.tune.compare import Expected, repeats
from suite.precision import PRECISIONS, Precision
from suite.settings import DIED, Case, Settings, first_lines
from suite.walk import TINY, walk_block, walk_stem

REPEATS = 20


def cases(settings: Settings) -> list[Case]:
    """Return the cases of batch 256 in bfloat16."""
    if settings.tiny:
        return _cases(settings, {"float32": ["library min"], "float16": ["fused min"]}, (2,))
    return _cases(settings, {"bfloat16": ["fused min", "fused", "library min", "library"]}, (256,))


def all_cases(settings: Settings) -> list[Case]:
    """Return the cases of the other dtypes, and of batch 64."""
    if settings.tiny:
        return _cases(settings, {"float16": ["library"]}, (2,))
    found = _cases(settings, {name: list(WAYS) for name in PRECISIONS}, (256, 64))
    of_first = {case.name for case in cases(settings)}
    return [case for case in found if case.name not in of_first]


def _cases(settings: Settings, precisions: dict[str, list[str]], batches: tuple[int, ...]) -> list[Case]:
    """Return the cases by batch, dtype, way and block, blocks of ResNet-50 first."""
    seen: dict[str, set[str]] = {name: set() for name in PRECISIONS}
    for row in settings.journal.lines():
        if row.get("event") == "checked":
            seen[row["precision"]].add(row["name"])
    chosen = TINY if settings.tiny else dict(sorted(blocks.stage_blocks().items(), reverse=True))
    found = []
    for batch in batches:
        for precision, ways in ((PRECISIONS[name], ways) for name, ways in precisions.items()):
            for way in ways:
                for name, block in chosen.items():
                    case = f"{name}, {way}, batch {batch}, {precision.name}"
                    walk = partial(walk_block, name=name, block=block, way=way, batch=batch, dtype=precision.dtype)
                    found.append(Case(case, partial(_check, settings, case, precision, seen, walk), settings.patience))
            for way in () if settings.tiny and precision.dtype is torch.float16 else ("fused", "library"):
                case = f"stem, {way}, batch {batch}, {precision.name}"
                walk = partial(walk_stem, way=way, batch=batch, dtype=precision.dtype)
                found.append(Case(case, partial(_check, settings, case, precision, seen, walk), settings.patience))
    return found


def _check(settings: Settings, case: str, precision: Precision, seen: dict[str, set[str]], walk: partial) -> None:
    counts = {"right": 0, "wrong": 0}
    poison = settings.journal.poison()

    def check(call: Call) -> None:
        if call.op.name == "empty_batch":
            return
        expected = Expected(call)
        for backend in _backends(call):
            what = f"{call.signature} {backend}"
            if what in poison:
                wrong: str | None = DIED
            else:
                settings.journal.append(case=case, event="trying", what=what)
                wrong = _wrong(settings, call, backend, expected)
            counts["wrong" if wrong else "right"] += 1
            if wrong:
                settings.row(case, op=call.op.name, name=call.signature, backend=backend, error=wrong)
        settings.journal.append(case=case, event="checked", precision=precision.name, name=call.signature)

    with precision.switched():
        walk(settings, Visit(seen[precision.name], check))
    if any(counts.values()):
        settings.journal.append(case=case, **counts, **precision.about)


def _backends(call: Call) -> list[str]:
    backend = call.args[-1]
    has_another = cuda_support.unsupported() is None and serving.find(call.op.folder, call.op.name, "cuda")
    return [backend, "cuda"] if backend == "triton" and has_another else [backend]


def _wrong(settings: Settings, call: Call, backend: str, expected: Expected) -> str | None:
    try:
        found = expected.wrong(call.results(backend))
        return found or repeats(call, backend, REPEATS if settings.on_gpu else 2)
    except Exception as error:
        if settings.on_gpu:
            torch.cuda.synchronize()  # raises if the GPU is lost, and so ends the whole case
        return f"{type(error).__name__}: {first_lines(str(error))}"

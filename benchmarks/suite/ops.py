"""Time ops as the blocks of ResNet-50 call them: each backend, and each candidate config of the GEMM-shaped kernels.

An op is checked against the reference backend and timed, both on the arguments of the first call of a block
(fusedres/tune/calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from common import blocks, harness
from common.harness import Variant
from memory_traffic.counting import CountBytes
from torch import Tensor

from fusedres import cuda_support
from fusedres.kernels import serving
from fusedres.kernels.triton_core import launch as launching
from fusedres.tune.calls import Call, Recorder, Visit, always, forced
from fusedres.tune.compare import Expected
from suite.arithmetic import flops
from suite.heaviest import heaviest
from suite.settings import Case, Settings, first_lines, floor_seconds
from suite.walk import TINY, walk_block, walk_stem

_LEAD = 300e-6  # seconds that the GPU waits before it runs timed work, so that all launches are already queued


# --- measuring a call -------------------------------------------------------------------------------------------------


class Measure:
    """Measures calls of ops and writes their rows; with `problem`, only calls that have it, and its candidates."""

    def __init__(self, settings: Settings, case: str, problem: str | None = None) -> None:
        self.settings, self.case, self.problem = settings, case, problem
        self.timer = harness.Timer(settings.device, lead=_LEAD)
        self.rounds = 20 if settings.on_gpu else 1
        self.poison = settings.journal.poison()

    def __call__(self, call: Call) -> None:
        backend = call.args[-1]
        if call.op.name == "empty_batch" or not self._try(call.signature):
            return
        try:
            self._measure(call, backend)
        except Exception as error:
            self._failed(call, backend, error)
        self.settings.journal.append(case=self.case, event="measured", name=call.signature)

    def _try(self, what: str) -> bool:
        """Note what runs next; return False if the process died of it before."""
        if what in self.poison:
            return False
        self.settings.journal.append(case=self.case, event="trying", what=what)
        return True

    def _failed(self, call: Call, backend: str, error: Exception | str, **fields: Any) -> None:
        if isinstance(error, Exception):
            if self.settings.on_gpu:
                torch.cuda.synchronize()  # raises if the GPU is lost, and so ends the whole case
            error = f"{type(error).__name__}: {first_lines(str(error))}"
        self.settings.row(
            self.case,
            op=call.op.name,
            name=call.signature,
            backend=backend,
            dtype=_name(call.dtype),
            error=error,
            **fields,
        )

    def _measure(self, call: Call, backend: str) -> None:
        recorder = Recorder()
        with launching.choosing(recorder), launching.record_launches() as launches:
            ours = call.results(backend)
        if self.problem is not None and self.problem not in map(launching.problem_key, recorder.problems):
            return
        expected = Expected(call)
        wrong = expected.wrong(ours)
        if wrong:
            self._failed(call, backend, wrong)
            return
        if launches:
            moved, operations = sum(launch.bytes() for launch in launches), flops(launches)
        else:
            with CountBytes() as count:
                call.op.dispatched(backend)(*call.op.grouped(call.fresh()))
            moved, operations = count.total, 0
        variants = {backend: call.variant(backend, backend)}
        if backend == "triton" and cuda_support.unsupported() is None and serving.find(
            call.op.folder, call.op.name, "cuda"
        ):  # fmt: skip
            wrong = expected.wrong(call.results("cuda"))
            if wrong:
                self._failed(call, "cuda", wrong)
            else:
                variants["cuda"] = call.variant("cuda", "cuda")
        library = _library(call)
        if library:
            variants["library"] = Variant("library", library)
        samples = harness.interleave(
            list(variants.values()), self.timer, rounds=self.rounds, warmup=2 if self.rounds > 1 else 1
        )
        first = call.args[0]
        for name, times in samples.items():
            self._row(
                call, harness.summarize(times), moved, operations, backend=name,
                variant="product alone" if name == "library" else None,
                ratio=harness.ratio_interval(times, samples[backend], resamples=200).as_dict(),
                shape=list(first.shape) if isinstance(first, Tensor) else None,
                launches=[[launch.name, launch.config.label] for launch in launches] if name == backend else None,
            )  # fmt: skip
        self._candidates(call, backend, recorder, expected, moved, operations)

    def _candidates(
        self, call: Call, backend: str, recorder: Recorder, expected: Expected, moved: int, operations: int
    ) -> None:
        """Write one row per candidate of each problem of the op."""
        for problem, candidates in recorder.problems.items():
            key = launching.problem_key(problem)
            if len(candidates) < 2 or self.problem not in (None, key):
                continue
            about: dict[str, Any] = {"variant": "candidate", "problem": key}
            timed: list[Variant] = []
            for config in candidates:
                pick = forced(problem, config)
                if not self._try(f"{key} {config.label}"):
                    continue
                try:
                    with launching.choosing(pick):
                        wrong = expected.wrong(call.results(backend))
                except Exception as error:
                    self._failed(call, backend, error, config=config.label, **about)
                    continue
                if wrong:
                    self._failed(call, backend, wrong, config=config.label, **about)
                    continue
                timed.append(always(call.variant(config.label, backend), pick))
            if not timed:
                continue
            samples = harness.interleave(timed, self.timer, rounds=max(1, self.rounds // 2), warmup=1)
            for label, times in samples.items():
                self._row(
                    call, harness.summarize(times), moved, operations, backend=backend, config=label,
                    first=label == candidates[0].label, **about,
                )  # fmt: skip

    def _row(
        self, call: Call, summary: harness.Summary, moved: int, operations: int, backend: str, **fields: Any
    ) -> None:
        ceilings = self.settings.ceilings
        known = {key: fields.pop(key) for key in list(fields) if key in harness.ROW_KEYS}
        row = harness.row(
            self.settings.where, summary, op=call.op.name, name=call.signature, backend=backend,
            dtype=_name(call.dtype), memory_format="channels_last", counted_bytes=moved, floor_bytes=moved,
            copy_bytes_per_s=ceilings["copy_bytes_per_s"], matmul_flops_per_s=ceilings["matmul_flops_per_s"],
            flops=operations, bound_s=floor_seconds(ceilings, moved, operations), data="synthetic", **known,
        )  # fmt: skip
        row |= fields | {
            "percent_of_copy": 100 * moved / summary.median / ceilings["copy_bytes_per_s"],
            "percent_of_matmul": 100 * operations / summary.median / ceilings["matmul_flops_per_s"],
        }
        self.settings.journal.append(case=self.case, **{key: value for key, value in row.items() if value is not None})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _library(call: Call) -> Callable[[], Any] | None:
    """Return torch's convolution for the op of a convolution, without the fused parts of ours; None for other ops."""
    convolve, backward = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
    named = call.named()
    if call.op.name not in ("conv_fprop", "conv_bn_add_relu", "conv_dgrad", "conv_wgrad"):
        return None
    geometry = (named["stride"], named["padding"], named["dilation"], False, [0, 0], 1)
    if call.op.name in ("conv_fprop", "conv_bn_add_relu"):
        return lambda: convolve(named["x"], named["weight"], None, *geometry)
    grad = named["grad"]
    if call.op.name == "conv_dgrad":
        size = named["input_size"]
        x = torch.randn(size, device=grad.device, dtype=grad.dtype).to(memory_format=torch.channels_last)
        return lambda: backward(grad, x, named["weight"], None, *geometry, [True, False, False])
    x = named["input"]
    weight = torch.randn(grad.shape[1], x.shape[1], *named["kernel"], device=grad.device, dtype=grad.dtype)
    weight = weight.to(memory_format=torch.channels_last)
    return lambda: backward(grad, x, weight, None, *geometry, [False, True, False])


# --- cases ------------------------------------------------------------------------------------------------------------


def cases(settings: Settings) -> list[Case]:
    """Return the cases of the heaviest problems with their candidates, one problem per case."""
    found = []
    for heavy in heaviest(settings.tiny):
        block = (TINY | blocks.stage_blocks())[heavy.block]
        about = {"name": heavy.block, "block": block, "way": heavy.way, "batch": 2 if settings.tiny else 256}
        found.append(_case(settings, heavy.problem, partial(walk_block, **about), set(), heavy.problem))
    return found


def all_cases(settings: Settings) -> list[Case]:
    """Return the cases of every op and candidate: large batch first, fused convolutions first."""
    seen = {row["name"] for row in settings.journal.lines() if row.get("event") == "measured"}
    chosen: Mapping[str, Any]
    if settings.tiny:
        chosen, ways, batches = TINY, ("library",), (2,)
    else:
        chosen = blocks.select(["resnet50.*"])
        ways, batches = ("fused", "fused min", "library min", "library"), (256, 64)
    found = []
    for batch in batches:
        for way in ways:
            for name, block in chosen.items():
                walk = partial(walk_block, name=name, block=block, way=way, batch=batch)
                found.append(_case(settings, f"{name}, {way}, batch {batch}", walk, seen))
        for way in ("fused", "library"):
            walk = partial(walk_stem, way=way, batch=batch)
            found.append(_case(settings, f"stem, {way}, batch {batch}", walk, seen))
    return found


def _case(settings: Settings, name: str, walk: partial, seen: set[str], problem: str | None = None) -> Case:
    def run() -> None:
        torch.backends.cudnn.benchmark = settings.on_gpu
        walk(settings, Visit(seen, Measure(settings, name, problem)), dtype=settings.dtype)

    return Case(name, run, settings.patience)

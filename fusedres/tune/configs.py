"""Finds the fastest tile sizes for each problem of a block's kernels: every candidate is checked, then timed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import median

import torch

from fusedres import dispatch
from fusedres.dispatch import Way
from fusedres.kernels.triton_core.launch import Config, choosing, problem_key
from fusedres.tune.calls import Call, Recorder, Visit, always, forced
from fusedres.tune.compare import Expected
from fusedres.tune.timing import Timer, Variant, interleave
from fusedres.tune.ways import Bench, faster

_LEAD = 300e-6  # seconds that the GPU waits before the timed work, so that all launches are already in its queue


class Configs:
    """The label of the fastest config for each problem, found by visiting blocks."""

    def __init__(self, device: torch.device, rounds: int, left: Callable[[], float], known: dict[str, str]) -> None:
        self.found = dict(known)
        self.wrong: list[str] = []  # candidates that were left out, and why
        self._timer = Timer(device, lead=_LEAD)
        self._rounds, self._left = rounds, left
        self._measured: set[str] = set()  # keys of problems
        # One for each dtype, as signatures contain only shapes.
        self._visits: defaultdict[str, Visit] = defaultdict(lambda: Visit(set(), self._of_call))

    def visit(self, bench: Bench, ways: Iterable[Way]) -> None:
        """Measure the problems of a block's kernels when it runs in these ways."""
        for way in ways:
            dispatch.install(bench.device, bench.table(way, self.found))
            visit = self._visits[bench.case.dtype]
            try:
                with bench.around(), torch.autograd.set_multithreading_enabled(False), visit:
                    bench.step(bench.fused)
            except Exception as error:
                self.wrong.append(f"{bench.case}, {way}: {self._said(error)}")
            bench.cleanup()

    def _of_call(self, call: Call) -> None:
        if call.op.name == "empty_batch" or self._left() <= 0:
            return
        backend, recorder = call.args[-1], Recorder()
        with choosing(recorder):
            call.results(backend)
        for problem, candidates in recorder.problems.items():
            key = problem_key(problem)
            if len(candidates) < 2 or key in self._measured:
                continue
            self._measured.add(key)
            expected, timed = Expected(call), []
            for config in candidates:
                pick = forced(problem, config)
                with choosing(pick):
                    wrong = self._wrong(call, backend, expected)
                if wrong:
                    self.wrong.append(f"{key}, {config.label}: {wrong}")
                else:
                    timed.append(always(call.variant(config.label, backend), pick))
            if timed:
                self.found[key] = self._fastest(timed, candidates[0])

    def _wrong(self, call: Call, backend: str, expected: Expected) -> str | None:
        try:
            return expected.wrong(call.results(backend))
        except Exception as error:
            return self._said(error)

    def _said(self, error: Exception) -> str:
        """Return an error in one line; raise if the GPU is lost."""
        if self._timer.device.type == "cuda":
            torch.cuda.synchronize()
        return f"{type(error).__name__}: {error}".partition("\n")[0]

    def _fastest(self, timed: list[Variant], first: Config) -> str:
        """Return the label of the fastest config; the first candidate, unless another beats it by more than noise."""
        samples = interleave(timed, self._timer, rounds=self._rounds, warmup=1)
        best = min(samples, key=lambda label: median(samples[label]))
        default = samples.get(first.label)
        return best if default is None or faster(samples[best], default) else first.label

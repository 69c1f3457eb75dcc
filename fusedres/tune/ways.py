"""Finds the fastest way of one block or stem: every way is first checked against eager, then timed beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fusedres import dispatch
from fusedres.autograd import path_counts
from fusedres.backends import use_backend
from fusedres.dispatch import LIBRARY, UNFUSED, Directions, Entry, Shape, Table, Way
from fusedres.dispatch.store import family, versions
from fusedres.modules import FusedBlock
from fusedres.modules.fused_block import plan_of
from fusedres.tune.compare import ExpectedOutput, off_by, wide_output
from fusedres.tune.shapes import FUSED, Subject
from fusedres.tune.timing import Timer, Variant, interleave

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Bounds of ‖fused − eager‖ / ‖eager‖ for gradients; in low precision, rounding flips masks near 0.
BOUNDS = {"float32": 1e-2, "tf32": 0.15, "bfloat16": 0.3, "float16": 0.15, "float64": 1e-7}
# A shape stays unfused if eager's time / that of the fastest way is below this.
SLOWER = 0.98
SLOWER_ON_CPU = 1.0  # CPUs run fused without a table: what a table says there is never slower than eager


@dataclass(frozen=True)
class Case:
    """One measurement: a block or a stem, a batch size, a dtype and a phase."""

    subject: Subject
    batch: int
    dtype: str
    phase: str

    def __str__(self) -> str:
        return f"{self.subject.name} batch {self.batch} {self.dtype} {self.phase}"

    @property
    def shape(self) -> Shape:
        """The key of the case's entry in a table."""
        return Shape._make((*self.subject.shape, dispatch.batch_class(self.batch), self.dtype, self.phase))


def ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """Return the median over rounds of base / other; above 1, `other` is faster."""
    return median(a / b for a, b in zip(base, other, strict=True))


def faster(candidate: Sequence[float], than: Sequence[float]) -> bool:
    """Whether candidate is faster by more than the noise: in at least four of five rounds."""
    ratios = sorted(b / a for a, b in zip(candidate, than, strict=True))
    return ratios[len(ratios) // 5] > 1


def settle(best: Way, eager: Sequence[float], seconds: Sequence[float], slower: float = SLOWER) -> Entry:
    """Return the entry of a shape; best: its fastest way, which took `seconds`; unfused if it is slower than eager.

    slower: the ratio eager / best from which on it is not.
    """
    found = ratio(eager, seconds)
    return Entry(best if found >= slower else UNFUSED, found)


class Bench:
    """One case on a device: the stock module, and the fused one, which follows the installed table."""

    def __init__(self, case: Case, device: torch.device, backend: str) -> None:
        self.case, self.device, self.backend = case, device, backend
        self._output: ExpectedOutput | None = None
        self.train = case.phase == "train"
        dtype = DTYPES[case.dtype]
        self.stock = case.subject.build(device, dtype).train(self.train)
        self.fused = case.subject.build(device, dtype).train(self.train)
        self.fused.__class__ = FUSED[type(self.fused)]
        generator = torch.Generator(device).manual_seed(1)
        size = (case.batch, *case.subject.size)
        x = torch.randn(size, generator=generator, device=device).relu().to(dtype)
        self.x = x.to(memory_format=torch.channels_last).requires_grad_(self.train and not case.subject.is_stem)
        with torch.no_grad(), self._autocast():
            out = self.stock(self.x)
        grad = torch.randn(out.shape, generator=generator, device=device).to(out.dtype)
        self.grad = grad.to(memory_format=torch.channels_last)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context with mixed precision as in training."""
        dtype = DTYPES[self.case.dtype]
        return torch.autocast(self.device.type, dtype) if dtype.itemsize == 2 else contextlib.nullcontext()

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Context in which blocks follow the table, without gradients for inference."""
        with use_backend("auto"), torch.inference_mode(not self.train):
            yield

    def table(self, way: Way, configs: dict[str, str]) -> Table:
        """Return a table that has this way for the case's shape."""
        device = family(self.device)
        assert device is not None
        return Table(device, self.backend, versions(), "", {self.case.shape: Entry(way, None)}, configs)

    def step(self, module: nn.Module) -> None:
        """Run forward, and in training also backward; call it inside `around`."""
        with self._autocast():
            out = module(self.x)
        if self.train:
            out.backward(self.grad)

    def cleanup(self) -> None:
        """Drop the gradients."""
        self.x.grad = None
        for module in (self.stock, self.fused):
            for parameter in module.parameters():
                parameter.grad = None

    def variant(self, name: str, module: nn.Module, table: Table | None) -> Variant:
        """Return a variant that installs the table, if any, and runs a step."""

        def run() -> None:
            if table is not None:
                dispatch.install(self.device, table)
            self.step(module)

        return Variant(name, run, self.cleanup)

    def results(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the output and the gradients."""
        with self.around():
            with self._autocast():
                out = module(self.x)
            found = {"output": out.detach()}
            if self.train:
                out.backward(self.grad)
        grads = {"input": self.x.grad} | {name: p.grad for name, p in module.named_parameters()}
        found |= {f"{name} grad": grad for name, grad in grads.items() if grad is not None}
        self.cleanup()
        return found

    def disagreement(self, table: Table, eager: dict[str, Tensor]) -> str | None:
        """Return what is wrong with the way of a table, or None if it agrees with eager."""
        dispatch.install(self.device, table)
        counted = "stem_forward" if self.case.subject.is_stem else "fused_forward"
        before = path_counts[counted]
        ours = self.results(self.fused)
        if path_counts[counted] == before:
            return "it ran unfused"
        reason = self._expected(eager["output"]).wrong(ours["output"])
        if reason is not None:
            return f"output {reason}"
        bound = BOUNDS[self.case.dtype]
        for what in eager.keys() - {"output"}:
            error = off_by(ours[what], eager[what])
            if not error <= bound:
                return f"{what} is off by {error:.3g} of its norm from eager, allowed {bound:.3g}"
        return None

    def _expected(self, eager: Tensor) -> ExpectedOutput:
        if self._output is None:
            wide = wide_output(self.stock, self.x)
            self._output = ExpectedOutput(eager, wide, DTYPES[self.case.dtype], self.case.dtype == "tf32")
        return self._output

    # --- ways ---------------------------------------------------------------------------------------------------------

    def starts(self) -> list[Way]:
        """Return the way with the library's convolutions, and the one with all of this package's if it has any."""
        found = [Way(self.backend)]
        if self._own():
            every = Directions._make(name in self._products() for name in Directions._fields)
            pixelwise, larger = (every if kernels in self._own() else LIBRARY for kernels in ("pixelwise", "larger"))
            found.append(Way(self.backend, pixelwise, larger))
        return found

    def visits(self) -> list[Way]:
        """Return ways that together run every kernel of this package."""
        last = self.starts()[-1]
        return [*self.starts(), *([last._replace(one_pass=True)] if self._one_pass() else [])]

    def changes(self) -> list[Callable[[Way], Way]]:
        """Return the changes to try: switch one product each, and last, compute statistics before the convolution."""

        def other(kernels: str, product: str) -> Callable[[Way], Way]:
            def change(way: Way) -> Way:
                own: Directions = getattr(way, kernels)
                changed = own._replace(**{product: not getattr(own, product)})
                return way._replace(pixelwise=changed) if kernels == "pixelwise" else way._replace(larger=changed)

            return change

        found = [other(kernels, product) for kernels in self._own() for product in self._products()]
        if self._one_pass():
            found.append(lambda way: way._replace(one_pass=True))
        return found

    def _own(self) -> list[str]:
        """Return the kernel sizes for which this package has its own products."""
        convolutions = [m for m in self.fused.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        if self.backend == "cpu":
            return []
        small = [m.kernel_size == (1, 1) for m in convolutions]
        return (["pixelwise"] if any(small) else []) + (["larger"] if not all(small) else [])

    def _products(self) -> tuple[str, ...]:
        if not self.train:
            return ("fprop",)
        return ("fprop", "wgrad") if self.case.subject.is_stem else Directions._fields

    def _one_pass(self) -> bool:
        if not (self.train and isinstance(self.fused, FusedBlock)):
            return False
        with self._autocast():
            plan, _ = plan_of(self.fused, self.x, self.backend, Way(self.backend, LIBRARY, LIBRARY, True))
        return any(plan.one_pass)


@dataclass
class Found:
    """The result for a case."""

    entry: Entry
    eager_s: float | None
    wrong: list[str]  # the ways that were left out, and why


def fastest(bench: Bench, configs: dict[str, str], timer: Timer, rounds: int, budget: float = float("inf")) -> Found:
    """Find the fastest way: start from the faster of the library's and our convolutions, keep each faster change.

    Args:
        rounds: of each comparison.
        budget: seconds for all comparisons; if they are over, a comparison ends after five rounds.
    """
    eager = bench.results(bench.stock)
    wrong: list[str] = []
    share = budget / (2 + len(bench.changes()))

    def right(way: Way) -> bool:
        try:
            reason = bench.disagreement(bench.table(way, configs), eager)
        except torch.OutOfMemoryError:  # does not mean that the way is wrong
            bench.cleanup()
            raise
        except Exception as error:
            if bench.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the GPU is lost
            bench.cleanup()
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if reason:
            wrong.append(f"{way}: {reason}")
        return reason is None

    def timed(*ways: Way) -> list[list[float]]:
        """Return the samples of eager and of each way."""
        variants = [bench.variant("eager", bench.stock, None)]
        variants += [bench.variant(str(way), bench.fused, bench.table(way, configs)) for way in ways]
        with bench.around():
            return list(interleave(variants, timer, rounds=rounds, budget=share).values())

    starts = [way for way in bench.starts() if right(way)]
    if not starts:
        return Found(Entry(UNFUSED, None), None, wrong)
    _, *samples = timed(*starts)
    best = min(zip(starts, samples, strict=True), key=lambda pair: median(pair[1]))[0]
    for change in bench.changes():
        candidate = change(best)
        if candidate not in starts and right(candidate):
            _, seconds, changed = timed(best, candidate)
            best = candidate if faster(changed, seconds) else best
    at_eager, seconds = timed(best)
    slower = SLOWER_ON_CPU if bench.device.type == "cpu" else SLOWER
    return Found(settle(best, at_eager, seconds, slower), median(at_eager), wrong)

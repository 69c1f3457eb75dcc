"""Time every distinct block of ResNet-18 and ResNet-50, and the stem: eager, each fused way, and rivals.

A case times one block in one phase: eager channels_last, interleaved with the variants of the kind of the case. The
kinds are plain (each way of fuse()), "auto", stock (eager NCHW, the convolutions alone, cuDNN's fused inference),
torch.compile, max-autotune, and CUDA graphs of eager, compiled and fused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import blocks, harness
from common.harness import Variant
from memory_traffic import counting
from memory_traffic.closed_form import PHASES
from memory_traffic.launched import WAYS
from torch import Tensor, nn

import fusedres
from fusedres.kernels.triton_core.launch import choosing
from fusedres.tune.compare import ExpectedOutput, off_by, wide_output
from suite import choices, floors, rivals
from suite.graphs import captured
from suite.precision import PRECISIONS, Precision
from suite.settings import DIED, Case, Settings, first_lines
from suite.timed_block import BASE, BOUND, OPS, Bench, BlockCase, BlockSettings

# The largest ‖fused − eager‖ / ‖eager‖ of gradients, and of the output of a rival. They are large in half precision, as
# a pre-activation near 0 may get either sign.
BOUNDS = {torch.bfloat16: 0.3, torch.float16: 0.15, torch.float32: 1e-2}
TF32_BOUND = 0.15
COMPILED = {"compile": None, "compile max-autotune": "max-autotune-no-cudagraphs"}
GRAPHED = "graphed "
AUTO = "auto"  # fuse() with default arguments, which follows a table of measured choices
OURS = {AUTO: {"conv": "auto", "memory": "auto"}} | {way: arguments for way, (arguments, *_) in WAYS.items()}
COUNTED = (BASE, BOUND, "eager_nchw", "cudnn", *OURS)  # torch.compile would trace the counting, and graphs hide from it


def ways(settings: Settings) -> dict[str, str]:
    """Return way of fuse() → backend."""
    return dict.fromkeys(WAYS, "triton") if settings.on_gpu else {"library": "cpu", "fused min": "triton"}


def variants(settings: Settings, kind: str, phase: str) -> list[str]:
    """Return the variants of a kind, which are compared with eager; our ways are in every kind."""
    ours = list(ways(settings))
    if kind == AUTO:
        return [AUTO]
    if kind == "stock":
        return ["eager_nchw", *(["cudnn"] if phase == "infer" else []), *ours[-2:], BOUND]
    if kind == "compile":
        return ["compile", *ours]
    if kind == "max-autotune":
        return ["compile max-autotune", GRAPHED + "compile max-autotune", *ours[-2:], *(GRAPHED + w for w in ours[-2:])]
    if kind == "graphs":
        return [GRAPHED + BASE, GRAPHED + "compile", *(GRAPHED + way for way in ours)]
    return [way for way in ours if way != "library min"]


def cases(settings: Settings) -> list[Case]:
    """Return the cases of each way of each block, the large batch first."""
    chosen, batches, usual = _usual(settings)
    return [case for batch in batches for phase in PHASES for case in _cases(settings, chosen, batch, phase, "", usual)]


def all_cases(settings: Settings) -> list[Case]:
    """Return the cases of the other kinds: stock, compiled, in graphs, tuned; other dtypes last."""
    chosen, batches, usual = _usual(settings)
    some = dict(list(chosen.items())[:4])
    found = []
    for kind, of_toy in {"stock": "infer", "compile": "train", "graphs": "infer", "max-autotune": "train"}.items():
        for phase in (of_toy,) if settings.tiny else PHASES:
            found += _cases(settings, some if kind == "max-autotune" else chosen, batches[0], phase, kind, usual)
    others = (PRECISIONS["tf32"],) if settings.tiny else tuple(p for p in PRECISIONS.values() if p is not usual)
    for precision in others:
        for phase in PHASES[: 1 if settings.tiny else None]:
            found += _cases(settings, dict(list(chosen.items())[:6]), batches[-1], phase, "", precision)
    return found


def auto_cases(settings: Settings) -> list[Case]:
    """Return the cases of "auto" against eager."""
    chosen, batches, usual = _usual(settings)
    return [case for phase in PHASES for case in _cases(settings, chosen, batches[0], phase, AUTO, usual)]


def _cases(
    settings: Settings, chosen: dict[str, Any], batch: int, phase: str, kind: str, precision: Precision
) -> list[Case]:
    limit = 120 if kind in ("compile", "graphs", "max-autotune") else settings.patience
    unusual = "" if precision is _usual(settings)[2] else precision.name
    found = []
    for name, block in chosen.items():
        case = " ".join(filter(None, (name, phase, f"batch {batch}", kind, unusual)))
        measurement = partial(_Measurement, settings, case, BlockCase(name, block, batch, phase), kind, precision)
        found.append(Case(case, lambda made=measurement: made().measure(), limit))
    return found


def _usual(settings: Settings) -> tuple[dict[str, Any], tuple[int, ...], Precision]:
    """Return the blocks, the most frequent ones first; the batches; the precision."""
    if settings.tiny:
        return blocks.select(["tiny.bottleneck"]), (2,), PRECISIONS["float32"]
    chosen = dict(sorted(blocks.select(["all"]).items(), key=_by_interest))
    return chosen, (256, 64, 16), PRECISIONS["bfloat16"]


def _by_interest(item: tuple[str, Any]) -> tuple[bool, bool]:
    """Sort key: identity blocks of ResNet-50 first, as most of its blocks are."""
    name, block = item
    return not name.startswith("resnet50"), block.shortcut != "identity"


def _gradients(module: nn.Module, source: Tensor) -> dict[str, Tensor]:
    """Return copies of the gradients of the input and of the parameters."""
    named = {f"{name.removeprefix('_orig_mod.')} grad": p.grad for name, p in module.named_parameters()}
    return {name: grad.clone() for name, grad in ({"input grad": source.grad} | named).items() if grad is not None}


class Skip(Exception):  # noqa: N818 - no error
    """The reason why a variant cannot run."""


@dataclass
class _Measurement:
    """One case: makes its variants, checks them against eager, counts and times them."""

    settings: Settings
    name: str
    case: BlockCase
    kind: str
    precision: Precision
    backend_of: dict[str, str] = field(default_factory=dict)
    pool: Any = None  # memory pool of the graphs

    def measure(self) -> None:
        """Write one row per variant, also for variants that were skipped or failed."""
        torch.backends.cudnn.benchmark = self.settings.on_gpu
        torch.compiler.reset()  # otherwise the second shape is compiled for all shapes, and the ninth not at all
        train = self.case.phase == "train"
        picked = choices.table(self.settings)
        if self.kind == AUTO:
            picked = None  # the table of "auto" has the configs
            choices.follow(self.settings)
        self.pool = torch.cuda.graph_pool_handle() if self.settings.on_gpu else None
        with self.precision.switched(), choosing(picked):
            self.around = BlockSettings(self.settings.device, self.precision.dtype)
            self.bench = Bench(self.case, self.around)
            self.reference = self._results(copy.deepcopy(self.bench.stock), self.bench.x, self.bench.grad)
            wide = wide_output(self.bench.stock, self.bench.x)
            tf32 = bool(self.precision.tf32)
            self.expected = ExpectedOutput(self.reference["output"], wide, self.precision.dtype, tf32)
            made: dict[str, Variant] = {BASE: self._step(BASE, self.bench.stock, self.bench.x, self.bench.grad)[0]}
            poison = self.settings.journal.poison()
            for variant in variants(self.settings, self.kind, self.case.phase):
                what = f"{self.name}, {variant}"
                if what in poison:
                    self._told(variant, error=DIED)
                    continue
                self.settings.journal.append(case=self.name, event="trying", what=what)
                try:
                    made[variant] = self._made(variant)
                except Skip as why:
                    self._told(variant, skipped=str(why))
                except Exception as error:
                    if self.settings.on_gpu:
                        torch.cuda.synchronize()  # raises if the GPU is lost
                    self._told(variant, error=f"{type(error).__name__}: {first_lines(str(error))}")
            self.settings.journal.append(case=self.name, event="trying", what=f"{self.name}, timing")
            del self.reference, self.expected, wide
            rounds = 12 if self.settings.on_gpu else 1
            timer = harness.Timer(self.settings.device)
            with torch.inference_mode(not train):
                for variant in made.values():
                    self._count(variant)
                self.case.samples = harness.interleave(
                    list(made.values()), timer, rounds=rounds, at_least=3, budget=10, warmup=1
                )
        for row in self._rows(picked is not None):
            self.settings.journal.append(case=self.name, **row)

    def _told(self, variant: str, **what: Any) -> None:
        case, block = self.case, self.case.block
        self.settings.row(
            self.name, op=OPS[block.kind], name=case.name, variant=variant, phase=case.phase, kind=self.kind or "plain",
            shape=[case.batch, block.in_channels, block.size, block.size], **self.precision.about, **what,
        )  # fmt: skip

    def _made(self, variant: str) -> Variant:
        """Return a variant that can be timed, after a check that its results are those of eager."""
        if variant == BOUND:
            alone = blocks.ConvolutionsOnly(self.bench.stock, self.case.block, self.case.batch, self.bench.x)
            run = alone.train if self.bench.train else alone.infer
            return Variant(BOUND, self.bench.around(run), alone.cleanup)
        graphed, way = variant.startswith(GRAPHED), variant.removeprefix(GRAPHED)
        if graphed and not self.settings.on_gpu:
            raise Skip("no GPU")
        module, x, grad = self._module(way), self.bench.x, self.bench.grad
        if way == "eager_nchw":
            x, grad = x.contiguous(), grad.contiguous()
        backend = ways(self.settings).get(way)
        if backend is not None:
            self.backend_of[variant] = backend
            with fusedres.use_backend(backend):
                reasons = [entry.reason for entry in fusedres.report(module) if not entry.fused]
            if reasons:
                raise RuntimeError(f"unfused: {reasons[0]}")
        with fusedres.use_backend(backend or "auto"):
            found = self._results(module, x, grad)
        self._agree(found, way in OURS)
        step, source = self._step(variant, module, x, grad)
        return self._captured(step, module, source, way in OURS) if graphed else step

    def _module(self, way: str) -> nn.Module:
        stock = copy.deepcopy(self.bench.stock)
        if way == "eager_nchw":
            return stock.to(memory_format=torch.contiguous_format)
        if way in OURS:
            module = fusedres.fuse(stock, **OURS[way])
            if way in WAYS and isinstance(module, blocks.StemOnly):
                module.model.fused_conv = OURS[way]["conv"]  # fuse() leaves the choice to measured tables
            return module
        if way in COMPILED:
            if not self.settings.on_gpu:
                return torch.compile(stock, backend="eager")
            return torch.compile(stock, mode=COMPILED[way])
        if way == "cudnn":
            made = rivals.cudnn(stock, self.bench.x)
            if isinstance(made, str):
                raise Skip(made)
            return made
        return stock

    def _results(self, module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
        """Return the output, and in training the gradients, under the same conditions as in timing."""
        source = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(self.bench.input_grad)
        with torch.inference_mode(not self.bench.train), self.around.autocast():
            out = module(source)
        found = {"output": out.detach()}
        if self.bench.train:
            out.backward(grad)
            found |= _gradients(module, source)
            module.zero_grad(set_to_none=True)
        return found

    def _agree(self, found: dict[str, Tensor], ours: bool) -> None:
        if ours and "output" in found:
            reason = self.expected.wrong(found["output"])
            if reason is not None:
                raise ArithmeticError(f"output {reason}")
        bound = TF32_BOUND if self.precision.tf32 else BOUNDS[self.precision.dtype]
        for what in self.reference.keys() & found.keys():
            error = off_by(found[what], self.reference[what])
            if not error <= bound:
                raise ArithmeticError(f"{what} is off by {error:.3g} of its norm from eager, allowed {bound:.3g}")

    def _step(self, name: str, module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Variant, Tensor]:
        """Return the variant and its input."""
        source = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(self.bench.input_grad)
        variant = self.bench.variant(name, module, source, grad)
        if self.bench.train and name in (BASE, "eager_nchw", *OURS):
            leave_out = [source, *module.parameters(), *module.buffers()]
            with self._on(name), self.around.autocast():
                self.case.saved[name] = harness.saved_bytes(partial(module, source), leave_out)
        return Variant(name, self._under(name, variant.run), variant.cleanup), source

    def _on(self, name: str) -> Any:
        return fusedres.use_backend(self.backend_of.get(name, "auto"))

    def _under(self, name: str, run: Callable[[], Any]) -> Callable[[], Any]:
        if name not in self.backend_of:
            return run

        def chosen() -> Any:
            with self._on(name):
                return run()

        return chosen

    def _captured(self, step: Variant, module: nn.Module, source: Tensor, ours: bool) -> Variant:
        """Return the replay of a step, after a check; each replay writes the same gradients."""

        def whole() -> Any:
            if step.cleanup:
                step.cleanup()
            return step.run()

        with torch.inference_mode(not self.bench.train):
            replay, kept = captured(whole, self.pool)
            replay()
        self._agree(_gradients(module, source) if self.bench.train else {"output": kept}, ours)
        return Variant(step.name, replay)

    def _count(self, variant: Variant) -> None:
        case, cleanup = self.case, variant.cleanup or (lambda: None)
        variant.run()  # compiles, picks algorithms
        cleanup()
        if variant.name.startswith(GRAPHED):  # its memory is allocated before it runs
            return
        if variant.name in COUNTED:
            with counting.CountRun() as count:
                variant.run()
            cleanup()
            case.counted[variant.name] = count.total
        case.peak[variant.name] = harness.peak_bytes(variant.run, self.settings.device)
        cleanup()

    def _rows(self, picked: bool) -> list[dict[str, Any]]:
        """Return one row per variant."""
        case, block = self.case, self.case.block
        ceilings = self.settings.ceilings_of(self.precision)
        floor = floors.of_block(block, case.phase, case.batch, self.precision.dtype.itemsize, ceilings)
        found = []
        for variant, samples in case.samples.items():
            way = variant.removeprefix(GRAPHED)
            arguments = OURS.get(way, {})
            row = harness.row(
                self.settings.where, harness.summarize(samples), op=OPS[block.kind], name=case.name, variant=variant,
                backend=self.backend_of.get(variant), conv=arguments.get("conv"), memory=arguments.get("memory"),
                shape=[case.batch, block.in_channels, block.size, block.size],
                geometry={"planes": block.planes, "stride": block.stride, "shortcut": block.shortcut},
                phase=case.phase, memory_format="contiguous" if variant == "eager_nchw" else "channels_last",
                ratio=harness.ratio_interval(case.samples[BASE], samples, resamples=500).as_dict(),
                peak_bytes=case.peak.get(variant), saved_bytes=case.saved.get(variant),
                counted_bytes=case.counted.get(variant), floor_bytes=floor.bytes, flops=floor.flops,
                bound_s=floor.seconds, data="synthetic", **ceilings, **self.precision.about,
            )  # fmt: skip
            found.append(row | {"kind": self.kind or "plain", "measured_configs": picked or self.kind == AUTO})
        return found

"""ResNet-18 and ResNet-50 whole: a training step with SGD, and inference, on random images that are on the device.

Rivals run interleaved in one process. A training step is zero_grad, forward, cross entropy, backward and a fused SGD
with momentum; images/s follow from it. Whoever differs from eager is not timed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import counting
import harness
import torch
import torchvision
from harness import Variant
from launched import WAYS
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres.kernels.launch import choosing
from suite import choices, floors, rivals
from suite.block_rows import COMPILED, GRAPHED, Skip
from suite.graphs import captured
from suite.precision import PRECISIONS, Precision
from suite.settings import Case, Settings, first_lines, off_by

# ‖fused − eager‖ / ‖eager‖ of the scores: rounding through up to 50 layers.
BOUNDS = {"bfloat16": 0.15, "float16": 0.05, "tf32": 0.05, "float32": 1e-2}
COUNTED = ("eager", "eager_nchw", *WAYS)


@dataclass(frozen=True)
class Work:
    """A model in one phase, on images of one size."""

    model: str
    phase: str
    batch: int
    precision: Precision
    size: int = 224
    classes: int = 1000

    @property
    def train(self) -> bool:
        return self.phase == "train"

    @property
    def about(self) -> dict[str, Any]:
        """Its fields of a row."""
        shape = [self.batch, 3, self.size, self.size]
        return {"op": "model", "name": self.model, "phase": self.phase, "shape": shape} | self.precision.about


def cases(settings: Settings) -> list[Case]:
    """What the goals speak of first; graphs and torch.compile, which take long, then other dtypes."""
    torch.backends.cudnn.benchmark = settings.on_gpu
    usual = PRECISIONS["bfloat16" if settings.on_gpu else "float32"]
    if settings.tiny:
        todo = [Work("tiny", phase, 2, usual, 32, 10) for phase in ("train", "infer")]
    else:
        order = [("resnet50", "train", 256), ("resnet18", "train", 256), ("resnet50", "infer", 256)]
        every = [(m, p, b) for b in (256, 64, 16) for m in ("resnet50", "resnet18") for p in ("train", "infer")]
        todo = [Work(*each, usual) for each in order + [each for each in every if each not in order]]
    ours = ["library"] if settings.tiny else list(WAYS)  # the CPU has no convolutions of its own
    best = ours[-2:]
    graphed = [GRAPHED + way for way in best]
    kinds = {
        "": (["eager_nchw", *ours], 60, todo),
        "compile": (["compile", *best], 150, todo),
        "graphs": ([GRAPHED + "eager", GRAPHED + "compile", *graphed], 150, todo),
        "max-autotune": (["compile max-autotune", GRAPHED + "compile max-autotune", *best, *graphed], 250, todo[:4]),
        "tensorrt": (["tensorrt", *best], 250, [work for work in todo if work.phase == "infer"][:2]),
    }
    if settings.tiny:  # max-autotune goes the way of compile
        kinds = {kind: (names, limit, todo[:2] if not kind else todo[-1:]) for kind, (names, limit, _) in kinds.items()}
        del kinds["max-autotune"]
    found = []
    for kind, (names, limit, wanted) in kinds.items():
        for work in wanted:
            found.append(_case(settings, work, kind, names, limit))
    if settings.on_gpu:
        ahead = [f"{work.model} {work.phase} batch 256" for work in todo[:4]]
        first = [case for name in ahead for case in (name, f"{name} compile")]
        first.insert(2, f"{ahead[0]} graphs")
        found.sort(key=lambda case: first.index(case.name) if case.name in first else len(first))
        for precision in PRECISIONS.values():
            for phase in ("train", "infer") if precision is not usual else ():
                found.append(_case(settings, Work("resnet50", phase, 64, precision), "", ["eager_nchw", *ours], 60))
    return found


def _case(settings: Settings, work: Work, kind: str, names: list[str], limit: float) -> Case:
    usual = work.precision.dtype == settings.dtype
    words = [work.model, work.phase, f"batch {work.batch}", kind, "" if usual else work.precision.name]
    case = " ".join(filter(None, words))
    return Case(case, lambda: measure(settings, case, work, names, 10 if settings.on_gpu else 1, 12, kind), limit)


def build(settings: Settings, work: Work) -> nn.Module:
    """With weights from one seed."""
    torch.manual_seed(0)
    if work.model == "tiny":
        model: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=work.classes)
    else:
        model = getattr(torchvision.models, work.model)(num_classes=work.classes)
    return model.to(settings.device, memory_format=torch.channels_last).train(work.train)


def random_batch(settings: Settings, work: Work) -> tuple[Tensor, Tensor]:
    """Images in channels_last, and labels."""
    images = torch.randn(work.batch, 3, work.size, work.size, device=settings.device)
    labels = torch.randint(work.classes, (work.batch,), device=settings.device)
    return images.to(memory_format=torch.channels_last), labels


class Run:
    """One variant of one model: a step to be timed."""

    def __init__(
        self,
        settings: Settings,
        work: Work,
        variant: str,
        stock: nn.Module,
        images: Tensor,
        labels: Tensor,
    ):
        self.settings, self.work, self.labels = settings, work, labels
        self.graphed, way = variant.startswith(GRAPHED), variant.removeprefix(GRAPHED)
        self.backend = ("triton" if settings.on_gpu else "cpu") if way in WAYS else "auto"
        model = copy.deepcopy(stock)
        if way == "eager_nchw":
            model, images = model.to(memory_format=torch.contiguous_format), images.contiguous()
        if way in WAYS:
            model = fusedres.fuse(model, **WAYS[way][0])
        self.images = images
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=settings.on_gpu)
        if way in COMPILED:
            how = {"mode": COMPILED[way]} if settings.on_gpu else {"backend": "eager"}
            model = torch.compile(model, **how)
        if way == "tensorrt":
            made = rivals.tensorrt(model, images.to(work.precision.dtype), work.train)
            if isinstance(made, str):
                raise Skip(made)
            model, self.images = made, images.to(work.precision.dtype)
        self.model = model

    def scores(self) -> Tensor:
        """Forward."""
        mixed: Any = contextlib.nullcontext()
        dtype = self.work.precision.dtype
        if dtype in (torch.bfloat16, torch.float16):  # what is cached belongs to no graph
            mixed = torch.autocast(self.settings.device.type, dtype, cache_enabled=not self.graphed)
        with fusedres.use_backend(self.backend), mixed:
            return self.model(self.images)

    def step(self) -> Tensor:
        """One iteration."""
        if not self.work.train:
            with torch.inference_mode():
                return self.scores()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.scores().float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def saved_bytes(self) -> int:
        """What forward keeps for backward."""
        known = [self.images, *self.model.parameters(), *self.model.buffers()]
        return harness.saved_bytes(self.scores, known)

    def prepared(self, pool: Any) -> Callable[[], Any]:
        """The step, or the replay of its graph."""
        if not self.graphed:
            return self.step
        replay, self.kept = captured(self.step, pool)
        return replay


def measure(
    settings: Settings, case: str, work: Work, names: list[str], rounds: int, budget: float, kind: str = ""
) -> None:
    """Times eager and the variants called `names`; a row for each. After `budget` seconds three rounds are enough."""
    torch.compiler.reset()  # or a second shape would be compiled for any shape, and a ninth not at all
    images, labels = random_batch(settings, work)
    stock = build(settings, work)
    picked = choices.table(settings)
    runs: dict[str, Run] = {}
    steps: dict[str, Callable[[], Any]] = {}
    counts: dict[str, dict[str, int | None]] = {}
    with choosing(picked), work.precision.switched():
        with torch.no_grad():
            reference = Run(settings, work, "eager", stock, images, labels).scores()
        pool = torch.cuda.graph_pool_handle() if settings.on_gpu else None
        for variant in ("eager", *names):
            try:
                if variant.startswith(GRAPHED) and not settings.on_gpu:
                    raise Skip("no GPU")
                run = Run(settings, work, variant, stock, images, labels)
                with torch.inference_mode(not work.train):  # as it will be timed, or it would be compiled again
                    _agree(run.scores().detach(), reference, work)
                steps[variant], runs[variant] = run.prepared(pool), run
                steps[variant]()
                if run.graphed and not work.train:
                    _agree(run.kept, reference, work)
            except Skip as why:
                settings.row(case, **work.about, variant=variant, kind=kind or "plain", skipped=str(why))
            except Exception as error:
                steps.pop(variant, None)
                if settings.on_gpu:
                    torch.cuda.synchronize()  # raises where the GPU is lost
                what = f"{type(error).__name__}: {first_lines(str(error))}"
                settings.row(case, **work.about, variant=variant, kind=kind or "plain", error=what)
        for variant, step in steps.items():
            gc.collect()
            counts[variant] = _counted(settings, runs[variant], variant, step)
        timer = harness.Timer(settings.device)
        cost = min(timer.once(Variant("eager", steps["eager"])) for _ in range(2))
        repeats = max(1, min(20, round(0.05 / cost))) if settings.on_gpu else 1
        variants = [Variant(variant, _repeated(step, repeats)) for variant, step in steps.items()]
        samples = harness.interleave(variants, timer, rounds=rounds, at_least=min(3, rounds), budget=budget, warmup=1)
    ceilings = settings.ceilings_of(work.precision)
    floor = floors.of_model(work.model, work.phase, work.batch, work.precision.dtype.itemsize, ceilings, work.size)
    bound = {"floor_bytes": floor.bytes, "flops": floor.flops, "bound_s": floor.seconds} if floor else {}
    for variant, times in samples.items():
        way = variant.removeprefix(GRAPHED)
        arguments = WAYS[way][0] if way in WAYS else {}
        summary = harness.summarize([sample / repeats for sample in times])
        row = harness.row(
            settings.where, summary, **work.about, variant=variant,
            backend=runs[variant].backend if way in WAYS else None,
            conv=arguments.get("conv"), memory=arguments.get("memory"), data="synthetic",
            memory_format="contiguous" if way == "eager_nchw" else "channels_last",
            ratio=harness.ratio_interval(samples["eager"], times, resamples=500).as_dict(),
            images_per_s=work.batch / summary.median, **counts[variant], **ceilings, **bound,
        )  # fmt: skip
        settings.journal.append(case=case, **row, kind=kind or "plain", measured_configs=picked is not None)


def _agree(scores: Tensor, reference: Tensor, work: Work) -> None:
    error = off_by(scores, reference)
    if not error <= BOUNDS[work.precision.name]:
        raise ArithmeticError(f"scores are off by {error:.3g} of eager's norm")


def _counted(settings: Settings, run: Run, variant: str, step: Callable[[], Any]) -> dict[str, int | None]:
    """Memory and bytes of a step; of a graph none, whose memory is there before it runs."""
    found: dict[str, int | None] = {}
    if variant.startswith(GRAPHED):
        return found
    found["peak_bytes"] = harness.peak_bytes(step, settings.device)
    if variant in COUNTED:  # others would trace the counting
        with counting.CountRun() as count:
            step()
        found["counted_bytes"] = count.total
        if run.work.train:
            found["saved_bytes"] = run.saved_bytes()
    return found


def _repeated(step: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run

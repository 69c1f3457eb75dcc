"""Time whole models, ResNets, DenseNets and YOLO11n: a training step with SGD, and inference.

The images are random and already on the device. All variants run interleaved in one process. A training step is
zero_grad, forward, cross entropy, backward and a fused SGD with momentum. A variant that differs from eager is not
timed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from common import harness
from common.harness import Variant
from memory_traffic import counting
from memory_traffic.launched import WAYS
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres.kernels.triton_core.launch import choosing
from fusedres.tune.compare import off_by
from suite import choices, floors
from suite.block_rows import AUTO, COMPILED, GRAPHED, OURS, Skip
from suite.graphs import captured
from suite.precision import PRECISIONS, Precision
from suite.settings import DIED, Case, Settings, first_lines

# The largest ‖fused − eager‖ / ‖eager‖ of the scores: up to 50 layers of rounding.
BOUNDS = {"bfloat16": 0.15, "float16": 0.05, "tf32": 0.05, "float32": 1e-2}
COUNTED = ("eager", "eager_nchw", *OURS)


@dataclass(frozen=True)
class Work:
    """A model in one phase on images of one size."""

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
        """Return the fields of a row."""
        shape = [self.batch, 3, self.size, self.size]
        return {"op": "model", "name": self.model, "phase": self.phase, "shape": shape} | self.precision.about


def first_cases(settings: Settings) -> list[Case]:
    """Return the cases of a training step of ResNet-50: each way, then compiled, then in graphs."""
    work, ours = works(settings)[0], _ours(settings)
    kinds = {
        "": [way for way in ours if way != "library min"],
        "compile": ["compile", *ours[-2:]],
        "graphs": [GRAPHED + "compile", GRAPHED + ours[-1]],
    }
    return [_case(settings, work, kind, names, 60) for kind, names in kinds.items()]


def cases(settings: Settings) -> list[Case]:
    """Return training and inference at batch 256 of ResNet-50, then ResNet-18; "auto" follows what was measured."""
    ours = [*_ours(settings), AUTO]
    best = ours[-2:]
    kinds = {
        "": ours,
        "compile": ["compile", *best],
        "graphs": [GRAPHED + "eager", GRAPHED + "compile", *(GRAPHED + way for way in best)],
    }
    all_works = works(settings)
    order = [(work, kind) for model in (all_works[:2], all_works[2:]) for kind in kinds for work in model]
    if settings.tiny:
        order = [(all_works[0], ""), (all_works[1], ""), (all_works[0], "compile"), (all_works[1], "graphs")]
    return [_case(settings, work, kind, kinds[kind], 60) for work, kind in order]


def all_cases(settings: Settings) -> list[Case]:
    """Return the cases of every batch, of NCHW, max-autotune and other dtypes."""
    ours, all_works = _ours(settings), works(settings)
    tuned = [
        "compile max-autotune",
        GRAPHED + "compile max-autotune",
        *ours[-2:],
        *(GRAPHED + way for way in ours[-2:]),
    ]
    batches = (2,) if settings.tiny else (256, 64, 16)
    found = [
        _case(settings, replace(work, batch=batch), "nchw", ["eager_nchw", *ours], 90)
        for batch in batches
        for work in all_works
    ]
    found += [_case(settings, work, "max-autotune", tuned, 300) for work in all_works[: 1 if settings.tiny else None]]
    for precision in PRECISIONS.values():
        for work in all_works if precision is not all_works[0].precision and not settings.tiny else ():
            found.append(_case(settings, replace(work, batch=64, precision=precision), "", ours, 90))
    return found


def works(settings: Settings) -> list[Work]:
    """Return training and inference of the models."""
    if settings.tiny:
        return [Work("tiny", phase, 2, PRECISIONS["float32"], 32, 10) for phase in ("train", "infer")]
    usual = PRECISIONS["bfloat16" if settings.on_gpu else "float32"]
    return [Work(model, phase, 256, usual) for model in ("resnet50", "resnet18") for phase in ("train", "infer")]


def _ours(settings: Settings) -> list[str]:
    """Return the ways of fuse(); of toy shapes only library."""
    return ["library"] if settings.tiny else list(WAYS)


def compile_ahead(settings: Settings, work: Work) -> None:
    """Fill the cache of torch.compile with what `measure` will compile."""
    torch.backends.cudnn.benchmark = settings.on_gpu
    torch.compiler.reset()
    images, labels = random_batch(settings, work)
    with work.precision.switched():
        run = Run(settings, work, "compile", build(settings, work), images, labels)
        with torch.inference_mode(not work.train):
            run.scores()
        run.step()


def _case(settings: Settings, work: Work, kind: str, names: list[str], limit: float) -> Case:
    usual = work.precision.dtype == settings.dtype
    words = [work.model, work.phase, f"batch {work.batch}", kind, "" if usual else work.precision.name]
    case = " ".join(filter(None, words))
    rounds = 8 if settings.on_gpu else 1
    return Case(case, lambda: measure(settings, case, work, names, rounds, 10, kind), limit)


def build(settings: Settings, work: Work) -> nn.Module:
    """Return the model with weights from a fixed seed."""
    torch.manual_seed(0)
    if work.model == "tiny":
        model: nn.Module = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=work.classes)
    elif work.model == "yolo11n":
        model = Detector(work.classes)
    else:
        model = getattr(torchvision.models, work.model)(num_classes=work.classes)
    return model.to(settings.device, memory_format=torch.channels_last).train(work.train)


class Detector(nn.Module):
    """YOLO11n, and as its scores averages of everything that it returns in training mode."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from ultralytics.nn.tasks import DetectionModel

        self.detection, self.classes = DetectionModel("yolo11n.yaml", verbose=False), classes

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (N, classes)."""
        found = torch.cat([out.flatten(1) for out in _tensors(self.detection(x))], 1)
        return F.adaptive_avg_pool1d(found, self.classes)


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for each in found.values() if isinstance(found, dict) else found:
            yield from _tensors(each)


def random_batch(settings: Settings, work: Work) -> tuple[Tensor, Tensor]:
    """Return images in channels_last, and labels."""
    images = torch.randn(work.batch, 3, work.size, work.size, device=settings.device)
    labels = torch.randint(work.classes, (work.batch,), device=settings.device)
    return images.to(memory_format=torch.channels_last), labels


class Run:
    """One variant of one model with a step that can be timed."""

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
        if way in OURS:
            model = fusedres.fuse(model, **OURS[way])
        self.images = images
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=settings.on_gpu)
        if way in COMPILED:
            how = {"mode": COMPILED[way]} if settings.on_gpu else {"backend": "eager"}
            model = torch.compile(model, **how)
        self.model = model

    def scores(self) -> Tensor:
        """Run forward."""
        mixed: Any = contextlib.nullcontext()
        dtype = self.work.precision.dtype
        if dtype in (torch.bfloat16, torch.float16):  # the cache of autocast must not be part of a graph
            mixed = torch.autocast(self.settings.device.type, dtype, cache_enabled=not self.graphed)
        with fusedres.use_backend(self.backend), mixed:
            return self.model(self.images)

    def step(self) -> Tensor:
        """Run one training step, or inference."""
        if not self.work.train:
            with torch.inference_mode():
                return self.scores()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.scores().float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def saved_bytes(self) -> int:
        """Return the bytes that forward saves for backward."""
        known = [self.images, *self.model.parameters(), *self.model.buffers()]
        return harness.saved_bytes(self.scores, known)

    def prepared(self, pool: Any) -> Callable[[], Any]:
        """Return the step, or the replay of its graph."""
        if not self.graphed:
            return self.step
        replay, self.kept = captured(self.step, pool)
        return replay


def measure(
    settings: Settings, case: str, work: Work, names: list[str], rounds: int, budget: float, kind: str = ""
) -> None:
    """Time eager and the variants `names`; write one row for each. After `budget` seconds three rounds are enough."""
    torch.backends.cudnn.benchmark = settings.on_gpu
    torch.compiler.reset()  # otherwise the second shape is compiled for all shapes, and the ninth not at all
    images, labels = random_batch(settings, work)
    stock = build(settings, work)
    picked = choices.table(settings)
    choices.follow(settings)
    poison = settings.journal.poison()
    runs: dict[str, Run] = {}
    steps: dict[str, Callable[[], Any]] = {}
    counts: dict[str, dict[str, int | None]] = {}
    with choosing(picked), work.precision.switched():
        with torch.no_grad():
            reference = Run(settings, work, "eager", stock, images, labels).scores()
        pool = torch.cuda.graph_pool_handle() if settings.on_gpu else None
        for variant in ("eager", *names):
            what = f"{case}, {variant}"
            if what in poison:
                settings.row(case, **work.about, variant=variant, kind=kind or "plain", error=DIED)
                continue
            settings.journal.append(case=case, event="trying", what=what)
            try:
                if variant.startswith(GRAPHED) and not settings.on_gpu:
                    raise Skip("no GPU")
                run = Run(settings, work, variant, stock, images, labels)
                with torch.inference_mode(not work.train):  # the mode of timing, or it would be compiled again
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
                    torch.cuda.synchronize()  # raises if the GPU is lost
                what = f"{type(error).__name__}: {first_lines(str(error))}"
                settings.row(case, **work.about, variant=variant, kind=kind or "plain", error=what)
        settings.journal.append(case=case, event="trying", what=f"{case}, timing")
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
        arguments = OURS.get(way, {})
        summary = harness.summarize([sample / repeats for sample in times])
        row = harness.row(
            settings.where, summary, **work.about, variant=variant,
            backend=runs[variant].backend if way in OURS else None,
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
    """Return memory and bytes of a step; nothing for a graph, as its memory is allocated before it runs."""
    found: dict[str, int | None] = {}
    if variant.startswith(GRAPHED):
        return found
    found["peak_bytes"] = harness.peak_bytes(step, settings.device)
    if variant in COUNTED:  # torch.compile would trace the counting
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

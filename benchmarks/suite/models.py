"""ResNet-18 and ResNet-50 whole: a training step with SGD, and inference, on random images that are on the device.

Rivals run interleaved in one process. A training step is zero_grad, forward, cross entropy, backward and a fused SGD
with momentum; images/s follow from it. Whoever differs from eager is not timed.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

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
from suite import choices
from suite.settings import Case, Settings, first_lines, off_by

# ‖fused − eager‖ / ‖eager‖ of the scores: rounding through up to 50 layers.
BOUNDS = {torch.bfloat16: 0.15, torch.float32: 1e-2}
COMPILED = {"compile": None, "compile max-autotune": "max-autotune-no-cudagraphs"}


def cases(settings: Settings) -> list[Case]:
    """Model, phase and batch, what matters most first; graphs, then torch.compile, whose compilation takes long."""
    torch.backends.cudnn.benchmark = settings.on_gpu
    if settings.tiny:
        todo = [("tiny", phase, 2) for phase in ("train", "infer")]
    else:
        order = [("resnet50", "train", 256), ("resnet50", "infer", 256), ("resnet18", "train", 256)]
        every = [(m, p, b) for b in (64, 16, 256) for m in ("resnet50", "resnet18") for p in ("train", "infer")]
        todo = order + [each for each in every if each not in order]
    found = []
    fused = ["library"] if settings.tiny else list(WAYS)  # the CPU has no convolutions of its own
    for kind, names, limit in (
        ("", ["eager_nchw", *fused], 60),
        (" compile", ["compile", *fused[-2:]], 150),
        (" graphs", ["graphed eager", *(f"graphed {way}" for way in fused[-2:])], 60),
        (" max-autotune", ["compile max-autotune", *fused[-2:]], 200),
    ):
        wanted = todo[:3] if kind == " max-autotune" else todo
        if settings.tiny and kind:  # max-autotune goes the way of compile
            wanted = todo[:1] if kind != " max-autotune" else []
        for model, phase, batch in wanted:
            case = f"{model} {phase} batch {batch}{kind}"
            found.append(
                Case(case, lambda c=case, m=model, p=phase, b=batch, n=names: _measure(settings, c, m, p, b, n), limit)
            )
    if settings.on_gpu:  # of the costly ones the most telling right behind the first
        ahead = [f"resnet50 train batch 256{kind}" for kind in ("", " compile", " graphs")]
        found.sort(key=lambda case: ahead.index(case.name) if case.name in ahead else len(ahead))
    return found


def build(settings: Settings, name: str) -> nn.Module:
    """With weights from one seed."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10) if name == "tiny" else getattr(torchvision.models, name)()
    return model.to(settings.device, memory_format=torch.channels_last)


class _Run:
    """One variant of one model: a step to be timed."""

    def __init__(self, settings: Settings, variant: str, stock: nn.Module, images: Tensor, labels: Tensor, train: bool):
        self.settings, self.labels, self.train = settings, labels, train
        way = variant.removeprefix("graphed ")
        self.backend = ("triton" if settings.on_gpu else "cpu") if way in WAYS else "auto"
        model = copy.deepcopy(stock).train(train)
        if way == "eager_nchw":
            model, images = model.to(memory_format=torch.contiguous_format), images.contiguous()
        if way in WAYS:
            model = fusedres.fuse(model, **WAYS[way][0])
        self.images = images
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=settings.on_gpu)
        if way in COMPILED:
            model = (
                torch.compile(model, mode=COMPILED[way]) if settings.on_gpu else torch.compile(model, backend="eager")
            )
        self.model, self.graphed = model, variant.startswith("graphed ")

    def scores(self) -> Tensor:
        """Forward."""
        half = self.settings.dtype in (torch.bfloat16, torch.float16)
        mixed: Any = contextlib.nullcontext()
        if half:  # what is cached belongs to no graph
            mixed = torch.autocast(self.settings.device.type, self.settings.dtype, cache_enabled=not self.graphed)
        with fusedres.use_backend(self.backend), mixed:
            return self.model(self.images)

    def step(self) -> Tensor:
        """One iteration."""
        if not self.train:
            with torch.inference_mode():
                return self.scores()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.scores().float(), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def prepared(self) -> Callable[[], Any]:
        """The step, or the replay of its graph."""
        if not self.graphed:
            return self.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = self.step()
        return self.graph.replay


def _measure(settings: Settings, case: str, name: str, phase: str, batch: int, names: list[str]) -> None:
    train = phase == "train"
    size, classes = (32, 10) if settings.tiny else (224, 1000)
    images = torch.randn(batch, 3, size, size, device=settings.device).to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch,), device=settings.device)
    stock = build(settings, name).train(train)
    about = {"op": "model", "name": name, "phase": phase, "shape": [batch, 3, size, size]}
    about |= {"dtype": str(settings.dtype).removeprefix("torch.")}
    base = _Run(settings, "eager", stock, images, labels, train)
    with torch.no_grad():
        reference = _Run(settings, "eager", stock, images, labels, train).scores()
    picked = choices.table(settings)
    steps: dict[str, Callable[[], Any]] = {"eager": base.step}
    backends: dict[str, str] = {}
    peak: dict[str, int | None] = {}
    with choosing(picked):
        for variant in names:
            try:
                if variant.startswith("graphed") and not settings.on_gpu:
                    settings.row(case, **about, variant=variant, skipped="no GPU")
                    continue
                run = _Run(settings, variant, stock, images, labels, train)
                with torch.inference_mode(not train):  # as it will be timed, or it would be compiled again
                    error = off_by(run.scores().detach(), reference)
                if not error <= BOUNDS[settings.dtype]:
                    raise ArithmeticError(f"scores are off by {error:.3g} of eager's norm")
                steps[variant], backends[variant] = run.prepared(), run.backend
                steps[variant]()
            except Exception as error:
                steps.pop(variant, None)
                if settings.on_gpu:
                    torch.cuda.synchronize()  # raises where the GPU is lost
                settings.row(case, **about, variant=variant, error=f"{type(error).__name__}: {first_lines(str(error))}")
        for variant, step in steps.items():
            step()
            gc.collect()
            if not variant.startswith("graphed"):  # whose memory is there before it runs
                peak[variant] = harness.peak_bytes(step, settings.device)
        timer = harness.Timer(settings.device)
        cost = min(timer.once(Variant("eager", base.step)) for _ in range(2))
        repeats = max(1, min(20, round(0.05 / cost))) if settings.on_gpu else 1
        variants = [Variant(variant, _repeated(step, repeats)) for variant, step in steps.items()]
        samples = harness.interleave(
            variants, timer, rounds=10 if settings.on_gpu else 1, at_least=3, budget=12, warmup=1
        )
    for variant, times in samples.items():
        seconds = [sample / repeats for sample in times]
        way = variant.removeprefix("graphed ")
        arguments = WAYS[way][0] if way in WAYS else {}
        row = harness.row(
            settings.where, harness.summarize(seconds), **about, variant=variant,
            backend=backends.get(variant) if way in WAYS else None, conv=arguments.get("conv"),
            memory=arguments.get("memory"),
            memory_format="contiguous" if way == "eager_nchw" else "channels_last", peak_bytes=peak.get(variant),
            ratio=harness.ratio_interval(samples["eager"], times, resamples=500).as_dict(),
        )  # fmt: skip
        row |= {"images_per_s": batch / row["median_s"], "measured_configs": picked is not None, "data": "synthetic"}
        settings.journal.append(case=case, **row)


def _repeated(step: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            step()

    return run

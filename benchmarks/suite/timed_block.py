"""One residual block or stem as it is timed: what is asked for, the module in each variant, and what was found."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import blocks, designs, harness
from common.harness import Variant, Verdict
from common.networks import Stem
from memory_traffic import counting
from torch import Tensor, nn

import fusedres
from fusedres import backends

OPS = {"basic": "basic_block", "bottleneck": "bottleneck", "stem": "stem", "design": "design"}
BASE, BOUND, FUSED = "eager", "conv_only", "fused"


@dataclass
class BlockSettings:
    """The device, the dtype, and how blocks are fused."""

    device: torch.device
    dtype: torch.dtype
    memory: str = "auto"
    conv: str = "auto"
    backend: str | None = None
    freeze: bool = False
    compile: bool = False
    fuse: Callable[[nn.Module], nn.Module] | None = None  # used instead of fusedres.fuse, for tests

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return autocast for half precision, as in training: the weights stay float32."""
        if self.dtype in (torch.float16, torch.bfloat16):
            return torch.autocast(self.device.type, self.dtype)
        return contextlib.nullcontext()

    def selected(self) -> contextlib.AbstractContextManager:
        """Return a context in which the requested backend, if any, runs."""
        return fusedres.use_backend(self.backend) if self.backend else contextlib.nullcontext()

    def fused(self, module: nn.Module) -> nn.Module:
        """Fuse `module` in place and return it."""
        if self.fuse:
            return self.fuse(module)
        if hasattr(module, "fused"):
            return designs.fused(module)
        fused = fusedres.fuse(module, memory=self.memory, conv=self.conv)
        return fusedres.freeze(fused) if self.freeze and not module.training else fused

    def ran(self, module: nn.Module) -> tuple[str | None, str | None]:
        """Return the backend of the fused `module` and None, or None and the reason why it runs unfused."""
        with self.selected():
            reasons = [r.reason for r in fusedres.report(module) if not r.fused]
            return (None, reasons[0]) if reasons else (backends.backend_for(self.device.type), None)


@dataclass
class BlockCase:
    """One block at one batch size in one phase, with everything that was measured."""

    name: str
    block: blocks.Measured
    batch: int
    phase: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int | None] = field(default_factory=dict)
    backend: str | None = None
    unfused: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.phase} batch {self.batch}"


class Bench:
    """Prepares one case: the module in each variant, its input, and the gradient of its output."""

    def __init__(self, case: BlockCase, settings: BlockSettings) -> None:
        self.case, self.settings = case, settings
        block, device = case.block, settings.device
        self.train = case.phase == "train"
        stock = blocks.make_block(block).to(device).train(self.train)
        if settings.dtype == torch.float64:
            stock = stock.double()
        out = (case.batch, block.out_channels, block.out_size, block.out_size)
        grad = torch.randn(out, generator=torch.Generator(device).manual_seed(2), device=device).to(settings.dtype)
        self.stock = stock.to(memory_format=torch.channels_last)
        self.x = blocks.make_input(block, case.batch, device, settings.dtype)
        self.grad = grad.to(memory_format=torch.channels_last)
        self.input_grad = self.train and not isinstance(block, Stem)

    def check(self) -> list[Verdict]:
        """Judge the fused block against eager and the float64 oracle."""
        if isinstance(self.case.block, designs.Design):
            return self._check_design()
        settings, eager = self.settings, copy.deepcopy(self.stock)
        if self.train:
            harness.clear_masks(eager.model if isinstance(eager, blocks.StemOnly) else eager, self.x)
        fused, oracle = settings.fused(copy.deepcopy(eager)), copy.deepcopy(eager).double()
        self.case.backend, self.case.unfused = settings.ran(fused)
        grad = self.grad if self.train else None
        with settings.selected():
            return harness.check_block(fused, eager, oracle, self.x, grad, settings.autocast, self.input_grad)

    def _check_design(self) -> list[Verdict]:
        """Judge the fused block in float64, where rounding flips no ReLU, on two samples; eager is the oracle."""
        eager = copy.deepcopy(self.stock).double()
        fused, oracle = self.settings.fused(copy.deepcopy(eager)), copy.deepcopy(eager)
        self.case.backend, self.case.unfused = self.settings.ran(fused)
        x = self.x[:2].double().clone(memory_format=torch.channels_last)
        grad = self.grad[:2].double() if self.train else None

        def seeded() -> contextlib.AbstractContextManager:
            torch.manual_seed(0)
            return contextlib.nullcontext()

        with self.settings.selected():
            return harness.check_block(fused, eager, oracle, x, grad, seeded, self.input_grad, judged_as=torch.float32)

    def variants(self) -> tuple[list[Variant], dict[str, tuple[nn.Module, Tensor]]]:
        """Return the variants to be timed, and the modules with their inputs."""
        nchw = copy.deepcopy(self.stock).to(memory_format=torch.contiguous_format)
        modules = {
            "eager_nchw": (nchw, self.x.contiguous()),
            BASE: (self.stock, self.x),
            FUSED: (self.settings.fused(copy.deepcopy(self.stock)), self.x),
        }
        if self.settings.compile:
            torch.compiler.reset()  # else torch stops compiling after some blocks that share their forward
            modules["compile"] = (torch.compile(copy.deepcopy(self.stock)), self.x)
        variants = []
        for name, (module, x) in modules.items():
            source = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(self.input_grad)
            grad = self.grad.contiguous() if name == "eager_nchw" else self.grad
            modules[name] = (module, source)
            variants.append(self.variant(name, module, source, grad))
        alone = blocks.ConvolutionsOnly(self.stock, self.case.block, self.case.batch, self.x)
        variants.insert(2, Variant(BOUND, self.around(alone.train if self.train else alone.infer), alone.cleanup))
        return variants, modules

    def measure(self, pairs: int, at_least: int, budget: float | None, tick: Callable[[int], None]) -> None:
        """Count bytes, then time all variants interleaved; the results go to the case."""
        case, device = self.case, self.settings.device
        variants, modules = self.variants()
        # Entered once, so that this is not timed.
        with self.settings.selected(), torch.inference_mode(not self.train):
            for v in variants:
                self._count(v)
            if self.train:
                for name, (module, x) in modules.items():
                    leave_out = [x, *module.parameters(), *module.buffers()]
                    with self.settings.autocast():
                        case.saved[name] = harness.saved_bytes(partial(module, x), leave_out)
            case.samples = harness.interleave(
                variants, harness.Timer(device), rounds=pairs, at_least=at_least, budget=budget, warmup=1, on_round=tick
            )

    def _count(self, variant: Variant) -> None:
        case, cleanup = self.case, variant.cleanup or (lambda: None)
        variant.run()  # compiles, picks algorithms
        cleanup()
        if variant.name != "compile":  # a compiled module would trace the counting itself
            with counting.CountRun() as count:
                variant.run()
            case.counted[variant.name] = count.total
            cleanup()
        case.peak[variant.name] = harness.peak_bytes(variant.run, self.settings.device)
        cleanup()

    def around(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return `run` with autocast if the dtype needs it, else `run` itself, as any context would be timed, too."""
        if self.settings.dtype not in (torch.float16, torch.bfloat16):
            return run

        def wrapped() -> Any:
            with self.settings.autocast():
                return run()

        return wrapped

    def variant(self, name: str, module: nn.Module, x: Tensor, grad: Tensor) -> Variant:
        """Return a step of `module`: forward, and in training also backward from `grad`."""
        forward = self.around(partial(module, x))
        if not self.train:
            return Variant(name, forward)

        def step() -> None:
            forward().backward(grad)

        def cleanup() -> None:
            x.grad = None
            module.zero_grad(set_to_none=True)

        return Variant(name, step, cleanup)

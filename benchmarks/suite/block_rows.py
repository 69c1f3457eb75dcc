"""Every distinct block of ResNet-18 and ResNet-50: eager, its convolutions alone, each fused way, torch.compile."""

from __future__ import annotations

import copy
from functools import partial

import blocks
import harness
import torch
import traffic
from bench_block import BASE, BOUND, Bench
from bench_block import Case as BlockCase
from bench_block import Settings as BlockSettings
from harness import Variant
from launched import WAYS
from torch import Tensor, nn

import fusedres
from fusedres.kernels.launch import choosing
from suite import choices
from suite.settings import Case, Settings, first_lines, floor_seconds, off_by

# ‖fused − eager‖ / ‖eager‖ of the output and of gradients: in half precision masks near 0 fall to either side.
BOUNDS = {torch.bfloat16: (3e-2, 0.3), torch.float16: (1e-2, 0.15), torch.float32: (1e-3, 1e-2)}


def cases(settings: Settings) -> list[Case]:
    """Block, phase and batch, the large batch first; torch.compile, which takes long, after all others."""
    torch.backends.cudnn.benchmark = settings.on_gpu
    chosen = blocks.select(["tiny.bottleneck"] if settings.tiny else ["all"])
    batches = (2,) if settings.tiny else (256, 64)
    found = []
    for batch in batches:
        for phase in traffic.PHASES:
            found += [_case(settings, name, block, phase, batch, False, 40) for name, block in chosen.items()]
    compiled = list(chosen.items())[:1] if settings.tiny else sorted(chosen.items(), key=_by_interest)
    for phase in traffic.PHASES[: 1 if settings.tiny else 2]:
        found += [_case(settings, name, block, phase, batches[0], True, 60) for name, block in compiled]
    return found


def _by_interest(item: tuple[str, traffic.Block]) -> tuple[bool, bool]:
    """Identity blocks of ResNet-50 first: most of its blocks are."""
    name, block = item
    return not name.startswith("resnet50"), block.shortcut != "identity"


def _case(
    settings: Settings, name: str, block: traffic.Block, phase: str, batch: int, compiled: bool, limit: float
) -> Case:
    case = f"{name} {phase} batch {batch}{' compile' if compiled else ''}"
    return Case(case, lambda: _measure(settings, case, BlockCase(name, block, batch, phase), compiled), limit)


def ways(settings: Settings) -> dict[str, tuple[str, dict[str, str]]]:
    """Variant → backend and fuse()'s arguments."""
    if settings.on_gpu:
        return {way: ("triton", arguments) for way, (arguments, _) in WAYS.items()}
    return {"library": ("cpu", WAYS["library"][0]), "fused min": ("triton", WAYS["fused min"][0])}


def _measure(settings: Settings, name: str, case: BlockCase, compiled: bool) -> None:
    around = BlockSettings(settings.device, settings.dtype)
    bench = Bench(case, around)
    train = case.phase == "train"
    modules: dict[str, tuple[nn.Module, Tensor, Tensor]] = {BASE: (bench.stock, bench.x, bench.grad)}
    if compiled:
        backend = "inductor" if settings.on_gpu else "eager"
        modules["compile"] = (torch.compile(copy.deepcopy(bench.stock), backend=backend), bench.x, bench.grad)
    else:
        nchw = copy.deepcopy(bench.stock).to(memory_format=torch.contiguous_format)
        modules["eager_nchw"] = (nchw, bench.x.contiguous(), bench.grad.contiguous())
    picked = choices.table(settings)
    backend_of = {}
    reference = _results(around, bench.stock, bench.x, bench.grad if train else None)
    for way, (backend, arguments) in ways(settings).items():
        module = fusedres.fuse(copy.deepcopy(bench.stock), **arguments)
        try:
            with fusedres.use_backend(backend), choosing(picked):
                reasons = [entry.reason for entry in fusedres.report(module) if not entry.fused]
                found = _results(around, module, bench.x, bench.grad if train else None)
            wrong = f"unfused: {reasons[0]}" if reasons else _disagreement(found, reference, settings.dtype)
        except Exception as error:
            if settings.on_gpu:
                torch.cuda.synchronize()  # raises where the GPU is lost
            wrong = f"{type(error).__name__}: {first_lines(str(error))}"
        if wrong:
            settings.row(
                name, op=_op(case), name=case.name, variant=way, backend=backend, phase=case.phase, error=wrong
            )
            continue
        modules[way] = (module, bench.x, bench.grad)
        backend_of[way] = backend
    del reference
    variants, prepared = [], {}
    for way, (module, x, grad) in modules.items():
        source = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(train)
        prepared[way] = (module, source)
        variants.append(_on(backend_of.get(way), bench.variant(way, module, source, grad)))
    if not compiled:
        alone = blocks.ConvolutionsOnly(bench.stock, case.block, case.batch, bench.x)
        run = alone.train if train else alone.infer
        variants.append(Variant(BOUND, bench.around(run), alone.cleanup))
    with torch.inference_mode(not train), choosing(picked):
        for variant in variants:
            variant.run()  # compiles, picks algorithms
            (variant.cleanup or (lambda: None))()
            case.peak[variant.name] = harness.peak_bytes(variant.run, settings.device)
            (variant.cleanup or (lambda: None))()
        if train:
            for way, (module, x) in prepared.items():
                if way != "compile":
                    leave_out = [x, *module.parameters(), *module.buffers()]
                    with around.autocast(), fusedres.use_backend(backend_of.get(way, "auto")):
                        case.saved[way] = harness.saved_bytes(partial(module, x), leave_out)
        timer = harness.Timer(settings.device)
        rounds = 15 if settings.on_gpu else 1
        case.samples = harness.interleave(variants, timer, rounds=rounds, at_least=3, budget=15, warmup=1)
    for row in _rows(settings, case, backend_of, bool(picked)):
        settings.journal.append(case=name, **row)


def _on(backend: str | None, variant: Variant) -> Variant:
    """`variant` under a backend."""
    if backend is None:
        return variant

    def run() -> None:
        with fusedres.use_backend(backend):
            variant.run()

    return Variant(variant.name, run, variant.cleanup)


def _results(around: BlockSettings, module: nn.Module, x: Tensor, grad: Tensor | None) -> dict[str, Tensor]:
    """Output and gradients, on a copy of the module."""
    module = copy.deepcopy(module)
    source = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(grad is not None)
    with torch.set_grad_enabled(grad is not None), around.autocast():
        out = module(source)
    found = {"output": out.detach()}
    if grad is not None:
        out.backward(grad)
        found |= {"input grad": source.grad} | {f"{n} grad": p.grad for n, p in module.named_parameters()}
    return found


def _disagreement(ours: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype) -> str | None:
    """In words, None where they agree."""
    output, grads = BOUNDS[dtype]
    for what, reference in eager.items():
        error, bound = off_by(ours[what], reference), output if what == "output" else grads
        if not error <= bound:
            return f"{what} is off by {error:.3g} of its norm from eager, allowed {bound:.3g}"
    return None


def _op(case: BlockCase) -> str:
    return "basic_block" if case.block.kind == "basic" else "bottleneck"


def _rows(settings: Settings, case: BlockCase, backend_of: dict[str, str], picked: bool) -> list[dict]:
    """One a variant."""
    block, itemsize, ceilings = case.block, settings.dtype.itemsize, settings.ceilings
    moved = min(traffic.bytes_moved(block, way, case.phase, case.batch, itemsize) for way in traffic.MODES[1:])
    products = 3 if case.phase == "train" else 1
    operations = products * case.batch * sum(conv.flops for conv in block.convolutions)
    found = []
    for way, samples in case.samples.items():
        summary = harness.summarize(samples)
        arguments = WAYS[way][0] if way in WAYS else {}
        row = harness.row(
            settings.where, summary, op=_op(case), name=case.name, variant=way, backend=backend_of.get(way),
            conv=arguments.get("conv"), memory=arguments.get("memory"),
            shape=[case.batch, block.in_channels, block.size, block.size],
            geometry={"planes": block.planes, "stride": block.stride, "shortcut": block.shortcut},
            dtype=str(settings.dtype).removeprefix("torch."), phase=case.phase,
            memory_format="contiguous" if way == "eager_nchw" else "channels_last",
            ratio=harness.ratio_interval(case.samples[BASE], samples, resamples=500).as_dict(),
            peak_bytes=case.peak.get(way), saved_bytes=case.saved.get(way),
            copy_bytes_per_s=ceilings["copy_bytes_per_s"], floor_bytes=moved,
        )  # fmt: skip
        bound = floor_seconds(ceilings, moved, operations)
        found.append(
            row | {"flops": operations, "percent_of_bound": 100 * bound / summary.median, "measured_configs": picked}
        )
    return found

"""Every Triton kernel that ResNet-18, ResNet-50 and the gated tails launch, with every candidate config, as compiled.

Blocks and ops run on meta tensors, where a launch is only recorded, so no GPU is needed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from common.blocks import select
from common.networks import Block, Stem
from memory_traffic.launched import WAYS, CountLaunched, build, mixed_precision
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

import fusedres
from compiled_code import tails
from fusedres.kernels.conv_fprop.configs import DescriptorConfig
from fusedres.kernels.triton_core import launch as launching
from fusedres.kernels.triton_core.launch import H100, Config, Gpu, Launch, Problem, choosing, record_launches

# The GPU that stands for each arch: A100, RTX 4090, H100. The shared memory of a multiprocessor is 1,024 bytes larger
# than the most that one program may use.
GPUS = {80: Gpu(80, 108, 166_912), 89: Gpu(89, 128, 101_376), 90: H100}

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


class _Capture:
    """Replaces a kernel when launch.py starts it, and keeps the arguments of the launch."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._keep

    def _keep(self, **arguments: Any) -> None:
        self.arguments = arguments


@dataclass(frozen=True)
class Specialised:
    """One kernel as Triton would compile it for the arguments of a launch and one config."""

    launch: Launch
    config: Config
    source: ASTSource
    options: dict[str, Any]
    fp_fusion: bool | None  # enable_fp_fusion of the launch; None: Triton's default
    target: GPUTarget

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for launches that share a compilation."""
        source, config = self.source, self.config
        kernel = (self.launch.kernel.fn.__module__, self.launch.name, self.target.arch)
        parts = (source.signature, source.constants, source.attrs)
        return (*kernel, *(repr(sorted(p.items())) for p in parts), config.num_warps, config.num_stages)

    @property
    def name(self) -> str:
        """A hash of the sources, the key and Triton's version: the same in every process."""
        return hashlib.sha256(repr((self.source.hash(), self.key, triton.__version__)).encode()).hexdigest()[:16]

    @property
    def arguments(self) -> list[int]:
        """The arguments of the compiled kernel as numbers: pointers are aligned, floating-point numbers are 0."""
        found: list[int] = []
        given = {**self.launch.arguments, **self.config.blocks}
        for name, kind in self.source.signature.items():
            if kind == "constexpr":
                continue
            value = given[name]
            if isinstance(value, TensorDescriptor):
                found += [_pointer(len(found)), *map(int, value.shape), *map(int, value.strides)]
            else:
                found.append(_pointer(len(found)) if isinstance(value, Tensor) else int(value))
        return [*found, 0, 0]  # pointers to Triton's own scratch memory


def _pointer(index: int) -> int:
    return (index + 1) << 33


def specialise(launch: Launch, config: Config, arch: int) -> Specialised:
    """Bind the recorded arguments with Triton's own binder: alignment and constants are those of a real launch."""
    if launching.INTERPRETED:
        raise RuntimeError("inspect_kernels: TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    capture = _Capture()
    launching.run_kernel(capture, launch.grid, launch.arguments, config)
    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = bind(**capture.arguments)
    options, signature, constants, attrs = kernel._pack_args(backend, capture.arguments, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attrs)
    fusion = capture.arguments.get("enable_fp_fusion")
    return Specialised(launch, config, source, options.__dict__, fusion, target)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def describe(config: Config) -> str:
    """Return the config as text, for example BLOCK_M=128 BLOCK_N=64 w8 s3."""
    return " ".join([*(f"{k}={v}" for k, v in config.blocks.items()), f"w{config.num_warps}", f"s{config.num_stages}"])


def problem(launch: Launch) -> str:
    """Return the dtype of the narrowest floating-point tensor, sizes and flags, and the names of missing tensors."""
    dtypes = [v.dtype for v in launch.arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    words = [_NAMES[min(dtypes, key=lambda d: d.itemsize)]] if dtypes else []
    for name, value in launch.arguments.items():
        if value is None:
            words.append(f"no-{name.removesuffix('_ptr')}")
        elif isinstance(value, int | str) and "_stride_" not in name:
            words.append(f"{name}={value}")
    return " ".join(words)


@contextmanager
def assumed(arch: int) -> Iterator[None]:
    """Inside, launchers use the candidates of the GPU of this arch, although there is no GPU."""
    before, launching.assumed = launching.assumed, GPUS[arch]
    try:
        yield
    finally:
        launching.assumed = before


def record(function: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """Return the launches that `function` makes with the triton backend; its tensors are on the meta device.

    It may call ops, blocks, or launchers directly.
    """
    with assumed(arch), fusedres.use_backend("triton"), CountLaunched() as count, record_launches() as direct:
        function()
    for name in sorted(count.missing):
        print(f"note: {name} has no triton kernel yet", file=sys.stderr)
    return count.kernels + direct


def compilations(launches: Iterable[Launch], arch: int = 90, limit: int | None = None) -> list[Specialised]:
    """Return every distinct compilation of the candidates of the launches (the first `limit` of each), in order."""
    found: dict[tuple[Any, ...], Specialised] = {}
    for launch in launches:
        for config in list(launch.candidates)[:limit]:
            what = specialise(launch, config, arch)
            found.setdefault(what.key, what)
    return list(found.values())


def cases(
    blocks: str = "all",
    ways: Iterable[str] = tuple(WAYS),
    batch: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    mixed: bool = False,
) -> dict[str, Callable[[], None]]:
    """Return name → a function that runs a block of ResNet-18 or 50, the stem, or a gated tail, forward and backward.

    Blocks and the stem also run in inference.

    mixed: run as under autocast to `dtype`; otherwise all tensors have this dtype.
    """
    chosen: dict[str, Block | Stem] = {} if blocks in ("stem", "tails") else dict(select([blocks]))
    if blocks in ("all", "stem"):
        chosen["stem"] = Stem()

    def step(what: Block | Stem, way: str) -> None:
        module, x = build(what, way, batch, dtype, mixed)
        with mixed_precision(dtype) if mixed else nullcontext():
            out = module.train()(x)
            out.backward(torch.empty_like(out))
            with torch.inference_mode():
                module.eval()(x)

    found = {f"{name}, {way}": lambda w=what, y=way: step(w, y) for name, what in chosen.items() for way in ways}
    return found | (tails.steps(batch, dtype) if blocks in ("all", "tails") else {})


def launches_of(runs: Collection[Callable[[], Any]], arch: int = 90, kernels: Sequence[str] = ("",)) -> list[Launch]:
    """Return the launches of kernels with one of these texts in their names, convolutions by descriptors included."""

    def made() -> list[Launch]:
        return [launch for run in runs for launch in record(run, arch) if any(name in launch.name for name in kernels)]

    found = made()
    if any(name in _DESCRIPTORS for name in kernels):
        for index in range(4):  # descriptors depend on the config, so each config is another launch
            with choosing(partial(_by_descriptors, index)):
                found += [launch for launch in made() if launch.name == _DESCRIPTORS]
    return found


_DESCRIPTORS = "conv_fprop_descriptor_kernel"


def _by_descriptors(index: int, problem: Problem, candidates: Sequence[Config]) -> Config | None:
    found = [config for config in candidates if isinstance(config, DescriptorConfig)]
    return found[index] if index < len(found) else None

"""Every Triton kernel with every candidate that ResNet-18 and 50 can launch it with, as Triton would compile them.

Blocks and ops run on meta tensors, where a launch is only recorded; no GPU is needed.
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
from common.networks import Block
from memory_traffic.launched import WAYS, CountLaunched, Stem, build, mixed_precision
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

import fusedres
from fusedres.kernels.conv_fprop.configs import DescriptorConfig
from fusedres.kernels.triton_core import launch as launching
from fusedres.kernels.triton_core.launch import H100, Config, Gpu, Launch, Problem, choosing, record_launches

# Whose candidates are taken, by arch: A100, RTX 4090, H100. A multiprocessor has 1,024 bytes of shared memory more than
# one program may use.
GPUS = {80: Gpu(80, 108, 166_912), 89: Gpu(89, 128, 101_376), 90: H100}

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


class _Capture:
    """Stands for a kernel where launch.py starts it, and keeps what it was given."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._keep

    def _keep(self, **arguments: Any) -> None:
        self.arguments = arguments


@dataclass(frozen=True)
class Specialised:
    """One kernel as Triton would compile it for a launch's arguments and one config."""

    launch: Launch
    config: Config
    source: ASTSource
    options: dict[str, Any]
    fp_fusion: bool | None  # as it was asked for
    target: GPUTarget

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that share a compilation."""
        source, config = self.source, self.config
        kernel = (self.launch.kernel.fn.__module__, self.launch.name, self.target.arch)
        parts = (source.signature, source.constants, source.attrs)
        return (*kernel, *(repr(sorted(p.items())) for p in parts), config.num_warps, config.num_stages)

    @property
    def name(self) -> str:
        """The same whenever this is compiled again: of the sources, the key and Triton's version."""
        return hashlib.sha256(repr((self.source.hash(), self.key, triton.__version__)).encode()).hexdigest()[:16]

    @property
    def arguments(self) -> list[int]:
        """What the compiled kernel is given, as numbers: pointers are aligned ones, floating-point numbers are 0."""
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
        return [*found, 0, 0]  # scratch memory of Triton's own


def _pointer(index: int) -> int:
    return (index + 1) << 33


def specialise(launch: Launch, config: Config, arch: int) -> Specialised:
    """Binds the recorded arguments with Triton's own binder, so alignment and constants are those of a real launch."""
    if launching.INTERPRETED:
        raise RuntimeError("inspect_kernels: TRITON_INTERPRET is set, so there is nothing to compile; unset it")
    capture = _Capture()
    launching._run(capture, launch.grid, launch.arguments, config)
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
    """BLOCK_M=128 BLOCK_N=64 w8 s3."""
    return " ".join([*(f"{k}={v}" for k, v in config.blocks.items()), f"w{config.num_warps}", f"s{config.num_stages}"])


def problem(launch: Launch) -> str:
    """The dtype of the narrowest floating-point tensor, sizes and switches, and the tensors that are not there."""
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
    """Launchers take the candidates of this arch's GPU inside, off a GPU."""
    before, launching.assumed = launching.assumed, GPUS[arch]
    try:
        yield
    finally:
        launching.assumed = before


def record(function: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """The launches that `function` makes under the triton backend; its tensors are on the meta device.

    Ops run their launchers, called as ops, as part of a block, or directly.
    """
    with assumed(arch), fusedres.use_backend("triton"), CountLaunched() as count, record_launches() as direct:
        function()
    for name in sorted(count.missing):
        print(f"note: {name} has no triton kernel yet", file=sys.stderr)
    return count.kernels + direct


def compilations(launches: Iterable[Launch], arch: int = 90, limit: int | None = None) -> list[Specialised]:
    """Every distinct compilation of the launches' candidates (the first `limit` of each), in order."""
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
    """Name → a function that runs a block of ResNet-18 or 50, or the stem, on meta tensors, training and inference.

    mixed: as under autocast to `dtype`, else in it throughout.
    """
    chosen: dict[str, Block | Stem] = {} if blocks == "stem" else dict(select([blocks]))
    if blocks in ("all", "stem"):
        chosen["stem"] = Stem()

    def step(what: Block | Stem, way: str) -> None:
        module, x = build(what, way, batch, dtype, mixed)
        with mixed_precision(dtype) if mixed else nullcontext():
            out = module.train()(x)
            out.backward(torch.empty_like(out))
            with torch.inference_mode():
                module.eval()(x)

    return {f"{name}, {way}": lambda w=what, y=way: step(w, y) for name, what in chosen.items() for way in ways}


def launches_of(runs: Collection[Callable[[], Any]], arch: int = 90, kernels: Sequence[str] = ("",)) -> list[Launch]:
    """What they launch of kernels whose names contain one of these, convolutions by descriptors too."""

    def made() -> list[Launch]:
        return [launch for run in runs for launch in record(run, arch) if any(name in launch.name for name in kernels)]

    found = made()
    if any(name in _DESCRIPTORS for name in kernels):
        for index in range(4):  # descriptors are made for a config, so each is a launch of its own
            with choosing(partial(_by_descriptors, index)):
                found += [launch for launch in made() if launch.name == _DESCRIPTORS]
    return found


_DESCRIPTORS = "conv_fprop_descriptor_kernel"


def _by_descriptors(index: int, problem: Problem, candidates: Sequence[Config]) -> Config | None:
    found = [config for config in candidates if isinstance(config, DescriptorConfig)]
    return found[index] if index < len(found) else None

"""The one place where Triton kernels start: device guard, compile options, and a record of what was launched.

A kernel folder's triton.py holds the kernels and their launchers; its configs.py maps a problem to candidate tile
sizes. A launcher calls `choose(candidates, kernel, what its speed depends on)`, allocates, and calls `launch`.

Names tell roles: a pointer argument that the kernel writes is called out or out_…; every other one is only read.
Tensors are passed as views of what the kernel touches (x[:, :, ::2, ::2] if a stride leaves pixels out), with the
strides as separate numbers. So the bytes that a launch moves can be summed from its arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedres import dispatch

# Kernels run in Triton's interpreter, on CPU tensors, when Python started with TRITON_INTERPRET=1.
INTERPRETED: bool = triton.knobs.runtime.interpret


class Gpu(NamedTuple):
    """The properties of a device that candidates depend on."""

    capability: int  # 80, 90, ...
    multiprocessors: int
    shared_memory: int  # that one program may use, in bytes

    @property
    def has_wgmma(self) -> bool:
        """Whether products read whole operands from shared memory, which leaves more registers for larger tiles."""
        return self.capability // 10 == 9


H100 = Gpu(90, 132, 232_448)
assumed = H100  # if there is no GPU to ask


# Kernels' names of sizes and counts that depend on the batch.
_OF_THE_BATCH = {
    "M", "N", "rows", "tile_rows", "group_rows", "tiles", "group_tiles", "steps", "T", "S", "count",
    *(f"splits_{i}" for i in range(4)),
}  # fmt: skip


def jit_for_any_batch(kernel: Callable[..., None]) -> Any:
    """Apply triton.jit so that one compilation serves every batch size, also a smaller last batch."""
    names = [
        name
        for name, parameter in inspect.signature(kernel).parameters.items()
        if name in _OF_THE_BATCH and parameter.annotation is parameter.empty
    ]
    return triton.jit(kernel, do_not_specialize=names)


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch by the kernel's constexpr names, and the compiler's options."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 1

    def __getitem__(self, block: str) -> int:
        return self.blocks[block]

    @cached_property
    def label(self) -> str:
        """A name like "BLOCK_M=128 BLOCK_N=64 w8 s3", unique among a problem's candidates. STEPS is left out, because
        the others determine it.
        """
        blocks = (f"{name}={value}" for name, value in self.blocks.items() if name != "STEPS")
        return " ".join([*blocks, f"w{self.num_warps}", f"s{self.num_stages}"])


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its arguments by name, the chosen config and all candidates."""

    kernel: Any
    arguments: dict[str, Any]
    config: Config
    candidates: Sequence[Config]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's function name."""
        return str(self.kernel.fn.__name__)

    def bytes(self) -> int:
        """Return the bytes moved if every distinct tensor is read once, and every distinct output written once."""
        seen: dict[tuple[Any, ...], int] = {}
        for name, argument in self.arguments.items():
            value = argument.base if isinstance(argument, TensorDescriptor) else argument
            if isinstance(value, Tensor):
                written = name.startswith("out")
                storage = value.untyped_storage()._cdata
                key = (written, storage, value.storage_offset(), tuple(value.shape), value.stride())
                seen[key] = value.numel() * value.element_size()
        return sum(seen.values())


_record: ContextVar[list[Launch] | None] = ContextVar("fusedres_record", default=None)


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect every launch made inside; on meta tensors launches are only recorded."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


# A problem: a kernel's name, then what its speed depends on. A pick chooses one of the candidates; None: the first.
Problem = tuple[Any, ...]
Pick = Callable[[Problem, Sequence[Config]], Config | None]
_pick: Pick | None = None


def choose(candidates: Sequence[Config], *problem: Any) -> Config:
    """Return the config to launch with: the pick of `choosing`, or, outside of it, the device's table of measured
    choices. If neither gives one, return the first candidate, the best guess.
    """
    if problem:
        found = _pick(_exact(problem), candidates) if _pick is not None else _of_table(problem, candidates)
        if found is not None:
            return found
    return candidates[0]


def _of_table(problem: Problem, candidates: Sequence[Config]) -> Config | None:
    """Return the choice in the current device's table, None if it has none."""
    if not (INTERPRETED or torch.cuda.is_initialized()):
        return None
    table = dispatch.table(_device(-1 if INTERPRETED else torch.cuda.current_device()))
    if table is None or not table.configs:
        return None
    return _labelled(_label(table, _exact(problem)), candidates)


def _exact(problem: Problem) -> Problem:
    """Replace float32 by "tf32" if products use it, and symbolic sizes by numbers, which specialises compiled code."""
    return tuple(
        int(value) if isinstance(value, torch.SymInt)
        else "tf32" if value is torch.float32 and input_precision(value) == "tf32"
        else value
        for value in problem
    )  # fmt: skip


@cache
def _device(index: int) -> torch.device:
    return torch.device("cpu") if index < 0 else torch.device("cuda", index)


@lru_cache(maxsize=4096)
def _label(table: dispatch.Table, problem: Problem) -> str | None:
    return table.configs.get(problem_key(problem))


def _labelled(label: str | None, candidates: Sequence[Config]) -> Config | None:
    return next((config for config in candidates if config.label == label), None)


@contextmanager
def choosing(pick: Pick | None) -> Iterator[None]:
    """Let `pick` choose configs inside; None: choose as outside.

    This holds for all threads, because a backward pass on a GPU runs in its own thread.
    """
    global _pick
    before, _pick = _pick, pick
    try:
        yield
    finally:
        _pick = before


def problem_key(problem: Problem) -> str:
    """Return a problem as text, the key in a table of choices."""
    return " ".join(str(value).removeprefix("torch.") for value in problem)


def measured(table: Mapping[str, str]) -> Pick:
    """Return a pick that follows a table of measured choices: problem_key → label of the config."""

    def pick(problem: Problem, candidates: Sequence[Config]) -> Config | None:
        return _labelled(table.get(problem_key(problem)), candidates)

    return pick


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], config: Config, candidates: Sequence[Config] = ()
) -> None:
    """Run kernel[grid](**arguments) with the config's blocks on the tensors' device and its current stream."""
    record = _record.get()
    if record is not None:
        record.append(Launch(kernel, arguments, config, candidates or (config,), grid))
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    if device.type == "meta":
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run_kernel(kernel, grid, arguments, config)
    else:
        run_kernel(kernel, grid, arguments, config)


def run_kernel(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], config: Config) -> None:
    """Run kernel[grid](**arguments) on the current device, without recording the launch."""
    kernel[grid](
        **arguments,
        **config.blocks,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # its default differs between Triton versions
    )


def input_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's precision for float32 operands, by torch's setting for convolutions; other dtypes ignore it."""
    return "tf32" if dispatch.uses_tf32(dtype) else "ieee"


def gpu(device: torch.device) -> Gpu:
    """Return the device's properties; the assumed ones if there is no GPU."""
    return _gpu(device) if device.type == "cuda" else assumed


@cache
def _gpu(device: torch.device) -> Gpu:
    if not torch.cuda.is_available():  # a fake tensor's device
        return assumed
    found: Any = torch.cuda.get_device_properties(device)  # some torch versions do not declare all attributes
    return Gpu(10 * found.major + found.minor, found.multi_processor_count, found.shared_memory_per_block_optin)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return gpu(device).multiprocessors


def shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory one program may use."""
    return gpu(device).shared_memory


def fitting(configs: Iterable[Config], shared_bytes: Callable[[Config], int], gpu: Gpu) -> tuple[Config, ...]:
    """Return the distinct configs for which shared_bytes fit in the shared memory of one program."""
    found: list[Config] = []
    for config in configs:
        if shared_bytes(config) <= gpu.shared_memory and config not in found:
            found.append(config)
    return tuple(found)


def loop_bound(count: int) -> Any:
    """Return a loop's bound as an argument; Triton 3.6's interpreter can only loop to a constant."""
    return tl.constexpr(count) if INTERPRETED else count


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)

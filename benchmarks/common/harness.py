"""Bandwidth and memory; also the timing, statistics, rows and checks that all benchmarks share.

fusedres/tune/timing.py says how times are taken. A speed-up is the ratio of two times within one round; benchmarks
report its median over all rounds, with a bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from common.equivalence import Verdict, check_block, clear_masks, judge
from common.rows import ROOT, ROW_KEYS, busy_note, commit, machine, row, write_rows
from common.stats import Summary, ratio_interval, removed_interval, summarize
from common.terminal import Progress, print_table
from fusedres.tune.timing import Timer, Variant, interleave

__all__ = [
    "ROOT",
    "ROW_KEYS",
    "Progress",
    "Summary",
    "Timer",
    "Variant",
    "Verdict",
    "busy_note",
    "check_block",
    "clear_masks",
    "commit",
    "copy_bandwidth",
    "copy_variant",
    "interleave",
    "judge",
    "machine",
    "matmul_rate",
    "peak_bytes",
    "print_table",
    "ratio_interval",
    "removed_interval",
    "row",
    "saved_bytes",
    "summarize",
    "write_rows",
]


# --- bandwidth --------------------------------------------------------------------------------------------------------


def copy_variant(total_bytes: int, device: torch.device, name: str = "copy") -> Variant:
    """Return a copy between two preallocated buffers; bytes read and bytes written sum to `total_bytes`."""
    count = max(1, total_bytes // 8)  # float32, half of the bytes are read
    source = torch.ones(count, device=device)
    target = torch.zeros(count, device=device)
    return Variant(name, lambda: target.copy_(source))


def copy_bandwidth(device: torch.device, rounds: int = 15) -> float:
    """Return bytes per second, read and written, of a copy that is too large for the caches: the median of `rounds`."""
    size = (2 << 30) if device.type == "cuda" else (128 << 20)
    variant = copy_variant(size, device)
    samples = interleave([variant], Timer(device), rounds=rounds)["copy"]
    return size / summarize(samples).median


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 15) -> float:
    """Return operations per second of a large product, the median of `rounds`.

    On a GPU it is a product of random matrices, on a CPU a 3x3 convolution. There torch's product of matrices may reach
    less than half of oneDNN's rate (180 against 435 GFLOP/s on two cores of an AMD EPYC).
    """
    if device.type == "cuda":
        size = 8192
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        variant, operations = Variant("product", lambda: a @ b), 2 * size**3
    else:
        images, channels, pixels = 8, 64, 56
        x = torch.randn(images, channels, pixels, pixels).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
        variant = Variant("product", lambda: torch.conv2d(x, weight, padding=1))
        operations = 2 * images * pixels**2 * channels**2 * 9
    with torch.inference_mode():
        samples = interleave([variant], Timer(device), rounds=rounds, warmup=3)["product"]
    return operations / summarize(samples).median


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Return the bytes that `run`, a forward pass, saves for backward: each storage once, without those of `leave_out`.

    Parameters, buffers and the input belong into `leave_out`, as they stay in memory anyway.
    """
    skipped = {t.untyped_storage()._cdata for t in leave_out}
    kept: list[Tensor] = []  # kept alive until the end, so that no address is used by two storages
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage._cdata not in skipped:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(sizes.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the peak of device memory of `run`, beyond what is already allocated; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before

"""Timing, statistics and bookkeeping shared by the benchmarks.

Every comparison is made inside one process, round by round: each round times every variant once, in an order that
rotates, so that drift of the machine falls on all of them alike. A claim is the median over rounds of the ratio within
a round, with a bootstrap interval. Times of separate runs are never compared.

On a GPU a sample is the time between two CUDA events after the L2 cache has been flushed. On a CPU it is wall time,
page faults of freshly allocated memory included, as a user pays them.
"""

from __future__ import annotations

import copy
import ctypes
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent

# What every row holds, whatever it measures; None where something does not apply or cannot be known.
ROW_KEYS = (
    "op",  # the operator, or basic_block, bottleneck
    "name",  # the shape's name, e.g. resnet50.layer1.1
    "variant",  # eager_nchw, eager, conv_only, fused, compile, or the operator's variant
    "backend",
    "conv",
    "memory",
    "frozen",  # weights folded once, for inference
    "shape",  # of the input, N C H W
    "geometry",  # planes, stride, shortcut of a block
    "dtype",
    "memory_format",
    "phase",  # train, infer; forward, backward for operators
    "device",
    "driver",
    "threads",
    "versions",
    "commit",
    "date",
    "rounds",
    "median_s",
    "p20_s",
    "p80_s",
    "ratio",  # eager channels_last (for operators a copy) over this, within rounds: median, low, high of the interval
    "removed_percent",  # of (eager - conv_only), likewise
    "peak_bytes",
    "saved_bytes",
    "counted_bytes",
    "bytes_per_s",
    "copy_bytes_per_s",
    "floor_bytes",
    "percent_of_floor",
    "percent_of_conv_only",
)


# --- statistics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Median and 20/80 percentiles of `rounds` samples."""

    median: float
    p20: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95% interval."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


def summarize(samples: Sequence[float]) -> Summary:
    """Median and 20/80 percentiles, interpolated linearly between samples."""
    if not samples:
        raise ValueError("summarize: expected at least one sample, got none")
    values = torch.tensor(samples, dtype=torch.float64)
    p20, median, p80 = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Summary(median, p20, p80, len(samples))


def ratio_interval(base: Sequence[float], other: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Median over rounds of base/other (above 1: `other` is faster), with its bootstrap interval over rounds."""
    a, b = _paired(base, other)
    ratios = a / b
    draws = ratios[_resample(len(ratios), resamples, seed)]
    return _interval(ratios.quantile(0.5), draws.quantile(0.5, dim=1))


def removed_interval(
    base: Sequence[float], other: Sequence[float], bound: Sequence[float], resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percent of (base - bound) that `other` removes: medians over rounds of the differences, rounds resampled jointly.

    NaN where base is not slower than the bound: there is nothing to remove.
    """
    a, b, c = _paired(base, other, bound)
    gain, room = a - b, a - c
    if room.quantile(0.5) <= 0:
        return Interval(math.nan, math.nan, math.nan)
    draw = _resample(len(a), resamples, seed)
    gains, rooms = gain[draw].quantile(0.5, dim=1), room[draw].quantile(0.5, dim=1)
    percents = 100 * (gains / rooms)[rooms > 0]
    return _interval(100 * gain.quantile(0.5) / room.quantile(0.5), percents)


def _paired(*columns: Sequence[float]) -> list[Tensor]:
    lengths = {len(c) for c in columns}
    if len(lengths) != 1 or not lengths.pop():
        raise ValueError(f"expected samples of the same rounds, got {[len(c) for c in columns]}")
    return [torch.tensor(c, dtype=torch.float64) for c in columns]


def _resample(count: int, resamples: int, seed: int) -> Tensor:
    return torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))


def _interval(estimate: Tensor, draws: Tensor) -> Interval:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(estimate), low, high)


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass
class Variant:
    """Something to be timed: `run` is timed, `cleanup` runs after it and is not."""

    name: str
    run: Callable[[], Any]
    cleanup: Callable[[], Any] | None = None


class Timer:
    """Seconds of one call: CUDA events after an L2 flush on a GPU, wall time on a CPU.

    A short call on a CPU is repeated until about `least` seconds are filled; the sample is the mean of the calls. A GPU
    waits `lead` seconds before the first event, so that what is launched within them costs no time of its own.
    """

    def __init__(self, device: torch.device, least: float = 1e-3, lead: float = 0.0) -> None:
        self.device = device
        self.least = least
        self._wait = int(lead * 1.9e9)  # cycles, about
        self._flush: Tensor | None = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            size = max(2 * getattr(properties, "L2_cache_size", 0), 64 << 20)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, variant: Variant) -> float:
        """One timed call."""
        if self._flush is None:
            start = time.perf_counter()
            result = variant.run()
            seconds = time.perf_counter() - start
            del result
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            if self._wait:
                torch.cuda._sleep(self._wait)
            begin.record()
            result = variant.run()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
            del result
        if variant.cleanup:
            variant.cleanup()
        return seconds

    def sample(self, variant: Variant, calls: int = 1) -> float:
        """The mean of `calls` timed calls."""
        return sum(self.once(variant) for _ in range(calls)) / calls

    def calls(self, variant: Variant, cost: float) -> int:
        """How many calls of `cost` seconds make one sample."""
        return 1 if self._flush is not None else max(1, min(100, math.ceil(self.least / max(cost, 1e-9))))


def interleave(
    variants: Sequence[Variant],
    timer: Timer,
    *,
    rounds: int = 30,
    at_least: int = 5,
    budget: float | None = None,
    warmup: int = 2,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Times every variant once a round, in rotating order; returns the samples by variant, one a round.

    Args:
        rounds: how many rounds.
        at_least: with a `budget` in seconds, rounds stop once it is spent, but never before this many.
        warmup: untimed calls of each variant beforehand.
        on_round: called after each round with the number of rounds done.
    """
    names = [v.name for v in variants]
    if len(set(names)) != len(names):
        raise ValueError(f"interleave: variants must have distinct names, got {names}")
    start = time.perf_counter()
    calls = {}
    for v in variants:
        cost = min(timer.once(v) for _ in range(max(1, warmup)))
        calls[v.name] = timer.calls(v, cost)
    samples: dict[str, list[float]] = {v.name: [] for v in variants}
    for done in range(rounds):
        for v in rotation(variants, done):
            samples[v.name].append(timer.sample(v, calls[v.name]))
        if on_round:
            on_round(done + 1)
        if budget is not None and done + 1 >= at_least and time.perf_counter() - start > budget:
            break
    return samples


def rotation(items: Sequence, turn: int) -> list:
    """`items` rotated by `turn`; every other full cycle runs backwards, so that no item always follows the same one."""
    count = len(items)
    turned = [items[(turn + k) % count] for k in range(count)]
    return turned[::-1] if (turn // count) % 2 else turned


def copy_variant(total_bytes: int, device: torch.device, name: str = "copy") -> Variant:
    """A copy between two preallocated buffers that reads and writes `total_bytes` together."""
    count = max(1, total_bytes // 8)  # float32, half of the bytes are read
    source = torch.ones(count, device=device)
    target = torch.zeros(count, device=device)
    return Variant(name, lambda: target.copy_(source))


def copy_bandwidth(device: torch.device, rounds: int = 15) -> float:
    """Bytes a second, read and written, of a copy that no cache holds; the median of `rounds`."""
    size = (2 << 30) if device.type == "cuda" else (128 << 20)
    variant = copy_variant(size, device)
    samples = interleave([variant], Timer(device), rounds=rounds)["copy"]
    return size / summarize(samples).median


def keep_pages() -> bool:
    """Makes the C library keep freed memory mapped, for the rest of the process; False where it cannot (not glibc).

    A large allocation is otherwise mapped anew each time, and its first touch costs a page fault every 4 KiB, which on
    virtual machines can exceed the time of a pass over it several times.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Bytes that `run`, a forward pass, saves for backward: each storage once, without those of `leave_out`.

    Parameters and buffers of the caller belong into `leave_out`, as does the input: they live anyway.
    """
    skipped = {t.untyped_storage()._cdata for t in leave_out}
    kept: list[Tensor] = []  # alive until the end, so that no storage's address is used twice
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
    """Device memory that `run` needs at its peak beyond what is allocated already; None on a CPU."""
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


# --- equivalence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One tensor under the rule err(fused) ≤ factor·err(eager) + floor, in the max norm and in L2."""

    tensor: str
    error: float
    eager_error: float
    bound: float
    l2_error: float
    l2_bound: float
    worst: tuple[int, ...]

    @property
    def passed(self) -> bool:
        return self.error <= self.bound and self.l2_error <= self.l2_bound  # False for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return (
            f"{self.tensor}: max error {self.error:.3g}, bound {self.bound:.3g} (eager {self.eager_error:.3g}), "
            f"worst at {self.worst}; L2 {self.l2_error:.3g}, bound {self.l2_bound:.3g}: {verdict}"
        )


def judge(
    name: str, fused: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype, terms: Tensor | None = None
) -> Verdict:
    """Applies the rule to one tensor.

    err is the distance from the float64 `oracle`. factor is 2, for parameter gradients in half precision 3. floor is 64
    units of rounding of the largest element in float32 and float64, where rounding is far below what is looked for, and
    one in half precision, where it is not. Where `terms` is Σ|terms| of a sum whose terms may cancel, it is at least 4
    units of that, except in half precision.
    """
    if fused.shape != oracle.shape or eager.shape != oracle.shape:
        raise ValueError(
            f"judge: {name} must have shape {tuple(oracle.shape)}, got {tuple(fused.shape)}, {tuple(eager.shape)}"
        )
    half = dtype in (torch.float16, torch.bfloat16)
    factor = 3.0 if half and name.endswith((".weight grad", ".bias grad")) else 2.0
    unit = torch.finfo(dtype).eps * (1 if half else 64)
    distance = [(t.double() - oracle).abs() for t in (fused, eager)]
    floor = unit * oracle.abs()
    if terms is not None and not half:
        floor = floor.maximum(4 * torch.finfo(dtype).eps * terms)
    worst = torch.unravel_index(distance[0].argmax(), oracle.shape)
    return Verdict(
        name,
        distance[0].max().item(),
        distance[1].max().item(),
        (factor * distance[1].max() + floor.max()).item(),
        distance[0].norm().item(),
        (factor * distance[1].norm() + floor.norm()).item(),
        tuple(int(i) for i in worst),
    )


def _watch_terms(block: nn.Module) -> dict[str, Tensor]:
    """Filled by the block's next backward: Σ|d·x̂| and Σ|d| of every BatchNorm in training, by its gradients' names."""
    found: dict[str, Tensor] = {}

    def watch(name: str, norm: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        normalised = (x - mean).mul_((variance + norm.eps).rsqrt())

        def sums(grad: Tensor) -> None:
            found[f"{name}.weight grad"] = (grad * normalised).abs().sum((0, 2, 3))
            found[f"{name}.bias grad"] = grad.abs().sum((0, 2, 3))

        output.register_hook(sums)

    for name, norm in block.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.training:
            norm.register_forward_hook(partial(watch, name))
    return found


class _ClearZero(nn.Module):
    """ReLU that first moves its input, channel by channel, so that no value is close to 0; `shifts` is by how much.

    Within a window of a twentieth of the root mean square around 0, the middle of the widest gap between two values
    becomes 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shifts: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        window = 0.05 * x.square().mean().sqrt().clamp_min(1e-6)
        inside = x.abs() < window
        channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1).expand_as(x)[inside]
        ends = torch.arange(channels, device=x.device)
        # One sort of them all: a channel's values lie within 1/4 of the channel's number.
        key = torch.cat((channel + x[inside] / (4 * window), ends - 0.25, ends + 0.25)).sort().values
        gaps, left = key.diff(), key[:-1].round().long()
        gaps = torch.where(key[1:].round().long() == left, gaps, -1.0)
        widest = torch.zeros(channels, dtype=x.dtype, device=x.device).scatter_reduce(0, left, gaps, "amax")
        middle = torch.zeros_like(widest)
        chosen = gaps == widest[left]
        middle[left[chosen]] = (key[:-1] + gaps / 2 - left)[chosen]
        self.shifts.append(-middle * 4 * window)
        return (x + self.shifts[-1].view(1, -1, 1, 1)).relu()


@torch.no_grad()
def clear_masks(block: nn.Module, x: Tensor) -> None:
    """Moves the BatchNorms' biases a little, in place, so that no ReLU of a training step on x is a matter of rounding.

    Where a pre-activation is within rounding of 0, two right implementations may take either side, and their gradients
    then differ by far more than rounding. Afterwards none is within some 1e-4 of 0.
    """
    probe = copy.deepcopy(block).double().train()
    clear = probe.relu = _ClearZero()
    probe(x.double())
    for shift, (name, _) in zip(clear.shifts, _main_norms(block), strict=True):
        getattr(block, name).bias += shift.to(block.conv1.weight.dtype)


def _main_norms(block: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in block.named_children() if isinstance(m, nn.BatchNorm2d)]


def check_block(
    fused: nn.Module,
    eager: nn.Module,
    oracle: nn.Module,
    x: Tensor,
    grad: Tensor | None,
    context: Callable[[], Any],
) -> list[Verdict]:
    """Runs the three modules on x, backward from `grad` if given, and judges output, gradients and running statistics.

    `oracle` is a float64 copy of `eager`. All three are changed (gradients, running statistics), so pass copies.
    """

    def run(module: nn.Module, source: Tensor, upstream: Tensor | None, around: Callable[[], Any]) -> dict[str, Tensor]:
        source = source.detach().requires_grad_(upstream is not None)
        with around(), torch.set_grad_enabled(upstream is not None):
            out = module(source)
        result = {"output": out.detach()}
        if upstream is not None:
            module.zero_grad(set_to_none=True)
            out.backward(upstream)
            result["input grad"] = source.grad
            result |= {f"{n} grad": p.grad for n, p in module.named_parameters()}
        return result | {n: b for n, b in module.named_buffers() if b.is_floating_point()}

    ours, theirs = (run(m, x, grad, context) for m in (fused, eager))
    terms = {} if grad is None else _watch_terms(oracle)
    exact = run(oracle, x.double(), None if grad is None else grad.double(), nullcontext)
    return [judge(n, ours[n], theirs[n], reference, x.dtype, terms.get(n)) for n, reference in exact.items()]


# --- rows -------------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """The fields of a row that say where and with what it was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "driver": _driver() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("torchvision", "triton", "fusedres")},
        },
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def busy_note(device: torch.device) -> str | None:
    """A warning for CPU timings taken while other processes want the cores; None where nothing is to be said."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cores:
        return None
    return (
        f"note: the machine is busy (load {load:.1f} on {cores} cores); threads that wait for a core scatter the times"
    )


def commit() -> str | None:
    """The checkout's commit, marked when files under version control differ from it; None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def row(where: dict[str, Any], summary: Summary, **fields: Any) -> dict[str, Any]:
    """A row with every key of ROW_KEYS; unknown fields are refused."""
    unknown = fields.keys() - set(ROW_KEYS)
    if unknown:
        raise ValueError(f"row: unknown fields {sorted(unknown)}")
    fields |= {"rounds": summary.rounds, "median_s": summary.median, "p20_s": summary.p20, "p80_s": summary.p80}
    moved, bandwidth, floor = (fields.get(k) for k in ("counted_bytes", "copy_bytes_per_s", "floor_bytes"))
    if moved:
        fields["bytes_per_s"] = moved / summary.median
    if bandwidth and floor:
        fields["percent_of_floor"] = 100 * floor / bandwidth / summary.median
    return {key: (where | fields).get(key) for key in ROW_KEYS}


def write_rows(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as one JSON list, a row a line."""
    for r in rows:
        missing = set(ROW_KEYS) ^ r.keys()
        if missing:
            raise ValueError(f"write_rows: fields missing or unknown: {sorted(missing)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_finite(r), ensure_ascii=False) for r in rows)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.get_num_threads()} threads)"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


# --- terminal ---------------------------------------------------------------------------------------------------------


class Progress:
    """A progress bar on stderr: tqdm's where it can be imported, and none unless stderr is a terminal."""

    def __init__(self, total: int) -> None:
        self._bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=total, leave=False, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}<{remaining}"
            )

    def step(self, text: str, amount: int = 1) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(amount)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the first two to the left, the others to the right."""
    widths = [max(len(r[k]) for r in [header, *rows]) for k in range(len(header))]
    for r in [header, *rows]:
        cells = (c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True)))
        print("  ".join(cells).rstrip())

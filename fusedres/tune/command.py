"""`python -m fusedres tune` measures block shapes on this device and writes the table that "auto" follows."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from fusedres import dispatch
from fusedres.backends import backend_for, use_backend
from fusedres.dispatch import Entry, Shape, Table
from fusedres.dispatch.store import cache_folder, family, file_name, read, update, versions, writable
from fusedres.tune.shapes import subjects
from fusedres.tune.timing import Timer
from fusedres.tune.ways import DTYPES, Bench, Case, Found, fastest

if TYPE_CHECKING:
    from fusedres.tune.configs import Configs

HELP = "measure what is fastest on this device, for auto to follow"
ROUNDS = 15
MINUTES_ON_CPU = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.description = (
        "Times every distinct block and stem of torchvision's models on this device: eager, and each fused way that "
        'agrees with eager. fuse()\'s "auto" follows the result in processes that start afterwards. A shape stays '
        "unfused if its fastest way is slower than eager (on a GPU: by more than 2%). The table is in "
        "$FUSEDRES_CACHE_DIR, else in $XDG_CACHE_HOME/fusedres, else in ~/.cache/fusedres. Each run adds to it; from "
        "runs with several backends the faster one is kept. Run nothing else on the device at the same time."
    )
    parser.add_argument(
        "--model", nargs="+", help="torchvision's models (default: GPU resnet50 resnet18, CPU resnet50)"
    )
    parser.add_argument("--batch", nargs="+", type=int, help="batch sizes (default: GPU 256 64 16, CPU 8)")
    parser.add_argument("--image-size", type=int, default=224, help="height and width of the images (default: 224)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=tuple(DTYPES),
        help="on a GPU float32 is without TF32, and tf32 is torch's default (default: GPU bfloat16, CPU float32)",
    )
    parser.add_argument(
        "--phase",
        nargs="+",
        choices=("train", "infer"),
        default=["train", "infer"],
        help="what to measure (default: both)",
    )
    parser.add_argument(
        "--backend",
        choices=("triton", "cuda", "cpu"),
        help="the kernels to measure (default: GPU triton, CPU cpu)",
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--minutes",
        type=float,
        help="share this time among the shapes, and stop after it; what was measured by then is written "
        f"(default: GPU no limit, CPU {MINUTES_ON_CPU} for each model)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table to this file instead")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit code: 1 if a way was wrong or nothing was measured, else 0.

    Raises:
        ValueError: an option does not fit the others or this machine.
    """
    device = _device(options.device)
    name = family(device)
    if name is None:
        raise ValueError(f"tune: --device must be cpu or a CUDA device, got {options.device}")
    on_gpu = device.type == "cuda"
    for option, values in (("--batch", options.batch or [1]), ("--image-size", [options.image_size])):
        if min(values) < 1:
            raise ValueError(f"tune: {option} must be at least 1, got {min(values)}")
    if options.minutes is not None and options.minutes <= 0:
        raise ValueError(f"tune: --minutes must be positive, got {options.minutes}")
    if "tf32" in (options.dtype or []) and not on_gpu:
        raise ValueError("tune: --dtype tf32 is for GPUs; measure float32")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # compare with eager's fastest algorithms
    backend = options.backend or ("triton" if on_gpu else "cpu")
    try:
        with use_backend(backend):
            backend_for(device)
    except RuntimeError as error:  # the backend does not serve this device
        raise ValueError(f"tune: --backend {backend}: {error}") from error
    models = options.model or (["resnet50", "resnet18"] if on_gpu else ["resnet50"])
    cases = [
        Case(subject, batch, dtype, phase)
        for dtype in options.dtype or ["bfloat16" if on_gpu else "float32"]
        for batch in options.batch or ([256, 64, 16] if on_gpu else [8])
        for phase in options.phase
        for subject in subjects(models, options.image_size)
    ]
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("tune: --backend triton needs Triton; install it")
    path = options.out or cache_folder() / file_name(name)
    try:
        writable(path)
    except (OSError, ValueError) as error:  # ValueError: the path has no file name
        raise ValueError(f"tune: {path} must be a file that can be written, got {error}; choose --out") from error
    minutes = options.minutes or (None if on_gpu else MINUTES_ON_CPU * len(models))
    seconds = None if minutes is None else 60 * minutes
    print(f"{name}, backend {backend}; writing {path}", flush=True)
    print(f"{'':<52}     eager ms  over fused  way", flush=True)
    # The bar is on stderr, and only on a terminal; lines pass above it.
    with tqdm(total=len(cases), unit="shape", leave=False, disable=None) as bar:
        tuning = Tuning(device, backend, path, seconds=seconds, say=lambda line: _print(bar, line), measured=bar.update)
        try:
            tuning.run(cases)
        except KeyboardInterrupt:
            tuning.finish(len(cases))
            raise
        return tuning.finish(len(cases))


def _print(bar: tqdm, line: str) -> None:
    bar.write(line)
    sys.stdout.flush()


def _device(name: str | None) -> torch.device:
    """Return the device with its index, as tensors have it."""
    try:
        return torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except RuntimeError as error:
        raise ValueError(f"tune: --device must be one that torch sees, got {name}: {error}") from error


class Tuning:
    """One run: measures cases one after the other and writes the table after each."""

    def __init__(
        self,
        device: torch.device,
        backend: str,
        path: Path,
        seconds: float | None = None,
        rounds: int = ROUNDS,
        tile_sizes: bool = True,
        say: Callable[[str], None] = lambda line: print(line, flush=True),
        measured: Callable[[], object] = lambda: None,
    ) -> None:
        self.device, self.backend, self.path, self.rounds = device, backend, path, rounds
        self.say, self.measured = say, measured  # called for each line, and after each case
        self.until = time.monotonic() + seconds if seconds else None
        self.entries: dict[Shape, Entry] = {}
        self.left_out: list[str] = []  # the ways and cases that were left out, and why
        name = family(device)
        assert name is not None
        self.name = name
        before = read(path, name)
        if before is not None and before.versions != versions():
            before = None
        self.known = set() if before is None else set(before.blocks)
        self.configs = {} if before is None else dict(before.configs)
        self._timer = Timer(device)
        self._sizes = self._tile_sizes() if tile_sizes and backend in ("triton", "cuda") else None

    def left(self) -> float:
        """Return the seconds that are left."""
        return float("inf") if self.until is None else self.until - time.monotonic()

    def run(self, cases: Sequence[Case]) -> None:
        """Measure the cases, first those that the file does not have, until the time is over."""
        ordered = sorted(cases, key=lambda case: case.shape in self.known)
        for done, case in enumerate(ordered):
            if self.left() <= 0:
                break
            share = self.left() / (len(ordered) - done)
            installed = dispatch.table(self.device)
            found = None
            try:
                found = self._found(case, share)
            except Exception as error:  # mostly out of memory: other cases may fit
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.synchronize()  # raises if the GPU is lost
                self._leave_out(f"{case}: {type(error).__name__}: {error}".partition("\n")[0])
            finally:
                dispatch.install(self.device, installed)
            if found is not None:
                self._keep(case, found)
            self.measured()

    def _tile_sizes(self) -> Configs:
        from fusedres.tune.configs import Configs  # imports Triton

        return Configs(self.device, self.rounds, self.left, self.configs)

    def _found(self, case: Case, seconds: float) -> Found:
        """Measure a case in about this many seconds."""
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = case.dtype == "tf32"
        bench = Bench(case, self.device, self.backend)
        if self._sizes is not None:
            self._sizes.visit(bench, bench.visits())
            for wrong in self._sizes.wrong:
                self._leave_out(wrong)
            self._sizes.wrong.clear()
            self.configs = self._sizes.found
        found = fastest(bench, self.configs, self._timer, self.rounds, seconds)
        for wrong in found.wrong:
            self._leave_out(f"{case}: {wrong}")
        return found

    def _keep(self, case: Case, found: Found) -> None:
        """Write and print what was found; raise ValueError if it cannot be written."""
        try:
            update(self.path, self.table({case.shape: found.entry}))
        except OSError as error:
            raise ValueError(f"tune: {self.path} cannot be written, got {error}; make room or choose --out") from error
        self.entries[case.shape] = found.entry
        gain = found.entry.eager_over_way
        times = "" if gain is None or found.eager_s is None else f"{1e3 * found.eager_s:13.3f}  {gain:10.2f}"
        self.say(f"{case!s:<52}{times:<25}  {found.entry.way}")

    def _leave_out(self, what: str) -> None:
        self.left_out.append(what)
        self.say(f"left out: {what}")

    def table(self, entries: dict[Shape, Entry]) -> Table:
        """Return a table of this device with these entries and the current date."""
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Table(self.name, self.backend, versions(), date, entries, self.configs)

    def finish(self, of: int) -> int:
        """Print a summary and return the command's exit code."""
        unfused = sum(entry.way.backend is None for entry in self.entries.values())
        self.say(
            f"{len(self.entries)} of {of} measured, {unfused} of them stay unfused, "
            f"{len(self.configs)} tile sizes; {self.path}"
        )
        return int(bool(self.left_out) or not self.entries)

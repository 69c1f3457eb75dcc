"""Verifies and measures everything on a GPU with one command, most valuable first, in the minutes there are.

    python benchmarks/gpu_suite.py --out DIR                 nine minutes on the GPU
    python benchmarks/gpu_suite.py --out DIR --only ops      these steps, anew
    python benchmarks/gpu_suite.py --out DIR --pack PACK     with the wheel and the kernels of gpu_pack.py
    python benchmarks/gpu_suite.py --out DIR --device cpu --tiny    the same path on toy shapes, to see that it runs

Steps: facts (device, copy bandwidth, matrix product), right (every op at full size: all elements, and the same bits
twenty times), miscompiled (products with every wgmma waited for, and float32 in eight warps), tests (failures of the
last run first), sanitizer (compute-sanitizer on a few), ops (every op and every candidate config), blocks, models,
profile (a training step by kernel), dispatch (the table of what was fastest, and blocks that follow it beside eager).
Each runs in its own process with its share of the minutes and writes DIR/STEP.jsonl a row at a time; a crash or a
timeout is a row. Called again with the same DIR it goes on where it was: finished steps are skipped. Kernels are
compiled on idle cores meanwhile (Hopper), but for those of a pack. All output is in DIR/log.txt; a table comes last.
Nothing is installed but the wheel of a pack that fits this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
from suite.journal import Journal

if TYPE_CHECKING:
    from suite.settings import Settings

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Step:
    """A step's share of the time, and its module's function of cases."""

    share: float
    module: str
    cases: str = "cases"


STEPS = {
    "facts": Step(3, "facts"),
    "right": Step(14, "right"),
    "miscompiled": Step(8, "miscompiled"),
    "tests": Step(8, "checks"),
    "sanitizer": Step(9, "checks", "sanitizer_cases"),
    "ops": Step(30, "ops"),
    "blocks": Step(16, "block_rows"),
    "models": Step(15, "models"),
    "profile": Step(3, "profile"),
    "dispatch": Step(5, "proposal"),
}
LEAST = 25.0  # seconds of a step: imports alone take some
CRASHES = 4  # of one case, then it is left
# Seconds at least of a case on a CPU, where nothing is measured and other processes may have the cores.
UNHURRIED = 4 * 3600.0


# --- the process of one step ------------------------------------------------------------------------------------------


def work(step: str, out: Path, device: str, tiny: bool, until: float, pack: Path | None) -> int:
    """Runs the step's cases that have not ended; kernels of a pack are not compiled."""
    from suite.settings import Settings

    if device == "cpu":
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    settings = Settings(step, out, torch.device(device), tiny, until)
    with contextlib.ExitStack() as stack:
        if pack is not None:
            from suite.pack import misfit, taken

            reason = misfit(pack, capability_of(device))  # now that the package is there
            if reason is None:
                stack.enter_context(taken(pack))
            settings.journal.append(event="pack", why=reason)
        _run_cases(settings)
    return 0


def _run_cases(settings: Settings) -> None:
    from importlib import import_module

    from suite.settings import first_lines

    ended = settings.journal.ended()
    for case in getattr(import_module(f"suite.{STEPS[settings.step].module}"), STEPS[settings.step].cases)(settings):
        if case.name in ended:
            continue
        if settings.left < 1:
            return
        limit = case.limit if settings.on_gpu else max(case.limit, UNHURRIED)
        settings.journal.append(case=case.name, event="start", limit=limit)
        begun, event = time.perf_counter(), "done"
        try:
            case.run()
        except Exception as error:
            event = "failed"
            settings.row(case.name, error=f"{type(error).__name__}: {first_lines(str(error))}")
            if settings.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()  # raises where the GPU is lost to this process, which ends
        settings.journal.append(case=case.name, event=event, s=time.perf_counter() - begun)
    settings.journal.append(event="end", why="finished")


# --- the command ------------------------------------------------------------------------------------------------------


class Child:
    """A process group of its own, which is killed whole."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Ends it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def compiling(device: str, tiny: bool, log: Path, pack: Path | None) -> Iterator[Callable[[], None]]:
    """Kernels being compiled beside what runs; gives what stops it."""
    child: Child | None = None
    if device.startswith("cuda") and not tiny and torch.cuda.get_device_capability(device) == (9, 0):
        # for another GPU meta tensors give other candidates than its own
        processes = max(1, (os.cpu_count() or 2) // 2 - 1)
        code = f"from suite.warm import main; main((256, 64), {processes}, {str(pack or '')!r})"
        command = ["nice", "-n", "10", sys.executable, "-c", code]
        child = Child(command, log, os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})

    def stop() -> None:
        if child is not None:
            child.kill()

    try:
        yield stop
    finally:
        stop()


def supervise(step: str, options: argparse.Namespace, seconds: float, log: Path) -> str:
    """Runs a step within its time, again after a crash; returns how it ended."""
    journal, until = Journal(options.out, step), time.time() + seconds
    environment = dict(os.environ)
    if options.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(HERE / "gpu_suite.py"), "--out", str(options.out), "--device", options.device]
    command += ["--worker", step, "--until", str(until), *(["--tiny"] if options.tiny else [])]
    command += ["--pack", str(options.pack)] if options.pack else []
    crashes: dict[str, int] = {}
    while time.time() < until:
        child = Child(command, log, environment)
        try:
            why = _watch(child, journal, until)
        finally:  # after Ctrl-C too, which does not reach it
            child.kill()
        if why is None:
            return "finished" if journal.finished() else "time was up"
        if why == "time was up":
            break
        case = (journal.running() or {}).get("case", "start")
        crashes[case] = crashes.get(case, 0) + 1
        at = next((row["what"] for row in reversed(journal.lines()) if row.get("event") == "trying"), None)
        journal.append(case=case, error=why, at=at, tail=_tail(log))
        journal.append(case=case, event="crash")
        if case == "start" or crashes[case] >= CRASHES:
            journal.append(case=case, event="hung" if why.startswith("hung") else "crashed")
        if case == "start":
            return why
    journal.append(event="end", why="time was up")
    return "time was up"


def _watch(child: Child, journal: Journal, until: float) -> str | None:
    """Waits; None where the process ended well, else what went wrong."""
    begun, seen = time.time(), None
    while child.running():
        time.sleep(0.05 if time.time() - begun < 2 else 0.5)
        if time.time() > until:
            return "time was up"
        case = journal.running()
        if case is None:
            seen = None
        elif seen is None or seen[0] != case["case"]:
            seen = (case["case"], time.time())
        elif time.time() - seen[1] > case["limit"]:
            return f"hung: {case['limit']:.0f} s were over"
    code = child.process.returncode
    return None if code == 0 else f"the process ended with exit code {code}"


def _tail(log: Path) -> str:
    return log.read_bytes()[-1200:].decode(errors="replace")


def install(pack: Path, device: str, log: Path) -> str | None:
    """Installs the wheel of a pack; why not, None where it did."""
    from suite.pack import misfit

    reason = misfit(pack, capability_of(device))
    wheels = sorted(pack.glob("*.whl"))
    if reason is None and wheels:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", "--no-index"]
        with log.open("ab") as file:
            done = subprocess.run([*command, str(wheels[-1])], stdout=file, stderr=subprocess.STDOUT, check=False)
        reason = f"pip failed; see {log}" if done.returncode else None
    return reason


def capability_of(device: str) -> int:
    """As a pack has it; 0: no GPU."""
    if not device.startswith("cuda"):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def begin(out: Path, step: str) -> None:
    """Starts a step anew; tests that failed are kept, to run first."""
    from suite.checks import failures

    journal = Journal(out, step)
    failed = failures(journal)
    journal.path.unlink(missing_ok=True)
    if failed:
        journal.append(event="before", failed=failed)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where rows and the log go")
    parser.add_argument("--minutes", type=float, default=9, help="for everything (9)")
    parser.add_argument("--only", nargs="+", choices=tuple(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--pack", type=Path, metavar="PACK", help="what gpu_pack.py built, taken where it fits")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (cuda)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, nothing worth measuring")
    parser.add_argument("--worker", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device; --device cpu --tiny shows that the suite runs")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu runs toy shapes only, in Triton's interpreter: add --tiny")
    if options.minutes <= 0:
        parser.error(f"--minutes: must be positive, got {options.minutes}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the steps and prints the table; 1 where something is wrong."""
    options = parse(argv)
    if options.worker:
        return work(options.worker, options.out, options.device, options.tiny, options.until, options.pack)
    from suite.summary import print_summary

    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "log.txt"
    deadline = time.time() + 60 * options.minutes
    todo = list(options.only or STEPS)
    if options.only:
        for step in todo:
            begin(options.out, step)
    todo = [step for step in STEPS if step in todo and not Journal(options.out, step).finished()]
    if options.pack:
        reason = install(options.pack, options.device, log)
        if reason:
            print(f"--pack is not taken: {reason}", flush=True)
            options.pack = None
    with compiling(options.device, options.tiny, log, options.pack) as stop:
        for index, step in enumerate(todo):
            if step in ("ops", "blocks", "models", "profile"):  # their timings want the cores
                stop()
            left = deadline - time.time()
            share = STEPS[step].share / sum(STEPS[s].share for s in todo[index:])
            begun = time.time()
            ended = supervise(step, options, max(LEAST, left * share), log)
            print(f"{step}: {ended}, {time.time() - begun:.0f} s", flush=True)
    return print_summary(options.out, list(STEPS))


if __name__ == "__main__":
    sys.exit(run(main, "gpu_suite.py"))

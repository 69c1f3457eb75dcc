"""Verifies and measures everything on a GPU in two calls of a few minutes, the most valuable steps first.

    python benchmarks/gpu_suite.py --call first --out DIR --pack PACK
    python benchmarks/gpu_suite.py --call second --after DIR --out DIR2 --pack PACK
    python benchmarks/gpu_suite.py --call first --dry-run                      print the schedule; needs no GPU
    python benchmarks/gpu_suite.py --only sanitizer all-ops --out DIR          run these steps again
    python benchmarks/gpu_suite.py --call first --out DIR --device cpu --tiny  the same steps on toy shapes

The first call takes 330 seconds: facts (device, copy bandwidth, matrix product), right (every op at full size: all
elements are checked, and 20 calls must give the same bits), miscompiled (products that wait for every wgmma, and
float32 in eight warps), train (images/s of ResNet-50, also compiled and in graphs), profile (a training step by
kernel), tests.
The second call takes 350 seconds: again (the errors of the first call), ops (candidates of the heaviest problems),
blocks (each way at three batches), dispatch (the table of the fastest ways, and blocks that follow it), models
(training and inference with "auto", plain and in graphs).
Only with --only: all-right, all-ops, all-blocks, all-models (every op, dtype, batch, candidate and rival), sanitizer.

Each step runs in its own process, up to a fixed second of the call, and appends rows to DIR/STEP.jsonl. A crash or a
timeout is a row, too. The same command with the same DIR continues an interrupted call and skips finished steps. All
output is in DIR/log.txt. A table is printed at the end. The package and the kernels come from PACK, which gpu_pack.py
builds on a machine without a GPU. If PACK does not fit this machine, they are built before the clock starts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long


import torch
from suite.journal import Journal
from suite.schedule import CALLS, STEPS, Step

if TYPE_CHECKING:
    from suite.settings import Settings

HERE = Path(__file__).resolve().parent
CRASHES = 4  # a case that crashes so often is given up
# The least limit of a case on a CPU, in seconds: nothing is measured there, and other processes may use the cores.
UNHURRIED = 4 * 3600.0


# --- the process of one step ------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> int:
    """Run the unfinished cases of a step, after reading from stdin until when it may run."""
    from suite.pack import misfit, taken
    from suite.settings import Settings

    step = next(step for step in steps_of(options) if step.name == options.worker)
    import_module(f"suite.{step.module}")  # takes long; meanwhile another step uses the GPU
    said = sys.stdin.readline()
    if not said.strip():
        return 0
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(min(2, os.cpu_count() or 1))
    settings = Settings(step.name, options.out, device, options.tiny, float(said), options.after)
    reason = misfit(options.pack, capability_of(options.device)) if options.pack else "there is none"
    if reason is None:
        settings.pack = options.pack
        with taken(options.pack) as counts:
            _run_cases(settings, step)
        settings.journal.append(event="pack", **counts)
    else:
        settings.journal.append(event="pack", why=reason)
        _run_cases(settings, step)
    return 0


def _run_cases(settings: Settings, step: Step) -> None:
    from suite.settings import first_lines

    ended = settings.journal.ended()
    for case in step.list_cases(settings):
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
                torch.cuda.synchronize()  # raises if this process has lost the GPU, and so ends it
        settings.journal.append(case=case.name, event=event, s=time.perf_counter() - begun)
    settings.journal.append(event="end", why="finished")


# --- supervising a step -----------------------------------------------------------------------------------------------


class Child:
    """A process in its own process group; `kill` ends the whole group."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self.killed = False

    def begin(self, until: float) -> None:
        """Tell the process until when it may run. Before that it only imports."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has died
            self.process.stdin.write(f"{until}\n".encode())
            self.process.stdin.close()

    def running(self) -> bool:
        """Whether the process has not ended."""
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process and all processes that it started."""
        if not self.killed:  # later another process may have its number
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def start(step: str, options: argparse.Namespace) -> Child:
    """Start the process of a step, which imports its modules and waits for `begin`."""
    command = [sys.executable, str(HERE / "gpu_suite.py"), "--out", str(options.out), "--device", options.device]
    command += ["--worker", step, *(["--tiny"] if options.tiny else [])]
    for name in ("call", "after", "pack"):
        if getattr(options, name):
            command += [f"--{name}", str(getattr(options, name))]
    # torch.compile would set a different folder in its process
    environment = {"TRITON_CACHE_DIR": str(Path.home() / ".triton" / "cache")} | os.environ
    if options.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1"}
    return Child(command, options.out / "log.txt", environment)


def supervise(step: str, options: argparse.Namespace, until: float, child: Child) -> str:
    """Run a step within its time, and start it again after a crash; return how it ended."""
    journal, log = Journal(options.out, step), options.out / "log.txt"
    crashes: dict[str, list[str | None]] = {}  # case → what was tried at each crash
    while time.time() < until:
        child.begin(until)
        try:
            why = _watch(child, journal, until)
        finally:  # also after Ctrl-C, which does not reach the child
            child.kill()
        if why is None:
            return "finished" if journal.finished() else "time was up"
        if why == "time was up":
            break
        case = (journal.running() or {}).get("case", "start")
        of_case = crashes.setdefault(case, [])
        at = next((row["what"] for row in reversed(journal.lines()) if row.get("event") == "trying"), None)
        journal.append(case=case, error=why, at=at, tail=_tail(log))
        journal.append(case=case, event="crash")
        if case == "start" or at in of_case or len(of_case) + 1 == CRASHES:
            journal.append(case=case, event="hung" if why.startswith("hung") else "crashed")
        if case == "start":
            return why
        of_case.append(at)
        child = start(step, options)
    journal.append(event="end", why="time was up")
    return "time was up"


def _watch(child: Child, journal: Journal, until: float) -> str | None:
    """Wait for the process; return None if it ended well, else what went wrong."""
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


def capability_of(device: str) -> int:
    """Return the capability in the form of a pack, for example 90; 0: no GPU."""
    if not device.startswith("cuda"):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@contextlib.contextmanager
def ready(options: argparse.Namespace) -> Iterator[float]:
    """Inside, the package is installed, and options.pack fits or is None; yield the seconds that building took."""
    from suite.pack import misfit

    log, capability, building = options.out / "log.txt", capability_of(options.device), time.time()
    if options.pack:
        reason, wheels = misfit(options.pack, capability), sorted(options.pack.glob("*.whl"))
        if reason is None and find_spec("fusedres") is None and wheels and not _pip(log, "--no-index", str(wheels[-1])):
            reason = f"pip failed; see {log}"
        reason = reason or misfit(options.pack, capability)  # now of the package, too, as it is installed
        if reason:
            print(f"--pack is not taken: {reason}", flush=True)
            options.pack = None
        else:
            building = time.time()
    if find_spec("fusedres") is None and not _pip(log, "--no-build-isolation", str(HERE.parent)):
        raise SystemExit(f"gpu_suite.py: the package does not install; see {log}")
    with tempfile.TemporaryDirectory() as folder:
        if options.call and not options.pack and not options.tiny and capability == 90:
            options.pack = _built(Path(folder), options.call, log)
        yield time.time() - building


def _pip(log: Path, *arguments: str) -> bool:
    with log.open("ab") as file:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", *arguments]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    invalidate_caches()
    return done.returncode == 0


def _built(folder: Path, call: str, log: Path) -> Path | None:
    with log.open("ab") as file:
        command = [sys.executable, str(HERE / "gpu_pack.py"), "--out", str(folder), "--call", call, "--no-wheel"]
        built = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode == 0
    print("kernels are compiled" if built else f"kernels do not compile; see {log}", flush=True)
    return folder if built else None


# --- the command ------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--call", choices=tuple(CALLS), help="run the steps of a call, each up to its fixed second")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(STEPS),
        metavar="STEP",
        help=f"run these steps without a time limit: {', '.join(STEPS)}",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the rows and the log")
    parser.add_argument("--after", type=Path, metavar="DIR", help="the --out of the first call; its rows are read")
    parser.add_argument(
        "--pack", type=Path, metavar="PACK", help="the folder that gpu_pack.py built; used if it fits this machine"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the schedule; with --pack, launch it on a stubbed driver"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, only to see that everything runs")
    parser.add_argument("--worker", choices=tuple(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.worker and (options.call is None) == (options.only is None):
        parser.error("one of --call and --only is needed")
    if options.dry_run:
        if options.call is None:
            parser.error("--dry-run needs --call")
        return options
    if options.out is None:
        parser.error("--out DIR is needed")
    if options.after is not None and not options.after.is_dir():
        parser.error(f"--after: no folder {options.after}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device: torch sees no CUDA device; --device cpu --tiny shows that the suite runs")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu runs toy shapes only, in Triton's interpreter: add --tiny")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the steps and print the table; return 1 if something is wrong."""
    begun = time.time()
    options = parse(argv)
    if options.worker:
        return work(options)
    if options.dry_run:
        from suite.rehearsal import rehearse

        return rehearse(options.call, options.pack)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or ():
        Journal(options.out, name).path.unlink(missing_ok=True)
    with ready(options) as building:
        run_steps(options, begun + building)
    from suite.summary import print_summary

    return print_summary(options.out, options.after)


def steps_of(options: argparse.Namespace) -> list[Step]:
    """Return the steps of this run, in order."""
    return list(CALLS[options.call]) if options.call else [STEPS[name] for name in options.only or [options.worker]]


def run_steps(options: argparse.Namespace, begun: float) -> None:
    """Run each step in its own process, which imports its modules while the step before runs."""
    timed = options.call and options.device.startswith("cuda")

    def end(step: Step) -> float:
        return begun + step.by if timed else float("inf")

    steps = [step for step in steps_of(options) if not Journal(options.out, step.name).finished()]
    todo = [step for step in steps if not step.beside]
    with contextlib.ExitStack() as stack:

        def started(step: Step) -> Child:
            child = start(step.name, options)
            stack.callback(child.kill)
            return child

        def settle_others() -> None:
            while beside:
                step, child = beside.pop()
                settle(step, child, options, end(step))

        beside = [(step, started(step)) for step in steps if step.beside]
        for step, child in beside:
            child.begin(end(step))
        ahead = started(todo[0]) if todo else None
        for index, step in enumerate(todo):
            child = ahead
            if step.timed:
                settle_others()
            ahead = started(todo[index + 1]) if index + 1 < len(todo) else None
            since = time.time()
            ended = supervise(step.name, options, end(step), child)
            print(f"{time.time() - begun:4.0f} s  {step.name}: {ended}, {time.time() - since:.0f} s", flush=True)
        settle_others()


def settle(step: Step, child: Child, options: argparse.Namespace, until: float) -> None:
    """Wait until a step that runs beside the others has ended, at most until its time."""
    journal = Journal(options.out, step.name)
    why = _watch(child, journal, until)
    child.kill()
    if why not in (None, "time was up"):
        journal.append(
            case=(journal.running() or {}).get("case", "start"), error=why, tail=_tail(options.out / "log.txt")
        )
    if not journal.finished():
        journal.append(event="end", why=why or "time was up")


if __name__ == "__main__":
    sys.exit(run(main, "gpu_suite.py"))

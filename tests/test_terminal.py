"""Commands end quietly, with the usual exit codes, when their reader, the terminal or the disk is gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from processes import HANG, interruptible

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py"))
COMMANDS = [path for path in SCRIPTS if '__name__ == "__main__":' in path.read_text()]
# Output is buffered as for users, so that some of it is written only at the end.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
# A command with a short main() instead of the real work.
TOY = """
import sys
sys.path.insert(0, {folder!r})
from terminal import begin, run
begin()
import os, signal, time
def main():
    {body}
sys.exit(run(main, "toy", "stopped"))
"""


def in_shell(redirection: str, *command: str, has_reader: bool = True, **environment: str) -> tuple[int, str, str]:
    """Run a command in a shell; return exit code (of the first program of a pipe), output and errors."""
    out = subprocess.PIPE
    if not has_reader:  # the reader is gone before the first line, even on a busy machine
        reader, out = os.pipe()
        os.close(reader)
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}; exit "${{PIPESTATUS[0]}}"', "bash", sys.executable, *command],
        stdout=out, stderr=subprocess.PIPE, text=True, timeout=HANG, check=False, cwd=ROOT,
        env=ENVIRONMENT | environment, preexec_fn=interruptible,
    )  # fmt: skip
    if not has_reader:
        os.close(out)
    return done.returncode, done.stdout or "", done.stderr


def toy(body: str, redirection: str = "", has_reader: bool = True, **environment: str) -> tuple[int, str, str]:
    """Do the same for a command with this main()."""
    code = TOY.format(folder=str(ROOT / "fusedres"), body=body)
    return in_shell(redirection, "-c", code, has_reader=has_reader, **environment)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_a_reader_that_is_gone_is_no_error(redirection: str, lines: int, unbuffered: str) -> None:
    body = f"[print('line') for _ in range({lines})]; return 0"
    assert toy(body, redirection, has_reader=False, PYTHONUNBUFFERED=unbuffered) == (141, "", "")


def test_help_for_a_reader_that_is_gone() -> None:
    body = "import argparse; argparse.ArgumentParser().parse_args(['--help'])"
    assert toy(body, has_reader=False) == (141, "", "")


def test_another_pipe_that_breaks_is_a_fault() -> None:
    code, _, err = toy("r, w = os.pipe(); os.close(r); os.write(w, b'x')", "| cat")
    assert code == 1 and "BrokenPipeError" in err


def test_a_reader_that_is_gone_does_not_hide_a_failure() -> None:
    assert toy("print('line'); return 3", has_reader=False) == (3, "", "")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_full_disk_is_one_sentence(lines: int) -> None:
    code, _, err = toy(f"[print('line') for _ in range({lines})]", "> /dev/full")
    assert code == 2 and re.fullmatch(r"toy: error: .*No space left on device\n", err)


def test_what_the_system_refuses_is_one_sentence() -> None:
    assert toy("open('/no/such/file')") == (2, "", "toy: error: [Errno 2] No such file or directory: '/no/such/file'\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_the_null_device(closed: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    body = f"file = open({str(path)!r}, 'w'); print('out'); print('err', file=sys.stderr); os.write(1, b'raw'); "
    body += "os.write(2, b'raw'); file.write('content'); assert not sys.stdin or sys.stdin.fileno() == 0"
    code, out, err = toy(body, closed)
    assert (code, path.read_text()) == (0, "content")
    assert ("out" in out, "err" in err) == (" >" not in f" {closed}", "2>" not in closed)


def test_an_interruption_says_one_line() -> None:
    assert toy("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)") == (130, "", "\nstopped\n")
    assert toy("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", "2>&-") == (130, "", "")
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN); os.kill(os.getpid(), signal.SIGINT); print('on')"
    assert toy(ignored) == (0, "on\n", "")


def test_a_second_interruption_ends_what_the_first_one_waits_for() -> None:
    once = "os.kill(os.getpid(), signal.SIGINT)"
    code = f"""
    try:
        {once}; time.sleep(9)
    finally:
        {once}; time.sleep(9)"""
    assert toy(code) == (130, "", "")


@pytest.mark.parametrize(("leaving", "code", "err"), [("sys.exit(3)", 3, ""), ("sys.exit('why')", 1, "why\n"),
                                                      ("sys.exit()", 0, ""), ("return None", 0, "")])  # fmt: skip
def test_exit_codes_pass(leaving: str, code: int, err: str) -> None:
    assert toy(leaving) == (code, "", err)


def test_faults_keep_their_traceback() -> None:
    code, _, err = toy("raise ValueError('a fault')")
    assert code == 1 and "Traceback" in err and "ValueError: a fault" in err


def test_an_encoding_that_lacks_characters_is_no_error() -> None:
    code, out, err = toy("print('2 ± 1'); print('²', file=sys.stderr)", PYTHONIOENCODING="ascii")
    assert (code, out, err) == (0, "2 \\xb1 1\n", "\\xb2\n")


# The commands themselves


def test_every_script_ends_so() -> None:
    assert {path.name for path in COMMANDS} >= {"train.py", "bench_block.py", "gpu_suite.py", "report.py"}
    for path in COMMANDS:
        text = path.read_text()
        assert f'run(main, "{path.name}"' in text, path
        before = re.findall(r"^(?:from|import) (\w+)", text.partition("begin()")[0], re.MULTILINE)
        assert set(before) <= sys.stdlib_module_names | {"terminal", "shared", "common"}, path


@pytest.mark.parametrize(
    "command",
    [["-m", "fusedres", "info"], ["-m", "fusedres", "tune", "--help"], ["benchmarks/traffic.py"]],
    ids=" ".join,
)
def test_commands_for_a_reader_that_is_gone(command: list[str]) -> None:
    assert in_shell("", *command, has_reader=False) == (141, "", "")


@pytest.mark.parametrize("command", [["-m", "fusedres", "tune"], ["examples/train.py"], ["benchmarks/traffic.py"]])
def test_an_interruption_while_a_command_is_imported_is_silent(command: list[str]) -> None:
    """The interruption comes while torch is imported."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=ENVIRONMENT, preexec_fn=interruptible,
    )  # fmt: skip
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert (*process.communicate(timeout=HANG), process.returncode) == ("", "", 130)


def test_training_is_interrupted_quietly_with_its_workers(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole group of processes; then training runs again, without a reader of its output."""
    pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
    for i in range(24):
        (tmp_path / "images" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    command = [sys.executable, "examples/train.py", "--arch", "resnet10", "--no-fused", "--workers", "2"]
    command += ["--data", str(tmp_path / "images"), "--image-size", "8", "--batch", "4", "--epochs", "1000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=ENVIRONMENT, start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stdout is not None
    assert "epoch   1/1000" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert (process.returncode, err) == (130, "\ninterrupted: the same command with --resume continues\n")
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)
    code, out, err = in_shell("| head -n 1", *command[1:], "--resume", "--out", str(tmp_path / "out"))
    assert (code, err) == (141, "") and "resumed in epoch 2" in out

"""How a command ends where the terminal, or whoever reads its output, ends first: without a traceback.

    130    Ctrl-C (what a shell shows of a program that SIGINT ended), after one line on standard error
    141    the reader of the output is gone, as in `... | head -1` (what a shell shows after SIGPIPE), silently
    2      the system refuses to read or write a file, a full disk for example: one sentence on standard error

Only Python's own library is used, so that this can be loaded before anything that takes long to import.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TextIO

REFUSED, INTERRUPTED, READER_GONE = 2, 130, 141


def begin() -> None:
    """Makes Ctrl-C end the process at once and silently, until `run`: for the time of a script's imports.

    Also opens the null device in place of standard streams that the caller has closed: the next file that is opened
    would otherwise take a stream's number, and get what libraries print.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody's
        signal.signal(signal.SIGINT, _leave)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(_null(number), True)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def run(main: Callable[[], int | None], name: str, interrupted: str = "interrupted") -> int:
    """The exit code of a command; see the head of this file.

    Args:
        main: the command. What it raises of the kinds above is told; anything else passes.
        name: the command's, before its errors.
        interrupted: what is said after Ctrl-C.
    """
    begin()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)
    for stream in _outputs():
        if stream.errors == "strict":  # an encoding that lacks ± or ² is no reason to fail
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    try:
        code = _code(main, name, interrupted)
    finally:
        if signal.getsignal(signal.SIGINT) in (_interrupt, _leave):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # what is left is the interpreter's end
    return _flush(code, name)


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: object) -> None:
    """Ends the command; the second time at once, in whatever the first one has to clean up."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _code(main: Callable[[], int | None], name: str, interrupted: str) -> int:
    try:
        return main() or 0
    except SystemExit as leaving:  # argparse's, or a message
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        _say(str(leaving.code))
        return 1
    except KeyboardInterrupt:
        _say(f"\n{interrupted}")
        return INTERRUPTED
    except BrokenPipeError:
        if not any(map(_reader_is_gone, _outputs())):
            raise  # another pipe's, which is a fault
        return READER_GONE
    except OSError as error:
        _say(f"{name}: error: {error}")
        return REFUSED


def _flush(code: int, name: str) -> int:
    """Writes what is buffered, so that the interpreter finds nothing to complain of; the exit code."""
    for stream in _outputs():
        try:
            stream.flush()
        except OSError as error:
            _null(stream.fileno())  # takes what is left in the buffer
            if not isinstance(error, BrokenPipeError):
                _say(f"{name}: error: the output cannot be written: {error.strerror}")
                code = code or REFUSED
            elif stream is sys.stdout:
                code = code or READER_GONE
    return code


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _outputs() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None and not stream.closed]


def _reader_is_gone(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # errors are always told
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _null(number: int) -> int:
    """Opens the null device as this file descriptor, which it returns."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    return number

"""How a command ends, without a traceback, after Ctrl-C, without a reader of its output, or with a refused file.

    130    Ctrl-C: prints one line on standard error (the code that a shell shows after SIGINT)
    141    the reader of the output is gone, as in `... | head -1`: prints nothing (the code that a shell shows after
           SIGPIPE)
    2      the system refuses to read or write a file, for example on a full disk: prints one sentence on standard error

This module uses only Python's standard library, so that it loads before anything that takes long to import.
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
    """Make Ctrl-C end the process at once and silently while a script imports, until it calls `run`.

    Also open the null device for standard streams that the caller has closed. Otherwise the next opened file would get
    the number of such a stream, and libraries would print into it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, or handled by other code
        signal.signal(signal.SIGINT, _leave)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(_null(number), True)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def run(main: Callable[[], int | None], name: str, interrupted: str = "interrupted") -> int:
    """Run a command and return its exit code; see the head of this file.

    Args:
        main: the command. Exceptions of the kinds above become a message and a code; all others pass through.
        name: the command's name, printed before its errors.
        interrupted: the line to print after Ctrl-C.
    """
    begin()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)
    for stream in _outputs():
        if stream.errors in ("strict", "surrogateescape"):  # do not fail because an encoding has no ± or ²
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]
    try:
        code = _code(main, name, interrupted)
    finally:
        if signal.getsignal(signal.SIGINT) in (_interrupt, _leave):
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # only the interpreter's shutdown is left
    return _flush(code, name)


def _leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)


def _interrupt(number: int, frame: object) -> None:
    """End the command; a second Ctrl-C ends it at once, even during the clean-up after the first."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _code(main: Callable[[], int | None], name: str, interrupted: str) -> int:
    try:
        return main() or 0
    except SystemExit as leaving:  # raised by argparse, or with a message
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        _say(str(leaving.code))
        return 1
    except KeyboardInterrupt:
        _say(f"\n{interrupted}")
        return INTERRUPTED
    except BrokenPipeError:
        if not any(map(_reader_is_gone, _outputs())):
            raise  # it came from another pipe, which is a bug
        return READER_GONE
    except OSError as error:
        _say(f"{name}: error: {error}")
        return REFUSED


def _flush(code: int, name: str) -> int:
    """Write what is buffered, so that the interpreter does not report errors at its end; return the exit code."""
    for stream in _outputs():
        try:
            stream.flush()
        except OSError as error:
            _null(stream.fileno())  # receives what is left in the buffer
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
    poll.register(stream.fileno(), 0)  # errors are always reported
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _null(number: int) -> int:
    """Open the null device as this file descriptor and return the descriptor."""
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    return number

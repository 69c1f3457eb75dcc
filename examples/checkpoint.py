"""Checkpoints for train.py: written completely or not at all, checked bit by bit, read without running code from them.

A checkpoint is the zip archive that torch.save writes; the comment at its end is a checksum of everything before it.
"""

import hashlib
import io
import os
import random
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import UsageError, shown
from outputs import write
from shared import files

_MARK = b"sha256 of train.py's checkpoint: "
_CHECKSUM = len(_MARK) + 64
_LENGTH = 2  # the last bytes of a zip archive without a comment: the length of the comment


def save(state: dict[str, Any], path: Path) -> None:
    """Write state to path. If the process is killed or the disk is full, the old checkpoint remains.

    Raises:
        UsageError: the file cannot be written.
    """
    buffer = io.BytesIO()  # first into memory, because torch.save reports a full disk with changing messages
    torch.save(state, buffer)
    buffer.seek(-_LENGTH, os.SEEK_END)
    buffer.write(struct.pack("<H", _CHECKSUM))
    buffer.write(_checksum(buffer.getbuffer()))
    write(path, buffer.getbuffer())


def _checksum(data: Any) -> bytes:
    return _MARK + hashlib.sha256(data).hexdigest().encode()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UsageError: the file cannot be read, is damaged, or is no checkpoint.
    """
    remedy = "delete it or omit --resume"
    try:
        state = _state(path)
    except OSError as error:
        raise UsageError(f"{shown(path)} cannot be read as a checkpoint ({error.strerror}): {remedy}") from error
    except Exception as error:  # unpickling damaged bytes may raise anything
        raise UsageError(f"{shown(path)} cannot be read as a checkpoint ({type(error).__name__}): {remedy}") from error
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise UsageError(f"{shown(path)} is not a checkpoint of this script: {remedy}")
    return state


def _state(path: Path) -> Any:
    """Return the saved state; None if the file is no checkpoint of this script."""
    with files.opened(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _CHECKSUM))
        checksum = file.read()
        file.seek(0)
        if not checksum.startswith(_MARK):
            if file.read(4) == b"PK\x03\x04":  # an archive of another program, or one that was cut
                return None
            raise ValueError("no archive")
        data = file.read(size - _CHECKSUM)
    if _checksum(data) != checksum:
        raise ValueError("damaged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data + checksum), map_location="cpu", weights_only=True)


def seed_all(seed: int) -> None:
    """Seed the process's generators: Python's, NumPy's, torch's on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the process's generators: Python's, NumPy's, torch's on the CPU and on device."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what rng_state() returned."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)

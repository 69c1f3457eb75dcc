"""Checkpoints for train.py: written whole or not at all, read without running code from the file."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import UsageError


def save(state: dict[str, Any], path: Path) -> None:
    """Write state to path by way of a temporary file: whoever is killed meanwhile leaves the old checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises UsageError where the file is not one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): delete it or omit --resume"
        ) from error
    if not isinstance(state, dict) or "settings" not in state:
        raise UsageError(f"{path} is not a checkpoint of this script: delete it or omit --resume")
    return state


def seed_all(seed: int) -> None:
    """Seed the process's generators: Python's, NumPy's, torch's on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of the process's generators: Python's, NumPy's, torch's on the CPU and on device."""
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

"""Launches everything that a pack has on a stubbed driver, without a GPU."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

from fusedres.kernels.triton_core import launch as launching
from fusedres.kernels.triton_core.launch import Launch
from suite.launches import ARCH, Made
from suite.miscompiled import forget, waiting
from suite.pack import WAITS, taken
from suite.pack_triton import COMPILED_LAUNCHERS, environment, has_launcher, launchers


class StubbedDriver:
    """Replaces the driver of Triton: its launches only count."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), object(), 0, 0, 1024),
            unload_module=lambda _: None,
            get_device_properties=lambda _: {"max_shared_mem": 232_448, "multiprocessor_count": 132},
        )

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return Hopper."""
        return GPUTarget("cuda", ARCH, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Look for the launcher where Triton would build it; return one that only counts."""
        if COMPILED_LAUNCHERS:
            with launchers(self._found):
                nvidia.CudaLauncher(source, metadata)
        return lambda *_: self.counts.update(["launches"])

    def _found(self, build: Callable[..., Any], src: str, name: str, **_: Any) -> Any:
        self.counts["launchers"] += 1
        self.counts["launchers compiled"] += not has_launcher(src, name)
        return SimpleNamespace(launch=None)


def launch_pack(out: Path, todo: Sequence[Made]) -> Counter[str]:
    """Launch everything on a stubbed driver with an empty cache and the pack; return the counts."""
    driver = StubbedDriver()
    forget(made.launch.kernel for made in todo)
    with tempfile.TemporaryDirectory() as scratch, environment(Path(scratch)):
        triton.runtime.driver.set_active(driver)
        with taken(out) as packed:
            _launch(made.launch for made in todo if not made.waits)
        waited = [made.launch for made in todo if made.waits]
        kernels = list({made.name: made.kernel for made in waited}.values())
        with waiting(Path(scratch) / WAITS, kernels), taken(out, WAITS) as packed_waits:
            _launch(waited)
    return driver.counts + packed + packed_waits


def _launch(todo: Iterable[Launch]) -> None:
    for made in todo:
        launching.run_kernel(made.kernel, made.grid, made.arguments, made.config)

"""Choices between ways that compute the same result, from the shapes alone: the fastest measured, or the requested."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from fusedres import dispatch
from fusedres.autograd import UNIT_TENSORS, ConvBN
from fusedres.backends import automatic, backend_for
from fusedres.dispatch import LIBRARY, Directions, Way, measured
from fusedres.modules.anatomy import Anatomy

# The products of the Gram matrix with the weight do not shrink with the batch. With fewer rows per input channel than
# this they cost more than 5% of the block, and they are as large as the output that they save.
_MIN_ROWS_A_CHANNEL = 16

# An output of 32 MiB or more is fresh memory at every call (malloc maps it anew): its pages fault. So inference runs
# the block on a few images at a time, and its intermediates use the same memory again. On two cores with AVX-512, a
# 256-channel Bottleneck at 56x56 took 0.77 of the time at batch 16. With smaller parts the weights are read more often:
# with parts of 8 MiB, the first Bottleneck of 14x14 took 1.1 of the time at batch 64.
_WHOLE_BYTES = 32 << 20
_PART_BYTES = 16 << 20

_OWN = Directions(True, True, True)

FASTER_UNFUSED = "measured faster unfused"


def serving_backend(device: torch.device, conv: str, memory: str) -> str | None:
    """Return the backend that serves a device in this context; None: fused blocks run unfused.

    On a GPU without measurements this is Triton if fuse() was given conv or memory.
    """
    found = backend_for(device)
    asked = found is None and (conv != "auto" or memory != "auto")
    return "triton" if asked and device.type == "cuda" and _has_triton() else found


@torch.compiler.assume_constant_result
@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def not_measured(device: torch.device) -> str:
    """Return why fused blocks run unfused on a device without a backend."""
    if device.type != "cuda":
        return f"nothing was measured on {device.type} devices: select a backend with use_backend"
    if not _has_triton():
        return "GPUs need Triton, which is not installed"
    return (
        "nothing was measured on this GPU: run `python -m fusedres tune`, "
        'or choose with fuse(model, conv="fused") or use_backend'
    )


_warned: set[str] = set()


def _warn_once(device: torch.device) -> None:
    """Warn once that blocks on a GPU run unfused, which the user would not notice otherwise."""
    if device.type in _warned or device.type != "cuda" or torch.compiler.is_compiling():
        return
    _warned.add(device.type)
    warnings.warn(f"fusedres: fused blocks run unfused, as {not_measured(device)}", stacklevel=2)


def unverified(anatomy: Anatomy, device: torch.device, conv: str, memory: str) -> str | None:
    """Return what no GPU has run yet, in words, unless the user asked for fused code there; None: nothing."""
    return not_yet_run("SyncBatchNorm has", device, conv, memory) if anatomy.synchronised else None


def not_yet_run(what: str, device: torch.device, conv: str, memory: str) -> str | None:
    """Return that something has not run on a GPU yet, unless it is the CPU or the user asked for fused code there."""
    if device.type == "cpu" or conv != "auto" or memory != "auto" or not automatic():
        return None
    return f'{what} not yet run fused on a GPU: choose it with fuse(model, conv="library") or use_backend'


def chosen_way(
    backend: str | None, anatomy: Anatomy, x: Tensor, conv: str, memory: str
) -> tuple[str, Way | None] | str:
    """Return the backend that a call runs on and its measured way, if there is one; or why the call runs unfused.

    Args:
        backend: the result of serving_backend.
    """
    if backend is None:
        _warn_once(x.device)
        return not_measured(x.device)
    if x.dim() != 4:  # read_input raises the error
        return backend, None
    reason = unverified(anatomy, x.device, conv, memory)
    if reason is not None:
        return reason
    if x.shape[0] == 0 and not anatomy.synchronised:  # the other processes wait for this one
        return "the batch was empty"
    way = measured_way(anatomy, x, backend, conv, memory) if measured(x.device) else None
    if way is None:
        return backend, None
    return FASTER_UNFUSED if way.backend is None else (way.backend, way)


def measured_way(anatomy: Anatomy, x: Tensor, backend: str, conv: str, memory: str) -> Way | None:
    """Return the way that the device's table has for this call, or None if the table does not apply.

    It does not apply if the selected backend is not the measured one, if the table says unfused but fuse() was given
    conv or memory (these decide then), or while code is compiled for symbolic sizes.
    """
    if torch.compiler.is_compiling() and _open(x):
        return None
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    phase = "train" if torch.is_grad_enabled() else "infer"
    found = dispatch.way(x.device, dtype, phase, x.shape[0], *shape_of(anatomy, x))
    if not automatic():
        return found if found.backend == backend else None
    if found.backend is None and (conv != "auto" or memory != "auto"):
        return None
    return found


def _open(x: Tensor) -> bool:
    """Whether a size is symbolic: using it as a number would specialise the compiled code."""
    return not all(has_static_value(x.shape[axis]) for axis in (0, 2, 3))


def shape_of(anatomy: Anatomy, x: Tensor) -> tuple[str | int, ...]:
    """Return the fields of dispatch.Shape from kind to width, for a block or a stem."""
    units = anatomy.units
    first, last, middle = units[0], units[-1], units[min(1, len(units) - 1)]
    stride = 1
    for unit in units:
        stride *= unit.settings.stride[0]
    if len(units) == 1:
        kind, shortcut = f"stem {first.conv_weight.shape[2]}x{first.conv_weight.shape[3]}", "none"
    else:
        kind = "basic" if len(units) == 2 else "bottleneck"
        shortcut = "identity" if anatomy.zero_pad is None else "zero_pad"
        shortcut = shortcut if anatomy.projection is None else "projection"
    return (
        kind, shortcut, first.conv_weight.shape[1] * first.settings.groups, first.conv_weight.shape[0],
        last.conv_weight.shape[0], middle.settings.groups, stride, middle.settings.dilation[0], x.shape[2], x.shape[3],
    )  # fmt: skip


def own_products(conv: str, backend: str, groups: int, kernel: tuple[int, int], way: Way | None = None) -> Directions:
    """Return which products of a convolution run in this package's own kernels.

    Convolutions on the CPU and grouped convolutions are always the library's. "auto" and "measured" follow the measured
    way, or use the library's if there is none.
    """
    if backend == "cpu" or groups != 1:
        return LIBRARY
    if conv in ("auto", "measured") and way is not None:
        return way.pixelwise if kernel == (1, 1) else way.larger
    return _OWN if conv == "fused" else LIBRARY


def unsaved_ends(
    wanted: bool,
    units: list[ConvBN],
    projection: ConvBN | None,
    tensors: list[Tensor | None],
    shape: tuple[int, int, int, int],
) -> tuple[bool, bool]:
    """Return whether the last unit and the projection do not save their convolution's output.

    They compute their statistics before the convolution (ops.one_pass), which the last unit can with stride 1 only, as
    its gradient reaches every pixel of its input; or run the convolution again in backward.

    wanted: memory="min" asks for it, or the measured way has it. "auto" does not use it otherwise: on two cores at
    batch 8, a Bottleneck's training step took 0.95 to 1.08 of the ordinary time at 56x56 and 28x28.
    """
    if not wanted:
        return False, False
    rows = shape[0] * shape[2] * shape[3]
    last = tensors[UNIT_TENSORS * (len(units) - 1)]
    assert last is not None
    of_projection = False
    if projection is not None:
        weight = tensors[UNIT_TENSORS * len(units)]
        assert weight is not None
        of_projection = _possible(projection, weight, rows)
    return units[-1].stride == (1, 1) and _possible(units[-1], last, rows), of_projection


def _possible(unit: ConvBN, weight: Tensor, rows: int) -> bool:
    return unit.batch_statistics and unit.pixelwise and rows >= _MIN_ROWS_A_CHANNEL * weight.shape[1]


def images_at_a_time(x: Tensor, shape: tuple[int, int, int, int]) -> int:
    """Return how many images inference runs through the block at once."""
    images = x.shape[0]
    size = max(x.numel(), shape[0] * shape[1] * shape[2] * shape[3]) * x.element_size()
    if not x.is_cpu or size < _WHOLE_BYTES:
        return images
    parts = -(-images // max(1, images * _PART_BYTES // size))
    return -(-images // parts)  # equal parts: with a small last part it took 1.1 of the time

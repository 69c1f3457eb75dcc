"""Bytes that a residual block moves, counted from the arguments of every kernel launch, without a GPU.

Blocks run on meta tensors with the triton backend, forward and backward. There a launch is only recorded. Its bytes
follow from its arguments: every distinct tensor is read once or written once. Everything else that runs, such as a
library's convolutions, is counted as an operator by counting.py. If a kernel reads an operand again for several tiles,
it counts once, as if a cache held it.

Bytes per image are the slope from one batch to twice that batch. The rest (weights, their gradients, per-channel
vectors) does not grow with the batch and is listed separately. If tiles or splits depend on the batch, neither number
is exact, but their sum at this batch is. `python benchmarks/traffic.py --launched` prints them beside the closed form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common.blocks import make_block
from common.harness import Progress, machine, print_table
from common.networks import Block, Stem, resnet_blocks
from torch import Tensor, nn

import fusedres
from fusedres.kernels.triton_core.launch import Launch, record_launches
from fusedres.modules import calls, reading
from fusedres.ops._library import OPS
from memory_traffic.closed_form import MODES, bytes_moved
from memory_traffic.counting import CountBytes

# Name of a way → the arguments of fuse(), and the mode of the closed form that it is compared with.
WAYS: dict[str, tuple[dict[str, str], str]] = {
    "library": ({"conv": "library"}, "library"),
    "library min": ({"conv": "library", "memory": "min"}, "library"),
    "fused": ({"conv": "fused"}, "epilogue"),
    "fused min": ({"conv": "fused", "memory": "min"}, "stored_dy"),
}


class MissingKernelError(RuntimeError):
    """An op has no triton kernel, so its bytes are unknown."""


class CountLaunched(CountBytes):
    """Keeps the launches of Triton kernels that are made inside, and counts every other operator.

    An op of fusedres does not count as an operator. On meta tensors torch would call its fake; here its triton launcher
    runs, and the launches and operators of the launcher count. Ops without a triton kernel are named in `missing`, and
    their fakes run. Use it together with use_backend("triton").
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Launch] = []
        self.missing: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "fusedres":
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if func is torch.ops.aten.convolution.default and args[0].is_meta:
                # cuDNN keeps the memory format of the input; the meta kernel does not say.
                return result.contiguous(memory_format=torch.channels_last)
            return result
        op = OPS[func._schema.name.partition("::")[2]]
        try:
            op.kernel(args[-1])
        except (RuntimeError, AttributeError):
            self.missing.add(op.name)
            return func(*args)
        with self, record_launches() as launches:
            result = op.checked(*args)
        self.kernels += launches
        return result


@dataclass(frozen=True)
class Part:
    """The calls and bytes of one kernel or operator in one phase of a training step."""

    phase: str  # "forward" or "backward"
    name: str
    kernel: bool  # True: a Triton kernel of this package; False: an operator
    calls: int
    image_bytes: float  # per image
    rest_bytes: float  # independent of the batch


def build(
    what: Block | Stem, way: str, batch: int, dtype: torch.dtype, mixed: bool = False
) -> tuple[nn.Module, Tensor]:
    """Return the fused module and an input, both on the meta device. Images need no gradient.

    mixed: the weights are float32 in channels_last, as in training; use it together with `mixed_precision`.
    """
    module = fusedres.fuse(make_block(what), **WAYS[way][0])
    module = module.to("meta").to(memory_format=torch.channels_last) if mixed else module.to("meta", dtype)
    for child in module.modules():
        if isinstance(child, fusedres.FusedResNet) and WAYS[way][0]["conv"] == "fused":
            child.fused_conv = "fused"  # fuse() leaves the choice to measured tables
        if isinstance(child, nn.BatchNorm2d):
            child.to(dtype=torch.promote_types(dtype, torch.float32))  # float32 as under autocast
    x = torch.empty((batch, what.in_channels, what.size, what.size), dtype=dtype, device="meta")
    return module, x.to(memory_format=torch.channels_last).requires_grad_(not isinstance(what, Stem))


@contextmanager
def mixed_precision(dtype: torch.dtype) -> Iterator[None]:
    """Inside, blocks on meta tensors run as under autocast to `dtype`; torch has no autocast for the meta device."""

    def read(*args: Any) -> Any:
        return reading.read_input(*args)._replace(dtype=dtype, autocast=True)

    with mock.patch.object(calls, "read_input", read):
        yield


def train_step(what: Block | Stem, way: str, batch: int, dtype: torch.dtype) -> dict[str, CountLaunched]:
    """Run one training step on meta tensors; return the launches and operators of each phase."""
    module, x = build(what, way, batch, dtype)
    wanted = [tensor for tensor in (x, *module.parameters()) if tensor.requires_grad]
    with fusedres.use_backend("triton"):
        with CountLaunched() as forward:
            out = module(x)
        grad = torch.empty_like(out)
        with CountLaunched() as backward:
            torch.autograd.grad(out, wanted, grad, allow_unused=True)  # unlike backward(), accumulates nothing
    return {"forward": forward, "backward": backward}


def parts(what: Block | Stem, way: str, batch: int = 256, dtype: torch.dtype = torch.bfloat16) -> list[Part]:
    """Return the bytes of a training step at `batch` for each kernel and operator, most bytes first.

    Raises:
        MissingKernelError: an op that runs has no triton kernel.
    """
    train_step(what, way, batch, dtype)  # fills what is made once and kept
    small, large = (train_step(what, way, images, dtype) for images in (batch, 2 * batch))
    missing = sorted(set().union(*(count.missing for count in small.values())))
    if missing:
        raise MissingKernelError(f"{way}: no triton kernel of {', '.join(missing)}")
    found = []
    for phase in ("forward", "backward"):
        at_batch, at_twice = _by_name(small[phase]), _by_name(large[phase])
        for name, kernel in at_batch | at_twice:  # the choice of kernels may depend on the batch
            calls, moved = at_batch.get((name, kernel), (0, 0))
            image = (at_twice.get((name, kernel), (0, 0))[1] - moved) / batch
            found.append(Part(phase, name, kernel, calls, image, moved - batch * image))
    return sorted(found, key=lambda part: -part.image_bytes)


def _by_name(count: CountLaunched) -> dict[tuple[str, bool], tuple[int, int]]:
    """Return (name, whether it is a kernel) → (calls, bytes)."""
    table = {(name, False): found for name, found in count.by_operator().items()}
    for launch in count.kernels:
        calls, moved = table.get((launch.name, True), (0, 0))
        table[launch.name, True] = (calls + 1, moved + launch.bytes())
    return table


@dataclass(frozen=True)
class Total:
    """The sums of several parts."""

    launches: tuple[int, int]  # forward, backward
    operators: tuple[int, int]
    image_bytes: float
    rest_bytes: float

    @classmethod
    def of(cls, found: Iterable[Part]) -> Total:
        """Return the sums of these parts."""
        found = list(found)

        def calls(kernel: bool) -> tuple[int, int]:
            forward, backward = (
                sum(part.calls for part in found if part.phase == phase and part.kernel is kernel)
                for phase in ("forward", "backward")
            )
            return forward, backward

        return cls(
            calls(True), calls(False), sum(part.image_bytes for part in found), sum(part.rest_bytes for part in found)
        )


def rows(
    depths: Sequence[int], ways: Sequence[str], batch: int, dtype: torch.dtype = torch.bfloat16, image: int = 224
) -> list[dict]:
    """Return one row for each way of each distinct block, each model (the sum over its blocks) and the stem.

    If a way lacks a kernel, it has a single row with the reason.
    """
    models = {depth: resnet_blocks(depth, image) for depth in depths}
    distinct = {block for blocks in models.values() for block in blocks.values()}
    stem = Stem(image)
    bar = Progress((len(distinct) + 1) * len(ways))
    found: list[dict] = []
    for way in ways:
        try:
            counted = {}
            for what in (*distinct, stem):
                bar.step(way)
                counted[what] = parts(what, way, batch, dtype)
        except (MissingKernelError, NotImplementedError) as error:
            found.append({"name": "all", "way": way, "missing": str(error)})
            continue
        for depth, blocks in models.items():
            named: dict[Block, str] = {}
            for name, block in blocks.items():
                named.setdefault(block, f"resnet{depth}.{name}")
            for block, name in named.items():
                total = Total.of(counted[block])
                detail = [vars(part) for part in counted[block]]
                found.append(_row(name, way, total, [block], batch, dtype) | {"parts": detail})
            everything = [part for block in blocks.values() for part in counted[block]]
            found.append(_row(f"resnet{depth}", way, Total.of(everything), list(blocks.values()), batch, dtype))
        detail = [vars(part) for part in counted[stem]]
        found.append(_row("stem", way, Total.of(counted[stem]), [stem], batch, dtype) | {"parts": detail})
    bar.close()
    return found


def _row(name: str, way: str, total: Total, of: Sequence[Block | Stem], batch: int, dtype: torch.dtype) -> dict:
    if name == "stem":
        held_against = "stored_dy"  # the stem has only one fused form
        modes: tuple[str, ...] = ("eager", held_against)
    else:
        held_against, modes = WAYS[way][1], MODES
    closed = {
        mode: sum(bytes_moved(block, mode, "train", 1, dtype.itemsize, weights=False) for block in of) / 1e6
        for mode in modes
    }
    return {
        "name": name,
        "way": way,
        "launches": total.launches,
        "operators": total.operators,
        "mb_image": total.image_bytes / 1e6,
        "mb_rest": total.rest_bytes / 1e6,
        "mb_image_at_batch": (total.image_bytes + total.rest_bytes / batch) / 1e6,
        "held_against": held_against,
        "closed_form_mb_image": closed,
    }


def table(found: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of a table of the rows."""
    header = ["block", "way", "launches", "operators", "MB/image", "rest MB", "all/image", "ratio", *MODES]
    cells = []
    for row in found:
        if "missing" in row:
            cells.append([row["name"], row["way"], row["missing"], *[""] * (len(header) - 3)])
            continue
        closed = row["closed_form_mb_image"]
        ratio = f"{row['mb_image'] / closed[row['held_against']]:.3f} {row['held_against']}"
        cells.append(
            [
                row["name"],
                row["way"],
                "+".join(map(str, row["launches"])),
                "+".join(map(str, row["operators"])),
                f"{row['mb_image']:.3f}",
                f"{row['mb_rest']:.3f}",
                f"{row['mb_image_at_batch']:.3f}",
                ratio,
                *(f"{closed[mode]:.3f}" if mode in closed else "" for mode in MODES),
            ]
        )
    return header, cells


def show(ways: Sequence[str], batch: int, image: int, path: str | None) -> None:
    """Print the table of ResNet-18 and ResNet-50, and write it to `path`, if given, as JSON."""
    found = rows((18, 50), ways, batch, image=image)
    print(f"as launched, bf16, batch {batch}, {image}²; launches and operators forward+backward")
    print_table(*table(found))
    if path:
        where = machine(torch.device("cpu"))
        about = {key: where[key] for key in ("versions", "commit", "date")}
        record = about | {"batch": batch, "image": image, "dtype": "bfloat16", "rows": found}
        Path(path).write_text(json.dumps(record, indent=1) + "\n")

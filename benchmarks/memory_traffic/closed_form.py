"""Bytes that a residual block must move to and from memory, in closed form.

`kernels(block, mode, phase)` lists the kernels of one way of running a block, each with the tensors that it reads and
writes. A kernel reads every operand once and writes every result once. Per-channel vectors are left out. Weights are
kept apart, as they do not grow with the batch. `python benchmarks/traffic.py` prints totals per image.

The modes in training. y is a raw convolution output, z is y after BatchNorm and ReLU, d is the gradient of the output
after the mask of the last ReLU.
    eager      one kernel for each operator. BatchNorm forward reads y twice (statistics, then apply); backward reads d
               and y twice. ReLU's backward takes its mask from the activated tensor.
    pointwise  what a compiler that fuses pointwise operators can reach around library convolutions: statistics of y;
               apply + ReLU; last apply + add + ReLU. Backward has a reduction and an elementwise pass for each
               BatchNorm, and the sum of the two gradients; each takes the mask of the last ReLU from the saved output.
    library    the same kernels with that mask packed in bits: the minimum with library convolutions.
    epilogue   the epilogue of the convolution that writes y takes the statistics; every kernel that reads y applies
               BatchNorm and ReLU on load, so z is never stored. dgrad and wgrad apply BatchNorm's backward on load; the
               kernel that writes the gradient takes its sums.
    one_pass   like epilogue; in addition the last 1x1 convolution (Bottleneck) and the projection take their statistics
               from the Gram matrix of their input, so their raw outputs are never stored.
    stored_dy  like one_pass, but dy of each 3x3 convolution is written once instead of computed by dgrad and wgrad.

From `library` on, the mask of the last ReLU takes one bit per element; the masks of inner ReLUs are recomputed from y.
A strided 1x1 convolution touches only the pixels it uses. A library's dgrad nevertheless writes the whole gradient,
zeros included; a fused dgrad writes the touched pixels, and conv1's dgrad adds them. Eager pools with int64 indices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from common.networks import Block, Convolution, Stem, resnet_blocks

MODES = ("eager", "pointwise", "library", "epilogue", "one_pass", "stored_dy")
PHASES = ("train", "infer")


@dataclass
class Kernel:
    """One pass over memory: elements read and written per image, ReLU mask bits, and elements of weights."""

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    mask_bits: int = 0
    weights: int = 0

    def bytes(self, itemsize: int) -> float:
        """Return the bytes per image, without weights."""
        return itemsize * (sum(self.reads.values()) + sum(self.writes.values())) + self.mask_bits / 8


@dataclass
class _Recorder:
    kernels: list[Kernel] = field(default_factory=list)

    def __call__(
        self, name: str, reads: dict[str, int], writes: dict[str, int], mask: int = 0, weights: int = 0
    ) -> None:
        self.kernels.append(Kernel(name, reads, writes, mask, weights))


def kernels(block: Block, mode: str, phase: str = "train") -> list[Kernel]:
    """Return the kernels that run `block` in `mode`, in order, with operands counted for one image."""
    if mode not in MODES:
        raise ValueError(f"kernels: mode must be one of {MODES}, got {mode!r}")
    if phase not in PHASES:
        raise ValueError(f"kernels: phase must be one of {PHASES}, got {phase!r}")
    run = _Recorder()
    if phase == "infer":
        way = {"eager": _infer_eager, "pointwise": _infer_library, "library": _infer_library}.get(mode, _infer_fused)
        way(block, run)
    elif mode == "eager":
        _train_eager(block, run)
    elif mode in ("pointwise", "library"):
        _train_library(block, run, packed=mode == "library")
    else:
        _train_fused(block, run, one_pass=mode != "epilogue", stored_dy=mode == "stored_dy")
    return run.kernels


def bytes_moved(block: Block | Stem, mode: str, phase: str, batch: int, itemsize: int, weights: bool = True) -> int:
    """Return the bytes of one step of `block` over `batch` images, with or without weights and their gradients."""
    if isinstance(block, Stem):
        kept = itemsize * block.convolutions[0].weight * (2 if phase == "train" else 1) if weights else 0
        return round(batch * stem_bytes(mode != "eager", block.size, itemsize, phase)) + kept
    passes = kernels(block, mode, phase)
    images = batch * sum(k.bytes(itemsize) for k in passes)
    return round(images + (itemsize * sum(k.weights for k in passes) if weights else 0))


def flops(block: Block | Stem, phase: str, batch: int) -> int:
    """Return the operations of the convolutions: forward once, backward twice as much; a stem has no dgrad."""
    products = 1 if phase == "infer" else 2 if isinstance(block, Stem) else 3
    return batch * sum(c.flops for c in block.convolutions) * products


def _split(block: Block) -> tuple[list[Convolution], Convolution | None]:
    convs = block.convolutions
    return (convs[:-1], convs[-1]) if block.shortcut == "projection" else (convs, None)


def _zero_pad_source(block: Block) -> int:
    """Return the elements that the zero-padded shortcut reads: strided pixels of the channels of x."""
    return block.in_channels * block.out_size**2


def _train_eager(block: Block, run: _Recorder) -> None:
    branch, projection = _split(block)
    last = branch[-1]
    x, out = block.in_channels * block.size**2, last.target
    for c in branch:
        y = c.target
        run(f"{c.name}", {"in": c.touched}, {"y": y}, weights=c.weight)
        run(f"{c.name}.bn statistics", {"y": y}, {})
        run(f"{c.name}.bn apply", {"y": y}, {"z": y})
        if c is not last:
            run(f"{c.name}.relu", {"z": y}, {"z": y})
    if projection:
        run("projection", {"x": projection.touched}, {"y": out}, weights=projection.weight)
        run("projection.bn statistics", {"y": out}, {})
        run("projection.bn apply", {"y": out}, {"z": out})
    elif block.shortcut == "zero_pad":
        run("zero pad", {"x": _zero_pad_source(block)}, {"shortcut": out})
    run("add", {"z": out, "shortcut": out}, {"sum": out})
    run("relu", {"sum": out}, {"out": out})

    run("relu backward", {"grad": out, "out": out}, {"d": out})
    for c in reversed(branch):
        y = c.target
        if c is not last:
            run(f"{c.name}.relu backward", {"dz": y, "z": y}, {"dz": y})
        run(f"{c.name}.bn backward sums", {"d": y, "y": y}, {})
        run(f"{c.name}.bn backward", {"d": y, "y": y}, {"dy": y})
        run(f"{c.name} dgrad", {"dy": y}, {"grad in": c.source}, weights=c.weight)
        run(f"{c.name} wgrad", {"dy": y, "in": c.touched}, {}, weights=c.weight)
    if projection:
        run("projection.bn backward sums", {"d": out, "y": out}, {})
        run("projection.bn backward", {"d": out, "y": out}, {"dy": out})
        run("projection dgrad", {"dy": out}, {"grad x": x}, weights=projection.weight)
        run("projection wgrad", {"dy": out, "x": projection.touched}, {}, weights=projection.weight)
    elif block.shortcut == "zero_pad":
        run("zero pad backward", {"d": _zero_pad_source(block)}, {"grad x": x})
    run("add gradients", {"grad x": x, "grad shortcut": x}, {"grad x": x})


def _train_library(block: Block, run: _Recorder, packed: bool) -> None:
    branch, projection = _split(block)
    last = branch[-1]
    x, out = block.in_channels * block.size**2, last.target
    saved, bits = ({}, out) if packed else ({"out": out}, 0)  # where the last ReLU's mask comes from
    for c in branch:
        y = c.target
        run(f"{c.name}", {"in": c.touched}, {"y": y}, weights=c.weight)
        run(f"{c.name}.bn statistics", {"y": y}, {})
        if c is not last:
            run(f"{c.name}.bn apply + relu", {"y": y}, {"z": y})
    shortcut = {"x": out}
    if projection:
        run("projection", {"x": projection.touched}, {"y": out}, weights=projection.weight)
        run("projection.bn statistics", {"y": out}, {})
        shortcut = {"projection y": out}
    elif block.shortcut == "zero_pad":
        shortcut = {"x": _zero_pad_source(block)}
    run("bn apply + add + relu", {"y": out} | shortcut, {"out": out}, mask=bits)

    other = {"projection y": out} if projection else {}
    run("tail backward sums", {"grad": out, "y": out} | other | saved, {}, mask=bits)
    results = {"dy": out} | ({"projection dy": out} if projection else {})
    run("tail backward", {"grad": out, "y": out} | other | saved, results, mask=bits)
    for c in reversed(branch):
        y = c.target
        if c is not last:
            run(f"{c.name}.bn + relu backward sums", {"dz": y, "y": y}, {})
            run(f"{c.name}.bn + relu backward", {"dz": y, "y": y}, {"dy": y})
        run(f"{c.name} dgrad", {"dy": y}, {"grad in": c.source}, weights=c.weight)
        run(f"{c.name} wgrad", {"dy": y, "in": c.touched}, {}, weights=c.weight)
    if projection:
        run("projection dgrad", {"dy": out}, {"grad x": x}, weights=projection.weight)
        run("projection wgrad", {"dy": out, "x": projection.touched}, {}, weights=projection.weight)
        run("add gradients", {"grad x": x, "grad shortcut": x}, {"grad x": x})
    else:
        used = _zero_pad_source(block) if block.shortcut == "zero_pad" else out
        saved = {} if packed else {"out": used}
        run("add masked gradient", {"grad x": x, "grad": used} | saved, {"grad x": x}, mask=used if packed else 0)


def _train_fused(block: Block, run: _Recorder, one_pass: bool, stored_dy: bool) -> None:
    branch, projection = _split(block)
    last = branch[-1]
    x, out = block.in_channels * block.size**2, last.target
    tail = one_pass and last.kernel == 1  # the last convolution runs inside the tail
    joint = one_pass and projection is not None  # so does the projection

    for c in branch[:-1] if tail else branch:
        run(f"{c.name} + statistics", {"in": c.touched}, {"y": c.target}, weights=c.weight)
    reads, weights = {"y": out}, 0
    if tail:
        run("gram of z", {"z": last.source}, {})
        reads, weights = {"z": last.source}, last.weight
    if projection and joint:
        run("gram of x", {"x": projection.touched}, {})
        reads["x"] = projection.touched
        weights += projection.weight
    elif projection:
        run("projection + statistics", {"x": projection.touched}, {"y": out}, weights=projection.weight)
        reads["projection y"] = out
    else:
        reads["x"] = _zero_pad_source(block) if block.shortcut == "zero_pad" else out
    run("tail", reads, {"out": out}, mask=out, weights=weights)

    # Pass 1: the sums of both branches, and Gᵀ = zᵀd if the convolution is inside the tail.
    reads = {"grad": out} | ({"z": last.source} if tail else {"y": out})
    if projection:
        reads |= {"x": projection.touched} if joint else {"projection y": out}
    weights = (last.weight if tail else 0) + (projection.weight if projection and joint else 0)
    run("tail backward sums", reads, {}, mask=out, weights=weights)
    # From the last convolution to the first. dy is computed on load from the operands in `gradient`.
    for position in reversed(range(len(branch))):
        c = branch[position]
        y, is_last = c.target, c is last
        gradient, mask = ({"grad": y, "y": y}, y) if is_last else ({"dz": y, "y": y}, 0)
        if is_last and tail:
            # dz = d·(a⊙W) − z·Q + constant; z gives the mask and enters the sums of the BatchNorm before.
            run(f"{c.name} dgrad in tail", {"grad": y, "z": c.source}, {"dz": c.source}, mask=y, weights=c.weight)
            continue
        if stored_dy and c.kernel == 3:
            run(f"{c.name}.bn backward", gradient, {"dy": y}, mask=mask)
            gradient, mask = {"dy": y}, 0
        if position:
            before = {"y before": c.source}  # gives the ReLU mask, enters the sums
            run(f"{c.name} dgrad", gradient | before, {"dz": c.source}, mask=mask, weights=c.weight)
        run(f"{c.name} wgrad", gradient | {"in": c.touched}, {}, mask=mask, weights=c.weight)
        if position == 0:
            first, first_mask = gradient, mask
    if projection:
        source = {"x": projection.touched} if joint else {"projection y": out}
        grads = {"grad x strided": projection.touched}
        run("projection dgrad", {"grad": out} | source, grads, mask=out, weights=projection.weight)
        if not joint:
            reads = {"grad": out, "projection y": out, "x": projection.touched}
            run("projection wgrad", reads, {}, mask=out, weights=projection.weight)
        added, added_mask = grads, 0
    else:
        used = _zero_pad_source(block) if block.shortcut == "zero_pad" else out
        added, added_mask = {"grad": used}, used
    run("conv1 dgrad + shortcut", first | added, {"grad x": x}, mask=first_mask + added_mask, weights=branch[0].weight)


def _infer_eager(block: Block, run: _Recorder) -> None:
    branch, projection = _split(block)
    last, out = branch[-1], branch[-1].target
    for c in branch:
        run(f"{c.name}", {"in": c.touched}, {"y": c.target}, weights=c.weight)
        run(f"{c.name}.bn", {"y": c.target}, {"z": c.target})
        if c is not last:
            run(f"{c.name}.relu", {"z": c.target}, {"z": c.target})
    if projection:
        run("projection", {"x": projection.touched}, {"y": out}, weights=projection.weight)
        run("projection.bn", {"y": out}, {"z": out})
    elif block.shortcut == "zero_pad":
        run("zero pad", {"x": _zero_pad_source(block)}, {"shortcut": out})
    run("add", {"z": out, "shortcut": out}, {"sum": out})
    run("relu", {"sum": out}, {"out": out})


def _infer_library(block: Block, run: _Recorder) -> None:
    branch, projection = _split(block)
    last, out = branch[-1], branch[-1].target
    for c in branch:
        run(f"{c.name}", {"in": c.touched}, {"y": c.target}, weights=c.weight)
        if c is not last:
            run(f"{c.name}.bn + relu", {"y": c.target}, {"z": c.target})
    shortcut = {"x": _zero_pad_source(block) if block.shortcut == "zero_pad" else out}
    if projection:
        run("projection", {"x": projection.touched}, {"y": out}, weights=projection.weight)
        shortcut = {"projection y": out}
    run("bn + add + relu", {"y": out} | shortcut, {"out": out})


def _infer_fused(block: Block, run: _Recorder) -> None:
    branch, projection = _split(block)
    last, out = branch[-1], branch[-1].target
    for c in branch[:-1]:
        run(f"{c.name} + bn + relu", {"in": c.touched}, {"z": c.target}, weights=c.weight)
    shortcut = {"x": _zero_pad_source(block) if block.shortcut == "zero_pad" else out}
    weights = last.weight
    if projection:  # part of the same product if both are 1x1, else read by its epilogue
        if last.kernel == 1:
            shortcut, weights = {"x": projection.touched}, weights + projection.weight
        else:
            run("projection + bn", {"x": projection.touched}, {"shortcut": out}, weights=projection.weight)
            shortcut = {"shortcut": out}
    run(f"{last.name} + bn + add + relu", {"in": last.touched} | shortcut, {"out": out}, weights=weights)


def stem_bytes(fused: bool, image: int = 224, itemsize: int = 2, phase: str = "train") -> float:
    """Return the bytes per image of conv1 + bn1 + relu + maxpool; images need no gradient.

    Eager pools with int64 indices, also in inference. Fused pools with uint8 indices, and wgrad recomputes dy, which is
    never stored.
    """
    x, y, out = 3 * image**2 * itemsize, 64 * (image // 2) ** 2 * itemsize, 64 * (image // 4) ** 2 * itemsize
    places = 64 * (image // 4) ** 2
    if phase == "infer":
        return (x + y) + (y + out) if fused else (x + y) + 2 * y + 2 * y + (y + out + 8 * places)
    if fused:
        forward = (x + y) + (y + out + places)
        return forward + (out + places + y) + (out + places + y + x)
    index = 8 * places
    forward = (x + y) + 3 * y + 2 * y + (y + out + index)
    return forward + (out + index + y) + 3 * y + 5 * y + (y + x)


# --- table ------------------------------------------------------------------------------------------------------------


def table(image: int = 224, itemsize: int = 2) -> list[dict]:
    """Return one row for each mode: MB per image of the blocks of ResNet-18, 34 and 50 in training, without weights."""
    rows = []
    for mode in MODES:
        row: dict = {"mode": mode}
        for depth in (18, 34, 50):
            blocks = resnet_blocks(depth, image).values()
            row[f"resnet{depth}"] = sum(bytes_moved(b, mode, "train", 1, itemsize, weights=False) for b in blocks) / 1e6
        rows.append(row)
    return rows

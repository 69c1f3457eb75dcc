"""A frozen ResNet as a whole: a few images at a time run through all of it, so that its memory is used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.folded_block import run_folded
from fusedres.autograd.folded_convolution import FoldedConvolution, fold
from fusedres.autograd.frozen import FrozenBlock
from fusedres.autograd.memory import require_memory, to_channels_last
from fusedres.autograd.plan import BlockPlan, ConvBN, Inputs, StemPlan, Tensors, norm_of
from fusedres.kernels.cpu_convolution import Purpose
from fusedres.ops.launch import launches
from fusedres.values import in_dtype

_DENSE = ConvBN((1, 1), (0, 0), (1, 1), 1, True, False, False, None, 0.0)

# The most bytes of a layer's result that the images of one part may have. Results stay in cache, and larger ones would
# go back to the system when they are freed, page by page.
_PART_BYTES = 13 << 20


class FoldedStem(NamedTuple):
    """A stem's folded convolution, for inputs of one kind, and how many images to run at a time.

    No layer of a ResNet has a larger result than its stem, so this holds for the whole network.
    """

    kind: tuple[torch.dtype, torch.device, torch.dtype]
    convolution: FoldedConvolution
    images: int
    plan: StemPlan

    def run(self, x: Tensor) -> Tensor:
        """Return maxpool(relu(BN(conv(x)))); x in any memory format."""
        require_memory(x, ())
        y = self.convolution(in_dtype(to_channels_last(x), self.plan.dtype), None, False)
        pooled: Tensor = launches(self.plan.backend).bn_relu_maxpool(y, self.convolution.identity, False)[0]
        return pooled


class FrozenNetwork(NamedTuple):
    """The folded layers of a ResNet, for inputs of one kind."""

    stem: FoldedStem
    blocks: tuple[tuple[BlockPlan, FrozenBlock], ...]
    classifier: FoldedConvolution | Callable[[Tensor], Tensor]

    def run(self, x: Tensor) -> Tensor:
        """Return the scores of a batch."""
        require_memory(x, ())  # torch cannot take a part of images that were freed, and would not name them
        images = self.stem.images
        features = [self._features(x[begin : begin + images]) for begin in range(0, x.shape[0], images)]
        joined = features[0] if len(features) == 1 else torch.cat(features)
        if isinstance(self.classifier, FoldedConvolution):
            return self.classifier(joined[:, :, None, None], None, False).flatten(1)
        return self.classifier(joined)

    def _features(self, x: Tensor) -> Tensor:
        """Return the average of the last block's result over its pixels."""
        h = self.stem.run(x)
        for plan, block in self.blocks:
            h = run_folded(Inputs(h), plan, block.convolutions, None, owned=True)
        return h.mean((2, 3))


def fold_stem(x: Tensor, plan: StemPlan, tensors: Tensors) -> FoldedStem:
    """Fold a stem with constant statistics, for inputs like x."""
    weight = tensors[0]
    assert weight is not None
    state = launches(plan.backend).bn_frozen(x[:0].to(plan.dtype), norm_of(tensors, 0, plan.unit))
    _, k, h, w = plan.unit.output_shape(x.shape, weight.shape)
    size = k * h * w * plan.dtype.itemsize
    images = max(1, _PART_BYTES // size)
    shape = (min(images, x.shape[0]), *x.shape[1:])
    folded = fold(weight, state, plan.unit, shape, plan.dtype, plan.backend, purpose=Purpose.FORWARD)
    return FoldedStem((x.dtype, x.device, plan.dtype), folded, images, plan)


def fold_linear(weight: Tensor, bias: Tensor | None, images: int, dtype: torch.dtype) -> FoldedConvolution:
    """Return a linear layer as a convolution of one pixel."""
    state = weight.new_zeros((4, weight.shape[0]), dtype=torch.promote_types(dtype, torch.float32))
    state[1:3] = 1
    if bias is not None:
        state[3] = bias.detach()
    shape = (images, weight.shape[1], 1, 1)
    return fold(weight[:, :, None, None], state, _DENSE, shape, dtype, "cpu", purpose=Purpose.FROZEN)

"""A frozen ResNet as a whole: a few images at a time run through all of it, so that its memory is used again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.folded_convolution import FoldedConvolution, PanelConvolution, fold
from fusedres.autograd.frozen import FrozenBlock, run_folded
from fusedres.autograd.memory import to_channels_last
from fusedres.autograd.plan import BlockPlan, ConvBN, Inputs, StemPlan, Tensors, norm_of
from fusedres.ops.launch import launches
from fusedres.values import in_dtype

_DENSE = ConvBN((1, 1), (0, 0), (1, 1), 1, True, False, False, None, 0.0)

# The most bytes of a layer's result that the images of one part may have. oneDNN's convolutions take tens of
# microseconds to begin, and the C library returns larger results to the system when they are freed.
_LIBRARY_BYTES = 26 << 20
_PANEL_BYTES = 13 << 20


class FrozenNetwork(NamedTuple):
    """The folded layers of a ResNet, for inputs of one kind."""

    stem: FoldedConvolution
    blocks: tuple[tuple[BlockPlan, FrozenBlock], ...]
    classifier: FoldedConvolution | Callable[[Tensor], Tensor]
    dtype: torch.dtype

    def run(self, x: Tensor, images: int) -> Tensor:
        """Return the scores of a batch; images: how many run at a time."""
        features = [self._features(x[begin : begin + images]) for begin in range(0, x.shape[0], images)]
        joined = features[0] if len(features) == 1 else torch.cat(features)
        if isinstance(self.classifier, FoldedConvolution):
            return self.classifier(joined[:, :, None, None], None, False).flatten(1)
        return self.classifier(joined)

    def _features(self, x: Tensor) -> Tensor:
        """Return the average of the last block's result over its pixels."""
        h = run_folded_stem(self.stem, in_dtype(to_channels_last(x), self.dtype))
        for plan, block in self.blocks:
            h = run_folded(Inputs(h), plan, block.convolutions, None, owned=True)
        return h.mean((2, 3))


def run_folded_stem(convolution: FoldedConvolution, x: Tensor) -> Tensor:
    """Return maxpool(relu(x's convolution)) of a folded stem and a channels_last x."""
    y = convolution(x, None, False)
    pooled: Tensor = launches("cpu").bn_relu_maxpool(y, convolution.identity, False)[0]
    return pooled


def fold_stem(x: Tensor, plan: StemPlan, tensors: Tensors) -> tuple[FoldedConvolution, int]:
    """Return a stem's folded convolution, and how many images a network with this stem is to run at a time.

    No layer of a ResNet has a larger result than its stem.
    """
    weight = tensors[0]
    assert weight is not None
    state = launches(plan.backend).bn_frozen(x[:0].to(plan.dtype), norm_of(tensors, 0, plan.unit))
    _, k, h, w = plan.unit.output_shape(x.shape, weight.shape)
    size = k * h * w * plan.dtype.itemsize
    images = min(max(1, _LIBRARY_BYTES // size), x.shape[0])
    folded = fold(weight, state, plan.unit, (images, *x.shape[1:]), plan.dtype, plan.backend)
    if isinstance(folded, PanelConvolution):
        images = max(1, _PANEL_BYTES // size)
    return folded, images


def fold_linear(weight: Tensor, bias: Tensor | None, images: int, dtype: torch.dtype) -> FoldedConvolution:
    """Return a linear layer as a convolution of one pixel."""
    state = weight.new_zeros((4, weight.shape[0]), dtype=torch.promote_types(dtype, torch.float32))
    state[1:3] = 1
    if bias is not None:
        state[3] = bias.detach()
    return fold(weight[:, :, None, None], state, _DENSE, (images, weight.shape[1], 1, 1), dtype, "cpu")

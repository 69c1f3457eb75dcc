"""The last step of the weight gradients in Triton: add partial sums, and store them in the layout of the weights.

    dW[k, c, r, s] = Σ_split partials[split, k, r, s, c]

A program owns BLOCK sums of one of up to four weights. It adds SPLITS splits at a time, always in the same order. It
reads every partial sum once, along C, and writes every gradient once, with the weight's strides and dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedres.kernels.conv_wgrad import configs
from fusedres.kernels.triton_core.launch import ceil_div, choose, jit_for_any_batch, launch, loop_bound

# The arguments of conv_wgrad_finalize_kernel for one weight.
_OF_A_WEIGHT = (
    "partial_{}_ptr", "out_{}_ptr", "splits_{}", "size_{}", "C_{}", "taps_{}", "taps_w_{}",
    "k_{}", "c_{}", "h_{}", "w_{}",
)  # fmt: skip


@triton.jit
def sum_splits(
    partial_ptr, out_ptr, splits, size, C, taps, taps_w, stride_k, stride_c, stride_h, stride_w, block,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Add BLOCK elements of (S, K, R, S', C) over S, and store them with the strides of (K, C, R, S')."""
    split = tl.arange(0, SPLITS)[:, None]
    element = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=partial_ptr.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        offsets = (first + split).to(tl.int64) * size + element[None, :]
        inside = (first + split < splits) & (element < size)[None, :]
        total += tl.sum(tl.load(partial_ptr + offsets, mask=inside, other=0.0), 0)
    tap = element // C % taps
    offsets = (element // (C * taps)).to(tl.int64) * stride_k + (element % C).to(tl.int64) * stride_c
    offsets += (tap // taps_w).to(tl.int64) * stride_h + (tap % taps_w).to(tl.int64) * stride_w
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=element < size)


@jit_for_any_batch
def conv_wgrad_finalize_kernel(
    # for each weight: (S, K, R, S', C) sums, and (K, C, R, S') of any dtype and strides; None for missing weights
    partial_0_ptr, out_0_ptr, splits_0, size_0, C_0, taps_0, taps_w_0, k_0, c_0, h_0, w_0,
    partial_1_ptr, out_1_ptr, splits_1, size_1, C_1, taps_1, taps_w_1, k_1, c_1, h_1, w_1,
    partial_2_ptr, out_2_ptr, splits_2, size_2, C_2, taps_2, taps_w_2, k_2, c_2, h_2, w_2,
    partial_3_ptr, out_3_ptr, splits_3, size_3, C_3, taps_3, taps_w_3, k_3, c_3, h_3, w_3,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks = tl.cdiv(size_0, BLOCK)
    if block < blocks:
        sum_splits(partial_0_ptr, out_0_ptr, splits_0, size_0, C_0, taps_0, taps_w_0, k_0, c_0, h_0, w_0, block,
                   BLOCK, SPLITS)  # fmt: skip
    if partial_1_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(size_1, BLOCK)
        if (block >= 0) & (block < blocks):
            sum_splits(partial_1_ptr, out_1_ptr, splits_1, size_1, C_1, taps_1, taps_w_1, k_1, c_1, h_1, w_1, block,
                       BLOCK, SPLITS)  # fmt: skip
    if partial_2_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(size_2, BLOCK)
        if (block >= 0) & (block < blocks):
            sum_splits(partial_2_ptr, out_2_ptr, splits_2, size_2, C_2, taps_2, taps_w_2, k_2, c_2, h_2, w_2, block,
                       BLOCK, SPLITS)  # fmt: skip
    if partial_3_ptr is not None:
        block -= blocks
        if block >= 0:
            sum_splits(partial_3_ptr, out_3_ptr, splits_3, size_3, C_3, taps_3, taps_w_3, k_3, c_3, h_3, w_3, block,
                       BLOCK, SPLITS)  # fmt: skip


def conv_wgrad_finalize(partials: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """See fusedres.ops.conv_wgrad.conv_wgrad_finalize."""
    grads = [torch.empty_like(weight) for weight in weights]
    candidates = configs.conv_wgrad_finalize(max(partial.shape[0] for partial in partials))
    config = choose(candidates)
    arguments: dict[str, Any] = {}
    blocks = 0
    for i in range(4):
        if i < len(partials):
            partial, grad = partials[i], grads[i]
            splits, _, taps_h, taps_w, c = partial.shape
            size = grad.numel()
            values = (partial, grad, loop_bound(splits), size, c, taps_h * taps_w, taps_w, *grad.stride())
            blocks += ceil_div(size, config["BLOCK"])
        else:
            values = (None,) * len(_OF_A_WEIGHT)
        arguments |= {name.format(i): value for name, value in zip(_OF_A_WEIGHT, values, strict=True)}
    launch(conv_wgrad_finalize_kernel, (blocks,), arguments, config, candidates)
    return grads

"""The gated residual tail in Triton: forward, the sums of its backward, and its gradients.

The equations are those of fusedres.ops.gated_tail. Activations are (M, C) rows; a group of rows is the whole batch, or
a sample where a factor has a row for each sample. A program owns BLOCK_M rows of one group (BLOCK_M·steps of a partial)
by BLOCK_C channels. Each pass reads every tensor that it needs once, and writes each result once. Pointers of what a
tail has not are None, and no code is made for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedres.kernels.triton_core.gate import load_bits
from fusedres.kernels.triton_core.launch import jit_for_any_batch


@triton.jit
def vector(pointer, columns, C):
    """Load a value for each channel, 0 beyond them, as (1, BLOCK_C)."""
    return tl.load(pointer + columns, mask=columns < C, other=0)[None, :]


@triton.jit
def activate(z, slope_ptr, columns, C, KIND: tl.constexpr):
    """Return act(z)."""
    if KIND == "relu":
        z = tl.where(z <= 0, 0.0, z)
    if KIND == "leaky_relu":
        z = tl.where(z > 0, z, z * vector(slope_ptr, columns, C))
    if KIND == "silu":
        z = z * tl.sigmoid(z)
    if KIND == "hardswish":
        z = z * (tl.where(z + 3 < 0, 0.0, tl.where(z + 3 > 6, 6.0, z + 3)) / 6)
    if KIND == "gelu":
        z = z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    return z


@triton.jit
def activation_grad(z, grad, slope_ptr, columns, C, KIND: tl.constexpr):
    """Return act'(z)·grad."""
    if KIND == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    if KIND == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * vector(slope_ptr, columns, C))
    if KIND == "silu":
        grad = grad * tl.sigmoid(z) * (1 + z * tl.sigmoid(-z))
    if KIND == "hardswish":
        grad = grad * tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z / 3 + 0.5))
    if KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        grad = grad * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * density)
    return grad


@triton.jit
def normalised(x, state_ptr, columns, C):
    """Return scale·x + shift, or x without a state."""
    if state_ptr is not None:
        x = x * vector(state_ptr + 2 * C, columns, C) + vector(state_ptr + 3 * C, columns, C)
    return x


@triton.jit
def load_wide(pointer, offsets, inside, dtype: tl.constexpr):
    """Load a tile in the arithmetic type; 0 where it is outside, or nothing is there."""
    value = tl.zeros(offsets.shape, dtype)
    if pointer is not None:
        value = tl.load(pointer + offsets, mask=inside, other=0).to(dtype)
    return value


@triton.jit
def scaled(value, factor_ptr, gate, HAS_GATE: tl.constexpr, columns, C):
    """Return the value times its factor and its gate, where there are any."""
    if factor_ptr is not None:
        value = value * vector(factor_ptr, columns, C)
    if HAS_GATE:
        value = value * gate
    return value


@triton.jit
def load_gates(logits_ptr, shortcut_logits_ptr, offsets, inside, COUPLED: tl.constexpr, dtype: tl.constexpr):
    """Return the gates of both terms, and what is left of them to 1."""
    logits = load_wide(logits_ptr, offsets, inside, dtype)
    gate, closed = tl.sigmoid(logits), tl.sigmoid(-logits)
    if COUPLED:
        other, other_closed = closed, gate
    else:
        shortcut_logits = load_wide(shortcut_logits_ptr, offsets, inside, dtype)
        other, other_closed = tl.sigmoid(shortcut_logits), tl.sigmoid(-shortcut_logits)
    return gate, closed, other, other_closed


@triton.jit
def position(C, rows, tiles, TILE, BLOCK_C: tl.constexpr):
    """Return a program's group, its first row in the group (int64), and its first channel."""
    blocks = tl.cdiv(C, BLOCK_C)
    index = (tl.program_id(0) // blocks).to(tl.int64)
    group = index // tiles
    return group, (index - group * tiles) * TILE, tl.program_id(0) % blocks * BLOCK_C


@triton.jit
def of_group(pointer, group, stride):
    """Return where the factors or coefficients of a group of rows are."""
    if pointer is not None:
        pointer += group * stride
    return pointer


@jit_for_any_batch
def gated_tail_kernel(
    x_ptr,  # (M, C)
    state_ptr,  # (4, C) float32 or float64, or None
    factor_ptr,  # (1 or G, C) like the state, or None
    logits_ptr,  # like x, or None
    shortcut_ptr,  # like x, or None; the following three are as above
    shortcut_state_ptr,
    shortcut_factor_ptr,
    shortcut_logits_ptr,
    slope_ptr,  # (C,) like the state, or None
    out_ptr,  # like x
    out_mask_ptr,  # (M, ceil(C / 8)) uint8, or None
    rows,  # of a group
    tiles,  # of a group
    C,
    factor_stride,  # C if factor_ptr has a row for each group, else 0
    shortcut_factor_stride,
    KIND: tl.constexpr,
    BEFORE_ADD: tl.constexpr,
    COUPLED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, row, column = position(C, rows, tiles, BLOCK_M, BLOCK_C)
    numbers, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    inside = (row + numbers < rows)[:, None] & (columns < C)[None, :]
    first = group * rows + row
    offsets = first * C + numbers[:, None] * C + columns[None, :]
    factor_ptr = of_group(factor_ptr, group, factor_stride)
    shortcut_factor_ptr = of_group(shortcut_factor_ptr, group, shortcut_factor_stride)

    x = load_wide(x_ptr, offsets, inside, DTYPE)
    z = normalised(x, state_ptr, columns, C)
    if BEFORE_ADD:
        z = activate(z, slope_ptr, columns, C, KIND)
    gate, _, other, _ = load_gates(logits_ptr, shortcut_logits_ptr, offsets, inside, COUPLED, DTYPE)
    z = scaled(z, factor_ptr, gate, logits_ptr is not None, columns, C)
    if shortcut_ptr is not None:
        s = normalised(load_wide(shortcut_ptr, offsets, inside, DTYPE), shortcut_state_ptr, columns, C)
        z += scaled(s, shortcut_factor_ptr, other, COUPLED or shortcut_logits_ptr is not None, columns, C)
    out = z
    if not BEFORE_ADD:
        out = activate(z, slope_ptr, columns, C, KIND)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)
    if out_mask_ptr is not None:
        if KIND == "leaky_relu":
            passes = tl.where(z > 0, 1, 0)
        else:
            passes = tl.where(z <= 0, 0, 1)
        passes = tl.where(inside, passes, 0)
        bits = tl.reshape(passes, [BLOCK_M, BLOCK_C // 8, 8]) << tl.arange(0, 8)[None, None, :]
        width, bytes_ = (C + 7) // 8, column // 8 + tl.arange(0, BLOCK_C // 8)
        inside = (row + numbers < rows)[:, None] & (bytes_ < width)[None, :]
        mask_offsets = first * width + numbers[:, None] * width + bytes_[None, :]
        tl.store(out_mask_ptr + mask_offsets, tl.sum(bits, 2).to(tl.uint8), mask=inside)


@triton.jit
def tail_gradients(
    d, mask_ptr, x, state_ptr, factor_ptr, HAS_GATE: tl.constexpr, s, HAS_SHORTCUT: tl.constexpr, shortcut_state_ptr,
    shortcut_factor_ptr, HAS_OTHER: tl.constexpr, slope_ptr, gate, other, first, end, column, columns, C,
    KIND: tl.constexpr, BEFORE_ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return e, q, p, A, S and the gradient of the slope, see ops.gated_tail_reduce; what is not used costs nothing."""
    inner = normalised(x, state_ptr, columns, C)
    value = inner
    if BEFORE_ADD:
        value = activate(inner, slope_ptr, columns, C, KIND)
    added = normalised(s, shortcut_state_ptr, columns, C)
    of_slope = d
    if mask_ptr is not None:
        closed = tl.zeros_like(d)
        if KIND == "leaky_relu":
            closed = d * vector(slope_ptr, columns, C)
        d = tl.where(load_bits(mask_ptr, first, column, end, C, BLOCK_M, BLOCK_C) == 0, closed, d)
    elif not BEFORE_ADD and KIND != "identity":
        z = scaled(value, factor_ptr, gate, HAS_GATE, columns, C)
        if HAS_SHORTCUT:
            z += scaled(added, shortcut_factor_ptr, other, HAS_OTHER, columns, C)
        of_slope = tl.where(z > 0, 0.0, z * d)
        d = activation_grad(z, d, slope_ptr, columns, C, KIND)
    q = d
    p = d
    if HAS_GATE:
        q = d * gate
    if HAS_OTHER:
        p = d * other
    of_factor = q * value
    if BEFORE_ADD:
        of_slope = tl.where(inner > 0, 0.0, inner * q)
        q = activation_grad(inner, q, slope_ptr, columns, C, KIND)
    return d, q, p, value, added, of_factor, of_slope


@jit_for_any_batch
def gated_tail_reduce_kernel(
    grad_ptr,  # like x
    mask_ptr,  # packed bits (M, ceil(C / 8)) uint8, or None
    x_ptr,  # these are the arguments of gated_tail_kernel
    state_ptr,
    factor_ptr,
    logits_ptr,
    shortcut_ptr,
    shortcut_state_ptr,
    shortcut_factor_ptr,
    shortcut_logits_ptr,
    slope_ptr,
    out_ptr,  # (G, T, 6, C) float32 or float64
    rows,
    tiles,
    C,
    factor_stride,
    shortcut_factor_stride,
    steps,
    WITH_SLOPE: tl.constexpr,
    KIND: tl.constexpr,
    BEFORE_ADD: tl.constexpr,
    COUPLED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, begin, column = position(C, rows, tiles, BLOCK_M * steps, BLOCK_C)
    numbers, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    factor_ptr = of_group(factor_ptr, group, factor_stride)
    shortcut_factor_ptr = of_group(shortcut_factor_ptr, group, shortcut_factor_stride)
    sum_q = tl.zeros([BLOCK_M, BLOCK_C], DTYPE)
    product = tl.zeros([BLOCK_M, BLOCK_C], DTYPE)
    shortcut_product = tl.zeros([BLOCK_M, BLOCK_C], DTYPE)
    sum_p = tl.zeros([BLOCK_M, BLOCK_C], DTYPE)
    sum_factor = tl.zeros([BLOCK_M, BLOCK_C], DTYPE)
    sum_slope = tl.zeros([BLOCK_M, BLOCK_C], DTYPE)
    for step in range(steps):
        row = begin + step * BLOCK_M
        inside = (row + numbers < rows)[:, None] & (columns < C)[None, :]
        first = group * rows + row
        offsets = first * C + numbers[:, None] * C + columns[None, :]
        x = load_wide(x_ptr, offsets, inside, DTYPE)
        s = load_wide(shortcut_ptr, offsets, inside, DTYPE)
        gate, _, other, _ = load_gates(logits_ptr, shortcut_logits_ptr, offsets, inside, COUPLED, DTYPE)
        d = load_wide(grad_ptr, offsets, inside, DTYPE)
        _, q, p, _, _, of_factor, of_slope = tail_gradients(
            d, mask_ptr, x, state_ptr, factor_ptr, logits_ptr is not None, s, shortcut_ptr is not None,
            shortcut_state_ptr, shortcut_factor_ptr, COUPLED or shortcut_logits_ptr is not None, slope_ptr, gate,
            other, first, group * rows + rows, column, columns, C, KIND, BEFORE_ADD, BLOCK_M, BLOCK_C,
        )  # fmt: skip
        # Outside of the group d is 0, and so are all products with it: x and s are 0 there, not infinite.
        sum_q += q
        if state_ptr is not None:
            x -= vector(state_ptr, columns, C)
        product += q * x
        if shortcut_state_ptr is not None or shortcut_factor_ptr is not None:
            if shortcut_state_ptr is not None:
                s -= vector(shortcut_state_ptr, columns, C)
            shortcut_product += p * s
            sum_p += p
        if BEFORE_ADD and factor_ptr is not None:
            sum_factor += of_factor
        if WITH_SLOPE:
            sum_slope += of_slope
    product_sum, shortcut_sum = tl.sum(product, 0), tl.sum(shortcut_product, 0)
    channel = columns < C
    if state_ptr is not None:
        product_sum *= tl.load(state_ptr + C + columns, mask=channel, other=0)
    if shortcut_state_ptr is not None:
        shortcut_sum *= tl.load(shortcut_state_ptr + C + columns, mask=channel, other=0)
    out_ptr += (group * tiles + begin // (BLOCK_M * steps)) * 6 * C + columns
    tl.store(out_ptr, tl.sum(sum_q, 0), mask=channel)
    tl.store(out_ptr + C, product_sum, mask=channel)
    if shortcut_state_ptr is not None or shortcut_factor_ptr is not None:
        tl.store(out_ptr + 2 * C, shortcut_sum, mask=channel)
        tl.store(out_ptr + 3 * C, tl.sum(sum_p, 0), mask=channel)
    if BEFORE_ADD and factor_ptr is not None:
        tl.store(out_ptr + 4 * C, tl.sum(sum_factor, 0), mask=channel)
    if WITH_SLOPE:
        tl.store(out_ptr + 5 * C, tl.sum(sum_slope, 0), mask=channel)


@triton.jit
def store_grad(out_ptr, offsets, inside, d, x, coefficients_ptr, factor_ptr, columns, C):
    """Store the gradient of a term's x, a·(factor·d − c1 − (x − μ)·k); the pull is 0 for k = 0, whatever x is."""
    if factor_ptr is not None:
        d *= vector(factor_ptr, columns, C)
    if coefficients_ptr is not None:
        k = vector(coefficients_ptr + 3 * C, columns, C)
        pull = tl.where(k == 0, 0.0, (x - vector(coefficients_ptr + 2 * C, columns, C)) * k)
        d = vector(coefficients_ptr, columns, C) * (d - vector(coefficients_ptr + C, columns, C) - pull)
    tl.store(out_ptr + offsets, d.to(out_ptr.dtype.element_ty), mask=inside)


@jit_for_any_batch
def gated_tail_apply_kernel(
    grad_ptr,  # the first arguments are those of gated_tail_reduce_kernel
    mask_ptr,
    x_ptr,
    state_ptr,
    factor_ptr,
    logits_ptr,
    shortcut_ptr,
    shortcut_state_ptr,
    shortcut_factor_ptr,
    shortcut_logits_ptr,
    slope_ptr,
    coefficients_ptr,  # (1 or G, 4, C) float32 or float64, or None
    shortcut_coefficients_ptr,
    out_ptr,  # like x, each of the four results, or None
    out_logits_ptr,
    out_shortcut_ptr,
    out_shortcut_logits_ptr,
    rows,
    tiles,
    C,
    factor_stride,
    shortcut_factor_stride,
    coefficients_stride,  # 4·C if each group has coefficients of its own, else 0
    shortcut_coefficients_stride,
    KIND: tl.constexpr,
    BEFORE_ADD: tl.constexpr,
    COUPLED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    group, row, column = position(C, rows, tiles, BLOCK_M, BLOCK_C)
    numbers, columns = tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_C)
    inside = (row + numbers < rows)[:, None] & (columns < C)[None, :]
    first = group * rows + row
    offsets = first * C + numbers[:, None] * C + columns[None, :]
    factor_ptr = of_group(factor_ptr, group, factor_stride)
    shortcut_factor_ptr = of_group(shortcut_factor_ptr, group, shortcut_factor_stride)
    coefficients_ptr = of_group(coefficients_ptr, group, coefficients_stride)
    shortcut_coefficients_ptr = of_group(shortcut_coefficients_ptr, group, shortcut_coefficients_stride)
    x = load_wide(x_ptr, offsets, inside, DTYPE)
    s = load_wide(shortcut_ptr, offsets, inside, DTYPE)
    d = load_wide(grad_ptr, offsets, inside, DTYPE)
    gate, closed, other, other_closed = load_gates(logits_ptr, shortcut_logits_ptr, offsets, inside, COUPLED, DTYPE)
    e, q, p, value, added, _, _ = tail_gradients(
        d, mask_ptr, x, state_ptr, factor_ptr, logits_ptr is not None, s, shortcut_ptr is not None, shortcut_state_ptr,
        shortcut_factor_ptr, COUPLED or shortcut_logits_ptr is not None, slope_ptr, gate, other, first,
        group * rows + rows, column, columns, C, KIND, BEFORE_ADD, BLOCK_M, BLOCK_C,
    )  # fmt: skip
    if out_ptr is not None:
        store_grad(out_ptr, offsets, inside, q, x, coefficients_ptr, factor_ptr, columns, C)
    if out_shortcut_ptr is not None:
        store_grad(out_shortcut_ptr, offsets, inside, p, s, shortcut_coefficients_ptr, shortcut_factor_ptr, columns, C)
    if out_logits_ptr is not None:
        if COUPLED:
            value -= added
        grad = e * value * gate * closed
        tl.store(out_logits_ptr + offsets, grad.to(out_logits_ptr.dtype.element_ty), mask=inside)
    if out_shortcut_logits_ptr is not None:
        grad = e * added * other * other_closed
        tl.store(out_shortcut_logits_ptr + offsets, grad.to(out_shortcut_logits_ptr.dtype.element_ty), mask=inside)

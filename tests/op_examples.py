"""Right arguments of every op, by name. test_op_arguments.py makes wrong ones from them. Values do not matter here."""

from __future__ import annotations

from typing import Any

import torch
from op_inputs import activation, state, vector
from torch import Tensor

from fusedres.kernels.packed_convolution import packed_size

N, C, K, H, W = 2, 9, 10, 6, 5
_FLOAT = torch.float32

Example = dict[str, Any]  # an op's arguments by name, without the backend


def _like(*shape: int, dtype: torch.dtype = _FLOAT, seed: int = 0) -> Tensor:
    return activation(shape, dtype, seed)


def _rows(*shape: int, dtype: torch.dtype = _FLOAT) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def _bits(channels: int, h: int = H, w: int = W) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (N, h, w, (channels + 7) // 8), generator=generator, dtype=torch.uint8)


def _norm(channels: int) -> Example:
    return {
        "weight": vector(channels),
        "bias": vector(channels, torch.float64, 1),
        "running_mean": vector(channels, seed=2),
        "running_var": vector(channels, torch.bfloat16, 3).abs(),
        "num_batches_tracked": torch.tensor(3),
        "momentum": 0.1,
        "eps": 1e-5,
    }


def _tail(dtype: torch.dtype = _FLOAT) -> list[Example]:
    """Arguments of bn_add_relu with a strided and padded shortcut, and with a normalised one."""
    x = {"x": _like(N, C, H, W, dtype=dtype), "state": state(C, dtype), "with_mask": True}
    strided = {"shortcut": _like(N, 4, 2 * H, 2 * W - 1, dtype=dtype, seed=1), "shortcut_state": None}
    normalised = {"shortcut": _like(N, C, H, W, dtype=dtype, seed=2), "shortcut_state": state(C, dtype, 5)}
    return [x | strided | {"shortcut_stride": 2}, x | normalised | {"shortcut_stride": 1}]


def _branches() -> list[Example]:
    """Arguments of the backward of one branch, with an output as the gate, and of two branches, with packed bits."""
    one = {
        "grad": _like(N, C, H, W),
        "gate": _like(N, C, H, W, seed=1),
        "x": _like(N, C, H, W, seed=2),
        "x_state": state(C, _FLOAT),
        "x_batch_statistics": True,
        "shortcut": None,
        "shortcut_state": None,
        "shortcut_batch_statistics": False,
        "with_sums": True,
    }
    second = {"shortcut": _like(N, C, H, W, seed=3), "shortcut_state": state(C, _FLOAT, 6)}
    return [one, one | second | {"gate": _bits(C), "shortcut_batch_statistics": True}]


def _windows() -> Example:
    argmax = torch.randint(0, 10, (N, C, H // 2, (W + 1) // 2), generator=torch.Generator().manual_seed(1))
    return {
        "grad": _like(N, C, H // 2, (W + 1) // 2),
        "argmax": argmax.to(torch.uint8).contiguous(memory_format=torch.channels_last),
        "x": _like(N, C, H, W, seed=1),
        "x_state": state(C, _FLOAT),
        "x_batch_statistics": True,
        "with_sums": True,
    }


_GEOMETRY: Example = {"stride": [2, 1], "padding": [1, 1], "dilation": [1, 1]}  # for a 3x3 weight: (6, 5) -> (3, 5)
_POINTWISE: Example = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}


def _fprop() -> Example:
    return {"x": _like(N, C, H, W), "weight": _like(K, C, 3, 3, seed=1), **_GEOMETRY}


def _inference() -> list[Example]:
    out: Example = {"state": state(K, _FLOAT), "shortcut": _like(N, 4, H, 2 * W, seed=2), "shortcut_state": None}
    normalised = {"shortcut": _like(N, K, 3, W, seed=3), "shortcut_state": state(K, _FLOAT, 7), "shortcut_stride": 1}
    return [_fprop() | out | {"shortcut_stride": 2}, _fprop() | out | normalised]


def _packed() -> Example:
    example: Example = {
        "x": _like(N, C, H, W),
        "panels": torch.zeros(packed_size((K, C, 3, 3), False)),
        "bias": vector(K),
        "kernel": [3, 3],
        "winograd": False,
    }
    example |= {**_GEOMETRY, "shortcut": _like(N, K, 3, W, seed=2), "with_relu": True}
    return example | {"out": _like(N, K, 3, W, seed=3)}


def _dgrad() -> list[Example]:
    """Arguments with the previous layer's ReLU on store, and with everything on load and a gated shortcut on store."""
    nothing = dict.fromkeys(("gate", "y", "coefficients", "input", "input_state", "shortcut", "shortcut_gate"))
    size: Example = {"input_size": [N, C, H, W], "shortcut_stride": 1}
    store = {"grad": _like(N, K, 3, W), "weight": _like(K, C, 3, 3, seed=1), **_GEOMETRY}
    store |= {"input": _like(N, C, H, W, seed=2), "input_state": state(C, _FLOAT)}
    load = {"grad": _like(N, K, H, W), "weight": _like(K, C, 1, 1, seed=1), **_POINTWISE, "gate": _bits(K)}
    load |= {"y": _like(N, K, H, W, seed=3), "coefficients": state(K, _FLOAT, 4), "shortcut_stride": 2}
    load |= {"shortcut": _like(N, K, 3, 3, seed=4), "shortcut_gate": _bits(K, 3, 3)}
    return [nothing | size | store, nothing | size | load]


def _wgrad() -> list[Example]:
    plain: Example = {"grad": _like(N, K, 3, W), "input": _like(N, C, H, W), "input_state": None, "kernel": [3, 3]}
    plain |= {"gate": None, "y": None, "coefficients": None, **_GEOMETRY}
    load = {"gate": _bits(K, 3), "y": _like(N, K, 3, W, seed=1), "coefficients": state(K, _FLOAT)}
    return [plain, plain | load | {"input_state": state(C, _FLOAT, 2)}]


def _centred() -> Example:
    return {"z": _like(N, C, H, W), "z_state": state(C, _FLOAT), "z_pivot": vector(C), "z_stride": 2}


def _one_pass_tail() -> list[Example]:
    z = _centred() | {"folded": _rows(K, C), "offset": vector(K), "with_mask": True}
    nothing = dict.fromkeys(("shortcut", "shortcut_state", "x", "x_pivot", "x_folded", "x_folded_offset"))
    strides = {"shortcut_stride": 1, "x_stride": 1}
    identity = {"shortcut": _like(N, 4, H, 2 * 3, seed=1), "shortcut_stride": 2}
    normalised = {"shortcut": _like(N, K, 3, 3, seed=1), "shortcut_state": state(K, _FLOAT)}
    x = {"x": _like(N, 7, 3, 3), "x_pivot": vector(7), "x_folded": _rows(K, 7), "x_folded_offset": vector(K)}
    return [z | nothing | strides | more for more in (identity, normalised, x)]


def _reduction() -> Example:
    return {"grad": _like(N, K, 3, 3, seed=1), "gate": _bits(K, 3, 3), **_centred()}


def _products() -> Example:
    example: Example = {"cross": _rows(K, C), "sum_d": vector(K), "conv_weight": _like(K, C, 1, 1), "count": 60}
    example |= {"folded": _rows(K, C), "state": state(K, _FLOAT), "projected": _rows(K, C), "dtype": _FLOAT}
    return example | {"total": vector(C, torch.float64)}


def _gated_tails() -> list[Example]:
    """Arguments of gated_tail: a coupled gate, and every kind of factor under a leaky ReLU with its mask."""
    terms = ("branch", "shortcut")
    nothing = dict.fromkeys([f"{term}_{field}" for term in terms for field in ("state", "factor", "logits")])
    both = {"branch": _like(N, C, H, W), "shortcut": _like(N, C, H, W, seed=1)} | nothing
    highway = {"branch_state": state(C, _FLOAT), "branch_logits": _like(N, C, H, W, seed=2), "coupled": True}
    highway |= {"kind": "silu", "slope": None, "before_add": True}
    scaled = {"branch_factor": _rows(N, C), "shortcut_factor": _rows(1, C), "shortcut_state": state(C, _FLOAT, 1)}
    scaled |= {"kind": "leaky_relu", "slope": vector(C), "before_add": False, "coupled": False}
    return [both | highway, both | scaled]


def _gated_tail_gradients() -> tuple[list[Example], list[Example]]:
    """Arguments of gated_tail_reduce and gated_tail_apply."""
    highway, scaled = _gated_tails()
    highway |= {"grad": _like(N, C, H, W, seed=5), "gate": None}
    scaled |= {"grad": _like(N, C, H, W, seed=5), "gate": _bits(C)}
    needs: Example = {"needs_branch": True, "needs_shortcut": True}
    applied = [
        highway
        | needs
        | {"branch_coefficients": state(C, _FLOAT)[None], "shortcut_coefficients": None, "needs_logits": True},
        scaled
        | needs
        | {"branch_coefficients": None, "shortcut_coefficients": state(C, _FLOAT)[None], "needs_logits": False},
    ]
    return [example | {"with_slope": False} for example in (highway, scaled)], applied


def _dense_block() -> dict[str, list[Example]]:
    """Arguments of the ops of a dense block: a buffer of C channels, of which a layer reads 5."""
    buffer = {"buffer": _like(N, C, H, W)}
    moments, corrections = _rows(C, 2, dtype=torch.float64).abs(), _rows(C, 2, dtype=torch.float64)
    gradient = buffer | {"grad_x": _like(N, C, H, W, seed=1), "first": 3, "channels": 4}
    layer = {"grad": _like(N, 5, H, W), "buffer_state": state(5, _FLOAT), "buffer_batch_statistics": True}
    return {
        "bn_from_moments": [{"moments": moments, "rows": 60, **_norm(C), "dtype": torch.bfloat16}],
        "dense_append_": [buffer | {"x": _like(N, 4, H, W, seed=1), "first": 2, "moments": moments}],
        "dense_bn_relu": [buffer | {"state": state(5, _FLOAT)}],
        "dense_bn_relu_backward_": [buffer | layer | {"grad_x": _like(N, C, H, W, seed=1), "corrections": corrections}],
        "dense_gradient": [
            gradient | {"moments": moments, "corrections": corrections},
            gradient | {"moments": None, "corrections": None},
        ],
    }


def examples() -> dict[str, list[Example]]:
    """One or more right calls of every op, with fresh tensors."""
    x, wide = {"x": _like(N, C, H, W), "state": state(C, _FLOAT)}, torch.float64
    one, two = _branches()
    in_place = {"x": one["x"], "grad": one["grad"], "x_state": one["x_state"], "x_batch_statistics": True}
    reduced = [{n: e[n] for n in ("grad", "gate", "x", "x_state", "shortcut", "shortcut_state")} for e in (one, two)]
    names = {"x": "y", "x_state": "coefficients", "shortcut_state": "shortcut_coefficients"}
    applied = [{names.get(n, n): value for n, value in example.items()} for example in reduced]
    merged = {"state": state(C, _FLOAT), "batch_statistics": True, "count": 60}
    merged["shortcut_state_batch_statistics"] = False
    pooled = _windows()
    wgrad = {n: pooled[n] for n in ("grad", "argmax")} | {"y": pooled["x"], "y_coefficients": pooled["x_state"]}
    statistics = {"conv_weight": _like(K, C, 1, 1), "pivot": vector(C), "total": vector(C, wide)}
    statistics |= {"gram": _rows(C, C, dtype=wide), "count": 60}
    backward = {"d": _like(N, K, H, W), "sum_d": vector(K), "z": _like(N, C, H, W), "conv_weight": _like(K, C, 1, 1)}
    backward |= {"state": state(K, _FLOAT), "projected": _rows(K, C), "total": vector(C, wide)}
    gradient = {"grad_x": _like(N, 4, H, W), "shortcut": _like(N, C, 3, 3, seed=1), "shortcut_stride": 2}
    nothing_more = {"x": None, "x_pivot": None, "x_stride": 1}
    joined = {"x": _like(N, 7, 3, 3), "x_pivot": vector(7), "x_stride": 1}
    reduced_tails, applied_tails = _gated_tail_gradients()
    return {
        "gated_tail": [example | {"with_mask": not example["before_add"]} for example in _gated_tails()],
        "gated_tail_": _gated_tails(),
        "gated_tail_reduce": reduced_tails,
        "gated_tail_apply": applied_tails,
        "bn_add_relu": _tail() + _tail(torch.bfloat16),
        "bn_add_relu_": _tail(),
        "bn_add_relu_out": [
            {n: v for n, v in example.items() if n != "with_mask"} | {"out": _like(N, C, H, W, seed=9)}
            for example in _tail()
        ],
        "bn_add_relu_backward": [one, two],
        "bn_add_relu_backward_": [one, two],
        "bn_relu_backward_": [in_place | {"relu": True, "with_sums": True}],
        "bn_relu_backward_add_": [in_place | {"added": _like(N, C, H, W, seed=8), "with_sums": True}],
        "bn_backward_reduce": reduced,
        "bn_backward_coefficients": [
            merged | {"partials": _rows(3, 2, C), "shortcut_state": None},
            merged | {"partials": _rows(3, 3, C), "shortcut_state": state(C, _FLOAT, 3)},
        ],
        "bn_backward_apply": applied,
        "bn_finalize": [{"partials": _rows(3, 2, C), "rows": torch.full((3,), 20.0), **_norm(C)}],
        "bn_frozen": [{"x": _like(N, C, H, W), **_norm(C)}],
        "bn_relu": [
            x | {"pivot": vector(C), "stride": 2},
            {"x": _like(N, C, H, W, dtype=wide), "state": None, "pivot": None, "stride": 1},
        ],
        "bn_relu_": [x],
        "bn_relu_maxpool": [x | {"with_argmax": True}],
        "bn_relu_maxpool_backward": [pooled],
        "bn_relu_maxpool_backward_": [pooled],
        "bn_relu_maxpool_reduce": [{n: pooled[n] for n in ("grad", "argmax", "x")} | {"state": pooled["x_state"]}],
        "bn_relu_maxpool_wgrad": [wgrad | {"input": _like(N, 3, 12, W), "kernel": [3, 3], **_GEOMETRY}],
        "bn_statistics": [{"x": _like(N, C, H, W), **_norm(C)}],
        "bn_statistics_and_means": [{"x": _like(N, C, H, W), **_norm(C)}],
        "bn_statistics_of_sum_": [{"x": _like(N, C, H, W), "added": _like(N, C, H, W, seed=1), **_norm(C)}],
        "conv_bn_add_relu": _inference(),
        "conv_dgrad": _dgrad(),
        "conv_fprop": [_fprop() | {"x_state": state(C, _FLOAT), "with_statistics": True}],
        "conv_weights": [{"weights": [_rows(K, C, 3, 3), _rows(C, K, 1, 1, dtype=wide)], "dtype": torch.bfloat16}],
        "conv_wgrad": _wgrad(),
        "conv_wgrad_finalize": [
            {
                "partials": [_rows(2, K, 3, 3, C), _rows(1, C, 1, 1, K, dtype=wide)],
                "weights": [_rows(K, C, 3, 3), _rows(C, K, 1, 1, dtype=torch.bfloat16)],
            }
        ],
        **_dense_block(),
        "empty_batch": [{"like": _like(N, C, H, W), "batch": 3}],
        "gram": [x | {"stride": 2}],
        "gram_statistics": [x | {"stride": 2}],
        "one_pass_backward": [backward | {"with_input": wanted} for wanted in (True, False)],
        "one_pass_dgrad": [
            _reduction() | {"folded": _rows(K, C), "quadratic": _rows(C, C), "constant": vector(C), "masked": True}
        ],
        "one_pass_fold": [{n: _products()[n] for n in ("conv_weight", "state", "total", "count", "dtype")}],
        "one_pass_products": [_products()],
        "one_pass_reduce": [_reduction() | nothing_more, _reduction() | joined],
        "one_pass_statistics": [statistics | _norm(K)],
        "one_pass_tail": _one_pass_tail(),
        "pack_weight": [{"weight": _like(K, C, 3, 3), "dilation": [1, 1], "scale": vector(K), "winograd": False}],
        "packed_convolution_out": [_packed()],
        "relu_backward": [{"grad": one["grad"], "gate": one["gate"]}, {"grad": one["grad"], "gate": two["gate"]}],
        "shortcut_grad_": [
            gradient | {"shortcut_gate": _like(N, C, 3, 3, seed=2)},
            gradient | {"shortcut_gate": _bits(C, 3, 3)},
        ],
    }

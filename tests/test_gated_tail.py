"""The gated residual tail on every backend; gated_tails.py has the tails and the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gated_tails import TAILS, Tail, act, doubled, equation, exact_gradients, make, terms_of
from op_inputs import DTYPES, activation, assert_near, backends_of, device, state
from torch import Tensor

from fusedres import ops
from fusedres.kernels.reference_core import unpack_bits
from fusedres.kernels.triton_core.launch import record_launches
from fusedres.ops.launch import launches
from fusedres.values import ACTIVATIONS, Activation, Gated, TailCoefficients, TailNeeds, TailTerm

BACKENDS = backends_of("gated_tail", "gated_tail_reduce", "gated_tail_apply")


_SHAPES = ((2, 1, 5, 3), (3, 40, 4, 4), (2, 65, 9, 7), (4, 127, 1, 1), (5, 64, 14, 13))


def shapes_of(backend: str) -> tuple[tuple[int, ...], ...]:
    """Return the shapes to test: few where the interpreter runs."""
    return _SHAPES if backend != "triton" or torch.cuda.is_available() else _SHAPES[2:4]


def gradient_of(shape: tuple[int, ...], dtype: torch.dtype, where: str) -> Tensor:
    return activation(shape, dtype, 9).to(where)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TAILS)
def test_forward(backend, dtype, name):
    where, tail = device(backend, dtype), TAILS[name]
    for shape in shapes_of(backend):
        made = make(tail, shape, dtype, where)
        got, mask = ops.gated_tail(*made.values(), tail.masked, backend=backend)
        want, terms = equation(*doubled(made).values()).detach(), terms_of(made)
        assert_near(f"out {shape}", got, want, terms, dtype, roundings=16.0)
        assert got.is_contiguous(memory_format=torch.channels_last)
        if tail.masked:
            z = equation(*(doubled(made) | {"activation": Activation()}).values()).detach()
            clear = z.abs() > 8 * torch.finfo(torch.float32).eps * terms
            assert torch.equal(unpack_bits(mask, shape[1])[clear], (z > 0)[clear])
            assert not unpack_bits(mask, mask.shape[-1] * 8)[:, shape[1] :].any()
        else:
            assert mask.numel() == 0
        ops.gated_tail_(*made.values(), backend=backend)
        assert torch.equal(made["branch"].x, got)


def mask_of(made: dict[str, Any], tail: Tail, backend: str) -> Tensor | None:
    return ops.gated_tail(*made.values(), True, backend=backend)[1] if tail.masked else None


def per_group(value: Tensor, groups: int) -> Tensor:
    """Return the sums of an activation over the rows of each group, (G, C)."""
    sums = value.sum((2, 3))
    return sums if groups > 1 else sums.sum(0, keepdim=True)


def centred(term: TailTerm) -> Tensor:
    if term.state is None:
        return term.x.double()
    mean, invstd = term.state[0].double(), term.state[1].double()
    return (term.x.double() - mean.view(1, -1, 1, 1)) * invstd.view(1, -1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TAILS)
def test_sums(backend, dtype, name):
    where, tail = device(backend, dtype), TAILS[name]
    with_slope = tail.kind == "leaky_relu" and not tail.masked
    for shape in shapes_of(backend):
        made = make(tail, shape, dtype, where)
        branch, shortcut = made["branch"], made["shortcut"]
        exact = exact_gradients(made, gradient_of(shape, dtype, where))
        gated = Gated(exact.grad, mask_of(made, tail, backend))
        got = ops.gated_tail_reduce(gated, *made.values(), with_slope, backend=backend).double().sum(1)
        size = (1 + terms_of(made)) * exact.grad.double().abs()

        def compare(row: int, want: Tensor, terms: Tensor, factor: Tensor | None, got=got, shape=shape):
            groups, scale = got.shape[0], 1.0 if factor is None else factor.double()
            found = (got[:, row] * scale).to(torch.float64 if dtype is torch.float64 else torch.float32)
            bound = per_group(terms, groups) * (1.0 if factor is None else 1 + factor.double().abs())
            assert_near(f"row {row} of {shape}", found, per_group(want, groups), bound, dtype, roundings=16.0)

        compare(0, exact.branch, size, branch.factor)
        compare(1, exact.branch * centred(branch), size * centred(branch).abs(), branch.factor)
        if shortcut is not None and (shortcut.state is not None or shortcut.factor is not None):
            product = exact.shortcut * centred(shortcut)
            compare(2, product, size * centred(shortcut).abs(), shortcut.factor)
            compare(3, exact.shortcut, size, shortcut.factor)
        leaves = exact.leaves
        if tail.before_add and branch.factor is not None:
            want = leaves["branch"].factor.grad
            assert_near("row 4", got[:, 4].float(), want, per_group(size, got.shape[0]), torch.float32, roundings=32.0)
        if with_slope:
            scale = branch.factor.double() if tail.before_add and branch.factor is not None else 1.0
            total, bound = (got[:, 5] * scale).sum(0).float(), (size * (1 + terms_of(made))).sum((0, 2, 3))
            assert_near("row 5", total, leaves["activation"].slope.grad, 4 * bound, torch.float32, roundings=16.0)


def coefficients_of(term: TailTerm, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return coefficients of the batch, or of each sample where the term has factors of each sample."""
    samples = shape[0] if term.factor is not None and term.factor.shape[0] > 1 else 1
    return torch.stack([state(shape[1], dtype, seed + 2 * sample) for sample in range(samples)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TAILS)
def test_gradients(backend, dtype, name):
    where, tail = device(backend, dtype), TAILS[name]
    for shape in shapes_of(backend):
        made = make(tail, shape, dtype, where)
        terms = (made["branch"], made["shortcut"])
        exact = exact_gradients(made, gradient_of(shape, dtype, where))
        gated = Gated(exact.grad, mask_of(made, tail, backend))
        coefficients = [
            None if term is None or term.state is None else coefficients_of(term, shape, dtype, seed).to(where)
            for seed, term in enumerate(terms)
        ]
        with_logits = any(term is not None and term.logits is not None for term in terms)
        needs = TailNeeds(True, made["shortcut"] is not None, with_logits)
        got = ops.gated_tail_apply(gated, *made.values(), TailCoefficients(*coefficients), needs, backend=backend)
        size = (1 + terms_of(made)) * exact.grad.double().abs()
        for index, (term, want) in enumerate(zip(terms, (exact.branch, exact.shortcut), strict=True)):
            grad_x, grad_logits = got[2 * index : 2 * index + 2]
            if term is None:
                assert grad_x.numel() == grad_logits.numel() == 0
                continue
            bound = size if term.factor is None else size * (1 + term.factor.double().abs()[:, :, None, None])
            if coefficients[index] is not None:
                a, c1, mean, k = (row.double()[:, :, None, None] for row in coefficients[index].unbind(1))
                pull = (term.x.double() - mean) * k
                want, bound = a * (want - c1 - pull), a.abs() * (bound + c1.abs() + pull.abs())
            assert_near(f"grad_x of {index}, {shape}", grad_x, want, bound, dtype, roundings=16.0)
            leaf = exact.leaves[("branch", "shortcut")[index]]
            if term.logits is None:
                assert grad_logits.numel() == 0
            else:
                assert_near(f"logits {shape}", grad_logits, leaf.logits.grad, size, dtype, roundings=16.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_needed_is_written(backend):
    where = device(backend)
    made = make(TAILS["two gates"], (2, 24, 3, 3), torch.float32, where)
    gated = Gated(gradient_of((2, 24, 3, 3), torch.float32, where), None)
    coefficients = TailCoefficients(
        state(24, torch.float32)[None].to(where), state(24, torch.float32, 1)[None].to(where)
    )
    every = ops.gated_tail_apply(gated, *made.values(), coefficients, TailNeeds(True, True, True), backend=backend)
    for index, needs in enumerate([TailNeeds(True, False, False), TailNeeds(False, True, False)]):
        some = ops.gated_tail_apply(gated, *made.values(), coefficients, needs, backend=backend)
        assert torch.equal(some[2 * index], every[2 * index])
        assert [t.numel() > 0 for t in some] == [position == 2 * index for position in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind != "leaky_relu"])
def test_edges_of_the_activations(backend, kind):
    """NaN, infinities, large values and the activations' own edges give what torch gives."""
    where = device(backend)
    edges = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3.0, -3.0, 6.0, 90.0, -90.0, 1e30, -1e30, 1e-30, 20.0, -20.0]
    z = torch.tensor([*edges, 1.0], device=where).view(1, 16, 1, 1).contiguous(memory_format=torch.channels_last)
    tail = (TailTerm(z), None, Activation(kind))
    leaf = z.double().requires_grad_()
    want = act(leaf, Activation(kind))
    want.backward(torch.ones_like(want))
    got = ops.gated_tail(*tail, backend=backend)[0]
    absolute = 3e-7 if kind == "gelu" else 1e-37  # torch's own gelu is a difference for negative arguments
    if backend == "reference" and kind == "gelu":  # torch's own, in float32 with AVX-512: NaN at infinity, less exact
        want, got = (torch.where(z.isinf(), 0.0, t) for t in (want, got))
        absolute = 1e-6
    torch.testing.assert_close(got, want.detach().float(), rtol=1e-6, atol=absolute, equal_nan=True)
    nothing = TailCoefficients(None, None)
    needs = TailNeeds(True, False, False)
    grad = ops.gated_tail_apply(Gated(torch.ones_like(z), None), *tail, False, nothing, needs, backend=backend)[0]
    finite = z.abs() < 1e20  # at infinity and beyond 1e20 torch's own gradients are NaN for some
    torch.testing.assert_close(grad[finite], leaf.grad.float()[finite], rtol=1e-5, atol=absolute)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_goes_where_it_goes_in_torch(backend):
    where = device(backend)
    made = make(TAILS["highway"], (2, 24, 3, 3), torch.float32, where)
    made["branch"].x[0, 5, 1, 2], made["branch"].logits[1, 7, 0, 0] = torch.nan, torch.nan
    out = ops.gated_tail(*made.values(), backend=backend)[0]
    want = torch.zeros_like(out, dtype=torch.bool)
    want[0, 5, 1, 2] = want[1, 7, 0, 0] = True
    assert torch.equal(out.isnan(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_residual_is_the_identity(backend):
    """With the branch's factor at 0, out is the shortcut's value, and its gradient is that of out, bit by bit."""
    where, shape = device(backend), (3, 40, 5, 5)
    for factor in (torch.zeros(1, 40), torch.zeros(3, 40)):
        made = make(TAILS["layer scale"], shape, torch.float32, where)
        made["branch"] = made["branch"]._replace(factor=factor.to(where))
        assert torch.equal(ops.gated_tail(*made.values(), backend=backend)[0], made["shortcut"].x)
        grad = gradient_of(shape, torch.float32, where)
        coefficients = TailCoefficients(state(40, torch.float32)[None].to(where), None)
        needs = TailNeeds(False, True, False)
        found = ops.gated_tail_apply(Gated(grad, None), *made.values(), coefficients, needs, backend=backend)
        assert torch.equal(found[2], grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_statistics_do_not_read_x(backend):
    """A NaN in x does not reach a gradient that does not depend on x."""
    where, shape = device(backend), (2, 24, 3, 3)
    made = make(TAILS["pre-activation"], shape, torch.float32, where)
    made["branch"] = TailTerm(made["branch"].x, state(24, torch.float32).to(where))
    made["branch"].x[0, 3, 1, 1] = torch.nan
    coefficients = state(24, torch.float32).to(where)
    coefficients[1] = coefficients[3] = 0
    needs, grad = TailNeeds(True, False, False), gradient_of(shape, torch.float32, where)
    found = ops.gated_tail_apply(
        Gated(grad, None), *made.values(), TailCoefficients(coefficients[None], None), needs, backend=backend
    )[0]
    assert_near("grad_x", found, (grad * coefficients[0].view(1, -1, 1, 1)).double(), grad.abs(), torch.float32)


def _meta(*shape: int) -> Tensor:
    made = torch.empty(shape, device="meta")
    return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made


def test_counted_bytes():
    """Each pass is one launch that touches every tensor once; logits are read, factors cost next to nothing."""
    shape, size = (4, 64, 14, 14), 4 * 64 * 14 * 14 * 4
    state_, factor = _meta(4, 64), _meta(4, 64)
    branch = TailTerm(_meta(*shape), state_, None, _meta(*shape))
    highway = (branch, TailTerm(_meta(*shape)), Activation("relu", None, True), True)
    excited = (TailTerm(_meta(*shape), state_, factor), TailTerm(_meta(*shape)), Activation("relu"), False)
    mask = torch.empty(4, 14, 14, 8, device="meta", dtype=torch.uint8)
    ops_ = launches("triton")
    constant = TailCoefficients(_meta(4, 64), None)
    with record_launches() as made:
        ops_.gated_tail(*highway, False)
        ops_.gated_tail_reduce(Gated(_meta(*shape), None), *highway, False)
        ops_.gated_tail_apply(Gated(_meta(*shape), None), *highway, constant, TailNeeds(True, True, True))
        ops_.gated_tail(*excited, True)
        ops_.gated_tail_reduce(Gated(_meta(*shape), mask), *excited, False)
    vectors = 4 * 4 * 64
    small = [vectors, vectors, 2 * vectors, 2 * vectors, 2 * vectors]
    tensors = [4, 4, 7, 3, 3]
    partials = [0, 0, 0, mask.numel(), mask.numel()]
    sums = [0, 6 * 64 * 4 * 13, 0, 0, 6 * 64 * 4 * 4 * 4]
    found = [launch.bytes() for launch in made]
    assert found == [t * size + s + p + r for t, s, p, r in zip(tensors, small, partials, sums, strict=True)], found


X = activation((2, 8, 3, 3), torch.float32)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ((TailTerm(X, None, torch.ones(3, 8)), None, Activation()), "branch_factor must have 1 row, or 2 like branch"),
        ((TailTerm(X, None, torch.ones(2, 7)), None, Activation()), "branch_factor must have shape"),
        ((TailTerm(X), TailTerm(X[:, :, :2]), Activation()), "was its projection skipped"),
        ((TailTerm(X), None, Activation("tanh")), "kind must be one of identity, relu"),
        ((TailTerm(X), None, Activation("leaky_relu")), "slope must be given for leaky_relu"),
        ((TailTerm(X), None, Activation("relu", torch.ones(8))), "slope must be given for leaky_relu"),
        ((TailTerm(X), None, Activation(), True), "branch_logits must be given if coupled"),
        ((TailTerm(X, None, None, X), None, Activation(), True), "shortcut must be given if coupled"),
        ((TailTerm(X, None, None, X), TailTerm(X, None, None, X), Activation(), True), "shortcut_logits must be None"),
        ((TailTerm(X, None, torch.ones(1, 8), X), None, Activation()), "branch_logits must be None with branch_factor"),
    ],
)
def test_errors(tail, message):
    with pytest.raises(ValueError, match=message):
        ops.gated_tail(*tail, backend="cpu")


def test_a_mask_is_only_for_a_relu_after_the_add():
    mask = torch.zeros(2, 3, 3, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="gate must be None but for a ReLU or leaky ReLU after the add"):
        ops.gated_tail_reduce(Gated(X, mask), TailTerm(X), None, Activation("silu"), backend="cpu")

"""Thousands of wrong calls of every op: each is an error and writes nothing.

An argument that breaks the op's table never reaches a kernel: the call raises TypeError, ValueError or RuntimeError,
and the whole storage of every argument keeps its bits. The package's own messages name the op and the argument. The
tests of the C++ core, `-k cpu`, also run under AddressSanitizer (.ci/sanitized).
"""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from op_examples import Example, examples
from op_inputs import device
from op_mutations import Mutation, mutations
from torch import Tensor

from fusedres.errors import DtypeError, ShapeError
from fusedres.kernels import serving
from fusedres.ops._library import OPS

# Messages of torch's dispatcher, or with torch's own text.
_TORCHS = re.compile(r"fusedres::\w+|Overflow when unpacking|Expected more than 1 value per channel")
_RANDOM = 60  # number of calls of each op with several wrong arguments


def backend_of(name: str) -> str:
    """Return the backend with raw pointers if it has the op."""
    return "cpu" if serving.find(OPS[name].folder, name, "cpu") is not None else "reference"


EVERY_OP = pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}-{backend_of(name)}") for name in OPS])


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in tensors_in(value)] if isinstance(values, list | tuple) else []


def bits_of(tensor: Tensor) -> bytes:
    """Return the whole storage, or that of the values of a sparse tensor."""
    if tensor.layout is torch.sparse_coo:
        return bits_of(tensor._values())
    if tensor.is_meta or tensor.layout is not torch.strided or tensor._is_zerotensor():
        return b""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().tobytes()


def refused(name: str, arguments: Example, backend: Any, what: str, lazy: bool = False) -> None:
    """Assert that the call raises an error with a full message and writes nothing."""
    op = OPS[name]
    values = [arguments[argument] for argument in op.arguments[:-1]]
    tensors = tensors_in(values)
    before = [bits_of(tensor) for tensor in tensors]
    call = op.check if lazy else getattr(torch.ops.fusedres, name)
    try:
        call(*values, backend)
    except (TypeError, ValueError, RuntimeError) as error:
        message = str(error)
    else:
        raise AssertionError(f"{name}: accepted {what}")
    ours = re.match(rf"{name}: (?:there is no .* backend; |(\w+)(?:\[\d\])? must .+, got .+)", message, re.DOTALL)
    assert ours or _TORCHS.search(message), f"{name}, {what}: {message!r}"
    assert not ours or ours[1] is None or ours[1] in op.arguments, message
    assert [bits_of(tensor) for tensor in tensors] == before, f"{name} wrote with {what}"


def test_every_op_has_examples() -> None:
    assert set(examples()) == set(OPS)


@EVERY_OP
def test_the_examples_are_right(name: str) -> None:
    for backend in {backend_of(name), "reference"}:
        for example in examples()[name]:
            getattr(torch.ops.fusedres, name)(*[example[a] for a in OPS[name].arguments[:-1]], backend)


def wrong(name: str) -> list[tuple[Example, Mutation]]:
    return [(example, mutation) for example in examples()[name] for mutation in mutations(name, example)]


def test_there_are_many_wrong_calls() -> None:
    counts = {name: len(wrong(name)) for name in OPS}
    assert sum(counts.values()) > 3000
    assert min(counts.values()) > 20, counts


@EVERY_OP
def test_one_wrong_argument(name: str) -> None:
    for example, mutation in wrong(name):
        backend = mutation.value if mutation.argument == "backend" else backend_of(name)
        changed = example | {mutation.argument: mutation.value}
        refused(name, changed, backend, f"{mutation.argument}: {mutation.what}", mutation.lazy)


@EVERY_OP
def test_several_wrong_arguments(name: str) -> None:
    """One argument is always wrong, and others may be; the error is about the first wrong one that is checked."""
    generator = random.Random(name)
    options = [
        (example, [m for m in mutations(name, example) if not m.lazy and m.what != "meta"])
        for example in examples()[name]
    ]
    for _ in range(_RANDOM):
        example, choices = generator.choice(options)
        sure = generator.choice([m for m in choices if m.always])
        chosen = [m for m in generator.sample(choices, 3) if m.argument != sure.argument]
        changed = example | {m.argument: m.value for m in (*chosen, sure)}
        backend = changed.pop("backend", backend_of(name))
        refused(name, changed, backend, ", ".join(f"{m.argument}: {m.what}" for m in (*chosen, sure)))


@pytest.mark.parametrize("name", ["bn_relu_", "bn_statistics", "bn_add_relu", "one_pass_backward", "conv_weights"])
def test_triton_gets_no_wrong_argument(name: str) -> None:
    """The checks are the same, except for the device."""
    where = device("triton")
    if where != "cpu":
        pytest.skip("the examples are CPU tensors, which Triton takes only in its interpreter")
    for example, mutation in wrong(name)[::3]:
        if mutation.argument != "backend":
            changed = example | {mutation.argument: mutation.value}
            refused(name, changed, "triton", f"{mutation.argument}: {mutation.what}", mutation.lazy)


# Errors in the relation of two arguments.
_RELATIONS: dict[str, list[tuple[int, Example]]] = {
    "bn_add_relu": [(1, {"shortcut": torch.zeros(2, 4, 6, 5).contiguous(memory_format=torch.channels_last)})],
    "bn_backward_coefficients": [(0, {"partials": torch.zeros(3, 3, 9)}), (1, {"shortcut_state": None})],
    "bn_finalize": [(0, {"momentum": None, "num_batches_tracked": None})],
    "bn_statistics": [
        (0, {"momentum": None, "num_batches_tracked": None}),
        (0, {"x": torch.zeros(1, 9, 1, 1)}),
        (0, {"x": torch.zeros(0, 9, 6, 5).contiguous(memory_format=torch.channels_last)}),
        (0, {"running_mean": None}),
        (0, {"running_var": None}),
    ],
    "conv_bn_add_relu": [(1, {"shortcut_stride": 2}), (0, {"shortcut_state": torch.zeros(4, 10)})],
    "conv_dgrad": [
        (0, {"y": torch.zeros(2, 10, 3, 5).contiguous(memory_format=torch.channels_last)}),
        (0, {"padding": [0, 1]}),
        (1, {"input": torch.zeros(2, 9, 6, 5).contiguous(memory_format=torch.channels_last)}),
        (1, {"y": None}),
    ],
    "conv_fprop": [(0, {"dilation": [40, 1]}), (0, {"padding": [2**31 - 1, 2**31 - 1]})],
    "conv_wgrad": [(0, {"stride": [1, 1]}), (1, {"gate": torch.zeros(2, 3, 5, 3, dtype=torch.uint8)})],
    "conv_wgrad_finalize": [(0, {"weights": [torch.zeros(10, 9, 3, 3)]})],
    "bn_from_moments": [(0, {"momentum": None, "num_batches_tracked": None}), (0, {"rows": 1})],
    "dense_append_": [(0, {"first": 6})],
    "dense_gradient": [(0, {"first": 6}), (1, {"channels": 7}), (0, {"moments": None}), (0, {"corrections": None})],
    "one_pass_dgrad": [(0, {"z_state": None})],
    "one_pass_statistics": [(0, {"count": 1}), (0, {"momentum": None, "num_batches_tracked": None})],
    "one_pass_tail": [(0, {"shortcut": None}), (0, {"shortcut_state": torch.zeros(4, 10)}), (1, {"z_stride": 1})],
    "shortcut_grad_": [(0, {"shortcut_stride": 1}), (0, {"shortcut_stride": 7})],
}  # fmt: skip


@pytest.mark.parametrize("name", _RELATIONS)
def test_arguments_that_do_not_belong_together(name: str) -> None:
    for index, change in _RELATIONS[name]:
        refused(name, examples()[name][index] | change, backend_of(name), str(list(change)))


def test_errors_are_torchs_classes_too() -> None:
    """Code that catches torch's RuntimeError still works, and so does code that catches the exact class."""
    (example,) = examples()["bn_relu_"]
    for change, error, exact in (
        ({"state": torch.zeros(4, 8)}, ShapeError, ValueError),
        ({"state": torch.zeros(4, 9, dtype=torch.float64)}, DtypeError, TypeError),
    ):
        with pytest.raises(error, match="bn_relu_: state must") as raised:
            torch.ops.fusedres.bn_relu_(*(example | change).values(), "cpu")
        assert isinstance(raised.value, RuntimeError) and isinstance(raised.value, exact)


def test_a_call_that_was_right_is_checked_again() -> None:
    """Even if an earlier call with the same signature was right, the memory of the next call is checked."""
    (example,) = examples()["bn_relu_"]
    torch.ops.fusedres.bn_relu_(*example.values(), "cpu")
    example["state"].untyped_storage().resize_(0)
    refused("bn_relu_", example, "cpu", "a freed state")


def test_what_is_negated_lazily_is_resolved() -> None:
    """torch's dispatcher resolves it before the op sees it."""
    (example,) = examples()["bn_relu_maxpool"]
    want = torch.ops.fusedres.bn_relu_maxpool(-example["x"], example["state"], True, "cpu")
    got = torch.ops.fusedres.bn_relu_maxpool(torch._neg_view(example["x"]), example["state"], True, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_views_of_a_larger_storage_are_right() -> None:
    """Such views are some images of a batch, with an offset and with storage before and after them."""
    (example,) = examples()["bn_relu_"]
    batch = torch.cat([example["x"]] * 3).contiguous(memory_format=torch.channels_last)
    want = batch.clone()
    torch.ops.fusedres.bn_relu_(batch[2:4], example["state"], "cpu")
    assert not torch.equal(batch[2:4], want[2:4])
    assert torch.equal(batch[:2], want[:2]) and torch.equal(batch[4:], want[4:])


@EVERY_OP
def test_results_are_on_the_inputs_device(name: str) -> None:
    """torch's default device does not matter. The kernel runs as in a block: torch calls ops without that default."""
    op = OPS[name]
    kernel = op.kernel(backend_of(name))
    for example, again in zip(examples()[name], examples()[name], strict=True):
        want = kernel(*op.grouped([example[a] for a in op.arguments[:-1]]))
        with torch.device("meta"):
            got = kernel(*op.grouped([again[a] for a in op.arguments[:-1]]))
        for one, other in zip(tensors_in(got), tensors_in(want), strict=True):
            assert one.device == other.device and one.shape == other.shape and one.dtype == other.dtype
        for argument in op.written:
            torch.testing.assert_close(again[argument], example[argument], equal_nan=True, rtol=0, atol=0)

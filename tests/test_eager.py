"""Tests of eager.py: a wrong convolution of torch is found on any CPU, and the reason is shown.

A stand-in for oneDNN's convolution has the faults that were seen in the real one. Everything else is the library's own.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import eager
import pytest
import torch
from eager import Convolution, convolutions, fault, probe, require_no_crash, trust, trusted
from fusion import FORMATS, fused_twin, label, made_by
from reference import build, inputs, oracle, run, separate
from shapes import CORE, Case
from tolerance import UNIT, check, complaints
from torch import Tensor, nn
from torch.nn import functional as F

BFLOAT16 = torch.bfloat16
CASE = CORE[4]


def _flat(y: Tensor) -> Tensor:
    """Return the elements in the order of memory."""
    return y.as_strided((y.numel(),), (1,))


def _nan(y: Tensor) -> Tensor:
    _flat(y)[3] = torch.nan
    return y


def _unwritten(y: Tensor) -> Tensor:
    """Leave one value as it was in the memory before."""
    out = torch.empty_like(y)
    _flat(out)[1:] = _flat(y)[1:]
    return out


def _off(y: Tensor) -> Tensor:
    return y * 1.1


class _Wavering:
    """Rounds in the other direction in every second pair of calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, y: Tensor) -> Tensor:
        self.calls += 1
        return torch.nextafter(y, y + 1) if self.calls // 2 % 2 else y


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": _nan,
    "unwritten": _unwritten,
    "off": _off,
    "wavering": _Wavering(),
}


@pytest.fixture
def afresh() -> Iterator[None]:
    """Start without any known convolution, and forget afterwards what was found."""
    probe.cache_clear()
    yield
    probe.cache_clear()


@pytest.fixture
def wrong(request: pytest.FixtureRequest, afresh: None) -> Iterator[None]:
    """Replace oneDNN's bfloat16 convolution by one with this fault."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    alter = FAULTS[request.param]

    def convolution(x, weight, bias, padding, stride, dilation, groups):  # type: ignore[no-untyped-def]
        y = F.conv2d(x.double(), weight.double(), bias, stride, padding, dilation, groups).to(x.dtype)
        return alter(y) if x.dtype == BFLOAT16 else y

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mkldnn_convolution", convolution, "CPU")
        yield


def _block(case: Case = CASE, dtype: torch.dtype = BFLOAT16) -> tuple[nn.Module, Tensor, Tensor]:
    block = build(case, dtype, torch.channels_last)
    x, grad = inputs(case, dtype, torch.channels_last)
    separate(block, x)
    return block, x, grad


def _uses_onednn() -> bool:
    """Return whether oneDNN serves bfloat16 here: torch asks for AVX-512."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@pytest.mark.parametrize("wrong", FAULTS, indirect=True)
@pytest.mark.usefixtures("wrong")
def test_a_wrong_convolution_is_found_and_left_out() -> None:
    if not _uses_onednn():
        pytest.skip("oneDNN does not serve bfloat16 on this CPU")
    block, x, grad = _block()
    found = fault(convolutions(block, x))
    assert found is not None and found.startswith("torch's bfloat16 convolution of 3x")
    assert "is wrong on this CPU: " in found
    with pytest.warns(UserWarning, match=r"is wrong on this CPU: .*; judged without oneDNN"):
        trust(block, x)
    assert not torch.backends.mkldnn.enabled
    assert fault(convolutions(block, x)) is None
    truth = oracle(block, x, grad, UNIT[BFLOAT16])
    check(run(fused_twin(block), x, grad), run(copy.deepcopy(block), x, grad), truth, BFLOAT16)
    # A fault of the fused block is still found.
    moved = fused_twin(block)
    with torch.no_grad():
        moved.get_submodule(CASE.last_norm).bias.add_(0.5)
    assert complaints(run(moved, x, grad), run(block, x, grad), truth, BFLOAT16)


@pytest.mark.parametrize("wrong", ["nan"], indirect=True)
@pytest.mark.usefixtures("wrong")
def test_other_dtypes_and_the_next_test_keep_onednn() -> None:
    require_no_crash()
    trust(*_block(dtype=torch.float32)[:2])
    assert torch.backends.mkldnn.enabled
    block, x, _ = _block()
    if _uses_onednn():
        with pytest.warns(UserWarning, match="judged without oneDNN"), trusted(block, x):
            assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.usefixtures("afresh")
def test_a_wrong_gradient_is_found(what: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Convolution.backward

    def altered(self: Convolution, *given: Tensor) -> tuple[Tensor, Tensor]:
        grads = list(backward(self, *given))
        if given[0].dtype == BFLOAT16:
            grads[which] = FAULTS[what](grads[which])
        return grads[0], grads[1]

    monkeypatch.setattr(Convolution, "backward", altered)
    block, x, _ = _block()
    found = fault(convolutions(block, x))
    assert found is not None and ("input gradient", "weight gradient")[which] in found
    said = r"bfloat16 .* gradient of the convolution of .* is wrong on this CPU"
    with pytest.raises(pytest.skip.Exception, match=said), pytest.warns(UserWarning, match=said):
        trust(block, x)


@pytest.mark.usefixtures("afresh")
def test_reading_beyond_an_operand_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is found even if the values that were read are multiplied by zero."""
    forward = Convolution.forward

    def beyond(self: Convolution, x: Tensor, weight: Tensor) -> Tensor:
        out, end = forward(self, x, weight), x.storage_offset() + x.numel()
        if x.dtype != BFLOAT16 or x.untyped_storage().nbytes() <= 2 * end:
            return out
        return out + 0 * x.as_strided((1,), (1,), end)

    monkeypatch.setattr(Convolution, "forward", beyond)
    block, x, _ = _block()
    found = fault(convolutions(block, x))
    assert found is not None and "bfloat16 convolution" in found and "not finite" in found


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.usefixtures("afresh")
def test_sound_convolutions_are_found_sound(memory_format: torch.memory_format) -> None:
    """On no known CPU are float32 convolutions wrong that do not crash; each convolution is probed once."""
    require_no_crash()
    made = frozenset().union(*(made_by(case, torch.float32, memory_format) for case in CORE))
    assert len(made) > 10
    assert fault(made) is None
    asked = probe.cache_info().misses
    assert asked == len(made) and fault(made) is None
    assert probe.cache_info().misses == asked


def test_convolutions_are_those_of_a_step_in_both_layouts() -> None:
    block, x, _ = _block()
    before = copy.deepcopy(block.state_dict())
    made = convolutions(block, x)
    assert {each.weight for each in made} == {tuple(p.shape) for p in block.parameters() if p.dim() == 4}
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items()) and x.grad is None
    for size in {each.x for each in made}:
        texts = [str(each) for each in made if each.x == size]
        assert any("(NCHW)" in text for text in texts) and any("(NHWC)" in text for text in texts)
    assert {each.dtype for each in convolutions(*_block(dtype=torch.float32)[:2], BFLOAT16)} == {BFLOAT16}
    assert not convolutions(*_block(dtype=torch.float64)[:2])


def test_nothing_of_the_package_has_a_part_in_it() -> None:
    tree = ast.parse(Path(eager.__file__).read_text())
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names and not [name for name in names if name.startswith("fusedres")]

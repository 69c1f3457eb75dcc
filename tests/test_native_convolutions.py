"""The convolutions of the passes in C++, where they are not torch's: in float32 own ones, in bfloat16 products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import trust
from fusion import fused_twin, label, stock_case
from reference import oracle, run
from shapes import CORE, Case
from test_native_passes import assert_same
from tolerance import UNIT, check

MANY_PIXELS = (  # enough for Winograd's algorithm, beside convolutions that may be torch's
    Case("basic", "identity", 32, 32, 1, 2, 24, 24),
    Case("basic", "projection", 24, 32, 2, 2, 48, 46),
    Case("basic", "zeropad", 24, 32, 2, 2, 48, 46),
    Case("bottleneck", "projection", 32, 16, 1, 2, 24, 24),
    Case("bottleneck", "identity", 64, 16, 1, 2, 24, 24),
)
FEW_PIXELS = (  # for large weights, which products of matrices need not reorder in bfloat16
    Case("basic", "identity", 32, 32, 1, 1, 3, 3),
    Case("basic", "projection", 32, 48, 2, 1, 6, 5),
    Case("bottleneck", "identity", 256, 64, 1, 1, 4, 5),
    Case("bottleneck", "projection", 96, 48, 2, 2, 4, 5),
)


@pytest.mark.parametrize("case", MANY_PIXELS, ids=label)
def test_own_convolutions_beside_torchs(
    case: Case, served: dict[str, int], in_python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x, grad = stock_case(case, memory_format=torch.channels_last)
    trust(block, x)
    expected = in_python(run, fused_twin(block), x, grad)
    assert_same(run(fused_twin(block), x, grad), expected)
    eager = run(block, x, grad)
    for name, value in expected.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-3, atol=1e-3, msg=name)
    twin = fused_twin(block).eval()
    for images in (1, 2):
        monkeypatch.setattr("fusedres.modules.reading.images_at_a_time", lambda x, shape, images=images: images)
        with torch.no_grad():
            expected, got, eager = in_python(twin, x), twin(x), block.eval()(x)
        assert torch.equal(got, expected)
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-4)
    assert served == {"forward": 1, "infer": 2, "backward": 1}


@pytest.mark.parametrize("python", [False, True], ids=["C++", "Python"])
@pytest.mark.parametrize("memory", ["auto", "min"])
@pytest.mark.parametrize("case", FEW_PIXELS, ids=label)
def test_few_pixels_in_bfloat16(
    case: Case, memory: str, python: bool, served: dict[str, int], in_python: Callable[..., Any]
) -> None:
    block, x, grad = stock_case(case, torch.bfloat16)
    twin = fused_twin(block, memory)
    got = in_python(run, twin, x, grad) if python else run(twin, x, grad)
    assert served == {"forward": int(not python), "infer": 0, "backward": int(not python)}
    check(got, run(block, x, grad), oracle(block, x, grad, UNIT[torch.bfloat16]), torch.bfloat16)


@pytest.mark.parametrize("case", [*CORE, *FEW_PIXELS], ids=label)
def test_float32_parameters_under_autocast(case: Case, served: dict[str, int], in_python: Callable[..., Any]) -> None:
    block, x, grad = stock_case(case)
    x, grad = x.bfloat16(), grad.bfloat16()

    expected = in_python(run, fused_twin(block), x, grad, torch.bfloat16)
    got = run(fused_twin(block), x, grad, torch.bfloat16)
    assert_same(got, expected)
    assert served == {"forward": 1, "infer": 0, "backward": 1}
    assert got["grad.conv1.weight"].dtype is torch.float32

"""The passes in C++ (csrc/residual_block): if they serve a call, their results equal the Python passes' bit by bit."""

from __future__ import annotations

import copy
import itertools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eager import trust
from fusion import FORMATS, fused_twin, label, stock_case
from reference import run
from shapes import CORE, Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import _C
from fusedres.autograd import BlockPlan, ConvBN, cpu_passes
from fusedres.modules.choice import images_at_a_time

ONE_PASS = (
    Case("bottleneck", "identity", 16, 4, batch=4, height=8, width=8),
    Case("bottleneck", "projection", 4, 4, 1, 4, 9, 7),
    Case("bottleneck", "projection", 4, 4, 2, 6, 9, 11),
    Case("bottleneck", "projection", 24, 4, 2, 4, 9, 11),  # too few rows for a one-pass projection
    Case("basic", "projection", 4, 8, 2, 4, 9, 11),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert got[name].stride() == value.stride() and got[name].dtype is value.dtype, name


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_training_is_the_python_passes(
    case: Case,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    served: dict[str, int],
    in_python: Callable[..., Any],
) -> None:
    block, x, grad = stock_case(case, dtype, memory_format)
    expected = in_python(run, fused_twin(block), x, grad)
    assert not any(served.values())
    got = run(fused_twin(block), x, grad)
    assert_same(got, expected)
    assert served == {"forward": 1, "infer": 0, "backward": 1}


@pytest.mark.parametrize("mode", ["eval", "mixed"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_frozen_statistics(case: Case, mode: str, served: dict[str, int], in_python: Callable[..., Any]) -> None:
    block, x, grad = stock_case(case, mode=mode)
    expected = in_python(run, fused_twin(block), x, grad)
    assert_same(run(fused_twin(block), x, grad), expected)
    assert served == {"forward": 1, "infer": 0, "backward": 1}


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_options_of_batchnorm(options: dict[str, Any], served: dict[str, int], in_python: Callable[..., Any]) -> None:
    for case in CORE:
        block, x, grad = stock_case(case)
        for name in case.norms:
            old = block.get_submodule(name)
            block.set_submodule(name, nn.BatchNorm2d(old.num_features, **options))
        expected = in_python(run, fused_twin(block), x, grad)
        assert_same(run(fused_twin(block), x, grad), expected)
    assert served["forward"] == served["backward"] == len(CORE)


@pytest.mark.parametrize("images", [1, 2, 3, 100])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_inference_some_images_at_a_time(
    case: Case,
    images: int,
    served: dict[str, int],
    in_python: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fusedres.modules.reading.images_at_a_time", lambda x, shape: images)
    block, x, _ = stock_case(case, memory_format=torch.channels_last, mode="eval")
    for some in {min(images, len(x)), len(x) % images} - {0}:
        trust(block, x[:some])
    twin = fused_twin(block)
    behind = torch.cat([x, x.flip(0)]).to(memory_format=torch.channels_last)[x.shape[0] :]  # not first in its storage
    for source in (x, behind):
        with torch.no_grad():
            expected, got = in_python(twin, source), twin(source)
        assert torch.equal(got, expected) and got.stride() == expected.stride()
    assert served == {"forward": 0, "infer": 2, "backward": 0}
    with torch.no_grad():
        frozen = fusedres.freeze(fused_twin(block))(behind)
    torch.testing.assert_close(frozen, got)
    assert frozen.stride() == got.stride()


def test_inference_is_in_equal_parts_where_its_output_would_be_fresh_memory() -> None:
    def parts(images: int, channels: int, out_channels: int) -> int:
        return images_at_a_time(torch.empty(1).expand(images, channels, 28, 28), (images, out_channels, 14, 14))

    assert [parts(images, 512, 1024) for images in (1, 16, 20, 21, 32, 64)] == [1, 16, 20, 7, 8, 10]
    assert [parts(images, 8, 2048) for images in (20, 21, 32)] == [20, 7, 8]  # the output is the larger one
    assert parts(2, 16384, 8) == 1  # an image is larger than a part


def test_every_choice_of_what_needs_a_gradient(served: dict[str, int], in_python: Callable[..., Any]) -> None:
    """Each parameter and x alone, all but one, and some pairs: exactly the wanted gradients are computed."""
    for case in CORE:
        block, x, grad = stock_case(case)
        names = ["x", *dict(block.named_parameters())]
        chosen = [*([n] for n in names), *([m for m in names if m != n] for n in names)]
        chosen += [list(pair) for pair in itertools.combinations(names[::3], 2)]

        def gradients(wanted: list[str], block: nn.Module = block, x: Tensor = x, grad: Tensor = grad) -> list[Any]:
            twin = fused_twin(block)
            for name, parameter in twin.named_parameters():
                parameter.requires_grad_(name in wanted)
            source = x.detach().clone().requires_grad_("x" in wanted)
            twin(source).backward(grad)
            return [source.grad, *(p.grad for p in twin.parameters())]

        for wanted in chosen:
            before = served["backward"]
            for mine, other in zip(gradients(wanted), in_python(gradients, wanted), strict=True):
                assert (mine is None) == (other is None), wanted
                assert mine is None or torch.equal(mine, other), wanted
            assert served["backward"] == before + 1


def test_settings_that_are_lists_or_numbers(served: dict[str, int]) -> None:
    """A user may have set these instead of a tuple or a bool."""
    block, x, grad = stock_case(CORE[0])
    expected = run(fused_twin(block), x, grad)
    twin = fused_twin(block)
    twin.conv1.stride, twin.conv1.padding, twin.conv1.dilation = [1, 1], [1, 1], [1, 1]
    twin.bn2.training = 1
    assert_same(run(twin, x, grad), expected)
    assert served["forward"] == 2
    twin.conv1.stride, twin.conv1.padding, twin.conv1.dilation = 1, [1], (1,)
    for name, value in run(copy.deepcopy(twin), x, grad).items():
        assert name.startswith("stats.") or torch.equal(value, expected[name]), name
    assert served["forward"] == 3


UNFUSED = ("batch_norm", "aten::add", "aten::relu", "aten::threshold_backward", "aten::clamp", "aten::mul", "aten::sub")


@pytest.mark.parametrize("memory", ["auto", "min"])
def test_nothing_unfused_runs(memory: str, served: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, torch's profiler sees memory and convolutions, but none of the operators that the kernels replace."""
    monkeypatch.setattr("fusedres.autograd.cpu_passes.direct", lambda: True)  # else a profiler gets the ops one by one
    for case in (*CORE, *ONE_PASS):
        block, x, grad = stock_case(case, memory_format=torch.channels_last)
        twin = fused_twin(block, memory)
        source = x.detach().requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            twin(source).backward(grad)
        names = {event.key for event in profiler.key_averages()}
        assert _C.build_info()["isa_used"] == "avx2" or any("convolution" in name for name in names), names
        assert not {name for name in names if any(each in name for each in UNFUSED)}
    assert served["forward"] == served["backward"] == len(CORE) + len(ONE_PASS)


def test_a_graph_that_is_kept_can_be_run_twice(served: dict[str, int]) -> None:
    for case in CORE:
        block, x, grad = stock_case(case)
        twin = fused_twin(block)
        source = x.detach().clone().requires_grad_()
        out = twin(source)
        inputs = [source, *twin.parameters()]
        first = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        second = torch.autograd.grad(out, inputs, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case
    assert served["backward"] == 2 * len(CORE)


def test_gradients_are_handed_over_not_copied() -> None:
    """No one else holds a gradient, so that the engine can use it as .grad; no two gradients share memory."""
    for case in CORE:
        block, x, grad = stock_case(case)
        twin = fused_twin(block)
        out = twin(x.detach().clone().requires_grad_())
        out.backward(grad)
        storages = [p.grad.untyped_storage() for p in twin.parameters() if p.grad is not None]
        spans = {
            (p.grad.data_ptr(), p.grad.data_ptr() + p.grad.nbytes) for p in twin.parameters() if p.grad is not None
        }
        assert len(spans) == len(storages) == len(list(twin.parameters()))
        ordered = sorted(spans)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ordered)), case


def test_nothing_leaks() -> None:
    """Two hundred steps with 3 MB tensors leave no memory in use; a handle that is never freed would keep 600 MB.

    The current resident memory counts, not the peak, which other tests of this process may have raised.
    """
    block, x, grad = stock_case(Case("basic", "projection", 8, 16, 1, 4, 112, 112))
    twin = fused_twin(block)

    def steps(count: int) -> int:
        for _ in range(count):
            source = x.detach().requires_grad_()
            twin(source).backward(grad)
            with torch.no_grad():
                twin.eval()(x)
            twin.train()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = steps(20)
    assert steps(200) - before < 100_000_000


class _Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def _autocast(block: nn.Module, x: Tensor, grad: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x.detach().requires_grad_())
    out.backward(grad.to(out.dtype))


def _dispatch_mode(block: nn.Module, x: Tensor, grad: Tensor) -> None:
    with _Passing():
        run(block, x, grad)


def _other_backend(block: nn.Module, x: Tensor, grad: Tensor) -> None:
    with fusedres.use_backend("reference"):
        run(block, x, grad)


def _create_graph(block: nn.Module, x: Tensor, grad: Tensor) -> None:
    source = x.detach().requires_grad_()
    torch.autograd.grad(block(source), source, grad, create_graph=True)


ELSEWHERE: dict[str, tuple[Callable[..., None], int]] = {  # and how many forward passes are still served
    "autocast": (_autocast, 0),
    "dispatch mode": (_dispatch_mode, 0),
    "other backend": (_other_backend, 0),
    "create_graph": (_create_graph, 1),
}


@pytest.mark.parametrize("what", ELSEWHERE)
def test_where_they_do_not_serve(what: str, served: dict[str, int]) -> None:
    call, forwards = ELSEWHERE[what]
    block, x, grad = stock_case(CORE[0])
    call(fused_twin(block), x, grad)
    assert served == {"forward": forwards, "infer": 0, "backward": 0}


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("case", ONE_PASS, ids=label)
def test_one_pass(
    case: Case, memory_format: torch.memory_format, served: dict[str, int], in_python: Callable[..., Any]
) -> None:
    block, x, grad = stock_case(case, memory_format=memory_format)
    twin = fused_twin(block, memory="min")
    expected = in_python(run, copy.deepcopy(twin), x, grad)
    assert_same(run(copy.deepcopy(twin), x, grad), expected)
    assert served == {"forward": 1, "infer": 0, "backward": 1}
    for parameter in (twin.conv1.weight, twin.bn2.weight):
        parameter.requires_grad_(False)
    expected = in_python(run, copy.deepcopy(twin), x, grad)
    assert_same(run(copy.deepcopy(twin), x, grad), expected)


def test_one_pass_in_other_dtypes_is_not_served(served: dict[str, int]) -> None:
    block, x, grad = stock_case(ONE_PASS[0], torch.float64)
    run(fused_twin(block, memory="min"), x, grad)
    assert not any(served.values())


def test_a_saved_tensor_in_another_layout_is_not_served(served: dict[str, int]) -> None:
    block, x, grad = stock_case(CORE[0], memory_format=torch.channels_last)
    plain = run(fused_twin(block), x, grad)
    contiguous = torch.contiguous_format
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(memory_format=contiguous), lambda t: t):
        packed = run(fused_twin(block), x, grad)
    assert served == {"forward": 2, "infer": 0, "backward": 1}
    assert all(torch.equal(value, packed[name]) for name, value in plain.items())


@pytest.fixture
def reconnected() -> Iterator[None]:
    """Connect again inside the test, and again after it."""
    cpu_passes._connected.cache_clear()
    yield
    cpu_passes._connected.cache_clear()


@pytest.mark.usefixtures("reconnected")
def test_a_torch_without_the_functions_runs_in_python(monkeypatch: pytest.MonkeyPatch, served: dict[str, int]) -> None:
    names = _C.torch_functions()
    monkeypatch.setattr(_C, "torch_functions", lambda: [*names, "aoti_torch_that_nobody_has"])
    block, x, grad = stock_case(CORE[0])
    without = run(fused_twin(block), x, grad)
    assert not any(served.values())
    monkeypatch.undo()
    cpu_passes._connected.cache_clear()
    assert_same(run(fused_twin(block), x, grad), without)
    assert cpu_passes._connected()


def test_the_core_checks_what_it_is_given() -> None:
    assert cpu_passes._connected()
    unit = ConvBN((1, 1), (1, 1), (1, 1), 1, False, True, True, 0.1, 1e-5)
    plan = BlockPlan((unit, unit), None, 1, (False, False), (False, False), 1, torch.float32, "cpu")
    x = torch.zeros(2, 8, 4, 4).to(memory_format=torch.channels_last)
    tensors = (torch.zeros(8, 8, 3, 3), None, None, None, None, None) * 2
    with pytest.raises(ValueError, match="expected six tensors for each unit"):
        _C.residual_block_forward(x, plan, tensors[:-1], 1)
    with pytest.raises(ValueError, match="batch statistics"):
        _C.residual_block_infer(x, plan, tensors, 1)
    with pytest.raises(ValueError, match="fields of a plan"):
        _C.connect_torch({}, None, None, ConvBN._fields[1:], BlockPlan._fields)
    with pytest.raises(TypeError):
        _C.residual_block_forward("x", plan, tensors, 1)
    with pytest.raises(TypeError):
        _C.residual_block_forward(x, None, tensors, 1)
    assert _C.residual_block_forward(x.contiguous(), plan, tensors, 1) is None
    assert _C.residual_block_forward(x.int(), plan, tensors, 1) is None

"""torch.compile gives whole graphs through a fused block, forward and backward, with right running statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from fusion import MEMORY, fused_twin, label, stock_case
from reference import build, inputs, run, separate, set_mode
from shapes import CORE, Case, case
from torch import nn

import fusedres


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_same_run(compiled: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert compiled.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-9, atol=1e-9, msg=name)


def compiled_run(block: nn.Module, x: torch.Tensor, grad: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """Run the block compiled, as reference.run does; the names are those of the block itself."""
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    block.zero_grad(set_to_none=True)
    out = compiled(x)
    out.backward(grad)
    grads = {f"grad.{name}": p.grad for name, p in block.named_parameters()}
    stats = {f"stats.{name}": buffer.clone() for name, buffer in block.named_buffers()}
    return {"out": out.detach(), "grad_x": x.grad} | grads | stats  # type: ignore[dict-item]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_fullgraph_aot_eager(case: Case, mode: str, memory: str) -> None:
    """Ahead-of-time autograd traces the fused Function through fake kernels; numbers are the same as without it."""
    block, x, grad = stock_case(case, torch.float64, torch.channels_last, mode)
    twin = fused_twin(block, memory)
    plain = run(copy.deepcopy(twin), x, grad)
    assert_same_run(compiled_run(twin, x, grad, "aot_eager"), plain)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", [CORE[1], CORE[3], CORE[4]], ids=label)
def test_fullgraph_with_own_convolutions(case: Case, memory: str) -> None:
    block, x, grad = stock_case(case, torch.float64, torch.channels_last)
    twin = fused_twin(block, memory, "fused")
    with fusedres.use_backend("reference"):
        plain = run(copy.deepcopy(twin), x, grad)
        assert_same_run(compiled_run(twin, x, grad, "aot_eager"), plain)


@pytest.mark.parametrize("case", [CORE[1], CORE[3]], ids=label)
def test_fullgraph_dynamo_only(case: Case) -> None:
    block, x, grad = stock_case(case, torch.float64)
    twin = fused_twin(block)
    plain = run(copy.deepcopy(twin), x, grad)
    assert_same_run(compiled_run(twin, x, grad, "eager"), plain)


@pytest.mark.parametrize("memory", MEMORY)
def test_running_statistics_over_several_compiled_steps(memory: str) -> None:
    block, x, grad = stock_case(CORE[1], torch.float64, torch.channels_last)
    twin = fused_twin(block, memory)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(3):
        block(x * (step + 1)).backward(grad)
        compiled(x * (step + 1)).backward(grad)
    assert int(twin.bn1.num_batches_tracked) == 3
    for name, buffer in block.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_batch_norm_options_compile(options: dict[str, object]) -> None:
    """momentum=None needs the value of the counter, which must not be read on the host."""
    shape = CORE[1]
    block = set_mode(build(shape, torch.float64, norm=partial(nn.BatchNorm2d, **options)), "train")  # type: ignore[arg-type]
    x, grad = inputs(shape, torch.float64)
    separate(block, x)
    twin = fused_twin(block)
    plain = run(copy.deepcopy(twin), x, grad)
    assert_same_run(compiled_run(twin, x, grad, "aot_eager"), plain)


def test_a_compiled_model_does_not_recompile_for_the_same_shapes() -> None:
    block, x, grad = stock_case(case("basic", "identity"))
    twin = fused_twin(block)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nn.Sequential(twin, copy.deepcopy(twin)), backend=counter, fullgraph=True)
    for _ in range(3):
        compiled(x).backward(grad)
    assert counter.frame_count == 1


def test_inference_compiles_under_no_grad() -> None:
    for shape in (CORE[0], CORE[4]):
        torch._dynamo.reset()
        block, x, _ = stock_case(shape, mode="eval")
        twin = fused_twin(block)
        with torch.no_grad():
            out = torch.compile(twin, backend="aot_eager", fullgraph=True)(x)
            torch.testing.assert_close(out, twin(x), rtol=1e-5, atol=1e-5)


def test_the_ops_pass_opcheck_through_a_block() -> None:
    """Check schema, fake kernel and dispatch of every op that a block calls, with the arguments of these calls."""
    calls: list[tuple[object, tuple[object, ...]]] = []

    class Calls(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "fusedres":
                kept = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, args)
                calls.append((func, kept))
            return func(*args, **(kwargs or {}))

    for shape in CORE:
        for memory in MEMORY:
            for mode in ("train", "eval"):
                block, x, grad = stock_case(shape, memory_format=torch.channels_last, mode=mode)
                with fusedres.use_backend("cpu"), Calls():
                    fused_twin(block, memory)(x.requires_grad_()).backward(grad)
    seen = set()
    for func, args in calls:
        kind = (func, tuple(type(arg) for arg in args), tuple(arg for arg in args if isinstance(arg, (bool, str))))
        if kind not in seen:
            seen.add(kind)
            utilities = ("test_schema", "test_faketensor")
            torch.library.opcheck(func, args, test_utils=utilities)  # type: ignore[arg-type]
    assert len({func for func, _ in calls}) >= 6

"""Failures of whole blocks that other fused layers had and fused blocks must not have."""

from __future__ import annotations

import copy
import threading
from itertools import pairwise

import pytest
import torch
from fusion import FORMATS, MEMORY, expect_paths, fused_twin, label, stock_case
from reference import inputs, oracle, run
from shapes import CORE, Case
from tolerance import check
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.modules import choice

Grads = dict[str, Tensor | None]


def leaf_of(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def state_after(block: nn.Module, **more: Tensor | None) -> Grads:
    named = {f"grad.{name}": p.grad for name, p in block.named_parameters()}
    return named | {f"stats.{name}": buffer for name, buffer in block.named_buffers()} | more


def assert_same(got: Grads, expected: Grads, context: object = "") -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None, name
        # Relative to the largest value; 1e-9 is a million float64 roundings, and no pre-activation is so near zero.
        scale = value.abs().max().item() if value.numel() else 0
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9 * max(scale, 1e-3), msg=f"{context} {name}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_two_forwards_then_one_backward(case: Case, mode: str, memory: str) -> None:
    """The second forward updates the running statistics; the backward of the first must not read them."""
    block, x, grad = stock_case(case, torch.float64, mode=mode)
    results = []
    for model in (fused_twin(block, memory), block):
        first, second = leaf_of(x), leaf_of(x.flip(0) * 1.5)
        out = model(first) * grad + model(second) * grad.flip(0)
        out.sum().backward()
        results.append(state_after(model, first=first.grad, second=second.grad))
    assert_same(*results, case)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_backwards_in_either_order_and_between_forwards(case: Case, mode: str, memory: str) -> None:
    block, x, grad = stock_case(case, torch.float64, mode=mode)
    results = []
    for model in (fused_twin(block, memory), block):
        leaves = [leaf_of(x * scale) for scale in (1.0, -0.5, 2.0)]
        outs = [model(leaf) for leaf in leaves[:2]]
        outs[1].backward(grad)
        outs.append(model(leaves[2]))
        outs[0].backward(grad)
        outs[2].backward(grad)
        results.append(state_after(model, **{f"x{i}": leaf.grad for i, leaf in enumerate(leaves)}))
    assert_same(*results, case)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_the_output_feeds_two_branches(case: Case, mode: str) -> None:
    """This includes a residual sum over the block, and an output that is returned and used again."""
    block, x, grad = stock_case(case, torch.float64, mode=mode)
    results = []
    for model in (fused_twin(block), block):
        leaf = leaf_of(x)
        out = model(leaf)
        loss = (out * grad).sum() + (out.square() * grad.abs()).sum() + out.relu().mean() + leaf.square().sum()
        loss.backward()
        results.append(state_after(model, x=leaf.grad, out=out.detach(), total=out.sum().detach()))
    assert_same(*results, case)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_gradients_accumulate_over_steps(case: Case, memory: str) -> None:
    block, x, grad = stock_case(case, torch.float64)
    results = []
    for model in (fused_twin(block, memory), block):
        leaf = leaf_of(x)
        for scale in (1.0, 0.5, -2.0):
            model(leaf * scale).backward(grad)
        results.append(state_after(model, x=leaf.grad))
    assert_same(*results, case)


@pytest.mark.parametrize(("conv", "backend"), [("library", "cpu"), ("fused", "reference")])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_no_two_gradients_share_memory(
    case: Case, mode: str, memory: str, conv: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping, unscaling and accumulation write into gradients; shared memory would be written to twice."""
    monkeypatch.setattr(choice, "_MIN_ROWS_A_CHANNEL", 1)  # makes such a small block one-pass
    block, x, grad = stock_case(case, mode=mode)
    twin = fused_twin(block, memory, conv)
    leaves = {"x": leaf_of(x), **dict(twin.named_parameters())}
    with fusedres.use_backend(backend):  # not .backward(), which may copy what it stores in .grad
        grads = torch.autograd.grad(twin(leaves["x"]), list(leaves.values()), grad)
    named = list(zip(leaves, grads, strict=True))
    ranges = sorted((g.data_ptr(), g.data_ptr() + g.numel() * g.element_size(), name) for name, g in named)
    for (_, end, name), (begin, _, after) in pairwise(ranges):
        assert end <= begin, f"the gradients of {name} and {after} share memory"


@pytest.mark.parametrize("case", CORE, ids=label)
def test_clipping_by_the_norm_of_all_gradients(case: Case) -> None:
    block, x, grad = stock_case(case, torch.float64)
    results = []
    for model in (fused_twin(block), block):
        for foreach in (False, True):
            model(x).backward(grad)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=foreach)
        results.append(state_after(model))
    assert_same(*results, case)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_what_backward_needs_may_not_be_changed_in_place(case: Case, memory: str) -> None:
    """As in torch, overwriting an input or parameter between forward and backward is an error, not a wrong gradient."""
    block, x, grad = stock_case(case)
    for what in ("x", "conv1.weight"):
        twin = fused_twin(block, memory)
        leaf = leaf_of(x) * 1
        out = twin(leaf)
        with torch.no_grad():
            (leaf if what == "x" else twin.get_parameter(what)).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(grad)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_the_output_may_be_changed_in_place_or_torch_says_no(case: Case, mode: str, memory: str) -> None:
    """The stock block saves its output and raises an error. A fused block does so too, or gives right gradients."""
    block, x, grad = stock_case(case, torch.float64, mode=mode)
    expected = run(copy.deepcopy(block), x, grad * 2)
    twin = fused_twin(block, memory)
    leaf = leaf_of(x)
    out = twin(leaf)
    out.mul_(2)
    refusal = ""
    try:
        out.backward(grad)
    except RuntimeError as error:
        refusal = str(error)
    if refusal:
        assert "modified by an inplace operation" in refusal
    else:
        torch.testing.assert_close(leaf.grad, expected["grad_x"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_checkpointing_is_as_stock(case: Case, memory: str, reentrant: bool) -> None:
    """Gradients are the same; the batch updates the running statistics twice, as in torch under checkpointing."""
    block, x, grad = stock_case(case, torch.float64)
    results = []
    for model in (fused_twin(block, memory), block):
        leaf = leaf_of(x)
        checkpoint(model, leaf, use_reentrant=reentrant).backward(grad)
        assert int(model.bn1.num_batches_tracked) == 2
        results.append(state_after(model, x=leaf.grad))
    assert_same(*results, case)


def test_averaged_models_and_their_updates() -> None:
    """The EMA of a fused model is fused, follows the weights, and evaluates like the EMA of the stock model."""
    for case in CORE:
        block, x, grad = stock_case(case, torch.float64)
        outputs = []
        for model in (fused_twin(block), block):
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            for _ in range(3):
                optimizer.zero_grad()
                model(x).backward(grad)
                optimizer.step()
                average.update_parameters(model)
            average.eval()
            outputs.append(average(x).detach())
            if model is not block:
                assert type(average.module) is type(model)
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backward_in_another_thread_keeps_the_backend_of_forward(
    backend: str, memory: str, memory_format: torch.memory_format
) -> None:
    """The context variable has another value in that thread, so backward must remember the backend."""
    for case in CORE:
        block, x, grad = stock_case(case, memory_format=memory_format)
        twin = fused_twin(block, memory)
        truth = oracle(block, x, grad)
        eager = run(block, x, grad)
        leaf = leaf_of(x)
        with fusedres.use_backend(backend):
            out = twin(leaf)
        seen: list[str] = []

        class Backends(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                if func.namespace == "fusedres":
                    seen.append(args[-1])  # noqa: B023
                return func(*args, **(kwargs or {}))

        failed: list[BaseException] = []

        def backward() -> None:
            try:
                with Backends():
                    out.backward(grad)  # noqa: B023
            except BaseException as error:
                failed.append(error)  # noqa: B023

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert not failed, failed
        assert seen
        assert set(seen) == {backend}
        got = {"grad_x": leaf.grad} | {f"grad.{name}": p.grad for name, p in twin.named_parameters()}
        check(got, {name: eager[name] for name in got}, truth, torch.float32, case)


def test_a_backend_is_chosen_for_its_own_thread_only() -> None:
    from fusedres.backends import backend_for

    seen = []
    with fusedres.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend_for("cpu")))
        thread.start()
        thread.join()
        assert backend_for("cpu") == "reference"
    assert seen == ["cpu"]
    assert backend_for("cpu") == "cpu"


def test_threads_train_blocks_at_the_same_time() -> None:
    """In four threads, each with its own block, every result equals that of a run alone."""
    cases = [CORE[i % len(CORE)] for i in range(4)]
    prepared = [stock_case(case) for case in cases]
    alone = [run(fused_twin(block), x, grad) for block, x, grad in prepared]
    together: list[dict[str, Tensor] | None] = [None] * 4

    def work(index: int) -> None:
        block, x, grad = prepared[index]
        for _ in range(5):
            together[index] = run(fused_twin(block), x, grad)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, other in zip(alone, together, strict=True):
        assert other is not None
        assert all(torch.equal(value, other[name]) for name, value in mine.items())


@pytest.mark.parametrize("layout", [torch.preserve_format, torch.contiguous_format], ids=str)
def test_saved_tensor_hooks_see_and_may_replace_everything(layout: torch.memory_format) -> None:
    """Offloading replaces every saved tensor by a copy, in any layout; the gradients stay equal bit by bit."""
    for case in CORE:
        block, x, grad = stock_case(case)
        for memory in MEMORY:
            plain = run(fused_twin(block, memory), x, grad)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(memory_format=layout), lambda t: t):
                packed = run(fused_twin(block, memory), x, grad)
            assert all(torch.equal(value, packed[name]) for name, value in plain.items()), case


@pytest.mark.parametrize("memory", MEMORY)
def test_a_hook_that_returns_something_else_is_an_error(memory: str) -> None:
    """Kernels read saved tensors by address, so another dtype or shape must not reach them."""
    changes = [lambda t: t.half() if t.is_floating_point() else t, lambda t: t[..., :1] if t.dim() == 4 else t]
    for case in CORE:
        for change in changes:
            block, x, grad = stock_case(case)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
                out = fused_twin(block, memory)(x.requires_grad_())
                with pytest.raises(RuntimeError):
                    out.backward(grad)


@pytest.mark.parametrize("memory", MEMORY)
def test_backward_under_autocast_that_forward_was_not_under(memory: str) -> None:
    for case in CORE:
        block, x, grad = stock_case(case)
        block.get_submodule("conv2").weight.data = block.get_submodule("conv2").weight.data.transpose(2, 3).clone()
        for python in (False, True):
            twin = fused_twin(block, memory)
            if python:  # a weight that the C++ passes do not serve
                weight = twin.get_submodule("conv3" if case.block == "bottleneck" else "conv2").weight
                weight.data = weight.data.transpose(0, 1).contiguous().transpose(0, 1)
            plain = run(twin, x, grad)
            source = x.detach().clone().requires_grad_()
            twin.zero_grad(set_to_none=True)
            out = twin(source)
            with torch.autocast("cpu", torch.bfloat16):
                out.backward(grad)
            torch.testing.assert_close(source.grad, plain["grad_x"], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_tracing_negation_and_forward_mode_are_stocks() -> None:
    block, x, grad = stock_case(CORE[0], torch.float64)
    twin = fused_twin(block)
    traced = torch.jit.trace(twin, x, check_trace=False)
    torch.testing.assert_close(traced(2 * x), block(2 * x))
    torch.testing.assert_close(twin(torch._neg_view(x)), block(-x))
    source, other = x.detach().requires_grad_(), x.detach().clone().requires_grad_()
    twin(source).backward(torch._neg_view(grad))
    block(other).backward(-grad)
    torch.testing.assert_close(source.grad, other.grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), grad.new_ones(x.shape))
        tangents = [torch.autograd.forward_ad.unpack_dual(each(dual)).tangent for each in (twin, block)]
    torch.testing.assert_close(*tangents)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection_finds_nothing() -> None:
    for case in CORE:
        block, x, grad = stock_case(case)
        with torch.autograd.detect_anomaly(check_nan=True):
            run(fused_twin(block), x, grad)


@pytest.mark.parametrize("case", [case for case in CORE if case.shortcut == "identity"], ids=label)
def test_fused_blocks_run_as_stock_in_a_sequence(case: Case) -> None:
    """The output of each block is the input of the next, which must not overwrite anything that the first needs."""
    blocks = []
    for seed in range(4):
        block, x, grad = stock_case(Case(**{**vars(case), "seed": seed}), torch.float64)
        blocks.append(block)
    chain = nn.Sequential(*blocks)
    expected = run(copy.deepcopy(chain), x, grad)
    with expect_paths(fused_forward=4, fused_backward=4):
        got = run(fused_twin(chain), x, grad)
    assert_same(dict(got), dict(expected), case)


def test_requires_grad_of_inputs_that_come_from_elsewhere() -> None:
    """Inputs are views, outputs of other Functions, and leaves with hooks."""
    for case in CORE:
        block, _, grad = stock_case(case, torch.float64)
        x, _ = inputs(case, torch.float64)
        results = []
        for model in (fused_twin(block), block):
            base = leaf_of(torch.cat([x, x]))
            seen: list[float] = []
            half = base.sigmoid()[: case.batch]
            half.register_hook(lambda g, seen=seen: seen.append(g.norm().item()))
            model(half).backward(grad)
            results.append(state_after(model, base=base.grad, hook=torch.tensor(seen, dtype=torch.float64)))
        assert_same(*results, case)

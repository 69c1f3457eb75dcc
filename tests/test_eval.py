"""Inference always uses the current weights, however they were changed; freeze() keeps folded weights until train()."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from eager import trust
from fusion import FORMATS, MEMORY, expect_paths, fused_twin, label, stock_case
from reference import inputs, oracle, run, set_mode
from shapes import CHANNELS, CORE, STRIDE_ONE, Case
from tolerance import HALF, UNIT, check
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedres


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> None:
    """Do a training step; with a fused optimizer the parameters' version counters may stay the same."""
    was_training = model.training
    model.train()
    x, grad = inputs(case)
    optimizer.zero_grad()
    model(x).backward(grad)
    optimizer.step()
    model.train(was_training)


def by_optimizer(make: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[[nn.Module, Case], None]:
    def change(model: nn.Module, case: Case) -> None:
        train_step(model, make(model.parameters(), **options), case)

    return change


def by_data(model: nn.Module, case: Case) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.25)


def by_new_data(model: nn.Module, case: Case) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).clone()


def by_numpy(model: nn.Module, case: Case) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 0.75


def by_vector(model: nn.Module, case: Case) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()).detach() * 1.1, model.parameters())


def other_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value * 1.2 if value.is_floating_point() else value + 3 for name, value in model.state_dict().items()}


def by_state_dict(model: nn.Module, case: Case) -> None:
    model.load_state_dict(other_state(model), strict=True)


def by_assigned_state_dict(model: nn.Module, case: Case) -> None:
    model.load_state_dict(other_state(model), strict=True, assign=True)


def by_ema(model: nn.Module, case: Case) -> None:
    """Put in the averaged weights, as an evaluation with EMA does."""
    average = AveragedModel(copy.deepcopy(model), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    average.update_parameters(model)
    for mine, averaged in zip(model.parameters(), average.module.parameters(), strict=True):
        mine.data.copy_(averaged.data)


def by_new_parameter(model: nn.Module, case: Case) -> None:
    model.conv1.weight = nn.Parameter(model.conv1.weight.detach() * 0.5)
    model.bn2.bias = nn.Parameter(model.bn2.bias.detach() + 1)


def by_buffers(model: nn.Module, case: Case) -> None:
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.add_(0.3)
            child.running_var = child.running_var * 2


def by_eps(model: nn.Module, case: Case) -> None:
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eps = 0.4


def by_reset(model: nn.Module, case: Case) -> None:
    model.bn1.reset_running_stats()
    nn.init.constant_(model.bn2.weight, 0.5)


def by_training(model: nn.Module, case: Case) -> None:
    """Change only the running statistics."""
    model.train()
    with torch.no_grad():
        model(inputs(case)[0])
    model.eval()


CHANGES: dict[str, Callable[[nn.Module, Case], None]] = {
    "SGD": by_optimizer(torch.optim.SGD, lr=0.1),
    "fused SGD": by_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "fused AdamW": by_optimizer(torch.optim.AdamW, lr=0.1, fused=True),
    "foreach Adam": by_optimizer(torch.optim.Adam, lr=0.1, foreach=True),
    "data": by_data,
    "new data": by_new_data,
    "numpy": by_numpy,
    "vector_to_parameters": by_vector,
    "load_state_dict": by_state_dict,
    "load_state_dict assign": by_assigned_state_dict,
    "EMA": by_ema,
    "new parameter": by_new_parameter,
    "buffers": by_buffers,
    "eps": by_eps,
    "reset": by_reset,
    "training mode": by_training,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_changed_weights_are_never_stale(case: Case, change: str) -> None:
    """The weights change after an inference; the next inference equals the stock block's with the new weights."""
    block, x, grad = stock_case(case, mode="eval")
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        twin = fused_twin(block)
        with context():
            first = twin(x)
        CHANGES[change](twin, case)
        stock = copy.deepcopy(block)
        stock.load_state_dict(twin.state_dict())
        for name in case.norms:
            stock.get_submodule(name).eps = twin.get_submodule(name).eps
        truth = oracle(stock, x, grad)
        with context(), expect_paths(fused_forward=1):
            second = twin(x)
            eager = stock(x)
        assert not torch.allclose(first, second, rtol=1e-3), "the change has no effect"
        check({"out": second}, {"out": eager}, truth, torch.float32, f"{case} {change}")


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_eval_train_eval(case: Case, memory: str) -> None:
    """Each switch takes effect at once, and a backward in eval mode is right too."""
    block, x, grad = stock_case(case, torch.float64, mode="eval")
    twin = fused_twin(block, memory)
    for mode in ("eval", "train", "eval", "frozen", "train", "eval"):
        eager, got = (run(set_mode(model, mode), x, grad) for model in (block, twin))
        for name, value in eager.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=f"{mode}: {name}")


@pytest.mark.parametrize("case", CORE, ids=label)
def test_inference_mode_then_training(case: Case) -> None:
    """No tensor made under inference_mode is kept and then saved for a later backward."""
    block, x, grad = stock_case(case)
    twin = fused_twin(block)
    with torch.inference_mode():
        twin.eval()(x)
    twin.train()
    truth = oracle(block, x, grad)
    check(run(twin, x, grad), run(block, x, grad), truth, torch.float32, case)


def test_parameters_made_in_inference_mode() -> None:
    """A model that is built and fused under inference_mode, with inference tensors, infers there."""
    with torch.inference_mode():
        for case in CORE:
            block, x, _ = stock_case(case, mode="eval")
            twin = fused_twin(block)
            torch.testing.assert_close(twin(x), block(x), rtol=1e-4, atol=1e-5)


# --- freeze


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=label)
@pytest.mark.parametrize("case", CORE + STRIDE_ONE + CHANNELS, ids=label)
def test_frozen_blocks_compute_the_same(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    block, x, grad = stock_case(case, dtype, memory_format, "eval")
    truth = oracle(block, x, grad, UNIT[dtype])
    twin = fused_twin(block)
    assert fusedres.freeze(twin) is twin
    other = FORMATS[memory_format == FORMATS[0]]
    for given in (x, x, x.to(memory_format=other), x[:1], x.clone()):
        trust(block, given)
        with torch.no_grad(), expect_paths(frozen_forward=1):
            got, eager = twin(given), block(given)
        part = {"out": truth.values["out"][: len(given)]}
        trimmed = type(truth)(part, {"out": truth.terms["out"]}, {"out": truth.spread["out"]})
        check({"out": got}, {"out": eager}, trimmed, dtype, case)
        assert got.stride() == eager.stride()


@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_frozen_blocks_under_autocast_and_without_by_turns(case: Case, dtype: torch.dtype) -> None:
    block, x, grad = stock_case(case, mode="eval")
    trust(block, x, dtype)
    twin = fusedres.freeze(fused_twin(block))
    for enabled in (False, True, False, True):
        unit = dtype if enabled else torch.float32
        truth = oracle(block, x, grad, UNIT[unit])
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=enabled):
            got, eager = twin(x), block(x)
        check({"out": got}, {"out": eager}, truth, unit, f"{case} {unit}")


@pytest.mark.parametrize("case", CORE, ids=label)
def test_frozen_blocks_keep_the_weights_they_were_folded_from(case: Case) -> None:
    """As documented, weights that change after freeze() have no effect until train() drops the folds."""
    block, x, _ = stock_case(case, mode="eval")
    twin = fusedres.freeze(fused_twin(block))
    with torch.no_grad():
        first = twin(x)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert torch.equal(twin(x), first)
        twin.train()
        twin.eval()
        fresh = twin(x)
        block.load_state_dict(twin.state_dict())
        assert not torch.allclose(fresh, first, rtol=1e-3)
        torch.testing.assert_close(fresh, block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CORE, ids=label)
def test_train_after_freeze_trains_as_before(case: Case) -> None:
    block, x, grad = stock_case(case)
    twin = fused_twin(block).eval()
    with torch.inference_mode():
        fusedres.freeze(twin)(x)
    twin.train()
    check(run(twin, x, grad), run(block, x, grad), oracle(block, x, grad), torch.float32, case)


@pytest.mark.parametrize("case", CORE, ids=label)
def test_a_backward_through_frozen_folds(case: Case) -> None:
    """A frozen model has the gradients of the unfrozen one."""
    block, x, grad = stock_case(case, mode="eval")
    truth = oracle(block, x, grad)
    twin = fusedres.freeze(fused_twin(block))
    with torch.no_grad():
        twin(x)
    check(run(twin, x, grad), run(block, x, grad), truth, torch.float32, case)
    for parameter in (*twin.parameters(), *block.parameters()):
        parameter.requires_grad_(False)
    check(run(twin, x, grad), run(block, x, grad), truth, torch.float32, f"{case}, only x")


def test_freeze_adds_nothing_to_state_dicts_and_copies() -> None:
    for case in CORE:
        block, x, _ = stock_case(case, mode="eval")
        twin = fused_twin(block)
        keys = list(twin.state_dict())
        fusedres.freeze(twin)
        with torch.no_grad():
            expected = twin(x)
            assert list(twin.state_dict()) == keys
            for copied in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
                nn.init.constant_(copied.bn1.bias, 2.0)
                block.load_state_dict(copied.state_dict())
                torch.testing.assert_close(copied(x), block(x), rtol=1e-4, atol=1e-4)
            assert torch.equal(twin(x), expected)


def test_freeze_and_unfuse() -> None:
    block, x, _ = stock_case(CORE[0], mode="eval")
    before = set(block.__dict__)
    twin = fused_twin(block)
    with torch.no_grad():
        fusedres.freeze(twin)(x)
        fusedres.unfuse(twin)
        assert set(twin.__dict__) == before
        assert torch.equal(twin(x), block(x))


def test_freeze_takes_models_in_eval_mode_only() -> None:
    twin = fused_twin(stock_case(CORE[0])[0])
    with pytest.raises(ValueError, match=r"freeze: .*must be in eval mode.*model\.eval\(\)"):
        fusedres.freeze(twin)
    with pytest.raises(TypeError, match=r"freeze: model must be a torch\.nn\.Module, got str"):
        fusedres.freeze("model")  # type: ignore[arg-type]


def test_a_hook_on_a_child_of_a_frozen_block_still_fires() -> None:
    block, x, _ = stock_case(CORE[1], mode="eval")
    twin = fusedres.freeze(fused_twin(block))
    fired = []
    with torch.no_grad():
        twin(x)
        twin.bn1.register_forward_hook(lambda *_: fired.append(1))
        with expect_paths(unfused=1):
            assert torch.equal(twin(x), block(x))
    assert fired == [1]


def test_a_frozen_block_follows_its_device_and_dtype() -> None:
    """`.to()` makes new weights, after which the folds of the old weights must not be used."""
    for case in CORE:
        block, x, _ = stock_case(case, mode="eval")
        twin = fusedres.freeze(fused_twin(block))
        with torch.no_grad():
            twin(x)
            out = twin.double()(x.double())
            assert out.dtype == torch.float64
            torch.testing.assert_close(out, block.double()(x.double()), rtol=1e-10, atol=1e-10)

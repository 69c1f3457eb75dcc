"""What users run models with: profilers, export, TorchScript, torch.fx, saved tensors that may be mutated."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import Nested
from fusion import expect_paths, stock_case
from op_examples import examples
from reference import randomize, run
from shapes import CORE, case
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres.ops._library import OPS

SMALL = case("basic", "projection")


def network() -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a small ResNet, a fused copy, and images."""
    model = randomize(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), 3)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return model, fusedres.fuse(copy.deepcopy(model)), x


# --- profilers


def profiled(step: Callable[[], object], **options: bool) -> dict[str, torch.autograd.profiler_util.FunctionEventAvg]:
    with profile(activities=[ProfilerActivity.CPU], **options) as found:
        step()
    return {row.key: row for row in found.key_averages()}


def test_a_profile_names_the_passes() -> None:
    _, twin, x = network()
    rows = profiled(lambda: twin(x).sum().backward())
    for name, count in {"bn_statistics": 12, "bn_add_relu": 4, "bn_relu_maxpool": 1}.items():
        assert rows[f"fusedres::{name}"].count == count, name
    assert rows["fusedres::bn_add_relu_backward_"].count == 4
    assert "ResidualBlockFunction" in rows
    with torch.no_grad():
        rows = profiled(lambda: twin.eval()(x))
    assert rows["fusedres::bn_add_relu_"].count == 4 and rows["fusedres::bn_relu_"].count == 4


def test_a_profile_changes_no_number() -> None:
    block, x, grad = stock_case(SMALL)
    twin = fusedres.fuse(copy.deepcopy(block))
    expected = run(copy.deepcopy(twin), x, grad)
    with profile(activities=[ProfilerActivity.CPU]):
        found = run(twin, x, grad)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_operations_are_counted() -> None:
    model, twin, x = network()
    counts = []
    for each in (model, twin):
        counts.append(sum(row.flops for row in profiled(lambda each=each: each(x), with_flops=True).values()))
        with FlopCounterMode(display=False) as counter:
            each(x).sum().backward()
        counts.append(counter.get_total_flops())
    convolutions = profiled(lambda: model(x), with_flops=True)["aten::conv2d"].flops
    assert profiled(lambda: twin(x), with_flops=True)["aten::conv2d"].flops == convolutions
    assert counts[1] == counts[3]
    assert counts[2] >= convolutions


# --- torch.library


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_passes_opcheck(name: str) -> None:
    """Schema, fake kernel, autograd registration, and the op inside AOTAutograd."""
    for example in examples()[name]:
        arguments = {key: value.clone() if isinstance(value, Tensor) else value for key, value in example.items()}
        operator = getattr(torch.ops.fusedres, name).default
        checks = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if name != "empty_batch":  # has no values to compare
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, (), arguments | {"backend": "reference"}, test_utils=checks)


# --- compiled inference


def test_compiled_inference_on_a_cpu_has_torchs_operators() -> None:
    """The compiler's own fusion is faster there; a selected backend, and training, stay fused."""
    model, twin, x = network()
    model.eval(), twin.eval()
    for freeze in (False, True):
        if freeze:
            fusedres.freeze(twin)
        for backend, fused in (("auto", False), ("cpu", True)):
            torch._dynamo.reset()
            graphs: list[str] = []

            def keep(graph: torch.fx.GraphModule, _: object, graphs: list[str] = graphs) -> Callable[..., object]:
                graphs.append(str(graph.code))
                return graph.forward

            compiled = torch.compile(twin, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
            with torch.no_grad(), fusedres.use_backend(backend):
                torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-4)
            assert ("fusedres" in graphs[0]) is fused


# --- saved tensors


def test_mutation_of_saved_tensors_is_allowed() -> None:
    model, twin, x = (each.double() for each in network())
    results = []
    for each in (model, twin):
        source = x.clone().requires_grad_()
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            images = source * 1
            out = each(images)
            images.zero_()  # its backward needs the values from before
            out.sum().backward()
        results.append([source.grad, *(parameter.grad for parameter in each.parameters())])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# --- export


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_programs_have_torchs_operators_alone(strict: bool, training: bool) -> None:
    model, twin, x = network()
    model.train(training), twin.train(training)
    program = torch.export.export(twin, (x,), strict=strict)
    stock = torch.export.export(model, (x,), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [str(node.target) for node in stock.graph.nodes if node.op == "call_function"]
    assert not any("fusedres" in target for target in targets)
    assert list(program.state_dict) == list(stock.state_dict)
    out = program.module()(x)
    torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)
    out.sum().backward()
    missing = [name for name, parameter in program.module().named_parameters() if parameter.grad is None]
    assert not missing
    if not strict:
        assert "torch.export was recording" in fusedres.report(twin)[0].reason
    with expect_paths(fused_forward=4, stem_forward=1):
        twin(x)
    assert all(row.fused for row in fusedres.report(twin))


def test_frozen_models_are_exported_too() -> None:
    model, twin, x = network()
    fusedres.freeze(twin.eval())
    with torch.no_grad():
        twin(x)
        for strict in (True, False):
            program = torch.export.export(twin, (x,), strict=strict)
            assert not any("fusedres" in str(node.target) for node in program.graph.nodes)
            torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=1e-3, atol=1e-4)


def test_an_exported_program_runs_without_fusedres(tmp_path: Path) -> None:
    _, twin, x = network()
    twin.eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(twin, (x,)), path)
    torch.save((x, twin(x).detach()), tmp_path / "numbers.pt")
    code = f"""
import sys
sys.modules["fusedres"] = None  # importing it fails
import torch
x, expected = torch.load({str(tmp_path / "numbers.pt")!r})
torch.testing.assert_close(torch.export.load({str(path)!r}).module()(x), expected, rtol=1e-3, atol=1e-4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- TorchScript


def test_script_compiles_the_stock_model() -> None:
    """Inside any module; afterwards the model runs fused again, and is the same modules."""
    model, twin, x = network()
    wrapper = nn.Sequential(twin, nn.Identity()).eval()
    modules = list(wrapper.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(wrapper)
        block = torch.jit.script(twin.layer1[0])
    expected = model.eval()(x)
    torch.testing.assert_close(scripted(x), expected, rtol=1e-3, atol=1e-4)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), expected, rtol=1e-3, atol=1e-4)
    assert block(torch.randn(1, 64, 8, 8)).shape == (1, 64, 8, 8)
    assert all(a is b for a, b in zip(wrapper.modules(), modules, strict=True))
    assert torch.equal(next(scripted.parameters()), next(twin.parameters()))
    with expect_paths(fused_forward=4, stem_forward=1):
        wrapper(x)
    assert type(twin) is fusedres.FusedResNet and all(row.fused for row in fusedres.report(wrapper))


@pytest.mark.parametrize("then", ["report", "fuse", "deepcopy", "pickle", "unfuse"])
def test_after_script_a_model_is_what_it_was(then: str) -> None:
    _, twin, x = network()
    fusedres.fuse(twin, memory="min")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(twin)
    if then == "unfuse":
        fusedres.unfuse(twin)
        assert type(twin) is ResNet and type(twin.layer1[0]) is BasicBlock
        assert not any(name.startswith("fused") for module in twin.modules() for name in module.__dict__)
        return
    if then == "fuse":
        fusedres.fuse(twin, memory="min")
    elif then == "deepcopy":
        twin = copy.deepcopy(twin)
    elif then == "pickle":
        twin = pickle.loads(pickle.dumps(twin))
    assert all(row.fused for row in fusedres.report(twin))
    assert twin.layer1[0].fused_memory == "min"
    with expect_paths(fused_forward=4, stem_forward=1):
        twin(x)


def test_a_block_of_another_class_is_scripted() -> None:
    fusedres.register(Nested)
    block = randomize(Nested(4, 8, 2), 1)
    twin = fusedres.fuse(copy.deepcopy(block))
    x = torch.randn(2, 4, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(twin.eval())
    torch.testing.assert_close(scripted(x), block.eval()(x))
    with expect_paths(fused_forward=1):
        twin(x)


def test_trace_records_torchs_operators() -> None:
    model, twin, x = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(twin.eval(), x, check_trace=False)
    assert "fusedres::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    assert "torch.jit.trace" in fusedres.report(twin)[0].reason


# --- torch.fx


def test_fx_traces_the_stock_model() -> None:
    model, twin, x = network()
    traced = torch.fx.symbolic_trace(twin.eval())
    torch.testing.assert_close(traced(x), model.eval()(x), rtol=1e-3, atol=1e-4)
    assert "torch.fx was tracing" in fusedres.report(twin)[0].reason
    extractor = create_feature_extractor(twin, {"layer2": "features"})
    expected = create_feature_extractor(model, {"layer2": "features"})
    torch.testing.assert_close(extractor(x)["features"], expected(x)["features"], rtol=1e-3, atol=1e-4)


def test_every_case_can_be_exported() -> None:
    for each in CORE:
        block, x, _ = stock_case(each)
        twin = fusedres.fuse(copy.deepcopy(block))
        program = torch.export.export(twin, (x,))
        torch.testing.assert_close(program.module()(x), copy.deepcopy(block)(x))

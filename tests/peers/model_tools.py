"""Tools around a model: for each, whether a fused model stays fused with it, runs unfused, or does not work.

Every tool is tried on a small ResNet: with it, a fused model must compute what the stock model computes without it.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import compatibility_page as page
import torch
import torch.distributed as dist
from sharded_worker import WRAPPERS
from subject import Subject, close
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, prune
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import fusedres
from fusedres.autograd import path_counts

HEADING = ("tool", "works fused", "works unfused, and why", "does not work")
PACKAGES = ("torch", "torchvision", "torchao", "onnx", "onnxscript")


class Tool(NamedTuple):
    """Something that is used on a model, and a package that it needs.

    `use` returns why the model ran unfused, or "" if it ran fused, where the report cannot say it, as in compiled code.
    """

    label: str
    use: Callable[[Subject], str | None]
    package: str = "torch"


STOCK_PROGRAM = "the program has torch's operators alone, and needs no fusedres"


def _compiled_training(subject: Subject) -> str:
    torch._dynamo.reset()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        subject.step(torch.compile(subject.fused, fullgraph=True))
    assert any("fusedres" in row.key for row in found.key_averages())
    return ""


def _compiled_inference(subject: Subject) -> str:
    torch._dynamo.reset()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        subject.infer(torch.compile(subject.fused, fullgraph=True))
    assert not any("fusedres" in row.key for row in found.key_averages())
    return "the compiler's own fusion is faster there; a selected backend stays fused"


def _exported(subject: Subject, strict: bool) -> str:
    program = torch.export.export(subject.fused, (subject.x,), strict=strict)
    assert not any("fusedres" in str(node.target) for node in program.graph.nodes)
    subject.step(program.module())
    return STOCK_PROGRAM


def _onnx(subject: Subject) -> str:
    from onnx import checker
    from onnx.reference import ReferenceEvaluator

    subject.single()
    subject.x = subject.x[..., :16, :16]  # the evaluator is slow
    program = torch.onnx.export(subject.fused, (subject.x,), dynamo=True, verbose=False)
    assert program is not None
    checker.check_model(program.model_proto)
    (out,) = ReferenceEvaluator(program.model_proto).run(
        None, {program.model_proto.graph.input[0].name: subject.x.numpy()}
    )
    subject.infer(lambda x: torch.from_numpy(out))
    assert not any("fusedres" in node.domain for node in program.model_proto.graph.node)
    return STOCK_PROGRAM


def _aot_inductor(subject: Subject) -> str:
    subject.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(subject.fused, (subject.x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "model.pt2")))
        subject.infer(torch._inductor.aoti_load_package(path))
    return STOCK_PROGRAM


def _pt2e(subject: Subject) -> str:
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    subject.single()
    results = []
    for model in (subject.fused, subject.stock):
        quantizer = X86InductorQuantizer()
        quantizer.set_global(get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(model, (subject.x,), strict=True).module(), quantizer)
        prepared(subject.x)
        converted = convert_pt2e(prepared)
        move_exported_model_to_eval(converted)
        results.append(converted(subject.x))
    close(*results)
    return STOCK_PROGRAM


def _scripted(subject: Subject) -> str:
    subject.infer(torch.jit.script(subject.eval().fused))
    return "the stock model is compiled; the model itself stays fused"


def _traced(subject: Subject) -> None:
    subject.infer(torch.jit.trace(subject.eval().fused, subject.x, check_trace=False))


def _fx(subject: Subject) -> None:
    subject.step(torch.fx.symbolic_trace(subject.fused))


def _extracted(subject: Subject) -> None:
    extractor = create_feature_extractor(subject.fused, {"fc": "scores"})
    subject.step(lambda x: extractor(x)["scores"])


def _profiled(subject: Subject) -> None:
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as found:
        subject.step()
    assert "fusedres::bn_add_relu" in {row.key for row in found.key_averages()}


@contextmanager
def _one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=Path(folder, "store").as_uri(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _wrapped(subject: Subject, wrap: Callable[[nn.Module], nn.Module]) -> None:
    with _one_process():
        wrapped = wrap(subject.fused)
        loss = wrapped(subject.x).sin().sum()
        loss.backward()
        close(loss.detach(), subject.stock(subject.x).detach().sin().sum())


def _mutated(subject: Subject) -> None:
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        subject.step()


def _offloaded(subject: Subject) -> None:
    with torch.autograd.graph.save_on_cpu():
        subject.step()


def _recomputed(subject: Subject) -> None:
    subject.step(lambda x: checkpoint(subject.fused, x, use_reentrant=False))  # type: ignore[no-any-return]


def _autocast(subject: Subject) -> None:
    outs = []
    for model in (subject.fused, subject.stock):
        with torch.autocast("cpu", torch.bfloat16):
            outs.append(model(subject.x).float())
    assert (outs[0] - outs[1]).norm() < 0.05 * outs[1].norm()


def _functional(subject: Subject) -> None:
    def loss(parameters: dict[str, Tensor], model: nn.Module) -> Tensor:
        return functional_call(model, parameters, (subject.x,)).sin().sum()

    subject.eval()
    found, expected = (grad(loss)(dict(model.named_parameters()), model) for model in (subject.fused, subject.stock))
    for name, value in expected.items():
        close(found[name], value)


def _called_with_others(subject: Subject) -> None:
    parameters = {name: p.detach().clone().requires_grad_() for name, p in subject.fused.named_parameters()}
    functional_call(subject.fused, parameters, (subject.x,)).sin().sum().backward()
    expected = subject.gradients(subject.stock, subject.stock)[1:]
    for value, other in zip(parameters.values(), expected, strict=True):
        assert value.grad is not None
        close(value.grad, other)


def _mapped(subject: Subject) -> None:
    subject.infer(lambda x: vmap(lambda image: subject.fused(image[None])[0])(x))


def _forward_mode(subject: Subject) -> None:
    subject.eval()
    direction = torch.randn_like(subject.x)
    found, expected = (jvp(model, (subject.x,), (direction,))[1] for model in (subject.fused, subject.stock))
    close(found.detach(), expected.detach())


def _twice(subject: Subject) -> None:
    results = []
    for model in (subject.fused.double(), subject.stock.double()):
        x = subject.x[:1, :, :32, :32].double().requires_grad_()
        (first,) = torch.autograd.grad(model.eval()(x).sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    close(*results)


class _Subclass(Tensor):
    pass


def _subclass(subject: Subject) -> None:
    subject.step(lambda x: subject.fused(x.as_subclass(_Subclass)).as_subclass(Tensor))


def _hooked(subject: Subject) -> None:
    seen: list[Tensor] = []
    subject.fused.layer1.register_forward_hook(lambda module, inputs, out: seen.append(out))  # type: ignore[union-attr]
    subject.step()
    assert len(seen) == 1


def _hooked_inside(subject: Subject) -> None:
    subject.fused.layer1[0].bn1.register_forward_hook(lambda module, inputs, out: None)  # type: ignore[index, union-attr]
    subject.step()


def _pruned(subject: Subject) -> None:
    for model in (subject.fused, subject.stock):
        prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)  # type: ignore[index, union-attr]
    subject.step()


def _parametrized(subject: Subject) -> None:
    for model in (subject.fused, subject.stock):
        parametrizations.weight_norm(model.layer1[0].conv1)  # type: ignore[index, union-attr]
    subject.step()


def _saved(subject: Subject) -> None:
    buffer = io.BytesIO()
    torch.save(subject.fused.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    subject.stock.load_state_dict(state, strict=True)
    subject.fused.load_state_dict(subject.stock.state_dict(), strict=True)
    subject.fused = copy.deepcopy(pickle.loads(pickle.dumps(subject.fused)))
    subject.step()


def _averaged(subject: Subject) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(subject.fused)
    averaged.update_parameters(subject.fused)
    subject.infer(averaged.eval())


TOOLS = (
    Tool("torch.compile, training", _compiled_training),
    Tool("torch.compile, inference on a CPU", _compiled_inference),
    Tool("torch.export, strict", partial(_exported, strict=True)),
    Tool("torch.export, not strict", partial(_exported, strict=False)),
    Tool("torch.onnx.export", _onnx, "onnxscript"),
    Tool("AOTInductor", _aot_inductor),
    Tool("PT2E quantization (torchao)", _pt2e, "torchao"),
    Tool("torch.jit.script", _scripted),
    Tool("torch.jit.trace", _traced),
    Tool("torch.fx", _fx),
    Tool("torchvision's feature extractors", _extracted),
    Tool("torch.profiler, with_flops", _profiled),
    *(Tool(name, partial(_wrapped, wrap=wrap)) for name, wrap in WRAPPERS.items()),
    Tool("autocast", _autocast),
    Tool("activation checkpointing", _recomputed),
    Tool("saved-tensor hooks (save_on_cpu)", _offloaded),
    Tool("allow_mutation_on_saved_tensors", _mutated),
    Tool("create_graph (second derivatives)", _twice),
    Tool("torch.func.functional_call", _called_with_others),
    Tool("torch.func.grad", _functional),
    Tool("torch.func.vmap", _mapped),
    Tool("torch.func.jvp (forward mode)", _forward_mode),
    Tool("subclasses of Tensor", _subclass),
    Tool("hooks on blocks and stages", _hooked),
    Tool("hooks inside a block", _hooked_inside),
    Tool("torch.nn.utils.prune", _pruned),
    Tool("parametrizations (weight_norm)", _parametrized),
    Tool("state_dict, pickle, deepcopy", _saved),
    Tool("AveragedModel (EMA, SWA)", _averaged),
)


def installed(tool: Tool) -> bool:
    """Whether the package of a tool can be imported."""
    return find_spec(tool.package) is not None


def row_of(tool: Tool) -> page.Row:
    """Return the row of a tool in the table."""
    subject = Subject()
    before = path_counts.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # several of these tools are deprecated
        try:
            why = tool.use(subject)
        except Exception as error:  # whatever a tool raises is its entry in the table
            return tool.label, "", "", f"{type(error).__name__}: {' '.join(str(error).split())}"
    if why is not None:
        return tool.label, "" if why else "all", why, ""
    rows = fusedres.report(subject.fused)
    assert any(row.fused for row in rows) == ((path_counts - before)["fused_forward"] > 0)
    reasons = {row.reason.removeprefix("its last input ran unfused: ") for row in rows if not row.fused}
    fused = "all" if not reasons else "the other blocks" if any(row.fused for row in rows) else ""
    return tool.label, fused, "; ".join(sorted(reasons)), ""


def write() -> None:
    """Replace the table in docs/compatibility.md."""
    page.write("tools", HEADING, [row_of(tool) for tool in TOOLS], PACKAGES)

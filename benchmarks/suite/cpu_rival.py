"""One way of running a model on a CPU in a process of its own, which times it when the parent asks (cpu_rivals.py).

The process writes one line of JSON when it is ready: how far its scores are from those of eager (of inference in
float32), or why there is no such way here. Then it reads numbers of repetitions, a line each, and writes seconds and
page faults of a call.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres.tune.compare import off_by

Call = Callable[[], Any]
Make = Callable[[nn.Module, Tensor, torch.dtype], Call]


class NotHereError(Exception):
    """A way cannot be timed here, and why."""


def _eager(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    model, x = model.to(dtype), x.to(dtype)
    return lambda: model(x)


def _live(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    return _eager(fusedres.fuse(model), x, dtype)


def _frozen(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    return _eager(fusedres.freeze(fusedres.fuse(model)), x, dtype)


def _compiled(model: nn.Module, x: Tensor, dtype: torch.dtype, freezing: bool = False) -> Call:
    import torch._inductor.config

    torch._inductor.config.freezing = freezing
    compiled, x = torch.compile(model.to(dtype)), x.to(dtype)
    return lambda: compiled(x)


def _frozen_compiled(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    return _compiled(model, x, dtype, freezing=True)


def _openvino(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    import openvino

    converted = openvino.convert_model(model, example_input=x)
    converted.reshape({converted.inputs[0]: list(x.shape)})
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino.Core().compile_model(converted, "CPU", options).create_infer_request()
    images = x.contiguous().numpy()
    return lambda: torch.from_numpy(next(iter(request.infer({0: images}, share_inputs=True).values())))


def _onnxruntime(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    import onnxruntime

    if dtype is not torch.float32:
        raise NotHereError(f"onnxruntime's CPU kernels have no {dtype}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.onnx"))
        torch.onnx.export(model, (x.contiguous(),), path, dynamo=True, verbose=False, external_data=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name, images = session.get_inputs()[0].name, x.contiguous().numpy()
    return lambda: torch.from_numpy(session.run(None, {name: images})[0])


INFERENCE: dict[str, Make] = {
    "eager": _eager,
    "library": _live,
    "frozen": _frozen,
    "compile": _compiled,
    "compile freezing": _frozen_compiled,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}


def _kept(model: nn.Module) -> nn.Module:
    if not fusedres.keep_pages():
        raise NotHereError("the C library cannot keep pages")
    return model


# "kept": freed memory stays mapped (fusedres.keep_pages).
TRAINING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "library": fusedres.fuse,
    "library min": lambda model: fusedres.fuse(model, memory="min"),
    "compile": torch.compile,
    "eager kept": _kept,
    "library kept": lambda model: _kept(fusedres.fuse(model)),
}


def _stock(name: str, batch: int, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().to(memory_format=torch.channels_last)
    return model, torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)


def inference(way: str, name: str, batch: int, size: int, dtype: torch.dtype) -> tuple[Call, float]:
    """Return a call of the model, and how far its scores are off."""
    model, x = _stock(name, batch, size)
    model.eval()
    with torch.inference_mode():
        reference = model(x)
    with torch.no_grad():  # exporters cannot trace inference tensors
        call = INFERENCE[way](model, x, dtype)
    with torch.inference_mode():
        return call, off_by(call().float(), reference)


def training(way: str, name: str, batch: int, size: int, dtype: torch.dtype) -> tuple[Call, float]:
    """Return a training step of the model, and how far its scores are off."""
    model, x = _stock(name, batch, size)
    model, x = model.to(dtype).train(), x.to(dtype)
    reference = copy.deepcopy(model)(x).detach()
    labels = torch.randint(reference.shape[1], (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    run = TRAINING[way](model)

    def step() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        scores = run(x)
        loss = F.cross_entropy(scores.float(), labels)
        loss.backward()
        optimizer.step()
        return scores, loss

    return step, off_by(run(x).detach().float(), reference.float())


def main() -> None:
    """Prepare a way, then time it as often as the parent asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("way", "phase", "model", "batch", "size", "dtype", "threads"):
        parser.add_argument(name)
    given = parser.parse_args()
    torch.set_num_threads(int(given.threads))
    answers, told = sys.stdout, {}
    call: Any = None
    kept: Any = None
    with contextlib.redirect_stdout(sys.stderr):  # what exporters print
        try:
            dtype = getattr(torch, given.dtype)
            prepare = training if given.phase == "train" else inference
            call, told["off_by"] = prepare(given.way, given.model, int(given.batch), int(given.size), dtype)
        except (NotHereError, ImportError) as why:
            told["not_here"] = str(why)
    print(json.dumps(told), file=answers, flush=True)
    with torch.inference_mode(given.phase == "infer"):
        for line in sys.stdin:
            kept = call()  # what another process had in the caches meanwhile is not timed
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            begin = time.perf_counter()
            for _ in range(int(line)):
                kept = call()  # until the next call, as in users' loops: what lies behind it stays mapped
            seconds = (time.perf_counter() - begin) / int(line)
            faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / int(line)
            print(json.dumps([seconds, faults]), file=answers, flush=True)
    del kept


if __name__ == "__main__":
    main()

"""The one place where CUDA kernels start: the arguments' addresses, device guard, current stream.

A kernel folder's cuda.py allocates (scratch memory too: the C++ side allocates nothing) and calls `launch` with the
arguments of the function in csrc/bindings_cuda.cpp, in its order, as tensors and numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import cuda_support

DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def code(tensor: Tensor | None) -> int:
    """The dtype code of a tensor; any code for None."""
    return 0 if tensor is None else DTYPE_CODE[tensor.dtype]


def launch(function: str, device: torch.device, *arguments: Tensor | float | bool | None) -> Any:
    """Calls a function of fusedres._CUDA on a device and its current stream; None is a null pointer.

    Returns:
        What the function returns; None on the meta device, where it is not called.

    Raises:
        RuntimeError: CUDA's own error, with the op's name; or there are no CUDA kernels, or not for this device.
    """
    if device.type == "meta":
        return None
    module = cuda_support.module()
    if module is None or device.type not in cuda_support.devices:
        reason = cuda_support.missing() or f"it serves {' and '.join(cuda_support.devices)} tensors, got {device.type}"
        raise RuntimeError(f"{function}: the cuda backend cannot run: {reason}")
    values: list[Any] = [
        argument.data_ptr() if isinstance(argument, Tensor) else 0 if argument is None else argument
        for argument in arguments
    ]
    call = getattr(module, function)
    if device.type == "cpu":
        return call(*values, 0)
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        return call(*values, stream)
    with torch.cuda.device(device):
        return call(*values, stream)

"""The one place where CUDA kernels start. It sets the device and passes the current stream.

The cuda.py of a kernel folder allocates all memory, also scratch memory, as the C++ side allocates nothing. It calls
`launch` with the arguments of the function in csrc/bindings_cuda.cpp, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedres import cuda_support


def launch(function: str, device: torch.device, *arguments: Tensor | tuple[Any, ...] | float | bool | None) -> Any:
    """Call a function of fusedres._CUDA on a device and its current stream.

    Args:
        arguments: Tensors, None for a null pointer, numbers, and tuples of fusedres/kernels/arguments.py.

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

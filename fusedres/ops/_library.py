"""The torch.library namespace of the ops. Each op file defines one op: schema, implementation, fake."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

_LIBRARY = torch.library.Library("fusedres", "DEF")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an op for every device and returns its callable overload."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fusedres::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fusedres, name).default


class Kernels:
    """The kernels of one op, fusedres/kernels/<op>/<backend>.py, imported at first use."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._modules: dict[str, Any] = {}

    def __getitem__(self, backend: str) -> Any:
        module = self._modules.get(backend)
        if module is None:
            try:
                module = import_module(f"fusedres.kernels.{self.op}.{backend}")
            except ModuleNotFoundError as error:
                raise RuntimeError(f"{self.op}: there is no {backend} backend; use 'reference'") from error
            self._modules[backend] = module
        return module

"""The torch.library namespace of the ops. Each op file defines its ops: schema, checks, fake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedres.kernels import table

_LIBRARY = torch.library.Library("fusedres", "DEF")

OPS: dict[str, Op] = {}  # every op by its name


class Op:
    """An op of the namespace fusedres whose last argument names the backend.

    Called, it goes through torch's dispatcher and checks its arguments; see launch.py for callers that have.
    """

    def __init__(self, schema: str, folder: str, check: Callable[..., None], fake: Callable[..., Any]) -> None:
        self.name = schema.partition("(")[0]
        self.folder = folder
        self._check = check
        self._kernels: dict[str, Callable[..., Any]] = {}
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedres::{self.name}", fake, lib=_LIBRARY)
        self._overload = getattr(torch.ops.fusedres, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args[:-1], self.serving(args[-1]))

    def dispatched(self, backend: str) -> Callable[..., Any]:
        """The op through torch's dispatcher, of one backend."""
        return lambda *args: self(*args, backend)

    def _checked(self, *args: Any) -> Any:
        self._check(*args)
        return self.kernel(args[-1])(*args[:-1])

    def serving(self, backend: str) -> str:
        """The backend whose kernel runs where `backend` is selected."""
        return table.serving(self.folder, self.name, backend) if backend in table.STAND_INS else backend

    def kernel(self, backend: str) -> Callable[..., Any]:
        """The kernel that serves a backend, imported at first use."""
        kernel = self._kernels.get(backend)
        if kernel is None:
            kernel = table.find(self.folder, self.name, self.serving(backend))
            if kernel is None:
                raise RuntimeError(f"{self.name}: there is no {backend} backend; use 'reference'")
            self._kernels[backend] = kernel
        return kernel

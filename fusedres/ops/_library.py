"""The torch.library namespace of the ops. Each op file defines its ops: schema, table of arguments, fake."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fusedres.errors import DtypeError
from fusedres.kernels import serving
from fusedres.ops._arguments import Call, Relations, Row
from fusedres.ops._memory import check_kinds, check_memory, check_one_device, signature, tensors_of

_LIBRARY = torch.library.Library("fusedres", "DEF")
_UNLISTED = ("bool", "Optional[float]", "float", "str")  # types of arguments that no memory depends on
_MOST_SIGNATURES = 4096

OPS: dict[str, Op] = {}  # every op by its name


class Op:
    """An op of the namespace fusedres whose last argument names the backend.

    Called, it goes through torch's dispatcher and checks its arguments; see launch.py for callers that have.

    Args:
        schema: torch's; what may be None and what is written.
        folder: of the kernels.
        rows: what the arguments have to be, see _arguments.py, in the order of the checks.
        fake: the results' shapes and dtypes.
        relations: checks what no row can say.
    """

    def __init__(
        self,
        schema: str,
        folder: str,
        rows: Mapping[str, Row],
        fake: Callable[..., Any],
        relations: Relations | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.folder, self.rows, self._fake, self._relations = folder, rows, fake, relations
        self._kernels: dict[str, Callable[..., Any]] = {}
        self._right: set[Any] = set()  # signatures of calls that are what the table says
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedres::{self.name}", self._faked, lib=_LIBRARY)
        self._overload = getattr(torch.ops.fusedres, self.name).default
        arguments = self._overload._schema.arguments
        self.arguments = tuple(a.name for a in arguments)
        self.written = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
        # The dispatcher takes None for these too, as a tensor that is not defined.
        self._required = tuple(a.name for a in arguments if str(a.type) == "Tensor")
        missing = [a.name for a in arguments if a.name not in rows and str(a.type) not in _UNLISTED]
        if missing:
            raise ValueError(
                f"{self.name}: rows must have every argument that memory depends on, got none of {missing}"
            )
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args[:-1], self.serving(args[-1]))

    def dispatched(self, backend: str) -> Callable[..., Any]:
        """The op through torch's dispatcher, of one backend."""
        return lambda *args: self(*args, backend)

    def _checked(self, *args: Any) -> Any:
        self.check(*args)
        return self.kernel(args[-1])(*args[:-1])

    def _faked(self, *args: Any) -> Any:
        check_one_device(self.name, tensors_of(self.arguments, args))
        return self._fake(*args)

    def check(self, *args: Any) -> None:
        """Raises where the arguments are not what the table says; reads no values of tensors."""
        tensors = tuple(tensors_of(self.arguments, args))
        check_kinds(self.name, tensors)
        known = signature(args)
        if known not in self._right:
            self._check_table(args)
            if len(self._right) >= _MOST_SIGNATURES:
                self._right.clear()
            self._right.add(known)
        check_memory(self.name, tensors, self.written)

    def _check_table(self, args: tuple[Any, ...]) -> None:
        call = Call(self.name, dict(zip(self.arguments, args, strict=True)), self.serving(args[-1]))
        for name in self._required:
            if call[name] is None:
                call.fail(DtypeError, name, "be a tensor", "None", "only arguments that are optional may be None")
        for name, row in self.rows.items():
            row.check(call, name)
        if self._relations is not None:
            self._relations(call)

    def serving(self, backend: str) -> str:
        """The backend whose kernel runs where `backend` is selected."""
        return serving.serving(self.folder, self.name, backend) if backend in serving.STAND_INS else backend

    def kernel(self, backend: str) -> Callable[..., Any]:
        """The kernel that serves a backend, imported at first use."""
        kernel = self._kernels.get(backend)
        if kernel is None:
            kernel = serving.find(self.folder, self.name, self.serving(backend))
            if kernel is None:
                raise RuntimeError(f"{self.name}: there is no {backend} backend; use 'reference'")
            self._kernels[backend] = kernel
        return kernel

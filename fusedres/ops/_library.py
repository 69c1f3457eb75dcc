"""The torch.library namespace of the ops, and the decorator that makes an op of one typed function.

    @op("bn_relu", {"x": activation("N C H W"), "state": wide("4 C")}, writes=("x",))
    def bn_relu_(x: Tensor, state: Tensor, *, backend: str) -> None:
        ...

The function's signature is the op's: its schema is derived from it. The body computes what the op returns for fake
tensors: shapes and dtypes, no values. A parameter that is a named tuple of fusedres/values.py becomes one argument of
the schema for each field. A parameter that is named like its type (`geometry: Geometry`) gives the fields' own names;
any other (`shortcut: ShortcutInput`) gives `shortcut` for the first field and `shortcut_state`, … for the rest. Kernels
(fusedres/kernels/<folder>/<backend>.py) take the parameters of the function without the backend.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fusedres.errors import DtypeError
from fusedres.kernels import serving
from fusedres.ops._arguments import Call, Relations, Rows
from fusedres.ops._memory import check_kinds, check_memory, check_one_device, signature, tensors_of

_LIBRARY = torch.library.Library("fusedres", "DEF")
_UNLISTED = (bool, float, float | None, str)  # types of arguments that no memory depends on
_MOST_SIGNATURES = 4096

P = ParamSpec("P")
R = TypeVar("R")

OPS: dict[str, Op] = {}  # every op by its name


class _Parameter(NamedTuple):
    """A parameter of an op, and the arguments of the schema that it becomes."""

    name: str
    kind: Any  # the class of a named tuple; None: one argument
    arguments: dict[str, Any]  # names and types
    absent: tuple[Any, ...] | None  # the arguments that stand for None, if a named tuple may be None


def _parameter(name: str, hint: Any) -> _Parameter:
    kinds = [each for each in (hint, *typing.get_args(hint)) if hasattr(each, "_fields")]
    if not kinds:
        return _Parameter(name, None, {name: hint}, None)
    (kind,) = kinds
    hints = typing.get_type_hints(kind)
    if name.replace("_", "") == kind.__name__.lower():
        names = list(kind._fields)
    else:
        names = [name, *(f"{name}_{field}" for field in kind._fields[1:])]
    if hint is kind:
        return _Parameter(name, kind, dict(zip(names, hints.values(), strict=True)), None)
    optional = [each | None if each is Tensor else each for each in hints.values()]
    absent = [None if Tensor in typing.get_args(each) else False for each in optional]
    nothing = dict(zip(hints, absent, strict=True)) | kind._field_defaults
    return _Parameter(name, kind, dict(zip(names, optional, strict=True)), tuple(nothing.values()))


def _schema(name: str, arguments: Mapping[str, Any], returned: Any, writes: Sequence[str]) -> str:
    """The torch.library schema; sizes are numbers in it, as launches depend on them."""

    def prototype() -> None: ...

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(argument, kind, annotation=hint) for argument, hint in arguments.items()]
    prototype.__signature__ = inspect.Signature(listed, return_annotation=returned)  # type: ignore[attr-defined]
    found: str = torch.library.infer_schema(prototype, op_name=name, mutates_args=writes)
    return found.replace("SymInt", "int")


class Op:
    """An op of the namespace fusedres; the last argument of its schema is the backend.

    Called, it goes through torch's dispatcher and checks its arguments; launch.py is for callers that have checked.

    Args:
        declared: the typed function; see the head of this file.
        folder: of the kernels.
        rows: what the schema's arguments have to be (see _arguments.py), in the order of the checks.
        writes: the arguments that the op writes.
        relations: checks what no row can say.
    """

    def __init__(
        self, declared: Callable[..., Any], folder: str, rows: Rows, writes: Sequence[str], relations: Relations | None
    ) -> None:
        self.name = declared.__name__
        self.folder, self.rows, self._declared, self._relations = folder, rows, declared, relations
        self._kernels: dict[str, Callable[..., Any]] = {}
        self._right: set[Any] = set()  # signatures of calls that are what the table says
        hints = typing.get_type_hints(declared)
        returned = inspect.signature(declared, eval_str=True).return_annotation
        del hints["return"]
        backend = hints.pop("backend")
        self._parameters = tuple(_parameter(name, hint) for name, hint in hints.items())
        self._defaults = declared.__defaults__ or ()
        arguments = {name: hint for parameter in self._parameters for name, hint in parameter.arguments.items()}
        self.arguments = (*arguments, "backend")
        self.written = writes
        _LIBRARY.define(_schema(self.name, arguments | {"backend": backend}, returned, writes))
        _LIBRARY.impl(self.name, self.checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fusedres::{self.name}", self._faked, lib=_LIBRARY)
        self._overload = getattr(torch.ops.fusedres, self.name).default
        # The dispatcher takes None for these too, as a tensor that is not defined.
        self._required = tuple(name for name, hint in arguments.items() if hint is Tensor)
        missing = [name for name, hint in arguments.items() if name not in rows and hint not in _UNLISTED]
        if missing:
            raise ValueError(
                f"{self.name}: rows must have every argument that memory depends on, got none of {missing}"
            )
        OPS[self.name] = self

    def __call__(self, *args: Any, backend: str) -> Any:
        return self._overload(*self.flat(args), self.serving(backend))

    def dispatched(self, backend: str) -> Callable[..., Any]:
        """The op on one backend, through torch's dispatcher."""
        return functools.partial(self, backend=backend)

    def flat(self, args: Sequence[Any]) -> list[Any]:
        """The schema's arguments, without the backend, of a call with these parameters, of which the last may lack."""
        missing = len(self._parameters) - len(args)
        if missing:
            args = (*args, *self._defaults[len(self._defaults) - missing :])
        found: list[Any] = []
        for parameter, value in zip(self._parameters, args, strict=True):
            if parameter.kind is None:
                found.append(value)
            elif value is None and parameter.absent is not None:
                found.extend(parameter.absent)
            elif isinstance(value, parameter.kind):
                found.extend(value)
            else:
                kind = parameter.kind.__name__
                raise DtypeError(
                    f"{self.name}: {parameter.name} must be a {kind} of fusedres.values, got {value!r:.80}"
                )
        return found

    def grouped(self, flat: Sequence[Any]) -> list[Any]:
        """The parameters of a call with these arguments of the schema, which have no backend: the inverse of flat."""
        found: list[Any] = []
        begin = 0
        for parameter in self._parameters:
            values = flat[begin : begin + len(parameter.arguments)]
            begin += len(values)
            if parameter.kind is None:
                found.append(values[0])
            else:
                absent = parameter.absent is not None and values[0] is None
                found.append(None if absent else parameter.kind(*values))
        return found

    def checked(self, *args: Any) -> Any:
        """The op of the schema's arguments, checked, on the backend that the last of them names."""
        self.check(*args)
        return self.kernel(args[-1])(*self.grouped(args[:-1]))

    def _faked(self, *args: Any) -> Any:
        check_one_device(self.name, tensors_of(self.arguments, args))
        return self._declared(*self.grouped(args[:-1]), backend=args[-1])

    def check(self, *args: Any) -> None:
        """Raise where the schema's arguments are not what the table says; no values of tensors are read."""
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
        """The kernel that serves a backend, imported at first use; it takes the op's parameters."""
        kernel = self._kernels.get(backend)
        if kernel is None:
            kernel = serving.find(self.folder, self.name, self.serving(backend))
            if kernel is None:
                raise RuntimeError(f"{self.name}: there is no {backend} backend; use 'reference'")
            self._kernels[backend] = kernel
        return kernel


def op(
    folder: str, rows: Rows, *, writes: Sequence[str] = (), relations: Relations | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make an Op of a typed function, and a function that calls it; see the head of this file."""

    def define(declared: Callable[P, R]) -> Callable[P, R]:
        made = Op(declared, folder, rows, writes, relations)
        parameters = inspect.signature(declared)

        @functools.wraps(declared)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            result: R = made(*bound.args, **bound.kwargs)
            return result

        return call

    return define

"""The language of the shapes in a table of arguments: one word for each size.

| word         | the size is                                                                     |
| ------------ | ------------------------------------------------------------------------------- |
| `4`          | this number                                                                     |
| `C`          | the C of the call: the first argument with a C sets it, the others must match   |
| `D<=C`, `D>=C` | the D of the call, and at most, at least C                                    |
| `C/8`        | ceil(C / 8)                                                                     |
| `H/stride`   | ceil(H / stride), stride being an int argument                                  |
| `P*stride`   | any size from which every stride-th pixel gives P; sets P if nothing has        |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from fusedres.values import subsampled


class Scope:
    """What is known of a call from the arguments checked so far: named sizes and dtypes, and what set them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.sizes: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.reasons: dict[str, str] = {}  # why a dtype is that one, for messages
        self.setters: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the arguments, for messages

    def matches(self, name: str, size: int, setter: str) -> bool:
        """Whether a named size is this one; sets it if nothing has."""
        if name not in self.sizes:
            self.sizes[name], self.setters[name] = size, setter
        return self.sizes[name] == size


class Size:
    """One word of a shape."""

    def __init__(self, word: str) -> None:
        found = re.fullmatch(r"(\w+)(?:(<=|>=|/|\*)(\w+))?", word)
        if found is None:
            raise ValueError(f"Size: word must be a number, a name, or two of them with <=, >=, / or *, got {word!r}")
        self.word = word
        self.first, self.sign, self.second = found[1], found[2] or "", found[3] or ""
        self.number = int(self.first) if self.first.isdecimal() else None
        self.name = self.first if self.number is None and self.sign != "/" else ""  # what this size may set

    def names(self) -> tuple[str, ...]:
        """The named sizes that this one depends on."""
        return tuple(n for n in (self.first, self.second) if n and not n.isdecimal())

    def _step(self, scope: Scope) -> int:
        return int(self.second) if self.second.isdecimal() else int(scope.values[self.second])

    def fits(self, got: int, scope: Scope, setter: str) -> bool:
        """Whether a tensor may have this size here; sets the sizes that nothing has set before."""
        if self.number is not None:
            return got == self.number
        if self.sign == "/":
            return got == subsampled(scope.sizes[self.first], self._step(scope))
        if self.sign == "*":
            return scope.matches(self.first, subsampled(got, self._step(scope)), setter)
        if not scope.matches(self.first, got, setter):
            return False
        if not self.sign:
            return True
        other = scope.sizes[self.second]
        return got <= other if self.sign == "<=" else got >= other

    def shown(self, known: Mapping[str, int], scope: Scope) -> str:
        """What this size must be, given the sizes that other arguments set."""
        if self.number is not None:
            return self.first
        size = known.get(self.first)
        if size is not None and self.sign in ("/", "*"):
            step = self._step(scope)
            if self.sign == "/":
                return str(subsampled(size, step))
            return str(size) if step == 1 or size == 0 else f"{(size - 1) * step + 1} to {size * step}"
        if size is not None or not self.sign or self.sign == "*":
            return self.first if size is None else str(size)
        return f"{'at most' if self.sign == '<=' else 'at least'} {known[self.second]}"


class Shape:
    """The sizes of a tensor or of a list of integers, e.g. Shape("N K P Q")."""

    def __init__(self, text: str) -> None:
        self.sizes = tuple(Size(word) for word in text.split())
        self.text = f"({', '.join(text.split())}{',' if len(self.sizes) == 1 else ''})"

    def fits(self, got: tuple[int, ...], scope: Scope, setter: str) -> bool:
        """Whether this is the shape of the argument `setter` here."""
        scope.shapes[setter] = got
        if len(got) != len(self.sizes):
            return False
        sizes = scope.sizes
        for size, number in zip(self.sizes, got, strict=True):
            if sizes.get(size.word) != number and not size.fits(number, scope, setter):
                return False
        return True

    def expected(self, scope: Scope, argument: str) -> str:
        """`have shape (2, 8, 5, 5) for x (2, 8, 5, 5)`: the sizes that other arguments set, and these arguments."""
        known = {name: size for name, size in scope.sizes.items() if scope.setters[name] != argument}
        setters = dict.fromkeys(scope.setters[n] for size in self.sizes for n in size.names() if n in known)
        if not setters:
            letters = all(size.name == size.word for size in self.sizes)
            return f"have {len(self.sizes)} dimensions {self.text}" if letters else f"have shape {self.text}"
        shown = [size.shown(known, scope) for size in self.sizes]
        others = " and ".join(f"{setter} {tuple(scope.shapes[setter])}" for setter in setters)
        return f"have shape ({', '.join(shown)}{',' if len(shown) == 1 else ''}) for {others}"

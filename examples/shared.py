"""Load `terminal` and `files`, two files of the package that need nothing but Python, by their path.

Importing them from fusedres would import torch first, and --no-fused must work without the package.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def _load(name: str) -> ModuleType:
    spec = spec_from_file_location(f"shared_{name}", Path(__file__).resolve().parent.parent / "fusedres" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


terminal, files = _load("terminal"), _load("files")

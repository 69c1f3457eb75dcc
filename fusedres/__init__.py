"""Fused residual blocks for PyTorch: convolution + BatchNorm + residual add + ReLU, forward and backward."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _use_installed_copy() -> None:
    """Load the installed package instead of a checkout's folder of the same name that has no compiled core.

    `python -m ...` in the root of a checkout finds this folder before the installed package. If the folder has no `_C`,
    the installed module replaces it completely in `sys.modules["fusedres"]`, so that two versions never mix.

    Raises:
        ImportError: nothing is installed, or its version is not the checkout's.
    """

    def has_core(folder: Path) -> bool:
        return any((folder / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES)

    here = Path(__file__).parent
    if has_core(here):
        return
    for entry in sys.path:
        spec = PathFinder.find_spec(__name__, [entry])
        if spec and spec.origin and spec.loader and has_core(Path(spec.origin).parent):
            module = sys.modules[__name__] = module_from_spec(spec)
            spec.loader.exec_module(module)
            break
    else:
        raise ImportError("fusedres is not installed: run 'pip install .' in the checkout")

    import runpy  # imported only here, as no other case needs it

    version = runpy.run_path(str(here / "_version.py"))["__version__"]
    if version != module.__version__:
        raise ImportError(
            f"fusedres {module.__version__} is installed, the checkout in {here.parent} is {version}: "
            "run 'pip install .' in the checkout"
        )


_use_installed_copy()

from fusedres import terminal

if getattr(sys, "argv", [])[:1] == ["-m"]:  # `python -m fusedres`: Python is still looking for __main__
    terminal.begin()

from fusedres._version import __version__
from fusedres.backends import use_backend
from fusedres.convert import BlockReport, Report, freeze, fuse, report, unfuse
from fusedres.modules import (
    AvgPoolShortcut,
    FusedBasicBlock,
    FusedBottleneck,
    FusedResNet,
    Highway,
    HighwayConv2d,
    HighwayLinear,
    LayerScale,
    NormActConv,
    PlainBlock,
    PreActBasicBlock,
    PreActBottleneck,
    PreActSequential,
    ResidualTail,
    ResNeXtBottleneck,
    ReZero,
    SEBasicBlock,
    SEBottleneck,
    SkipInit,
    StochasticDepth,
    WideBlock,
    ZeroPadShortcut,
    register,
)
from fusedres.pages import keep_pages

__all__ = [
    "AvgPoolShortcut",
    "BlockReport",
    "FusedBasicBlock",
    "FusedBottleneck",
    "FusedResNet",
    "Highway",
    "HighwayConv2d",
    "HighwayLinear",
    "LayerScale",
    "NormActConv",
    "PlainBlock",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActSequential",
    "ReZero",
    "Report",
    "ResNeXtBottleneck",
    "ResidualTail",
    "SEBasicBlock",
    "SEBottleneck",
    "SkipInit",
    "StochasticDepth",
    "WideBlock",
    "ZeroPadShortcut",
    "__version__",
    "freeze",
    "fuse",
    "keep_pages",
    "register",
    "report",
    "unfuse",
    "use_backend",
]

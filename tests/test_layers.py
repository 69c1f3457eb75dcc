"""The layers of the package: imports point downward, and only kernels touch the compiled core."""

from __future__ import annotations

from pathlib import Path

from checkouts import ROOT, copy_package, imports

LAYERS = ["kernels", "ops", "autograd", "modules", "models", "convert", "tune", "analysis"]  # from the bottom up


def layer(module: str) -> int | None:
    """Return the height of the layer of a fusedres module; None if it is in no layer."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "fusedres" and len(parts) > 1 and parts[1] in LAYERS else None


def upward_imports(root: Path) -> set[str]:
    """Return `a -> b` for every forbidden import in root/fusedres.

    A layer may import itself and the layers below, but never the package as a whole. A module outside the layers may
    not import a layer.
    """
    found = set()
    modules = {path.name.partition(".")[0] for path in (root / "fusedres").iterdir()}
    for path in (root / "fusedres").rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        if module in ("fusedres.__init__", "fusedres.__main__"):  # they import everything
            continue
        height = layer(module)
        for name in imports(path, root):
            first, _, rest = name.partition(".")
            whole = first == "fusedres" and rest.partition(".")[0] not in modules  # e.g. `from fusedres import fuse`
            other = layer(name)
            if whole or (other is not None and (height is None or other > height)):
                found.add(f"{module} -> {name}")
    return found


def test_imports_point_downward() -> None:
    assert {path.stem for path in (ROOT / "fusedres").iterdir()} >= set(LAYERS)
    assert upward_imports(ROOT) == set()


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    package = copy_package(tmp_path, core=False) / "fusedres"
    (package / "ops" / "upward.py").write_text("def f():\n    from ..autograd import block\n")
    (package / "kernels" / "upward.py").write_text("from fusedres import modules\n")
    (package / "kernels" / "whole.py").write_text("import fusedres\nfrom fusedres import fuse\n")
    (package / "loose.py").write_text("import fusedres.ops.gram\n")
    found = upward_imports(tmp_path)
    for expected in (
        "fusedres.ops.upward -> fusedres.autograd.block",
        "fusedres.kernels.upward -> fusedres.modules",
        "fusedres.kernels.whole -> fusedres",
        "fusedres.kernels.whole -> fusedres.fuse",
        "fusedres.loose -> fusedres.ops.gram",
    ):
        assert expected in found


def test_only_kernels_and_the_cpu_passes_touch_the_core() -> None:
    package = ROOT / "fusedres"
    users = {path.relative_to(package) for path in package.rglob("*.py") if "fusedres._C" in imports(path)}
    outside = {str(path) for path in users if path.parts[0] != "kernels"}
    assert outside <= {"__main__.py", "autograd/cpu_passes.py"}
    loads = {path.name for path in (ROOT / "fusedres").rglob("*.py") if '"fusedres._CUDA"' in path.read_text()}
    assert loads == {"cuda_support.py"}

"""What an installation promises: one version, all dependencies declared, a light import, and commands that work from
the root of a checkout although the source folder there has the package's name.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from checkouts import ROOT, copy_package, imports, python, run

import fusedres
from fusedres.__main__ import as_text, info

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def without_public_names(folder: Path) -> Path:
    """Cut __init__.py after the search for the installed copy, so that nothing imports torch, which takes seconds."""
    init = folder / "fusedres" / "__init__.py"
    call = "\n_use_installed_copy()\n"
    head, found, _ = init.read_text().partition(call)
    assert found
    init.write_text(head + call + "from fusedres._version import __version__\n")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a folder like a new checkout: the sources of the package without a compiled core."""
    return copy_package(tmp_path / "checkout", core=False)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Make a folder like site-packages: the package with its compiled core."""
    return copy_package(tmp_path / "site", core=True)


# The checkout and the installed package


def test_the_installed_copy_is_used_from_a_checkout(checkout: Path, site: Path) -> None:
    out = python("-m", "fusedres", "info", "--json", cwd=checkout, PYTHONPATH=str(site))
    assert Path(json.loads(out)["location"]).samefile(site / "fusedres")


def test_every_module_comes_from_the_installed_copy(checkout: Path, site: Path) -> None:
    without_public_names(checkout)
    without_public_names(site)
    code = "import sys, fusedres._C; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('fusedres')))"
    files = [Path(name) for name in python("-c", code, cwd=checkout, PYTHONPATH=str(site)).split()]
    assert len(files) > 2
    assert all(file.is_relative_to(site.resolve()) or file.is_relative_to(site) for file in files), files


def test_a_folder_with_a_core_is_used_itself(tmp_path: Path, site: Path) -> None:
    built = without_public_names(copy_package(tmp_path / "built", core=True))
    out = python("-c", "import fusedres; print(fusedres.__file__)", cwd=built, PYTHONPATH=str(site))
    assert Path(out.strip()).samefile(built / "fusedres" / "__init__.py")


def test_nothing_installed_is_said(checkout: Path) -> None:
    done = run(sys.executable, "-S", "-c", "import fusedres", cwd=checkout, PYTHONPATH="")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fusedres is not installed: run 'pip install .' in the checkout"
    )


def test_another_version_installed_is_said(checkout: Path, site: Path) -> None:
    without_public_names(site)
    (checkout / "fusedres" / "_version.py").write_text('__version__ = "999.0"\n')
    done = run(sys.executable, "-c", "import fusedres", cwd=checkout, PYTHONPATH=str(site))
    expected = (
        rf"ImportError: fusedres {re.escape(fusedres.__version__)} is installed, the checkout in .* is 999\.0: .*"
    )
    assert re.fullmatch(expected, done.stderr.splitlines()[-1]), done.stderr


def test_python_m_pytest_works_from_the_root() -> None:
    collect = ["--collect-only", "-q", "-p", "no:cacheprovider", "tests/test_packaging.py"]
    out = python("-m", "pytest", *collect, PYTEST_ADDOPTS="")
    assert "test_python_m_pytest_works_from_the_root" in out


# The version and the dependencies


def test_version_has_one_source() -> None:
    assert "version" in PROJECT["dynamic"]
    sources = [ROOT / "pyproject.toml", ROOT / "setup.py", *(ROOT / "fusedres").rglob("*.py")]
    holders = [path.name for path in sources if f'"{fusedres.__version__}"' in path.read_text()]
    assert holders == ["_version.py"]
    assert importlib.metadata.version("fusedres") == fusedres.__version__


def requirement_names(requirements: list[str]) -> set[str]:
    """Return the import names of `requirements`, including those of this project's extras."""
    modules = {"scikit-learn": "sklearn", "pytest-xdist": "xdist"}
    names: set[str] = set()
    for requirement in requirements:
        own_extras = re.fullmatch(r"fusedres\[(.*)\]", requirement)
        if own_extras:
            for extra in own_extras[1].split(","):
                names |= requirement_names(PROJECT["optional-dependencies"][extra])
        else:
            name = re.match(r"[\w.-]+", requirement)[0]
            names.add(modules.get(name, name))
    return names


@pytest.mark.parametrize(
    ("folder", "extra"),
    [("fusedres", None), ("fusedres/analysis", "analysis"), ("tests", "test"), ("benchmarks", "rivals")],
)
def test_what_is_imported_is_required(folder: str, extra: str | None) -> None:
    required = requirement_names(PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else []))
    required |= {"numpy", "PIL", "typing_extensions"}  # required by torchvision and torch
    required |= {"triton"}  # installed with torch, and imported only when a kernel needs it
    required |= {"tomli"} if extra == "test" else set()  # required by pytest for a Python without tomllib
    folders = [ROOT / name for name in (folder, "benchmarks", "tests", "tests/peers")]
    own = {"fusedres"} | {path.stem for where in folders for path in where.glob("*.py")}
    own |= {path.parent.name for where in folders for path in where.glob("*/__init__.py")}
    files = [path for path in (ROOT / folder).rglob("*.py") if extra or "analysis" not in path.parts]
    assert files
    required |= {name.replace("-", "_") for name in required}  # as the module is called
    foreign = {
        (path.name, name)
        for path in files
        for module in imports(path)
        if (name := module.partition(".")[0]) not in required | own | set(sys.stdlib_module_names)
    }
    assert not foreign


# The import


def test_triton_is_not_needed() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, torchvision, fusedres
model = fusedres.fuse(torchvision.models.resnet18())
model(torch.randn(2, 3, 32, 32)).sum().backward()
print(all(block.fused for block in fusedres.report(model)))
"""
    assert python("-c", code).strip() == "True"
    command = """
import sys, runpy
for name in ("triton", "matplotlib", "mlxtend", "scipy", "sklearn"):  # nor are those of the extra `analysis`
    sys.modules[name] = None
sys.argv = ["fusedres", *sys.argv[1:]]
runpy.run_module("fusedres", run_name="__main__")
"""
    assert re.search(r"^triton +not installed$", python("-c", command, "info"), re.MULTILINE)


def test_info_says_what_is_installed() -> None:
    values = info()
    assert json.loads(json.dumps(values)) == values
    assert values["fusedres"] == fusedres.__version__
    assert values["torch"] == torch.__version__
    assert values["core"]["isa_used"] in values["core"]["isa_built"]
    assert values["devices"]["cpu"]["backend"] == "cpu"
    text = as_text(values | {"triton": None, "core": {"openmp": False, "isa_built": ["portable", "avx2"]}})
    assert re.search(r"^triton +not installed$", text, re.MULTILINE), text
    assert re.search(r"^core +openmp no, isa_built portable\+avx2$", text, re.MULTILINE), text
    assert re.search(r"^cpu +.*threads \d+, measured nothing, backend cpu$", text, re.MULTILINE), text

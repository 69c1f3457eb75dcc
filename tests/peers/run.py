"""Run the tests of torchvision and timm twice: as they are, and with every model that they build fused.

python tests/peers/run.py --torchvision vision/test --timm pytorch-image-models/tests

The folders are those of the sources' checkouts, as the packages do not contain their tests. The tests that are selected
build models with ResNets in them, or models that look like one. Where torchvision compares a result with a file, the
first run writes the file. Tests that pass only as they are run in float64, too: many compare a model with its
TorchScript or torch.fx twin, which stay stock, and allow float32 less than its rounding. With --write, the table in
docs/compatibility.md is replaced. The exit code is 1 if a test passes only as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import compatibility_page as page

_HERE = Path(__file__).resolve().parent
Outcomes = dict[str, tuple[str, int]]  # of each test: passed, failed or skipped; how many blocks and stems ran fused


class Peer(NamedTuple):
    """A package, the files of its tests, and a regular expression for those that build residual networks."""

    package: str
    files: tuple[str, ...]
    selected: str


PEERS = (
    Peer(
        "torchvision",
        ("test_models.py", "test_backbone_utils.py"),
        r"dilation|\[.*(resnet|resnext|rcnn_|fcn_|fcos_|deeplab|r3d|mc3|r2plus1d|densenet121|regnet_[xy]_400mf)",
    ),
    Peer(
        "timm",
        ("test_models.py",),
        r"-(resnet(18|18d|26|26d|26t|34|50|50c|50d|101)|resnetblur18|resnetaa34d|resnext50_32x4d|wide_resnet50_2"
        r"|hrnet_w18_small|densenet121|seresnet18|ecaresnet26t|skresnet18|regnetx_002|regnety_002|test_resnet)\]",
    ),
)


class Row(NamedTuple):
    """What became of the tests of one function."""

    function: str
    passed: list[str]  # as they are
    fused: list[str]  # with fused models too
    in_float64: list[str]  # with fused models, but only in float64
    ran_fused: int  # in how many a block or a stem ran fused

    @property
    def lost(self) -> list[str]:
        """The tests that pass only as they are."""
        return sorted(set(self.passed) - {*self.fused, *self.in_float64})


def run(peer: Peer, folder: Path, jobs: int, fuse: bool, lost: Sequence[str] = ()) -> Outcomes:
    """Run the selected tests of a peer in a folder; return the outcomes of those that were not skipped.

    Args:
        lost: tests to run in float64, instead of the selected ones in float32.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as outcomes:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(_HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OUTCOMES": outcomes.name,
            "SELECTED": "|".join(map(re.escape, lost)) or peer.selected,
            "FUSE_MODELS": "1" if fuse else "",
            "DTYPE": "float64" if lost else "float32",
            "OMP_NUM_THREADS": "1",
            "EXPECTTEST_ACCEPT": "" if fuse else "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider"]
        command += ["-p", "builders", "-q", "-W", "ignore", "-n", str(jobs), *peer.files]
        subprocess.run(command, cwd=folder, env=environment, check=False)
        found: Outcomes = json.loads(Path(outcomes.name).read_text(encoding="utf-8"))
    return {test: outcome for test, outcome in found.items() if outcome[0] != "skipped"}


def compare(peer: Peer, folder: Path, jobs: int) -> list[Row]:
    """Run a peer's tests in every way; return a row for each test function."""
    stock, fused = (run(peer, folder, jobs, fuse) for fuse in (False, True))
    passed = _passed(stock)
    lost = passed - _passed(fused)
    again: set[str] = set()
    if lost:
        run(peer, folder, jobs, False, sorted(lost))  # writes the files with results
        again = _passed(run(peer, folder, jobs, True, sorted(lost)))
    return [
        Row(
            function,
            sorted(tests),
            sorted(tests - lost),
            sorted(tests & again),
            sum(fused.get(test, ("", 0))[1] > 0 for test in tests),
        )
        for function, tests in sorted(_by_function(passed).items())
    ]


def _passed(outcomes: Outcomes) -> set[str]:
    return {test for test, (outcome, _) in outcomes.items() if outcome == "passed"}


def _by_function(tests: set[str]) -> dict[str, set[str]]:
    found: defaultdict[str, set[str]] = defaultdict(set)
    for test in tests:
        found[re.sub(r"\[.*", "", test).split("::")[-1]].add(test)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    for peer in PEERS:
        parser.add_argument(f"--{peer.package}", type=Path, metavar="FOLDER", help=f"{peer.package}'s tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that run tests")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/compatibility.md")
    options = parser.parse_args(argv)
    given = {peer: folder for peer in PEERS if (folder := getattr(options, peer.package)) is not None}
    if not given:
        parser.error("pass a folder with tests")
    for peer, folder in given.items():
        missing = [name for name in peer.files if not (folder / name).is_file()]
        if missing:
            parser.error(f"--{peer.package}: {folder} has no {missing[0]}: pass the folder of {peer.package}'s tests")
    table: list[page.Row] = []
    lost: list[str] = []
    for peer, folder in given.items():
        with tempfile.TemporaryDirectory() as scratch:
            copy = shutil.copytree(folder, Path(scratch, "tests"))
            for row in compare(peer, copy, options.jobs):
                counts = len(row.passed), len(row.fused), len(row.in_float64), row.ran_fused
                table.append((peer.package, f"`{row.function}`", *map(str, counts)))
                lost += [f"{peer.package}: {test}" for test in row.lost]
    heading = ("tests of", "test", "pass", "pass fused", "pass fused in float64 only", "ran something fused")
    for line in (heading, *table):
        print("  ".join(line))
    print(*(f"only unfused: {test}" for test in lost), sep="\n")
    if options.write:
        page.write("tests", heading, table, ["torch", *(peer.package for peer in given)])
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())

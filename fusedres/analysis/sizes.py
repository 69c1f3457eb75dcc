"""The sizes of the experiments: the default, for minutes on two cores, and one for seconds."""

from __future__ import annotations

from typing import NamedTuple

from fusedres.analysis.training import Recipe


class Sizes(NamedTuple):
    """How large each experiment is."""

    seeds: int  # networks of each kind
    flow_depths: tuple[int, ...]
    unrolling_depth: int
    degradation_depths: tuple[int, ...]
    degradation: Recipe
    shortcuts_depth: int
    shortcuts: Recipe
    highway_depth: int
    highway: Recipe
    ensembles_depths: tuple[int, int]  # of the residual and of the plain network
    ensembles: Recipe
    ensembles_trials: int  # permutations
    shattered_seeds: int


FULL = Sizes(
    seeds=3,
    flow_depths=(8, 20, 56, 110),
    unrolling_depth=56,
    degradation_depths=(8, 14, 20, 32, 56),
    degradation=Recipe(epochs=15, learning_rate=0.05, warm_up=2 / 15),
    shortcuts_depth=56,
    shortcuts=Recipe(epochs=10, learning_rate=0.05, warm_up=0.2),
    highway_depth=50,
    highway=Recipe(epochs=15, learning_rate=0.1, warm_up=0),
    ensembles_depths=(56, 20),
    ensembles=Recipe(epochs=15, learning_rate=0.05, warm_up=2 / 15),
    ensembles_trials=60,
    shattered_seeds=100,
)

QUICK = Sizes(
    seeds=1,
    flow_depths=(8, 20),
    unrolling_depth=20,
    degradation_depths=(8, 20, 56),
    degradation=Recipe(epochs=5, learning_rate=0.05, warm_up=0.2),
    shortcuts_depth=32,
    shortcuts=Recipe(epochs=3, learning_rate=0.05, warm_up=0.3),
    highway_depth=50,
    highway=Recipe(epochs=6, learning_rate=0.1, warm_up=0),
    ensembles_depths=(20, 14),
    ensembles=Recipe(epochs=5, learning_rate=0.05, warm_up=0.2),
    ensembles_trials=20,
    shattered_seeds=20,
)

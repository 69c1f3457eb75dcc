"""Experiments that show why residual connections work, on new networks or on any model with residual blocks.

Each returns a dataclass with `to_dict()`, `conclusion()`, `png()` and `write(folder)`. `python -m fusedres analyze`
runs them all.

| function | of | shows |
| --- | --- | --- |
| `gradient_flow`, `gradient_flow_by_depth` | a model; new networks | what shortcuts and branches carry back |
| `unrolling`, `unrolling_of_designs` | a model; new networks | whether x_L = x_l + ΣF |
| `degradation` | trained networks by depth | plain networks train worse when they are deeper |
| `shortcuts` | trained networks by shortcut | what other shortcuts than the identity cost |
| `highway` | trained networks of 50 layers | gates that carry let them train |
| `ensembles`, `ensembles_of_trained` | a model; trained networks | deleted blocks, permuted blocks, paths by length |
| `shattered`, `shattered_by_depth` | a model; new networks | how alike the gradients of neighbours are |
"""

from fusedres.analysis.blocks import ResidualBlock, residual_blocks
from fusedres.analysis.data import Data, load
from fusedres.analysis.degradation import Degradation, degradation
from fusedres.analysis.ensembles import Ensembles, ensembles, ensembles_of_trained
from fusedres.analysis.gradient_flow import GradientFlow, gradient_flow, gradient_flow_by_depth
from fusedres.analysis.highway import HighwayLayers, highway
from fusedres.analysis.results import AnalysisError, Result
from fusedres.analysis.shattered import Shattered, shattered, shattered_by_depth
from fusedres.analysis.shortcuts import Shortcuts, shortcuts
from fusedres.analysis.training import Recipe
from fusedres.analysis.unrolling import Unrolling, unrolling, unrolling_of_designs

__all__ = [
    "AnalysisError",
    "Data",
    "Degradation",
    "Ensembles",
    "GradientFlow",
    "HighwayLayers",
    "Recipe",
    "ResidualBlock",
    "Result",
    "Shattered",
    "Shortcuts",
    "Unrolling",
    "degradation",
    "ensembles",
    "ensembles_of_trained",
    "gradient_flow",
    "gradient_flow_by_depth",
    "highway",
    "load",
    "residual_blocks",
    "shattered",
    "shattered_by_depth",
    "shortcuts",
    "unrolling",
    "unrolling_of_designs",
]

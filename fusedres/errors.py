"""The errors of fusedres about shapes and dtypes: of the class that torch raises, and of the more exact one.

torch raises RuntimeError for a wrong shape or dtype. Code that catches RuntimeError goes on working with fused blocks
only if these errors are RuntimeErrors too; they are also the ValueError or TypeError that Python has for the case.
"""


class ShapeError(RuntimeError, ValueError):
    """A tensor has a wrong number of dimensions, shape or memory layout, or a size does not fit the others."""


class DtypeError(RuntimeError, TypeError):
    """A tensor has a wrong dtype, or it is of a kind (sparse, quantized, …) that the op cannot read."""

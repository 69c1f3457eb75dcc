"""The errors of fusedres about shapes and dtypes.

torch raises RuntimeError for a wrong shape or dtype. These errors are RuntimeErrors too, so that code that catches
RuntimeError works with fused blocks. They are also a ValueError or TypeError, Python's more exact class.
"""


class ShapeError(RuntimeError, ValueError):
    """A tensor has a wrong number of dimensions, shape or memory layout, or its sizes do not fit the other tensors."""


class DtypeError(RuntimeError, TypeError):
    """A tensor has a wrong dtype, or is of a kind (sparse, quantized, …) that the op cannot read."""

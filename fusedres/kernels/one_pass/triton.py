"""One-pass statistics and gradients on a GPU: torch's own matrix products, as in reference.py.

Only the state is small work; one_pass_backward stands beside the library's convolutions. The tail that is one kernel of
its own is in kernels/one_pass_tail.
"""

from __future__ import annotations

from fusedres.kernels.one_pass.reference import one_pass_backward, one_pass_statistics

__all__ = ["one_pass_backward", "one_pass_statistics"]

"""The bytes that residual blocks move: in closed form, by the launches of kernels, and by the operators that run."""

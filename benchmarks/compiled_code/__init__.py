"""Triton kernels as they are compiled: their candidate configs, the machine code, and the checks of it."""

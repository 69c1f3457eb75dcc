"""Measures on this device what is fastest, for "auto" to follow: `python -m fusedres tune`."""

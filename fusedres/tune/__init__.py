"""`python -m fusedres tune` measures what is fastest on this device; "auto" then follows the result."""

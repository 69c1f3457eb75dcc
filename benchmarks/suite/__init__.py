"""The steps of gpu_suite.py: modules with `cases(settings)` that write rows to a journal; and what they share."""

"""The steps of gpu_suite.py: each a module with `cases(settings)`, whose rows go to a journal."""

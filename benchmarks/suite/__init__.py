"""The steps of gpu_suite.py, and what bench_block.py and bench_model.py share with them.

A step is a module with `cases(settings)` that writes rows to a journal.
"""

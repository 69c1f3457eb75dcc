"""The tables and plots that report.py makes from the rows of results."""

"""Measure finished runs: the parts of `python -m composer_sassha inspect`."""

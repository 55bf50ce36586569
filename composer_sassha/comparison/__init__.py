"""The parts of `python -m composer_sassha compare`: the grid of runs, their training, and the report."""

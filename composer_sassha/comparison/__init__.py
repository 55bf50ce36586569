"""What `python -m composer_sassha compare` is made of: the grid of runs, their training, and the report."""

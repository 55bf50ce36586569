"""The parts of `python -m composer_sassha inspect`, which measures finished runs."""

"""Short scripts that show one use of the package each; run with `python -m composer_sassha.examples.NAME`."""

"""What `python -m composer_sassha bench` does.

recipes     which methods, from which recipe, on what data
steps       one step of a given kind in a Trainer, timed
floor       the same passes with nothing around them, in a Trainer and without one
speed       contestants take turns; ratios with their spread
memory      peak memory of the kinds of steps
update      the update rule alone, against AdamW
device      kernels and synchronizations of a step, on a GPU
report      the table, the file and the chart
plan        the prediction for several ranks
"""

"""The parts of `python -m composer_sassha bench`.

selection       the methods of a recipe, and their data
steps           one step of a given kind in a Trainer, timed
floor           the same passes with nothing around them, in a Trainer and without one
speed           contestants take turns; ratios, and confidence intervals of their medians
memory          peak memory of the kinds of steps
update          the update rule alone, against AdamW
device          kernels and synchronizations of a step, on a GPU
measurement     all of these for every method
report          the table, bench.json and the chart

link            the time of an all-reduce
collectives     what a step sends to other ranks
plan_timing     steps on one process
prediction      the equations for several ranks
plan            the prediction for every method
"""

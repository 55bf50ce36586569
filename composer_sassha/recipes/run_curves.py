"""Draw the curves of a run."""

from pathlib import Path

from composer_sassha.recipes.metrics import number
from composer_sassha.recipes.run_log import TRAIN_LOSS, RunLog

# Blue and orange of Okabe and Ito's palette, and different line styles, for every kind of colour vision.
_TRAINING = {"color": "#0072B2", "linewidth": 0.8}
_HELDOUT = {"color": "#D55E00", "markersize": 3}


def draw_curves(log: RunLog, path: Path, steps_per_epoch: int) -> None:
    """Draw the losses and the first of the held-out metrics over the epochs."""
    from matplotlib.figure import Figure  # optional: it comes with an extra

    train = [(r["batch"], number(r[TRAIN_LOSS])) for r in log.records if TRAIN_LOSS in r]
    first, loss = log.metrics[0], log.metrics[-1]
    evaluations = log.heldout()
    epochs = [batch / steps_per_epoch for batch, _ in evaluations]
    measured = {m: [m.scale * number(values[m.name]) for _, values in evaluations] for m in (first, loss)}
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        [batch / steps_per_epoch for batch, _ in train], [y for _, y in train], label="training", **_TRAINING
    )
    left.plot(epochs, measured[loss], "o--", label=log.heldout_label, **_HELDOUT)
    left.set(xlabel="epoch", ylabel="loss", yscale="log", title="Loss")
    left.legend()
    right.plot(epochs, measured[first], "o--", **_HELDOUT)
    title = f"{first.name.capitalize()} on the {log.heldout_label} data"
    right.set(xlabel="epoch", ylabel=first.label, title=title)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)

"""The callbacks a recipe can name, each with the arguments of its constructor."""

from composer_sassha.recipes.schema import arguments_of
from composer_sassha.sharpness import SharpnessMonitor

CALLBACKS: dict[str, type] = {
    "sharpness_monitor": arguments_of(SharpnessMonitor, without=["dataloader"]),  # on the held-out data
}

"""Where along a line or in a plane the loss is measured, and drawn."""

import numpy as np

from composer_sassha.inspection.options import Options

EXTENT = 1.0  # of lines and planes along filter-normalized directions, to each side
EIGEN_EXTENT = 0.5  # along eigenvectors, which have length 1


def line_points(options: Options) -> list[float]:
    """Return where the lines are measured, from -1 to 1, in units of each line's extent.

    Args:
        options: give the number of points.
    """
    return np.linspace(-1.0, 1.0, options.points).tolist()

"""The options of `inspect`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The options of a measurement. Runs can be compared if these are the same.

    Args:
        split: `heldout`, or `train`, with the training's augmentations.
        samples: number of samples drawn from it at random, the same for all runs; all if there are fewer.
        batch_size: samples in one pass; more take more memory.
        rho: radius of SAM's sharpness, m-sharpness and the average.
        asam_rho: radius of adaptive sharpness.
        trace_samples: number of random vectors for the trace.
        steps: Lanczos steps for each of the spectrum's probes.
        probes: number of random vectors for the spectrum.
        points: number of points on each line; half of it along each side of a plane.
    """

    split: str = "heldout"
    samples: int = 1024
    batch_size: int = 256
    rho: float = 0.05
    asam_rho: float = 0.5
    trace_samples: int = 32
    steps: int = 80
    probes: int = 2
    points: int = 41

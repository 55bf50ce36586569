"""The options of `inspect`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How to measure. Two runs can be compared if these are the same.

    Args:
        split: `heldout`, or `train`, with the training's augmentations.
        samples: drawn from it at random, the same for all runs; all of them if there are fewer.
        batch_size: samples in one pass: more take more memory.
        rho: radius of SAM's sharpness, m-sharpness and the average.
        asam_rho: radius of adaptive sharpness.
        trace_samples: random vectors for the trace.
        steps: of Lanczos for each of the spectrum's probes.
        probes: random vectors for the spectrum.
        points: on each line; of a plane, half as many along each side.
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

"""Composer callbacks, and the batches that they measure on."""

from composer_sassha.callbacks.sharpness_monitor import SharpnessMonitor

__all__ = ["SharpnessMonitor"]

"""Composer callbacks."""

from composer_sassha.callbacks.sharpness_monitor import SharpnessMonitor

__all__ = ["SharpnessMonitor"]

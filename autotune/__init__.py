"""Finds the fastest DeepSpeed setting that fits the devices at hand, then trains with it."""

__version__ = "0.1.0"

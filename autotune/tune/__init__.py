"""Chooses what to probe next, and when enough is known."""

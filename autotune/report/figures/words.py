"""What figures share: how outcomes are written, and how much of a run is drawn and listed."""

from autotune.outcome import Measured, Outcome, OutOfMemory
from autotune.report.record import RunRecord

MOST_BARS, MOST_PANELS, MOST_ROWS, MOST_POINTS = 24, 12, 200, 300
"""What is drawn and listed at most, so that any run's page stays small; the rest is counted."""


def speed(outcome: Outcome) -> float:
    """Return tokens a second, 0 of what was not measured."""
    return outcome.tokens_per_s if isinstance(outcome, Measured) else 0.0


def kind(outcome: Outcome) -> str:
    """Return how it ended, in two or three words."""
    if isinstance(outcome, OutOfMemory):
        return f"out of {outcome.where} memory"
    return outcome.kind.replace("_", " ")


def left_out(count: int, most: int = MOST_ROWS) -> str:
    """Say how many rows a table leaves out; empty if it has all."""
    return f"{count - most} more are in the files of the run directory." if count > most else ""


def what_a_peak_lacks(record: RunRecord) -> str:
    """Say what an estimate has and a measured peak has not; empty where both have the same."""
    if record.plan.get("cluster", {}).get("kind") == "cpu":
        return ""
    return " Estimates have the device's context and communicators in them (runtime), peaks do not."

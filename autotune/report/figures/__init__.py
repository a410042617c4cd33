"""The figures of a report, each from what a run directory says."""

from autotune.report.drawing import Figure
from autotune.report.figures.accuracy import accuracy
from autotune.report.figures.lengths import lengths
from autotune.report.figures.memory import memory
from autotune.report.figures.rejected import rejected
from autotune.report.figures.search import search
from autotune.report.figures.throughput import throughput
from autotune.report.figures.training import training
from autotune.report.record import RunRecord

_FIGURES = (memory, throughput, search, accuracy, lengths, rejected, training)


def figures(record: RunRecord) -> list[Figure]:
    """Return all figures that there is something to show for."""
    made = (make(record) for make in _FIGURES)
    return [figure for figure in made if figure is not None]

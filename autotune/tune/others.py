"""What the loop wants of a study that other jobs share; alone there are none."""

from dataclasses import dataclass
from typing import Protocol

from autotune.outcome import Rung
from autotune.setting import Structure


@dataclass(frozen=True, slots=True)
class Seen:
    """A look at the other jobs.

    Attributes:
        news: outcomes of theirs that were not seen before.
        at_work: structures that they probe.
    """

    news: tuple[Rung, ...] = ()
    at_work: frozenset[Structure] = frozenset()


class Others(Protocol):
    """Other jobs that tune the same on devices alike; each setting is measured by one of them.

    Attributes:
        are_there: whether there may be any. What one has measured is not measured again then,
            neither to verify it nor to tell it from another.
    """

    are_there: bool

    def look(self) -> Seen: ...

    def claim(self, structure: Structure) -> bool:
        """Have this job probe a structure, and no other; False if another was first."""
        ...

    def tell(self, rung: Rung) -> None:
        """Tell them of an outcome of the structure that was claimed."""
        ...

    def release(self) -> None:
        """Give up the claim; what was told stays."""
        ...

    def finish(self) -> None:
        """See to it that they know all that they were told."""
        ...


class Nobody:
    """The others of a job that is alone."""

    are_there = False

    def look(self) -> Seen:
        return Seen()

    def claim(self, structure: Structure) -> bool:  # noqa: ARG002 - as of Others
        return True

    def tell(self, rung: Rung) -> None:  # noqa: ARG002 - as of Others
        return

    def release(self) -> None:
        return

    def finish(self) -> None:
        return

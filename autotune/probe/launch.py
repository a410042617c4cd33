"""Starts the ranks of a probe on this machine: forked from the warm server, or cold."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autotune import processes
from autotune.probe.protocol import ProbeRequest
from autotune.probe.worker import answer_path, run_rank
from autotune.rundir import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What a launcher is sent on.

    Attributes:
        directory: empty, of this probe alone; ranks meet and answer there.
        logs: a file for each rank.
    """

    request: ProbeRequest
    directory: Path
    logs: tuple[Path, ...]

    @property
    def answers(self) -> tuple[Path, ...]:
        """Return the file that each rank answers with."""
        return tuple(answer_path(self.directory, rank) for rank in range(self.request.ranks))


class Ranks(Protocol):
    """The started ranks of a probe, followed through their answers and by their ends."""

    def wait(self, timeout_s: float) -> None:
        """Wait until one more of them ends, or for `timeout_s`."""
        ...

    def exit_codes(self) -> tuple[int | None, ...]:
        """Return an exit code a rank, negative for a signal, None where there is none yet."""
        ...

    def end(self) -> None:
        """End them and all that they started; none lives when this returns."""
        ...


class Launcher(Protocol):
    """A way to start ranks."""

    def start(self, errand: Errand) -> Ranks: ...


class WarmLauncher:
    """Forks the ranks from the server that has imported everything."""

    def start(self, errand: Errand) -> Ranks:
        ranks = [
            processes.start(
                run_rank,
                errand.request,
                rank,
                str(errand.directory / "store"),
                str(errand.answers[rank]),
                log=errand.logs[rank],
                environment=_variables(rank, errand.request.ranks),
            )
            for rank in range(errand.request.ranks)
        ]
        return _LocalRanks(ranks)


class ColdLauncher:
    """Starts an interpreter a rank, which imports everything itself."""

    def start(self, errand: Errand) -> Ranks:
        write_request(errand)
        command = [sys.executable, "-m", "autotune.probe.rank", str(errand.directory)]
        ranks = [
            processes.ColdProcess(
                command,
                log=errand.logs[rank],
                environment=_variables(rank, errand.request.ranks),
            )
            for rank in range(errand.request.ranks)
        ]
        return _LocalRanks(ranks)


def write_request(errand: Errand) -> None:
    """Leave the request where a cold rank looks for it, whole or not at all."""
    write_json(errand.directory / "request.json", errand.request.to_json())


class _LocalRanks:
    def __init__(self, ranks: Sequence[processes.Process]) -> None:
        self._ranks = ranks

    def wait(self, timeout_s: float) -> None:
        processes.wait_for_any([rank for rank in self._ranks if rank.exitcode is None], timeout_s)

    def exit_codes(self) -> tuple[int | None, ...]:
        return tuple(rank.exitcode for rank in self._ranks)

    def end(self) -> None:
        processes.end(self._ranks)


def _variables(rank: int, ranks: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        # The ranks meet through a file; DeepSpeed only asks whether these are set.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }

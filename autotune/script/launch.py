"""Starts a script's ranks as torchrun does, for a probe, and leaves none of what they start."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from autotune import processes
from autotune.engine.ops import remove_stale_locks
from autotune.environment import rank_environment
from autotune.hardware import Cluster
from autotune.outcome import Crashed, Unknown
from autotune.probe.deadlines import Deadline, Deadlines
from autotune.probe.launch import Errand, Ranks
from autotune.probe.local import LocalProber
from autotune.probe.protocol import PHASES, ProbeRequest, RungFailure, RungMeasurement
from autotune.rundir import write_json
from autotune.script.errand import ERRAND, ScriptErrand, shimmed

_log = logging.getLogger(__name__)

_NOT_OURS = ("HF_HUB_OFFLINE", "TORCHELASTIC_SIGNALS_TO_HANDLE")
"""Variables of ranks whose model and data are here, and that we have written."""

_SILENCE_S = 180.0

SCRIPT_DEADLINES = Deadlines(
    phases={
        # It may download a model and tokenise a dataset; a hang does no work meanwhile.
        PHASES[0]: Deadline(silence_s=_SILENCE_S, total_s=7200.0),
        PHASES[2]: Deadline(silence_s=_SILENCE_S, total_s=3600.0),
    },
    first_rung=Deadline(silence_s=_SILENCE_S, total_s=3600.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A user's training code.

    Attributes:
        path: of the file.
        directory: that it is started in.
        arguments: of its command.
    """

    path: Path
    directory: Path
    arguments: tuple[str, ...]

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, str(self.path), *arguments]


def script_environment(cluster: Cluster) -> dict[str, str]:
    """Return the variables that ranks of a script have in probes and in its training.

    What the user has set stays as it is.
    """
    ours = rank_environment(cluster.kind, cluster.visible_devices)
    threads = {"OMP_NUM_THREADS": str(cluster.threads_per_rank)}
    theirs = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM"}
    return {
        name: value
        for name, value in {**ours, **threads}.items()
        if name not in _NOT_OURS and not (name in theirs and name in os.environ)
    }


class ScriptLauncher:
    """Starts a process a rank, with what torchrun would tell it.

    Args:
        arguments: makes the script's arguments of a request.
        facts: where the script is to be described; None asks for no description.
    """

    def __init__(
        self,
        script: Script,
        cluster: Cluster,
        arguments: Callable[[ProbeRequest], Sequence[str]],
        facts: Path | None = None,
    ) -> None:
        self._script = script
        self._cluster = cluster
        self._arguments = arguments
        self._facts = facts

    def start(self, errand: Errand) -> Ranks:
        request = errand.request
        path = errand.directory / "errand.json"
        told = ScriptErrand(
            device_kind=self._cluster.kind,
            overrides=request.ds_config,
            answers=str(errand.directory),
            facts=None if self._facts is None else str(self._facts),
            micro_batch_size=request.rungs[0].micro_batch_size,
            device_memory_bytes=self._cluster.device_memory_bytes,
        )
        write_json(path, told.to_json())
        command = self._script.command(self._arguments(request))
        environment = script_environment(self._cluster)
        remove_stale_locks(environment)
        common = {
            **environment,
            **shimmed(os.environ, path),
            **_meeting_place(request.ranks),
            "TMPDIR": str(processes.temporary_dir()),
        }
        ranks = [
            processes.ColdProcess(
                command,
                log=errand.logs[rank],
                environment={**common, **_place(rank)},
                directory=self._script.directory,
                as_user=True,
            )
            for rank in range(request.ranks)
        ]
        return _ScriptRanks(ranks, f"{ERRAND}={path}")


class _ScriptRanks:
    def __init__(self, ranks: Sequence[processes.ColdProcess], mark: str) -> None:
        self._ranks = ranks
        self._mark = mark.encode()
        self._guard = _guard([rank.pid for rank in ranks])

    def wait(self, timeout_s: float) -> None:
        processes.wait_for_any([rank for rank in self._ranks if rank.exitcode is None], timeout_s)

    def exit_codes(self) -> tuple[int | None, ...]:
        return tuple(rank.exitcode for rank in self._ranks)

    def end(self) -> None:
        processes.end(self._ranks)
        # What has left its rank's session still has the environment that it was started with.
        while left := _marked(self._mark):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._guard.kill()
        self._guard.wait()


def _guard(leaders: Sequence[int]) -> "subprocess.Popen[bytes]":
    """Have ranks killed if this process is: the pipe is then closed, by the kernel."""
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; for g in "$@"; do kill -9 "-$g"; done', "sh"]
        + [str(leader) for leader in leaders],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _marked(mark: bytes) -> list[int]:
    """Return the live processes with this variable in the environment that they began with."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            is_dead = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            if is_dead != "Z" and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _place(rank: int) -> dict[str, str]:
    return {name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")}


def _meeting_place(ranks: int) -> Mapping[str, str]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {name: str(ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")}
    return {**sizes, "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


class ScriptProber:
    """Has a script started anew for every rung: how its batches are made is its own affair.

    Args:
        prober: has a request of one rung measured.
    """

    def __init__(self, prober: LocalProber) -> None:
        self._prober = prober

    def probe(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        assert len(request.rungs) == 1, "a process tries one micro-batch size"
        started = time.monotonic()
        with closing(self._prober.probe(request)) as answers:
            for answer in answers:
                told = answer if isinstance(answer, RungMeasurement) else in_words(answer)
                # A start is taken for this rung alone.
                yield replace(told, seconds=time.monotonic() - started)


def in_words(failure: RungFailure) -> RungFailure:
    """Say what it means where a script went in good order but left nothing measured."""
    outcome = failure.outcome
    if not isinstance(outcome, Unknown) or outcome.exit_code != 0:
        return failure
    what = (
        "ended and never called deepspeed.initialize, which is what is tuned"
        if failure.phase == PHASES[0]
        else "ended before anything was measured"
    )
    return replace(failure, outcome=Crashed(reason=f"the script {what}", evidence=outcome.evidence))

"""Probes on this machine: a process a rank, followed from outside until the last is gone."""

import tempfile
import time
from collections.abc import Generator, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from autotune import processes
from autotune.detect.host import kernel_memory_kills
from autotune.probe.classify import Death, Evidence, classify
from autotune.probe.protocol import (
    PHASES,
    ProbeRequest,
    RungFailure,
    RungMeasurement,
    rung_phase,
    worst_of,
)
from autotune.probe.worker import answer_events, run_rank

_POLL_S = 0.05
_IDLE_LIMIT_S = 900.0
_OTHERS_GRACE_S = 1.0
_TAIL_BYTES = 2000


class LocalProber:
    """Starts each probe's ranks from the warm server and reads what they answer."""

    def __init__(self, log_dir: Path, *, idle_limit_s: float = _IDLE_LIMIT_S) -> None:
        self._log_dir = log_dir
        self._idle_limit_s = idle_limit_s

    def probe(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        logs = self._new_log_dir(request.label)
        with tempfile.TemporaryDirectory(prefix="autotune-probe-") as scratch:
            running = _RunningProbe(request, Path(scratch), logs)
            try:
                yield from running.follow(self._idle_limit_s)
            finally:
                running.end()

    def _new_log_dir(self, label: str) -> Path:
        number = 1 + sum(1 for _ in self._log_dir.iterdir()) if self._log_dir.exists() else 1
        logs = self._log_dir / f"{number:03d}-{label}"
        logs.mkdir(mode=0o700, parents=True)
        return logs


class _RunningProbe:
    """The ranks of a probe and how far each has come."""

    def __init__(self, request: ProbeRequest, scratch: Path, logs: Path) -> None:
        self._request = request
        self._logs = [logs / f"rank-{rank}.log" for rank in range(request.ranks)]
        self._answers = [scratch / f"rank-{rank}.jsonl" for rank in range(request.ranks)]
        self._offsets = [0] * request.ranks
        self._known_phases = [*PHASES, *(rung_phase(rung) for rung in request.rungs)]
        self._phases = [self._known_phases[0]] * request.ranks
        self._measured: list[list[RungMeasurement]] = [[] for _ in range(request.ranks)]
        self._done = [False] * request.ranks
        self._deaths: list[Death] = []
        self._kills_before = kernel_memory_kills()
        self._ranks = [self._start_rank(rank, scratch) for rank in range(request.ranks)]

    def _start_rank(self, rank: int, scratch: Path) -> ForkServerProcess:
        return processes.start(
            run_rank,
            self._request,
            rank,
            str(scratch / "store"),
            str(self._answers[rank]),
            log=self._logs[rank],
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self._request.ranks),
                "LOCAL_WORLD_SIZE": str(self._request.ranks),
                # The ranks meet through a file; DeepSpeed only asks whether these are set.
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",
            },
        )

    def follow(self, idle_limit_s: float) -> Iterator[RungMeasurement | RungFailure]:
        started = last_sign = time.monotonic()
        yielded = 0
        while True:
            processes.wait_for_any(self._unfinished(), _POLL_S)
            # Looked at before the answers are read: what a rank wrote before it ended is then seen.
            ended = [rank.exitcode is not None for rank in self._ranks]
            if self._read():
                last_sign = time.monotonic()
            while yielded < min(map(len, self._measured)):
                yield worst_of([rank[yielded] for rank in self._measured])
                yielded += 1
                started = last_sign = time.monotonic()
            # With every rung measured there is nothing left to learn, however the ranks go.
            if all(self._done) or yielded == len(self._request.rungs):
                return
            idle = time.monotonic() - last_sign
            if self._lost_a_rank(ended) or idle > idle_limit_s:
                yield self._failure(yielded, idle, idle > idle_limit_s, last_sign - started)
                return

    def end(self) -> None:
        processes.end(self._ranks)

    def _unfinished(self) -> list[ForkServerProcess]:
        return [rank for rank in self._ranks if rank.exitcode is None]

    def _lost_a_rank(self, ended: list[bool]) -> bool:
        return bool(self._deaths) or any(
            gone and not done for gone, done in zip(ended, self._done, strict=True)
        )

    def _read(self) -> bool:
        """Take in what the ranks wrote; returns whether there was anything."""
        anything = False
        for rank, path in enumerate(self._answers):
            events, self._offsets[rank] = answer_events(path, self._offsets[rank])
            for event in events:
                try:
                    self._take(rank, event)
                except (KeyError, TypeError, ValueError) as error:
                    message = f"a line of the answer file is garbage: {error}"
                    self._deaths.append(Death(rank=rank, exception="garbage", message=message))
            anything = anything or bool(events)
        return anything

    def _take(self, rank: int, event: dict[str, object]) -> None:
        match event:
            case {"event": "phase", "phase": str(phase)} if phase in self._known_phases:
                self._phases[rank] = phase
            case {"event": "rung", **fields}:
                self._measured[rank].append(RungMeasurement.from_json(fields))
            case {"event": "death", "exception": str(exception), "message": str(message)}:
                self._deaths.append(Death(rank=rank, exception=exception, message=message))
            case {"event": "done"}:
                self._done[rank] = True
            case _:
                raise ValueError(event)

    def _failure(self, place: int, idle_s: float, timed_out: bool, seconds: float) -> RungFailure:  # noqa: FBT001
        # The rank whose exception is the cause may write it after another has fallen with it.
        time.sleep(_OTHERS_GRACE_S)
        self._read()
        exit_codes = tuple(rank.exitcode for rank in self._ranks)
        self.end()
        evidence = Evidence(
            device_kind=self._request.spec.device_kind,
            deaths=tuple(self._deaths),
            exit_codes=exit_codes,
            phase=min(self._phases, key=self._known_phases.index),
            idle_s=idle_s,
            timed_out=timed_out,
            kernel_kills=kernel_memory_kills() - self._kills_before,
            log_tail=self._tail(exit_codes),
        )
        rungs = self._request.rungs
        return RungFailure(
            micro_batch_size=rungs[min(place, len(rungs) - 1)].micro_batch_size,
            outcome=classify(evidence),
            seconds=seconds,
        )

    def _tail(self, exit_codes: tuple[int | None, ...]) -> str:
        """Return the end of the log of the rank to blame: the first that died."""
        blamed = self._deaths[0].rank if self._deaths else 0
        if not self._deaths:
            blamed = next((rank for rank, code in enumerate(exit_codes) if code), 0)
        log = self._logs[blamed]
        return log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace") if log.exists() else ""

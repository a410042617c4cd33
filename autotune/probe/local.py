"""Runs probes: a launcher starts the ranks, which are followed from outside to their end."""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path

from autotune.detect.host import kernel_memory_kills
from autotune.detect.monitor import GpuMonitor
from autotune.errors import CannotWriteError, NoUsableDeviceError
from autotune.outcome import Crashed, Invalid, OutOfMemory
from autotune.probe.classify import Death, Evidence, classify
from autotune.probe.deadlines import Deadline, Deadlines
from autotune.probe.launch import ColdLauncher, Errand, Launcher, WarmLauncher
from autotune.probe.protocol import (
    PHASES,
    ProbeRequest,
    RungFailure,
    RungMeasurement,
    rung_phase,
    worst_of,
)
from autotune.probe.tenants import DeviceMemory
from autotune.probe.worker import answer_events
from autotune.processes import temporary_dir
from autotune.rundir import writing

_log = logging.getLogger(__name__)

_POLL_S = 0.05
_OTHERS_GRACE_S = 1.0
_TAIL_BYTES = 2000
_WORKING_SHARE = 0.05
_FAULTS_BEFORE_GIVING_UP = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class LocalProber:
    """Has each probe's ranks started and reads what they answer.

    Ranks are forked from the warm server. Where the first of them cannot use its device after the
    fork, this probe and all later ones start cold. A given `launcher` is kept to. What GPUs do
    meanwhile the `monitor` tells: where one goes wrong the probe is invalid.
    `watch` is told of each phase that all ranks of a probe have reached.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        deadlines: Deadlines | None = None,
        launcher: Launcher | None = None,
        memory: DeviceMemory | None = None,
        monitor: GpuMonitor | None = None,
        scratch_dir: Path | None = None,
        watch: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._log_dir = log_dir
        self._deadlines = deadlines or Deadlines()
        self._launcher = launcher or WarmLauncher()
        self._fallback = None if launcher else ColdLauncher()
        self._memory = memory
        self._monitor = monitor
        self._faults: list[str] = []
        self._scratch_dir = scratch_dir
        self._watch = watch

    def probe(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        """Yield each rung as it is measured; a failure, if there is one, comes last.

        Raises:
            CannotWriteError: there is no room for logs or answers.
            NoUsableDeviceError: a GPU went wrong for the second time.
        """
        self._refuse_faulty_gpus()
        for answer in self._attempt(request):
            if isinstance(answer, RungFailure) and self._is_faulty_start(request, answer):
                break
            yield answer
        else:
            return
        _log.warning(
            "a forked rank cannot use its device (%s); this and later probes start cold",
            answer.outcome.reason if isinstance(answer.outcome, Crashed) else answer.outcome.kind,
        )
        assert self._fallback is not None, "what is faulty is a warm start"
        self._launcher, self._fallback = self._fallback, None
        yield from self._attempt(request)

    def _is_faulty_start(self, request: ProbeRequest, failure: RungFailure) -> bool:
        if self._fallback is None or failure.phase != PHASES[0]:
            return False
        first = request.rungs[0].micro_batch_size
        return failure.micro_batch_size == first and not isinstance(
            failure.outcome, OutOfMemory | Invalid
        )

    def _attempt(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        if self._memory is not None:
            self._memory.wait_for_baseline()
        logs = self._new_logs(request)
        scratch_dir = self._scratch_dir or temporary_dir()
        with tempfile.TemporaryDirectory(prefix="probe-", dir=scratch_dir) as scratch:
            errand = Errand(request=request, directory=Path(scratch), logs=logs)
            if self._monitor is not None:
                self._monitor.begin()
            running = _RunningProbe(errand, self._launcher, self._monitor)
            try:
                for answer in running.follow(self._deadlines, self._watch):
                    if (fault := self._fault_instead(answer)) is not None:
                        yield fault
                        return
                    yield answer
            finally:
                running.end()
                self._say_slowed()

    def _fault_instead(self, answer: RungMeasurement | RungFailure) -> RungFailure | None:
        """Return what the rung ended in if a GPU has gone wrong meanwhile; None if none has."""
        faults = self._monitor.new_faults() if self._monitor is not None else ()
        if not faults:
            return None
        self._faults.append("; ".join(faults))
        _log.warning("%s: the probe says nothing of its setting", self._faults[-1])
        return RungFailure(
            micro_batch_size=answer.micro_batch_size,
            outcome=Invalid(evidence=self._faults[-1]),
            seconds=answer.seconds,
        )

    def _refuse_faulty_gpus(self) -> None:
        """Refuse to go on where GPUs have gone wrong again.

        Raises:
            NoUsableDeviceError: with what went wrong last.
        """
        if len(self._faults) < _FAULTS_BEFORE_GIVING_UP:
            return
        msg = (
            f"{self._faults[-1]}, for the second time in this run: leave the GPU out with"
            " --devices, or have it looked after (nvidia-smi -q, dmesg); what is done is saved"
        )
        raise NoUsableDeviceError(msg)

    def _say_slowed(self) -> None:
        """Say which GPUs were held back: their times may be too long."""
        for name, why in (self._monitor.slowed() if self._monitor is not None else {}).items():
            _log.warning("GPU %s: %s; its times may be too long", name, " and ".join(why))

    def _new_logs(self, request: ProbeRequest) -> tuple[Path, ...]:
        with writing(self._log_dir):
            self._log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            number = 1 + sum(1 for _ in self._log_dir.iterdir())
            directory = self._log_dir / f"{number:03d}-{request.label}"
            directory.mkdir(mode=0o700)
            logs = tuple(directory / f"rank-{rank}.log" for rank in range(request.ranks))
            for log in logs:
                log.touch(mode=0o600)
        return logs


class _RunningProbe:
    """The ranks of a probe and how far each has come."""

    def __init__(
        self, errand: Errand, launcher: Launcher, monitor: GpuMonitor | None = None
    ) -> None:
        request = errand.request
        self._monitor = monitor
        self._request = request
        self._logs = errand.logs
        self._answers = errand.answers
        self._offsets = [0] * request.ranks
        self._known_phases = [*PHASES, *(rung_phase(rung) for rung in request.rungs)]
        self._phases = [self._known_phases[0]] * request.ranks
        self._work_s = [0.0] * request.ranks
        self._measured: list[list[RungMeasurement]] = [[] for _ in range(request.ranks)]
        self._done = [False] * request.ranks
        self._deaths: list[Death] = []
        self._kills_before = kernel_memory_kills()
        self._ranks = launcher.start(errand)

    def follow(
        self, deadlines: Deadlines, watch: Callable[[str], None]
    ) -> Iterator[RungMeasurement | RungFailure]:
        started = last_sign = entered = time.monotonic()
        phase = self._phase()
        merged: list[RungMeasurement] = []
        while True:
            self._ranks.wait(_POLL_S)
            if self._monitor is not None:
                self._monitor.sample()
            # Looked at before the answers are read: what a rank wrote before it ended is then seen.
            exit_codes = self._ranks.exit_codes()
            if self._read():
                last_sign = time.monotonic()
            while len(merged) < min(map(len, self._measured)) and not self._deaths:
                if (rung := self._merge(len(merged))) is None:
                    break
                merged.append(rung)
                yield rung
                started = last_sign = time.monotonic()
            # With every rung measured there is nothing left to learn, however the ranks go.
            if all(self._done) or len(merged) == len(self._request.rungs):
                return
            now = time.monotonic()
            if self._phase() != phase:
                phase, entered = self._phase(), now
                watch(phase)
            place = len(merged)
            deadline = deadlines.of(
                phase, self._request.rungs[place], merged[-1] if merged else None
            )
            late_s = _late(deadline, now - last_sign, now - entered)
            if self._lost_a_rank(exit_codes) or late_s is not None:
                yield self._failure(place, late_s, last_sign - started)
                return

    def end(self) -> None:
        self._ranks.end()

    def _phase(self) -> str:
        """Return the last phase that all ranks have reached."""
        return min(self._phases, key=self._known_phases.index)

    def _lost_a_rank(self, exit_codes: tuple[int | None, ...]) -> bool:
        return bool(self._deaths) or any(
            code is not None and not done for code, done in zip(exit_codes, self._done, strict=True)
        )

    def _read(self) -> bool:
        """Take in what the ranks wrote; returns whether it tells of work."""
        work = False
        for rank, path in enumerate(self._answers):
            events, self._offsets[rank] = answer_events(path, self._offsets[rank])
            for event in events:
                try:
                    work = self._take(rank, event) or work
                except (KeyError, TypeError, ValueError) as error:
                    self._call_garbage(rank, error)
        return work

    def _take(self, rank: int, event: dict[str, object]) -> bool:
        """Take in one event; returns whether it tells of work."""
        match event:
            case {"event": "beat", "work_s": float(work_s), "every_s": float(every_s)}:
                gained, self._work_s[rank] = work_s - self._work_s[rank], work_s
                return gained >= _WORKING_SHARE * every_s
            case {"event": "phase", "phase": str(phase)} if phase in self._known_phases:
                self._phases[rank] = phase
            case {"event": "rung", **fields}:
                self._measured[rank].append(RungMeasurement.from_json(fields))
            case {"event": "death", "exception": str(exception), "message": str(message)}:
                _refuse_full_disk(event.get("errno"), self._logs[rank])
                within = str(event.get("raised_in", ""))
                self._deaths.append(
                    Death(rank=rank, exception=exception, message=message, raised_in=within)
                )
            case {"event": "done"}:
                self._done[rank] = True
            case _:
                raise ValueError(event)
        return True

    def _merge(self, place: int) -> RungMeasurement | None:
        """Merge what the ranks saw of a rung; ranks that saw unlike things tell garbage."""
        seen = [rank[place] for rank in self._measured]
        expected = self._request.rungs[place].micro_batch_size
        try:
            if any(measured.micro_batch_size != expected for measured in seen):
                msg = f"a rung that is not {expected}"
                raise ValueError(msg)  # noqa: TRY301 - the same answer as to other garbage
            worst = worst_of(seen)
        except ValueError as error:
            self._call_garbage(0, error)
            return None
        if self._monitor is None:
            return worst
        return replace(worst, device_used_bytes=self._monitor.take_peak())

    def _call_garbage(self, rank: int, error: Exception) -> None:
        message = f"a line of the answer file is garbage: {error}"
        self._deaths.append(Death(rank=rank, exception="garbage", message=message))

    def _failure(self, place: int, late_s: float | None, seconds: float) -> RungFailure:
        # The rank whose exception is the cause may write it after another has fallen with it.
        time.sleep(_OTHERS_GRACE_S)
        self._read()
        exit_codes = self._ranks.exit_codes()
        self.end()
        phase = self._phase()
        evidence = Evidence(
            device_kind=self._request.spec.device_kind,
            deaths=tuple(self._deaths),
            exit_codes=exit_codes,
            phase=phase,
            idle_s=late_s or 0.0,
            timed_out=late_s is not None,
            kernel_kills=kernel_memory_kills() - self._kills_before,
            log_tail=self._tail(exit_codes),
        )
        return RungFailure(
            micro_batch_size=self._request.rungs[place].micro_batch_size,
            outcome=classify(evidence),
            seconds=seconds,
            phase=phase,
        )

    def _tail(self, exit_codes: tuple[int | None, ...]) -> str:
        """Return the end of the log of the rank to blame: the first that died."""
        blamed = self._deaths[0].rank if self._deaths else 0
        if not self._deaths:
            blamed = next((rank for rank, code in enumerate(exit_codes) if code), 0)
        log = self._logs[blamed]
        return log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace") if log.exists() else ""


def _late(deadline: Deadline, silent_s: float, spent_s: float) -> float | None:
    """Return the seconds by which a phase was given up, None while it may go on."""
    if silent_s > deadline.silence_s:
        return silent_s
    return spent_s if spent_s > deadline.total_s else None


def _refuse_full_disk(number: object, log: Path) -> None:
    """Stop the run where a rank could not write; the next one could not either."""
    if number in _NO_ROOM:
        assert isinstance(number, int)
        msg = (
            f"cannot write {log} or the temporary directory: {os.strerror(number)}; "
            "make room and run the same command again"
        )
        raise CannotWriteError(msg)

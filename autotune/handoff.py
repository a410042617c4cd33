"""The hand-off: trains from the emitted files, holds the first steps against the probe, recovers.

What was emitted stays as it is. A fallback that is taken is written beside the checkpoints, so that
the same command goes on with it.
"""

import logging
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from autotune.detect.host import kernel_memory_kills
from autotune.emit import entry_arguments, torchrun_command, train_spec
from autotune.environment import rank_environment
from autotune.errors import CannotWriteError, InterruptedRunError, TrainingFailedError
from autotune.events import Tell, tell_progress
from autotune.hardware import Cluster
from autotune.intake import Workload
from autotune.nodes.control import Nodes
from autotune.nodes.work import SIGNALS, torchrun_of
from autotune.outcome import OutOfMemory
from autotune.probe.classify import Death, Evidence, classify
from autotune.recovery import MAX_REPEATS, Cause, disk_bytes, next_fallback, repeats_in_vain
from autotune.rundir import RunDir, read_json, write_json
from autotune.setting import Setting
from autotune.train.launch import Ended, OtherNodes, Training
from autotune.train.progress import CHECKPOINT
from autotune.units import format_bytes
from autotune.verify import Promise, Verdict, verdict

_log = logging.getLogger(__name__)

_CAUSES: dict[Cause, str] = {
    "out_of_memory": "it ran out of memory",
    "rank_lost": "a rank was lost",
    "launcher_lost": "torchrun was lost",
}


def require_trainable(workload: Workload, run_dir: RunDir, *, with_training: bool) -> None:
    """Refuse a training that could not begin, or not write its checkpoints, before it is tuned.

    Raises:
        ConfigError: transformers does not take the arguments that the user gives it.
        CannotWriteError: the disk has no room for the checkpoints and the model.
    """
    from autotune.profile.child import check_trainer_arguments

    job, cluster = workload.job, workload.question.cluster
    spec = train_spec(
        job,
        workload.plan.space.setting(0),
        cluster,
        dataset_dir=str(run_dir.dataset),
        output_dir=str(run_dir.training),
        model_output_dir=str(run_dir.model),
    )
    if job.trainer:
        check_trainer_arguments(spec.trainer, cluster.kind, run_dir.logs / "trainer.log")
    if not with_training:
        return
    needed = disk_bytes(job, workload.profile, spec.trainer.get("save_total_limit"))
    free = shutil.disk_usage(run_dir.root).free
    if needed > free:
        msg = (
            f"{run_dir.root} is on a disk with {format_bytes(free)} free, and checkpoints and the "
            f"final model will take {format_bytes(needed)}: make room, choose another --run-dir, "
            "or keep fewer with --trainer save_total_limit=1"
        )
        raise CannotWriteError(msg)


class Handoff:
    """One training of a tuned run, over as many starts as it takes."""

    def __init__(
        self,
        run_dir: RunDir,
        cluster: Cluster,
        *,
        strict: bool,
        progress: Callable[[dict[str, Any]], None],
        tell: Tell = lambda *_, **__: None,
        nodes: Nodes | None = None,
    ) -> None:
        self._nodes = nodes
        self._dir = run_dir
        self._cluster = cluster
        self._strict = strict
        self._progress = progress
        self._tell = tell
        self._saving = _Saving(run_dir.training, tell)
        emitted = read_json(run_dir.fallbacks) or {}
        self._ladder: list[dict[str, Any]] = emitted.get("settings", [])
        self._chosen: dict[str, Any] = emitted.get("chosen", {})
        path = self._recoveries_path
        self._recoveries: list[dict[str, Any]] = (read_json(path) or {}).get("recoveries", [])
        self._verified: dict[str, Any] | None = read_json(self._verified_path)

    @property
    def _recoveries_path(self) -> Path:
        return self._dir.training / "recoveries.json"

    @property
    def _verified_path(self) -> Path:
        return self._dir.training / "handoff.json"

    @property
    def _place(self) -> int | None:
        """The place in the ladder of the setting that is trained with, None for the chosen one."""
        place: int | None = self._recoveries[-1]["to"] if self._recoveries else None
        return place

    @property
    def _current(self) -> dict[str, Any]:
        return self._chosen if self._place is None else self._ladder[self._place]

    def train(self) -> dict[str, Any]:
        """Train to the end; returns what result.json says of it.

        Raises:
            InterruptedRunError: stopped from outside; a checkpoint is saved.
            TrainingFailedError: it ended badly and nothing is left to try, or the first steps do
                not hold what was promised and the hand-off is strict.
        """
        self._dir.training.mkdir(mode=0o700, exist_ok=True)
        started = time.monotonic()
        while True:
            kills = kernel_memory_kills()
            ended = self._start()
            if ended.stopped:
                msg = "a rank was asked to stop; its checkpoint is saved, the same command goes on"
                raise InterruptedRunError(msg)
            if ended.exit_code == 0:
                break
            if ended.lost_nodes:
                self._give_up_for_now(ended.lost_nodes)
            self._recover(ended, kernel_memory_kills() - kills)
        summary = read_json(self._dir.training / "summary.json")
        if summary is None:
            msg = f"the training wrote no summary; see {self._dir.logs / 'training.log'}"
            raise TrainingFailedError(msg)
        return {
            "training_seconds": time.monotonic() - started,
            "training": summary,
            "model_dir": str(self._dir.model),
            **self.report(),
        }

    def report(self) -> dict[str, Any]:
        """Return what is known of the hand-off so far: what was verified, what was recovered."""
        return {"handoff": self._verified, "recoveries": self._recoveries}

    def _start(self) -> Ended:
        training = self._training()
        lines: list[dict[str, Any]] = []
        watch = _Processors()

        def step(line: dict[str, Any]) -> None:
            self._progress(line)
            lines.append(line)
            self._verify(lines, watch)

        return training.run(step, self._saving.look)

    def _training(self) -> Training:
        log, cluster = self._dir.logs / "training.log", self._cluster
        command = [
            *torchrun_command(sys.executable, cluster.num_devices, self._files()),
            "--resume",
        ]
        environment = rank_environment(cluster.kind, cluster.visible_devices)
        others = None
        if cluster.num_nodes > 1:
            environment |= SIGNALS
            command, others = self._on_all_nodes(log)
        return Training(
            command,
            directory=self._dir.root,
            environment=environment,
            log=log,
            output_dir=self._dir.training,
            others=others,
        )

    def _on_all_nodes(self, log: Path) -> tuple[list[str], OtherNodes]:
        """Return what trains here together with the other nodes, and how these are sent to it."""
        nodes = self._nodes
        assert nodes is not None, "several nodes were detected by themselves"
        logs = tuple(log.with_stem(f"{log.stem}-node-{node}") for node in range(1, nodes.num_nodes))
        arguments = [*entry_arguments(self._files()), "--resume"]
        work = nodes.work(arguments, directory=self._dir.root, logs=[log, *logs])
        send = OtherNodes(logs, lambda: nodes.send(work, nodes.new_directory("training")))
        return torchrun_of(work, 0), send

    def _files(self) -> str:
        """Return where the files of the current setting are, below the run directory."""
        if self._place is None:
            return ""
        directory = self._dir.training / f"fallback-{self._place}"
        directory.mkdir(mode=0o700, exist_ok=True)
        entry = self._ladder[self._place]
        write_json(directory / "ds_config.json", entry["ds_config"])
        write_json(directory / "train_args.json", entry["train_args"])
        return f"{directory.relative_to(self._dir.root)}/"

    def _verify(self, lines: list[dict[str, Any]], watch: "_Processors") -> None:
        fields = self._current.get("promise")
        if self._verified is not None or fields is None:
            return
        promise = Promise(**fields)
        seen = verdict(promise, lines, others_share=watch.others_share())
        if seen is None:
            return
        self._verified = seen.to_json(promise)
        write_json(self._verified_path, self._verified)
        self._say(seen)

    def _say(self, seen: Verdict) -> None:
        if seen.within:
            _log.info(
                "the first %d steps hold what was probed: %.0f tokens/s, %+.0f %%",
                *(seen.steps, seen.tokens_per_s, 100 * seen.speed_deviation),
            )
            return
        text = "; ".join(seen.causes)
        if self._strict and seen.falls_short:
            # Asked again, it would be no surprise any more.
            self._verified_path.unlink()
            msg = (
                f"the training does not hold what was probed: {text}. A checkpoint is saved; "
                "go on without --strict-handoff, or tune again when the cause is gone"
            )
            raise TrainingFailedError(msg)
        _log.warning("the first steps differ from the probe: %s", text)

    def _recover(self, ended: Ended, kernel_kills: int) -> None:
        """Choose what to go on with, and write it down.

        Raises:
            TrainingFailedError: it was no loss of memory, rank or launcher, or nothing is left.
        """
        cause, evidence = self._cause(ended, kernel_kills)
        if cause is None:
            msg = (
                f"the training ended with exit code {ended.exit_code}; the end of "
                f"{self._dir.logs / 'training.log'}:\n{ended.tail}"
            )
            raise TrainingFailedError(msg)
        place = self._place
        lighter = next_fallback(self._ladder, self._current.get("peak_bytes", 0.0))
        if cause != "launcher_lost" and lighter is not None:
            place = lighter
        elif cause == "out_of_memory" or repeats_in_vain(self._recoveries) >= MAX_REPEATS:
            msg = (
                f"the training ended because {_CAUSES[cause]} ({evidence}), and no setting is left "
                "that needs less memory: use --device-memory to plan with less, or tune again"
            )
            raise TrainingFailedError(msg)
        self._take(cause, evidence, place)

    def _give_up_for_now(self, lost: Sequence[str]) -> None:
        """Write down that nodes are lost, and end: the training is of as many as it began with.

        Raises:
            InterruptedRunError: always.
        """
        self._take("rank_lost", f"{', '.join(lost)} not seen any more", self._place)
        msg = (
            f"the training ended because a rank was lost, with {', '.join(lost)}; its last "
            "checkpoint is there, and the same command goes on when the node is back"
        )
        raise InterruptedRunError(msg)

    def _take(self, cause: Cause, evidence: str, place: int | None) -> None:
        from_step = last_step(self._dir.training)
        before = self._current.get("setting")
        self._recoveries.append(
            {
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "cause": cause,
                "evidence": evidence,
                "from_step": from_step,
                "before": before,
                "to": place,
                "setting": (self._chosen if place is None else self._ladder[place]).get("setting"),
            }
        )
        write_json(self._recoveries_path, {"schema": 1, "recoveries": self._recoveries})
        setting = self._recoveries[-1]["setting"]
        self._tell("recovery", cause=cause, from_step=from_step, setting=setting)
        _log.warning(
            "the training ended because %s (%s); it goes on from step %d with %s",
            _CAUSES[cause],
            evidence,
            from_step,
            Setting.from_json(setting).label() if setting else "the same setting",
        )

    def _cause(self, ended: Ended, kernel_kills: int) -> tuple[Cause | None, str]:
        outcome = classify(
            Evidence(
                device_kind=self._cluster.kind,
                deaths=tuple(Death(**death) for death in ended.deaths),
                exit_codes=tuple(-number for number in ended.lost_by) or (ended.exit_code,),
                phase="training",
                idle_s=0.0,
                timed_out=False,
                kernel_kills=kernel_kills,
                log_tail=ended.tail,
            )
        )
        if isinstance(outcome, OutOfMemory):
            return "out_of_memory", outcome.evidence
        if ended.lost_by:
            return "rank_lost", f"signal {ended.lost_by[0]}"
        if ended.exit_code < 0:
            return "launcher_lost", f"signal {-ended.exit_code}"
        return None, ""


def last_step(training: Path) -> int:
    """Return the step of the latest complete checkpoint, 0 if there is none."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in training.glob("*/complete")]
    return max(steps, default=0)


class _Saving:
    """Tells how far the ranks are with loading the model and with saving checkpoints."""

    _LOOK_S = 1.0

    def __init__(self, training: Path, tell: Tell) -> None:
        self._training = training
        self._tell = tell
        self._step: str | None = None
        self._began_s = self._looked_s = 0.0
        self._total: int | None = None

    def look(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["what"] == CHECKPOINT:
                self._checkpoint(line)
            else:
                tell_progress(self._tell, line["what"], line["done"], line["total"], unit="tensors")
        if self._step is not None and time.monotonic() - self._looked_s >= self._LOOK_S:
            self._looked_s = time.monotonic()
            self._say(_size_of(self._training / f"checkpoint-{self._step}"))

    def _checkpoint(self, line: dict[str, Any]) -> None:
        if not line["done"]:
            sizes = [_size_of(path.parent) for path in self._training.glob("checkpoint-*/complete")]
            # They are all about as large.
            self._step, self._began_s = line["note"], line["at"]
            self._total = max(sizes, default=None)
            return
        self._step = None
        self._tell("checkpoint", step=int(line["note"]), seconds=line["at"] - self._began_s)

    def _say(self, size: int) -> None:
        # It is over when the ranks say so.
        done = size if self._total is None else min(size, self._total - 1)
        note = f"step {self._step}"
        tell_progress(self._tell, CHECKPOINT, done, self._total, unit="bytes", note=note)


def _size_of(directory: Path) -> int:
    """Return the bytes of the files below a directory, of which some may go meanwhile."""
    size = 0
    for path in directory.rglob("*"):
        with suppress(OSError):
            size += path.stat().st_size
    return size


class _Processors:
    """What other programs take of this machine's processors from now on."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._busy_s = _busy_s()
        self._own_s = _own_s()

    def others_share(self) -> float | None:
        """Return their share of all processors; None if that cannot be told yet."""
        elapsed = time.monotonic() - self._started
        cores = psutil.cpu_count() or 1
        others = (_busy_s() - self._busy_s) - (_own_s() - self._own_s)
        return max(0.0, others / (elapsed * cores)) if elapsed > 1 else None


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _own_s() -> float:
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total

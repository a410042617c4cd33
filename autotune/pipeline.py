"""The stages in order; the only module that knows them all."""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from autotune import __version__, time_limit
from autotune.config import AUTO, Options
from autotune.dataset.preparing import log_progress
from autotune.detect.monitor import watch
from autotune.detect.nvidia import used_bytes
from autotune.documents import emission, plan_document, tuning_figures
from autotune.emit import ds_config, launch_script
from autotune.engine.ops import needed_ops
from autotune.environment import rank_environment, versions
from autotune.errors import (
    InputMissingError,
    InterruptedRunError,
    NothingFitsError,
    SetupFaultError,
    UsageError,
)
from autotune.events import IN_VIEW
from autotune.handoff import Handoff, last_step, require_trainable
from autotune.hardware import Cluster, Rates
from autotune.intake import (
    Question,
    Workload,
    ask,
    look_into,
    on_one_node,
    replanned,
    require_usable,
    require_working,
    start_processes,
    total_steps,
)
from autotune.nodes.control import Nodes
from autotune.nodes.launch import TorchrunLauncher
from autotune.outcome import Rung
from autotune.outcome_cache import OutcomeCache
from autotune.plan import Plan
from autotune.probe.local import LocalProber
from autotune.probe.tenants import DeviceMemory
from autotune.rundir import RunDir, read_json, write_json, write_text
from autotune.setting import Setting
from autotune.staged import StagedRun
from autotune.tune import narrowing
from autotune.tune.beliefs import NO_HINTS, Hint
from autotune.tune.loop import Tuned, Tuner, write_study
from autotune.tune.others import Nobody, Others
from autotune.tune.site import JobSite
from autotune.units import format_bytes, format_duration
from autotune.virtual_judge import VirtualJudge

if TYPE_CHECKING:
    from autotune.dataset.preparing import Progress
    from autotune.tune.shared_study import Storage, StudyDatabase

_log = logging.getLogger(__name__)

_REPORT_EVERY_S = 15.0
"""How long a report stays as it is while outcomes and steps come in; it is written in a fraction of
a second, which a probe need not wait for each time."""


def choose_run_dir(question: Question) -> RunDir:
    """Return --run-dir, or runs/<dataset>-<model>-<first 8 of the fingerprint>."""
    if question.options["run_dir"]:
        return RunDir(Path(question.options["run_dir"]).absolute())
    assert question.dataset, "a run has a dataset"
    name = (
        f"{question.dataset[0].path.stem}-{question.source.short_name}-{question.fingerprint[:8]}"
    )
    return RunDir(Path("runs").absolute() / name)


class Run(StagedRun[Question]):
    """One run in its directory: from the question to the result, resumed where it was left."""

    differing = "other data, model, devices or options"

    def __init__(self, question: Question, run_dir: RunDir) -> None:
        super().__init__(question, run_dir)
        self._storage: Storage | None = None

    def progress(self) -> tuple[int, int]:
        """Return how far earlier starts have come: rungs that were tried, and steps saved."""
        return len(self.dir.read_rungs()), last_step(self.dir.training)

    def _stages(self, *, with_training: bool) -> dict[str, Any]:
        if self.question.nodes is not None:
            self.question.nodes.require_seen([self.dir.root, self.question.source.directory])
        # What was emitted stays as it is: checkpoints of a training fit only the setting it began
        # with, and more tuning could find another.
        known = self.dir.read_rungs()
        self._chronicle.known(known)
        self._figures = self._figures_before() or self._tune_and_emit(
            known, with_training=with_training
        )
        result = self._write_result({"exit_reason": "tuned", "exit_code": 0} | self._figures)
        if with_training:
            self._enter("train")
            trained = self.train()
            result = self._write_result(
                {"exit_reason": "trained", "exit_code": 0} | self._figures | trained
            )
        return result

    def _tune_and_emit(self, known: list[Rung], *, with_training: bool) -> dict[str, Any]:
        self._enter("detect")
        job = self._job()
        write_json(self.dir.run, self._run_json(job))
        if (address := self.question.options["storage"]) is not None:
            from autotune.tune.shared_study import open_storage

            # What cannot be reached is told before minutes are spent.
            self._storage = open_storage(address)
        start_processes(self.question)
        require_working(self.question, self.dir.logs / "optimizer.log")
        self._enter("profile")
        workload = look_into(
            self.question,
            dataset_dir=self.dir.dataset,
            logs=self.dir.logs,
            watch=self._watch_data,
        )
        database = self._database(workload)
        if database is not None:
            # What is planned follows from rates that each node measures a little different.
            rates = database.agree("rates", asdict(workload.rates))
            workload = replanned(workload, Rates(**rates))
        self._write_workload(workload)
        require_any_kept(workload.plan)
        self._chronicle.planned(workload)
        require_trainable(workload, self.dir, with_training=with_training)
        workload = with_built_ops(workload, self.dir.logs / "ops.log", self._chronicle.ops)
        self._enter("tune")
        started = time.monotonic()
        with _others(database, job, workload.plan, known) as others:
            tuned = self._tune(workload, known, others)
        before_s = sum(rung.seconds for rung in known if not rung.cached)
        tuning_s = before_s + time.monotonic() - started
        self._enter("emit")
        best = require_best(workload.plan, tuned)
        self._emit(workload, best.setting, tuned)
        figures = tuning_figures(workload, tuned, best, tuning_s)
        self._chronicle.chosen(figures)
        return figures

    def _watch_data(self, progress: "Progress") -> None:
        log_progress(progress)
        self._chronicle.data(progress)

    def _job(self) -> str:
        """Return this job's name in a shared study, which it keeps when it is resumed."""
        before = read_json(self.dir.run) or {}
        same = before.get("fingerprint") == self.question.fingerprint
        return str(before.get("job") or uuid4().hex) if same else uuid4().hex

    def _database(self, workload: Workload) -> "StudyDatabase | None":
        """Return the study of jobs like this one; None without --storage."""
        if self._storage is None:
            return None
        from autotune.tune.shared_study import StudyDatabase

        name = f"autotune-{OutcomeCache.of(workload).kind_of_job}"
        _log.info("sharing the study %s", name)
        return StudyDatabase(self._storage, name)

    def _run_json(self, job: str) -> dict[str, Any]:
        return {
            "schema": 1,
            "fingerprint": self.question.fingerprint,
            "job": job,
            "options": self._recorded_options(),
            "versions": versions() | {"autotune": __version__},
        }

    def _recorded_options(self) -> dict[str, Any]:
        """Return the options, files as absolute paths: `train` may start in another directory."""
        options = self.question.options.to_json()
        for name in ("model", "run_dir", "ds_config"):
            value = options[name]["value"]
            if value is not None and Path(value).exists():
                options[name]["value"] = str(Path(value).absolute())
        options["dataset"]["value"] = [source.absolute() for source in self.question.dataset]
        if options["storage"]["value"] is not None:
            from autotune.tune.shared_study import without_password

            options["storage"]["value"] = without_password(options["storage"]["value"])
        return options

    def _write_workload(self, workload: Workload) -> None:
        write_json(
            self.dir.hardware,
            {"schema": 1, **asdict(self.question.cluster), "rates": asdict(workload.rates)},
        )
        write_json(self.dir.profile, {"schema": 1, **asdict(workload.profile)})
        if workload.dataset is not None:
            write_json(self.dir.dataset_profile, {"schema": 1, **asdict(workload.dataset)})
        write_json(self.dir.plan, plan_document(workload))

    def _tune(self, workload: Workload, known: list[Rung], others: Others) -> Tuned:
        plan, cluster = workload.plan, self.question.cluster
        steps = total_steps(workload)
        assert steps is not None, "a run has a dataset"
        options = self.question.options
        started, hints = time.monotonic(), NO_HINTS
        if cluster.num_nodes > 1:
            ranks = cluster.ranks_per_node
            hints = self._narrow(workload, [rung for rung in known if rung.ranks == ranks])
            known = [rung for rung in known if rung.ranks == cluster.num_devices]
        cache = OutcomeCache.of(workload)
        if not known and not options["no_cache"] and not others.are_there:
            known = self._taken_over(cache.read(workload))
        budget = self._tuning_s(workload, steps)
        # A host's memory is everybody's, and there is no driver to ask.
        monitor = watch(cluster.visible_devices) if cluster.has_separate_memory else None
        tuner = Tuner(
            plan,
            LocalProber(
                self.dir.logs,
                memory=_device_memory(cluster),
                monitor=monitor,
                watch=self._chronicle.phase_of_probe,
                **self._elsewhere(),
            ),
            self._site(workload, steps),
            known,
            record=self._record,
            judge=VirtualJudge(workload, self.dir.logs),
            others=others,
            watch=self._chronicle,
            parameters=workload.profile.parameters,
            steps=steps,
            thrifty=options["tune_budget"] == AUTO,
            hints=hints,
            sampler=options["sampler"],
            seed=options["seed"],
        )
        try:
            tuned = tuner.run(
                max_probes=options["max_probes"],
                budget_s=None if budget is None else budget - (time.monotonic() - started),
            )
        finally:
            write_study(tuner.study, self.dir.study)
            if monitor is not None:
                monitor.close()
        cache.keep(tuned.rungs, workload)
        return tuned

    def _elsewhere(self) -> dict[str, Any]:
        """Return what has probes started on all nodes; nothing where there is one."""
        nodes, cluster = self.question.nodes, self.question.cluster
        if nodes is None or cluster.num_nodes == 1:
            return {}
        return {"launcher": TorchrunLauncher(nodes, cluster), "scratch_dir": nodes.directory}

    def _tuning_s(self, workload: Workload, steps: int) -> float | None:
        """Return the seconds that tuning may take, by the user and by the end of the job."""
        plan, asked = workload.plan, self.question.options["tune_budget"]
        training_s = steps * float(plan.step_time_s[plan.ranking()[0]])
        limit_s = time_limit.tuning_limit_s(time_limit.seconds_left(time.time()), training_s)
        return time_limit.least(limit_s, None if asked == AUTO else asked)

    def _site(self, workload: Workload, steps: int) -> JobSite:
        return JobSite(
            job=workload.job,
            cluster=workload.question.cluster,
            profile=workload.profile,
            lengths_of_rows=workload.lengths,
            rebalanced=workload.drawn.rebalanced,
            dataset_dir=self.dir.dataset,
            scratch_dir=self.dir.logs,
            total_steps=steps,
        )

    def _narrow(self, workload: Workload, known: list[Rung]) -> Mapping[int, Hint]:
        """Probe a node's share of the job on this node, and return what that says of all nodes."""
        node = on_one_node(workload, self.dir.logs)
        if not node.plan.kept.any():
            return NO_HINTS
        _log.info("narrowing down on one of %d nodes", workload.question.cluster.num_nodes)
        options, steps = self.question.options, total_steps(node)
        assert steps is not None, "a run has a dataset"
        budget = self._tuning_s(workload, steps)
        tuner = Tuner(
            node.plan,
            LocalProber(self.dir.logs, memory=_device_memory(node.question.cluster)),
            self._site(node, steps),
            known,
            record=self._record,
            judge=VirtualJudge(node, self.dir.logs),
            parameters=node.profile.parameters,
            steps=steps,
            thrifty=options["tune_budget"] == AUTO,
            sampler=options["sampler"],
            seed=options["seed"],
        )
        tuned = tuner.run(
            max_probes=math.ceil(narrowing.SHARE * options["max_probes"]),
            budget_s=None if budget is None else narrowing.SHARE * budget,
            tell_apart=False,
        )
        return narrowing.hints(workload.plan, node.plan, tuned.rungs)

    def _taken_over(self, cached: list[Rung]) -> list[Rung]:
        """Begin with what earlier runs of such a job have measured."""
        if cached:
            _log.info(
                "%d outcomes of earlier runs are taken over (--no-cache leaves them out)",
                len(cached),
            )
        for rung in cached:
            self._record(rung)
        return cached

    def _record(self, rung: Rung) -> None:
        self.dir.append_rung(rung)
        self._chronicle.rung(rung)
        self._report(every_s=_REPORT_EVERY_S)

    def _emit(self, workload: Workload, setting: Setting, tuned: Tuned) -> None:
        cluster = self.question.cluster
        self.question.source.complete()
        chosen, ladder = emission(workload, tuned, setting)
        write_json(self.dir.ds_config, chosen["ds_config"])
        write_json(self.dir.train_args, chosen["train_args"])
        environment = rank_environment(cluster.kind, cluster.visible_devices)
        script = launch_script(
            sys.executable, cluster.num_devices, sorted(environment.items()), cluster.num_nodes
        )
        write_text(self.dir.launch_script, script, mode=0o700)
        write_json(
            self.dir.fallbacks,
            {"schema": 1, "chosen": chosen, "settings": ladder},
        )

    def train(self) -> dict[str, Any]:
        """Train from the emitted files, from the last checkpoint if there is one.

        Raises:
            TrainingFailedError: the training ended badly.
            NoUsableDeviceError: torch cannot open the devices.
        """
        require_usable(self.question.cluster)
        # What was made for the tuning may have gone from the cache.
        self.question.source.complete()
        handoff = Handoff(
            self.dir,
            self.question.cluster,
            strict=self.question.options["strict_handoff"],
            progress=self._training_progress,
            tell=self._events.tell,
            nodes=self.question.nodes,
        )
        try:
            return handoff.train()
        finally:
            self._figures |= handoff.report()

    def _training_progress(self, line: dict[str, Any]) -> None:
        _log.info(
            "step %d/%d: loss %.4f, %.0f tokens/s, peak %s, %s to go",
            line["step"],
            line["max_steps"],
            line["loss"],
            line["tokens_per_s"],
            format_bytes(line["peak_bytes"]),
            format_duration(line["left_s"]),
            extra=IN_VIEW,
        )
        self._chronicle.tell("step", **line)
        self._report(every_s=_REPORT_EVERY_S)


@contextmanager
def _others(
    database: "StudyDatabase | None", job: str, plan: Plan, known: list[Rung]
) -> Iterator[Others]:
    """Give the jobs that share what they measure with this one, for the length of a block."""
    if database is None:
        yield Nobody()
        return
    from autotune.tune.shared_study import SharedStudy

    study = SharedStudy(database, job, plan, known)
    try:
        yield study
    finally:
        study.close()
        database.close()


def _device_memory(cluster: Cluster) -> DeviceMemory | None:
    """Watch the memory of devices that have their own; a host's is everybody's."""
    return DeviceMemory(used_bytes) if cluster.has_separate_memory else None


def with_built_ops(
    workload: Workload, log: Path, watch: Callable[[int, int, str], None] = lambda *_: None
) -> Workload:
    """Build the ops that the plan needs; without a fast Adam for the host, take torch's there.

    `watch` is told how many are there, of how many, and which is built next.

    Raises:
        SetupFaultError: an op cannot be built, and there is nothing in its place.
    """
    _log.info("building DeepSpeed's ops (once an environment)")
    try:
        _build(_ops(workload), log, watch)
    except SetupFaultError as error:
        slower = replace(workload, job=replace(workload.job, host_adam="torch"))
        if workload.question.cluster.kind == "cpu" or _ops(slower) == _ops(workload):
            raise
        _log.warning("offloaded states are updated by torch's AdamW, which is slower: %s", error)
        _build(_ops(slower), log, watch)
        return slower
    return workload


def _build(names: Sequence[str], log: Path, watch: Callable[[int, int, str], None]) -> None:
    from autotune.profile.child import build_ops

    build_ops(names, log, lambda built, name: watch(built, len(names), name))


def _ops(workload: Workload) -> list[str]:
    """Name the ops that any setting of the plan needs."""
    job, cluster, space = workload.job, workload.question.cluster, workload.plan.space
    first_rows = np.unique(space.structure_index[workload.plan.kept], return_index=True)[1]
    rows = np.flatnonzero(workload.plan.kept)[first_rows]
    configs = (ds_config(job, space.setting(int(row)), workload.profile, cluster) for row in rows)
    return sorted({name for config in configs for name in needed_ops(cluster.kind, config)})


def require_any_kept(plan: Plan) -> None:
    """Refuse to probe where nothing can fit.

    Raises:
        NothingFitsError: with the setting that comes nearest and what it lacks.
    """
    if plan.kept.any():
        return
    nearest = plan.entry(int(plan.ranking()[0]))
    msg = (
        f"no setting fits: the smallest {nearest['rejected_by']['detail']}. Use more or larger "
        "devices, shorter rows (--max-seq-length), or a smaller model"
    )
    raise NothingFitsError(msg)


def require_best(plan: Plan, tuned: Tuned) -> Rung:
    """Return the best measured rung.

    Raises:
        NothingFitsError: the device ran out of memory in every probe.
        InterruptedRunError: the budget was spent before anything was measured.
    """
    if tuned.best is not None:
        return tuned.best
    if not tuned.rungs:
        msg = (
            "--tune-budget was spent before the first probe was measured: give more, "
            "and the same command goes on"
        )
        raise InterruptedRunError(msg)
    smallest = int(np.argmin(plan.memory.device_bytes))
    msg = (
        f"no setting fits: all {len(tuned.rungs)} that were probed ran out of memory; the smallest "
        f"was estimated at {format_bytes(plan.memory.device_bytes[smallest])} of "
        f"{format_bytes(plan.budget_bytes)} a rank. Use more or larger devices, shorter rows "
        "(--max-seq-length), or a smaller model"
    )
    raise NothingFitsError(msg)


def reopen(
    run_dir: RunDir, options_of: Callable[[dict[str, Any]], Options], nodes: Nodes | None = None
) -> Run:
    """Take up a run by its directory, with the options that it was started with.

    Raises:
        InputMissingError: the directory holds no tuned run.
        UsageError: model, data or devices are not what they were.
    """
    recorded = read_json(run_dir.run)
    if recorded is None or not run_dir.ds_config.exists():
        msg = f"{run_dir.root} holds no tuned run: make one with `autotune tune`"
        raise InputMissingError(msg)
    if "script" in recorded:
        msg = (
            f"{run_dir.root} holds a run of a script: start the same `autotune run --script` again,"
            f" or {run_dir.launch_script}"
        )
        raise UsageError(msg)
    question = ask(options_of(recorded["options"]), nodes=nodes)
    if question.fingerprint != recorded["fingerprint"]:
        msg = f"model, data, devices or versions of {run_dir.root} have changed since it was tuned"
        raise UsageError(msg)
    return Run(replace(question, fingerprint=recorded["fingerprint"]), run_dir)

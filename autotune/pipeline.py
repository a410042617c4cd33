"""The stages in order; the only module that knows them all."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autotune import __version__, processes
from autotune.config import Options
from autotune.dataset import Rows, content_hash, prepare
from autotune.detect import detect
from autotune.emit import ds_config, launch_script, torchrun_command, train_spec
from autotune.environment import cache_dir, rank_environment, versions
from autotune.errors import (
    AutotuneError,
    InputMissingError,
    NothingFitsError,
    TrainingFailedError,
    UsageError,
)
from autotune.hardware import Cluster, Rates
from autotune.model_source import ModelSource, find_model
from autotune.outcome import Measured, Rung
from autotune.plan import Plan, make_plan
from autotune.probe.local import LocalProber
from autotune.rundir import RunDir, cached_json, read_json, write_json, write_text
from autotune.setting import Setting
from autotune.space import enumerate_space
from autotune.throughput import Ints
from autotune.tune.loop import Tuned, Tuner, write_study
from autotune.tune.site import JobSite
from autotune.units import format_bytes, format_count
from autotune.workload import DatasetProfile, Job, ModelProfile

_log = logging.getLogger(__name__)

_BF16_CAPABILITY = (8, 0)
_MAX_FALLBACKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked for, where it would run, and the name of the answer."""

    options: Options
    cluster: Cluster
    source: ModelSource
    dataset: Path | None
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The question looked into: model and data in figures, every setting estimated."""

    question: Question
    job: Job
    profile: ModelProfile
    rates: Rates
    dataset: DatasetProfile | None
    lengths: Ints
    plan: Plan


def ask(options: Options) -> Question:
    """Find model, data and devices; quick, nothing heavy is imported.

    Raises:
        AutotuneError: one of them is not there or cannot be used.
    """
    source = find_model(options["model"])
    dataset = Path(options["dataset"]) if options["dataset"] else None
    cluster = detect(options["devices"], options["device_memory"])
    facts = {
        "model": source.content_hash(),
        "dataset": content_hash(dataset) if dataset else None,
        "cluster": cluster.identity(),
        "versions": versions() | {"autotune": __version__},
        "options": {
            name: value
            for name, value in options.values.items()
            if name not in ("model", "dataset", "run_dir")
        },
    }
    text = json.dumps(facts, sort_keys=True)
    return Question(
        options=options,
        cluster=cluster,
        source=source,
        dataset=dataset,
        fingerprint=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    )


def choose_run_dir(question: Question) -> RunDir:
    """Return --run-dir, or runs/<dataset>-<model>-<first 8 of the fingerprint>."""
    if question.options["run_dir"]:
        return RunDir(Path(question.options["run_dir"]).absolute())
    assert question.dataset is not None, "a run has a dataset"
    name = f"{question.dataset.stem}-{question.source.short_name}-{question.fingerprint[:8]}"
    return RunDir(Path("runs").absolute() / name)


def start_processes(cluster: Cluster) -> None:
    """Start the server that ranks are forked from; it imports while the data is read."""
    processes.start_server(rank_environment(cluster.kind, cluster.visible_devices))


def look_into(
    question: Question, *, dataset_dir: Path, logs: Path, seq_length: int | None = None
) -> Workload:
    """Profile the model, tokenise the data, and estimate every setting.

    Without a dataset every row is `seq_length` tokens long.
    """
    options, cluster, source = question.options, question.cluster, question.source
    precision = choose_precision(options["precision"], cluster)
    profile = _profile(source, precision, logs, trust=options["trust_remote_code"])
    limit = sequence_limit(options["max_seq_length"], profile)
    job = _job(options, source, precision, limit)
    _log.info(
        "model %s: %s, %s parameters, %s",
        source.name,
        profile.architecture,
        format_count(profile.parameters),
        precision,
    )
    dataset, lengths = None, np.array([min(seq_length or limit, limit)])
    if question.dataset is not None:
        dataset = prepare(
            question.dataset,
            model_dir=source.directory,
            max_seq_length=limit,
            output=dataset_dir,
            trust_remote_code=job.trust_remote_code,
            vocab_size=profile.vocab_size,
        )
        lengths = Rows.open(dataset_dir).lengths
        _log.info(describe_dataset(dataset))
    rates = _rates(cluster, precision, logs)
    space = enumerate_space(cluster, job.global_batch_size)
    return Workload(
        question=question,
        job=job,
        profile=profile,
        rates=rates,
        dataset=dataset,
        lengths=lengths,
        plan=make_plan(space, profile, job, cluster, rates, lengths),
    )


def choose_precision(asked: str, cluster: Cluster) -> Any:  # noqa: ANN401 - a Precision
    """Return the precision; `auto` is what the device is made for.

    fp32 on a CPU, bf16 on GPUs that compute in it (compute capability 8.0 on), fp16 on older ones.
    """
    if asked != "auto":
        return asked
    if cluster.kind == "cpu":
        return "fp32"
    capable = cluster.compute_capability is None or cluster.compute_capability >= _BF16_CAPABILITY
    return "bf16" if capable else "fp16"


def sequence_limit(asked: int | None, profile: ModelProfile) -> int:
    """Return the tokens a row may have.

    Raises:
        UsageError: more than the model has positions for.
    """
    limit = profile.max_position_embeddings
    if asked is not None and asked > limit:
        msg = (
            f"--max-seq-length {asked} is beyond the {limit} positions of the model: "
            f"use {limit} or less"
        )
        raise UsageError(msg)
    return asked or limit


def _job(options: Options, source: ModelSource, precision: Any, max_seq_length: int) -> Job:  # noqa: ANN401
    learning_rate = options["learning_rate"]
    if options.is_default("learning_rate"):
        learning_rate = source.recommended.get("learning_rate", learning_rate)
    return Job(
        model=source.name,
        model_dir=str(source.directory),
        from_scratch=source.from_scratch,
        precision=precision,
        max_seq_length=max_seq_length,
        learning_rate=learning_rate,
        **{
            name: options[name]
            for name in (
                "trust_remote_code",
                "method",
                "global_batch_size",
                "epochs",
                "max_steps",
                "lr_scheduler",
                "warmup_ratio",
                "weight_decay",
                "max_grad_norm",
                "seed",
            )
        },
    )


def _profile(source: ModelSource, precision: Any, logs: Path, *, trust: bool) -> ModelProfile:  # noqa: ANN401
    from autotune.profile.child import profile_from_json, traced
    from autotune.profile.trace import TraceRequest

    request = TraceRequest(
        model_dir=str(source.directory),
        trust_remote_code=trust,
        attention="sdpa",
        precision=precision,
    )
    config = hashlib.blake2b((source.directory / "config.json").read_bytes()).hexdigest()
    path = _cache_path("profiles", config, request.attention, precision, __version__, versions())
    fields = cached_json(path, lambda: traced(request, logs / "profile.log"))
    return profile_from_json(fields)


def _rates(cluster: Cluster, precision: str, logs: Path) -> Rates:
    from autotune.profile.child import measured_rates, rates_from_json

    path = _cache_path("rates", cluster.identity(), precision, versions())
    threads = cluster.threads_per_rank
    fields = cached_json(
        path, lambda: measured_rates(cluster.kind, precision, threads, logs / "rates.log")
    )
    return rates_from_json(fields)


def _cache_path(kind: str, *facts: object) -> Path:
    key = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    return cache_dir() / kind / f"{key}.json"


def total_steps(workload: Workload) -> int:
    """Return the optimizer steps of the training, the last incomplete batch of an epoch included."""
    job = workload.job
    if job.max_steps is not None:
        return job.max_steps
    an_epoch = -(-len(workload.lengths) // job.global_batch_size)
    return max(1, round(job.epochs * an_epoch))


class Run:
    """One run in its directory: from the question to the result, resumed where it was left."""

    def __init__(self, question: Question, run_dir: RunDir) -> None:
        self.question = question
        self.dir = run_dir
        self._status: dict[str, Any] = {"schema": 1, "pid": os.getpid(), "best": None, "probes": 0}

    def finished(self, *, with_training: bool) -> dict[str, Any] | None:
        """Return the result of an earlier run of the same question, if it got as far."""
        result = read_json(self.dir.result)
        if not result or result.get("fingerprint") != self.question.fingerprint:
            return None
        reached = ("trained",) if with_training else ("trained", "tuned")
        return dict(result) if result["exit_reason"] in reached else None

    def execute(self, *, with_training: bool) -> dict[str, Any]:
        """Go through every stage that is not done yet; returns the content of result.json.

        Raises:
            AutotuneError: a stage failed; result.json says why.
        """
        self.dir.create()
        with self.dir.locked():
            if (done := self.finished(with_training=with_training)) is not None:
                return done
            self._refuse_foreign()
            try:
                return self._stages(with_training=with_training)
            except AutotuneError as error:
                self._write_result(
                    {"exit_reason": type(error).__name__, "exit_code": error.exit_code}
                    | {"message": str(error)}
                )
                raise

    def _refuse_foreign(self) -> None:
        before = read_json(self.dir.run)
        if before and before.get("fingerprint") != self.question.fingerprint:
            msg = (
                f"{self.dir.root} holds a run of other data, model, devices or options: "
                "choose another --run-dir"
            )
            raise UsageError(msg)

    def _stages(self, *, with_training: bool) -> dict[str, Any]:
        self._enter("detect")
        cluster = self.question.cluster
        write_json(self.dir.run, self._run_json())
        start_processes(cluster)
        self._enter("profile")
        workload = look_into(self.question, dataset_dir=self.dir.dataset, logs=self.dir.logs)
        self._write_workload(workload)
        self._enter("tune")
        started = time.monotonic()
        tuned = self._tune(workload)
        tuning_s = time.monotonic() - started
        self._enter("emit")
        best = require_best(workload.plan, tuned)
        self._emit(workload, best.setting, tuned)
        figures = tuning_figures(workload, tuned, best) | {"tuning_seconds": tuning_s}
        if not with_training:
            return self._write_result({"exit_reason": "tuned", "exit_code": 0} | figures)
        self._enter("train")
        trained = self.train()
        return self._write_result({"exit_reason": "trained", "exit_code": 0} | figures | trained)

    def _run_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "fingerprint": self.question.fingerprint,
            "options": self.question.options.to_json(),
            "versions": versions() | {"autotune": __version__},
        }

    def _write_workload(self, workload: Workload) -> None:
        write_json(
            self.dir.hardware,
            {"schema": 1, **asdict(self.question.cluster), "rates": asdict(workload.rates)},
        )
        write_json(self.dir.profile, {"schema": 1, **asdict(workload.profile)})
        if workload.dataset is not None:
            write_json(self.dir.dataset_profile, {"schema": 1, **asdict(workload.dataset)})
        write_json(self.dir.plan, plan_document(workload))

    def _tune(self, workload: Workload) -> Tuned:
        from autotune.profile.child import build_ops

        plan, cluster = workload.plan, self.question.cluster
        require_any_kept(plan)
        _log.info("building DeepSpeed's ops (once an environment)")
        build_ops(cluster.kind, self.dir.logs / "ops.log")
        site = JobSite(
            job=workload.job,
            cluster=cluster,
            profile=workload.profile,
            lengths_of_rows=workload.lengths,
            dataset_dir=self.dir.dataset,
            scratch_dir=self.dir.logs,
            total_steps=total_steps(workload),
        )
        tuner = Tuner(
            plan,
            LocalProber(self.dir.logs),
            site,
            self.dir.read_rungs(),
            record=self._record,
        )
        options = self.question.options
        try:
            return tuner.run(max_probes=options["max_probes"], budget_s=options["tune_budget"])
        finally:
            write_study(tuner.study, self.dir.study)

    def _record(self, rung: Rung) -> None:
        self.dir.append_rung(rung)
        outcome = rung.outcome
        self._status["probes"] += 1
        best = self._status["best"]
        if isinstance(outcome, Measured) and (
            best is None or outcome.tokens_per_s > best["tokens_per_s"]
        ):
            self._status["best"] = {
                "setting": rung.setting.to_json(),
                "tokens_per_s": outcome.tokens_per_s,
            }
        self._beat()

    def _emit(self, workload: Workload, setting: Setting, tuned: Tuned) -> None:
        job, cluster, profile = workload.job, self.question.cluster, workload.profile
        spec = train_spec(job, setting, cluster, dataset_dir="dataset", output_dir="training", model_output_dir="model")
        write_json(self.dir.ds_config, ds_config(job, setting, profile, cluster))
        write_json(self.dir.train_args, spec.to_json())
        environment = rank_environment(cluster.kind, cluster.visible_devices)
        script = launch_script(sys.executable, cluster.num_devices, sorted(environment.items()))
        write_text(self.dir.launch_script, script, mode=0o700)
        write_json(
            self.dir.fallbacks,
            {"schema": 1, "settings": fallbacks(workload, tuned, setting)},
        )

    def train(self) -> dict[str, Any]:
        """Train from the emitted files, from the last checkpoint if there is one.

        Raises:
            TrainingFailedError: the training ended badly.
        """
        from autotune.train.launch import run_training

        cluster = self.question.cluster
        self.dir.training.mkdir(mode=0o700, exist_ok=True)
        started = time.monotonic()
        run_training(
            [*torchrun_command(sys.executable, cluster.num_devices), "--resume"],
            directory=self.dir.root,
            environment=rank_environment(cluster.kind, cluster.visible_devices),
            log=self.dir.logs / "training.log",
            metrics=self.dir.training / "metrics.jsonl",
            progress=self._training_progress,
        )
        summary = read_json(self.dir.training / "summary.json")
        if summary is None:
            msg = f"the training wrote no summary; see {self.dir.logs / 'training.log'}"
            raise TrainingFailedError(msg)
        return {
            "training_seconds": time.monotonic() - started,
            "training": summary,
            "model_dir": str(self.dir.model),
        }

    def _training_progress(self, line: dict[str, Any]) -> None:
        _log.info(
            "step %d/%d: loss %.4f, %.0f tokens/s",
            line["step"],
            line["max_steps"],
            line["loss"],
            line["tokens_per_s"],
        )
        self._status["training"] = line
        self._beat()

    def _enter(self, phase: str) -> None:
        self._status["phase"] = phase
        self._beat()

    def _beat(self) -> None:
        self._status["heartbeat"] = _now()
        write_json(self.dir.status, self._status)

    def _write_result(self, fields: dict[str, Any]) -> dict[str, Any]:
        result = {
            "schema": 1,
            "fingerprint": self.question.fingerprint,
            "run_dir": str(self.dir.root),
            "at": _now(),
            **fields,
        }
        write_json(self.dir.result, result)
        self._enter("done" if result["exit_code"] == 0 else "stopped")
        return result


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
        NothingFitsError: no probe was measured, as the device ran out of memory in each.
    """
    if tuned.best is not None:
        return tuned.best
    smallest = int(np.argmin(plan.memory.device_bytes))
    msg = (
        f"no setting fits: all {len(tuned.rungs)} that were probed ran out of memory; the smallest "
        f"was estimated at {format_bytes(plan.memory.device_bytes[smallest])} of "
        f"{format_bytes(plan.budget_bytes)} a rank. Use more or larger devices, shorter rows "
        "(--max-seq-length), or a smaller model"
    )
    raise NothingFitsError(msg)


def tuning_figures(workload: Workload, tuned: Tuned, best: Rung) -> dict[str, Any]:
    """Return what result.json says of the tuning."""
    chosen, plan = best.outcome, workload.plan
    assert isinstance(chosen, Measured)
    row = plan.row_of(best.setting)
    assert row is not None, "a probed setting is one of the plan"
    default = tuned.default.outcome if tuned.default else None
    default_speed = default.tokens_per_s if isinstance(default, Measured) else None
    return {
        "setting": best.setting.to_json(),
        "tokens_per_s": chosen.tokens_per_s,
        "samples_per_s": chosen.samples_per_s,
        "step_time_s": chosen.step_time_s,
        "default": {
            "setting": tuned.default.setting.to_json() if tuned.default else None,
            "tokens_per_s": default_speed,
        },
        "gain_over_default": chosen.tokens_per_s / default_speed if default_speed else None,
        "memory": {
            "predicted_bytes": plan.memory.row(row)["device_bytes"],
            "measured_bytes": chosen.peak_bytes,
            "budget_bytes": plan.budget_bytes,
        },
        "probes": tuned.probes,
        "rungs": len(tuned.rungs),
        "stopped_by": tuned.stopped_by,
        "job": asdict(workload.job),
        "total_steps": total_steps(workload),
    }


def fallbacks(workload: Workload, tuned: Tuned, chosen: Setting) -> list[dict[str, Any]]:
    """Return the next best measured settings that need less memory than the chosen one."""
    peaks = {
        rung.setting: rung.outcome for rung in tuned.rungs if isinstance(rung.outcome, Measured)
    }
    lighter = [
        (setting, outcome)
        for setting, outcome in peaks.items()
        if outcome.peak_bytes < peaks[chosen].peak_bytes
    ]
    lighter.sort(key=lambda pair: -pair[1].tokens_per_s)
    return [
        {
            "setting": setting.to_json(),
            "tokens_per_s": outcome.tokens_per_s,
            "peak_bytes": outcome.peak_bytes,
            "ds_config": ds_config(
                workload.job, setting, workload.profile, workload.question.cluster
            ),
        }
        for setting, outcome in lighter[:_MAX_FALLBACKS]
    ]


def plan_document(workload: Workload, *, everything: bool = False) -> dict[str, Any]:
    """Return plan.json."""
    profile, plan = workload.profile, workload.plan
    return {
        "schema": 1,
        "model": {
            "name": workload.job.model,
            **{k: v for k, v in asdict(profile).items() if k != "traces"},
        },
        "cluster": asdict(workload.question.cluster),
        "job": asdict(workload.job),
        "settings": plan.listed(everything=everything),
        "counts": {"kept": int(plan.kept.sum()), "rejected_by_rule": plan.rejected_by_rule()},
    }


def describe_dataset(profile: DatasetProfile) -> str:
    """Return a line for people."""
    parts = [
        f"data {profile.path}: {profile.rows} rows in {profile.format} form",
        f"{format_count(profile.tokens)} tokens, {format_count(profile.trained_tokens)} trained",
        f"lengths {profile.min_length} to {profile.max_length}, mean {profile.mean_length:.0f}",
    ]
    if profile.rows_truncated:
        parts.append(f"{profile.rows_truncated} rows truncated ({profile.tokens_lost} tokens lost)")
    if profile.rows_without_trained_tokens:
        parts.append(f"{profile.rows_without_trained_tokens} rows without trained tokens left out")
    return ", ".join(parts)


def reopen(run_dir: RunDir, options_of: Callable[[dict[str, Any]], Options]) -> Run:
    """Take up a run by its directory, with the options that it was started with.

    Raises:
        InputMissingError: the directory holds no tuned run.
        UsageError: model, data or devices are not what they were.
    """
    recorded = read_json(run_dir.run)
    if recorded is None or not run_dir.ds_config.exists():
        msg = f"{run_dir.root} holds no tuned run: make one with `autotune tune`"
        raise InputMissingError(msg)
    question = ask(options_of(recorded["options"]))
    if question.fingerprint != recorded["fingerprint"]:
        msg = f"model, data, devices or versions of {run_dir.root} have changed since it was tuned"
        raise UsageError(msg)
    return Run(replace(question, fingerprint=recorded["fingerprint"]), run_dir)

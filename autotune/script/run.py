"""A user's script from its command to its result: looked at, tuned, and trained to its end."""

import hashlib
import json
import logging
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autotune import __version__, processes
from autotune.config import AUTO, Options
from autotune.detect import detect
from autotune.detect.monitor import watch
from autotune.detect.nvidia import used_bytes
from autotune.documents import ARITHMETIC, break_even_step
from autotune.environment import rank_environment, versions
from autotune.errors import (
    InputMissingError,
    NothingFitsError,
    SetupFaultError,
)
from autotune.hardware import Cluster, Rates
from autotune.intake import bench
from autotune.outcome import Crashed, Measured, Outcome, OutOfMemory, Rung, TimedOut, Unknown
from autotune.plan import Plan, make_plan
from autotune.probe.local import LocalProber
from autotune.probe.protocol import ProbeRequest, RungFailure, RungMeasurement
from autotune.probe.tenants import DeviceMemory
from autotune.rundir import RunDir, read_json, write_json, write_text
from autotune.script.arguments import (
    ACCUMULATION,
    CONFIG,
    GLOBAL_BATCH,
    MICRO_BATCH,
    STAGE,
    find_carriers,
    read_config,
)
from autotune.script.errand import ScriptErrand, merged, shimmed
from autotune.script.facts import ScriptFacts, facts_of
from autotune.script.launch import (
    SCRIPT_DEADLINES,
    Script,
    ScriptLauncher,
    ScriptProber,
    script_environment,
)
from autotune.script.migrate import ALL, Wishes, read_wishes
from autotune.script.profile import learned_profile, traced_profile
from autotune.script.site import (
    ScriptSite,
    carried,
    first_request,
    job_of,
    overrides,
    request_of,
)
from autotune.script.training import TunedCommand
from autotune.setting import Setting
from autotune.space import micro_batch_sizes, space_of
from autotune.staged import StagedRun, now
from autotune.throughput import DrawnRows
from autotune.tune.loop import Tuned, Tuner, describe, write_study
from autotune.tune.search import OneByOne
from autotune.units import format_bytes, format_count
from autotune.workload import Job, ModelProfile

_log = logging.getLogger(__name__)

_NOT_HONOURED = "NotHonoured"
_NEVER = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptQuestion:
    """What is asked for: a script, its arguments, and the devices.

    Attributes:
        maps: options of the script by what they carry, as the user says.
        config: the DeepSpeed config that an argument of the script names; empty if none does.
        wishes: what that config asks of a tuning.
    """

    options: Options
    script: Script
    cluster: Cluster
    maps: Mapping[str, str]
    config: Mapping[str, Any]
    wishes: Wishes
    fingerprint: str


def ask_script(
    options: Options, path: Path, arguments: Sequence[str], maps: Mapping[str, str]
) -> ScriptQuestion:
    """Find script, config and devices; quick.

    Raises:
        InputMissingError: there is no such script.
        UsageError: a mapped option is none of the script's arguments.
        ConfigError: the DeepSpeed config asks what cannot be meant.
    """
    if not path.is_file():
        msg = f"the script {path} is not there: name a Python file with --script"
        raise InputMissingError(msg)
    script = Script(
        path=path.absolute(), directory=Path.cwd().absolute(), arguments=tuple(arguments)
    )
    carriers = find_carriers(arguments, {}, maps, script.directory)
    config = (carriers.config_file and read_config(carriers.config_file)) or {}
    cluster = detect(options["devices"], options["device_memory"])
    facts = {
        "script": script.path.read_text(errors="replace"),
        "arguments": arguments,
        "maps": dict(maps),
        "config": config,
        "cluster": cluster.identity(),
        "device_memory": options["device_memory"],
        "versions": versions() | {"autotune": __version__},
    }
    text = json.dumps(facts, sort_keys=True)
    return ScriptQuestion(
        options=options,
        script=script,
        cluster=cluster,
        maps=maps,
        config=config,
        wishes=read_wishes(config),
        fingerprint=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
    )


def script_run_dir(question: ScriptQuestion) -> RunDir:
    """Return --run-dir, or runs/<script>-<first 8 of the fingerprint>."""
    if question.options["run_dir"]:
        return RunDir(Path(question.options["run_dir"]).absolute())
    name = f"{question.script.path.stem}-{question.fingerprint[:8]}"
    return RunDir(Path("runs").absolute() / name)


class ScriptRun(StagedRun[ScriptQuestion]):
    """One tuning of a script in its directory, resumed where it was left.

    The output of its training goes to the descriptor `stdout`, unless that is None.
    """

    differing = "another script, other arguments or devices"

    def __init__(
        self, question: ScriptQuestion, run_dir: RunDir, *, stdout: int | None = None
    ) -> None:
        super().__init__(question, run_dir)
        self._stdout = stdout

    def _stages(self, *, with_training: bool) -> dict[str, Any]:
        self._figures = self._figures_before() or self._tune_and_emit()
        result = self._write_result({"exit_reason": "tuned", "exit_code": 0} | self._figures)
        if with_training:
            self._enter("train")
            started = time.monotonic()
            self._command().run(stdout=self._stdout)
            seconds = {"training_seconds": time.monotonic() - started}
            result = self._write_result(
                {"exit_reason": "trained", "exit_code": 0} | self._figures | seconds
            )
        return result

    def _tune_and_emit(self) -> dict[str, Any]:
        question, started = self.question, time.monotonic()
        self._enter("detect")
        write_json(self.dir.run, self._run_json())
        write_json(self.dir.hardware, {"schema": 1, **asdict(question.cluster)})
        known = self.dir.read_rungs()
        before_s = sum(rung.seconds for rung in known)
        self._enter("profile")
        look = Look(question, self.dir, known, self._record)
        look.take()
        # What traces a model is forked from it.
        processes.start_server(
            rank_environment(question.cluster.kind, question.cluster.visible_devices)
        )
        profile, plan = look.plan()
        write_json(self.dir.profile, {"schema": 1, **asdict(profile)})
        write_json(self.dir.plan, _plan_document(look, profile, plan))
        self._enter("tune")
        tuned = self._tune(look, profile, plan, before_s + time.monotonic() - started)
        self._enter("emit")
        if tuned.best is None:
            msg = (
                f"no setting fits: all {len(tuned.rungs)} that were tried ran out of the "
                f"{format_bytes(plan.budget_bytes)} a rank. Use more or larger devices, shorter "
                "rows or a smaller model"
            )
            raise NothingFitsError(msg)
        self._emit(look, tuned.best.setting)
        figures = _figures(look, plan, tuned, before_s + time.monotonic() - started)
        self._chronicle.chosen(figures)
        return figures

    def _run_json(self) -> dict[str, Any]:
        question = self.question
        return {
            "schema": 1,
            "fingerprint": question.fingerprint,
            "script": {
                "path": str(question.script.path),
                "directory": str(question.script.directory),
                "arguments": list(question.script.arguments),
                "arg_map": dict(question.maps),
            },
            "options": question.options.to_json(),
            "versions": versions() | {"autotune": __version__},
        }

    def _record(self, rung: Rung) -> None:
        self.dir.append_rung(rung)
        self._chronicle.rung(rung)

    def _tune(self, look: "Look", profile: ModelProfile, plan: Plan, spent_s: float) -> Tuned:
        options, wishes = self.question.options, look.wishes
        budget = options["tune_budget"]
        most = options["max_probes"]
        if wishes.trials is not None and options.sources.get("max_probes") == "default":
            most = wishes.trials
        site = ScriptSite(look.facts, look.job, self.question.cluster)
        with look.prober(look.arguments_of) as prober:
            tuner = Tuner(
                plan,
                prober,
                site,
                look.rungs,
                record=self._record,
                parameters=profile.parameters,
                search=OneByOne,
                default=look.facts.own_setting(self.question.cluster),
            )
            try:
                return tuner.run(
                    max_probes=most,
                    budget_s=None if budget in {AUTO, None} else budget - spent_s,
                    tell_apart=False,
                )
            finally:
                write_study(tuner.study, self.dir.study)

    def _emit(self, look: "Look", setting: Setting) -> None:
        """Write the config, and the command that trains with it."""
        config = look.emitted(setting)
        write_json(self.dir.ds_config, config)
        changes = overrides(setting, look.ranks, setting.gradient_accumulation_steps)
        errand = ScriptErrand(device_kind=self.question.cluster.kind, overrides=changes)
        if look.needs_shim(setting):
            write_json(self.dir.errand, errand.to_json())
        arguments = look.carriers.arguments(
            self.question.script.arguments,
            carried(setting, look.ranks, setting.gradient_accumulation_steps)
            | {CONFIG: str(self.dir.ds_config)},
        )
        write_json(
            self.dir.train_args,
            {
                "schema": 1,
                "arguments": list(arguments),
                "gives_local_rank": look.knows_local_rank,
            },
        )
        write_text(self.dir.launch_script, self._command().by_hand(), mode=0o700)
        _log.info("the tuned command: %s", shlex.join(self._command().script.command(arguments)))

    def _command(self) -> TunedCommand:
        cluster, emitted = self.question.cluster, read_json(self.dir.train_args)
        errand = self.dir.errand
        return TunedCommand(
            script=self.question.script,
            arguments=tuple(emitted["arguments"]),
            ranks=cluster.num_devices,
            environment=script_environment(cluster),
            shim=shimmed({}, errand) if errand.exists() else {},
            gives_local_rank=emitted["gives_local_rank"],
        )


class Look:
    """A script looked at: its first process, as it is, and what follows from that."""

    def __init__(
        self,
        question: ScriptQuestion,
        run_dir: RunDir,
        known: Sequence[Rung],
        record: Callable[[Rung], None],
    ) -> None:
        self._question = question
        self._dir = run_dir
        self._record = record
        self.rungs = list(known)
        self.cluster = question.cluster
        self.ranks = question.cluster.num_devices
        self.wishes = question.wishes
        self.facts: ScriptFacts
        self.carriers = find_carriers(
            question.script.arguments, {}, self._maps, question.script.directory
        )
        self._sizes: tuple[int, ...] = ()

    @property
    def _maps(self) -> dict[str, str]:
        return {**self.wishes.mappings, **self._question.maps}

    @property
    def job(self) -> Job:
        """Return the script as a job, by what is known of it by now."""
        return job_of(self.facts, self._question.script.path.stem)

    @property
    def knows_local_rank(self) -> bool:
        return bool({"--local_rank", "--local-rank"} & self.facts.options.keys())

    def take(self) -> None:
        """Start the script as it is, once, and find out what it is and what it does.

        Raises:
            SetupFaultError: it ends before anything could be learned.
            NothingFitsError: it fits in no way.
        """
        tells = any(isinstance(rung.outcome, Measured | OutOfMemory) for rung in self.rungs)
        facts = facts_of(read_json(self._dir.script), self.ranks) if tells else None
        answer: RungMeasurement | RungFailure | None = None
        if facts is None:
            _log.info("starting the script as it is")
            answer = self._first()
            facts = facts_of(read_json(self._dir.script), self.ranks)
        if facts is None or (isinstance(answer, RungFailure) and not _is_memory(answer.outcome)):
            assert isinstance(answer, RungFailure), "a rung is measured of an engine"
            raise SetupFaultError(_why(answer.outcome, self._dir.logs))
        self._learn(facts)
        if answer is not None:
            self._keep(self.facts.own_setting(self.cluster), answer)
        if not any(isinstance(rung.outcome, Measured) for rung in self.rungs):
            self._start_smaller()
        self._require_sizes()

    def _learn(self, facts: ScriptFacts) -> None:
        """Take in what is known of the script now; says what it is."""
        self.facts = facts
        script = self._question.script
        if not self._question.config:
            # It makes its config itself, so that this is the first that is seen of it.
            self.wishes = read_wishes(facts.given)
            for note in self.wishes.notes:
                _log.info(note)
        self.wishes.require_within(facts.global_batch_size)
        self.carriers = find_carriers(
            script.arguments, facts.options, self._maps, script.directory, facts.carried
        )
        _log.info(
            "%s: %s, %s parameters, %s; micro-batch %d x accumulation %d on %d ranks are a global "
            "batch of %d, which is kept",
            script.path.name,
            facts.architecture,
            format_count(sum(facts.trained) + sum(facts.frozen)),
            facts.precision,
            facts.micro_batch_size,
            facts.accumulation,
            facts.ranks,
            facts.global_batch_size,
        )
        _log.info("carried by its own arguments: %s", self.carriers.label() or "nothing")
        _log.info(
            "one process a micro-batch size, as the script makes its own batches; what runs out of "
            "memory rules out all that needs as much"
        )
        sizes = micro_batch_sizes(facts.global_batch_size, self.ranks)
        self._sizes = self.wishes.sizes(sizes) or (facts.micro_batch_size,)

    def _first(self) -> RungMeasurement | RungFailure:
        changes: dict[str, Any] = {}
        stage = (self._question.config.get("zero_optimization") or {}).get("stage")
        if isinstance(stage, list) or stage == ALL:
            # Only DeepSpeed's autotuner takes such a one.
            changes["zero_optimization"] = {"stage": self.wishes.stages[0]}

        def arguments(request: ProbeRequest) -> Sequence[str]:
            if not ("autotuning" in self._question.config or changes):
                return self._question.script.arguments
            path = self._write_config(request, self._question.config)
            return self.carriers.arguments(self._question.script.arguments, {CONFIG: path})

        with self.prober(arguments, self._dir.script) as prober:
            return _only(prober, first_request(self.cluster, changes))

    def _start_smaller(self) -> None:
        """Find what fits where the script as it is does not."""
        own, cluster = self.facts, self.cluster
        _log.info("the script as it is runs out of memory; it is tried with less")
        stages = self.wishes.stages
        for stage in dict.fromkeys((own.zero_stage, stages[-1])):
            structure = own.structure(stage, **own.own_offload(cluster))
            setting = structure.with_micro_batch(self._sizes[0], self.ranks, own.global_batch_size)
            answer = self._try(setting, self._dir.script)
            if isinstance(answer, RungFailure):
                continue
            seen = facts_of(read_json(self._dir.script), self.ranks)
            assert seen is not None, "a rung was measured"
            self.facts = replace(
                seen,
                given=own.given,
                micro_batch_size=own.micro_batch_size,
                accumulation=own.accumulation,
                zero_stage=own.zero_stage,
            )
            self._keep(setting, answer)
            return
        msg = (
            f"no setting fits: a micro-batch of {self._sizes[0]} at ZeRO {stages[-1]} runs out of "
            f"the {format_bytes(cluster.device_memory_bytes)} a rank too. Use more or larger "
            "devices, shorter rows or a smaller model"
        )
        raise NothingFitsError(msg)

    def _try(self, setting: Setting, facts: Path | None = None) -> RungMeasurement | RungFailure:
        request = request_of([setting], self.job, self.cluster, self.facts)
        with self.prober(self.arguments_of, facts) as prober:
            return _only(prober, request)

    def _require_sizes(self) -> None:
        """Keep to the script's own micro-batch where it cannot be given another."""
        if self.facts.model_config is not None and MICRO_BATCH in self.carriers.options:
            return
        other = self._other_setting()
        if other is None:
            return
        answer = self._try(other)
        if isinstance(answer, RungFailure) and _is_not_honoured(answer.outcome):
            _log.warning(
                "the script keeps its micro-batch of %d (%s): only the rest is tuned",
                self.facts.micro_batch_size,
                _reason(answer.outcome),
            )
            self._sizes = (self.facts.micro_batch_size,)
            return
        self._keep(other, answer)

    def _other_setting(self) -> Setting | None:
        """Return a setting of another size beside one that was measured, which was not tried."""
        measured = [rung for rung in self.rungs if isinstance(rung.outcome, Measured)]
        tried = {rung.setting for rung in self.rungs}
        structure = measured[0].setting.structure
        size = measured[0].setting.micro_batch_size
        if any(rung.setting.micro_batch_size != size for rung in measured):
            return None
        larger = [one for one in self._sizes if one > size]
        smaller = [one for one in reversed(self._sizes) if one < size]
        for one in (*larger, *smaller):
            other = structure.with_micro_batch(one, self.ranks, self.facts.global_batch_size)
            if other not in tried:
                return other
        return None

    def _keep(self, setting: Setting, answer: RungMeasurement | RungFailure) -> None:
        site = ScriptSite(self.facts, self.job, self.cluster)
        failed = isinstance(answer, RungFailure)
        rung = Rung(
            setting=setting,
            ranks=self.ranks,
            lengths=site.lengths(setting),
            outcome=answer.outcome if failed else site.outcome(setting, answer),  # type: ignore[union-attr, arg-type] # as it failed or not
            at=now(),
            seconds=answer.seconds,
        )
        self.rungs.append(rung)
        self._record(rung)
        _log.info("%s: %s", setting.label(), describe(rung))

    def plan(self) -> tuple[ModelProfile, Plan]:
        """Estimate every setting by the model's trace, or by what the probes have shown."""
        facts, cluster = self.facts, self.cluster
        benched = bench(cluster)
        rates = benched.rates(facts.precision) or benched.rates("fp32")
        assert rates is not None, "every device multiplies in fp32"
        profile = traced_profile(facts, cluster, self._dir.logs / "profile.log")
        if profile is not None:
            return profile, self._planned(profile, rates)
        measured = [rung for rung in self.rungs if isinstance(rung.outcome, Measured)]
        without = learned_profile(facts, measured, rates)
        plan = self._planned(without, rates)
        first = min(measured, key=lambda rung: rung.setting.micro_batch_size)
        assert isinstance(first.outcome, Measured)
        row = plan.row_of(first.setting)
        left = 0.0 if row is None else first.outcome.peak_bytes - plan.memory.device_bytes[row]
        learned = learned_profile(facts, measured, rates, float(left))
        return learned, self._planned(learned, rates)

    def _planned(self, profile: ModelProfile, rates: Rates) -> Plan:
        facts, cluster = self.facts, self.cluster
        structures = facts.structures(self.wishes.stages, cluster)
        own = facts.own_setting(cluster)
        measured = [rung.setting.structure for rung in self.rungs]
        structures = tuple(dict.fromkeys((own.structure, *measured, *structures)))
        sizes = tuple(sorted({*self._sizes, *(one.setting.micro_batch_size for one in self.rungs)}))
        space = space_of(structures, sizes, facts.global_batch_size, self.ranks)
        rows = DrawnRows.draw(np.array(facts.tokens), seed=0)
        return make_plan(space, profile, self.job, cluster, rates, rows)

    @contextmanager
    def prober(
        self,
        arguments: Callable[[ProbeRequest], Sequence[str]],
        facts: Path | None = None,
    ) -> Iterator[ScriptProber]:
        """Give what tries the script with the arguments of a request, for the length of a block.

        `facts` is where the script is to be described.
        """
        cluster = self.cluster
        monitor = watch(cluster.visible_devices) if cluster.has_separate_memory else None
        local = LocalProber(
            self._dir.logs,
            deadlines=SCRIPT_DEADLINES,
            launcher=ScriptLauncher(self._question.script, cluster, arguments, facts),
            memory=DeviceMemory(used_bytes) if cluster.has_separate_memory else None,
            monitor=monitor,
        )
        try:
            yield ScriptProber(local)
        finally:
            if monitor is not None:
                monitor.close()

    def arguments_of(self, request: ProbeRequest) -> Sequence[str]:
        """Return the script's arguments for a probe of a setting."""
        config = request.ds_config
        values: dict[str, str | int | None] = {
            name: config[name] for name in (GLOBAL_BATCH, MICRO_BATCH, ACCUMULATION)
        }
        values[STAGE] = config["zero_optimization"]["stage"]
        if self.carriers.config_file is not None:
            given = read_config(self.carriers.config_file) or {}
            values[CONFIG] = self._write_config(request, given)
        return self.carriers.arguments(self._question.script.arguments, values)

    def _write_config(self, request: ProbeRequest, given: Mapping[str, Any]) -> str:
        directory = self._dir.configs
        directory.mkdir(mode=0o700, exist_ok=True)
        size = request.rungs[0].micro_batch_size
        path = directory / f"{request.label}-micro-batch-{size}.json"
        write_json(path, merged(given, request.ds_config))
        return str(path)

    def emitted(self, setting: Setting) -> dict[str, Any]:
        """Return the DeepSpeed config of a setting: the script's own besides what was tuned.

        What the script fills in itself is taken from what it did; but what depends on the number of
        updates, it fills in again.
        """
        changes = overrides(setting, self.ranks, setting.gradient_accumulation_steps)
        file = self.carriers.config_file
        given = (read_config(file) if file is not None else None) or self.facts.given
        return merged(_filled(given, self.facts.given), changes)

    def needs_shim(self, setting: Setting) -> bool:
        """Whether arguments alone do not bring a script to the config that was tuned."""
        own = self.facts
        if CONFIG in self.carriers.options:
            return False
        if "autotuning" in own.given:
            return True
        carried_keys = self.carriers.options.keys()
        structure = own.own_setting(self.cluster).structure
        stays = STAGE in carried_keys or setting.structure.zero_stage == own.zero_stage
        offload = setting.structure.offload_optimizer == structure.offload_optimizer
        sizes = setting.micro_batch_size == own.micro_batch_size or (
            {MICRO_BATCH, ACCUMULATION} <= carried_keys
        )
        return not (stays and offload and sizes)


def _filled(given: Mapping[str, Any], seen: Mapping[str, Any]) -> dict[str, Any]:
    """Replace `auto` by what it became, where that is known."""
    result: dict[str, Any] = {}
    for key, value in given.items():
        known = seen.get(key)
        if key == "scheduler":
            result[key] = value
        elif value == math.inf:
            # As accelerate says that nothing is to be printed; JSON has no such number.
            result[key] = _NEVER
        elif isinstance(value, Mapping):
            result[key] = _filled(value, known if isinstance(known, Mapping) else {})
        else:
            result[key] = known if value == AUTO and known is not None else value
    return result


def _only(prober: ScriptProber, request: ProbeRequest) -> RungMeasurement | RungFailure:
    with closing(prober.probe(request)) as answers:
        return next(iter(answers))


def _is_memory(outcome: Outcome) -> bool:
    return isinstance(outcome, OutOfMemory)


def _is_not_honoured(outcome: Outcome) -> bool:
    return isinstance(outcome, Crashed) and _NOT_HONOURED in outcome.reason


def _reason(outcome: Outcome) -> str:
    match outcome:
        case Crashed():
            return outcome.reason.partition(f"{_NOT_HONOURED}: ")[2] or outcome.reason
        case TimedOut():
            return f"no sign of life for {outcome.seconds:.0f} s in phase {outcome.phase}"
        case Unknown():
            return f"it ended with exit code {outcome.exit_code}"
        case _:
            return outcome.kind.replace("_", " ")


def _why(outcome: Outcome, logs: Path) -> str:
    """Say why nothing could be learned of a script."""
    evidence = getattr(outcome, "evidence", "")
    return (
        f"the script cannot be tuned: {_reason(outcome)}. What its ranks wrote is in {logs}; the "
        f"end of it:\n{evidence}"
    ).rstrip()


def _plan_document(look: Look, profile: ModelProfile, plan: Plan) -> dict[str, Any]:
    """Return plan.json, as that of a dataset is but for what only its model and rows can have."""
    figures = asdict(profile)
    figures.pop("traces")
    rows = plan.listed_rows()
    settings = plan.entries(rows)
    for entry, terms in zip(settings, plan.terms.rows(rows), strict=True):
        entry |= {"terms": terms, "source": ARITHMETIC}
    tokens = look.facts.tokens
    return {
        "schema": 1,
        "model": {"name": look.job.model, **figures},
        "cluster": asdict(look.cluster),
        "job": asdict(look.job),
        "pins": {},
        "rows": {"longest": max(tokens), "mean": statistics.fmean(tokens), "count": None},
        "settings": settings,
        "counts": {"kept": int(plan.kept.sum()), "rejected_by_rule": plan.rejected_by_rule()},
        "near_misses": [],
    }


def _figures(look: Look, plan: Plan, tuned: Tuned, tuning_s: float) -> dict[str, Any]:
    """Return what result.json says of the tuning."""
    best = tuned.best
    assert best is not None
    assert isinstance(best.outcome, Measured)
    default = tuned.default.outcome if tuned.default else None
    speed = default.tokens_per_s if isinstance(default, Measured) else None
    row = plan.row_of(best.setting)
    own = look.facts.own_setting(look.cluster)
    return {
        "setting": best.setting.to_json(),
        "global_batch_size": look.facts.global_batch_size,
        "tokens_per_s": best.outcome.tokens_per_s,
        "samples_per_s": best.outcome.samples_per_s,
        "step_time_s": best.outcome.step_time_s,
        "default": {"setting": own.to_json(), "tokens_per_s": speed},
        "gain_over_default": best.outcome.tokens_per_s / speed if speed else None,
        "memory": {
            "predicted_bytes": None if row is None else plan.memory.row(row)["device_bytes"],
            "measured_bytes": best.outcome.peak_bytes,
            "budget_bytes": plan.budget_bytes,
        },
        "probes": len(tuned.rungs),
        "rungs": len(tuned.rungs),
        "cached_rungs": 0,
        "stopped_by": tuned.stopped_by,
        "tuning_seconds": tuning_s,
        "notes": list(look.wishes.notes),
        "break_even_step": break_even_step(default, best.outcome, tuning_s),
    }

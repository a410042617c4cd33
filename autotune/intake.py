"""Takes in what is asked: finds model, data and devices, and puts them into figures."""

import hashlib
import importlib.util
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autotune import __version__, processes
from autotune.config import Options
from autotune.dataset import Rows, Rules, Source, content_hash, prepare
from autotune.dataset.packing import require_separation
from autotune.dataset.rows import REPORTED
from autotune.dataset.splitting import num_held_out
from autotune.detect import detect
from autotune.devices import (
    NODE_NETWORK_BYTES_PER_S,
    NodeGpus,
    canonical_name,
    known_gpu,
    named_cluster,
    named_rates,
)
from autotune.emit import ds_config, train_spec
from autotune.environment import cache_dir, rank_environment, versions
from autotune.errors import (
    ConfigError,
    InputMissingError,
    NoUsableDeviceError,
    SetupFaultError,
    UsageError,
    VirtualRunUnavailableError,
)
from autotune.hardware import Bench, Cluster, DeviceKind, Links, Rates
from autotune.knobs import NO_PINS, Pins
from autotune.memory import shards_of
from autotune.model_source import ModelSource, find_model
from autotune.nodes.bench import bench_of_all
from autotune.nodes.control import Nodes
from autotune.optimizer import ADAFACTOR, ADAMW_8BIT, Limit, limits_of
from autotune.partial_checkpointing import with_partial_checkpointing
from autotune.plan import Plan, make_plan
from autotune.profile.request import TraceRequest
from autotune.profile.virtual import VirtualRequest, VirtualRun, virtual_run
from autotune.rundir import cached, read_json, write_json, writing
from autotune.setting import CHUNKED, FLASH_ATTENTION, WHOLE, Setting
from autotune.space import (
    CHECKPOINTING_MODES,
    PARTIAL_CHECKPOINTING,
    Space,
    enumerate_space,
    micro_batch_sizes,
)
from autotune.throughput import DrawnRows, Ints, Rebalanced
from autotune.units import MIB, format_count
from autotune.user_config import read_user_config
from autotune.variants import (
    may_rebalance,
    with_frugal,
    with_nvme,
    with_overlap,
    with_partition,
    with_rebalancing,
)
from autotune.workload import DatasetProfile, Job, Lora, ModelProfile, Trace

if TYPE_CHECKING:
    from autotune.dataset.making import Example
    from autotune.dataset.preparing import Watch

_log = logging.getLogger(__name__)

EXACT_SETTINGS = 3
"""How many settings of a plan are run virtually: a run of a large model takes a minute."""

_MEMORY_STEP = 256 * MIB

ATTENTION = "sdpa"
_BF16_CAPABILITY = (8, 0)


_OF_NO_MATTER = (
    *("model", "dataset", "run_dir", "ds_config", "no_cache", "strict_handoff"),
    *("storage", "on_event"),
)
"""Options that do not make another run of it; model, data and config count by their content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedHardware:
    """GPUs that are named to plan for, and need not be there; the network is that of a node."""

    gpus: tuple[NodeGpus, ...]
    nodes: int = 1
    network_bytes_per_s: float = NODE_NETWORK_BYTES_PER_S

    @property
    def num_devices(self) -> int:
        return sum(node.count for node in self.gpus) * self.nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked for, where it would run, and the name of the answer.

    Attributes:
        deepspeed: what the user's own DeepSpeed config says besides options and pins.
        notes: what was decided about what is asked that its asker should know of.
        nodes: of the launch that this process is part of; None where nobody looked.
    """

    named: NamedHardware | None

    options: Options
    cluster: Cluster
    source: ModelSource
    dataset: tuple[Source, ...]
    fingerprint: str
    pins: Pins = NO_PINS
    deepspeed: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    nodes: Nodes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The question looked into: model and data in figures, every setting estimated.

    `drawn` are the rows as training draws and splits them. `rows` is how many sequences an epoch
    has; None where neither a dataset nor a number was named.
    """

    question: Question
    job: Job
    profile: ModelProfile
    rates: Rates
    dataset: DatasetProfile | None
    drawn: DrawnRows
    rows: int | None
    plan: Plan

    @property
    def lengths(self) -> Ints:
        """Tokens of each row."""
        return self.drawn.lengths


def ask(
    options: Options, named: NamedHardware | None = None, nodes: Nodes | None = None
) -> Question:
    """Find model, data and devices, detected or named; quick, nothing heavy is imported.

    Detected are the devices of all `nodes`, or of this machine.

    Raises:
        AutotuneError: one of them is not there or cannot be used.
    """
    source = find_model(options["model"])
    options, pins, kept, notes = _with_user_config(options)
    if options["method"] == "full" and options["optimizer"] != ADAFACTOR:
        # What a model recommends is for training all of it, and its rate for AdamW.
        options = options.recommended(source.recommended, source.name)
    dataset = tuple(Source.parse(text) for text in options["dataset"] or ())
    if named is None:
        found = detect if nodes is None else nodes.detect
        cluster = found(options["devices"], options["device_memory"])
    else:
        cluster = named_cluster(named.gpus, named.nodes, options["device_memory"])
    # Only asked for their refusal, before minutes are spent on model and data.
    require_installed(options, here=named is None)
    micro_batch_sizes(options["global_batch_size"], cluster.num_devices)
    facts = {
        "model": source.content_hash(),
        "dataset": [(content_hash(source.path), source.weight) for source in dataset],
        "cluster": cluster.identity(),
        "versions": versions() | {"autotune": __version__},
        "options": {
            name: value for name, value in options.values.items() if name not in _OF_NO_MATTER
        },
    }
    if kept:
        facts["deepspeed"] = kept
    text = json.dumps(facts, sort_keys=True)
    return Question(
        named=named,
        options=options,
        cluster=cluster,
        source=source,
        dataset=dataset,
        fingerprint=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        pins=pins,
        deepspeed=kept,
        notes=(*notes, *_told(options, cluster, here=named is None)),
        nodes=nodes,
    )


def _told(options: Options, cluster: Cluster, *, here: bool) -> tuple[str, ...]:
    """Say what was chosen because the devices are as they are."""
    reason = why_precision(options["precision"], cluster)
    unusable = f"planned only, as {cluster.unusable}" if cluster.unusable else None
    flash = None
    if here and cluster.has_separate_memory and not options["packing"]:
        why_not = _why_not_flash(cluster, options["precision"], here=True)
        flash = why_not and f"attention {FLASH_ATTENTION} is not tried, as it {why_not}"
    return tuple(note for note in (unusable, reason, flash) if note)


def require_usable(cluster: Cluster) -> None:
    """Refuse devices that can only be planned for.

    Raises:
        NoUsableDeviceError: with the reason.
    """
    if cluster.unusable is not None:
        raise NoUsableDeviceError(cluster.unusable)


def require_installed(options: Options, *, here: bool) -> None:
    """Refuse what needs a library that is not installed.

    Layers in 4 bits are the library's in a plan too; an optimizer is only where it runs `here`.

    Raises:
        ConfigError: it is missing; the text says what needs it and how it is installed.
    """
    needs = _what_quantises(options)
    needed = here or options["method"] == "qlora"
    if needs and needed and importlib.util.find_spec("bitsandbytes") is None:
        msg = (
            f"{' and '.join(needs)} needs the package bitsandbytes, which is not installed: "
            "pip install 'autotune-launcher[bitsandbytes]'"
        )
        raise ConfigError(msg)


def _what_quantises(options: Options) -> list[str]:
    return [
        *([f"--optimizer {ADAMW_8BIT}"] if options["optimizer"] == ADAMW_8BIT else []),
        *(["--method qlora"] if options["method"] == "qlora" else []),
    ]


def require_working(question: Question, log: Path) -> None:
    """Refuse what does not work here, before anything is spent: what quantises, or a drive.

    Raises:
        ConfigError: the text has what the library says, or which directory is needed.
    """
    from autotune.profile.child import check_quantising

    options = question.options
    nvme = options["nvme_path"]
    if nvme is not None and not (Path(nvme).is_dir() and os.access(nvme, os.W_OK | os.X_OK)):
        msg = (
            f"--nvme-path {nvme} is no directory that can be written to: make one on an NVMe "
            "drive, at the same place on each node"
        )
        raise ConfigError(msg)
    needs = _what_quantises(options)
    if needs:
        precision = choose_precision(options["precision"], question.cluster)
        check_quantising(needs, options["optimizer"], precision, question.cluster.kind, log)


def _with_user_config(options: Options) -> tuple[Options, Pins, dict[str, Any], tuple[str, ...]]:
    """Return options and pins with what the user's DeepSpeed config says, its rest, and notes.

    Raises:
        InputMissingError: the file cannot be read.
        ConfigError: it is no DeepSpeed config.
    """
    pins, name = Pins.of(options["set"] or {}), options["ds_config"]
    if name is None:
        return options, pins, {}, ()
    try:
        text = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        msg = f"the DeepSpeed config {name} cannot be read: {error.strerror}"
        raise InputMissingError(msg) from None
    except UnicodeDecodeError:
        msg = f"{name} is not JSON: it is not UTF-8"
        raise ConfigError(msg) from None
    user = read_user_config(text, name, options, pins)
    return user.options, user.pins, user.kept, user.notes


def start_processes(question: Question) -> None:
    """Start the server that ranks are forked from; it imports while the data is read."""
    cluster = question.cluster
    # What is only named, or cannot be opened here, is looked into without it.
    kind = "cpu" if question.named or cluster.unusable else cluster.kind
    processes.start_server(rank_environment(kind, cluster.visible_devices))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaginedRows:
    """What is trained on where no dataset is named: so many rows, all as long.

    Attributes:
        seq_length: tokens of a row; None is as many as a row may have.
        rows: of an epoch; None leaves the length of the training open.
    """

    seq_length: int | None = None
    rows: int | None = None


def look_into(
    question: Question,
    *,
    dataset_dir: Path,
    logs: Path,
    imagined: ImaginedRows = ImaginedRows(),
    attention: str = "auto",
    checkpointing: tuple[str, ...] = CHECKPOINTING_MODES,
    watch: "Watch | None" = None,
) -> Workload:
    """Profile the model, tokenise the data, and estimate every setting.

    Of the checkpointing modes those are tried that the model has; pins of the question go before
    what is said here. `watch` is told how far tokenising has come.

    Raises:
        UsageError: rows are asked for that are longer than the model takes.
    """
    model = _look_at_model(question, attention, checkpointing, logs)
    data = _look_at_data(question, model, dataset_dir, imagined, watch)
    return _workload(question, model, data, logs)


def compare(
    question: Question,
    hardware: Sequence[NamedHardware],
    *,
    dataset_dir: Path,
    logs: Path,
    imagined: ImaginedRows,
) -> "list[Workload | UsageError]":
    """Look into the same question for each hardware; a refusal is that of a global batch.

    The data is read once, the model traced once for each kind of device and precision.

    Raises:
        UsageError: rows are asked for that are longer than the model takes.
    """
    models: dict[tuple[str, str], _Model] = {}
    data: _Data | None = None
    found: list[Workload | UsageError] = []
    for named in hardware:
        cluster = named_cluster(named.gpus, named.nodes, question.options["device_memory"])
        one = replace(question, named=named, cluster=cluster)
        precision = choose_precision(question.options["precision"], cluster)
        traced = cluster.kind, precision
        if traced not in models:
            models[traced] = _look_at_model(one, "auto", CHECKPOINTING_MODES, logs)
        data = data or _look_at_data(one, models[traced], dataset_dir, imagined)
        try:
            found.append(_workload(one, models[traced], data, logs))
        except UsageError as refusal:
            found.append(refusal)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    job: Job
    profile: ModelProfile


def _look_at_model(
    question: Question, attention: str, checkpointing: tuple[str, ...], logs: Path
) -> _Model:
    options, source, pins = question.options, question.source, question.pins
    precision = choose_precision(options["precision"], question.cluster)
    checkpointing = tuple(map(str, pins.get("checkpointing", checkpointing)))

    def traced(attention: str, loss: str = WHOLE) -> ModelProfile:
        return _profile(
            options,
            source,
            precision,
            question.cluster.kind,
            logs,
            attention=attention,
            loss=loss,
            padded=bool(question.dataset),
            checkpointing=checkpointing,
        )

    for name in pins.get("attention", ()):
        _require_attention(str(name), question)
    first, *pinned = map(traced, map(str, pins.get("attention", (attention,))))
    others = tuple((other.attention, other.traces) for other in pinned)
    if attention == "auto" and "attention" not in pins and flash_runs(question):
        others = _traces_if_there(traced, FLASH_ATTENTION)
    profile = replace(first, other_attentions=others)
    if CHUNKED in pins.get("loss", ()):
        chunked = tuple((name, traced(name, CHUNKED).traces) for name in profile.attentions)
        profile = replace(profile, chunked=chunked)
    limit = _within("--max-seq-length", options["max_seq_length"], profile.max_position_embeddings)
    _log.info(
        "model %s: %s, %s parameters, %s",
        source.name,
        profile.architecture,
        format_count(profile.parameters),
        precision,
    )
    job = _job(options, source, precision, limit)
    return _Model(job=replace(job, deepspeed=question.deepspeed), profile=profile)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    profile: DatasetProfile | None
    lengths: Ints
    rows: int | None


def _look_at_data(
    question: Question,
    model: _Model,
    dataset_dir: Path,
    imagined: ImaginedRows,
    watch: "Watch | None" = None,
) -> _Data:
    options, source = question.options, question.source
    job, profile, limit = model.job, model.profile, model.job.max_seq_length
    if not question.dataset:
        asked = _within("--seq-length", imagined.seq_length, profile.max_position_embeddings)
        return _Data(profile=None, lengths=np.array([min(asked, limit)]), rows=imagined.rows)
    rules = Rules.from_options(options.values)
    if rules.packing:
        require_separation(
            source.directory, profile.attention, trust_remote_code=job.trust_remote_code
        )
    dataset = prepare(
        question.dataset,
        model_dir=source.tokenizer_directory,
        max_seq_length=limit,
        output=dataset_dir,
        trust_remote_code=job.trust_remote_code,
        vocab_size=profile.vocab_size,
        rules=rules,
        cache=cache_dir() / "datasets",
        watch=watch,
    )
    lengths = Rows.open(dataset_dir).lengths
    _log.info(describe_dataset(dataset))
    for warning in dataset.warnings:
        _log.info("  %s", warning)
    return _Data(profile=dataset, lengths=lengths, rows=len(lengths))


def on_one_node(workload: Workload, logs: Path) -> Workload:
    """Return a node's share of the job, on one node of its cluster.

    Rows a rank and micro-steps are the same, so that its settings are settings of the whole too.
    """
    question, job = workload.question, workload.job
    cluster = question.cluster
    ranks, node = cluster.ranks_per_node, of_one_node(cluster)
    rows = job.global_batch_size * ranks // cluster.num_devices
    return _workload(
        replace(question, cluster=node),
        _Model(job=replace(job, global_batch_size=rows), profile=workload.profile),
        _Data(profile=workload.dataset, lengths=workload.lengths, rows=workload.rows),
        logs,
        workload.rates.of_one_node(),
    )


def of_one_node(cluster: Cluster) -> Cluster:
    """Return the first of the cluster's nodes."""
    ranks = cluster.ranks_per_node
    return replace(
        cluster,
        num_devices=ranks,
        num_nodes=1,
        devices_per_node=0,
        visible_devices=cluster.visible_devices[:ranks],
    )


def _workload(
    question: Question, model: _Model, data: _Data, logs: Path, known: Rates | None = None
) -> Workload:
    """Estimate every setting; the rates of the devices are looked up unless they are known."""
    cluster, named, job = question.cluster, question.named, model.job
    rates = known or (
        _rates(cluster, job.precision, question.nodes)
        if named is None
        else _named_rates(named, job.precision)
    )
    drawn = DrawnRows.draw(data.lengths, job.seed, _rebalanced(question, job, data.lengths, logs))
    return _planned(question, model, data, rates, drawn)


def replanned(workload: Workload, rates: Rates) -> Workload:
    """Return a workload as it is planned with these rates."""
    model = _Model(job=workload.job, profile=workload.profile)
    data = _Data(profile=workload.dataset, lengths=workload.lengths, rows=workload.rows)
    return _planned(workload.question, model, data, rates, workload.drawn)


def _planned(
    question: Question, model: _Model, data: _Data, rates: Rates, drawn: DrawnRows
) -> Workload:
    cluster, job, profile = question.cluster, model.job, model.profile
    space = enumerate_space(
        cluster,
        job.global_batch_size,
        attentions=profile.attentions,
        checkpointing_modes=tuple(mode for mode, _ in profile.traces),
        pins=question.pins,
        limits=limits(job, profile, question),
    )

    def estimate(space: Space) -> Plan:
        return make_plan(space, profile, job, cluster, rates, drawn)

    plan = with_overlap(estimate(space), estimate, cluster, question.pins)
    plan = with_partition(plan, estimate, cluster, question.pins)
    if drawn.rebalanced:
        plan = with_rebalancing(plan, estimate, question.pins)
    if job.nvme_path is not None:
        plan = with_nvme(plan, estimate, question.pins)
    plan = with_frugal(plan, estimate, profile, question.pins)
    if "checkpointing" not in question.pins and plan.has_place_between():
        plan = with_partial_checkpointing(plan, PARTIAL_CHECKPOINTING, profile.num_layers)
    return Workload(
        question=question,
        job=job,
        profile=profile,
        rates=rates,
        dataset=data.profile,
        drawn=drawn,
        rows=data.rows,
        plan=plan,
    )


def _rebalanced(
    question: Question, job: Job, lengths: Ints, logs: Path
) -> dict[int, Rebalanced] | None:
    """Return the rows as `batch_rebalance` splits them, by micro-steps; None if it cannot win."""
    from autotune.profile.child import rebalanced

    ranks = question.cluster.num_devices
    if not may_rebalance(lengths, job.global_batch_size, question.pins):
        return None
    return rebalanced(
        lengths,
        logs / "rebalance.log",
        global_batch_size=job.global_batch_size,
        ranks=ranks,
        # Divisors of what a rank has are its micro-batch sizes and its numbers of micro-steps.
        accumulations=micro_batch_sizes(job.global_batch_size, ranks),
        seed=job.seed,
        epochs=math.ceil(
            job.max_steps * job.global_batch_size / len(lengths) if job.max_steps else job.epochs
        ),
    )


def limits(job: Job, profile: ModelProfile, question: Question) -> dict[str, Limit]:
    """Return what DeepSpeed cannot do together with what is asked for, by knob."""
    return limits_of(
        job.optimizer,
        profile.trainable_parameters,
        question.cluster.num_devices,
        in_4_bits=bool(profile.quantised_sizes),
        nvme=job.nvme_path is not None,
    )


def describe_dataset(profile: DatasetProfile) -> str:
    """Return a line for people."""
    parts = [
        f"data {profile.path}: {profile.rows} rows in {profile.format} form",
        f"{profile.rows_used} used, {profile.rows_reported} left out",
        f"{format_count(profile.tokens)} tokens, {format_count(profile.trained_tokens)} trained",
        f"lengths {profile.min_length} to {profile.max_length}, mean {profile.mean_length:.0f}",
    ]
    if profile.sequences != profile.rows_used:
        parts.append(f"{profile.sequences} sequences an epoch")
    if profile.tokens_lost:
        shares = ", ".join(f"{limit}: {share:.1%}" for limit, share in profile.coverage)
        parts.append(f"whole within a limit of {shares}")
    return ", ".join(parts)


def choose_precision(asked: str, cluster: Cluster) -> Any:  # noqa: ANN401 - a Precision
    """Return the precision; `auto` is what the device is made for.

    fp32 on a CPU, bf16 on GPUs that compute in it (compute capability 8.0 on), fp16 on older ones.
    """
    if asked != "auto":
        return asked
    if cluster.kind == "cpu":
        return "fp32"
    return "bf16" if _has_bf16(cluster) else "fp16"


def _has_bf16(cluster: Cluster) -> bool:
    capability = cluster.compute_capability
    return capability is None or capability >= _BF16_CAPABILITY


def why_precision(asked: str, cluster: Cluster) -> str | None:
    """Say why GPUs that have no bf16 compute as they do; None of all others."""
    if not cluster.has_separate_memory or _has_bf16(cluster):
        return None
    assert cluster.compute_capability is not None, "what it lacks is known by it"
    which = f"{cluster.device_name} has compute capability {_version(cluster.compute_capability)}"
    if asked == "auto":
        return f"computes in fp16 with loss scaling, as {which}, and bf16 needs 8.0"
    if asked == "bf16":
        return (
            f"--precision bf16 is emulated and slow, as {which}, and it needs 8.0: fp16 is faster"
        )
    return None


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _traces_if_there(
    traced: Callable[[str], ModelProfile], attention: str
) -> tuple[tuple[str, tuple[tuple[str, Trace], ...]], ...]:
    """Trace a model with another attention too; nothing if it does not have it."""
    try:
        return ((attention, traced(attention).traces),)
    except ConfigError as error:
        _log.info("%s is not tried: %s", attention, error)
        return ()


def flash_runs(question: Question) -> bool:
    """Tell whether FlashAttention's own package is installed here and its kernel can be used.

    Of packed rows only sdpa and eager are known to keep apart what shares a row.
    """
    if question.named is not None or question.options["packing"]:
        return False
    asked = question.options["precision"]
    return _why_not_flash(question.cluster, asked, here=True) is None


def _require_attention(attention: str, question: Question) -> None:
    """Refuse FlashAttention's own package where its kernel does not run, or is not there to run.

    Raises:
        ConfigError: the devices are no GPUs or too old, the precision has more than 16 bits, or the
            package is missing on devices that are here.
    """
    if attention != FLASH_ATTENTION:
        return
    asked, here = question.options["precision"], question.named is None
    if (reason := _why_not_flash(question.cluster, asked, here=here)) is not None:
        msg = f"attention {FLASH_ATTENTION} {reason}, or use sdpa"
        raise ConfigError(msg)


def _why_not_flash(cluster: Cluster, precision: str, *, here: bool) -> str | None:
    """Say what FlashAttention's package lacks, and how to help it; None if it lacks nothing."""
    if not cluster.has_separate_memory:
        return "needs GPUs: name some with --gpus"
    if not _has_bf16(cluster):
        return "needs GPUs of compute capability 8.0 or more"
    if choose_precision(precision, cluster) == "fp32":
        return "computes in bf16 or fp16: choose one with --precision"
    if here and importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn, which is not installed: install it"
    return None


def _within(flag: str, asked: int | None, limit: int) -> int:
    """Return the tokens that a row may have.

    Raises:
        UsageError: more than the model has positions for.
    """
    if asked is not None and asked > limit:
        msg = f"{flag} {asked} is beyond the {limit} positions of the model: use {limit} or less"
        raise UsageError(msg)
    return asked or limit


def _job(options: Options, source: ModelSource, precision: Any, max_seq_length: int) -> Job:  # noqa: ANN401
    return Job(
        model=source.name,
        model_dir=str(source.directory),
        from_scratch=source.from_scratch,
        precision=precision,
        max_seq_length=max_seq_length,
        lora=lora_of(options),
        trainer=tuple(sorted((options["trainer"] or {}).items())),
        save_every_s=options["save_every"],
        eval_share=options["eval_share"],
        nvme_path=options["nvme_path"] and str(Path(options["nvme_path"]).absolute()),
        **{
            name: options[name]
            for name in (
                "trust_remote_code",
                "method",
                "optimizer",
                "merge",
                "learning_rate",
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


def lora_of(options: Options) -> Lora | None:
    """Return the adapters of methods lora and qlora, None of full training."""
    if options["method"] == "full":
        return None
    return Lora(
        rank=options["lora_rank"],
        alpha=options["lora_alpha"],
        dropout=options["lora_dropout"],
        targets=tuple(options["lora_targets"]),
        quantised=options["method"] == "qlora",
    )


def _profile(
    options: Options,
    source: ModelSource,
    precision: Any,  # noqa: ANN401 - a Precision
    device_kind: DeviceKind,
    logs: Path,
    **run: Any,  # noqa: ANN401 - how it is to run, by the fields of a TraceRequest
) -> ModelProfile:
    from autotune.profile.child import profile_from_json, traced

    request = TraceRequest(
        model_dir=str(source.directory),
        trust_remote_code=options["trust_remote_code"],
        precision=precision,
        device_kind=device_kind,
        lora=lora_of(options),
        **run,
    )
    config = hashlib.blake2b((source.directory / "config.json").read_bytes()).hexdigest()
    # Where the configuration lies does not matter to what it says.
    asked = replace(request, model_dir="")
    path = _cache_path("profiles", config, asked, __version__, versions())
    return cached(path, lambda: traced(request, logs / "profile.log"), profile_from_json)


def _rates(cluster: Cluster, precision: str, nodes: Nodes | None = None) -> Rates:
    """Return what the ranks of this machine do, measured once.

    Of devices that torch cannot open here it is what the table of known GPUs says.

    Raises:
        SetupFaultError: torch cannot use the devices, or not in this precision.
        NoUsableDeviceError: it cannot open them, and they are not in the table.
    """
    if cluster.unusable and read_bench(cluster) is None:
        return _rates_of_table(cluster, precision)
    rates = bench(cluster, nodes=nodes).rates(precision)
    if rates is not None and cluster.num_nodes > 1:
        within = bench(of_one_node(cluster)).rates(precision)
        assert within is not None, "what all ranks multiply in, those of a node do"
        rates = replace(
            rates,
            node_link_bytes_per_s=within.link_bytes_per_s,
            node_collective_overhead_s=within.collective_overhead_s,
        )
    if rates is None:
        msg = (
            f"torch cannot multiply matrices in {precision} on {cluster.device_name}: choose "
            "another --precision"
        )
        raise SetupFaultError(msg)
    return rates


def _rates_of_table(cluster: Cluster, precision: str) -> Rates:
    """Return the rates of named GPUs, their links as they are wired here."""
    gpu = known_gpu(cluster.device_name)
    if gpu is None:
        require_usable(cluster)
        raise AssertionError(cluster)
    named = NamedHardware(gpus=(NodeGpus(cluster.num_devices, gpu),))
    return _named_rates(named, precision, cluster.links)


def bench(cluster: Cluster, *, anew: bool = False, nodes: Nodes | None = None) -> Bench:
    """Measure what the ranks of this machine, or of all nodes, do, or return what was before.

    Raises:
        SetupFaultError: torch cannot use the devices.
    """
    from autotune.profile.child import benched

    require_usable(cluster)
    known = None if anew else read_bench(cluster)
    if known is not None:
        return known
    processes.start_server(rank_environment(cluster.kind, cluster.visible_devices))
    if cluster.num_nodes > 1:
        assert nodes is not None, "several nodes were detected by themselves"
        measured = bench_of_all(nodes, cluster)
    else:
        with tempfile.TemporaryDirectory(prefix="autotune-bench-") as scratch:
            measured = benched(
                cluster.kind, cluster.threads_per_rank, cluster.num_devices, Path(scratch)
            )
    path = _bench_path(cluster)
    with writing(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(path, {"device_name": cluster.device_name, "bench": measured})
    return Bench.from_json(measured)


def read_bench(cluster: Cluster) -> Bench | None:
    """Return what `bench` measured on such a machine; None if it has not, or cannot be read."""
    known = _read_bench(_bench_path(cluster))
    return known[1] if known else None


def _read_bench(path: Path) -> tuple[str, Bench] | None:
    document = read_json(path)
    try:
        return str(document["device_name"]), Bench.from_json(document["bench"])
    except (KeyError, TypeError, ValueError):
        return None


def _bench_path(cluster: Cluster) -> Path:
    host = cluster.host
    facts = host and (host.cpu_name, host.sockets, host.physical_cores, host.usable_cores)
    return _cache_path("bench", cluster.identity(), facts, versions(), __version__)


def _named_rates(named: NamedHardware, precision: str, links: Links | None = None) -> Rates:
    """Return the rates of the table, or those of this machine's bench where it has such devices."""
    rates = named_rates(named.gpus, named.nodes, precision, named.network_bytes_per_s, links)
    names = {node.gpu.name for node in named.gpus}
    benches = filter(None, map(_read_bench, sorted((cache_dir() / "bench").glob("*.json"))))
    alike = [one for device, one in benches if {canonical_name(device)} == names]
    if not alike:
        return rates
    same_count = [one for one in alike if one.ranks == named.num_devices]
    measured = (same_count or alike)[0].rates(precision)
    if measured is None or same_count:
        return measured or rates
    # What ranks exchange and how they share a host depends on how many they are.
    return replace(
        measured,
        link_bytes_per_s=rates.link_bytes_per_s,
        host_memory_bytes_per_s=rates.host_memory_bytes_per_s,
        collective_overhead_s=rates.collective_overhead_s,
        node_link_bytes_per_s=rates.node_link_bytes_per_s,
        node_collective_overhead_s=rates.node_collective_overhead_s,
    )


def _cache_path(kind: str, *facts: object) -> Path:
    key = hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()
    return cache_dir() / kind / f"{key}.json"


def estimate_setting(workload: Workload, setting: Setting) -> Plan:
    """Return a plan of one setting, which need not be one that a search would try."""
    cluster = workload.question.cluster
    space = Space(
        structures=(setting.structure,),
        structure_index=np.zeros(1, dtype=np.int64),
        micro_batch_size=np.array([setting.micro_batch_size]),
        gradient_accumulation_steps=np.array([setting.gradient_accumulation_steps]),
        ranks=cluster.num_devices,
    )
    return make_plan(space, workload.profile, workload.job, cluster, workload.rates, workload.drawn)


def run_virtually(workload: Workload, setting: Setting, log: Path) -> VirtualRun:
    """Step the real engine of a setting over fake tensors, on rows as long as the longest; cached.

    Raises:
        VirtualRunUnavailableError: it cannot be run so here.
    """
    job, cluster = workload.job, workload.question.cluster
    spec = train_spec(job, setting, cluster, dataset_dir="", output_dir="", model_output_dir="")
    # What is free changes all the time, and matters only as far as the weights fit in twice.
    steady = cluster.device_memory_bytes // _MEMORY_STEP * _MEMORY_STEP
    shards = shards_of(workload.profile, cluster.num_devices, setting.structure)
    rows, length = workload.drawn.heaviest(
        setting.structure.sampling, setting.micro_batch_size, setting.gradient_accumulation_steps
    )
    request = VirtualRequest(
        spec=replace(spec, device_memory_bytes=steady if cluster.has_separate_memory else 0),
        ds_config=ds_config(job, setting, workload.profile, cluster),
        ranks=cluster.num_devices,
        micro_batch_size=rows,
        gradient_accumulation_steps=setting.gradient_accumulation_steps,
        seq_length=length,
        # A row is padded to the longest of its micro-batch.
        padded=bool(workload.question.dataset) and rows > 1,
        rank=shards.worst_rank if setting.structure.zero_stage in {1, 2} else 0,
    )
    # The model counts by its content, wherever it is.
    facts = replace(request, spec=replace(request.spec, model_dir=""))
    content = workload.question.source.content_hash()
    path = _cache_path("virtual", facts, content, versions(), __version__)
    return cached(path, lambda: asdict(virtual_run(request, log)), lambda it: VirtualRun(**it))


def run_best_virtually(workload: Workload, logs: Path) -> dict[int, VirtualRun]:
    """Run the best settings of the plan virtually, and return what was seen by their rows.

    Those that cannot be run so are left out, and the log says why.
    """
    plan, seen = workload.plan, {}
    for row in plan.ranking()[:EXACT_SETTINGS].tolist():
        setting = plan.space.setting(row)
        _log.info("virtual run of %s", setting.label())
        try:
            seen[row] = run_virtually(workload, setting, logs / f"virtual-{row}.log")
        except VirtualRunUnavailableError as error:
            _log.warning("answered by arithmetic, as %s", error)
    return seen


def total_steps(workload: Workload) -> int | None:
    """Return the optimizer steps of the training; an epoch's last batch may be incomplete.

    None if it was not said how many rows there are.
    """
    job = workload.job
    if job.max_steps is not None:
        return job.max_steps
    if workload.rows is None:
        return None
    rows = workload.rows - num_held_out(workload.rows, job.eval_share)
    # As the Trainer counts them.
    return math.ceil(job.epochs * -(-rows // job.global_batch_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectedData:
    """Data in figures, its first sequences, and what turns their tokens into text."""

    profile: DatasetProfile
    examples: "list[Example]"
    decode: Callable[[list[int]], str]
    reported: Path | None


def inspect_data(
    options: Options, output: Path, *, examples: int, watch: "Watch | None"
) -> InspectedData:
    """Tokenise the data without looking into the model further than its configuration.

    Raises:
        AutotuneError: model or data are not there or cannot be used.
    """
    from autotune.dataset.preparing import first_examples

    source = find_model(options["model"])
    positions, vocabulary = source.limits()
    limit = _within("--max-seq-length", options["max_seq_length"], positions)
    sources = [Source.parse(text) for text in options["dataset"]]
    rules = Rules.from_options(options.values)
    if rules.packing:
        require_separation(
            source.directory, ATTENTION, trust_remote_code=options["trust_remote_code"]
        )
    cache = cache_dir() / "datasets"
    profile = prepare(
        sources,
        model_dir=source.tokenizer_directory,
        max_seq_length=limit,
        output=output,
        trust_remote_code=options["trust_remote_code"],
        vocab_size=vocabulary,
        rules=rules,
        cache=cache,
        watch=watch,
    )
    shown, decode = first_examples(
        sources[0],
        examples,
        model_dir=source.tokenizer_directory,
        max_seq_length=limit,
        trust=options["trust_remote_code"],
        rules=rules,
    )
    key = Rows.open(output).meta.content_key
    reported = cache / key / REPORTED if profile.rows_reported else None
    return InspectedData(profile=profile, examples=shown, decode=decode, reported=reported)

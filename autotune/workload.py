"""What is to be trained: the job, its data in figures, its model in figures."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from autotune.optimizer import Optimizer
from autotune.setting import BY_MODEL, WHOLE

Precision = Literal["bf16", "fp16", "fp32"]

_DEFAULT_BUCKET_ELEMENTS = 500_000_000

COMPUTE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}


ALL_LINEAR = "all-linear"
"""Every linear layer but the head that makes the logits: what peft takes the word for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters, which are trained beside frozen weights (arXiv:2106.09685).

    Attributes:
        rank: inner dimension of an adapter.
        alpha: an adapter's output is scaled by alpha / rank.
        dropout: share of an adapter's inputs that is dropped.
        targets: last names of the layers that get one, or `all-linear` alone.
        quantised: whether the frozen linear layers are in 4 bits (QLoRA, arXiv:2305.14314).
    """

    rank: int
    alpha: int
    dropout: float
    targets: tuple[str, ...]
    quantised: bool = False

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Lora":
        return cls(**fields | {"targets": tuple(fields["targets"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the user asked for; nothing in here is ever changed silently.

    `model_dir` holds config.json and the tokenizer, and weights unless `from_scratch`. There is a
    `lora` where the method trains adapters; `merge` adds its adapters to the weights in the end.
    `deepspeed` is what the user's own DeepSpeed config says besides the rest.
    `trainer` are the user's own arguments of transformers' TrainingArguments, by name.
    `nvme_path` is the directory for what is offloaded to NVMe, if there is one.
    `host_adam` is whose AdamW updates what is offloaded: DeepSpeed's, which has to be compiled, or
    torch's.
    """

    model: str
    model_dir: str
    from_scratch: bool
    trust_remote_code: bool
    method: str
    precision: Precision
    max_seq_length: int
    global_batch_size: int
    epochs: float
    max_steps: int | None
    learning_rate: float
    lr_scheduler: str
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    optimizer: Optimizer = "adamw"
    lora: Lora | None = None
    merge: bool = False
    deepspeed: dict[str, Any] = field(default_factory=dict)
    trainer: tuple[tuple[str, Any], ...] = ()
    eval_share: float = 0.0
    save_every_s: float | None = None
    host_adam: Literal["deepspeed", "torch"] = "deepspeed"
    nvme_path: str | None = None

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element of the type that the model computes in."""
        return COMPUTE_BYTES[self.precision]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetProfile:
    """A dataset in figures. Lengths are tokens a sequence, after truncation to the sequence limit.

    Attributes:
        rows: lines of the files that are not blank; each is used or reported.
        rows_reported: rows that are left out, for a reason that is written down.
        rows_bad: those of them that break their convention.
        rows_overlong: those of them that are beyond the limit and dropped for it.
        rows_without_trained_tokens: those of them that truncation left nothing to train on.
        sequences: what an epoch trains on; weights and templates can make more or fewer than rows.
        tokens: of the sequences, as `trained_tokens` and the lengths are.
        tokens_lost: tokens that truncation or dropping took away.
        coverage: for common limits, the share of the sequences that are no longer.
        histogram: for each power of two, the sequences that are no longer but above the one before.
        packing: whether sequences share rows.
        warnings: what a user should know of the data, a sentence each.
    """

    path: str
    format: str
    rows: int
    rows_used: int
    rows_truncated: int
    rows_without_trained_tokens: int
    tokens: int
    tokens_lost: int
    trained_tokens: int
    min_length: int
    mean_length: float
    max_length: int
    percentiles: tuple[tuple[int, int], ...]
    rows_reported: int = 0
    rows_bad: int = 0
    rows_overlong: int = 0
    sequences: int = 0
    coverage: tuple[tuple[int, float], ...] = ()
    histogram: tuple[tuple[int, int], ...] = ()
    packing: bool = False
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "DatasetProfile":
        """Read what `asdict` and JSON made of a profile.

        Raises:
            TypeError: a field is missing, unknown, or not a list where one should be.
        """
        tuples = {
            name: tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value)
            for name, value in fields.items()
            if isinstance(value, list)
        }
        return cls(**(fields | tuples))


@dataclass(frozen=True, slots=True, kw_only=True)
class Polynomial:
    """m * (c0 + c1 s + c2 s^2) for a micro-batch of m rows, each s tokens long.

    Rows of a batch do not interact, so a traced quantity grows linearly in m; attention is what
    makes it quadratic in s.
    """

    c0: float
    c1: float
    c2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A moment of a pass at which its memory can peak; short rows peak at another than long ones.

    Attributes:
        rows_bytes: live bytes besides parameters and gradients that are handed over, for each row.
        batch_bytes: those that do not depend on the number of rows, as of a gradient just made.
        logits_bytes: the share of `rows_bytes` in tensors as wide as the vocabulary.
        gradients: elements of the parameters whose gradients are handed over by then.
        hands_over: whether a gradient is handed over just then, as when a bucket is reduced.
        lengths: the shortest and the longest row that it may be the peak for.
    """

    rows_bytes: Polynomial
    batch_bytes: Polynomial
    logits_bytes: Polynomial
    gradients: float
    hands_over: bool
    lengths: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One way to run the model's forward and backward pass, traced.

    Attributes:
        one_row: moments of a batch of a single row, one of which is the peak, whatever its length
            and the ZeRO stage are.
        more_rows: the same of larger batches, for which torch makes some copies more.
        flops: forward and backward, recomputation included.
        operators: operators that a forward and backward pass starts.
    """

    one_row: tuple[Moment, ...]
    more_rows: tuple[Moment, ...]
    flops: Polynomial
    operators: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model in figures; `traces` is keyed by the checkpointing mode.

    Attributes:
        trained_sizes: elements of each parameter that is trained, in the order of the model.
        frozen_sizes: the same of the others, but for those in 4 bits.
        quantised_sizes: elements of each parameter that is in 4 bits.
        factored_elements: what Adafactor keeps of the trained ones: of a matrix a row and a column.
        attention: of `traces`.
        other_attentions: further attention implementations, each with traces of its own.
        chunked: traces with the loss in chunks, by attention, where that is asked for.
    """

    architecture: str
    parameters: int
    trainable_parameters: int
    largest_layer_parameters: int
    largest_parameter: int
    trained_sizes: tuple[int, ...]
    frozen_sizes: tuple[int, ...]
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    attention: str
    precision: Precision
    traces: tuple[tuple[str, Trace], ...]
    other_attentions: tuple[tuple[str, tuple[tuple[str, Trace], ...]], ...] = ()
    factored_elements: int = 0
    quantised_sizes: tuple[int, ...] = ()
    chunked: tuple[tuple[str, tuple[tuple[str, Trace], ...]], ...] = ()

    @property
    def attentions(self) -> tuple[str, ...]:
        """The attention implementations that were traced, the one of `traces` first."""
        return (self.attention, *(name for name, _ in self.other_attentions))

    @property
    def bucket_elements(self) -> int:
        """What DeepSpeed is to communicate at once, and keeps a buffer for.

        Its own default, or the whole of a smaller model, in an even number, as ZeRO 1 and 2 ask.
        """
        return min(_DEFAULT_BUCKET_ELEMENTS, 2 * -(-self.trainable_parameters // 2))

    def bucket(self, asked: int) -> int:
        """Return what is asked for; `BY_MODEL` is `bucket_elements`."""
        return self.bucket_elements if asked == BY_MODEL else asked

    def prefetch(self, asked: int) -> int:
        """Return what ZeRO 3 is to gather ahead; `BY_MODEL` is two layers, at most a bucket."""
        if asked != BY_MODEL:
            return asked
        return min(self.bucket_elements, 2 * self.largest_layer_parameters)

    def longer_than(self, elements: int) -> int:
        """Count the parameters of more elements."""
        return sum(size > elements for size in self.trained_sizes + self.frozen_sizes)

    def trace(self, checkpointing: str, attention: str | None = None, loss: str = WHOLE) -> Trace:
        """Return the trace of one way to run the model, by the attention of `traces` unless told.

        Raises:
            KeyError: it was not traced.
        """
        whole = {self.attention: self.traces, **dict(self.other_attentions)}
        by_attention = whole if loss == WHOLE else dict(self.chunked)
        return dict(by_attention[attention or self.attention])[checkpointing]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """What the engine is built from besides the DeepSpeed config: the content of train_args.json.

    Attributes:
        dataset_dir: memory-mapped rows.
        model_output_dir: where the trained model goes: all of it, or the adapters of `lora`
            unless `merge` adds them to the weights.
        trainer: keyword arguments of transformers' TrainingArguments.
        device_memory_bytes: what a rank may allocate; enforced where the device can.
        eval_share: share of the rows that is held out of the training to evaluate on.
        save_every_s: seconds after which a checkpoint is saved at the end of a step.
        probed_tokens: padded tokens of the largest micro-batch that the setting was probed with.
        rank_cpus: logical CPUs near the device of each rank of a node; empty where any will do.
        expandable_segments: whether the device's allocator grows its segments.
    """

    model_dir: str
    from_scratch: bool
    trust_remote_code: bool
    precision: Precision
    attention: str
    checkpointing: str
    dataset_dir: str
    model_output_dir: str
    device_kind: str
    device_memory_bytes: int
    threads_per_rank: int
    seed: int
    trainer: dict[str, Any]
    lora: Lora | None = None
    merge: bool = False
    eval_share: float = 0.0
    save_every_s: float | None = None
    probed_tokens: int | None = None
    loss: str = WHOLE
    rank_cpus: tuple[tuple[int, ...], ...] = ()
    expandable_segments: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "TrainSpec":
        rest = {name: value for name, value in fields.items() if name != "schema"}
        if rest.get("lora"):
            rest["lora"] = Lora.from_json(rest["lora"])
        rest["rank_cpus"] = tuple(map(tuple, rest.get("rank_cpus", ())))
        return cls(**rest)

"""What a script is like, as its first process has shown. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotune.errors import SetupFaultError
from autotune.hardware import Cluster
from autotune.script.arguments import ACCUMULATION, GLOBAL_BATCH, MICRO_BATCH, STAGE
from autotune.setting import ZERO_STAGES, Setting, Structure
from autotune.workload import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptFacts:
    """A script as it is.

    Attributes:
        options: those that its parser has, with `value` and `takes_value` of each.
        given: the DeepSpeed config that it gives to deepspeed.initialize.
        micro_batch_size, accumulation, zero_stage: its own.
        trained, frozen: elements of each parameter; empty where no engine was made.
        model_config: of transformers' config, if the model has one.
        lengths: tokens of the rows that were seen.
    """

    given: Mapping[str, Any]
    micro_batch_size: int
    accumulation: int
    ranks: int
    zero_stage: int
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    trained: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    architecture: str = "unknown"
    model_config: Mapping[str, Any] | None = None
    attention: str | None = None
    checkpointing: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation * self.ranks

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the lengths of its rows; rows of what is no language model are one each."""
        return self.lengths if self.model_config is not None and self.lengths else (1,)

    @property
    def carried(self) -> Mapping[str, int]:
        """Return what its arguments say of its own setting, as far as they carry it."""
        return {
            MICRO_BATCH: self.micro_batch_size,
            ACCUMULATION: self.accumulation,
            GLOBAL_BATCH: self.global_batch_size,
            STAGE: self.zero_stage,
        }

    @property
    def precision(self) -> Precision:
        """Return what the model computes in: the config says so, or its weights."""
        if self._is_on("bf16") or (self.dtype == "bfloat16" and not self.scales_loss):
            return "bf16"
        return "fp16" if self.scales_loss or self.dtype == "float16" else "fp32"

    @property
    def scales_loss(self) -> bool:
        return self._is_on("fp16")

    def _is_on(self, name: str) -> bool:
        section = self.given.get(name)
        return isinstance(section, Mapping) and section.get("enabled") is True

    def structure(self, zero_stage: int, **knobs: Any) -> Structure:  # noqa: ANN401 - of a Structure
        """Return a structure of this model: what the script decides of it is as it is."""
        return Structure(
            zero_stage=zero_stage,
            checkpointing="full" if self.checkpointing else "none",
            attention=self.attention or "sdpa",
            **knobs,
        )

    def own_setting(self, cluster: Cluster) -> Setting:
        return Setting(
            structure=self.structure(self.zero_stage, **self.own_offload(cluster)),
            micro_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self.accumulation,
        )

    def own_offload(self, cluster: Cluster) -> dict[str, str]:
        """Return what the script offloads; on a CPU there is no other memory to offload to."""
        if not cluster.has_separate_memory:
            return {}
        return {name: device for name, device in self._offloads() if device != "none"}

    def _offloads(self) -> Sequence[tuple[str, str]]:
        zero = self.given.get("zero_optimization")
        sections = zero if isinstance(zero, Mapping) else {}
        return [
            (name, str((sections.get(name) or {}).get("device") or "none"))
            for name in ("offload_optimizer", "offload_param")
        ]

    def structures(self, stages: Sequence[int], cluster: Cluster) -> tuple[Structure, ...]:
        """Return the structures to try: what the user offloads stays offloaded.

        Where nothing is, and there is another memory, offloading the optimizer is tried too.
        """
        keeps = {name for name, device in self._offloads() if device != "none"}
        least = 3 if "offload_param" in keeps else 1 if "offload_optimizer" in keeps else 0
        own = self.own_offload(cluster)
        found = [self.structure(stage, **own) for stage in stages if stage >= least]
        if not keeps and cluster.has_separate_memory:
            found += [
                self.structure(stage, offload_optimizer="cpu") for stage in stages if stage > 0
            ]
        return tuple(found)


def facts_of(document: Mapping[str, Any] | None, ranks: int) -> ScriptFacts | None:
    """Read what a rank wrote of its script; None where it never came to deepspeed.initialize.

    Raises:
        SetupFaultError: neither an engine nor its config say how large the global batch is.
    """
    if document is None or "given" not in document:
        return None
    config = document.get("merged") or {}
    micro, accumulation = (
        document.get(name) or _whole(config.get(key))
        for name, key in (("micro_batch_size", MICRO_BATCH), ("accumulation", ACCUMULATION))
    )
    whole = document.get("global_batch_size") or _whole(config.get(GLOBAL_BATCH))
    micro = micro or (whole and whole // (ranks * (accumulation or 1)))
    if not micro:
        msg = (
            "the script's DeepSpeed config names no batch size, and no engine was made: give it "
            f"{MICRO_BATCH} and {ACCUMULATION}"
        )
        raise SetupFaultError(msg)
    accumulation = accumulation or (whole // (ranks * micro) if whole else 1)
    stage = document.get("zero_stage")
    if stage is None:
        stage = _whole((config.get("zero_optimization") or {}).get("stage")) or 0
    of_the_model: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in document.items()
        if name in _OF_THE_MODEL
    }
    return ScriptFacts(
        given=document["given"],
        options=document.get("options") or {},
        micro_batch_size=micro,
        accumulation=max(1, accumulation),
        ranks=ranks,
        zero_stage=stage if stage in ZERO_STAGES else 0,
        **of_the_model,
    )


_OF_THE_MODEL = (
    *("dtype", "trained", "frozen", "architecture", "model_config", "attention"),
    *("checkpointing", "lengths"),
)


def _whole(value: object) -> int | None:
    return value if type(value) is int else None

"""The script's model in figures: traced if transformers has it, else learned from two probes."""

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from autotune import __version__
from autotune.environment import cache_dir, versions
from autotune.errors import ConfigError
from autotune.hardware import Cluster, Rates
from autotune.outcome import Measured, Rung
from autotune.profile.request import TraceRequest
from autotune.rundir import cached, write_json
from autotune.script.facts import ScriptFacts
from autotune.workload import ModelProfile, Moment, Polynomial, Trace

_log = logging.getLogger(__name__)

_NOTHING = Polynomial(c0=0.0, c1=0.0, c2=0.0)
_ANY_LENGTH = (0, 2**31)


def traced_profile(facts: ScriptFacts, cluster: Cluster, log: Path) -> ModelProfile | None:
    """Trace the model by its configuration; None where that does not make the script's model."""
    if facts.model_config is None:
        return None
    mode = "full" if facts.checkpointing else "none"
    with tempfile.TemporaryDirectory(prefix="autotune-model-") as directory:
        config = dict(facts.model_config)
        write_json(Path(directory) / "config.json", config)
        request = TraceRequest(
            model_dir=directory,
            trust_remote_code=False,
            attention=facts.attention or "auto",
            precision=facts.precision,
            device_kind=cluster.kind,
            checkpointing=(mode,),
        )
        try:
            profile = _cached_trace(request, config, log)
        except ConfigError as error:
            _log.info("%s; its memory is learned from probes instead", error)
            return None
    parameters = sum(facts.trained) + sum(facts.frozen)
    if (profile.parameters, profile.trainable_parameters) != (parameters, sum(facts.trained)):
        _log.info(
            "the script's model has %d parameters and one by its configuration %d: its memory is "
            "learned from probes instead",
            parameters,
            profile.parameters,
        )
        return None
    return profile if dict(profile.traces).keys() == {mode} else None


def _cached_trace(request: TraceRequest, config: object, log: Path) -> ModelProfile:
    from autotune.profile.child import profile_from_json, traced

    asked = replace(request, model_dir="")
    key = hashlib.blake2b(repr((config, asked, __version__, versions())).encode(), digest_size=16)
    path = cache_dir() / "profiles" / f"{key.hexdigest()}.json"
    return cached(path, lambda: traced(request, log), profile_from_json)


def learned_profile(
    facts: ScriptFacts, rungs: Sequence[Rung], rates: Rates, left_bytes: float = 0.0
) -> ModelProfile:
    """Return a profile by which memory and time grow with the rows as they did in the probes.

    Args:
        facts: of the script.
        rungs: of one structure, measured at two micro-batch sizes, or at one if there are no more.
        rates: of the devices.
        left_bytes: what was measured of the smaller beyond what the profile without them says.
    """
    measured = sorted(
        (rung.setting.micro_batch_size, rung.outcome)
        for rung in rungs
        if isinstance(rung.outcome, Measured)
    )
    (small, first), (large, last) = measured[0], measured[-1]
    times = [one.accumulate_s[0][1] for one in (first, last)]
    if large > small:
        a_row_bytes = max(0.0, (last.peak_bytes - first.peak_bytes) / (large - small))
        a_row_s = max(0.0, (times[1] - times[0]) / (large - small))
    else:
        a_row_bytes, a_row_s = 0.0, times[0] / small
    start_s = max(0.0, times[0] - small * a_row_s)
    trainable = sum(facts.trained)
    rows_bytes = Polynomial(c0=a_row_bytes, c1=0.0, c2=0.0)
    batch_bytes = Polynomial(c0=max(0.0, left_bytes), c1=0.0, c2=0.0)
    forward = Moment(
        rows_bytes=rows_bytes,
        batch_bytes=batch_bytes,
        logits_bytes=_NOTHING,
        gradients=0.0,
        hands_over=False,
        lengths=_ANY_LENGTH,
    )
    backward = replace(forward, rows_bytes=_NOTHING, gradients=float(trainable), hands_over=True)
    moments = (forward, backward)
    largest = max((*facts.trained, *facts.frozen), default=1)
    trace = Trace(
        one_row=moments,
        more_rows=moments,
        flops=Polynomial(c0=a_row_s * rates.matmul_flops_per_s, c1=0.0, c2=0.0),
        operators=start_s / rates.operator_overhead_s,
    )
    return ModelProfile(
        architecture=facts.architecture,
        parameters=trainable + sum(facts.frozen),
        trainable_parameters=trainable,
        largest_layer_parameters=largest,
        largest_parameter=largest,
        trained_sizes=facts.trained,
        frozen_sizes=facts.frozen,
        num_layers=1,
        hidden_size=1,
        vocab_size=1,
        max_position_embeddings=1,
        attention=facts.attention or "sdpa",
        precision=facts.precision,
        traces=(("full" if facts.checkpointing else "none", trace),),
    )

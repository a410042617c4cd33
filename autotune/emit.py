"""Turns a setting into what the engine takes: the DeepSpeed config and the trainer's arguments."""

import shlex
from collections.abc import Sequence
from typing import Any

from autotune.hardware import Cluster
from autotune.optimizer import ADAFACTOR, ADAMW_8BIT, OF_TRANSFORMERS
from autotune.setting import NVME, Setting
from autotune.workload import Job, ModelProfile, TrainSpec
from autotune.zero import MAX_LIVE_PARAMETERS, NVME_BUFFERS, NVME_SUB_GROUP_ELEMENTS

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8

_CHECKPOINTS_A_TRAINING = 4

_SCALED_LOSS = {
    "enabled": True,
    "loss_scale": 0,
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
"""Gradients of fp16 are kept from vanishing by a loss scale that is found as training goes: 0 says
so. The others are DeepSpeed's defaults."""


def without_overflow(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with which no update is skipped: of a probe, whose updates are measured.

    The scale of fp16 begins at 2^16, at which gradients overflow until it has been halved often
    enough, and an update that overflows is left out.
    """
    if not config["fp16"]["enabled"]:
        return config
    return config | {"fp16": config["fp16"] | {"initial_scale_power": 0}}


BETWEEN_STEPS_NOTHING = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "report_to": "none",
}
"""Arguments of a Trainer that is stepped by hand."""


def ds_config(
    job: Job, setting: Setting, profile: ModelProfile, cluster: Cluster
) -> dict[str, Any]:
    """Return the DeepSpeed config of a setting, every value literal.

    What the user's own config says besides is in it as it is, and goes before ours.
    """
    ours = {
        "train_batch_size": job.global_batch_size,
        "train_micro_batch_size_per_gpu": setting.micro_batch_size,
        "gradient_accumulation_steps": setting.gradient_accumulation_steps,
        "gradient_clipping": job.max_grad_norm,
        **_optimizer(job, cluster, setting),
        "zero_optimization": _zero(job, setting, profile),
        "bf16": {"enabled": job.precision == "bf16"},
        "fp16": _SCALED_LOSS if job.precision == "fp16" else {"enabled": False},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    return _merged(ours, _applicable(job, setting))


def _applicable(job: Job, setting: Setting) -> dict[str, Any]:
    """Return a user's config without the sections of what the setting does not offload.

    And without the optimizer's, where that is none that DeepSpeed's config can name.
    """
    theirs = job.deepspeed
    if job.optimizer == ADAMW_8BIT:
        theirs = {key: value for key, value in theirs.items() if key != "optimizer"}
    if "zero_optimization" not in theirs:
        return theirs
    nowhere = [
        section
        for section in ("offload_optimizer", "offload_param")
        if getattr(setting.structure, section) == "none"
    ]
    zero = theirs["zero_optimization"]
    kept = {key: value for key, value in zero.items() if key not in nowhere}
    return theirs | {"zero_optimization": kept}


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        both = isinstance(value, dict) and isinstance(ours.get(key), dict)
        merged[key] = _merged(ours[key], value) if both else value
    return merged


def _optimizer(job: Job, cluster: Cluster, setting: Setting) -> dict[str, Any]:
    """Return the keys that name the optimizer.

    DeepSpeed takes any of torch's by its name. Others are handed to it, by the Trainer for instance
    (`optim` of its arguments), and ZeRO has to be told that this is meant.
    """
    if job.optimizer == ADAMW_8BIT:
        return {"zero_allow_untested_optimizer": True}
    if job.optimizer == ADAFACTOR:
        params = {"lr": job.learning_rate, "weight_decay": job.weight_decay}
        return {"optimizer": {"type": "Adafactor", "params": params}}
    config: dict[str, Any] = {
        "optimizer": {"type": "AdamW", "params": _adamw(job, cluster, setting)}
    }
    if _on_host(cluster, setting) and job.host_adam == "torch":
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def _adamw(job: Job, cluster: Cluster, setting: Setting) -> dict[str, Any]:
    params: dict[str, Any] = {
        "lr": job.learning_rate,
        "betas": list(ADAM_BETAS),
        "eps": ADAM_EPS,
        "weight_decay": job.weight_decay,
    }
    # Without torch_adam DeepSpeed compiles a C++ or CUDA optimizer; on the host, offloaded, that is
    # the fast one and wanted, elsewhere torch's own is as fast and needs no compiler.
    if not _on_host(cluster, setting):
        params["torch_adam"] = True
        if cluster.has_separate_memory:
            # Otherwise its update takes temporaries there, three as long as all that it updates.
            params["fused"] = True
    elif job.host_adam == "torch":
        params["torch_adam"] = True
    return params


def _on_host(cluster: Cluster, setting: Setting) -> bool:
    """Tell whether states are offloaded to a memory that is not the device's."""
    return setting.structure.offload_optimizer != "none" and cluster.has_separate_memory


def _zero(job: Job, setting: Setting, profile: ModelProfile) -> dict[str, Any]:
    structure = setting.structure
    zero: dict[str, Any] = {"stage": structure.zero_stage}
    if structure.zero_stage == 0:
        return zero
    zero |= {
        "contiguous_gradients": True,
        "overlap_comm": structure.overlap_comm,
        "reduce_bucket_size": profile.bucket(structure.reduce_bucket_size),
    }
    if structure.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": structure.offload_optimizer, "pin_memory": True}
    if structure.offload_optimizer == NVME:
        zero["offload_optimizer"] |= {"nvme_path": job.nvme_path, "buffer_count": NVME_BUFFERS}
        zero["sub_group_size"] = NVME_SUB_GROUP_ELEMENTS
    if structure.zero_stage < 3:  # noqa: PLR2004 - a ZeRO stage
        return zero | {
            "allgather_partitions": True,
            "allgather_bucket_size": profile.bucket(structure.allgather_bucket_size),
        }
    if structure.offload_param != "none":
        zero["offload_param"] = {"device": structure.offload_param, "pin_memory": True}
    if structure.zero_hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = structure.zero_hpz_partition_size
    return zero | {
        "stage3_prefetch_bucket_size": profile.prefetch(structure.stage3_prefetch_bucket_size),
        "stage3_param_persistence_threshold": structure.stage3_param_persistence_threshold,
        "stage3_max_live_parameters": MAX_LIVE_PARAMETERS,
        "stage3_max_reuse_distance": MAX_LIVE_PARAMETERS,
        "stage3_gather_16bit_weights_on_model_save": True,
    }


def train_spec(
    job: Job,
    setting: Setting,
    cluster: Cluster,
    *,
    dataset_dir: str,
    output_dir: str,
    model_output_dir: str,
    probed_tokens: int | None = None,
) -> TrainSpec:
    """Return what the trainer gets besides the DeepSpeed config, in agreement with it.

    `probed_tokens` is the size of the largest micro-batch that it was probed with.
    """
    return TrainSpec(
        model_dir=job.model_dir,
        from_scratch=job.from_scratch,
        trust_remote_code=job.trust_remote_code,
        precision=job.precision,
        attention=setting.structure.attention,
        checkpointing=setting.structure.checkpointing,
        dataset_dir=dataset_dir,
        model_output_dir=model_output_dir,
        device_kind=cluster.kind,
        device_memory_bytes=cluster.device_memory_bytes,
        threads_per_rank=setting.structure.threads_per_rank or cluster.threads_per_rank,
        seed=job.seed,
        trainer=_trainer_arguments(job, setting, output_dir),
        lora=job.lora,
        merge=job.merge,
        eval_share=job.eval_share,
        save_every_s=job.save_every_s,
        probed_tokens=probed_tokens,
        loss=setting.structure.loss,
        rank_cpus=cluster.rank_cpus,
        expandable_segments=setting.structure.expandable_segments,
    )


def _trainer_arguments(job: Job, setting: Setting, output_dir: str) -> dict[str, Any]:
    # The Trainer refuses what disagrees with the config.
    theirs = job.deepspeed.get("optimizer", {}).get("params", {})
    betas = theirs.get("betas", ADAM_BETAS)
    optim = {"optim": OF_TRANSFORMERS[job.optimizer]} if job.optimizer == ADAMW_8BIT else {}
    evaluation = {"eval_strategy": "epoch", "prediction_loss_only": True} if job.eval_share else {}
    return {
        "output_dir": output_dir,
        "per_device_train_batch_size": setting.micro_batch_size,
        "gradient_accumulation_steps": setting.gradient_accumulation_steps,
        "num_train_epochs": job.epochs,
        "max_steps": job.max_steps or -1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": job.lr_scheduler,
        # Below one this is a share of the steps.
        "warmup_steps": job.warmup_ratio,
        "weight_decay": job.weight_decay,
        "max_grad_norm": job.max_grad_norm,
        **optim,
        **({"torch_compile": True} if setting.structure.torch_compile else {}),
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "adam_epsilon": theirs.get("eps", ADAM_EPS),
        "bf16": job.precision == "bf16",
        "fp16": job.precision == "fp16",
        "seed": job.seed,
        "data_seed": job.seed,
        "train_sampling_strategy": setting.structure.sampling,
        "dataloader_drop_last": False,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no" if job.save_every_s else "steps",
        # Below one this is a share of the steps too; the last step is always saved.
        "save_steps": 1 / _CHECKPOINTS_A_TRAINING,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_eval_batch_size": setting.micro_batch_size,
        **evaluation,
        **dict(job.trainer),
    }


def launch_script(
    python: str, num_ranks: int, environment: Sequence[tuple[str, str]], num_nodes: int = 1
) -> str:
    """Return launch.sh: the training command by hand, without the tuner."""
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment)
    here = "Starts the tuned training by hand" if num_nodes == 1 else _BY_HAND_ON_NODES
    meeting = "" if num_nodes == 1 else _MEETING_BY_HAND
    command = [shlex.join(torchrun_command(python, num_ranks))]
    if num_nodes > 1:
        command = [
            shlex.join([python, "-m", "torch.distributed.run"]),
            f"--nnodes={num_nodes} --nproc-per-node={num_ranks // num_nodes}",
            '--rdzv-backend=c10d --rdzv-id="$RDZV_ID" --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT"',
            shlex.join(entry_arguments()),
        ]
    return f"""#!/usr/bin/env bash
# {here}, from the two emitted files alone. What it writes goes to
# by-hand/ beside this script; give --output-dir to choose another place.
set -euo pipefail
umask 077
CDPATH= cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")"
{exports}
{meeting}exec {" ".join(command)} --output-dir by-hand "$@"
"""


_BY_HAND_ON_NODES = "Starts the tuned training by hand, once on each node (in a Slurm allocation: \
srun --ntasks-per-node=1\n# bash launch.sh; elsewhere with MASTER_ADDR, a name of the first node)"

_MEETING_BY_HAND = """\
if [ -z "${MASTER_ADDR:-}" ]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
MASTER_PORT=${MASTER_PORT:-29400}
RDZV_ID=${RDZV_ID:-${SLURM_JOB_ID:-by-hand}}
"""


def torchrun_command(python: str, num_ranks: int, files: str = "") -> list[str]:
    """Return the command that trains from the emitted files in the current directory, on one node.

    `files` is put before their names.
    """
    return [
        python,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        # Port 0: the rendezvous takes a free one, so that two trainings never meet.
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        f"--nproc-per-node={num_ranks}",
        *entry_arguments(files),
    ]


def entry_arguments(files: str = "") -> list[str]:
    """Return what torchrun is to start for a training from the emitted files."""
    return [
        "-m",
        "autotune.train.entry",
        "--ds-config",
        f"{files}ds_config.json",
        "--train-args",
        f"{files}train_args.json",
    ]

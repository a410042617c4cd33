"""A config for `accelerate launch`, for a script of the user's own."""

from autotune.exports.deepspeed import without_optimizer
from autotune.exports.tuned import DS_CONFIG, Export, TunedRun, as_yaml, attention

_ZERO_3 = 3


def export(tuned: TunedRun) -> Export:
    notes = _left_to_the_script(tuned)
    return Export(
        files={
            # Read from wherever the script is started.
            "accelerate.yaml": launch_config(tuned, f"{tuned.directory}/{DS_CONFIG}", notes),
            DS_CONFIG: without_optimizer(tuned.ds_config),
        },
        # The script is named from where it is started, so the directory stays.
        commands=('accelerate launch --config_file "$here/accelerate.yaml"',),
        data="none",
        notes=notes,
    )


def launch_config(tuned: TunedRun, ds_config: str = DS_CONFIG, notes: tuple[str, ...] = ()) -> str:
    """Return what starts the ranks under DeepSpeed.

    What the DeepSpeed config says must not be in it once more (DeepSpeedPlugin's checks).
    """
    stage = tuned.setting.structure.zero_stage
    return as_yaml(
        tuned,
        notes,
        {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "deepspeed_config_file": ds_config,
                "zero3_init_flag": stage == _ZERO_3,
            },
            "dynamo_config": {"dynamo_backend": "INDUCTOR"} if tuned.compiles else None,
            "num_machines": 1,
            "num_processes": tuned.ranks,
            "machine_rank": 0,
            "main_training_function": "main",
            "rdzv_backend": "static",
            "same_network": True,
        },
    )


def _left_to_the_script(tuned: TunedRun) -> tuple[str, ...]:
    setting, structure = tuned.setting, tuned.setting.structure
    checkpointing = {
        "none": "no activation checkpointing",
        "full": "activation checkpointing of all layers, use_reentrant=False",
    }.get(
        structure.checkpointing,
        f"activation checkpointing with every_n_layers={tuned.every_n_layers}",
    )
    note = (
        f"accelerate leaves to your script: batches of {setting.micro_batch_size} rows, "
        f"{attention(tuned)} attention, the model in {tuned.spec.precision}, {checkpointing}, "
        f"{tuned.optimizer} at {tuned.trainer['learning_rate']}"
    )
    return (note,)

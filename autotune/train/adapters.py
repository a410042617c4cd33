"""Adapters beside the weights that they belong to: what they start from, and where they end."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from autotune.engine.model import DTYPES, build_base
from autotune.engine.quantised import in_4_bits
from autotune.workload import TrainSpec

_MERGED_FROM = "adapter"


def adapters_dir(spec: TrainSpec, model_dir: Path) -> Path:
    """Return where the trained model goes, the adapters of one that is merged in the end.

    They are not beside merged weights, where transformers would add them once more.
    """
    return model_dir / _MERGED_FROM if spec.merge else model_dir


def with_base(spec: TrainSpec, directory: Path) -> TrainSpec:
    """Give adapters of a model without weights something to be loaded with: random ones, saved.

    The first rank writes them to `directory`, unless an earlier start of the training has.
    """
    if torch.distributed.get_rank() == 0 and not directory.exists():
        save_random(spec, directory)
    torch.distributed.barrier()
    return replace(spec, model_dir=str(directory.absolute()), from_scratch=False)


def save_random(spec: TrainSpec, directory: Path) -> None:
    """Save a model without weights with those that its training would begin with."""
    draft = directory.with_name(f"{directory.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    build_base(spec, load_weights=False).save_pretrained(str(draft))
    for file in Path(spec.model_dir).iterdir():
        if file.is_file() and not (draft / file.name).exists():
            shutil.copyfile(file, draft / file.name)
    draft.replace(directory)


def merge(spec: TrainSpec, adapters: Path, model_dir: Path) -> None:
    """Add adapters to the weights that they were trained beside, and save the whole model.

    One rank does it on the host, from what was saved, however the weights were sharded. Weights in
    4 bits are dequantised first: the adapters have learned beside what these stand for.
    """
    from peft import PeftModel
    from transformers.integrations import unset_hf_deepspeed_config

    # Else the weights would be sharded once more as they are loaded.
    unset_hf_deepspeed_config()
    base = build_base(spec, load_weights=True)
    if in_4_bits(base):
        base = base.dequantize(dtype=DTYPES[spec.precision])
    merged = PeftModel.from_pretrained(base, str(adapters)).merge_and_unload()
    merged.save_pretrained(str(model_dir))

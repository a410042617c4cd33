"""The emitted ds_config.json is anybody's: plain scripts train with it, unchanged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_rows
from trainings import LIMIT_S, Workshop, small_model, workshop

from autotune import environment

WITH_TRAINER = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
model_dir, ds_config, accumulation = sys.argv[1:4]
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
arguments = TrainingArguments(
    output_dir="out", deepspeed=ds_config, use_cpu=True, max_steps=3, logging_steps=1,
    per_device_train_batch_size=2, gradient_accumulation_steps=int(accumulation),
    learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True)
ids = torch.arange(3, 19)
rows = [{"input_ids": ids, "labels": ids}] * 32
trainer = Trainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert len(losses) == 3 and losses[-1] < losses[0], losses
"""

WITH_DEEPSPEED = """
import sys, deepspeed, torch
from transformers import AutoConfig, AutoModelForCausalLM
model_dir, ds_config, accumulation = sys.argv[1:4]
deepspeed.init_distributed()
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
engine, *_ = deepspeed.initialize(
    model=model, model_parameters=model.parameters(), config=ds_config)
assert engine.gradient_accumulation_steps() == int(accumulation)
ids = torch.arange(3, 19).repeat(2, 1)
losses = []
for _ in range(3 * int(accumulation)):
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    losses.append(float(loss))
assert engine.global_steps == 3 and losses[-1] < losses[0], losses
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    directory = tmp_path_factory.mktemp("plain")
    data = write_rows(directory / "data.jsonl", [("What?", "That.")] * 8)
    return workshop(directory, data, small_model(directory / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("program", [WITH_TRAINER, WITH_DEEPSPEED], ids=["trainer", "deepspeed"])
def test_a_plain_script_trains_with_it(shop: Workshop, tmp_path: Path, program: str) -> None:
    directory = shop.emit(tmp_path / "emitted", zero_stage=3, micro_batch_size=2, ranks=2)
    emitted = (directory / "ds_config.json").read_bytes()
    (directory / "script.py").write_text(program)

    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *("script.py", shop.job.model_dir, "ds_config.json", "2"),
        ],
        cwd=directory,
        env={**os.environ, **environment.rank_environment("cpu", ())},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert (directory / "ds_config.json").read_bytes() == emitted

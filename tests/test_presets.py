"""The shipped configurations are those of the published models."""

import pytest
from conftest import REPOSITORY

PARAMETERS = {
    "chatglm3-6b": 6_243_584_000,
    "gemma-2-9b": 9_241_705_984,
    "glm-4-9b": 9_399_951_360,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "phi-3-mini-4k": 3_821_079_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
}
"""As the models' own pages count them."""


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_a_preset_has_the_parameters_of_the_model(name: str, parameters: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(REPOSITORY / "configs" / "models" / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(one.numel() for one in model.parameters()) == parameters

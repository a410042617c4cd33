from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from autotune import builtin
from autotune.errors import UsageError

if TYPE_CHECKING:
    from transformers import GlmConfig, PreTrainedTokenizerFast

DATA = Path(__file__).parents[1] / "examples" / "quickstart" / "data.jsonl"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say hello."},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "Again."},
    {"role": "assistant", "content": "hello, hello"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin.directory("glm-tiny"), local_files_only=True)


@pytest.fixture(scope="module")
def config() -> GlmConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(builtin.directory("glm-tiny"), local_files_only=True)


@pytest.fixture(scope="module")
def conversations() -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in DATA.read_text(encoding="utf-8").splitlines()]


def render(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], **options: bool
) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def trained_text(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> str:
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return str(tokenizer.decode([token for token, trained in pairs if trained]))


def answers_with_their_ends(messages: list[dict[str, str]]) -> str:
    answers = [one["content"] for one in messages if one["role"] == "assistant"]
    return "".join(f"{answer}<|endoftext|>" for answer in answers)


@pytest.mark.parametrize("name", builtin.NAMES)
def test_every_name_has_a_directory_with_config_tokenizer_and_recommendation(name: str) -> None:
    files = {path.name for path in builtin.directory(name).iterdir()}

    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    assert builtin.RECOMMENDED[name]["learning_rate"] == 1e-3


@pytest.mark.parametrize("name", ["glm-huge", "", ".", "../builtin/glm-tiny"])
def test_an_unknown_name_is_a_usage_error_that_names_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"builtin:{name}: ") + ".*builtin:glm-tiny"):
        builtin.directory(name)


def test_config_builds_a_glm_of_exactly_3148736_parameters(config: GlmConfig) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    assert type(model).__name__ == "GlmForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_148_736
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_config_and_tokenizer_agree(config: GlmConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == config.vocab_size == 4096
    assert tokenizer.model_max_length == config.max_position_embeddings == 2048
    assert tokenizer.eos_token_id == config.eos_token_id
    assert tokenizer.pad_token_id == config.pad_token_id
    assert config.bos_token_id is None
    assert tokenizer.bos_token_id is None


def test_half_of_each_head_is_rotated(config: GlmConfig) -> None:
    assert config.rope_parameters["partial_rotary_factor"] == 0.5


def test_pad_is_not_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|endoftext|>")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize(
    "token", ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
)
def test_a_control_token_is_one_special_id(tokenizer: PreTrainedTokenizerFast, token: str) -> None:
    (token_id,) = tokenizer.encode(token, add_special_tokens=False)

    assert token_id in tokenizer.all_special_ids
    assert tokenizer.decode([token_id], skip_special_tokens=True) == ""


def test_every_text_of_the_quickstart_data_comes_back_exactly(
    tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]
) -> None:
    texts = [message["content"] for message in chain.from_iterable(conversations)]

    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]

    assert tokenizer.batch_decode(ids) == texts


@pytest.mark.parametrize("text", ["", " a  b\t\n\n c ", "naïve 漢字 🙂", "\r\n", "x ,y . z !"])
def test_any_text_comes_back_exactly(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_template_is_that_of_glm_with_an_end_after_each_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert render(tokenizer, CONVERSATION) == (
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\nSay hello.<|assistant|>\nhello<|endoftext|>"
        "<|user|>\nAgain.<|assistant|>\nhello, hello<|endoftext|>"
    )


def test_the_mask_covers_exactly_the_answers_and_their_ends_in_all_quickstart_data(
    tokenizer: PreTrainedTokenizerFast, conversations: list[list[dict[str, str]]]
) -> None:
    for messages in conversations:
        assert trained_text(tokenizer, messages) == answers_with_their_ends(messages)


@pytest.mark.parametrize("answer", ["", " ", "\n", "\n\n  indented", "  two", "\tx\n", "漢"])
def test_the_mask_is_exact_for_answers_that_begin_with_white_space(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    messages = [*CONVERSATION[:2], {"role": "assistant", "content": answer}]

    assert trained_text(tokenizer, messages) == f"{answer}<|endoftext|>"


@pytest.mark.parametrize("answer", ["hello", "\n\n  indented"])
def test_ids_of_the_prompt_do_not_depend_on_the_answer(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    question = CONVERSATION[:2]
    whole = [*question, {"role": "assistant", "content": answer}]

    prompt_ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    ids = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]

    assert ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.decode(ids[len(prompt_ids) :]) == f"{answer}<|endoftext|>"


def test_the_result_of_a_tool_is_an_observation(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "observation", "content": "21 degrees"}]

    assert render(tokenizer, messages) == "[gMASK]<sop><|observation|>\n21 degrees"


def test_an_unknown_role_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match="Unknown role critic: expected system, user"):
        render(tokenizer, [{"role": "critic", "content": "Hm."}])

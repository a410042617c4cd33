"""Train the tokenizer of the demo model builtin:glm-tiny on data.jsonl, and write its files."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
MODEL_MAX_LENGTH = 2048
END, PAD = "<|endoftext|>", "<|pad|>"
CONTROL_TOKENS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

HERE = Path(__file__).parent
DATA = HERE / "data.jsonl"
MODEL_DIR = HERE.parents[1] / "autotune" / "builtin" / "glm-tiny"

# What stands between generation and endgeneration is what a model is trained on: the answer and
# the token that ends it.
CHAT_TEMPLATE = """\
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
    {{- '<|system|>\\nTools:\\n' ~ tools | tojson -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in ('system', 'user', 'assistant', 'observation') -%}
        {{- raise_exception('Unknown role ' ~ message.role
            ~ ': expected system, user, assistant or observation') -}}
    {%- endif -%}
    {{- '<|' ~ message.role ~ '|>\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
            {{- message.content -}}
            {%- for call in message.tool_calls or [] -%}
                {{- call.function.name ~ '\\n' ~ call.function.arguments | tojson -}}
            {%- endfor -%}
            {{- '<|endoftext|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message.content -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""


def read_texts() -> list[str]:
    lines = DATA.read_text(encoding="utf-8").splitlines()
    return [message["content"] for line in lines for message in json.loads(line)["messages"]]


def train(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # A line end is always a token of its own: so the one after <|assistant|> never merges with an
    # answer that starts with white space, and the prompt has the same ids with and without answer.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[
            AddedToken(token, special=True, normalized=False)
            for token in (END, PAD, *CONTROL_TOKENS)
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    return {
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "extra_special_tokens": list(CONTROL_TOKENS),
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": PAD,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def main() -> None:
    tokenizer = train(read_texts())
    tokenizer.save(str(MODEL_DIR / "tokenizer.json"))
    config = json.dumps(tokenizer_config(), indent=2)
    (MODEL_DIR / "tokenizer_config.json").write_text(f"{config}\n", encoding="utf-8")
    (MODEL_DIR / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    print(f"A tokenizer of {tokenizer.get_vocab_size()} tokens written to {MODEL_DIR}")


if __name__ == "__main__":
    main()

"""Every convention of rows: the conversation it gives, the text, the ids and the mask; refusals."""

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_dataset import PLAIN, TAGGED, build_tokenizer

from autotune.config import FORMATS
from autotune.dataset.conventions import CONVENTIONS, SampleError, mapped, recognise
from autotune.dataset.conversation import Conversation, Segments, Text, Tokens
from autotune.dataset.encode import TemplateCodec
from autotune.dataset.lines import RowError, parse_row

CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
TOOL = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
CALLS = [{"type": "function", "function": CALL}]


def turn(role: str, content: str, **extra: object) -> dict[str, object]:
    return {"role": role, "content": content, **extra}


USER, ANSWER = turn("user", "1+2?"), turn("assistant", "3")
SYSTEM = turn("system", "Count.")
END = "<|im_end|>"

# The name of a convention, a row of it, the turns that it says, and which of them are trained on.
CHATS: list[tuple[str, dict[str, Any], list[dict[str, object]], str]] = [
    ("messages", {"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER], "--x"),
    (
        "messages",
        {
            "messages": [
                USER,
                turn("assistant", "3", weight=0),
                USER,
                turn("assistant", "3", weight=1),
            ]
        },
        [USER, ANSWER, USER, ANSWER],
        "---x",
    ),
    (
        "messages",
        {"messages": [USER, turn("assistant", "2", train=False, loss=True), USER, ANSWER]},
        [USER, turn("assistant", "2"), USER, ANSWER],
        "---x",
    ),
    (
        "messages",
        {
            "tools": [WRAPPED],
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'},
                        }
                    ],
                },
                turn("tool", "3", tool_call_id="c1"),
                ANSWER,
            ],
        },
        [
            USER,
            turn("assistant", "", tool_calls=[{"id": "c1", **CALLS[0]}]),
            turn("tool", "3", tool_call_id="c1"),
            ANSWER,
        ],
        "-x-x",
    ),
    (
        "messages",
        {
            "functions": json.dumps([TOOL]),
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL},
                turn("function", "3", name="add"),
                ANSWER,
            ],
        },
        [USER, turn("assistant", "", tool_calls=CALLS), turn("tool", "3", name="add"), ANSWER],
        "-x-x",
    ),
    (
        "messages",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2?"}],
                },
                turn("assistant", "3", reasoning_content="One and two."),
            ]
        },
        [USER, turn("assistant", "3", reasoning_content="One and two.")],
        "-x",
    ),
    (
        "sharegpt",
        {
            "system": "Count.",
            "conversations": [{"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}],
        },
        [SYSTEM, USER, ANSWER],
        "--x",
    ),
    (
        "sharegpt",
        {
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "user", "value": "1+2?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "3"},
                {"from": "assistant", "value": "3"},
            ],
        },
        [USER, turn("assistant", "", tool_calls=CALLS), turn("observation", "3"), ANSWER],
        "-x-x",
    ),
    (
        "sharegpt-pairs",
        {"system": "Count.", "conversation": [{"human": "1+2?", "assistant": "3"}] * 2},
        [SYSTEM, USER, ANSWER, USER, ANSWER],
        "--x-x",
    ),
    (
        "chatglm3",
        {"conversations": [SYSTEM, turn("user", "1+2?", loss=True), ANSWER]},
        [SYSTEM, USER, ANSWER],
        "--x",
    ),
    (
        "chatglm3",
        {
            "tools": [TOOL],
            "conversations": [
                USER,
                {
                    "role": "tool",
                    "name": "add",
                    "parameters": CALL["arguments"],
                    "observation": {"sum": 3},
                },
                turn("assistant", "3", loss=False),
            ],
        },
        [USER, turn("assistant", "", tool_calls=CALLS), turn("observation", '{"sum": 3}'), ANSWER],
        "-x--",
    ),
    (
        "glm4",
        {"messages": [turn("system", "", tools=[WRAPPED]), USER, turn("observation", "3"), ANSWER]},
        [turn("system", "", tools=[WRAPPED]), USER, turn("observation", "3"), ANSWER],
        "---x",
    ),
    (
        "alpaca",
        {
            "instruction": "Add.",
            "input": "1+2?",
            "output": "3",
            "system": "Count.",
            "history": [["1+2?", "3"]],
        },
        [SYSTEM, USER, ANSWER, turn("user", "Add.\n1+2?"), ANSWER],
        "--x-x",
    ),
    (
        "messages",
        {"system": "Count.", "messages": [turn("User", "1+2?"), turn("Assistant", "3")]},
        [SYSTEM, USER, ANSWER],
        "--x",
    ),
    (
        "messages",
        {"system": "Count.", "messages": [SYSTEM, USER, ANSWER]},
        [SYSTEM, USER, ANSWER],
        "--x",
    ),
    (
        "messages",
        {
            "messages": [
                USER,
                turn("tool_call", json.dumps(CALL)),
                turn("tool_response", "3"),
                ANSWER,
            ]
        },
        [USER, turn("assistant", "", tool_calls=CALLS), turn("tool", "3"), ANSWER],
        "-x-x",
    ),
    (
        "sharegpt",
        {
            "system_prompt": "Count.",
            "conversations": [{"from": "Human", "value": "1+2?"}, {"from": "GPT", "value": "3"}],
        },
        [SYSTEM, USER, ANSWER],
        "--x",
    ),
    ("alpaca", {"instruction": "1+2?", "input": "", "output": "3"}, [USER, ANSWER], "-x"),
    ("prompt-completion", {"prompt": "1+2?", "completion": "3"}, [USER, ANSWER], "-x"),
    (
        "prompt-completion",
        {"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]},
        [SYSTEM, USER, ANSWER, USER, ANSWER],
        "----x",
    ),
    (
        "prompt-completion",
        {
            "system": "Count.",
            "prompt": [USER],
            "completion": [turn("assistant", "3", weight=0), ANSWER],
        },
        [SYSTEM, USER, ANSWER, ANSWER],
        "---x",
    ),
    ("prompt-response", {"prompt": "1+2?", "response": "3"}, [USER, ANSWER], "-x"),
    ("prompt-response", {"query": "1+2?", "response": "3", "history": []}, [USER, ANSWER], "-x"),
    ("prompt-response", {"question": "1+2?", "answer": "3"}, [USER, ANSWER], "-x"),
    ("prompt-response", {"input": "1+2?", "output": "3"}, [USER, ANSWER], "-x"),
    ("prompt-response", {"problem": "1+2?", "solution": "3"}, [USER, ANSWER], "-x"),
    (
        "prompt-response",
        {"system_prompt": "Count.", "question": "1+2?", "response": "3"},
        [SYSTEM, USER, ANSWER],
        "--x",
    ),
    ("context-target", {"context": "1+2?", "target": "3"}, [USER, ANSWER], "-x"),
    ("adgen", {"content": "1+2?", "summary": "3"}, [USER, ANSWER], "-x"),
]
RAW: list[tuple[str, dict[str, Any], object]] = [
    ("text", {"text": "Once."}, Text("Once.")),
    (
        "segments",
        {"segments": [{"label": False, "text": "a"}, {"label": True, "text": "b"}]},
        Segments((("a", False), ("b", True))),
    ),
    (
        "tokens",
        {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]},
        Tokens((5, 6, 7), (False, True, True)),
    ),
    (
        "tokens",
        {"input_ids": [5, 6], "assistant_masks": [0, 1]},
        Tokens((5, 6), (False, True)),
    ),
    (
        "tokens",
        {
            "input_ids": [5, 6, 7, 8],
            "labels": [-100, 6, 7, 8],
            "assistant_masks": [1, 1, 1, 0],
            "completion_mask": [False, False, True, True],
        },
        Tokens((5, 6, 7, 8), (False, False, True, False)),
    ),
]


def test_the_command_line_names_the_conventions_that_there_are() -> None:
    assert list(CONVENTIONS) == list(FORMATS)
    assert {name for name, *_ in CHATS} | {name for name, *_ in RAW} == set(FORMATS)


@pytest.mark.parametrize(("name", "row", "turns", "trained"), CHATS)
def test_a_conversation_is_recognised_and_read(
    name: str, row: dict[str, Any], turns: list[dict[str, object]], trained: str
) -> None:
    convention = recognise([orjson.loads(orjson.dumps(row))])
    assert convention.name == name
    content = convention.parse(row)
    assert isinstance(content, Conversation)
    assert [message.to_json() for message in content.messages] == turns
    assert "".join("-x"[message.trained] for message in content.messages) == trained
    if row.get("tools") or row.get("functions"):
        assert content.tools == ((TOOL,) if name == "chatglm3" else (WRAPPED,))


@pytest.mark.parametrize(("name", "row", "content"), RAW)
def test_a_row_without_turns_is_recognised_and_read(
    name: str, row: dict[str, Any], content: object
) -> None:
    convention = recognise([row])
    assert (convention.name, convention.parse(row)) == (name, content)


@pytest.mark.parametrize(("name", "row", "turns", "trained"), CHATS)
def test_text_ids_and_mask_of_a_conversation_are_those_of_its_turns(
    name: str, row: dict[str, Any], turns: list[dict[str, object]], trained: str
) -> None:
    del turns
    template = TOOLED
    tokenizer = build_tokenizer(template)
    codec = TemplateCodec(tokenizer, train_on_prompt=False)
    content = CONVENTIONS[name].parse(row)
    assert isinstance(content, Conversation)
    (made,) = codec.encode([content])
    assert not isinstance(made, RowError)
    ((ids, mask),) = made
    text, expected = "", []
    for message, mark in zip(content.messages, trained, strict=True):
        calls: Any = message.extra.get("tool_calls") or []
        said = "".join(
            f"{c['function']['name']}({json.dumps(c['function']['arguments'])})" for c in calls
        )
        header = f"<|im_start|>{message.role}\n"
        body = f"{message.content}{said}<|im_end|>"
        text += header + body + "\n"
        expected += [False] * len(header) + [mark == "x"] * len(body) + [False]
    assert tokenizer.decode(ids) == text
    found = []
    for number, on in zip(ids, mask, strict=True):
        found += [bool(on)] * len(tokenizer.decode([number]))
    assert found == expected


TOOLED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments|tojson }})"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{# 'tool' observation #}"
)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"text": "a", "messages": [USER, ANSWER]}, "could be messages or text"),
        ({"instruction": "a", "output": "b", "text": "c"}, "could be alpaca or text"),
        (
            {"prompt": "a", "completion": "b", "response": "c"},
            "could be prompt-completion or",
        ),
        ({"prompt": "a", "text": "b"}, "could be prompt-response or text"),
        (
            {"prompt": "a", "question": "b", "answer": "c"},
            '"prompt" and "question" could each be the prompt',
        ),
        ({"problem": "a", "solution": "b", "answer": "c"}, "could each be the answer"),
        (
            {"instruction": "a", "context": "b", "response": "c"},
            '"context" may be part of the prompt',
        ),
        ({"input_ids": [1], "text": "b"}, "could be text or tokens"),
        ({"chosen": "a", "rejected": "b", "prompt": "c"}, "preference pairs (chosen/rejected"),
        ({"messages": [USER, ANSWER], "rejected_response": "b"}, "rejected_response"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "OpenAI's"),
        ({"prompt": "a", "completion": "b", "label": True}, "KTO (label)"),
        ({"messages": [USER, ANSWER], "kto_tag": False}, "KTO (kto_tag)"),
        ({"prompt": "a", "completions": ["b"], "labels": [True]}, "stepwise rewards"),
        ({"instruction": "a", "input": "", "output": ["b", "c"]}, "a list of outputs"),
        ({"prompt": "a", "response": "b", "reward": 0.5}, "rewards (reward"),
    ],
)
def test_what_is_ambiguous_or_not_for_fine_tuning_is_refused_by_name(
    row: dict[str, Any], found: str
) -> None:
    with pytest.raises(SampleError) as caught:
        recognise([row])
    assert found in str(caught.value)


def test_a_sample_of_two_conventions_is_refused_and_a_few_strays_are_not() -> None:
    chat: dict[str, object] = {"messages": [USER, ANSWER]}
    text: dict[str, object] = {"text": "a"}
    assert recognise([chat] * 20 + [text]).name == "messages"
    with pytest.raises(SampleError, match="different conventions") as caught:
        recognise([chat, chat, text])
    assert caught.value.row == 2


@pytest.mark.parametrize(
    ("mapping", "row", "turns"),
    [
        ({"user": "q", "assistant": "a"}, {"q": "1+2?", "a": "3"}, [USER, ANSWER]),
        (
            {"user": "q", "assistant": "a", "system": "s", "input": "c"},
            {"q": "Add.", "c": "1+2?", "a": "3", "s": "Count."},
            [SYSTEM, turn("user", "Add.\n1+2?"), ANSWER],
        ),
        (
            {"messages": "dialog", "role": "who", "content": "says"},
            {"dialog": [{"who": "human", "says": "1+2?"}, {"who": "bot", "says": "3"}]},
            [USER, ANSWER],
        ),
    ],
)
def test_keys_can_be_named(
    mapping: dict[str, str], row: dict[str, Any], turns: list[dict[str, object]]
) -> None:
    content = mapped(mapping).parse(row)
    assert isinstance(content, Conversation)
    assert [message.to_json() for message in content.messages] == turns


def test_a_mapping_that_makes_no_rows_is_refused() -> None:
    assert mapped({"text": "body"}).parse({"body": "a"}) == Text("a")
    with pytest.raises(ValueError, match="cannot be mapped"):
        mapped({"author": "a"})
    with pytest.raises(ValueError, match="alone makes no rows"):
        mapped({"user": "a"})
    with pytest.raises(RowError, match='the row has no "a"'):
        mapped({"user": "q", "assistant": "a"}).parse({"q": "b"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "1+2?", "output": " "}, "every answer is empty"),
        ({"messages": [USER, turn("assistant", "")]}, "every answer is empty"),
        ({"prompt": [USER, ANSWER, USER], "completion": ""}, "every answer is empty"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "no list of 0 and 1"),
        ({"input_ids": [5, 6], "completion_mask": [1]}, "1 entries"),
        ({"conversations": [USER, ANSWER], "tools": "add("}, "in which JSON is needed"),
        (
            {"messages": [USER, {"role": "tool_call", "content": '{"name": "f", "name": "g"}'}]},
            'the key "name" is there twice',
        ),
        (
            {
                "messages": [
                    USER,
                    turn("assistant", "", tool_calls=[{"name": "f", "arguments": '{"a":' * 200}]),
                ]
            },
            "in which JSON is needed",
        ),
        (
            {
                "messages": [
                    USER,
                    turn(
                        "assistant",
                        "",
                        tool_calls=[{"name": "f", "arguments": '{"a":' * 200 + "1" + "}" * 200}],
                    ),
                ]
            },
            "nested more than 100 deep",
        ),
    ],
)
def test_what_cannot_be_learned_from_is_refused_with_its_reason(
    row: dict[str, Any], reason: str
) -> None:
    convention = recognise([row])
    with pytest.raises(RowError, match=reason):
        convention.parse(row)


def test_whole_numbers_beyond_64_bits_are_kept_in_calls() -> None:
    number = 123456789012345678901234567890
    for arguments in ({"a": number}, json.dumps({"a": number})):
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        text = json.dumps({"messages": [USER, turn("assistant", "", tool_calls=calls)]})
        content = CONVENTIONS["messages"].parse(parse_row(text.encode()))
        assert isinstance(content, Conversation)
        made: Any = content.messages[1].extra["tool_calls"]
        assert made[0]["function"]["arguments"] == {"a": number}


def test_chatglm3_tools_are_free_in_form_within_a_list() -> None:
    row: dict[str, object] = {"tools": ["add(a, b)", {"a": 1}], "conversations": [USER, ANSWER]}
    content = CONVENTIONS["chatglm3"].parse(row)
    assert isinstance(content, Conversation)
    assert content.tools == ("add(a, b)", {"a": 1})


_KEYS = sorted({key for convention in CONVENTIONS.values() for key in convention.reads} | {"label"})
_SCALARS = st.none() | st.booleans() | st.integers(-1, 3) | st.text(max_size=4)
_VALUES = st.recursive(
    _SCALARS | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "role",
                    "content",
                    "from",
                    "value",
                    "human",
                    "assistant",
                    "tools",
                    "name",
                    "label",
                    "tool_calls",
                    "function",
                    "arguments",
                    "parameters",
                    "type",
                    "text",
                    "weight",
                ]
            ),
            inner
            | st.sampled_from(["user", "assistant", "tool", "system", "gpt", "human", "text"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=4))
@example({"messages": [], "conversations": [1]})
@example({"prompt": [{}], "completion": [None]})
def test_any_row_is_read_or_refused_in_every_convention(row: dict[str, Any]) -> None:
    codec = _codec()
    for convention in CONVENTIONS.values():
        try:
            content = convention.parse(row)
        except RowError as error:
            assert len(str(error)) < 400  # noqa: PT017 - only if one is raised
            continue
        (made,) = codec.encode([content])
        if not isinstance(made, RowError):
            assert all(len(ids) == len(trained) for ids, trained in made)
    try:
        recognise([row])
    except SampleError as error:
        assert len(str(error)) < 400  # noqa: PT017 - only if one is raised


_CODECS: list[TemplateCodec] = []


def _codec() -> TemplateCodec:
    if not _CODECS:
        _CODECS.append(TemplateCodec(build_tokenizer(TAGGED), train_on_prompt=False))
    return _CODECS[0]


def test_plain_text_and_pairs_need_no_template() -> None:
    tokenizer = build_tokenizer(None)
    tokenizer.eos_token = END
    codec = TemplateCodec(tokenizer, train_on_prompt=False)
    pair = CONVENTIONS["prompt-completion"].parse({"prompt": "Hello", "completion": " there"})
    text = CONVENTIONS["text"].parse({"text": "Hello there"})
    chat = CONVENTIONS["messages"].parse({"messages": [SYSTEM, USER, ANSWER]})
    made_pair, made_text, made_chat = codec.encode([pair, text, chat])
    assert not isinstance(made_pair, RowError)
    assert not isinstance(made_text, RowError)
    assert isinstance(made_chat, RowError)
    ids, mask = made_pair[0]
    assert tokenizer.decode(ids) == "Hello there<|im_end|>"
    assert (
        tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) == " there<|im_end|>"
    )
    ids, mask = made_text[0]
    assert (tokenizer.decode(ids), set(mask)) == ("Hello there<|im_end|>", {1})


def test_train_on_prompt_trains_on_all_but_what_is_switched_off() -> None:
    tokenizer = build_tokenizer(PLAIN)
    codec = TemplateCodec(tokenizer, train_on_prompt=True)
    row: dict[str, object] = {"messages": [USER, turn("assistant", "off", weight=0), USER, ANSWER]}
    (made,) = codec.encode([CONVENTIONS["messages"].parse(row)])
    assert not isinstance(made, RowError)
    ids, mask = made[0]
    left_out = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if not on])
    assert left_out == "off<|im_end|>"


def test_train_on_prompt_honours_switches_of_all_roles_and_trains_on_answers_in_a_prompt() -> None:
    tokenizer = build_tokenizer(PLAIN)
    codec = TemplateCodec(tokenizer, train_on_prompt=True)
    off: dict[str, object] = {
        "messages": [turn("system", "s", loss=False), turn("user", "u", weight=0), ANSWER]
    }
    asked: dict[str, object] = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    for _ in range(2):
        switched, prompted = codec.encode(
            [CONVENTIONS["messages"].parse(off), CONVENTIONS["prompt-completion"].parse(asked)]
        )
        assert not isinstance(switched, RowError)
        assert not isinstance(prompted, RowError)
        ids, mask = switched[0]
        trained = tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])
        assert trained == "<|im_start|>assistant\n3<|im_end|>\n"
        assert all(prompted[0][1])


def test_an_original_chatglm3_tokenizer_gives_the_expected_ids_and_masks() -> None:
    import os

    if not os.environ.get("AUTOTUNE_CHATGLM3_TINY"):
        pytest.skip("AUTOTUNE_CHATGLM3_TINY names no folder with a ChatGLM3 checkpoint")
    from autotune.dataset.chatglm3 import ChatGlm3Codec

    folder = Path(os.environ["AUTOTUNE_CHATGLM3_TINY"])
    expected = json.loads((folder / "tokenizer_expected.json").read_text(encoding="utf-8"))
    codec = ChatGlm3Codec(folder / "checkpoint", train_on_prompt=False)
    assert (codec.special, codec.eos) == (expected["special"], expected["eos"])
    for case in expected["cases"]:
        content = CONVENTIONS["messages"].parse({"messages": case["messages"]})
        (made,) = codec.encode([content])
        assert not isinstance(made, RowError)
        ((ids, mask),) = made
        assert ids == case["input_ids"]
        assert [bool(on) for on in mask] == case["trained"]


def test_a_call_in_chatglm3_form_is_trained_on_and_its_observation_is_not() -> None:
    import os

    if not os.environ.get("AUTOTUNE_CHATGLM3_TINY"):
        pytest.skip("AUTOTUNE_CHATGLM3_TINY names no folder with a ChatGLM3 checkpoint")
    from autotune.dataset.chatglm3 import ChatGlm3Codec

    codec = ChatGlm3Codec(
        Path(os.environ["AUTOTUNE_CHATGLM3_TINY"]) / "checkpoint", train_on_prompt=False
    )
    row = next(row for name, row, *_ in CHATS if name == "chatglm3" and "tools" in row)
    (made,) = codec.encode([CONVENTIONS["chatglm3"].parse(row)])
    assert not isinstance(made, RowError)
    ids, mask = made[0]
    trained = codec.decode([i for i, on in zip(ids, mask, strict=True) if on])
    assert trained == "<|assistant|>add\n ```python\ntool_call(a=1, b=2)\n```"
    assert codec.decode(ids).endswith('<|observation|>\n {"sum": 3}<|assistant|>\n 3</s>')

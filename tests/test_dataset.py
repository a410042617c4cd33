"""From a file of conversations to rows: reading, masks, truncation, reuse, and every refusal."""

import gzip
import json
import os
import resource
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autotune.dataset import Rules, content_hash, prepare
from autotune.dataset.conventions import recognise
from autotune.dataset.conventions.turns import parse_messages
from autotune.dataset.conversation import Conversation
from autotune.dataset.encode import TemplateCodec
from autotune.dataset.lines import RowError, parse_row, read_blocks
from autotune.dataset.rows import Rows, RowsMeta, RowsWriter
from autotune.dataset.tokenizer import load_tokenizer
from autotune.errors import (
    CannotWriteError,
    ConfigError,
    DatasetError,
    InputMissingError,
)
from autotune.workload import DatasetProfile

_HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
_TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
PLAIN = _HEAD + "{{ m.content + '<|im_end|>\\n' }}" + _TAIL
_TAGGED_TURN = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}"
)
TAGGED = _HEAD + _TAGGED_TURN + _TAIL
# Leaves out all turns before the last one of a user.
FORGETFUL = (
    "{% set ns = namespace(at=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.at = loop.index0 %}{% endif %}{% endfor %}"
) + PLAIN.replace("messages %}", "messages[ns.at:] %}")
# Leaves out the thoughts of all answers but the last.
THOUGHTLESS = PLAIN.replace(
    "{{ m.content +", "{{ (m.content if loop.last else m.content.split('</think>')[-1]) +"
)
# Says where the last assistant turn is, and not the others.
TAGS_LAST_ONLY = TAGGED.replace("== 'assistant'", "== 'assistant' and loop.last")
# Opens a thought in the header that is not in the turn.
THINKING = PLAIN.replace("assistant\\n' }}{% endif %}", "assistant\\n<think>' }}{% endif %}")
PICKY = PLAIN.replace(
    "{% for m",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for m",
)
TEMPLATES = {"plain": PLAIN, "tagged": TAGGED}

HI = {"role": "user", "content": "Hi there"}
HELLO = {"role": "assistant", "content": "Hello 😀"}
BYE = {"role": "user", "content": "Bye"}
SEE_YOU = {"role": "assistant", "content": "See you 👋"}
TWO_TURNS = [{"role": "system", "content": "Be kind."}, HI, HELLO, BYE, SEE_YOU]


def build_tokenizer(template: str | None, *, trim_offsets: bool = False) -> Any:  # noqa: ANN401
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    raw.train_from_iterator(["Hello there, see you. Bye and be kind, user, assistant."], trainer)
    # A small limit of its own, so that nothing warns or cuts by it.
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, model_max_length=8)


@pytest.fixture(scope="module", params=sorted(TEMPLATES))
def tokenizer(request: pytest.FixtureRequest) -> Any:  # noqa: ANN401
    return build_tokenizer(TEMPLATES[request.param])


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return build_tokenizer(PLAIN), build_tokenizer(TAGGED)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    build_tokenizer(PLAIN).save_pretrained(directory)
    return directory


def write_lines(path: Path, conversations: Iterable[list[dict[str, Any]]]) -> Path:
    path.write_bytes(b"".join(orjson.dumps({"messages": c}) + b"\n" for c in conversations))
    return path


def run(path: Path, model_dir: Path, **options: Any) -> DatasetProfile:  # noqa: ANN401
    defaults: dict[str, Any] = {
        "max_seq_length": 1000,
        "output": path.parent / "rows",
        "trust_remote_code": False,
        "vocab_size": 1000,
    }
    return prepare(path, model_dir=model_dir, **(defaults | options))


def conversation(messages: list[dict[str, Any]]) -> Conversation:
    return parse_messages({"messages": messages})


def read_rows(path: Path) -> list[tuple[int, dict[str, object]]]:
    return [(line.number, parse_row(line.text)) for block in read_blocks(path) for line in block]


def tokenize_all(conversation: Conversation, tokenizer: Any) -> list[Any]:  # noqa: ANN401
    (made,) = TemplateCodec(tokenizer, train_on_prompt=False).encode([conversation])
    if isinstance(made, RowError):
        raise made
    return [(np.asarray(ids, np.int32), np.asarray(trained, np.bool_)) for ids, trained in made]


def tokenize(conversation: Conversation, tokenizer: Any) -> Any:  # noqa: ANN401
    (row,) = tokenize_all(conversation, tokenizer)
    return row


def trained_texts(row: tuple[Any, Any], tokenizer: Any) -> list[str]:  # noqa: ANN401
    """Decode each run of trained tokens."""
    ids, trained = row
    edges = np.flatnonzero(np.diff(trained, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges]


# Reading lines


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'{"messages": []\n', 1, "not valid JSON"),
        (b'{"a": 1}\n\n{"a": NaN}\n', 3, "not valid JSON"),
        (b'{"a": 1} {"b": 2}\n', 1, "unexpected content after document at column 10"),
        (b'{"a": 1}\n{"a": "\\ud83d"}\n', 2, "not valid JSON (no low surrogate in string"),
        (b'{"a": 1}\n{"a": "\\udc00"}\n', 2, "not valid JSON"),
        (b'{"a": "caf\xe9"}\n', 1, "byte 0xe9 at byte 11 of the line is not UTF-8"),
        (b'{"a": "\xed\xa0\xbd"}\n', 1, "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), 1, "is not UTF-8"),
        (b'{"a": 1}\n[1, 2]\n', 2, "an array was found, and a JSON object is needed"),
        (b'\r\n{"a": 1}\n"text"\n', 3, "a string was found"),
        (b"12\n", 1, "a number was found"),
        (b"1.5\n", 1, "a number was found"),
        (b"null\n", 1, "null was found"),
        (b"true\n", 1, "a boolean was found"),
        (b'{"a":' + b"[" * 5000, 1, "not valid JSON"),
        (b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n', 2, "not valid JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named_with_file_line_and_reason(
    tmp_path: Path, content: bytes, line: int, reason: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    bad = {}
    for block in read_blocks(path):
        for found in block:
            try:
                parse_row(found.text)
            except RowError as error:
                bad[found.number] = str(error)
    assert bad.keys() == {line}
    assert reason in bad[line]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 7, 1000])
@pytest.mark.parametrize(
    ("content", "offsets"),
    [
        (b'{"a": "x,]}"}\n{"a": 2}\n', [0, 14]),
        (b'[\n{"a": "x,]}"},\n{"a": 2}\n]\n', [2, 17]),
        (b'\xef\xbb\xbf\n [{"a": "x,]}"},{"a": 2}, ]', [6, 20]),
        (b'{"a": "x,]}"}\r\n \n{"a": 2}', [0, 17]),
    ],
)
def test_lines_and_arrays_are_read_with_their_offsets_however_they_are_cut(
    tmp_path: Path, content: bytes, offsets: list[int], block_bytes: int, *, packed: bool
) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(gzip.compress(content) if packed else content)
    lines = [line for block in read_blocks(path, block_bytes) for line in block]
    assert [parse_row(line.text) for line in lines] == [{"a": "x,]}"}, {"a": 2}]
    assert [line.offset for line in lines] == offsets


def test_an_array_on_the_first_line_is_a_bad_line_where_more_lines_follow(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b' [{"a": 1}]\n{"a": 2}\n')
    lines = [line for block in read_blocks(path) for line in block]
    assert [(line.number, line.offset) for line in lines] == [(1, 1), (2, 12)]
    with pytest.raises(RowError, match="an array was found"):
        parse_row(lines[0].text)


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_say_how_much_of_the_file_they_took(tmp_path: Path, *, packed: bool) -> None:
    content = b"".join(
        b'{"a": "%d %s"}\n' % (i, os.urandom(200).hex().encode()) for i in range(2000)
    )
    path = tmp_path / "data.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    read = [block.read_bytes for block in read_blocks(path, 50_000)]
    assert read == sorted(read)
    assert 0 < read[0] < read[-1] == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"a": 1}, {"a": 2}', "does not end"),
        (b'[{"a": 1}] {"a": 2}', "has more after its JSON array"),
        (gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "is damaged"),
        (b"\x1f\x8bnothing", "is damaged"),
    ],
)
def test_a_file_that_is_damaged_as_a_whole_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=reason):
        read_rows(path)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}',
        b'{"a" : 1, "a" : 2}',
        b'{"a" : 1, "a": 2}',
        b'{"a\\\\": 1, "b": 1, "b": 2}',
        b'{"a"\t: {"b": 1}, "a": 2}',
        b'{"a": 1, "\\u0061": 2}',
        b'{"a": [{"b": 1, "c": 2, "b": 3}]}',
    ],
)
def test_a_key_that_is_there_twice_is_refused(text: bytes) -> None:
    with pytest.raises(RowError, match="twice in one object"):
        parse_row(text)


@pytest.mark.parametrize(
    "text",
    [b'{"a" : "\\"a\\": 1"}', b'{"a\\\\": 1, "b": {"a\\\\": "\\":"}}', b'{"a": "x\\\\", "b": 1}'],
)
def test_what_only_looks_like_a_second_key_is_read(text: bytes) -> None:
    assert parse_row(text) == json.loads(text)


def test_rows_that_nest_deeply_are_refused() -> None:
    with pytest.raises(RowError, match="more than 100 deep"):
        parse_row(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n\t\n", b"[]", b"[ , ]"])
def test_a_file_without_rows_is_refused(tmp_path: Path, model_dir: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="holds no rows"):
        run(path, model_dir)


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}\n{"a": 3}')
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]


@pytest.mark.parametrize("name", ["missing.jsonl", "directory", "pipe", "file/below"])
def test_what_is_no_readable_file_is_input_missing(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for read in (content_hash, lambda path: list(read_rows(path))):
        with pytest.raises(InputMissingError, match="cannot be read") as caught:
            read(tmp_path / name)
        assert caught.value.exit_code == 66
        assert str(tmp_path / name) in str(caught.value)


def _read_all(path: Path) -> None:
    for _, row in read_rows(path):
        try:
            recognise([row])
            parse_messages(row)
        except RowError as error:
            assert "\n" not in str(error)  # noqa: PT017 - only if one is raised


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
@example(b"\xef\xbb\xbf\xef\xbb\xbf{}")
@example(b'{"messages": [{"role": "user", "content": "\\ud83d"}]}')
def test_any_bytes_are_read_or_refused_as_dataset_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    try:
        _read_all(path)
    except DatasetError as error:
        assert str(path) in str(error)  # noqa: PT017 - only if one is raised
    except RowError as error:
        assert "\n" not in str(error)  # noqa: PT017 - only if one is raised


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "weight", "loss", "train", "tool_calls"])
            | st.text(max_size=3),
            inner | st.sampled_from(["user", "assistant", "tool"]),
            max_size=4,
        )
    ),
)


@settings(max_examples=50)
@given(messages=_JSON)
@example([{"role": ["user"], "content": "a"}])
@example([{"role": "user", "content": "a" * 999, "weight": {}}])
@example(json.loads("[" * 400 + "]" * 400))
def test_any_json_under_messages_is_read_or_refused_as_row_error(messages: object) -> None:
    try:
        parse_messages({"messages": messages})
    except RowError as error:
        assert len(str(error)) < 300  # noqa: PT017 - only if one is raised


# Reading conversations


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, '"messages" is an empty list'),
        ({"messages": "Hi"}, '"messages" is "Hi"'),
        ({"messages": {"role": "user"}}, '"messages" is an object'),
        ({"other": 1}, '"messages" is missing'),
        ({"messages": ["Hi"]}, 'messages[0] is "Hi"'),
        ({"messages": [{"content": "a"}]}, 'messages[0] has no "role"'),
        ({"messages": [{"role": "robot", "content": "a"}]}, 'the role "robot", and one of system'),
        ({"messages": [HI, {"role": 1, "content": "a"}]}, "messages[1] has the role 1"),
        ({"messages": [HI, {"role": "assistant"}]}, 'messages[1] has no "content"'),
        ({"messages": [{"role": "user", "content": None}]}, 'messages[0] has the "content" null'),
        ({"messages": [{"role": "user", "content": 5}]}, 'messages[0] has the "content" 5'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 1}]}]},
            'messages[0].content[0] is a part of the type "image_url", and only text',
        ),
        (
            {"messages": [HI, HELLO | {"tool_calls": [{}]}]},
            'messages[1].tool_calls[0] has no "name"',
        ),
        ({"messages": [HI, HELLO | {"tool_calls": "{"}]}, "a string, in which JSON is needed: not"),
        (
            {
                "messages": [
                    HI,
                    HELLO | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
                ]
            },
            'has the "arguments" a list, and an object is needed',
        ),
        ({"messages": [HI, HELLO], "tools": "x"}, '"tools" is a string, in which JSON is needed'),
        ({"messages": [HI, HELLO | {"train_detail": [1]}]}, '"train_detail", which is not read'),
        ({"messages": [HI]}, 'no message has the role "assistant"'),
        ({"messages": [HI, HELLO | {"weight": 0.5}]}, '"weight" 0.5, and 0 or 1 is needed'),
        ({"messages": [HI, HELLO | {"weight": 2}]}, '"weight" 2'),
        ({"messages": [HI, HELLO | {"weight": "0"}]}, '"weight" "0"'),
        ({"messages": [HI, HELLO | {"loss": 1}]}, '"loss" 1, and true or false is needed'),
        ({"messages": [HI | {"content": ""}, HELLO | {"content": ""}]}, "every answer is empty"),
        ({"messages": [HI, HELLO | {"train": "yes"}]}, '"train" "yes"'),
        ({"messages": [HI | {"train": True}, HELLO]}, "only assistant can be"),
    ],
)
def test_a_row_that_breaks_the_messages_form_is_refused_with_its_place(
    row: dict[str, object], reason: str
) -> None:
    with pytest.raises(RowError) as caught:
        parse_messages(row)
    assert reason in str(caught.value)


def test_all_five_roles_and_unknown_keys_are_read() -> None:
    roles = ["system", "developer", "user", "assistant", "tool"]
    row: dict[str, object] = {
        "messages": [{"role": r, "content": r, "id": 7} for r in roles],
        "source": "x",
        "tools": [],
    }
    turns = parse_messages(row).messages
    assert [(t.role, t.content, t.trained) for t in turns] == [
        (r, r, r == "assistant") for r in roles
    ]


@pytest.mark.parametrize(
    ("switches", "trained"),
    [
        ({}, True),
        ({"weight": 1, "loss": True, "train": True}, True),
        ({"weight": None}, True),
        ({"weight": 0}, False),
        ({"loss": False}, False),
        ({"train": False, "weight": 1}, False),
    ],
)
def test_any_switch_that_is_off_turns_training_off(
    switches: dict[str, object], *, trained: bool
) -> None:
    assert conversation([HI | {"weight": 0}, HELLO | switches]).messages[1].trained is trained


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({}, "no keys"),
        ({"chapter": 1, "verse": 2}, 'the keys "chapter", "verse"'),
        ({f"k{i}": 0 for i in range(99)}, '"k7", ...'),
    ],
)
def test_a_row_of_no_known_convention_is_refused_with_its_keys(
    row: dict[str, object], found: str
) -> None:
    with pytest.raises(RowError) as caught:
        recognise([row])
    assert found in str(caught.value)


# Masks


def test_the_answers_and_their_end_marks_are_trained_on(tokenizer: Any) -> None:  # noqa: ANN401
    row = tokenize(conversation(TWO_TURNS), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀<|im_end|>", "See you 👋<|im_end|>"]


def test_the_ids_are_those_of_the_chat_template(tokenizer: Any) -> None:  # noqa: ANN401
    ids, trained = tokenize(conversation(TWO_TURNS), tokenizer)
    expected = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True)["input_ids"]
    assert ids.tolist() == expected
    assert (ids.dtype.name, trained.dtype.name, len(trained)) == ("int32", "bool", len(ids))


@pytest.mark.parametrize("off", [2, 4])
def test_a_turn_with_training_off_is_masked(tokenizer: Any, off: int) -> None:  # noqa: ANN401
    messages = [m | {"train": False} if i == off else m for i, m in enumerate(TWO_TURNS)]
    kept = "See you 👋<|im_end|>" if off == 2 else "Hello 😀<|im_end|>"
    assert trained_texts(tokenize(conversation(messages), tokenizer), tokenizer) == [kept]


def test_turns_behind_the_last_answer_are_not_trained_on(tokenizer: Any) -> None:  # noqa: ANN401
    row = tokenize(conversation([HI, HELLO, BYE]), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀<|im_end|>"]


def test_answers_in_a_row_are_trained_on_apart(tokenizer: Any) -> None:  # noqa: ANN401
    row = tokenize(conversation([HI, HELLO, SEE_YOU]), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀<|im_end|>", "See you 👋<|im_end|>"]


def test_an_answer_that_opens_the_conversation_is_trained_on(tokenizer: Any) -> None:  # noqa: ANN401
    row = tokenize(conversation([HELLO, HI]), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀<|im_end|>"]


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.tuples(_TEXT, _TEXT), min_size=1, max_size=3))
@example([("", " a\n\n")])
@example([("<|im_end|>", "\n<|im_start|>")])
def test_tags_and_renderings_agree_for_any_text(
    pair: tuple[Any, Any], texts: list[tuple[str, str]]
) -> None:
    messages = [
        {"role": role, "content": content}
        for question, answer in texts
        for role, content in (("user", question), ("assistant", f"{answer}!"))
    ]
    plain, tagged = pair
    ids, trained = tokenize(conversation(messages), plain)
    tagged_ids, tagged_trained = tokenize(conversation(messages), tagged)
    assert ids.tolist() == tagged_ids.tolist()
    assert trained.tolist() == tagged_trained.tolist()


def test_a_last_character_of_several_tokens_is_trained_on_whole() -> None:
    bare = TAGGED.replace("m.content + '<|im_end|>' }}{% end", "m.content }}{% end")
    tokenizer = build_tokenizer(bare)
    row = tokenize(conversation([HI, HELLO]), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀"]


def test_tags_that_do_not_cover_every_turn_are_not_relied_on() -> None:
    tokenizer = build_tokenizer(TAGS_LAST_ONLY)
    row = tokenize(conversation(TWO_TURNS), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀<|im_end|>", "See you 👋<|im_end|>"]


@pytest.mark.parametrize("messages", [[HI, HELLO, BYE], TWO_TURNS])
def test_a_tagged_span_that_ends_in_trimmed_space_does_not_train_on_what_follows(
    messages: list[dict[str, Any]],
) -> None:
    spaced = TAGGED.replace("'<|im_end|>' }}{% endgeneration %}", "' ' }}{% endgeneration %}")
    tokenizer = build_tokenizer(spaced, trim_offsets=True)
    texts = trained_texts(tokenize(conversation(messages), tokenizer), tokenizer)
    assert texts == ["Hello 😀 ", "See you 👋 "][: len(messages) // 2]


def test_spaces_inside_and_at_the_end_of_an_answer_are_trained_on_with_trimmed_offsets() -> None:
    tokenizer = build_tokenizer(PLAIN, trim_offsets=True)
    answer = {"role": "assistant", "content": "  a  b  "}
    row = tokenize(conversation([{"role": "user", "content": "  q  "}, answer]), tokenizer)
    assert trained_texts(row, tokenizer) == ["  a  b  <|im_end|>"]


def test_a_template_that_drops_earlier_turns_gives_each_answer_a_text_of_its_own() -> None:
    tokenizer = build_tokenizer(FORGETFUL)
    rows = tokenize_all(conversation([HI, HELLO, BYE, SEE_YOU]), tokenizer)
    head = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\nHello 😀<|im_end|>\n"
    assert tokenizer.decode(rows[0][0]) == head
    assert [trained_texts(row, tokenizer) for row in rows] == [
        ["Hello 😀<|im_end|>"],
        ["See you 👋<|im_end|>"],
    ]


def test_a_template_that_drops_earlier_turns_serves_if_these_are_off() -> None:
    tokenizer = build_tokenizer(FORGETFUL)
    row = tokenize(conversation([HI, HELLO | {"loss": False}, BYE, SEE_YOU]), tokenizer)
    assert trained_texts(row, tokenizer) == ["See you 👋<|im_end|>"]


def test_a_template_that_drops_earlier_thoughts_trains_each_with_its_thought() -> None:
    tokenizer = build_tokenizer(THOUGHTLESS)
    thought = {"role": "assistant", "content": "<think>Hm</think>Hello"}
    rows = tokenize_all(conversation([HI, thought, BYE, thought]), tokenizer)
    assert [trained_texts(row, tokenizer) for row in rows] == [
        ["<think>Hm</think>Hello<|im_end|>"]
    ] * 2
    assert "<think>" not in tokenizer.decode(rows[1][0]).split("Bye")[0]
    row = tokenize(conversation([HI, thought | {"weight": 0}, BYE, thought]), tokenizer)
    assert trained_texts(row, tokenizer) == ["<think>Hm</think>Hello<|im_end|>"]


def test_turns_that_a_forgetful_template_writes_at_one_place_are_trained_apart() -> None:
    tokenizer = build_tokenizer(FORGETFUL)
    rows = tokenize_all(conversation([HI, HELLO, HI, HELLO]), tokenizer)
    assert [trained_texts(row, tokenizer) for row in rows] == [["Hello 😀<|im_end|>"]] * 2


def test_a_header_that_says_more_than_the_turn_counts_as_far_as_they_agree() -> None:
    tokenizer = build_tokenizer(THINKING)
    row = tokenize(conversation([HI, HELLO]), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀<|im_end|>"]


def test_an_opening_answer_is_refused_if_its_start_cannot_be_told() -> None:
    with pytest.raises(RowError, match="opens with an assistant turn"):
        tokenize(conversation([HELLO]), build_tokenizer(THINKING))


def test_a_conversation_that_the_template_refuses_is_refused_with_its_words() -> None:
    shy = PLAIN.replace("{% for", "{{ raise_exception('no bye') if messages|length > 2 }}{% for", 1)
    with pytest.raises(RowError, match=r"template refuses the conversation \(no bye\)"):
        tokenize(conversation([HI, HELLO, BYE, SEE_YOU]), build_tokenizer(shy))


@pytest.mark.parametrize(
    "template", [PICKY, PLAIN.replace("messages %}", "messages if m.role != 'system' %}")]
)
def test_a_system_message_without_a_place_goes_in_front_of_the_user_and_is_counted(
    template: str,
) -> None:
    tokenizer = build_tokenizer(template)
    codec = TemplateCodec(tokenizer, train_on_prompt=False)
    (made,) = codec.encode([conversation(TWO_TURNS)])
    assert not isinstance(made, RowError)
    ((ids, mask),) = made
    trained = np.asarray(mask, np.bool_)
    assert tokenizer.decode(ids).startswith("<|im_start|>user\nBe kind.\n\nHi there<|im_end|>")
    assert trained_texts((ids, trained), tokenizer) == [
        "Hello 😀<|im_end|>",
        "See you 👋<|im_end|>",
    ]
    assert codec.notes == {"system_folded": 1}


def test_tags_that_hide_what_an_answer_said_are_not_relied_on() -> None:
    forgetful = TAGGED.replace(
        "{{ m.content + '<|im_end|>' }}",
        "{{ (m.content if loop.last else m.content.split('</think>')[-1]) + '<|im_end|>' }}",
    )
    tokenizer = build_tokenizer(forgetful)
    thought = {"role": "assistant", "content": "<think>Hm</think>Hello"}
    rows = tokenize_all(conversation([HI, thought, BYE, thought]), tokenizer)
    assert [trained_texts(row, tokenizer) for row in rows] == [
        ["<think>Hm</think>Hello<|im_end|>"]
    ] * 2


def test_a_mark_that_closes_the_whole_text_does_not_split_a_conversation() -> None:
    # As Phi-3 has it.
    closing = PLAIN.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    tokenizer = build_tokenizer(closing)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    row = tokenize(conversation(TWO_TURNS), tokenizer)
    assert trained_texts(row, tokenizer) == [
        "Hello 😀<|im_end|>",
        "See you 👋<|im_end|>\n<|end|>",
    ]


def test_an_end_that_the_template_leaves_open_is_the_end_of_text_token_and_is_told() -> None:
    tokenizer = build_tokenizer(PLAIN.replace("<|im_end|>", ""))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    for on_prompt in (False, True):
        codec = TemplateCodec(tokenizer, train_on_prompt=on_prompt)
        answered, asked = codec.encode([conversation([HI, HELLO]), conversation([HI, HELLO, BYE])])
        assert not isinstance(answered, RowError)
        assert not isinstance(asked, RowError)
        ids, mask = answered[0]
        assert tokenizer.decode(ids).endswith("Hello 😀\n<|im_end|>")
        assert mask[-1]
        assert not tokenizer.decode(asked[0][0]).endswith("<|im_end|>")
        assert codec.notes["ended"] == 1


def test_an_open_end_is_closed_where_the_system_message_has_no_place() -> None:
    tokenizer = build_tokenizer(PICKY.replace("<|im_end|>", ""))
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    row = tokenize(conversation(TWO_TURNS), tokenizer)
    assert trained_texts(row, tokenizer)[-1] == "See you 👋\n<|im_end|>"


def test_what_a_tool_says_is_missed_even_if_an_answer_repeats_it() -> None:
    deaf = PLAIN.replace("in messages %}", "in messages if m.role != 'tool' %}")
    turns: list[dict[str, Any]] = [
        HI,
        {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
        {"role": "tool", "content": "12"},
        {"role": "assistant", "content": "It is 12."},
    ]
    with pytest.raises(RowError, match=r"leaves out messages\[2\], which a tool says"):
        tokenize_all(conversation(turns), build_tokenizer(deaf))


def test_a_template_that_writes_any_role_gets_the_one_that_the_model_has_a_token_for() -> None:
    turns: list[dict[str, Any]] = [HI, HELLO, {"role": "tool", "content": "12"}, SEE_YOU]
    tokenizer = build_tokenizer(PLAIN)
    assert "<|im_start|>tool\n12" in tokenizer.decode(tokenize(conversation(turns), tokenizer)[0])
    tokenizer.add_tokens(["<|observation|>"], special_tokens=True)
    text = tokenizer.decode(tokenize(conversation(turns), tokenizer)[0])
    assert "<|im_start|>observation\n12" in text


def test_whatever_a_template_raises_makes_a_bad_row() -> None:
    for fault in ("1 / 0", "messages['a'] + 1", "range(10 ** 30) | list"):
        tokenizer = build_tokenizer("{{ " + fault + " }}" + PLAIN)
        with pytest.raises(RowError, match="refuses the conversation"):
            tokenize(conversation([HI, HELLO]), tokenizer)


def test_tools_that_only_a_call_names_are_told_as_left_out() -> None:
    called = PLAIN.replace(
        "+ '<|im_end|>", "+ (m.tool_calls[0].function.name if m.tool_calls else '') + '<|im_end|>"
    )
    codec = TemplateCodec(build_tokenizer(called), train_on_prompt=False)
    row = {
        "tools": [{"name": "clock", "description": "", "parameters": {}}],
        "messages": [
            HI,
            {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]},
        ],
    }
    (made,) = codec.encode([parse_messages(row)])
    assert not isinstance(made, RowError)
    assert codec.notes["tools_left_out"] == 1


def _python_tokenizer(pieces: str) -> Any:  # noqa: ANN401
    """Return a tokenizer in Python: one token a match of the pattern."""
    import re

    from transformers import PreTrainedTokenizer

    class PieceTokenizer(PreTrainedTokenizer):  # type: ignore[misc] # transformers has no types
        def __init__(self) -> None:
            self.pieces: list[str] = []
            super().__init__(chat_template=PLAIN)

        @property
        def vocab_size(self) -> int:
            return len(self.pieces)

        def get_vocab(self) -> dict[str, int]:
            return {piece: i for i, piece in enumerate(self.pieces)}

        def _tokenize(self, text: str) -> list[str]:
            return re.findall(pieces, text, re.DOTALL)

        def _convert_token_to_id(self, token: str) -> int:
            if token not in self.pieces:
                self.pieces.append(token)
            return self.pieces.index(token)

        def _convert_id_to_token(self, index: int) -> str:
            return self.pieces[index]

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens)

    return PieceTokenizer()


def test_a_tokenizer_in_python_gives_the_same_masks() -> None:
    tokenizer = _python_tokenizer(r"<\|im_\w+\|>|.")
    row = tokenize(conversation(TWO_TURNS), tokenizer)
    assert trained_texts(row, tokenizer) == ["Hello 😀<|im_end|>", "See you 👋<|im_end|>"]


def test_a_token_across_the_border_of_a_turn_is_refused_for_a_tokenizer_in_python() -> None:
    with pytest.raises(RowError, match="reaches across the border"):
        tokenize(conversation([HI, HELLO]), _python_tokenizer(r"\nHello|."))


# Preparing


def test_rows_are_stored_as_they_are_tokenised(tmp_path: Path, model_dir: Path) -> None:
    conversations = [[HI, HELLO], TWO_TURNS]
    profile = run(write_lines(tmp_path / "data.jsonl", conversations), model_dir)
    tokenizer = load_tokenizer(model_dir, trust_remote_code=False)
    rows = Rows.open(tmp_path / "rows")
    assert len(rows) == 2
    for i, messages in enumerate(conversations):
        ids, trained = tokenize(conversation(messages), tokenizer)
        assert rows[i][0].tolist() == ids.tolist()
        assert rows[i][1].tolist() == trained.tolist()
    assert profile == rows.meta.profile


def test_the_profile_holds_the_figures_of_the_stored_rows(tmp_path: Path, model_dir: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]] * 3 + [TWO_TURNS])
    profile = run(path, model_dir)
    rows = Rows.open(tmp_path / "rows")
    short, long = int(rows.lengths.min()), int(rows.lengths.max())
    assert rows.lengths.tolist() == [short, short, short, long]
    assert profile == DatasetProfile(
        path=str(path),
        format="messages",
        rows=4,
        rows_used=4,
        rows_truncated=0,
        rows_without_trained_tokens=0,
        tokens=3 * short + long,
        tokens_lost=0,
        trained_tokens=sum(int(rows[i][1].sum()) for i in range(4)),
        min_length=short,
        mean_length=(3 * short + long) / 4,
        max_length=long,
        percentiles=tuple((q, long if q > 75 else short) for q in (5, 25, 50, 75, 90, 95, 99)),
        sequences=4,
        coverage=((512, 1.0),),
        histogram=((32, 3), (64, 1)),
    )


def test_rows_beyond_the_limit_are_cut_and_counted(tmp_path: Path, model_dir: Path) -> None:
    late: list[dict[str, Any]] = [{"role": "user", "content": "Bye " * 50}, HELLO]
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO], TWO_TURNS, late])
    whole = run(path, model_dir, output=tmp_path / "whole")
    full = Rows.open(tmp_path / "whole").lengths
    limit = int(full[0]) + 30
    cut = run(path, model_dir, max_seq_length=limit)
    rows = Rows.open(tmp_path / "rows")
    assert rows.lengths.tolist() == [full[0], limit]
    assert (cut.rows, cut.rows_used, cut.rows_truncated, cut.rows_reported) == (3, 2, 1, 1)
    assert cut.rows_without_trained_tokens == 1
    assert cut.tokens_lost == full[1] - limit + full[2]
    assert cut.trained_tokens == sum(int(rows[i][1].sum()) for i in range(2))
    assert (whole.rows_reported, whole.tokens_lost) == (0, 0)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), limit=st.integers(1, 80))
def test_every_row_is_used_or_reported(
    tmp_path: Path, model_dir: Path, data: st.DataObject, limit: int
) -> None:
    choices: list[list[dict[str, Any]]] = [[HI, HELLO], TWO_TURNS, [HI, HELLO | {"train": False}]]
    conversations = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=6))
    path = write_lines(tmp_path / "data.jsonl", conversations)
    try:
        profile = run(path, model_dir, max_seq_length=limit, rules=Rules(on_bad_line="skip"))
    except DatasetError as error:
        assert f"none of the {len(conversations)} rows" in str(error)  # noqa: PT017
        return
    assert profile.rows == len(conversations)
    assert profile.rows == profile.rows_used + profile.rows_reported
    assert profile.rows_bad == conversations.count(choices[2])
    rows = Rows.open(tmp_path / "rows")
    assert all(rows[i][1].any() for i in range(len(rows)))
    assert profile.max_length <= limit


def test_a_dataset_with_nothing_to_train_on_is_refused(tmp_path: Path, model_dir: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [[{"role": "user", "content": "Hi " * 99}, HELLO]])
    with pytest.raises(DatasetError, match=r"none of the 1 rows .* has a token to train on"):
        run(path, model_dir, max_seq_length=9)
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": [HI]}, 'no message has the role "assistant"'),
        ({"messages": [HI, HELLO | {"weight": 0}]}, "no token of it is trained on"),
        ({"other": "Hi"}, '"messages" is missing'),
    ],
)
def test_a_bad_row_is_named_by_file_and_line_and_leaves_nothing_behind(
    tmp_path: Path, model_dir: Path, bad: dict[str, object], reason: str
) -> None:
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]])
    path.write_bytes(path.read_bytes() + b"\n" + orjson.dumps(bad))
    with pytest.raises(DatasetError) as caught:
        run(path, model_dir)
    start = path.read_bytes().rindex(b"\n") + 1
    assert str(caught.value).startswith(f"{path}, line 3 (byte {start}): ")
    assert reason in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_first_row_of_no_known_convention_is_named(tmp_path: Path, model_dir: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"verse": "Hi"}\n')
    with pytest.raises(DatasetError, match=r'line 2 \(byte 1\): the row has the keys "verse"'):
        run(path, model_dir)


def test_what_a_template_refuses_is_named_by_file_and_line(tmp_path: Path) -> None:
    shy = PLAIN.replace("{% for", "{{ raise_exception('no bye') if messages|length > 2 }}{% for", 1)
    build_tokenizer(shy).save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO], TWO_TURNS])
    with pytest.raises(
        DatasetError, match=r"data\.jsonl, line 2 \(byte \d+\): the tokenizer's chat template"
    ):
        run(path, tmp_path / "model")


def test_an_id_without_embedding_is_a_config_error(tmp_path: Path, model_dir: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]])
    with pytest.raises(ConfigError, match="gives the token id") as caught:
        run(path, model_dir, vocab_size=100)
    assert caught.value.exit_code == 78
    assert "embeddings for 0 to 99" in str(caught.value)
    assert not (tmp_path / "rows").exists()
    run(path, model_dir)
    with pytest.raises(ConfigError):
        run(path, model_dir, vocab_size=100)


def test_the_largest_id_may_be_the_last_of_the_vocabulary(tmp_path: Path, model_dir: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]])
    run(path, model_dir)
    largest = Rows.open(tmp_path / "rows").meta.largest_id
    run(path, model_dir, vocab_size=largest + 1)
    with pytest.raises(ConfigError):
        run(path, model_dir, vocab_size=largest)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no tokenizer is in"),
        ({"config.json": '{"model_type": "gpt2"}'}, "no tokenizer is in"),
        ({"tokenizer.json": "{"}, "cannot be loaded"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "has no vocabulary"),
        (
            {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}'},
            "allow its own code with trust_remote_code",
        ),
    ],
)
def test_a_missing_or_broken_tokenizer_is_input_missing(
    tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]])
    with pytest.raises(InputMissingError) as caught:
        run(path, model)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_chat_template_is_input_missing(tmp_path: Path) -> None:
    build_tokenizer(None).save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]])
    with pytest.raises(InputMissingError, match="has no chat template: use the tokenizer of"):
        run(path, tmp_path / "model")


def test_a_missing_dataset_is_reported_before_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="the dataset"):
        run(tmp_path / "data.jsonl", tmp_path / "model")


# Reuse


def _stamp(directory: Path) -> int:
    return (directory / "meta.json").stat().st_ino


def test_the_same_content_is_tokenised_once(tmp_path: Path, model_dir: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]])
    first = run(path, model_dir)
    stamp = _stamp(tmp_path / "rows")
    moved = path.rename(tmp_path / "renamed.jsonl")
    second = run(moved, model_dir)
    assert _stamp(tmp_path / "rows") == stamp
    assert (first.path, second.path) == (str(path), str(moved))
    assert (first.tokens, first.percentiles) == (second.tokens, second.percentiles)


@pytest.mark.parametrize("change", ["data", "template", "limit", "damage"])
def test_rows_are_made_again_when_what_they_depend_on_changes(tmp_path: Path, change: str) -> None:
    model = tmp_path / "model"
    build_tokenizer(PLAIN).save_pretrained(model)
    path = write_lines(tmp_path / "data.jsonl", [[HI, HELLO]])
    before = run(path, model)
    stamp = _stamp(tmp_path / "rows")
    match change:
        case "data":
            write_lines(path, [[HI, HELLO], [BYE, SEE_YOU]])
        case "template":
            (model / "chat_template.jinja").write_text(PLAIN.replace("<|im_end|>", ""))
        case "limit":
            pass
        case _:
            os.truncate(tmp_path / "rows" / "input_ids.npy", 130)
    after = run(path, model, max_seq_length=999 if change == "limit" else 1000)
    assert _stamp(tmp_path / "rows") != stamp
    assert (after == before) == (change in ("limit", "damage"))
    assert Rows.open(tmp_path / "rows").meta.profile == after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "model", "rows"]


def test_the_content_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"abc")
    two.write_bytes(b"abc")
    assert content_hash(one) == content_hash(two) == content_hash(one).lower()
    two.write_bytes(b"abd")
    assert content_hash(one) != content_hash(two)


# Storing


def _meta(key: str = "key") -> RowsMeta:
    profile = DatasetProfile(
        path="data.jsonl",
        format="messages",
        rows=3,
        rows_used=3,
        rows_truncated=0,
        rows_without_trained_tokens=0,
        tokens=6,
        tokens_lost=0,
        trained_tokens=3,
        min_length=1,
        mean_length=2.0,
        max_length=3,
        percentiles=((50, 2),),
    )
    return RowsMeta(content_key=key, largest_id=6, profile=profile)


def _write(directory: Path, lengths: Iterable[int] = (1, 2, 3), key: str = "key") -> Rows:
    with RowsWriter(directory) as writer:
        for length in lengths:
            ids = np.arange(length, dtype=np.int32)
            writer.append(ids, ids % 2 == 0)
        return writer.commit(_meta(key))


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=4), max_size=9
    )
)
def test_what_is_written_is_read_again(tmp_path: Path, rows: list[list[tuple[int, bool]]]) -> None:
    rows = [*rows, [(7, True)]]
    with RowsWriter(tmp_path / "rows") as writer:
        for row in rows:
            ids = np.asarray([token for token, _ in row], dtype=np.int32)
            writer.append(ids, np.asarray([trained for _, trained in row], dtype=np.bool_))
        assert writer.lengths.tolist() == [len(row) for row in rows]
        writer.commit(_meta())
    stored = Rows.open(tmp_path / "rows")
    read = [
        [(int(token), bool(trained)) for token, trained in zip(*stored[i], strict=True)]
        for i in range(len(stored))
    ]
    assert read == rows
    assert stored.lengths.tolist() == [len(row) for row in rows]
    assert stored.lengths.dtype == np.int64


def test_the_arrays_are_plain_npy_files_and_memory_mapped(tmp_path: Path) -> None:
    rows = _write(tmp_path / "rows")
    assert np.load(tmp_path / "rows" / "input_ids.npy").tolist() == [0, 0, 1, 0, 1, 2]
    assert np.load(tmp_path / "rows" / "trained.npy").dtype == np.bool_
    assert np.load(tmp_path / "rows" / "offsets.npy").tolist() == [0, 1, 3, 6]
    assert not rows[2][0].flags.writeable
    assert str(tmp_path / "rows" / "input_ids.npy") in Path("/proc/self/maps").read_text()


def test_rows_are_indexed_like_a_sequence(tmp_path: Path) -> None:
    rows = _write(tmp_path / "rows")
    assert rows[-1][0].tolist() == rows[2][0].tolist() == [0, 1, 2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            rows[index]


def test_the_files_are_private(tmp_path: Path) -> None:
    _write(tmp_path / "a" / "rows")
    mode = stat.S_IMODE((tmp_path / "a" / "rows").stat().st_mode)
    files = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "a" / "rows").iterdir()}
    assert (mode, files) == (0o700, {0o600})


def test_rows_that_are_not_committed_leave_the_old_ones(tmp_path: Path) -> None:
    _write(tmp_path / "rows", key="old")
    with RowsWriter(tmp_path / "rows") as writer:
        writer.append(np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.bool_))
        assert Rows.open(tmp_path / "rows").meta.content_key == "old"
    assert len(Rows.open(tmp_path / "rows")) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_a_reader_keeps_the_rows_it_opened_when_they_are_replaced(tmp_path: Path) -> None:
    old = _write(tmp_path / "rows")
    _write(tmp_path / "rows", lengths=[5])
    assert old[2][0].tolist() == [0, 1, 2]
    assert Rows.open(tmp_path / "rows").lengths.tolist() == [5]


def test_a_link_and_an_empty_directory_take_rows(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    _write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(Rows.open(tmp_path / "real")) == 3


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CannotWriteError, match=r"holds other files \(thesis.tex\)") as caught:
        _write(tmp_path)
    assert caught.value.exit_code == 73
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_cannot_be_written_over(tmp_path: Path) -> None:
    (tmp_path / "rows").touch()
    for output in (tmp_path / "rows", tmp_path / "rows" / "below"):
        with pytest.raises(CannotWriteError, match="cannot be written to"):
            _write(output)


@contextmanager
def _file_size_limit(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("tokens", [1000, 500_000])
def test_rows_that_do_not_fit_on_the_disk_cannot_be_written_and_are_removed(
    tmp_path: Path, tokens: int
) -> None:
    with _file_size_limit(2000), pytest.raises(CannotWriteError, match="File too large"):
        _write(tmp_path / "rows", lengths=[tokens])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.json", b"{"),
        ("meta.json", b"[]"),
        ("meta.json", b"{}"),
        ("meta.json", b'{"schema": 999}'),
        ("meta.json", b'{"schema": 1, "profile": {"percentiles": []}}'),
        ("meta.json", None),
        ("offsets.npy", b""),
        ("offsets.npy", b"\x93NUMPY"),
        ("trained.npy", None),
    ],
)
def test_rows_that_are_not_complete_are_input_missing(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    _write(tmp_path / "rows")
    (tmp_path / "rows" / name).unlink()
    if content is not None:
        (tmp_path / "rows" / name).write_bytes(content)
    with pytest.raises(InputMissingError, match="no complete tokenised rows are in"):
        Rows.open(tmp_path / "rows")


@pytest.mark.parametrize("array", [np.zeros(6, dtype=np.int64), np.zeros(5, dtype=np.int32)])
def test_arrays_that_do_not_belong_together_are_input_missing(
    tmp_path: Path, array: np.ndarray[Any, Any]
) -> None:
    _write(tmp_path / "rows")
    np.save(tmp_path / "rows" / "input_ids.npy", array)
    with pytest.raises(InputMissingError, match="no complete tokenised rows"):
        Rows.open(tmp_path / "rows")


# Speed and weight


def test_430_conversations_are_prepared_in_under_two_seconds(
    tmp_path: Path, model_dir: Path
) -> None:
    path = write_lines(tmp_path / "data.jsonl", [TWO_TURNS] * 430)
    started = time.monotonic()
    profile = run(path, model_dir)
    assert time.monotonic() - started < 2
    assert profile.rows_used == 430


def test_rows_are_read_without_torch_or_transformers(tmp_path: Path) -> None:
    import subprocess
    import sys

    _write(tmp_path / "rows")
    code = (
        "import sys; from pathlib import Path; from autotune.dataset import Rows, content_hash;"
        f"assert len(Rows.open(Path({str(tmp_path / 'rows')!r}))) == 3;"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

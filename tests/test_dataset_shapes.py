"""Rendering without the template engine gives what the template engine gives, or is not done."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_dataset import FORGETFUL, PLAIN, TAGGED, THOUGHTLESS, build_tokenizer

from autotune import builtin
from autotune.dataset.conversation import Conversation, Message
from autotune.dataset.encode import TemplateCodec
from autotune.dataset.lines import RowError
from autotune.dataset.shapes import ShapeCache
from autotune.dataset.template import ChatTemplate
from autotune.dataset.tokenizer import load_tokenizer

# As Qwen3 has it: thoughts are kept behind the last question alone, and an answer there without one
# gets an empty one.
THINKER = """{%- set ns = namespace(at=0) %}
{%- for m in messages %}{%- if m.role == 'user' and not (m.content.startswith('<tool>')
and m.content.endswith('</tool>')) %}{%- set ns.at = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.content is string %}{%- set content = m.content %}
{%- else %}{%- set content = '' %}{%- endif %}
{%- if m.role == 'assistant' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if loop.index0 > ns.at and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TRIMMING = PLAIN.replace("m.content", "(m.content | trim)")
JOINING = PLAIN.replace("m.content + '<|im_end|>\\n'", "m.content ~ '<|im_end|>\\n'")
HIDDEN_TEST = PLAIN.replace(
    "{{ m.content + '<|im_end|>\\n' }}",
    "{% set c = m.content ~ '' %}{{ ('?' if 'secret' in c else c) + '<|im_end|>\\n' }}",
)
HIDDEN_REPLACE = PLAIN.replace("m.content +", "(m.content | replace('secret', '')) +")
HIDDEN_MACRO = "{% macro w(c) %}{{ c }}{% endmacro %}" + PLAIN.replace(
    "{{ m.content +", "{% set c = w(m.content) | trim %}{{ c +"
)
BACKWARDS_IN = PLAIN.replace(
    "m.content + '<|im_end|>\\n'",
    "('!' if m.content in 'a secret' else m.content) + '<|im_end|>\\n'",
)
LISTED = PLAIN.replace("m.content +", "('none' if m.content in ['', 'secret'] else m.content) +")
MEASURED = PLAIN.replace("m.content +", "('none' if m.content | length > 5 else m.content) +")
SERIAL = PLAIN.replace("m.content +", "(m.content | tojson) +")
TEMPLATES = {
    "plain": PLAIN,
    "tagged": TAGGED,
    "trimming": TRIMMING,
    "joining": JOINING,
    "thinker": THINKER,
    "forgetful": FORGETFUL,
    "thoughtless": THOUGHTLESS,
    "hidden test": HIDDEN_TEST,
    "hidden replace": HIDDEN_REPLACE,
    "hidden macro": HIDDEN_MACRO,
    "backwards in": BACKWARDS_IN,
    "listed": LISTED,
    "measured": MEASURED,
    "serial": SERIAL,
}
_CONTENT = st.one_of(
    st.sampled_from(["", " ", "a", "secret", "a secret", " Hi \n", '"\\', "<|im_end|>"]),
    st.sampled_from(["<think>\nHm\n</think>\n\nHello", "\n</think>", "<tool>x</tool>"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
_CACHES: dict[str, tuple[ChatTemplate, ShapeCache]] = {}


def _cache(name: str) -> tuple[ChatTemplate, ShapeCache]:
    if name not in _CACHES:
        template = ChatTemplate(build_tokenizer(TEMPLATES[name]))
        _CACHES[name] = template, ShapeCache(template, whole=False)
    return _CACHES[name]


def _conversation(turns: list[tuple[str, str, bool]]) -> Conversation:
    return Conversation(
        messages=tuple(
            Message(role, content, trained and role == "assistant")
            for role, content, trained in turns
        )
    )


def _texts(make: Any, conversation: Conversation) -> Any:  # noqa: ANN401
    try:
        return [(s.text, s.trained) for s in make(conversation)]
    except RowError as error:
        return str(error)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(
    pairs=st.lists(st.tuples(_CONTENT, _CONTENT, st.booleans()), min_size=1, max_size=3),
    system=st.none() | _CONTENT,
)
@example(pairs=[("a", "b", True), ("a", "<think>\nHm\n</think>\n\nHello", True)], system=None)
def test_shapes_give_the_texts_and_spans_of_the_template(
    name: str, pairs: list[tuple[str, str, bool]], system: str | None
) -> None:
    template, cache = _cache(name)
    turns = [("system", system, False)] if system is not None else []
    for question, answer, trained in pairs:
        turns += [("user", question, False), ("assistant", answer, trained)]
    conversation = _conversation(turns)
    assert _texts(cache.samples, conversation) == _texts(template.samples, conversation)


@pytest.mark.parametrize(
    ("name", "proven"),
    [
        ("plain", True),
        ("tagged", True),
        ("trimming", True),
        ("joining", True),
        ("thinker", True),
        ("listed", True),
        ("hidden test", False),
        ("hidden replace", False),
        ("hidden macro", False),
        ("backwards in", False),
        ("measured", None),
        ("serial", None),
    ],
)
def test_a_template_is_left_out_of_the_way_only_where_that_is_proven(
    name: str, *, proven: bool | None
) -> None:
    _, cache = _cache(name)
    shape = cache._shape_of(_conversation([("user", "a", False), ("assistant", "b", True)]))
    assert (None if shape is None else shape.guards is not None) is proven


def test_the_demo_template_is_left_out_of_the_way() -> None:
    tokenizer = load_tokenizer(builtin.directory("glm-tiny"), trust_remote_code=False)
    cache = ShapeCache(ChatTemplate(tokenizer), whole=False)
    shape = cache._shape_of(_conversation([("user", "a", False), ("assistant", "b", True)]))
    assert shape is not None
    assert shape.guards is not None


def test_a_template_that_drops_old_thoughts_shows_each_answer_what_the_model_will_see() -> None:
    tokenizer = build_tokenizer(THINKER)
    codec = TemplateCodec(tokenizer, train_on_prompt=False)
    thought = "<think>\nHm\n</think>\n\nHello"
    turns = [("user", "a", False), ("assistant", thought, True)] * 2
    (made,) = codec.encode([_conversation(turns)])
    assert not isinstance(made, RowError)
    assert codec.notes == {"split": 1}
    seen = []
    for ids, mask in made:
        start = mask.index(1)
        assert all(mask[start:-1])
        seen.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])))
    head = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert seen == [
        (head, thought + "<|im_end|>\n"),
        (head + "Hello<|im_end|>\n" + head, thought + "<|im_end|>\n"),
    ]


@pytest.mark.parametrize(
    ("template", "extra", "note"),
    [
        (THINKER, {"reasoning_content": "Hm"}, None),
        (PLAIN, {"reasoning_content": "Hm"}, "thoughts_left_out"),
        (PLAIN, {"name": "Ann"}, None),
    ],
)
def test_thoughts_are_given_to_the_template_and_missed_ones_are_counted(
    template: str, extra: dict[str, object], note: str | None
) -> None:
    codec = TemplateCodec(build_tokenizer(template), train_on_prompt=False)
    messages = (
        Message("user", "a", trained=False),
        Message("assistant", "b", trained=True, extra=extra),
    )
    (made,) = codec.encode([Conversation(messages=messages)])
    assert not isinstance(made, RowError)
    assert dict(codec.notes) == ({note: 1} if note else {})
    assert ("Hm" in codec.decode(made[0][0])) == (template == THINKER)


def test_calls_that_a_template_does_not_write_become_json_and_lost_observations_are_refused() -> (
    None
):
    codec = TemplateCodec(build_tokenizer(PLAIN), train_on_prompt=False)
    call: dict[str, Any] = {"function": {"name": "add", "arguments": {}}}
    calling = Message("assistant", "", trained=True, extra={"tool_calls": [call]})
    deaf = PLAIN.replace("messages %}", "messages if m.role != 'tool' %}")
    (made,) = codec.encode([Conversation(messages=(Message("user", "a", trained=False), calling))])
    assert not isinstance(made, RowError)
    assert codec.notes == {"calls_as_text": 1}
    assert codec.decode(made[0][0]).endswith('\n{"name": "add", "arguments": {}}<|im_end|>\n')
    codec = TemplateCodec(build_tokenizer(deaf), train_on_prompt=False)
    turns = [("user", "a", False), ("tool", "42", False), ("assistant", "b", True)]
    (made,) = codec.encode([_conversation(turns)])
    assert "leaves out messages[1]" in str(made)

"""Conventions that list the turns of a conversation."""

from collections.abc import Iterable, Sequence

from autotune.dataset.conversation import (
    ROLES,
    Conversation,
    Message,
    extra_of,
    is_switched_off,
    parse_content,
    parse_role,
    parse_tool_calls,
    parse_tools,
    require_list,
    require_text,
    require_turns,
    shown,
)
from autotune.dataset.lines import Row, RowError

TURN_KEYS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt")
_CALL_TURNS = ("function_call", "tool_call")


def parse_messages(row: Row) -> Conversation:
    """Read OpenAI's form: `{"messages": [{"role": "user", "content": "..."}, ...]}`.

    `tools` may be a list or JSON in a string, and so may the arguments of `tool_calls`.

    Raises:
        RowError: the row breaks the form.
    """
    key = _turns_key(row)
    messages = with_system(row, _messages(require_list(row, key), key))
    return Conversation(messages=require_turns(messages), tools=parse_row_tools(row))


def parse_sharegpt(row: Row) -> Conversation:
    """Read ShareGPT's form: `{"conversations": [{"from": "human", "value": "..."}, ...]}`.

    Raises:
        RowError: the row breaks the form.
    """
    key = _turns_key(row)
    messages = _messages(require_list(row, key), key, role_key="from", content_key="value")
    messages = with_system(row, messages)
    return Conversation(messages=require_turns(messages), tools=parse_row_tools(row))


def parse_sharegpt_pairs(row: Row) -> Conversation:
    """Read pairs in a list: `{"conversation": [{"human": "...", "assistant": "..."}, ...]}`.

    Raises:
        RowError: the row breaks the form.
    """
    key = _turns_key(row)
    messages: list[Message] = []
    for place, pair in enumerate(require_list(row, key)):
        where = f"{key}[{place}]"
        record = _require_object(pair, where, '"human" and "assistant"')
        off = is_switched_off(record, "assistant", where)
        question = require_text(record, "human", where)
        messages += exchange(question, require_text(record, "assistant", where), off=off)
    turns = require_turns(with_system(row, messages))
    return Conversation(messages=turns, tools=parse_row_tools(row))


def parse_chatglm3(row: Row) -> Conversation:
    """Read ChatGLM3's form: `{"conversations": [{"role": "user", "content": "..."}, ...]}`.

    A turn of the role tool holds a call and what it gave: the assistant's turn that makes the
    call, which is trained on, and an observation, which is not.

    Raises:
        RowError: the row breaks the form.
    """
    key = _turns_key(row)
    messages: list[Message] = []
    for place, turn in enumerate(require_list(row, key)):
        where = f"{key}[{place}]"
        record = _require_object(turn, where, '"role" and "content"')
        if record.get("role") == "tool" and "parameters" in record:
            messages += _call_and_observation(record, where)
        else:
            messages.append(_message(record, where, "role", "content", lenient=True))
    return Conversation(
        messages=require_turns(with_system(row, messages)), tools=_free_tools(row.get("tools"))
    )


def parse_glm4(row: Row) -> Conversation:
    """Read GLM-4's form: like `messages`, with `tools` inside the system message.

    Raises:
        RowError: the row breaks the form.
    """
    key = _turns_key(row)
    messages = with_system(row, _messages(require_list(row, key), key))
    inside = (message.extra.get("tools") for message in messages)
    tools = next((parse_tools(found, f"{key}: tools") for found in inside if found), ())
    return Conversation(messages=require_turns(messages), tools=tools or parse_row_tools(row))


def parse_renamed(row: Row, key: str, role_key: str, content_key: str) -> Conversation:
    """Read turns at a key of the user's choice.

    Raises:
        RowError: the row breaks the form.
    """
    messages = _messages(require_list(row, key), key, role_key=role_key, content_key=content_key)
    messages = with_system(row, messages)
    return Conversation(messages=require_turns(messages), tools=parse_row_tools(row))


def exchange(question: str, answer: str, *, off: bool = False) -> list[Message]:
    """Return a question of the user's and the assistant's answer."""
    return [
        Message(role="user", content=question, trained=False),
        Message(role="assistant", content=answer, trained=not off, switched_off=off),
    ]


def shape_of(row: Row) -> str | None:
    """Return the convention that the turns of a row have, or None if it has no turns."""
    key = next((key for key in TURN_KEYS if key in row), None)
    if key is None:
        return None
    turns = row[key]
    first = turns[0] if isinstance(turns, list) and turns else None
    keys = first.keys() if isinstance(first, dict) else ()
    if "from" in keys and "role" not in keys:
        return "sharegpt"
    if "human" in keys and "assistant" in keys:
        return "sharegpt-pairs"
    if key != "messages":
        return "chatglm3" if "role" in keys else None
    return "glm4" if isinstance(turns, list) and _has_marks_of_glm4(turns) else "messages"


def _has_marks_of_glm4(turns: Iterable[object]) -> bool:
    return any(
        isinstance(turn, dict)
        and (
            turn.get("role") == "observation" or (turn.get("role") == "system" and "tools" in turn)
        )
        for turn in turns
    )


def _turns_key(row: Row) -> str:
    return next((key for key in TURN_KEYS if key in row), "messages")


def parse_row_tools(row: Row) -> tuple[object, ...]:
    """Return the tools of a row.

    Raises:
        RowError: they are no definitions.
    """
    key = "tools" if row.get("tools") else "functions"
    return parse_tools(row.get(key), f'"{key}"')


def _free_tools(value: object) -> tuple[object, ...]:
    """Return ChatGLM3's tools, whose form is free within a list."""
    if isinstance(value, list):
        return tuple(value)
    return parse_tools(value, '"tools"', wrap=False)


def with_system(row: Row, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return messages behind the system message that the row has beside them, if any.

    Raises:
        RowError: it is no text.
    """
    key = next((key for key in SYSTEMS if row.get(key)), None)
    if key is None:
        return tuple(messages)
    system = Message(role="system", content=require_text(row, key), trained=False)
    said = any((turn.role, turn.content) == (system.role, system.content) for turn in messages[:1])
    return tuple(messages) if said else (system, *messages)


def _messages(
    turns: list[object], key: str, *, role_key: str = "role", content_key: str = "content"
) -> tuple[Message, ...]:
    messages = []
    for place, turn in enumerate(turns):
        message = _plain_message(turn, role_key, content_key)
        if message is None:
            where = f"{key}[{place}]"
            record = _require_object(turn, where, f'"{role_key}" and "{content_key}"')
            message = _message(record, where, role_key, content_key)
        messages.append(message)
    return tuple(messages)


def _plain_message(turn: object, role_key: str, content_key: str) -> Message | None:
    """Read a turn of role and text and nothing else, as most are, in little time."""
    if type(turn) is not dict or len(turn) != len((role_key, content_key)):
        return None
    name, content = turn.get(role_key), turn.get(content_key)
    if type(name) is not str or type(content) is not str or name in _CALL_TURNS:
        return None
    role = ROLES.get(name)
    return None if role is None else Message(role, content, role == "assistant")


def _message(
    turn: Row, where: str, role_key: str, content_key: str, *, lenient: bool = False
) -> Message:
    role = parse_role(turn, role_key, where)
    off = is_switched_off(turn, role, where, lenient=lenient)
    extra = extra_of(turn, role_key, content_key)
    if str(turn[role_key]).lower() in _CALL_TURNS:
        calls = parse_tool_calls(turn.get(content_key), f"{where}.{content_key}")
        content, extra = "", {**extra, "tool_calls": calls}
    else:
        if extra:
            _read_calls(extra, where)
        content = parse_content(turn, content_key, where, optional="tool_calls" in extra)
    trained = role == "assistant" and not off
    return Message(role=role, content=content, trained=trained, switched_off=off, extra=extra)


def _read_calls(extra: Row, where: str) -> None:
    """Bring the calls of a message into one form; a legacy call becomes a list of one."""
    legacy = extra.pop("function_call", None)
    calls = extra.pop("tool_calls", None) or legacy
    if calls:
        extra["tool_calls"] = parse_tool_calls(calls, f"{where}.tool_calls")


def _call_and_observation(turn: Row, where: str) -> list[Message]:
    name = require_text(turn, "name", where)
    parameters = turn["parameters"]
    if not isinstance(parameters, dict):
        msg = f'{where} has the "parameters" {shown(parameters)}, and an object is needed'
        raise RowError(msg)
    off = is_switched_off(turn, "assistant", where)
    call = {"type": "function", "function": {"name": name, "arguments": parameters}}
    observation = turn.get("observation")
    return [
        Message(
            role="assistant",
            content="",
            trained=not off,
            switched_off=off,
            extra={"tool_calls": [call]},
        ),
        Message(role="observation", content=_as_text(observation), trained=False),
    ]


def _as_text(value: object) -> str:
    """Write what a tool gave as Python's json does, as ChatGLM3's own preparation of data does."""
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _require_object(value: object, where: str, needed: str) -> Row:
    if isinstance(value, dict):
        return value
    msg = f"{where} is {shown(value)}, and an object with {needed} is needed"
    raise RowError(msg)

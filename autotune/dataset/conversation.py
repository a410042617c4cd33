"""Recognises the convention that a row follows and reads it as a conversation."""

from collections.abc import Callable
from dataclasses import dataclass

import orjson

from autotune.dataset.lines import Row, RowError

_ROLES = ("system", "developer", "user", "assistant", "tool")

# Keys that carry something to learn from. Leaving one out unnoticed would train on something else
# than what the file says, so they are refused until they are read; all other keys are ignored.
_UNREAD_ROW_KEYS = ("tools", "functions")
_UNREAD_MESSAGE_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")

_SWITCHES: dict[str, tuple[type, str]] = {
    "weight": (int, "0 or 1"),
    "loss": (bool, "true or false"),
    "train": (bool, "true or false"),
}

_MAX_SHOWN = 60
_MAX_SHOWN_KEYS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn; `trained` says whether the model learns to write it."""

    role: str
    content: str
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    messages: tuple[Message, ...]


def parse_messages(row: Row) -> Conversation:
    """Read the `messages` form: `{"messages": [{"role": "user", "content": "..."}, ...]}`.

    Assistant messages are trained on unless their `weight` is 0 or their `loss` or `train` false.

    Raises:
        RowError: the row breaks the form, or carries what is not read yet.
    """
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        found = _shown(messages) if "messages" in row else "missing"
        msg = f'"messages" is {found}, and a list of at least one message is needed'
        raise RowError(msg)
    _refuse_unread(row, _UNREAD_ROW_KEYS, "the row")
    turns = tuple(_parse_message(turn, f"messages[{i}]") for i, turn in enumerate(messages))
    if all(turn.role != "assistant" for turn in turns):
        msg = 'no message has the role "assistant", so there is nothing to train on'
        raise RowError(msg)
    return Conversation(messages=turns)


CONVENTIONS: dict[str, Callable[[Row], Conversation]] = {"messages": parse_messages}


def recognise(row: Row) -> str:
    """Return the key in CONVENTIONS of the convention that a row follows.

    Raises:
        RowError: it follows none.
    """
    if "messages" in row:
        return "messages"
    msg = f'the row has {_shown_keys(row)}, and the key "messages" is needed'
    raise RowError(msg)


def _parse_message(turn: object, where: str) -> Message:
    if not isinstance(turn, dict):
        msg = f'{where} is {_shown(turn)}, and an object with "role" and "content" is needed'
        raise RowError(msg)
    role = turn.get("role")
    if role not in _ROLES:
        found = f"the role {_shown(role)}" if "role" in turn else 'no "role"'
        msg = f"{where} has {found}, and one of {', '.join(_ROLES)} is needed"
        raise RowError(msg)
    _refuse_unread(turn, _UNREAD_MESSAGE_KEYS, where)
    content = _parse_content(turn, where)
    return Message(role=role, content=content, trained=_is_trained(turn, role, where))


def _parse_content(turn: Row, where: str) -> str:
    content = turn.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        msg = f'{where} has a list of parts as "content", and only a string is read so far'
    elif "content" in turn:
        msg = f'{where} has the "content" {_shown(content)}, and a string is needed'
    else:
        msg = f'{where} has no "content", and a string is needed'
    raise RowError(msg)


def _is_trained(turn: Row, role: str, where: str) -> bool:
    switches = {key: turn[key] for key in _SWITCHES if turn.get(key) is not None}
    for key, value in switches.items():
        kind, needed = _SWITCHES[key]
        if not isinstance(value, kind) or value not in (0, 1):
            msg = f'{where} has the "{key}" {_shown(value)}, and {needed} is needed'
            raise RowError(msg)
        if value and role != "assistant":
            msg = f'{where} asks with "{key}" to train on the role {role}: only assistant can be'
            raise RowError(msg)
    return role == "assistant" and all(switches.values())


def _refuse_unread(record: Row, keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        if record.get(key):
            msg = f'{where} has "{key}", which is not read so far: remove the key or the row'
            raise RowError(msg)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > _MAX_SHOWN:
        value = value[:_MAX_SHOWN] + "..."
    return orjson.dumps(value).decode()


def _shown_keys(row: Row) -> str:
    keys = ", ".join(_shown(key) for key in list(row)[:_MAX_SHOWN_KEYS])
    more = ", ..." if len(row) > _MAX_SHOWN_KEYS else ""
    return f"the keys {keys}{more}" if row else "no keys"

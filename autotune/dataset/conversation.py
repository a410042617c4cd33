"""What a row says, whatever convention it was written in, and how its parts are checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from autotune.dataset.lines import Row, RowError, parse_value

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "observation",
}
"""The names that roles have in files, and what they are called here."""

_SWITCHES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "weight": ((int, float), "0 or 1"),
    "loss": ((bool,), "true or false"),
    "train": ((bool,), "true or false"),
    "loss_scale": ((int, float), "0 or 1"),
}
_UNREAD_SWITCHES = ("train_detail",)
_PART_TEXTS = ("text", "content", "value")

_MAX_SHOWN = 60
_MAX_SHOWN_KEYS = 8


_NOTHING: Mapping[str, object] = {}


@dataclass(slots=True)
class Message:
    """One turn; `trained` says whether the model learns to write it.

    `extra` is what else the chat template may read: tool_calls, reasoning_content, name, ...
    `switched_off` says that the row itself asks not to train on the turn. Nobody changes one; it is
    not frozen since making it would take three times as long, which shows in a million rows.
    """

    role: str
    content: str
    trained: bool
    switched_off: bool = False
    extra: Mapping[str, object] = field(default_factory=lambda: _NOTHING)

    def to_json(self) -> dict[str, object]:
        """Return the message as chat templates take it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns, and the tools that the model may call in them.

    `is_pair` says that the row was a prompt and its answer and no chat, which can do without a
    chat template.
    """

    messages: tuple[Message, ...]
    tools: tuple[object, ...] = ()
    is_pair: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the turns are roles and contents, and nothing else."""
        return not self.tools and not any(turn.extra for turn in self.messages)


@dataclass(frozen=True, slots=True)
class Segments:
    """Texts to be joined as they are, each with whether it is trained on."""

    parts: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A text that all of is trained on."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids, each with whether it is trained on."""

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]


Content = Conversation | Segments | Text | Tokens


def require_turns(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages.

    Raises:
        RowError: there is nothing to train on.
    """
    answers = [turn for turn in messages if turn.role == "assistant"]
    if not answers:
        msg = 'no message has the role "assistant", so there is nothing to train on'
        raise RowError(msg)
    learned = [turn for turn in answers if turn.trained] or answers
    if not any(turn.extra or turn.content.strip() for turn in learned):
        msg = "every answer is empty, so there is nothing to train on"
        raise RowError(msg)
    return messages


def require_list(row: Row, key: str) -> list[object]:
    """Return the list at a key.

    Raises:
        RowError: there is none, or an empty one.
    """
    found = row.get(key)
    if isinstance(found, list) and found:
        return found
    state = shown(found) if key in row else "missing"
    msg = f'"{key}" is {state}, and a list of at least one entry is needed'
    raise RowError(msg)


def require_text(record: Row, key: str, where: str = "the row") -> str:
    """Return the string at a key.

    Raises:
        RowError: there is none.
    """
    found = record.get(key)
    if isinstance(found, str):
        return found
    if key not in record:
        msg = f'{where} has no "{key}", and a string is needed'
    else:
        msg = f'{where} has the "{key}" {shown(found)}, and a string is needed'
    raise RowError(msg)


def parse_role(turn: Row, key: str, where: str) -> str:
    """Return the role of a turn under the name that it has here.

    Raises:
        RowError: it has none, or an unknown one.
    """
    name = turn.get(key)
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        found = f"the role {shown(name)}" if key in turn else f'no "{key}"'
        msg = f"{where} has {found}, and one of {', '.join(ROLES)} is needed"
        raise RowError(msg)
    return role


def parse_content(turn: Row, key: str, where: str, *, optional: bool = False) -> str:
    """Return the text of a turn; parts of the type "text" are joined.

    Raises:
        RowError: it is missing and not optional, or holds something else than text.
    """
    content = turn.get(key)
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(
            _parse_part(part, f"{where}.{key}[{place}]") for place, part in enumerate(content)
        )
    if content is None and optional:
        return ""
    return require_text(turn, key, where)


def _parse_part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        msg = f"{where} is {shown(part)}, and a part with type and text is needed"
        raise RowError(msg)
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        msg = f"{where} is a part of the type {shown(kind)}, and only text can be trained on"
        raise RowError(msg)
    off = next((key for key in _SWITCHES if part.get(key) in (0, False)), None)
    if off is not None:
        msg = f'{where} switches one part of a message off with "{off}": only messages can be'
        raise RowError(msg)
    key = next((key for key in _PART_TEXTS if key in part), "text")
    return require_text(part, key, where)


def is_switched_off(turn: Row, role: str, where: str, *, lenient: bool = False) -> bool:
    """Tell whether any switch of a turn says not to train on it.

    `lenient` ignores a switch that is on where the role is never trained on.

    Raises:
        RowError: a switch has no value of its kind, or asks to train on a turn that cannot be.
    """
    off = False
    for key, (kinds, needed) in _SWITCHES.items():
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, kinds) or value not in (0, 1):
            msg = f'{where} has the "{key}" {shown(value)}, and {needed} is needed'
            raise RowError(msg)
        if value and role != "assistant" and not lenient:
            msg = f'{where} asks with "{key}" to train on the role {role}: only assistant can be'
            raise RowError(msg)
        off = off or not value
    for key in _UNREAD_SWITCHES:
        if turn.get(key):
            msg = f'{where} has "{key}", which is not read: split the message or switch it off'
            raise RowError(msg)
    return off


def extra_of(turn: Row, *read: str) -> dict[str, object]:
    """Return what a turn has besides the keys that were read, its switches, and nulls."""
    if len(turn) <= len(read) and all(key in read for key in turn):
        return {}
    left_out = {*read, *_SWITCHES, *_UNREAD_SWITCHES}
    return {key: value for key, value in turn.items() if key not in left_out and value is not None}


def parse_json(value: object, where: str) -> object:
    """Return a value that may be written as JSON inside a string.

    Raises:
        RowError: the string is not JSON, or an object in it has a key twice.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_value(value.encode())
    except RowError as error:
        msg = f"{where} is a string, in which JSON is needed: {error}"
        raise RowError(msg) from error


def parse_tools(value: object, where: str, *, wrap: bool = True) -> tuple[object, ...]:
    """Return tool definitions given as a list, or as JSON in a string; none for nothing.

    With `wrap` a bare function becomes {"type": "function", "function": ...}, as templates expect.

    Raises:
        RowError: they are something else.
    """
    if value is None or value == "":
        return ()
    tools = parse_json(value, where)
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        msg = f"{where} is {shown(value)}, and a list of tool definitions is needed"
        raise RowError(msg)
    return tuple(wrapped_tool(tool) if wrap else tool for tool in tools)


def wrapped_tool(tool: Row) -> Row:
    """Return a tool definition in the form that chat templates expect."""
    return (
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}
    )


def parse_tool_calls(value: object, where: str) -> list[Row]:
    """Return tool calls with their arguments as objects.

    Raises:
        RowError: a call has no name, or arguments that are no object.
    """
    calls = parse_json(value, where)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        msg = f"{where} is {shown(value)}, and a list of calls is needed"
        raise RowError(msg)
    return [_parse_call(call, f"{where}[{place}]") for place, call in enumerate(calls)]


def _parse_call(call: object, where: str) -> Row:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        msg = f"{where} is {shown(call)}, and an object with a function is needed"
        raise RowError(msg)
    name = require_text(function, "name", where)
    given = function.get("arguments", function.get("parameters"))
    arguments = parse_json(given or {}, f"{where}.arguments")
    if not isinstance(arguments, dict):
        msg = f'{where} has the "arguments" {shown(arguments)}, and an object is needed'
        raise RowError(msg)
    outer = {"id": call["id"]} if call.get("id") is not None else {}
    return {**outer, "type": "function", "function": {"name": name, "arguments": arguments}}


def shown(value: object) -> str:
    """Return a value for people: short, and telling its type."""
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > _MAX_SHOWN:
        value = value[:_MAX_SHOWN] + "..."
    return orjson.dumps(value).decode()


def shown_keys(row: Row) -> str:
    """Return the keys of a row for people."""
    keys = ", ".join(shown(key) for key in list(row)[:_MAX_SHOWN_KEYS])
    more = ", ..." if len(row) > _MAX_SHOWN_KEYS else ""
    return f"the keys {keys}{more}" if row else "no keys"

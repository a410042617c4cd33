"""Conventions that name a prompt and its answer."""

from collections.abc import Callable
from dataclasses import replace

from autotune.dataset.conventions.turns import (
    SYSTEMS,
    exchange,
    parse_messages,
    parse_row_tools,
    with_system,
)
from autotune.dataset.conversation import (
    Conversation,
    Message,
    require_text,
    require_turns,
    shown,
)
from autotune.dataset.lines import Row, RowError

PROMPTS = ("prompt", "query", "question", "instruction", "input", "problem")
ANSWERS = (
    "response",
    "answer",
    "output",
    "target",
    "targets",
    "completion",
    "answers",
    "answer_key",
    "solution",
    "text",
    "content",
)

_ALPACA = frozenset({"instruction", "output"})
_EXACT = {
    "alpaca": _ALPACA,
    "prompt-completion": frozenset({"prompt", "completion"}),
    "context-target": frozenset({"context", "target"}),
    "adgen": frozenset({"content", "summary"}),
}


def claims_of(row: Row) -> list[str]:
    """Return the pair conventions that a row could follow."""
    exact = [name for name, keys in _EXACT.items() if keys <= row.keys()]
    prompts, answers = _aliases(row)
    taken = frozenset().union(*(_EXACT[name] for name in exact))
    if "alpaca" in exact:
        taken |= {"input"}
    if len(exact) == 1 and not (set(prompts) | set(answers)) - taken - {"text", "content"}:
        return exact
    if exact or (prompts and answers):
        return [*exact, *(["prompt-response"] if not exact or len(exact) == 1 else [])]
    return []


def require_clear(row: Row) -> None:
    """Refuse a row in which several keys could be the prompt, or the answer.

    Raises:
        RowError: there are several.
    """
    prompts, answers = _aliases(row)
    unclear = None
    for name, keys in (("prompt", prompts), ("answer", answers)):
        if len(keys) > 1:
            unclear = f"{' and '.join(map(shown, keys))} could each be the {name}"
    if isinstance(row.get("context"), str) and row["context"] and "target" not in row:
        unclear = '"context" may be part of the prompt'
    if unclear is not None:
        msg = f"{unclear}: say which is with --map user=KEY --map assistant=KEY"
        raise RowError(msg)


def _aliases(row: Row) -> tuple[list[str], list[str]]:
    prompts = [key for key in PROMPTS if isinstance(row.get(key), str)]
    answers = [key for key in ANSWERS if isinstance(row.get(key), str)]
    return prompts, answers


def parse_alpaca(row: Row) -> Conversation:
    """Read Alpaca's form: `{"instruction": "...", "input": "...", "output": "..."}`.

    The user says instruction and input, on lines of their own; `history` holds earlier pairs,
    whose answers are trained on, too.

    Raises:
        RowError: the row breaks the form.
    """
    return _pair(row, ("instruction", "input"), "output")


def parse_prompt_completion(row: Row) -> Conversation:
    """Read `{"prompt": ..., "completion": ...}`, two strings or two lists of messages.

    Raises:
        RowError: the row breaks the form.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _pair(row, ("prompt",), "completion")
    before = _turns(prompt, "prompt", "user")
    after = _turns(completion, "completion", "assistant")
    beside: Row = {key: row[key] for key in (*SYSTEMS, "tools", "functions") if key in row}
    parsed = parse_messages({"messages": [*before, *after], **beside})
    asked, said = parsed.messages[: -len(after)], parsed.messages[-len(after) :]
    turns = [*(replace(turn, trained=False) for turn in asked), *said]
    return Conversation(messages=require_turns(tuple(turns)), tools=parsed.tools)


def parse_prompt_response(row: Row) -> Conversation:
    """Read a prompt and its answer by any of their usual names.

    Raises:
        RowError: the row breaks the form, or two keys could each be the prompt or the answer.
    """
    prompts, answers = _aliases(row)
    require_clear(row)
    if not prompts or not answers:
        needed, names = ("prompt", PROMPTS) if not prompts else ("answer", ANSWERS)
        msg = f"no string is at any of the keys of the {needed}: {', '.join(names)}"
        raise RowError(msg)
    return _pair(row, (prompts[0],), answers[0])


def parse_pair_at(prompt: str, answer: str) -> Callable[[Row], Conversation]:
    """Return a parser of rows with the prompt and the answer at the given keys."""
    return lambda row: _pair(row, (prompt,), answer)


def parse_mapped_pair(row: Row, keys: dict[str, str]) -> Conversation:
    """Read a pair whose keys the user has named.

    Raises:
        RowError: the row breaks the form.
    """
    renamed = {role: row[key] for role, key in keys.items() if key in row}
    prompts = ("user", "input") if "input" in keys else ("user",)
    return _pair(renamed, prompts, "assistant", keys)


def _pair(
    row: Row, prompts: tuple[str, ...], answer: str, names: dict[str, str] | None = None
) -> Conversation:
    def text(key: str) -> str:
        if key not in row and names is not None:
            msg = f"the row has no {shown(names[key])}, and a string is needed"
            raise RowError(msg)
        return require_text(row, key)

    asked = [text(prompts[0])]
    asked += [text(key) for key in prompts[1:] if row.get(key)]
    pair = exchange("\n".join(filter(None, asked)), text(answer))
    messages = with_system(row, [*_history(row), *pair])
    tools = parse_row_tools(row)
    return Conversation(
        messages=require_turns(messages),
        tools=tools,
        is_pair=len(messages) == len(pair) and not tools,
    )


def _history(row: Row) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list):
        msg = f'"history" is {shown(history)}, and a list of [prompt, answer] is needed'
        raise RowError(msg)
    messages: list[Message] = []
    for place, pair in enumerate(history):
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            msg = f"history[{place}] is no pair of two strings [prompt, answer]"
            raise RowError(msg)
        messages += exchange(pair[0], pair[1])
    return messages


def _turns(value: object, key: str, role: str) -> list[object]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value:
        return value
    msg = f'"{key}" is {shown(value)}, and a string or a list of messages is needed'
    raise RowError(msg)

"""The conventions that rows are written in: one table, what recognises them, what is refused."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autotune.dataset.conventions import pairs, raw, turns
from autotune.dataset.conversation import Content, shown, shown_keys
from autotune.dataset.lines import Row, RowError

_BESIDE = frozenset({*turns.SYSTEMS, "tools", "functions"})
_TURNS = _BESIDE | {*turns.TURN_KEYS}
_PAIR = _BESIDE | {"history"}


class SampleError(RowError):
    """Why a sample of rows is refused; `row` is the place of the one that shows it."""

    def __init__(self, reason: str, row: int) -> None:
        super().__init__(reason)
        self.row = row


# Of the rows in a sample that are recognised, so many must follow one convention.
_MAJORITY = 0.9
_MAPPABLE = ("messages", "role", "content", "user", "input", "assistant", "text")
_OPTIONAL = ("system", "history", "tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class Convention:
    """A way to write rows; `reads` names the keys that mean something in it."""

    name: str
    parse: Callable[[Row], Content]
    reads: frozenset[str]
    example: str


_TABLE = (
    Convention(
        name="messages",
        parse=turns.parse_messages,
        reads=_TURNS | {"parallel_tool_calls"},
        example='{"messages": [{"role": ..., "content": ...}]}',
    ),
    Convention(
        name="sharegpt",
        parse=turns.parse_sharegpt,
        reads=_TURNS,
        example='{"conversations": [{"from": ..., "value": ...}]}',
    ),
    Convention(
        name="sharegpt-pairs",
        parse=turns.parse_sharegpt_pairs,
        reads=_TURNS,
        example='{"conversation": [{"human": ..., "assistant": ...}]}',
    ),
    Convention(
        name="chatglm3",
        parse=turns.parse_chatglm3,
        reads=_TURNS,
        example='{"conversations": [{"role": ..., "content": ...}]}',
    ),
    Convention(
        name="glm4",
        parse=turns.parse_glm4,
        reads=_TURNS,
        example='{"messages": [{"role": "system", "content": "", "tools": [...]}, ...]}',
    ),
    Convention(
        name="alpaca",
        parse=pairs.parse_alpaca,
        reads=_PAIR | {"instruction", "input", "output"},
        example='{"instruction": ..., "input": ..., "output": ...}',
    ),
    Convention(
        name="prompt-completion",
        parse=pairs.parse_prompt_completion,
        reads=_PAIR | {"prompt", "completion"},
        example='{"prompt": ..., "completion": ...}',
    ),
    Convention(
        name="prompt-response",
        parse=pairs.parse_prompt_response,
        reads=_PAIR | {*pairs.PROMPTS, *pairs.ANSWERS},
        example='{"prompt" or "query" or "question" ...: ..., "response" or "answer" ...: ...}',
    ),
    Convention(
        name="context-target",
        parse=pairs.parse_pair_at("context", "target"),
        reads=_PAIR | {"context", "target"},
        example='{"context": ..., "target": ...}',
    ),
    Convention(
        name="adgen",
        parse=pairs.parse_pair_at("content", "summary"),
        reads=_PAIR | {"content", "summary"},
        example='{"content": ..., "summary": ...}',
    ),
    Convention(
        name="text", parse=raw.parse_text, reads=frozenset({"text"}), example='{"text": ...}'
    ),
    Convention(
        name="segments",
        parse=raw.parse_segments,
        reads=frozenset({"segments"}),
        example='{"segments": [{"label": true, "text": ...}]}',
    ),
    Convention(
        name="tokens",
        parse=raw.parse_tokens,
        reads=frozenset(
            {"input_ids", "labels", "attention_mask", "assistant_masks", "completion_mask"}
        ),
        example='{"input_ids": [...], "labels": [...]}',
    ),
)

CONVENTIONS: Mapping[str, Convention] = {convention.name: convention for convention in _TABLE}

_PREFERENCES: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(keys), name)
    for keys, name in (
        (("chosen", "rejected"), "preference pairs (chosen/rejected, as for DPO or reward models)"),
        (("rejected_response",), "preference pairs (rejected_response, as for DPO)"),
        (("rejected_messages",), "preference pairs (rejected_messages, as for DPO)"),
        (("preferred_output", "non_preferred_output"), "preference pairs (OpenAI's, as for DPO)"),
        (("response_0", "response_1"), "preference pairs (two responses)"),
        (("response_a", "response_b"), "preference pairs (two responses)"),
        (("response_j", "response_k"), "preference pairs (two responses)"),
        (("human_ref_A", "human_ref_B"), "preference pairs (two references)"),
        (("chosen",), "preference data (chosen, as for DPO or reward models)"),
        (("rejected",), "preference data (rejected, as for DPO or reward models)"),
        (("kto_tag",), "KTO (kto_tag)"),
        (("completions", "labels"), "stepwise rewards (completions/labels, as for PRM)"),
        (("reward",), "rewards (reward, as for reinforcement learning)"),
        (("rewards",), "rewards (rewards, as for reinforcement learning)"),
    )
)
_KTO_PARTNERS = ("completion", "response", "messages", "conversations")


def refused_format(row: Row) -> str | None:
    """Return the name of the preference or reward format that a row follows, if any."""
    for keys, name in _PREFERENCES:
        if keys <= row.keys() and any(row[key] is not None for key in keys):
            return name
    if isinstance(row.get("label"), bool) and any(key in row for key in _KTO_PARTNERS):
        return "KTO (label)"
    output = row.get("output")
    if "instruction" in row and isinstance(output, list):
        return "preference pairs (a list of outputs)"
    return None


def claims_of(row: Row) -> list[str]:
    """Return the conventions that a row could follow, by its keys alone."""
    claims = pairs.claims_of(row)
    shape = turns.shape_of(row)
    if shape is not None:
        claims.append(shape)
    if isinstance(row.get("text"), str):
        claims.append("text")
    if "segments" in row:
        claims.append("segments")
    if "input_ids" in row:
        claims.append("tokens")
    return claims


def recognise(rows: Sequence[Row]) -> Convention:
    """Return the convention that a sample of rows follows.

    Raises:
        SampleError: they follow none, or several could be meant, or they are preferences or
            rewards.
    """
    counts: Counter[str] = Counter()
    for place, row in enumerate(rows):
        try:
            counts.update(_one_claim(row))
        except RowError as error:
            raise SampleError(str(error), place) from error
    if not counts:
        msg = (
            f"the row has {shown_keys(rows[0])}, which is no convention of rows: rename its keys,"
            " or name them with --map user=KEY --map assistant=KEY"
        )
        raise SampleError(msg, 0)
    if "glm4" in counts:
        counts["glm4"] += counts.pop("messages", 0)
    name, count = counts.most_common(1)[0]
    if count < _MAJORITY * counts.total():
        place = next(i for i, row in enumerate(rows) if _one_claim(row) not in ([], [name]))
        msg = f"the rows follow different conventions ({', '.join(counts)}): {_CHOOSE}"
        raise SampleError(msg, place)
    return CONVENTIONS[name]


def _one_claim(row: Row) -> list[str]:
    """Return the convention that a row could follow, if any.

    Raises:
        RowError: there are several, or the row holds preferences or rewards.
    """
    refuse_preferences(row)
    claims = claims_of(row)
    if len(claims) > 1:
        msg = f"the row has {shown_keys(row)}, which could be {' or '.join(claims)}: {_CHOOSE}"
        raise RowError(msg)
    if claims == ["prompt-response"]:
        pairs.require_clear(row)
    return claims


_CHOOSE = "say which with --format NAME, or name the keys with --map"


def refuse_preferences(row: Row) -> None:
    """Refuse a row of preferences or rewards.

    Raises:
        RowError: the row is one; the text names the format.
    """
    refused = refused_format(row)
    if refused is not None:
        msg = f"the row holds {refused}, and supervised fine-tuning needs prompts with one answer"
        raise RowError(msg)


def mapped(keys: Mapping[str, str]) -> Convention:
    """Return the convention that the user has described by naming its keys.

    Raises:
        ValueError: the roles are unknown, or do not make a convention.
    """
    unknown = sorted(keys.keys() - {*_MAPPABLE, *_OPTIONAL})
    if unknown:
        msg = f"{unknown[0]!r} cannot be mapped, only {', '.join((*_MAPPABLE, *_OPTIONAL))}"
        raise ValueError(msg)
    reads = frozenset(keys.values()) | _TURNS | _PAIR
    return Convention(name="mapped", parse=_mapped_parser(dict(keys)), reads=reads, example="")


def _mapped_parser(keys: dict[str, str]) -> Callable[[Row], Content]:
    if "text" in keys and not keys.keys() - {"text"}:
        return lambda row: raw.parse_text(
            {"text": row[keys["text"]]} if keys["text"] in row else row
        )
    if "messages" in keys:
        role, content = keys.get("role", "role"), keys.get("content", "content")
        names = {new: old for new, old in keys.items() if new in _OPTIONAL}
        return lambda row: turns.parse_renamed(
            row | {new: row[old] for new, old in names.items() if old in row},
            keys["messages"],
            role,
            content,
        )
    if {"user", "assistant"} <= keys.keys():
        rest = {name: name for name in _OPTIONAL}
        return lambda row: pairs.parse_mapped_pair(row, rest | keys)
    found = ", ".join(map(shown, keys))
    msg = f"{found} alone makes no rows: map user and assistant, or messages, or text"
    raise ValueError(msg)

"""From a conversation to the texts to train on, and to where in them the model speaks.

Usually one text holds all turns. A template that rewrites earlier turns once more follow, as those
that drop old thoughts do, shows the model each answer in another context than the whole text has:
such an answer gets a text of its own, which ends with it. So every trained turn is learned exactly
once, behind exactly what the model will see before it writes that turn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from autotune.dataset.conversation import Conversation, Message, wrapped_tool
from autotune.dataset.lines import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from autotune.dataset.shapes import Pieces

Span = tuple[int, int]
_Rendered = list[dict[str, Any]]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_READS_TOOLS_OF_A_TURN = re.compile(r"\bm\w*(?:\.tools\b|\[['\"]tools['\"]\])|\bitem\[['\"]tools")
_PROBE = "What is said."
_PROBE_CALL = {"type": "function", "function": {"name": "probe_call", "arguments": {"a": 1}}}
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "", "parameters": {"type": "object"}},
}


@dataclass(slots=True)
class Sample:
    """A text to train on.

    `trained` are the characters that the model writes, in order; `off` those of turns that are
    switched off. The text shows the first `turns` messages of the conversation. `pieces` is what it
    was put together from, if it was.
    """

    text: str
    trained: tuple[Span, ...]
    off: tuple[Span, ...]
    turns: int
    pieces: "Pieces | None" = None


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.source: str = tokenizer.get_chat_template()
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)

    @cached_property
    def writes_system(self) -> bool:
        """Whether the template has a place for a system message."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        try:
            self.render(turns)
        except RowError:
            return True
        try:
            return _PROBE in self.render([{"role": "system", "content": _PROBE}, *turns])
        except RowError:
            return False

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the template writes the tool calls of an assistant."""
        turn = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        try:
            return "probe_call" in self.render([{"role": "user", "content": "Hi"}, turn])
        except RowError:
            return True

    @cached_property
    def marks_end(self) -> bool:
        """Whether something other than white space follows what an assistant says."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        try:
            return not self.render(turns).rstrip().endswith(_PROBE)
        except RowError:
            return True

    @cached_property
    def writes_observations(self) -> bool:
        """Whether the template writes what a tool gives."""
        role = self._role_names.get("tool", "tool")
        turns: _Rendered = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]},
            {"role": role, "name": "probe_call", "content": _PROBE},
            {"role": "assistant", "content": "Hello"},
        ]
        try:
            return any(_PROBE in self.render(turns, tools) for tools in ((), (_PROBE_TOOL,)))
        except RowError:
            return True

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools that stand beside a conversation."""
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
        try:
            return "probe_tool" in self.render(turns, [_PROBE_TOOL])
        except RowError:
            return True

    @cached_property
    def closing(self) -> str:
        """What the template puts behind any last turn where no answer is asked for.

        Phi-3's, for one, ends each text with the end-of-text token, and not the turns in it.
        """
        turns = [{"role": "user", "content": "Hi"}]
        eos = self.variables.get("eos_token", "")
        try:
            closed, asking = self.render(turns), self.render(turns, add_generation_prompt=True)
        except RowError:
            return ""
        closes = eos and closed.endswith(eos) and not asking.startswith(closed)
        return eos if closes and asking.startswith(closed.removesuffix(eos)) else ""

    @cached_property
    def _role_names(self) -> dict[str, str]:
        names = {}
        if "developer" not in self.source:
            names["developer"] = "system"
        observes = "observation" in self.source
        uses = re.search(r"['\"]tool['\"]", self.source) is not None
        if not observes and not uses:
            # It writes any role as it is, and the model has a token for the one that it knows.
            observes = "<|observation|>" in self._tokenizer.get_added_vocab()
        if not observes:
            names["observation"] = "tool"
        elif not uses:
            names["tool"] = "observation"
        return names

    def fitted(self, conversation: Conversation) -> Conversation:
        """Return the conversation in the roles that the template knows.

        A system message goes in front of the first user's, with an empty line between them, where
        the template has no place for one. Tool calls that it does not write become JSON in the text
        of their turn.
        """
        names = self._role_names
        if self.unwritten_calls(conversation):
            turns = [_with_calls_as_text(turn) for turn in conversation.messages]
            conversation = replace(conversation, messages=tuple(turns))
        if not self.folds(conversation) and all(t.role not in names for t in conversation.messages):
            return conversation
        messages = [
            replace(turn, role=names[turn.role]) if turn.role in names else turn
            for turn in conversation.messages
        ]
        return replace(conversation, messages=tuple(self._without_system(messages)))

    def folds(self, conversation: Conversation) -> bool:
        """Tell whether a system message of the conversation has no place in the template."""
        role = self._role_names.get(conversation.messages[0].role, conversation.messages[0].role)
        return role == "system" and not self.writes_system

    def unwritten_calls(self, conversation: Conversation) -> bool:
        """Tell whether the conversation has tool calls that the template does not write."""
        if conversation.is_plain or self.writes_calls:
            return False
        return any("tool_calls" in turn.extra for turn in conversation.messages)

    def _without_system(self, messages: list[Message]) -> list[Message]:
        if messages[0].role != "system" or self.writes_system:
            return messages
        system, *turns = messages
        if not system.content:
            return turns
        if not turns or turns[0].role != "user":
            msg = (
                "the tokenizer's chat template has no place for a system message, and no user turn"
                " follows it to take it up: remove it, or put a user turn behind it"
            )
            raise RowError(msg)
        content = f"{system.content}\n\n{turns[0].content}"
        return [replace(turns[0], content=content), *turns[1:]]

    def samples(self, conversation: Conversation, *, whole: bool = False) -> list[Sample]:
        """Return the texts of a fitted conversation that together train each of its trained turns.

        With `whole` it is the text of all turns alone, with the turns that are switched off.

        Raises:
            RowError: the template refuses the conversation, or hides where its turns are.
        """
        turns = _Turns(self, conversation)
        if whole:
            return [turns.whole()]
        tagged = turns.by_tags()
        return turns.by_renderings() if tagged is None else [tagged]

    def render(
        self,
        messages: _Rendered,
        tools: Sequence[object] = (),
        **options: Any,  # noqa: ANN401
    ) -> str:
        """Render messages.

        Raises:
            RowError: the template refuses them.
        """
        text, _ = self._render(messages, tools, **options)
        return text

    def render_tagged(
        self, messages: _Rendered, tools: Sequence[object]
    ) -> tuple[str, list[Span]] | None:
        """Render messages with the characters between generation tags, if the template has any."""
        if not _GENERATION_TAG.search(self._source_for(tools)):
            return None
        text, spans = self._render(messages, tools, return_assistant_tokens_mask=True)
        return text, spans[0]

    def _source_for(self, tools: Sequence[object]) -> str:
        source: str = self._tokenizer.get_chat_template(tools=list(tools) or None)
        return source

    def _render(
        self,
        messages: _Rendered,
        tools: Sequence[object],
        **options: Any,  # noqa: ANN401
    ) -> tuple[str, list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self._source_for(tools)
        if not _READS_TOOLS_OF_A_TURN.search(source):
            messages = [_without_tools(message) for message in messages]
        given = [wrapped_tool(tool) if isinstance(tool, dict) else tool for tool in tools]
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=given or None,
                chat_template=source,
                **self.variables,
                **options,
            )
        except Exception as error:  # a template may do anything to what it was not written for
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            msg = f"the tokenizer's chat template refuses the conversation ({reason})"
            raise RowError(msg) from error
        return texts[0], spans


def _with_calls_as_text(turn: Message) -> Message:
    calls = turn.extra.get("tool_calls")
    if not isinstance(calls, list):
        return turn
    lines = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    extra = {key: value for key, value in turn.extra.items() if key != "tool_calls"}
    content = "\n".join(filter(None, [turn.content, *lines]))
    return replace(turn, content=content, extra=extra)


def _without_tools(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key != "tools"}


class _Turns:
    """The turns of one conversation, rendered as far as they are needed."""

    def __init__(self, template: ChatTemplate, conversation: Conversation) -> None:
        self._template = template
        self._turns = conversation.messages
        self._tools = conversation.tools
        self._messages = [turn.to_json() for turn in conversation.messages]
        self._trained = [i for i, turn in enumerate(self._turns) if turn.trained]
        self._off = [i for i, turn in enumerate(self._turns) if turn.switched_off]
        self._until: dict[int, str] = {}

    def by_tags(self) -> Sample | None:
        """Take the spans from the template's tags, or None if they do not show all of each turn."""
        found = self._template.render_tagged(self._messages, self._tools)
        if found is None:
            return None
        text, spans = found
        answers = [turn for turn in self._turns if turn.role == "assistant"]
        if len(spans) != len(answers):
            return None
        pairs = list(zip(spans, answers, strict=True))
        self._require_observations(text)
        if any(turn.trained and _is_cut(text[slice(*span)], turn) for span, turn in pairs):
            return None
        trained = tuple(span for span, turn in pairs if turn.trained)
        return Sample(text=text, trained=trained, off=(), turns=len(self._turns))

    def whole(self) -> Sample:
        """Find the turns that are switched off in the rendering of all turns."""
        text = self._rendered_until(len(self._turns) - 1)
        self._require_observations(text)
        for index in self._trained:
            _require_content(text, self._turns[index])
        off = tuple(self._require_span(text, index) for index in self._off)
        return Sample(text=text, trained=(), off=off, turns=len(self._turns))

    def by_renderings(self) -> list[Sample]:
        """Find each trained turn in the whole text, or in a text that ends with the turn."""
        left = list(self._trained)
        samples: list[Sample] = []
        last = len(self._turns) - 1
        while left:
            text = self._rendered_until(last)
            spans = {index: self._span(text, index) for index in left}
            kept = _apart({index: span for index, span in spans.items() if span is not None})
            if kept:
                self._require_observations(text, upto=last)
                samples.append(Sample(text, tuple(kept.values()), (), last + 1))
            elif last in left:
                self._require_span(text, last)
            left = [index for index in left if index not in kept]
            last = left[-1] if left else last
        return samples[::-1]

    def _require_span(self, text: str, index: int) -> Span:
        span = self._span(text, index)
        if span is None:
            msg = (
                f"the tokenizer's chat template renders the turns up to messages[{index}] otherwise"
                " once more turns follow, so where that turn stands cannot be told: use a template"
                " that keeps the turns as they are, or leave the row out"
            )
            raise RowError(msg)
        return span

    def _span(self, text: str, index: int) -> Span | None:
        """Return the characters of `text` that the model writes in a turn, if it is there so."""
        until = self._shown_until(text, index)
        if until is None:
            return None
        before = self._shown_until(text, index - 1) if index else ""
        if self._turns[index].role != "assistant":
            return None if before is None else (len(before), len(until))
        prompt = self._prompt(index) if index else ""
        if index and until.startswith(prompt):
            start = len(prompt)
        elif before is None or not until.startswith(before):
            return None
        elif index:
            start = len(before) + _length_in_common(prompt[len(before) :], until[len(before) :])
        else:
            start = self._start_of_first(until)
        turn = self._turns[index]
        _require_content(until[min(start, len(before or "")) :], turn)
        # White space behind an end-of-turn mark is left out: the model stops at the mark.
        return start, max(start, len(until.rstrip())) if self._template.marks_end else len(until)

    def _shown_until(self, text: str, index: int) -> str | None:
        """Return the rendering up to a turn if `text` begins with it, without what closes it."""
        until = self._rendered_until(index)
        if not text.startswith(until):
            until = until.removesuffix(self._template.closing)
        return until if text.startswith(until) else None

    def _rendered_until(self, index: int) -> str:
        if index not in self._until:
            self._until[index] = self._template.render(self._messages[: index + 1], self._tools)
        return self._until[index]

    def _prompt(self, index: int) -> str:
        return self._template.render(
            self._messages[:index], self._tools, add_generation_prompt=True
        )

    def _start_of_first(self, until: str) -> int:
        """Return where an opening assistant turn starts; templates render no empty conversation."""
        header = self._prompt(1).removeprefix(until)
        if not header or header not in until:
            msg = (
                "the conversation opens with an assistant turn, and the tokenizer's chat template"
                ' does not show where it starts: switch it off with "train": false, or put a user'
                " turn first"
            )
            raise RowError(msg)
        return until.index(header) + len(header)

    def _require_observations(self, text: str, upto: int | None = None) -> None:
        seen = None if self._template.writes_observations else ""
        for index, turn in enumerate(self._turns[: None if upto is None else upto + 1]):
            if turn.role in ("tool", "observation") and turn.content:
                seen = _dense(text) if seen is None else seen
                if _dense(turn.content) not in seen:
                    msg = (
                        f"the tokenizer's chat template leaves out messages[{index}], which a tool"
                        " says: use a template that knows tools, or leave the row out"
                    )
                    raise RowError(msg)


def _require_content(rendered: str, turn: Message) -> None:
    """Refuse a turn that the template does not write, for nothing of it would be learned."""
    what = _left_out(rendered, turn)
    if what is not None:
        msg = (
            f"the tokenizer's chat template leaves out {what} of an assistant turn that is to be"
            ' trained on: use another template, or switch the turn off with "train": false'
        )
        raise RowError(msg)


def _left_out(rendered: str, turn: Message) -> str | None:
    """Name what of a turn is not in the text that a template has rendered of it."""
    dense = _dense(rendered)
    if _dense(turn.content) not in dense:
        return "the text"
    calls = turn.extra.get("tool_calls")
    names = [call["function"]["name"] for call in calls] if isinstance(calls, list) else []
    return None if all(_dense(name) in dense for name in names) else "the tool calls"


def _is_cut(rendered: str, turn: Message) -> bool:
    return _left_out(rendered, turn) is not None or thought_of(turn).strip() not in rendered


def thought_of(turn: Message) -> str:
    """Return what a model thinks before it says what the turn says, if that is a key of its own."""
    thought = turn.extra.get("reasoning_content", turn.extra.get("thinking"))
    return thought if isinstance(thought, str) else ""


def _dense(text: str) -> str:
    # Templates may trim or indent what they write.
    return "".join(text.split())


def _apart(spans: dict[int, Span]) -> dict[int, Span]:
    """Leave out each turn that is rendered at the same place as a later one."""
    kept = list(spans.items())
    clashes = {left[0] for left, right in pairwise(kept) if left[1][1] > right[1][0]}
    return {index: span for index, span in kept if index not in clashes}


def _length_in_common(header: str, turn: str) -> int:
    # A header may say more than the turn does, as one that opens a thought with "<think>".
    pairs = enumerate(zip(header, turn, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(header), len(turn)))

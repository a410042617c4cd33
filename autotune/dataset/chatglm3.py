"""The tokenizer and the chat form of original ChatGLM3 checkpoints.

They come with a sentencepiece model and code for transformers 4. The special tokens follow the
pieces of the model, in a fixed order; text never gives one of them. A conversation is [gMASK] sop,
then for each turn its role's token, a line of metadata (the name of a tool that is called, mostly
nothing) and its content, and at the end eos. An assistant's turn is trained on, its role's token
included, and so is the eos that follows it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotune.chatglm3 import SPECIAL_TOKENS
from autotune.dataset.conversation import Content, Conversation, Message, Segments, Text, Tokens
from autotune.dataset.encode import TokenRow, join_parts, tokens_row
from autotune.dataset.lines import RowError
from autotune.errors import InputMissingError

_ROLES = {"developer": "system", "tool": "observation"}
_TOOLS_INTRODUCTION = (
    "Answer the following questions as best as you can. You have access to the following tools:\n"
)

_Part = tuple[list[int], bool]


class ChatGlm3Codec:
    """Writes rows as ChatGLM3 was trained on them."""

    def __init__(self, model_dir: Path, *, train_on_prompt: bool) -> None:
        from sentencepiece import SentencePieceProcessor

        self._train_on_prompt = train_on_prompt
        path = model_dir / "tokenizer.model"
        try:
            self._model: Any = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            msg = f"{path} is no sentencepiece model that can be read ({error}): get it again"
            raise InputMissingError(msg) from error
        first = self._model.vocab_size()
        self.special = {token: first + place for place, token in enumerate(SPECIAL_TOKENS)}
        self._names = {number: token for token, number in self.special.items()}
        self.eos: int = self._model.eos_id()
        self.notes: Counter[str] = Counter()
        self.ends = frozenset({self.eos, *self._names})

    def encode(self, contents: Sequence[Content]) -> list[list[TokenRow] | RowError]:
        return [[self._row(content)] for content in contents]

    def _row(self, content: Content) -> TokenRow:
        match content:
            case Conversation():
                return join_parts(self._conversation(content))
            case Segments():
                return join_parts((self._ids(text), on) for text, on in content.parts)
            case Text():
                return join_parts([([*self._opening(), *self._ids(content.text), self.eos], True)])
            case Tokens():
                return tokens_row(content)

    def decode(self, ids: Sequence[int]) -> str:
        text, run = "", []
        for number in [*map(int, ids), None]:
            if number is not None and number not in self._names and number != self.eos:
                run.append(number)
                continue
            text += self._model.decode(run)
            text += "" if number is None else self._names.get(number, "</s>")
            run = []
        return text

    def _opening(self) -> list[int]:
        return [self.special["[gMASK]"], self.special["sop"]]

    def _conversation(self, conversation: Conversation) -> list[_Part]:
        parts = [(self._opening(), self._train_on_prompt)]
        if conversation.tools:
            listed = json.dumps(list(conversation.tools), indent=4, ensure_ascii=False)
            parts.append(
                (self._turn("system", "", _TOOLS_INTRODUCTION + listed), self._train_on_prompt)
            )
        for message in conversation.messages:
            parts += self._message(message)
        parts.append(([self.eos], parts[-1][1]))
        return parts

    def _message(self, message: Message) -> list[_Part]:
        on = message.trained or (self._train_on_prompt and not message.switched_off)
        role = _ROLES.get(message.role, message.role)
        calls = message.extra.get("tool_calls")
        if not isinstance(calls, list):
            metadata = message.extra.get("metadata")
            name = metadata if isinstance(metadata, str) and role == "assistant" else ""
            return [(self._turn(role, name, message.content), on)]
        parts = [(self._turn(role, "", message.content), on)] if message.content else []
        for call in calls:
            function = call["function"]
            parts.append((self._turn(role, function["name"], _as_code(function["arguments"])), on))
        return parts

    def _turn(self, role: str, metadata: str, content: str) -> list[int]:
        return [self.special[f"<|{role}|>"], *self._ids(f"{metadata}\n"), *self._ids(content)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids


def _as_code(arguments: dict[str, object]) -> str:
    """Write a call as ChatGLM3 makes it, in Python."""
    listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"```python\ntool_call({listed})\n```"

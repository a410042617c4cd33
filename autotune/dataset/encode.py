"""From what a row says to token ids, and to the mask of those that are trained on."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autotune.dataset.conversation import Content, Conversation, Segments, Text, Tokens
from autotune.dataset.lines import RowError
from autotune.dataset.shapes import ShapeCache
from autotune.dataset.template import ChatTemplate, Sample, Span
from autotune.dataset.tokenizer import has_template, is_chatglm3, load_tokenizer
from autotune.errors import InputMissingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenRow = tuple[NDArray[np.int32], NDArray[np.bool_]]

_MAX_ASCII = 127


class Codec(Protocol):
    """What turns a row into tokens; one row may give several sequences.

    `notes` counts rows that were not taken word for word, by what was done to them. `ends` are the
    tokens that can end a turn.
    """

    notes: Counter[str]
    ends: frozenset[int]

    def encode(self, content: Content) -> list[TokenRow]:
        """Return the token ids of each sequence of a row, and for each id whether it is trained on.

        Raises:
            RowError: the row cannot be written in the model's form.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, with the special ones written out."""


def load_codec(
    model_dir: Path, *, trust_remote_code: bool, train_on_prompt: bool, needs_template: bool
) -> Codec:
    """Return the codec of a model directory.

    Raises:
        InputMissingError: its tokenizer cannot be loaded, or lacks the chat template it needs.
    """
    if is_chatglm3(model_dir):
        from autotune.dataset.chatglm3 import ChatGlm3Codec

        return ChatGlm3Codec(model_dir, train_on_prompt=train_on_prompt)
    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    if needs_template and not has_template(tokenizer):
        msg = (
            f"the tokenizer in {model_dir} has no chat template: use the tokenizer of an instruct"
            " model, or put a template in chat_template.jinja beside it"
        )
        raise InputMissingError(msg)
    return TemplateCodec(tokenizer, train_on_prompt=train_on_prompt)


def join_parts(parts: Iterable[tuple[Sequence[int], bool]]) -> TokenRow:
    """Join token ids that are each trained on as a whole, or not."""
    ids: list[int] = []
    trained: list[bool] = []
    for part, is_trained in parts:
        ids += part
        trained += [is_trained] * len(part)
    return np.asarray(ids, dtype=np.int32), np.asarray(trained, dtype=np.bool_)


class TemplateCodec:
    """A tokenizer of transformers with its chat template."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, train_on_prompt: bool) -> None:
        self._tokenizer = tokenizer
        self._train_on_prompt = train_on_prompt
        self._template = ChatTemplate(tokenizer) if has_template(tokenizer) else None
        if self._template is not None:
            self._shapes = ShapeCache(self._template, whole=train_on_prompt)
        # The engine below transformers' tokenizer, without the checks that cost as much as short
        # texts themselves.
        self._engine = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._engine is not None:
            self._engine.no_truncation()
            self._engine.no_padding()
        self.notes: Counter[str] = Counter()
        self.ends = frozenset(tokenizer.added_tokens_decoder) | {tokenizer.eos_token_id} - {None}

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def encode(self, content: Content) -> list[TokenRow]:
        match content:
            case Conversation():
                return self._conversation(content)
            case Segments():
                return [join_parts((self._ids(text), on) for text, on in content.parts)]
            case Text():
                return [self._text(content.text)]
            case Tokens():
                return [join_parts(zip([[i] for i in content.input_ids], content.trained, strict=True))]

    def _text(self, text: str) -> TokenRow:
        ids = list(self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        return join_parts([(ids + self._eos_unless(ids), True)])

    def _eos_unless(self, ids: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return [] if eos is None or ids[-1:] == [eos] else [int(eos)]

    def _conversation(self, conversation: Conversation) -> list[TokenRow]:
        if self._template is None:
            return [self._plain_pair(conversation)]
        if self._template.folds(conversation):
            self.notes["system_folded"] += 1
        samples = self._shapes.samples(self._template.fitted(conversation))
        if len(samples) > 1:
            self.notes["split"] += 1
        self._note_losses(conversation, samples)
        return [self._sample(sample) for sample in samples]

    def _note_losses(self, conversation: Conversation, samples: list[Sample]) -> None:
        names = [_tool_name(tool) for tool in conversation.tools]
        if any(name not in samples[-1].text for name in names if name):
            self.notes["tools_left_out"] += 1
        thoughts = [
            thought
            for turn in conversation.messages
            if turn.extra and turn.trained
            for thought in (turn.extra.get("reasoning_content", turn.extra.get("thinking")),)
            if isinstance(thought, str)
        ]
        texts = [sample.text for sample in samples]
        if any(not any(thought.strip() in text for text in texts) for thought in thoughts):
            self.notes["thoughts_left_out"] += 1

    def _plain_pair(self, conversation: Conversation) -> TokenRow:
        """Join a prompt and its answer as they are, as base models without a template take them."""
        if not conversation.is_pair:
            msg = (
                "the tokenizer has no chat template, and the row is more than a prompt and its"
                " answer: use the tokenizer of an instruct model"
            )
            raise RowError(msg)
        self.notes["without_template"] += 1
        prompt, answer = conversation.messages
        before = list(self._tokenizer(prompt.content, verbose=False)["input_ids"])
        before = before[: -1 if before[-1:] == [self._tokenizer.eos_token_id] else None]
        after = self._ids(answer.content)
        after += self._eos_unless(after)
        return join_parts([(before, self._train_on_prompt), (after, answer.trained)])

    def _sample(self, sample: Sample) -> TokenRow:
        spans = sample.off if self._train_on_prompt else sample.trained
        if self._engine is None:
            ids, places = self._with_prefixes(sample.text, spans)
        else:
            encoding = self._engine.encode(sample.text, add_special_tokens=False)
            ids, places = encoding.ids, _places(sample.text, spans, encoding)
        trained = np.full(len(ids), self._train_on_prompt, dtype=np.bool_)
        for start, stop in places:
            trained[start:stop] = not self._train_on_prompt
        return np.asarray(ids, dtype=np.int32), trained

    def _with_prefixes(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Serve tokenizers in Python, which do not say where in the text a token is from."""
        ids = self._ids(text)
        places = []
        for span in spans:
            heads = [self._ids(text[:place]) for place in span]
            if any(ids[: len(head)] != head for head in heads):
                msg = "a token of the tokenizer reaches across the border of an assistant turn"
                raise RowError(msg)
            places.append((len(heads[0]), len(heads[1])))
        return ids, places

    def _ids(self, text: str) -> list[int]:
        if self._engine is not None:
            return list(self._engine.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _tool_name(tool: object) -> str | None:
    record = tool.get("function", tool) if isinstance(tool, dict) else None
    name = record.get("name") if isinstance(record, dict) else None
    return name if isinstance(name, str) else None


def _places(text: str, spans: Sequence[Span], encoding: Any) -> list[Span]:  # noqa: ANN401 - tokenizers.Encoding
    """Return the tokens of each span of characters.

    A token across the first place, or across the last, is trained on.
    """
    places = []
    offsets = None
    for start, end in spans:
        place = _quick_place(text, start, end, encoding)
        if place is None:
            if offsets is None:
                offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            place = _place(offsets, start, end)
        places.append(place)
    return places


def _quick_place(text: str, start: int, end: int, encoding: Any) -> Span | None:  # noqa: ANN401
    """Ask for the two tokens alone, where their offsets can be relied on.

    White space may be in the offsets of no token, and a character outside ASCII in those of many.
    """
    if start >= end or text[start].isspace():
        return None
    last = text[end - 1]
    if last.isspace() or ord(last) > _MAX_ASCII:
        return None
    first, stop = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    return None if first is None or stop is None else (first, stop + 1)


def _place(offsets: NDArray[np.int64], start: int, end: int) -> Span:
    starts, ends = offsets[:, 0], offsets[:, 1]
    # Some tokenizers leave a token of white space with an empty range at its end, so a token is
    # before a place when it ends there or earlier.
    first = int(np.searchsorted(ends, start, side="right"))
    behind = int(np.searchsorted(ends, end, side="right"))
    return first, max(behind, int(np.searchsorted(starts, end)))

"""From what a row says to token ids, and to the mask of those that are trained on."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from autotune.dataset.anchors import Anchors, find_anchors
from autotune.dataset.conversation import Content, Conversation, Segments, Text, Tokens
from autotune.dataset.lines import RowError
from autotune.dataset.shapes import ShapeCache
from autotune.dataset.template import ChatTemplate, Sample, Span, thought_of
from autotune.dataset.tokenizer import has_template, is_chatglm3, load_tokenizer
from autotune.errors import InputMissingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenRow = tuple[list[int], bytearray]
"""Token ids, and a 1 for each of them that is trained on.

Plain lists, as arrays of a few hundred numbers cost more to make than to fill.
"""

_A = TypeVar("_A")
_B = TypeVar("_B")

_MAX_ASCII = 127
_NO_ANCHORS = object()


class Codec(Protocol):
    """What turns rows into tokens; one row may give several sequences.

    `notes` counts rows that were not taken word for word, by what was done to them. `ends` are the
    tokens that can end a turn.
    """

    notes: Counter[str]
    ends: frozenset[int]

    def encode(self, contents: Sequence[Content]) -> "list[list[TokenRow] | RowError]":
        """Return the sequences of each row, or why it cannot be written in the model's form."""

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
    trained = bytearray()
    for part, is_trained in parts:
        ids += part
        trained += (b"\1" if is_trained else b"\0") * len(part)
    return ids, trained


def tokens_row(content: Tokens) -> TokenRow:
    """Return a row that was tokenised before."""
    return list(content.input_ids), bytearray(content.trained)


def attempt(function: "Callable[[_A], _B]", value: "_A") -> "_B | RowError":
    """Return what a function makes of a value, or the RowError that it raises."""
    try:
        return function(value)
    except RowError as error:
        return error


def _settled(parts: "list[TokenRow | RowError]") -> "list[TokenRow] | RowError":
    """Return the sequences of a row, or the error of one of them."""
    rows = []
    for part in parts:
        if isinstance(part, RowError):
            return part
        rows.append(part)
    return rows


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
        # Only what the engine splits off as it stands, with no white space, can serve as an anchor.
        self._special = frozenset(
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and not (token.lstrip or token.rstrip or token.single_word)
        )
        self.notes: Counter[str] = Counter()
        self.ends = frozenset(tokenizer.added_tokens_decoder) | {tokenizer.eos_token_id} - {None}

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def encode(self, contents: Sequence[Content]) -> "list[list[TokenRow] | RowError]":
        # In steps over many rows: a tokenizer goes through memory enough to make what runs between
        # two of its calls several times slower.
        drafts = [attempt(self._draft, content) for content in contents]
        samples = [
            sample
            for draft in drafts
            if not isinstance(draft, RowError)
            for sample in draft
            if isinstance(sample, Sample)
        ]
        rows = iter(self._tokenised(samples))
        return [
            draft
            if isinstance(draft, RowError)
            else _settled([next(rows) if isinstance(part, Sample) else part for part in draft])
            for draft in drafts
        ]

    def _draft(self, content: Content) -> "list[Sample | TokenRow]":
        """Go as far with a row as is possible without tokenising conversations."""
        match content:
            case Conversation() if self._template is not None:
                return [*self._samples(content, self._template)]
            case Conversation():
                return [self._plain_pair(content)]
            case Segments():
                return [join_parts((self._ids(text), on) for text, on in content.parts)]
            case Text():
                return [self._text(content.text)]
            case Tokens():
                return [tokens_row(content)]

    def _text(self, text: str) -> TokenRow:
        ids = list(self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])
        return join_parts([(ids + self._eos_unless(ids), True)])

    def _eos_unless(self, ids: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return [] if eos is None or ids[-1:] == [eos] else [int(eos)]

    def _samples(self, conversation: Conversation, template: ChatTemplate) -> list[Sample]:
        if template.folds(conversation):
            self.notes["system_folded"] += 1
        if template.unwritten_calls(conversation):
            self.notes["calls_as_text"] += 1
        fitted = template.fitted(conversation)
        samples = self._shapes.samples(fitted)
        if len(samples) > 1:
            self.notes["split"] += 1
        if not template.marks_end and self._tokenizer.eos_token is not None:
            samples = [self._ended(sample, fitted) for sample in samples]
        if not conversation.is_plain:
            self._note_losses(conversation, samples, template)
        return samples

    def _ended(self, sample: Sample, conversation: Conversation) -> Sample:
        """Put the token that ends a text behind a last answer whose end the template leaves open.

        Without it the model would not learn to stop.
        """
        last = conversation.messages[sample.turns - 1]
        learned = last.trained or (self._train_on_prompt and not last.switched_off)
        if last.role != "assistant" or not learned:
            return sample
        self.notes["ended"] += 1
        text = sample.text + self._tokenizer.eos_token
        trained = sample.trained
        if trained:
            trained = (*trained[:-1], (trained[-1][0], len(text)))
        return replace(sample, text=text, trained=trained, pieces=None)

    def _note_losses(
        self, conversation: Conversation, samples: list[Sample], template: ChatTemplate
    ) -> None:
        text = samples[-1].text
        names = [_tool_name(tool) for tool in conversation.tools]
        beside = not any("tools" in turn.extra for turn in conversation.messages)
        unwritten = beside and conversation.tools and not template.writes_tools
        if unwritten or any(name not in text for name in names if name):
            self.notes["tools_left_out"] += 1
        thoughts = [thought_of(turn).strip() for turn in conversation.messages if turn.trained]
        if any(all(thought not in sample.text for sample in samples) for thought in thoughts):
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

    def _tokenised(self, samples: Sequence[Sample]) -> "list[TokenRow | RowError]":
        if self._engine is None:
            return [attempt(self._with_prefixes, sample) for sample in samples]
        anchors = [self._anchors_of(sample) for sample in samples]
        texts = [sample.text for sample, found in zip(samples, anchors, strict=True) if found]
        # Without offsets, which the anchors stand in for.
        encodings = iter(self._engine.encode_batch_fast(texts, add_special_tokens=False))
        return [
            self._anchored(sample, found, next(encodings)) if found else self._with_offsets(sample)
            for sample, found in zip(samples, anchors, strict=True)
        ]

    def _anchored(self, sample: Sample, anchors: Anchors, encoding: Any) -> TokenRow:  # noqa: ANN401
        ids: list[int] = encoding.ids
        places = anchors.places(ids)
        return self._with_offsets(sample) if places is None else self._masked(ids, places)

    def _with_offsets(self, sample: Sample) -> TokenRow:
        assert self._engine is not None, "only an engine gives offsets"
        encoding = self._engine.encode(sample.text, add_special_tokens=False)
        places = _places(sample.text, self._spans(sample), encoding)
        return self._masked(encoding.ids, places)

    def _spans(self, sample: Sample) -> tuple[Span, ...]:
        return sample.off if self._train_on_prompt else sample.trained

    def _masked(self, ids: list[int], places: Sequence[Span]) -> TokenRow:
        mark, other = (b"\0", b"\1") if self._train_on_prompt else (b"\1", b"\0")
        trained = bytearray(other * len(ids))
        for start, stop in places:
            trained[start:stop] = mark * (stop - start)
        return ids, trained

    def _anchors_of(self, sample: Sample) -> Anchors | None:
        pieces = sample.pieces
        if pieces is None:
            return None
        if pieces.anchors is None:
            spans = pieces.off if self._train_on_prompt else pieces.trained
            found = find_anchors(pieces, spans, self._engine, self._special)
            pieces.anchors = found or _NO_ANCHORS
        return pieces.anchors if isinstance(pieces.anchors, Anchors) else None

    def _with_prefixes(self, sample: Sample) -> TokenRow:
        """Serve tokenizers in Python, which do not say where in the text a token is from.

        Raises:
            RowError: a token reaches across the border of a turn.
        """
        ids = self._ids(sample.text)
        places = []
        for span in self._spans(sample):
            heads = [self._ids(sample.text[:place]) for place in span]
            if any(ids[: len(head)] != head for head in heads):
                msg = "a token of the tokenizer reaches across the border of an assistant turn"
                raise RowError(msg)
            places.append((len(heads[0]), len(heads[1])))
        return self._masked(ids, places)

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

"""Makes tokenised sequences of the lines of a file; what every process that tokenises does."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autotune.dataset.conventions import CONVENTIONS, Convention, mapped, refuse_preferences
from autotune.dataset.conversation import Content
from autotune.dataset.encode import TokenRow, load_codec
from autotune.dataset.lines import Block, Line, Row, RowError, parse_row

Overlong = Literal["truncate", "drop", "refuse"]
Kind = Literal["bad", "overlong", "untrained"]

_TEMPLATE_FREE = ("text", "segments", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides what a line becomes.

    `limit` is the tokens that a sequence may have. `explicit` says that the user has named the
    convention, so that rows are taken for it whatever else they hold.
    """

    model_dir: Path
    trust_remote_code: bool
    convention: str
    mapping: tuple[tuple[str, str], ...]
    explicit: bool
    limit: int
    overlong: Overlong
    train_on_prompt: bool

    def find_convention(self) -> Convention:
        return mapped(dict(self.mapping)) if self.mapping else CONVENTIONS[self.convention]


@dataclass(frozen=True, slots=True)
class Reported:
    """A line that is not used, and why."""

    line: Line
    kind: Kind
    reason: str


@dataclass(slots=True)
class Made:
    """What a block of lines became: sequences end to end, and figures.

    `sizes` has the number of sequences of each row that is used, `full_lengths` the tokens of each
    sequence before truncation, those that are left out included.
    """

    input_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]
    full_lengths: NDArray[np.int64]
    reported: list[Reported]
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence with the messages that it was made of."""

    messages: list[dict[str, object]]
    input_ids: list[int]
    trained: list[bool]


class RowMaker:
    """Turns lines into sequences by a recipe.

    Raises:
        InputMissingError: the tokenizer cannot be loaded, or lacks a chat template.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._convention = recipe.find_convention()
        self.codec = load_codec(
            recipe.model_dir,
            trust_remote_code=recipe.trust_remote_code,
            train_on_prompt=recipe.train_on_prompt,
            needs_template=self._convention.name in _CHATS,
        )

    def make(self, block: Block) -> Made:
        """Make the sequences of a block."""
        batch = _Batch()
        self.codec.notes.clear()
        for line in block:
            batch.counts["rows"] += 1
            try:
                sequences = self._sequences(line.text, batch.unread)
            except RowError as error:
                batch.reported.append(Reported(line, "bad", str(error)))
                continue
            self._keep(line, sequences, batch)
        batch.counts.update(self.codec.notes)
        return batch.made()

    def examples(self, line: Line) -> list[Example]:
        """Make the sequences of a line, with their messages; none if it is not used."""
        from autotune.dataset.conversation import Conversation

        try:
            content = self._content(line.text, Counter())
            sequences = self.codec.encode(content)
        except RowError:
            return []
        limit = self._recipe.limit
        if self._recipe.overlong == "drop" and any(len(ids) > limit for ids, _ in sequences):
            return []
        messages: list[dict[str, object]] = []
        if isinstance(content, Conversation):
            messages = [turn.to_json() for turn in content.messages]
        return [
            Example(messages, ids[:limit].tolist(), trained[:limit].tolist())
            for ids, trained in sequences
            if trained[:limit].any()
        ]

    def _content(self, text: bytes, unread: Counter[str]) -> Content:
        row = parse_row(text)
        left = row.keys() - self._convention.reads
        if left:
            self._look_at_unread(row, left, unread)
        return self._convention.parse(row)

    def _look_at_unread(self, row: Row, keys: set[str], unread: Counter[str]) -> None:
        if not self._recipe.explicit:
            refuse_preferences(row)
        unread.update(key for key in keys if row[key] not in (None, "", [], {}))

    def _sequences(self, text: bytes, unread: Counter[str]) -> list[TokenRow]:
        sequences = self.codec.encode(self._content(text, unread))
        sequences = [row for row in sequences if row[1].any()]
        if not sequences:
            msg = "no token of it is trained on: every answer is empty or switched off"
            raise RowError(msg)
        return sequences

    def _keep(self, line: Line, sequences: Sequence[TokenRow], batch: "_Batch") -> None:
        limit = self._recipe.limit
        lengths = [len(ids) for ids, _ in sequences]
        batch.full_lengths += lengths
        beyond = sum(length - limit for length in lengths if length > limit)
        if not beyond:
            batch.append(sequences, self.codec.ends)
            return
        if self._recipe.overlong != "truncate":
            batch.counts["tokens_lost"] += sum(lengths)
            reason = f"{max(lengths)} tokens, and the limit is {limit}"
            batch.reported.append(Reported(line, "overlong", reason))
            return
        cut = [(ids[:limit], trained[:limit]) for ids, trained in sequences]
        kept = [(ids, trained) for ids, trained in cut if trained.any()]
        batch.counts["tokens_lost"] += sum(lengths) - sum(len(ids) for ids, _ in kept)
        if kept:
            batch.counts["rows_truncated"] += 1
            batch.append(kept, None)
        else:
            reason = f"no token of the first {limit} is trained on"
            batch.reported.append(Reported(line, "untrained", reason))


_CHATS = frozenset(
    {"messages", "sharegpt", "sharegpt-pairs", "chatglm3", "glm4"}
)


class _Batch:
    """Sequences of a block as they are made."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.int32]] = []
        self._trained: list[NDArray[np.bool_]] = []
        self._sizes: list[int] = []
        self.full_lengths: list[int] = []
        self.reported: list[Reported] = []
        self.counts: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()

    def append(self, sequences: Sequence[TokenRow], ends: frozenset[int] | None) -> None:
        """Take the sequences of a row; `ends`, where the row is whole, are tokens that end a turn."""
        self._sizes.append(len(sequences))
        for ids, trained in sequences:
            self._ids.append(ids)
            self._trained.append(trained)
            if ends is not None:
                last = len(ids) - 1 - int(trained[::-1].argmax())
                self.counts["endless"] += int(ids[last]) not in ends

    def made(self) -> Made:
        ids = np.concatenate(self._ids) if self._ids else np.empty(0, dtype=np.int32)
        trained = np.concatenate(self._trained) if self._ids else np.empty(0, dtype=np.bool_)
        return Made(
            input_ids=ids,
            trained=trained,
            lengths=np.asarray([len(part) for part in self._ids], dtype=np.int64),
            sizes=np.asarray(self._sizes, dtype=np.int64),
            full_lengths=np.asarray(self.full_lengths, dtype=np.int64),
            reported=self.reported,
            counts=self.counts,
            unread=self.unread,
        )

"""Makes tokenised sequences of the lines of a file; what every process that tokenises does."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autotune.dataset.conventions import CONVENTIONS, Convention, mapped, refuse_preferences
from autotune.dataset.conversation import Content, Conversation
from autotune.dataset.encode import TokenRow, attempt, load_codec
from autotune.dataset.lines import Block, Line, Row, RowError, parse_row

Overlong = Literal["truncate", "drop", "refuse"]
Kind = Literal["bad", "overlong", "untrained"]

_CHUNK_BYTES = 1 << 16


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
        for lines in _chunks(block):
            batch.counts["rows"] += len(lines)
            contents = [attempt(self._reader(batch.unread), line.text) for line in lines]
            encoded = iter(self.codec.encode([c for c in contents if not isinstance(c, RowError)]))
            for line, content in zip(lines, contents, strict=True):
                found = content if isinstance(content, RowError) else next(encoded)
                self._take(line, found, batch)
        batch.counts.update(self.codec.notes)
        return batch.made()

    def _reader(self, unread: Counter[str]) -> Callable[[bytes], Content]:
        return lambda text: self._content(text, unread)

    def _take(self, line: Line, found: list[TokenRow] | RowError, batch: "_Batch") -> None:
        if isinstance(found, RowError):
            batch.reported.append(Reported(line, "bad", str(found)))
            return
        sequences = [row for row in found if _teaches(row[1])]
        if sequences:
            self._keep(line, sequences, batch)
        else:
            reason = "no token of it is trained on: every answer is empty or switched off"
            batch.reported.append(Reported(line, "bad", reason))

    def examples(self, line: Line) -> list[Example]:
        """Make the sequences of a line, with their messages; none if it is not used."""
        try:
            content = self._content(line.text, Counter())
        except RowError:
            return []
        (sequences,) = self.codec.encode([content])
        if isinstance(sequences, RowError):
            return []
        limit = self._recipe.limit
        if self._recipe.overlong == "drop" and any(len(ids) > limit for ids, _ in sequences):
            return []
        messages: list[dict[str, object]] = []
        if isinstance(content, Conversation):
            messages = [turn.to_json() for turn in content.messages]
        return [
            Example(messages, ids[:limit], [bool(mark) for mark in trained[:limit]])
            for ids, trained in sequences
            if _teaches(trained[:limit])
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

    def _keep(self, line: Line, sequences: Sequence[TokenRow], batch: "_Batch") -> None:
        limit = self._recipe.limit
        lengths = [len(ids) for ids, _ in sequences]
        batch.full_lengths += lengths
        beyond = sum(length - limit for length in lengths if length > limit)
        if not beyond:
            # With the prompt what follows the end of the last turn is trained on, too.
            batch.append(sequences, None if self._recipe.train_on_prompt else self.codec.ends)
            return
        if self._recipe.overlong != "truncate":
            batch.counts["tokens_lost"] += sum(lengths)
            reason = f"{max(lengths)} tokens, and the limit is {limit}"
            batch.reported.append(Reported(line, "overlong", reason))
            return
        cut = [(ids[:limit], trained[:limit]) for ids, trained in sequences]
        kept = [(ids, trained) for ids, trained in cut if _teaches(trained)]
        batch.counts["tokens_lost"] += sum(lengths) - sum(len(ids) for ids, _ in kept)
        if kept:
            batch.counts["rows_truncated"] += 1
            batch.append(kept, None)
        else:
            reason = f"no token of the first {limit} is trained on"
            batch.reported.append(Reported(line, "untrained", reason))


_CHATS = frozenset({"messages", "sharegpt", "sharegpt-pairs", "chatglm3", "glm4"})


def _teaches(trained: bytearray) -> bool:
    """Tell whether a loss sees any token: nothing predicts the first."""
    return trained.find(1, 1) >= 0


def _chunks(block: Block) -> Iterator[list[Line]]:
    """Yield lines a few at a time: what the tokenizer returns is large until it is copied."""
    lines: list[Line] = []
    size = 0
    for line in block:
        lines.append(line)
        size += len(line.text)
        if size >= _CHUNK_BYTES:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


class _Batch:
    """Sequences of a block as they are made."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._trained = bytearray()
        self._lengths: list[int] = []
        self._sizes: list[int] = []
        self.full_lengths: list[int] = []
        self.reported: list[Reported] = []
        self.counts: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()

    def append(self, sequences: Sequence[TokenRow], ends: frozenset[int] | None) -> None:
        """Take the sequences of a row; `ends`, if it is whole, are tokens that end a turn."""
        self._sizes.append(len(sequences))
        for ids, trained in sequences:
            self._ids.extend(ids)
            self._trained += trained
            self._lengths.append(len(ids))
            if ends is not None and ids[trained.rindex(1)] not in ends:
                self.counts["endless"] += 1

    def made(self) -> Made:
        return Made(
            input_ids=np.frombuffer(self._ids, dtype=np.int32),
            trained=np.frombuffer(self._trained, dtype=np.bool_),
            lengths=np.asarray(self._lengths, dtype=np.int64),
            sizes=np.asarray(self._sizes, dtype=np.int64),
            full_lengths=np.asarray(self.full_lengths, dtype=np.int64),
            reported=self.reported,
            counts=self.counts,
            unread=self.unread,
        )

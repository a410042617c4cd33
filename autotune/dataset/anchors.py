"""Finds spans of characters among token ids by the special tokens around them.

Offsets of all tokens cost as much as all else that is done to a row besides tokenising it. But a
template mostly sets special tokens in front of a turn and behind it. A special token is split off
before anything else is, so where its id stands in the ids its text stands in the text.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from autotune.dataset.shapes import Pieces
from autotune.dataset.template import Span


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A place `len(tail)` tokens behind the special token `mark` at its `count`-th occurrence."""

    mark: int
    count: int
    tail: list[int]


@dataclass(frozen=True, slots=True)
class Anchors:
    """The places of each span, and how often each special token is there in all."""

    spans: tuple[tuple[_Anchor, _Anchor], ...]
    totals: tuple[tuple[int, int], ...]

    def places(self, ids: list[int]) -> list[Span] | None:
        """Return the tokens of each span, or None where the contents blur it.

        That is where a content holds the text of a special token, or merges with what is in front
        of it.
        """
        found = {mark: _all_places(ids, mark) for mark, _ in self.totals}
        if any(len(found[mark]) != total for mark, total in self.totals):
            return None
        spans = []
        for first, last in self.spans:
            start = found[first.mark][first.count - 1] + 1
            stop = start + len(first.tail)
            if ids[start:stop] != first.tail:
                return None
            spans.append((stop, found[last.mark][last.count - 1] + 1))
        return spans


def _all_places(ids: list[int], mark: int) -> list[int]:
    places = []
    at = -1
    with suppress(ValueError):
        while True:
            at = ids.index(mark, at + 1)
            places.append(at)
    return places


def find_anchors(
    pieces: Pieces,
    spans: Sequence[tuple[tuple[int, int], tuple[int, int]]],
    engine: Any,  # noqa: ANN401 - tokenizers.Tokenizer
    special: frozenset[int],
) -> Anchors | None:
    """Return the anchors of spans of a text in pieces, or None where special tokens are lacking."""
    anchors = []
    for start, end in spans:
        first, last = (_anchor(pieces, place, engine, special) for place in (start, end))
        if first is None or last is None or last.tail:
            return None
        anchors.append((first, last))
    marks = {anchor.mark for pair in anchors for anchor in pair}
    every = [
        number
        for piece in pieces.pieces
        if isinstance(piece, str)
        for number in _ids(piece, engine)
    ]
    return Anchors(tuple(anchors), tuple((mark, every.count(mark)) for mark in sorted(marks)))


def _anchor(
    pieces: Pieces,
    place: tuple[int, int],
    engine: Any,  # noqa: ANN401 - tokenizers.Tokenizer
    special: frozenset[int],
) -> _Anchor | None:
    piece, offset = place
    before = [p for p in pieces.pieces[:piece] if isinstance(p, str)]
    if offset:
        head = pieces.pieces[piece][:offset]  # type: ignore[index] # only texts have an inside
        before.append(head)
    elif piece and isinstance(pieces.pieces[piece - 1], str):
        head = before[-1]
    else:
        return None
    ids = _ids(head, engine)
    at = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in special), None)
    if at is None:
        return None
    count = sum(_ids(text, engine).count(ids[at]) for text in before)
    return _Anchor(ids[at], count, ids[at + 1 :])


def _ids(text: str, engine: Any) -> list[int]:  # noqa: ANN401
    ids: list[int] = engine.encode(text, add_special_tokens=False).ids
    return ids

"""Conventions that need no chat template: plain text, segments, and rows tokenised before."""

from collections.abc import Sequence

from autotune.dataset.conversation import (
    Segments,
    Text,
    Tokens,
    require_list,
    require_text,
    shown,
)
from autotune.dataset.lines import Row, RowError

_IGNORED_LABEL = -100
_MAX_TOKEN_ID = 2**31 - 1
_MASKS = ("assistant_masks", "completion_mask")


def parse_text(row: Row) -> Text:
    """Read plain text, `{"text": "..."}`: all of it is trained on.

    Raises:
        RowError: there is none.
    """
    text = require_text(row, "text")
    if not text.strip():
        msg = 'the "text" is empty, so there is nothing to train on'
        raise RowError(msg)
    return Text(text)


def parse_segments(row: Row) -> Segments:
    """Read `{"segments": [{"label": true, "text": "..."}, ...]}`: labelled ones are trained on.

    Raises:
        RowError: the row breaks the form.
    """
    parts = []
    for place, segment in enumerate(require_list(row, "segments")):
        where = f"segments[{place}]"
        if not isinstance(segment, dict) or not isinstance(segment.get("label"), bool):
            msg = f'{where} is {shown(segment)} without a "label" that is true or false'
            raise RowError(msg)
        parts.append((require_text(segment, "text", where), segment["label"]))
    return Segments(tuple(parts))


def parse_tokens(row: Row) -> Tokens:
    """Read `{"input_ids": [...], "labels": [...]}`: a label of -100 is not trained on.

    `assistant_masks` and `completion_mask` may say it, too: what one of the three leaves out is
    not trained on, and with none of them all is. Padding, where `attention_mask` is 0, is cut off.

    Raises:
        RowError: the lists are no integers, or not of one length.
    """
    ids = _integers(row, "input_ids")
    if any(not 0 <= token <= _MAX_TOKEN_ID for token in ids):
        msg = '"input_ids" has a number that is no token id'
        raise RowError(msg)
    trained = _trained(row, ids)
    attended = _flags(row, "attention_mask", ids)
    kept = [place for place, seen in enumerate(attended) if seen]
    return Tokens(tuple(ids[place] for place in kept), tuple(trained[place] for place in kept))


def _trained(row: Row, ids: list[int]) -> list[bool]:
    masks = [_flags(row, key, ids) for key in _MASKS]
    return [all(marks) for marks in zip(_labelled(row, ids), *masks, strict=True)]


def _labelled(row: Row, ids: list[int]) -> list[bool]:
    if "labels" not in row:
        return [True] * len(ids)
    labels = _integers(row, "labels")
    _require_length(labels, ids, "labels")
    if any(label not in (_IGNORED_LABEL, token) for label, token in zip(labels, ids, strict=True)):
        msg = '"labels" that are not -100 differ from "input_ids": shifted ones cannot be used'
        raise RowError(msg)
    return [label != _IGNORED_LABEL for label in labels]


def _flags(row: Row, key: str, ids: list[int]) -> list[bool]:
    if key not in row:
        return [True] * len(ids)
    marks = require_list(row, key)
    if not all(type(mark) in (int, bool) and mark in (0, 1) for mark in marks):
        msg = f'"{key}" is no list of 0 and 1'
        raise RowError(msg)
    _require_length(marks, ids, key)
    return [bool(mark) for mark in marks]


def _integers(row: Row, key: str) -> list[int]:
    values = require_list(row, key)
    if not all(type(value) is int for value in values):
        msg = f'"{key}" is no list of whole numbers'
        raise RowError(msg)
    return values  # type: ignore[return-value] # checked just now


def _require_length(values: Sequence[object], ids: list[int], key: str) -> None:
    if len(values) != len(ids):
        msg = f'"{key}" has {len(values)} entries and "input_ids" has {len(ids)}'
        raise RowError(msg)

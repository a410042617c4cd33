"""Rows written out again, for tools that read lines of JSON."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from autotune.dataset.conventions import Convention
from autotune.dataset.conversation import Content, Conversation, Text
from autotune.dataset.lines import RowError, parse_row, read_blocks
from autotune.dataset.preparing import find_convention
from autotune.dataset.rows import Rows
from autotune.dataset.sources import Rules, Source
from autotune.errors import CannotWriteError, UsageError

_IGNORED = -100
"""The label that the losses of transformers and torch leave out."""


def write_tokens(rows: Rows, chosen: NDArray[np.int64], path: Path) -> int:
    """Write rows as `input_ids`, `labels` and `attention_mask`; returns their number.

    Packed rows have `position_ids` in place of the mask, and no label where a sequence begins.

    Raises:
        CannotWriteError: the file cannot be written.
    """
    return _write(path, (_tokens(rows, int(row)) for row in chosen))


def write_sequences(rows: Rows, chosen: NDArray[np.int64], path: Path) -> int:
    """Write the sequences of rows, each on a line of its own; returns their number.

    Raises:
        CannotWriteError: the file cannot be written.
    """
    return _write(path, (one for row in chosen for one in _sequences(rows, int(row))))


def _tokens(rows: Rows, row: int) -> dict[str, object]:
    ids, trained = rows[row]
    labels = np.where(trained, ids, _IGNORED)
    if not rows.packed:
        return _line(ids, labels) | {"attention_mask": [1] * len(ids)}
    positions = rows.position_ids(row)
    labels[positions == 0] = _IGNORED
    return _line(ids, labels) | {"position_ids": positions.tolist()}


def _sequences(rows: Rows, row: int) -> Iterator[dict[str, object]]:
    ids, trained = rows[row]
    starts = np.flatnonzero(rows.position_ids(row) == 0)
    for own, marks in zip(np.split(ids, starts[1:]), np.split(trained, starts[1:]), strict=True):
        yield _line(own, np.where(marks, own, _IGNORED)) | {"attention_mask": [1] * len(own)}


def _line(ids: NDArray[np.int32], labels: NDArray[np.int32]) -> dict[str, object]:
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def write_messages(sources: Iterable[Source], rules: Rules, path: Path) -> int:
    """Write rows as `messages`, each as often as its file's weight says; returns their number.

    Lines that cannot be used are left out, as they are from the training. A turn that is not
    trained on says so with `loss`.

    Raises:
        UsageError: a file holds rows that are no conversations.
        InputMissingError: a file is not there.
        CannotWriteError: the file cannot be written.
    """
    return _write(path, (row for source in sources for row in _conversations(source, rules)))


def _conversations(source: Source, rules: Rules) -> Iterator[dict[str, object]]:
    convention = find_convention(source.path, rules)
    taken = 0.0
    for block in read_blocks(source.path):
        for line in block:
            try:
                content = convention.parse(parse_row(line.text))
            except RowError:
                continue
            row = _messages(content, source, convention)
            before, taken = taken, taken + source.weight
            yield from [row] * (int(taken + 1e-9) - int(before + 1e-9))


def _messages(content: Content, source: Source, convention: Convention) -> dict[str, object]:
    if isinstance(content, Text):
        return {"messages": [{"role": "assistant", "content": content.text}]}
    if not isinstance(content, Conversation):
        msg = (
            f"{source.path} holds rows in {convention.name} form, which are no conversations: "
            "export to a tool that takes tokens"
        )
        raise UsageError(msg)
    turns = []
    for turn in content.messages:
        off = turn.role == "assistant" and not turn.trained
        turns.append(turn.to_json() | ({"loss": False} if off else {}))
    tools = {"tools": orjson.dumps(content.tools).decode()} if content.tools else {}
    return {"messages": turns, **tools}


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, rows: Iterable[dict[str, object]]) -> int:
    written = 0
    try:
        with open(path, "xb", opener=_open_private) as file:
            for row in rows:
                file.write(orjson.dumps(row) + b"\n")
                written += 1
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise CannotWriteError(msg) from error
    return written

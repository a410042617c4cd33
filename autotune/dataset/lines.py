"""Reads a file of JSON lines strictly: what cannot be used is named by file, line and reason."""

import codecs
import hashlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import orjson

from autotune.errors import DatasetError, InputMissingError

Row = dict[str, object]

_JSON_NAMES = {list: "an array", str: "a string", bool: "a boolean", int: "a number"}
_JSON_NAMES |= {float: "a number", type(None): "null"}


class RowError(ValueError):
    """Why one row cannot be used; whoever knows its file and line adds them with `located`."""


@contextmanager
def located(path: Path, number: int) -> Iterator[None]:
    """Turn a RowError into a DatasetError that names the file and the line (the first is 1)."""
    try:
        yield
    except RowError as error:
        msg = f"{path}, line {number}: {error}"
        raise DatasetError(msg) from error


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the number of each line that is not blank, and its JSON object.

    Every line of the file counts, the blank ones too; the first is 1.

    Raises:
        InputMissingError: no file is there, or it cannot be read.
        DatasetError: a line is no JSON object in UTF-8, or the file has no row.
    """
    empty = True
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).rstrip()
            if not text:
                continue
            with located(path, number):
                row = _parse(text, first=empty)
            empty = False
            yield number, row
    if empty:
        msg = f"{path} holds no rows: one JSON object a line is needed"
        raise DatasetError(msg)


def content_hash(path: Path) -> str:
    """Return a hash of the file's bytes, in hexadecimal digits.

    Raises:
        InputMissingError: no file is there, or it cannot be read.
    """
    with _open(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _open(path: Path) -> BufferedReader:
    try:
        # A pipe is refused unopened: it would wait for a writer, and cannot be read twice.
        if stat.S_ISREG(path.stat().st_mode):
            return path.open("rb")
        found = "it is a directory" if path.is_dir() else "it is no regular file"
    except OSError as error:
        found = str(error.strerror)
    msg = f"the dataset {path} cannot be read ({found}): give a file with one JSON object a line"
    raise InputMissingError(msg)


def _parse(text: bytes, *, first: bool) -> Row:
    if first and text.lstrip().startswith(b"["):
        msg = (
            "the file is a JSON array, and one JSON object a line is needed"
            " (`jq -c '.[]' FILE` writes it so)"
        )
        raise RowError(msg)
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError(_why_unreadable(text, error)) from error
    if not isinstance(row, dict):
        msg = f"{_JSON_NAMES[type(row)]} was found, and a JSON object is needed"
        raise RowError(msg)
    return row


def _why_unreadable(text: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text.decode()
    except UnicodeDecodeError as fault:
        byte = text[fault.start]
        return (
            f"byte {byte:#04x} at byte {fault.start + 1} of the line is not UTF-8: save it as UTF-8"
        )
    return f"not valid JSON ({error.msg} at column {error.colno})"

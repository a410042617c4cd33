"""Reads a file of JSON objects strictly: what cannot be used is named by line, byte and reason.

A file holds one object a line, or one JSON array of objects; either may be compressed with gzip.
"""

import codecs
import gzip
import hashlib
import json
import re
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NoReturn

import orjson

from autotune.errors import DatasetError, InputMissingError

Row = dict[str, object]

BLOCK_BYTES = 1 << 20
_MAX_ROW_BYTES = 1 << 28
_MAX_DEPTH = 100
# How far the first character that is not white is looked for, to tell an array from lines.
_HEAD_BYTES = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b"
_WHITE = b" \t\r\n"
_JSON_NAMES = {list: "an array", str: "a string", bool: "a boolean", int: "a number"}
_JSON_NAMES |= {float: "a number", type(None): "null"}

# A whole string, or the quote of one whose end is not read yet, or what gives an array its form.
_ARRAY_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_MISLEADING = (b" :", b"\t:", b"\r:", b"\n:", b'\\\\":')
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


class RowError(ValueError):
    """Why one row cannot be used; whoever knows its file and line adds them."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, or an entry of its array: the first is number 1, the first byte 0.

    In a compressed file `offset` counts the bytes that it unpacks to.
    """

    number: int
    offset: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Lines that follow one another, each one byte apart from the next.

    `read_bytes` is how much of the file, compressed or not, was read until its end.
    """

    number: int
    offset: int
    texts: list[bytes]
    read_bytes: int = 0

    def __iter__(self) -> Iterator[Line]:
        """Yield the lines that are not blank."""
        offset = self.offset
        for number, text in enumerate(self.texts, start=self.number):
            stripped = text.strip(_WHITE)
            if stripped:
                yield Line(number, offset + len(text) - len(text.lstrip(_WHITE)), stripped)
            offset += len(text) + 1


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield the lines of a file, or the entries of its array, some `block_bytes` at a time.

    Raises:
        InputMissingError: no file is there, or it cannot be read.
        DatasetError: it is damaged as a whole: a broken archive, an array that does not end, or a
            line of more than 256 MiB.
    """
    with _open(path) as raw:
        packed = raw.peek(2)[:2] == _GZIP_MAGIC
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            for block in _blocks(file, path, block_bytes):  # type: ignore[arg-type] # GzipFile reads
                yield replace(block, read_bytes=raw.tell())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            msg = f"the compressed file {path} is damaged ({error}): copy or compress it again"
            raise DatasetError(msg) from error


def _blocks(file: BinaryIO, path: Path, block_bytes: int) -> Iterator[Block]:
    head = file.read(block_bytes)
    while len(head) < _HEAD_BYTES and not head.strip(_WHITE + codecs.BOM_UTF8):
        more = file.read(block_bytes)
        if not more:
            break
        head += more
    offset = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    head = head[offset:]
    if head.lstrip(_WHITE).startswith(b"[") and not _is_a_line(head):
        yield from _array_blocks(file, path, head, offset, block_bytes)
    else:
        yield from _line_blocks(file, path, head, offset, block_bytes)


def _is_a_line(head: bytes) -> bool:
    """Tell whether an array at the start is a line that others follow, and not the whole file."""
    first, _, rest = head.lstrip(_WHITE).partition(b"\n")
    try:
        orjson.loads(first)
    except orjson.JSONDecodeError:
        return False
    return bool(rest.strip(_WHITE))


def _line_blocks(
    file: BinaryIO, path: Path, head: bytes, offset: int, block_bytes: int
) -> Iterator[Block]:
    number = 1
    while head:
        data = head if head.endswith(b"\n") else head + file.readline(_MAX_ROW_BYTES)
        if len(data) > _MAX_ROW_BYTES and not data.endswith(b"\n"):
            _refuse_huge(path, number + data.count(b"\n"))
        texts = data.removesuffix(b"\n").split(b"\n")
        yield Block(number, offset, texts)
        number += len(texts)
        offset += len(data)
        head = file.read(block_bytes)


def _array_blocks(
    file: BinaryIO, path: Path, head: bytes, offset: int, block_bytes: int
) -> Iterator[Block]:
    start = head.index(b"[") + 1
    splitter = _ArraySplitter(head[start:])
    number, offset = 1, offset + start
    while True:
        texts = splitter.entries()
        if texts:
            yield Block(number, offset, texts)
            number += len(texts)
            offset += sum(map(len, texts)) + len(texts)
        if splitter.closed:
            break
        if len(splitter.rest) > _MAX_ROW_BYTES:
            _refuse_huge(path, number)
        more = file.read(block_bytes)
        if not more:
            msg = f"{path} is a JSON array that does not end: the file is cut off, get it whole"
            raise DatasetError(msg)
        splitter.feed(more)
    if (splitter.rest + file.read(block_bytes)).strip(_WHITE):
        msg = (
            f"{path} has more after its JSON array, which ends before byte {offset}: write one"
            " array, or one JSON object a line"
        )
        raise DatasetError(msg)


class _ArraySplitter:
    """Cuts the inside of a JSON array at its own commas, however it arrives."""

    def __init__(self, data: bytes) -> None:
        self.rest = data
        self.closed = False
        self._depth = 0
        self._scanned = 0

    def feed(self, data: bytes) -> None:
        self.rest += data

    def entries(self) -> list[bytes]:
        """Return the entries that are complete so far; `rest` is what follows them."""
        texts, start = [], 0
        for token in _ARRAY_TOKEN.finditer(self.rest, self._scanned):
            kind, at = token.group(), token.start()
            if kind == b'"':
                self._scanned = at
                break
            self._scanned = token.end()
            if kind in (b"[", b"{"):
                self._depth += 1
            elif kind in (b"]", b"}") and self._depth:
                self._depth -= 1
            elif kind == b"]" or (kind == b"," and not self._depth):
                texts.append(self.rest[start:at])
                start = at + 1
                if kind == b"]":
                    self.closed = True
                    break
        self.rest = self.rest[start:]
        self._scanned -= start
        return texts


def _refuse_huge(path: Path, number: int) -> NoReturn:
    msg = (
        f"{path}, line {number} is longer than {_MAX_ROW_BYTES >> 20} MiB, which no row of text"
        " is: write one JSON object a line"
    )
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
    except (OSError, ValueError) as error:
        found = str(getattr(error, "strerror", None) or error)
    msg = f"the dataset {path} cannot be read ({found}): give a file with one JSON object a line"
    raise InputMissingError(msg)


def parse_row(text: bytes) -> Row:
    """Read one JSON object.

    Raises:
        RowError: the text is something else, or an object of it has a key twice.
    """
    # Calls and tools have names; digits in what is said are not looked at.
    row = _parse(text, exact=b'"name"' in text)
    if not isinstance(row, dict):
        msg = f"{_JSON_NAMES[type(row)]} was found, and a JSON object is needed"
        raise RowError(msg)
    return row


def parse_value(text: bytes) -> object:
    """Read JSON of any kind.

    Raises:
        RowError: the text is something else, or an object of it has a key twice.
    """
    return _parse(text, exact=True)


def _parse(text: bytes, *, exact: bool) -> object:
    """Read JSON; unless `exact`, whole numbers beyond 64 bits are rounded."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError(_why_unreadable(text, error)) from error
    keys = _count_keys(value)
    # Inside a string a quote has a backslash before it, so this counts the keys as they are written
    # unless one has white space behind it or ends in a backslash; these are looked at closely.
    told = text.count(b'":') - text.count(b'\\":') == keys
    if not told or any(mark in text for mark in _MISLEADING):
        return _read_closely(text)
    return _read_closely(text) if exact and _LONG_NUMBER.search(text) else value


def _count_keys(value: object) -> int:
    keys, depth = 0, 0
    level: list[object] = [value] if isinstance(value, (dict, list)) else []
    while level:
        depth += 1
        below: list[object] = []
        for outer in level:
            if type(outer) is dict:
                keys += len(outer)
                inner: Iterable[object] = outer.values()
            else:
                inner = outer  # type: ignore[assignment] # a list: nothing else is put there
            below += [found for found in inner if type(found) is dict or type(found) is list]
        level = below
        if depth > _MAX_DEPTH:
            msg = f"objects and arrays are nested more than {_MAX_DEPTH} deep"
            raise RowError(msg)
    return keys


def _read_closely(text: bytes) -> object:
    def check(pairs: list[tuple[str, object]]) -> Row:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                msg = f"the key {orjson.dumps(key).decode()} is there twice in one object"
                raise RowError(msg)
            seen.add(key)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=check)


def _why_unreadable(text: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text.decode()
    except UnicodeDecodeError as fault:
        byte = text[fault.start]
        return (
            f"byte {byte:#04x} at byte {fault.start + 1} of the line is not UTF-8: save it as UTF-8"
        )
    return f"not valid JSON ({error.msg} at column {error.colno})"

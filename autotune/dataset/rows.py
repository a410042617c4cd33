"""Tokenised rows on disk: flat arrays, memory-mapped, so that opening them reads nothing.

A directory holds input_ids.npy (int32) and trained.npy (bool, true where a token is trained on),
each with all sequences end to end; offsets.npy (int64), where sequence i is offsets[i] to
offsets[i + 1]; index.npy (int64), the sequences of an epoch, each as often as its file's weight
asks for; packs.npy (int64), where row i is the sequences index[packs[i]] to
index[packs[i + 1] - 1], a single one unless they are packed; meta.json; reported.jsonl, a line for
each line of the data that is not used; and quarantine.jsonl, these lines themselves if they were
asked for. The directory appears complete or not at all.
"""

import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import orjson
from numpy.typing import NDArray

from autotune.errors import CannotWriteError, InputMissingError
from autotune.workload import DatasetProfile

SCHEMA = 3

_IDS, _TRAINED, _OFFSETS, _META = "input_ids.npy", "trained.npy", "offsets.npy", "meta.json"
_INDEX, _PACKS = "index.npy", "packs.npy"
REPORTED, QUARANTINE = "reported.jsonl", "quarantine.jsonl"
_FILES = (_IDS, _TRAINED, _OFFSETS, _INDEX, _PACKS, REPORTED, QUARANTINE, _META)
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsMeta:
    """What is known of stored rows; `content_key` changes with whatever they were made from."""

    content_key: str
    largest_id: int
    profile: DatasetProfile

    def to_json(self) -> bytes:
        return orjson.dumps({"schema": SCHEMA, **asdict(self)}, option=orjson.OPT_INDENT_2)

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is something else.
        """
        try:
            fields = orjson.loads(text)
            if fields.pop("schema") != SCHEMA:
                msg = f"its schema is not {SCHEMA}"
                raise ValueError(msg)
            profile = fields.pop("profile")
            return cls(profile=DatasetProfile.from_json(profile), **fields)
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"{_META} lacks what is needed ({error})"
            raise ValueError(msg) from error


class Rows:
    """Stored rows; reading one touches only the pages of the files that it lies on."""

    def __init__(
        self,
        meta: RowsMeta,
        input_ids: NDArray[np.int32],
        trained: NDArray[np.bool_],
        offsets: NDArray[np.int64],
        index: NDArray[np.int64],
        packs: NDArray[np.int64],
    ) -> None:
        self.meta = meta
        self._input_ids = input_ids
        self._trained = trained
        self._offsets = offsets
        self._index = index
        self._packs = packs

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map the rows of a directory.

        Raises:
            InputMissingError: no complete rows of this schema are there.
        """
        try:
            meta = RowsMeta.from_json((directory / _META).read_bytes())
            names = (_IDS, _TRAINED, _OFFSETS, _INDEX, _PACKS)
            arrays = [_map(directory / name) for name in names]
            _check(*arrays)
        except (OSError, ValueError, EOFError) as error:
            msg = f"no complete tokenised rows are in {directory} ({error}): prepare the data again"
            raise InputMissingError(msg) from error
        return cls(meta, *arrays)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        ends = np.concatenate(([0], np.cumsum(np.diff(self._offsets)[self._index])))
        return np.diff(ends[self._packs])

    @property
    def packed(self) -> bool:
        """Whether a row may hold several sequences."""
        return self.meta.profile.packing

    def __len__(self) -> int:
        return len(self._packs) - 1

    def __getitem__(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        slices = self._slices(row)
        if len(slices) == 1:
            return self._input_ids[slices[0]], self._trained[slices[0]]
        ids, trained = (
            np.concatenate([array[part] for part in slices])
            for array in (self._input_ids, self._trained)
        )
        return ids, trained

    def position_ids(self, row: int) -> NDArray[np.int64]:
        """Return the position of each token in its sequence."""
        return np.concatenate([np.arange(part.stop - part.start) for part in self._slices(row)])

    def _slices(self, row: int) -> list[slice]:
        row = range(len(self))[row]
        sequences = self._index[self._packs[row] : self._packs[row + 1]]
        return [slice(int(self._offsets[s]), int(self._offsets[s + 1])) for s in sequences]


def _map(path: Path) -> NDArray[Any]:
    # As a plain array: slicing np.memmap itself costs several times as much.
    return np.asarray(np.load(path, mmap_mode="r"))


def _check(
    ids: NDArray[Any],
    trained: NDArray[Any],
    offsets: NDArray[Any],
    index: NDArray[Any],
    packs: NDArray[Any],
) -> None:
    kinds = [array.dtype.name for array in (ids, trained, offsets, index, packs)]
    if kinds != ["int32", "bool", "int64", "int64", "int64"]:
        msg = "an array has the wrong type"
        raise ValueError(msg)
    if not len(offsets) or not len(packs) or not len(ids) == len(trained) == offsets[-1]:
        msg = "its arrays do not belong together"
        raise ValueError(msg)
    if packs[-1] != len(index) or (len(index) and index.max() >= len(offsets) - 1):
        msg = "its index names sequences that are not there"
        raise ValueError(msg)


class RowsWriter:
    """Writes rows beside `directory`, and puts them in its place with `commit`.

    Used as a context manager: what is not committed is removed. Files are the user's alone.

    Raises:
        CannotWriteError: on entering, `append` and `commit`, when the files cannot be written,
            or `directory` holds something else than rows.
    """

    def __init__(self, directory: Path) -> None:
        # A link stays a link: what it points to is replaced.
        self._directory = directory.resolve()
        self._offsets = array("q", [0])

    def __enter__(self) -> Self:
        with _writing(self._directory):
            _refuse_foreign(self._directory)
            self._directory.parent.mkdir(parents=True, exist_ok=True)
            self._draft = _sibling(self._directory)
            self._ids = _FlatArray(self._draft / _IDS, np.dtype(np.int32))
            self._trained = _FlatArray(self._draft / _TRAINED, np.dtype(np.bool_))
            self._reported = _create(self._draft / REPORTED)
            self._quarantine = _create(self._draft / QUARANTINE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Closing writes what is buffered, which fails once more on a full disk.
        for file in (self._ids, self._trained, self._reported, self._quarantine):
            with suppress(OSError):
                file.close()
        shutil.rmtree(self._draft, ignore_errors=True)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence appended so far."""
        offsets = np.asarray(self._offsets, dtype=np.int64)
        return offsets[1:] - offsets[:-1]

    def append(self, input_ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> None:
        self.extend(input_ids, trained, np.asarray([len(input_ids)], dtype=np.int64))

    def extend(
        self, input_ids: NDArray[np.int32], trained: NDArray[np.bool_], lengths: NDArray[np.int64]
    ) -> None:
        """Append sequences that lie end to end."""
        assert len(input_ids) == len(trained) == lengths.sum()
        with _writing(self._directory):
            self._ids.append(input_ids)
            self._trained.append(trained)
        ends = self._offsets[-1] + np.cumsum(lengths, dtype=np.int64)
        self._offsets.frombytes(ends.tobytes())

    def report(self, record: dict[str, object], text: bytes | None) -> None:
        """Write down a line that is not used, and itself if `text` is given."""
        with _writing(self._directory):
            self._reported.write(orjson.dumps(record) + b"\n")
            if text is not None:
                self._quarantine.write(text + b"\n")

    def commit(
        self,
        meta: RowsMeta,
        index: NDArray[np.int64] | None = None,
        packs: NDArray[np.int64] | None = None,
    ) -> Rows:
        """Complete the files, put them in place of older rows, and open them.

        Without an index every sequence is taken once, without packs each is a row.
        """
        index = np.arange(len(self._offsets) - 1) if index is None else index
        packs = np.arange(len(index) + 1) if packs is None else packs
        with _writing(self._directory):
            self._ids.finish()
            self._trained.finish()
            for name, values in ((_OFFSETS, self._offsets), (_INDEX, index), (_PACKS, packs)):
                flat = _FlatArray(self._draft / name, np.dtype(np.int64))
                flat.append(np.asarray(values, dtype=np.int64))
                flat.finish()
            for file in (self._reported, self._quarantine):
                _flush(file)
            with _create(self._draft / _META) as file:
                file.write(meta.to_json())
                _flush(file)
            _put_in_place(self._draft, self._directory)
        return Rows.open(self._directory)


def share_rows(source: Path, directory: Path) -> None:
    """Make the rows of `source` appear in `directory`, too, without a second copy where possible.

    Raises:
        CannotWriteError: they cannot be written there.
    """
    directory = directory.resolve()
    with _writing(directory):
        _refuse_foreign(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = _sibling(directory)
        try:
            for name in _FILES:
                _link(source / name, draft / name)
            _put_in_place(draft, directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        # Another file system, or one without links.
        shutil.copy2(source, target)


class _FlatArray:
    """An npy file that grows; its header is written again once the length is known."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._file = _create(path)
        self._dtype = dtype
        self._length = 0
        self._write_header()

    def append(self, values: NDArray[Any]) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self._length += len(values)

    def finish(self) -> None:
        # numpy leaves room in the header for any length, so the data stays where it is.
        self._file.seek(0)
        self._write_header()
        _flush(self._file)
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _write_header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"tokenised rows cannot be written to {directory}: {error.strerror or error}"
        raise CannotWriteError(msg) from error


def _refuse_foreign(directory: Path) -> None:
    """Keep what others put into the directory: only rows are ever replaced."""
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    foreign = sorted(names - set(_FILES))
    if foreign:
        msg = f"{directory} holds other files ({foreign[0]}): name an empty or a new directory"
        raise CannotWriteError(msg)


def _sibling(directory: Path) -> Path:
    """Make a private directory on the same file system, so that a rename can take its place."""
    return Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))


def _put_in_place(draft: Path, directory: Path) -> None:
    if not directory.exists():
        draft.rename(directory)
        return
    # A directory that is not empty cannot be renamed over. Readers keep the files they mapped.
    aside = _sibling(directory)
    directory.rename(aside)
    draft.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)


def _create(path: Path) -> BinaryIO:
    return open(path, "xb", buffering=_BUFFER_BYTES, opener=_open_private)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())

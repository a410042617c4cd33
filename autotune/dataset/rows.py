"""Tokenised rows on disk: flat arrays, memory-mapped, so that opening them reads nothing.

A directory holds input_ids.npy (int32) and trained.npy (bool, true where a token is trained on),
each with all rows end to end; offsets.npy (int64, rows + 1), where row i is offsets[i] to
offsets[i + 1]; and meta.json. It appears complete or not at all.
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

SCHEMA = 1

_IDS, _TRAINED, _OFFSETS, _META = "input_ids.npy", "trained.npy", "offsets.npy", "meta.json"
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
            percentiles = tuple((int(q), int(length)) for q, length in profile.pop("percentiles"))
            return cls(profile=DatasetProfile(percentiles=percentiles, **profile), **fields)
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"{_META} lacks what is needed ({error})"
            raise ValueError(msg) from error


class Rows:
    """Stored rows; reading one touches only the pages of the file that it lies on."""

    def __init__(
        self,
        meta: RowsMeta,
        input_ids: NDArray[np.int32],
        trained: NDArray[np.bool_],
        offsets: NDArray[np.int64],
    ) -> None:
        self.meta = meta
        self._input_ids = input_ids
        self._trained = trained
        self._offsets = offsets

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map the rows of a directory.

        Raises:
            InputMissingError: no complete rows of this schema are there.
        """
        try:
            meta = RowsMeta.from_json((directory / _META).read_bytes())
            arrays = [_map(directory / name) for name in (_IDS, _TRAINED, _OFFSETS)]
            _check(*arrays)
        except (OSError, ValueError, EOFError) as error:
            msg = f"no complete tokenised rows are in {directory} ({error}): prepare the data again"
            raise InputMissingError(msg) from error
        return cls(meta, *arrays)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return self._offsets[1:] - self._offsets[:-1]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        index = range(len(self))[index]
        row = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
        return self._input_ids[row], self._trained[row]


def _map(path: Path) -> NDArray[Any]:
    # As a plain array: slicing np.memmap itself costs several times as much.
    return np.asarray(np.load(path, mmap_mode="r"))


def _check(ids: NDArray[Any], trained: NDArray[Any], offsets: NDArray[Any]) -> None:
    kinds = (ids.dtype, trained.dtype, offsets.dtype)
    if kinds != (np.dtype(np.int32), np.dtype(np.bool_), np.dtype(np.int64)):
        msg = "an array has the wrong type"
        raise ValueError(msg)
    if not len(offsets) or not len(ids) == len(trained) == offsets[-1]:
        msg = "its arrays do not belong together"
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
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Closing writes what is buffered, which fails once more on a full disk.
        for flat in (self._ids, self._trained):
            with suppress(OSError):
                flat.close()
        shutil.rmtree(self._draft, ignore_errors=True)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row appended so far."""
        offsets = np.asarray(self._offsets, dtype=np.int64)
        return offsets[1:] - offsets[:-1]

    def append(self, input_ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> None:
        assert len(input_ids) == len(trained)
        with _writing(self._directory):
            self._ids.append(input_ids)
            self._trained.append(trained)
        self._offsets.append(self._offsets[-1] + len(input_ids))

    def commit(self, meta: RowsMeta) -> Rows:
        """Complete the files, put them in place of older rows, and open them."""
        with _writing(self._directory):
            self._ids.finish()
            self._trained.finish()
            offsets = _FlatArray(self._draft / _OFFSETS, np.dtype(np.int64))
            offsets.append(np.asarray(self._offsets, dtype=np.int64))
            offsets.finish()
            with _create(self._draft / _META) as file:
                file.write(meta.to_json())
                _flush(file)
            _put_in_place(self._draft, self._directory)
        return Rows.open(self._directory)


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
    foreign = sorted(names - {_IDS, _TRAINED, _OFFSETS, _META})
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

"""From a file of conversations to tokenised, memory-mapped rows and their figures."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autotune.dataset import tokenize
from autotune.dataset.conversation import CONVENTIONS, recognise
from autotune.dataset.lines import content_hash, located, read_rows
from autotune.dataset.rows import SCHEMA, Rows, RowsMeta, RowsWriter
from autotune.errors import ConfigError, DatasetError, InputMissingError
from autotune.workload import DatasetProfile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Rows", "content_hash", "prepare"]

_PERCENTILES = (5, 25, 50, 75, 90, 95, 99)

_log = logging.getLogger(__name__)


def prepare(
    path: Path,
    *,
    model_dir: Path,
    max_seq_length: int,
    output: Path,
    trust_remote_code: bool,
    vocab_size: int,
) -> DatasetProfile:
    """Tokenise a dataset into `output`, unless the same rows are there already.

    Rows longer than `max_seq_length` tokens lose their end. Rows without a trained token, before
    or after that, are left out and counted; only rows that are used count as truncated.

    Raises:
        InputMissingError: the file, the tokenizer or its chat template is not there.
        DatasetError: a row cannot be used, or none has anything to train on.
        ConfigError: the tokenizer has ids that the model has no embedding for.
        CannotWriteError: `output` cannot be written.
    """
    key = _content_key(path, model_dir, max_seq_length)
    stored = _find_stored(output, key)
    if stored is not None:
        _log.info("reusing the tokenised rows in %s", output)
        _require_embedding(stored, vocab_size, model_dir)
        return replace(stored.profile, path=str(path))
    tokenizer = tokenize.load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    with RowsWriter(output) as writer:
        counts = _write_rows(path, tokenizer, max_seq_length, writer)
        _require_trained(path, counts, max_seq_length)
        profile = _profile(path, counts, writer.lengths)
        meta = RowsMeta(content_key=key, largest_id=counts.largest_id, profile=profile)
        _require_embedding(meta, vocab_size, model_dir)
        writer.commit(meta)
    return profile


def _content_key(path: Path, model_dir: Path, max_seq_length: int) -> str:
    parts = (SCHEMA, max_seq_length, content_hash(path), tokenize.tokenizer_hash(model_dir))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _find_stored(output: Path, key: str) -> RowsMeta | None:
    try:
        meta = Rows.open(output).meta
    except InputMissingError:
        return None
    return meta if meta.content_key == key else None


@dataclass(slots=True)
class _Counts:
    format: str
    rows: int = 0
    rows_truncated: int = 0
    rows_without_trained_tokens: int = 0
    tokens_lost: int = 0
    trained_tokens: int = 0
    largest_id: int = 0


def _write_rows(
    path: Path, tokenizer: "PreTrainedTokenizerBase", limit: int, writer: RowsWriter
) -> _Counts:
    counts = _Counts(format=_convention_of(path))
    for ids, trained in _token_rows(path, counts.format, tokenizer):
        counts.rows += 1
        if not trained[:limit].any():
            counts.rows_without_trained_tokens += 1
            continue
        counts.rows_truncated += len(ids) > limit
        counts.tokens_lost += len(ids[limit:])
        counts.trained_tokens += int(trained[:limit].sum())
        counts.largest_id = max(counts.largest_id, int(ids[:limit].max()))
        writer.append(ids[:limit], trained[:limit])
    return counts


def _convention_of(path: Path) -> str:
    """Recognise the convention of a file by its first row; the others must follow it."""
    number, row = next(read_rows(path))
    with located(path, number):
        return recognise(row)


def _token_rows(
    path: Path, convention: str, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tokenize.TokenRow]:
    parse = CONVENTIONS[convention]
    for number, row in read_rows(path):
        with located(path, number):
            token_row = tokenize.tokenize(parse(row), tokenizer)
        yield token_row


def _require_trained(path: Path, counts: _Counts, limit: int) -> None:
    if counts.rows_without_trained_tokens == counts.rows:
        msg = (
            f"none of the {counts.rows} rows of {path} has a token to train on within the first"
            f" {limit} tokens: raise the sequence limit, or switch training on for some turn"
        )
        raise DatasetError(msg)


def _require_embedding(meta: RowsMeta, vocab_size: int, model_dir: Path) -> None:
    if meta.largest_id >= vocab_size:
        msg = (
            f"the tokenizer in {model_dir} gives the token id {meta.largest_id}, and the model has"
            f" embeddings for 0 to {vocab_size - 1}: use the tokenizer that belongs to the model"
        )
        raise ConfigError(msg)


def _profile(path: Path, counts: _Counts, lengths: NDArray[np.int64]) -> DatasetProfile:
    percentiles = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    return DatasetProfile(
        path=str(path),
        format=counts.format,
        rows=counts.rows,
        rows_used=len(lengths),
        rows_truncated=counts.rows_truncated,
        rows_without_trained_tokens=counts.rows_without_trained_tokens,
        tokens=int(lengths.sum()),
        tokens_lost=counts.tokens_lost,
        trained_tokens=counts.trained_tokens,
        min_length=int(lengths.min()),
        mean_length=float(lengths.mean()),
        max_length=int(lengths.max()),
        percentiles=tuple(zip(_PERCENTILES, map(int, percentiles), strict=True)),
    )

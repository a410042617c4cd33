"""Prepares the data: recognises, tokenises, counts, writes, and reuses what is there already."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autotune.dataset.conventions import CONVENTIONS, Convention, SampleError, mapped, recognise
from autotune.dataset.figures import make_profile
from autotune.dataset.lines import Block, Line, RowError, content_hash, parse_row, read_blocks
from autotune.dataset.making import Example, Made, Recipe, Reported, RowMaker
from autotune.dataset.packing import pack
from autotune.dataset.rows import SCHEMA, Rows, RowsMeta, RowsWriter, share_rows
from autotune.dataset.sources import Rules, Source
from autotune.dataset.tokenizer import tokenizer_hash
from autotune.dataset.workers import makers
from autotune.errors import ConfigError, DatasetError, InputMissingError, UsageError
from autotune.events import IN_VIEW
from autotune.workload import DatasetProfile

_SAMPLE_ROWS = 200
_LOG_EVERY_S = 10.0
_MAX_FORMATS_SHOWN = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far tokenising has come; of compressed files it is the compressed bytes that count."""

    rows: int
    bytes_done: int
    bytes_total: int
    seconds: float

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate what is left, in seconds."""
        if not 0 < self.bytes_done <= self.bytes_total:
            return None
        return self.seconds * (self.bytes_total / self.bytes_done - 1)


Watch = Callable[[Progress], None]


def prepare(  # noqa: PLR0913 - the one entry, by keyword
    data: Path | Sequence[Source],
    *,
    model_dir: Path,
    max_seq_length: int,
    output: Path,
    trust_remote_code: bool,
    vocab_size: int,
    rules: Rules | None = None,
    cache: Path | None = None,
    watch: Watch | None = None,
) -> DatasetProfile:
    """Tokenise files of rows into `output`, unless the same rows are there or in `cache` already.

    Every row is used or reported: what is left out is counted, and written down with its line,
    byte and reason. `watch` is told how far it has come.

    Raises:
        InputMissingError: a file, the tokenizer or its chat template is not there.
        DatasetError: a row cannot be used, or none has anything to train on.
        ConfigError: the tokenizer has ids that the model has no embedding for.
        CannotWriteError: `output` cannot be written.
        SetupFaultError: a process that tokenises died.
    """
    rules = rules or Rules()
    sources = [Source(data)] if isinstance(data, Path) else list(data)
    key = _content_key(sources, model_dir, max_seq_length, rules)
    stored = _find_stored(output, key, cache)
    if stored is not None:
        _require_embedding(stored, vocab_size, model_dir)
        return replace(stored.profile, path=_name_of(sources))
    recipes = [
        _recipe(source, rules, model_dir, max_seq_length, trust=trust_remote_code)
        for source in sources
    ]
    with RowsWriter(output) as writer:
        tally = Tally()
        clock = _Clock(sources, watch or log_progress)
        for source, recipe in zip(sources, recipes, strict=True):
            _write_source(source, recipe, rules, writer, tally, clock)
        tally.require_rows(sources, max_seq_length)
        index = np.concatenate(tally.indices)
        lengths = writer.lengths[index]
        profile = make_profile(_name_of(sources), tally, lengths, rules, max_seq_length)
        meta = RowsMeta(content_key=key, largest_id=tally.largest_id, profile=profile)
        _require_embedding(meta, vocab_size, model_dir)
        order, packs = pack(lengths, max_seq_length) if rules.packing else (None, None)
        writer.commit(meta, index if order is None else index[order], packs)
    if cache is not None and not (cache / key).exists():
        share_rows(output, cache / key)
    return profile


def first_examples(
    source: Source, count: int, *, model_dir: Path, max_seq_length: int, trust: bool, rules: Rules
) -> tuple[list[Example], Callable[[list[int]], str]]:
    """Return the first sequences of a file with their messages, and what decodes their tokens.

    Raises:
        InputMissingError: the file, the tokenizer or its chat template is not there.
        DatasetError: the file follows no convention.
    """
    maker = RowMaker(_recipe(source, rules, model_dir, max_seq_length, trust=trust))
    made = (example for line in _lines(source.path) for example in maker.examples(line))
    return list(islice(made, count)), maker.codec.decode


def _name_of(sources: Sequence[Source]) -> str:
    return ", ".join(
        str(source.path) if source.weight == 1 else f"{source.path}@{source.weight:g}"
        for source in sources
    )


def _content_key(sources: list[Source], model_dir: Path, limit: int, rules: Rules) -> str:
    files = [(content_hash(source.path), source.weight) for source in sources]
    parts = (SCHEMA, limit, files, tokenizer_hash(model_dir), repr(rules))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _find_stored(output: Path, key: str, cache: Path | None) -> RowsMeta | None:
    for directory in (output, *([cache / key] if cache else [])):
        try:
            meta = Rows.open(directory).meta
        except InputMissingError:
            continue
        if meta.content_key == key:
            _log.info("reusing the tokenised rows in %s", directory)
            if directory != output:
                share_rows(directory, output)
            return meta
    return None


def _recipe(source: Source, rules: Rules, model_dir: Path, limit: int, *, trust: bool) -> Recipe:
    convention = find_convention(source.path, rules)
    return Recipe(
        model_dir=model_dir,
        trust_remote_code=trust,
        convention=convention.name,
        mapping=rules.mapping,
        explicit=bool(rules.format or rules.mapping),
        limit=limit,
        overlong=rules.overlong,
        train_on_prompt=rules.train_on_prompt,
    )


def find_convention(path: Path, rules: Rules) -> Convention:
    """Return the convention that a file is read by: the one that was named, or that it follows.

    Raises:
        UsageError: the keys that were named make no rows.
        InputMissingError: the file is not there.
        DatasetError: it holds no rows, or follows no convention.
    """
    if rules.mapping:
        try:
            return mapped(dict(rules.mapping))
        except ValueError as error:
            msg = f"--map: {error}"
            raise UsageError(msg) from None
    if rules.format:
        # The file is opened all the same, so that a missing one is told before anything else.
        next(_lines(path))
        return CONVENTIONS[rules.format]
    return _recognise(path)


def _recognise(path: Path) -> Convention:
    sample, numbers, fault = [], [], None
    for line in _lines(path):
        try:
            sample.append(parse_row(line.text))
            numbers.append(line)
        except RowError as error:
            fault = fault or (line, error)
        if len(sample) == _SAMPLE_ROWS:
            break
    if not sample:
        assert fault is not None, "a file has a line"
        raise _refusal(path, fault[0], str(fault[1])) from fault[1]
    try:
        return recognise(sample)
    except SampleError as error:
        raise _refusal(path, numbers[error.row], str(error)) from error


def _lines(path: Path) -> Iterator[Line]:
    empty = True
    for block in read_blocks(path):
        for line in block:
            empty = False
            yield line
    if empty:
        msg = f"{path} holds no rows: one JSON object a line is needed"
        raise DatasetError(msg)


def _refusal(path: Path, line: Line, reason: str) -> DatasetError:
    return DatasetError(f"{path}, line {line.number} (byte {line.offset}): {reason}")


@dataclass(slots=True)
class Tally:
    """What has been counted over all files."""

    formats: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    full_lengths: list[NDArray[np.int64]] = field(default_factory=list)
    indices: list[NDArray[np.int64]] = field(default_factory=list)
    trained_of: list[NDArray[np.int64]] = field(default_factory=list)
    first_bad: str = ""
    largest_id: int = 0
    sequences: int = 0
    rows_used: int = 0
    rows_unweighted: int = 0

    def add(self, made: Made) -> None:
        self.counts.update(made.counts)
        self.unread.update(made.unread)
        self.kinds.update(report.kind for report in made.reported)
        self.full_lengths.append(made.full_lengths)
        if len(made.input_ids):
            self.largest_id = max(self.largest_id, int(made.input_ids.max()))
            starts = np.concatenate(([0], np.cumsum(made.lengths)[:-1]))
            self.trained_of.append(np.add.reduceat(made.trained.astype(np.int64), starts))

    def weigh(self, sizes: NDArray[np.int64], weight: float) -> None:
        """Take the rows of a file, each of some sequences, as often as its weight says."""
        steps = np.floor(np.arange(len(sizes) + 1) * weight + 1e-9).astype(np.int64)
        copies = np.diff(steps)
        own = np.arange(int(sizes.sum())) + self.sequences
        self.indices.append(np.repeat(own, np.repeat(copies, sizes)))
        self.sequences += len(own)
        self.rows_used += int((copies > 0).sum())
        self.rows_unweighted += int((copies == 0).sum())

    def require_rows(self, sources: Sequence[Source], limit: int) -> None:
        if any(len(index) for index in self.indices):
            return
        name, rows = _name_of(sources), self.counts["rows"]
        if self.kinds["bad"] or not rows:
            msg = f"none of the {rows} rows of {name} can be used; the first: {self.first_bad}"
        else:
            msg = (
                f"none of the {rows} rows of {name} has a token to train on within the first"
                f" {limit} tokens: raise the sequence limit, or take a larger weight"
            )
        raise DatasetError(msg)


class _Clock:
    """Tells how far tokenising has come."""

    def __init__(self, sources: Sequence[Source], watch: Watch) -> None:
        self._watch = watch
        self._started = time.monotonic()
        self._total = sum(source.path.stat().st_size for source in sources)
        self._before = 0
        self._done = 0

    def blocks(self, path: Path) -> Iterator[Block]:
        for block in read_blocks(path):
            self._done = self._before + block.read_bytes
            yield block
        self._before += path.stat().st_size

    def tell(self, rows: int) -> None:
        seconds = time.monotonic() - self._started
        self._watch(Progress(rows, self._done, self._total, seconds))


class _ProgressLog:
    """Logs a line now and then."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        if progress.seconds < self._last + _LOG_EVERY_S:
            # A new run starts its clock anew.
            self._last = min(self._last, progress.seconds)
            return
        self._last = progress.seconds
        left = progress.seconds_left
        _log.info(
            "tokenised %d rows, %.0f rows/s%s",
            progress.rows,
            progress.rows_per_s,
            "" if left is None else f", {left:.0f} s left",
            extra=IN_VIEW,
        )


log_progress = _ProgressLog()


def _write_source(
    source: Source,
    recipe: Recipe,
    rules: Rules,
    writer: RowsWriter,
    tally: Tally,
    clock: _Clock,
) -> None:
    tally.formats.append(recipe.convention)
    sizes = [np.empty(0, dtype=np.int64)]
    with makers(recipe, source.path.stat().st_size) as make:
        for made in make(clock.blocks(source.path)):
            for report in made.reported:
                _report(source, report, rules, writer, tally)
            writer.extend(made.input_ids, made.trained, made.lengths)
            tally.add(made)
            sizes.append(made.sizes)
            clock.tell(tally.counts["rows"])
    tally.weigh(np.concatenate(sizes), source.weight)
    bad, rows = tally.kinds["bad"], tally.counts["rows"]
    if not rules.max_bad_lines.allows(bad, rows):
        msg = (
            f"{bad} of {rows} lines are bad, more than --max-bad-lines allows; the first:"
            f" {tally.first_bad}"
        )
        raise DatasetError(msg)


def _report(
    source: Source, report: Reported, rules: Rules, writer: RowsWriter, tally: Tally
) -> None:
    refusal = _refusal(source.path, report.line, report.reason)
    if report.kind == "bad":
        if rules.on_bad_line == "fail":
            raise refusal
        tally.first_bad = tally.first_bad or str(refusal)
    if report.kind == "overlong" and rules.overlong == "refuse":
        msg = f"{refusal}: raise --max-seq-length, or choose --overlong truncate or drop"
        raise DatasetError(msg)
    record: dict[str, object] = {
        "file": str(source.path),
        "line": report.line.number,
        "byte": report.line.offset,
        "kind": report.kind,
        "reason": report.reason,
    }
    quarantined = rules.on_bad_line == "quarantine" and report.kind == "bad"
    writer.report(record, report.line.text if quarantined else None)


def _require_embedding(meta: RowsMeta, vocab_size: int, model_dir: Path) -> None:
    if meta.largest_id >= vocab_size and "tokens" in meta.profile.format.split("+"):
        msg = (
            f"the data has the token id {meta.largest_id}, and the model has embeddings for 0 to"
            f" {vocab_size - 1}: tokenise it with the tokenizer that belongs to the model"
        )
        raise DatasetError(msg)
    if meta.largest_id >= vocab_size:
        msg = (
            f"the tokenizer in {model_dir} gives the token id {meta.largest_id}, and the model has"
            f" embeddings for 0 to {vocab_size - 1}: use the tokenizer that belongs to the model"
        )
        raise ConfigError(msg)

"""The figures of prepared data, and what a user should know of it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autotune.dataset.sources import Rules
from autotune.workload import DatasetProfile

if TYPE_CHECKING:
    from autotune.dataset.preparing import Tally

_PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
_COMMON_LIMITS = tuple(2**power for power in range(9, 18))
_MAX_KEYS_SHOWN = 8
_ENDLESS_SHARE = 0.5

Ints = NDArray[np.int64]


def make_profile(
    path: str, tally: "Tally", lengths: Ints, rules: Rules, limit: int
) -> DatasetProfile:
    """Return the figures of an epoch whose sequences have these lengths."""
    percentiles = np.percentile(lengths, _PERCENTILES, method="inverted_cdf")
    trained = np.concatenate(tally.trained_of)[np.concatenate(tally.indices)]
    return DatasetProfile(
        path=path,
        format="+".join(dict.fromkeys(tally.formats)),
        rows=tally.counts["rows"],
        rows_used=tally.rows_used,
        rows_reported=sum(tally.kinds.values()) + tally.rows_unweighted,
        rows_bad=tally.kinds["bad"],
        rows_overlong=tally.kinds["overlong"],
        rows_truncated=tally.counts["rows_truncated"],
        rows_without_trained_tokens=tally.kinds["untrained"],
        sequences=len(lengths),
        tokens=int(lengths.sum()),
        tokens_lost=tally.counts["tokens_lost"],
        trained_tokens=int(trained.sum()),
        min_length=int(lengths.min()),
        mean_length=float(lengths.mean()),
        max_length=int(lengths.max()),
        percentiles=tuple(zip(_PERCENTILES, map(int, percentiles), strict=True)),
        coverage=_coverage(np.concatenate(tally.full_lengths)),
        histogram=_histogram(lengths),
        packing=rules.packing,
        warnings=tuple(_warnings(tally, lengths, rules, limit)),
    )


def _coverage(full_lengths: Ints) -> tuple[tuple[int, float], ...]:
    """Return the share that common limits cover, up to the first that covers all."""
    shares: list[tuple[int, float]] = []
    for limit in _COMMON_LIMITS:
        shares.append((limit, float((full_lengths <= limit).mean())))
        if shares[-1][1] == 1:
            break
    return tuple(shares)


def _histogram(lengths: Ints) -> tuple[tuple[int, int], ...]:
    powers = np.ceil(np.log2(lengths)).astype(np.int64)
    return tuple(
        (2**power, int((powers == power).sum()))
        for power in range(int(powers.min()), int(powers.max()) + 1)
    )


def _warnings(tally: "Tally", lengths: Ints, rules: Rules, limit: int) -> Iterator[str]:
    counts, kinds = tally.counts, tally.kinds
    if kinds["bad"]:
        kept = ", and kept in quarantine.jsonl" if rules.on_bad_line == "quarantine" else ""
        yield f"{kinds['bad']} bad lines are left out{kept}; the first: {tally.first_bad}"
    if counts["rows_truncated"] or kinds["untrained"]:
        rows = counts["rows_truncated"] + kinds["untrained"]
        yield (
            f"{rows} rows are longer than {limit} tokens and lose {counts['tokens_lost']} tokens;"
            f" {kinds['untrained']} of them have nothing left to train on"
        )
    if kinds["overlong"]:
        yield (
            f"{kinds['overlong']} rows are longer than {limit} tokens and are left out with their"
            f" {counts['tokens_lost']} tokens"
        )
    if tally.rows_unweighted:
        yield f"{tally.rows_unweighted} rows are left out by the weights of their files"
    if tally.unread:
        keys = ", ".join(f'"{key}"' for key, _ in tally.unread.most_common(_MAX_KEYS_SHOWN))
        yield f"keys that mean nothing in this form are not read: {keys}"
    yield from _notes(tally)
    if counts["endless"] > _ENDLESS_SHARE * len(lengths):
        yield (
            "answers end without a token that ends a turn, so the model will not learn to stop:"
            " look at the chat template"
        )


_NOTES = {
    "system_folded": "{} system messages go in front of the first user turn, as the chat template"
    " has no place for them",
    "split": "{} conversations are trained in several sequences, as the chat template rewrites"
    " earlier answers once more turns follow",
    "calls_as_text": "{} rows have tool calls that the chat template does not write, and that are"
    " written as JSON",
    "tools_left_out": "{} rows have tools that the chat template does not write",
    "thoughts_left_out": "{} rows have thoughts (reasoning_content) that the chat template does"
    " not write",
    "ended": "{} texts end with the end-of-text token of the tokenizer, as the chat template does"
    " not write where an answer ends",
    "without_template": "{} prompts and answers are joined as they are, as the tokenizer has no"
    " chat template",
}


def _notes(tally: "Tally") -> Iterator[str]:
    for name, sentence in _NOTES.items():
        if tally.counts[name]:
            yield sentence.format(tally.counts[name])

"""What the user says of the data: files with weights, and rules for their rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autotune.dataset.making import Overlong
from autotune.errors import UsageError

OnBadLine = Literal["fail", "skip", "quarantine"]

_FREE_BAD_LINES = 100
_FREE_BAD_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Source:
    """A file, and how many times an epoch goes through its rows.

    With a weight of 2 each row is taken twice, with 0.5 every second one.
    """

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read PATH or PATH@WEIGHT; a file whose own name has the @ goes first.

        Raises:
            UsageError: the weight is no number above zero.
        """
        name, at, number = text.rpartition("@")
        if not at or not name or Path(text).exists():
            return cls(Path(text))
        try:
            weight = float(number)
        except ValueError:
            return cls(Path(text))
        if not 0 < weight < math.inf:
            msg = f"--dataset {text}: the weight {number} is no number above zero"
            raise UsageError(msg)
        return cls(Path(name), weight)

    def absolute(self) -> str:
        """Return what `parse` reads as the same file, from whatever directory."""
        return f"{self.path.absolute()}@{self.weight}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLineCap:
    """How many lines may be bad before the file is refused: a number, or a share of the rows.

    Without either it is 1 % of the rows, but at least 100 lines.
    """

    lines: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> "BadLineCap":
        """Read N or X%.

        Raises:
            ValueError: it is neither.
        """
        number = text.strip()
        try:
            if number.endswith("%"):
                cap = cls(share=float(number[:-1]) / 100)
            else:
                cap = cls(lines=int(number))
        except ValueError:
            msg = f"{text!r} is neither a number of lines nor a share like 2%"
            raise ValueError(msg) from None
        if (cap.lines or 0) < 0 or not 0 <= (cap.share or 0) <= 1:
            msg = f"{text!r} is out of range: a number of lines from 0, or 0% to 100%, is needed"
            raise ValueError(msg)
        return cap

    def allows(self, bad: int, rows: int) -> bool:
        if self.lines is not None:
            return bad <= self.lines
        if self.share is not None:
            return bad <= self.share * rows
        return bad <= max(_FREE_BAD_LINES, _FREE_BAD_SHARE * rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How rows are read; `format` and `mapping` name their convention, else it is recognised."""

    format: str | None = None
    mapping: tuple[tuple[str, str], ...] = ()
    overlong: Overlong = "truncate"
    on_bad_line: OnBadLine = "fail"
    max_bad_lines: BadLineCap = BadLineCap()
    train_on_prompt: bool = False
    packing: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> "Rules":
        """Take the rules from the values of the options that have their names."""
        cap = options["max_bad_lines"]
        return cls(
            format=options["format"],  # type: ignore[arg-type] # the table of options checks it
            mapping=tuple(parse_mapping(options["map"])),
            overlong=options["overlong"],  # type: ignore[arg-type]
            on_bad_line=options["on_bad_line"],  # type: ignore[arg-type]
            max_bad_lines=BadLineCap.parse(str(cap)) if cap is not None else BadLineCap(),
            train_on_prompt=bool(options["train_on_prompt"]),
            packing=bool(options["packing"]),
        )


def parse_mapping(entries: object) -> list[tuple[str, str]]:
    """Read "role=key" entries.

    Raises:
        UsageError: an entry is none, or names a role twice.
    """
    pairs: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, (list, tuple)) else []:
        role, equals, key = str(entry).partition("=")
        if not equals or not role or not key or role in dict(pairs):
            msg = f"--map {entry}: role=key is needed, each role once, for instance user=question"
            raise UsageError(msg)
        pairs.append((role, key))
    return pairs

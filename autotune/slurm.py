"""What Slurm writes and reads, without its client programs: lists of nodes."""

import itertools
import re

_MOST_HOSTS = 2**16
"""What Slurm takes in one range, and what no list of nodes exceeds by mistake."""

_TOKEN = re.compile(r"(?:[^\s,\[\]]|\[[^\[\]]*\])+")
_SEPARATORS = re.compile(r"[\s,]*")
_RANGES = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")


def expand_nodelist(nodelist: str) -> tuple[str, ...]:
    """Return the names in a list of nodes, in the order of `scontrol show hostnames`.

    Names are separated by commas or blanks. A name may have ranges in brackets, `n[1-3,7]` or
    `rack[0-1]node[08-11]`: numbers are as wide as the first of their range is written, and a name
    that is listed twice is there twice. What follows the last bracket belongs to the name.

    Raises:
        ValueError: the text is no list of nodes, or names more than 65536.
    """
    names: list[str] = []
    place = _after_separators(nodelist, 0)
    while place < len(nodelist):
        token = _TOKEN.match(nodelist, place)
        if token is None:
            msg = f"{nodelist!r} is no list of nodes: a bracket in it has no partner"
            raise ValueError(msg)
        names += _names(token[0], _MOST_HOSTS - len(names))
        place = _after_separators(nodelist, token.end())
    if not names:
        msg = f"{nodelist!r} is no list of nodes: it names none"
        raise ValueError(msg)
    return tuple(names)


def _after_separators(text: str, place: int) -> int:
    blank = _SEPARATORS.match(text, place)
    assert blank is not None, "the pattern matches nothing at all as well"
    return blank.end()


def _names(token: str, most: int) -> list[str]:
    """Return the names of one entry.

    Of several ranges the last runs fastest, and each of the others is around those before it.
    """
    texts = _RANGES.split(token)
    plain, listed = texts[::2], [_ranges(text, token) for text in texts[1::2]]
    count = 1
    for ranges in listed:
        count *= sum(len(numbers) for numbers, _ in ranges)
    if count > most:
        msg = f"{token!r} names more than {_MOST_HOSTS} nodes"
        raise ValueError(msg)
    numbers = [[f"{n:0{width}}" for span, width in ranges for n in span] for ranges in listed]
    outermost_first = [*numbers[-2::-1], *numbers[-1:]]
    names = []
    for chosen in itertools.product(*outermost_first):
        in_place = [*chosen[-2::-1], *chosen[-1:]]
        names.append(
            "".join(itertools.chain(*itertools.zip_longest(plain, in_place, fillvalue="")))
        )
    return names


def _ranges(text: str, token: str) -> list[tuple[range, int]]:
    """Return the numbers of a bracket, each range with the width that it is written in."""
    found = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("", "")
        if not match or int(first) > int(last):
            msg = f"{token!r} is no entry of a list of nodes: {part!r} is no range of numbers"
            raise ValueError(msg)
        found.append((range(int(first), int(last) + 1), len(first)))
    return found


_NO_LIMIT = ("unlimited", "infinite")
_PART_OF_TIME = re.compile(r"[0-9]{1,9}")
_FORMS = "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES[:SECONDS]]"


def read_time_limit(text: str) -> int | None:
    """Return the seconds of a time limit as `sbatch --time` takes it; None of one that is none.

    Raises:
        ValueError: it has none of Slurm's forms, or is zero.
    """
    if text.lower() in _NO_LIMIT:
        return None
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    most = 3
    if not all(map(_PART_OF_TIME.fullmatch, [*parts, days or "0"])) or len(parts) > most:
        raise ValueError(_no_time_limit(text))
    numbers = list(map(int, parts))
    if dash:
        hours, minutes, seconds = [*numbers, 0, 0][:most]
    elif len(numbers) == most:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = [0, *numbers, 0][:most]
    limit_s = 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
    if not limit_s or (dash and not days):
        raise ValueError(_no_time_limit(text))
    return limit_s


def _no_time_limit(text: str) -> str:
    return f"{text!r} is no time limit: write {_FORMS}, or unlimited"

"""Write data.jsonl: conversations about Python's standard library, from its documentation strings.

The choice of rows goes by digests of their text, never by a random generator or by the order of a
set, so the same documentation strings always give the same bytes.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

# Documentation strings change even between patch releases; this one wrote the committed file.
PYTHON_VERSION = "3.11.7"

# Modules that every build of Python has and whose documentation strings rarely change.
MODULES = (
    "argparse", "bisect", "builtins", "calendar", "codecs", "collections", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "difflib", "dis", "doctest",
    "fileinput", "fnmatch", "fractions", "functools", "gc", "glob", "gzip", "heapq", "inspect",
    "io", "itertools", "json", "linecache", "locale", "logging", "math", "mimetypes", "operator",
    "pathlib", "pickle", "pkgutil", "pprint", "queue", "random", "re", "sched", "secrets",
    "shelve", "shlex", "smtplib", "socketserver", "statistics", "string", "struct", "subprocess",
    "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "trace", "traceback",
    "uuid", "warnings", "weakref",
)  # fmt: skip

# Pieces (words, punctuation marks, line ends) of all answers of a row: keeps it below 900 tokens.
ROW_PIECES = 720

SYSTEM_TEXTS = (
    "You explain Python's standard library.",
    "You answer from the documentation strings of Python's standard library, in their words.",
    "You are a patient teacher of Python. Say what is documented and nothing else.",
)
FOLLOW_UPS = ("And `{}`?", "What about `{}`?", "Now tell me about `{}`.")

# A paragraph that ends with a colon needs the next one.
PARAGRAPH_END = r"(?<!:)\n\n"
SENTENCE_END = r"(?<=[.!?])\s+(?=[A-Z])"

Turn = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Something documented: `name` is qualified, `kind` is module, function, class or method."""

    kind: str
    name: str
    text: str
    signature: str | None = None


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def choose(options: Sequence[str], text: str) -> str:
    return options[digest(text) % len(options)]


def count_pieces(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]|\n", text))


def read_doc(thing: object) -> str:
    doc = thing.__doc__
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def read_signature(thing: Callable[..., object]) -> str | None:
    try:
        text = str(inspect.signature(thing))
    except (ValueError, TypeError):  # what is written in C need not have one
        return None
    # A default shown as <object at 0x...> or as a set differs from process to process.
    return None if re.search(r"[<{]", text) else text


def public_callables(owner: object, prefix: str) -> Iterator[tuple[str, Callable[..., object]]]:
    for name in sorted(name for name in vars(owner) if not name.startswith("_")):
        thing = getattr(owner, name)
        is_alias = getattr(thing, "__name__", None) != name
        if callable(thing) and read_doc(thing) and not is_alias:
            yield f"{prefix}.{name}", thing


def make_entry(kind: str, name: str, thing: Callable[..., object]) -> Entry:
    return Entry(
        kind=kind,
        name=name.removeprefix("builtins."),
        text=read_doc(thing),
        signature=read_signature(thing),
    )


def module_entries(module_name: str) -> Iterator[Entry]:
    """Yield what the module itself defines, in order of name; a class before its methods."""
    module = importlib.import_module(module_name)
    for name, thing in public_callables(module, module_name):
        if getattr(thing, "__module__", None) != module_name:
            continue
        if not inspect.isclass(thing):
            yield make_entry("function", name, thing)
            continue
        yield make_entry("class", name, thing)
        for method_name, method in public_callables(thing, name):
            yield make_entry("method", method_name, method)


def shorten(text: str, pieces: int) -> str:
    """Cut at the end of a paragraph, or of a sentence where the first paragraph is too long."""
    for boundary in (PARAGRAPH_END, SENTENCE_END):
        ends = [match.start() for match in re.finditer(boundary, text)] + [len(text)]
        fitting = [end for end in ends if count_pieces(text[:end]) <= pieces]
        if fitting:
            return text[: fitting[-1]].rstrip()
    return ""


def first_sentence(text: str) -> str:
    return re.split(rf"{PARAGRAPH_END}|{SENTENCE_END}", text)[0]


def sentences_about_errors(text: str) -> str:
    sentences = re.split(rf"{PARAGRAPH_END}|{SENTENCE_END}", text)
    return " ".join(one for one in sentences if re.search(r"\b[Rr]aise[sd]?\b", one))


def describe(entry: Entry, pieces: int = ROW_PIECES) -> Turn:
    questions = (
        f"What does the {entry.kind} `{entry.name}` do?",
        f"What is `{entry.name}` for?",
        f"Please explain the {entry.kind} `{entry.name}`.",
        f"How is `{entry.name}` documented?",
    )
    return choose(questions, entry.name), shorten(entry.text, pieces)


def summarise(entry: Entry) -> Turn:
    sentence = first_sentence(entry.text)
    answer = sentence if sentence.endswith(".") and sentence != entry.text else ""
    return f"Describe `{entry.name}` in one sentence.", answer


def show_signature(entry: Entry) -> Turn:
    answer = f"`{entry.name}{entry.signature}`" if entry.signature else ""
    return f"What is the signature of `{entry.name}`?", answer


def name_errors(entry: Entry) -> Turn:
    answer = shorten(sentences_about_errors(entry.text), ROW_PIECES)
    return f"Which exceptions does `{entry.name}` raise, and when?", answer


def follow(entries: Sequence[Entry]) -> Iterator[Turn]:
    pieces = ROW_PIECES // len(entries)
    yield describe(entries[0], pieces)
    for entry in entries[1:]:
        yield choose(FOLLOW_UPS, entry.name).format(entry.name), shorten(entry.text, pieces)


def groups(entries: Sequence[Entry], size: int) -> Iterator[Sequence[Entry]]:
    shuffled = sorted(entries, key=lambda entry: digest(entry.name))
    for start in range(0, len(shuffled) - size + 1, size):
        yield shuffled[start : start + size]


def candidates() -> Mapping[str, Sequence[tuple[Turn, ...]]]:
    """Return by kind of conversation all that can be made."""
    of_module = {name: tuple(module_entries(name)) for name in MODULES}
    entries = tuple(chain.from_iterable(of_module.values()))
    modules = [
        Entry(kind="module", name=name, text=read_doc(importlib.import_module(name)))
        for name in MODULES
    ]
    return {
        "module": [(describe(entry),) for entry in modules],
        "describe": [(describe(entry),) for entry in entries],
        "summary": [(summarise(entry),) for entry in entries],
        "signature": [(show_signature(entry),) for entry in entries],
        "errors": [(name_errors(entry),) for entry in entries],
        "two turns": [tuple(follow(g)) for own in of_module.values() for g in groups(own, 2)],
        "three turns": [tuple(follow(g)) for own in of_module.values() for g in groups(own, 3)],
    }


# How many conversations of each kind: short answers are common and long ones rare, as in life.
QUOTAS = {
    "module": 34,
    "describe": 174,
    "summary": 50,
    "signature": 50,
    "errors": 38,
    "two turns": 52,
    "three turns": 26,
}


def lot(turns: Sequence[Turn]) -> float:
    """Return the place in the draw; long answers are rare, so they get better places."""
    return digest(str(turns)) / sum(count_pieces(answer) for _, answer in turns)


def pick(turns_of_kind: Sequence[tuple[Turn, ...]], quota: int) -> Iterator[tuple[Turn, ...]]:
    complete = (turns for turns in turns_of_kind if all(answer for _, answer in turns))
    yield from islice(sorted(complete, key=lot), quota)


def to_row(turns: Sequence[Turn]) -> dict[str, list[dict[str, str]]]:
    messages = []
    first_question = turns[0][0]
    if digest(first_question) % 4 == 0:
        system = choose(SYSTEM_TEXTS, first_question[::-1])
        messages.append({"role": "system", "content": system})
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def make_lines() -> list[str]:
    """Return the dataset, one JSON document a line, kinds and lengths mixed."""
    of_kind = candidates()
    chosen = chain.from_iterable(pick(of_kind[kind], quota) for kind, quota in QUOTAS.items())
    return sorted((json.dumps(to_row(turns), ensure_ascii=False) for turns in chosen), key=digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("data.jsonl"))
    output: Path = parser.parse_args().output
    if sys.flags.optimize > 1:
        sys.exit("python -OO drops documentation strings: run it without -OO")
    lines = make_lines()
    output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} conversations written to {output}")


if __name__ == "__main__":
    main()

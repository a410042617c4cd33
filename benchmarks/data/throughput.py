"""Measures how fast data is prepared, beside what the fast tokenizer alone reaches.

Both get the same conversations on the same number of processes, in turns. The tokenizer alone gets
the rendered texts in memory, in batches, and nothing of what it returns is kept. Memory is the sum
of the resident sets of all processes of `prepare`, sampled.

    python benchmarks/data/throughput.py --rows 1000000 --rounds 2 --output throughput.json
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil

from autotune import builtin
from autotune.dataset import Source, prepare
from autotune.dataset.workers import usable_cores

_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
_WORDS = 40_000
_BATCH = 1000


def make_words(rng: random.Random) -> list[str]:
    """Return words of a made-up language, the frequent ones short."""
    weights = [1 / (1 + rank) for rank in range(len(_LETTERS))]
    return [
        "".join(rng.choices(_LETTERS, weights, k=2 + min(10, int(rng.expovariate(0.3)))))
        for _ in range(_WORDS)
    ]


def conversations(rows: int) -> Iterator[list[dict[str, str]]]:
    rng = random.Random(0)  # noqa: S311 - no secrets
    words = make_words(rng)
    ranks = [int(_WORDS * rng.random() ** 3) for _ in range(200_000)]
    for _ in range(rows):
        start = rng.randrange(len(ranks) - 200)
        asked, said = rng.randint(8, 40), rng.randint(20, 70)
        text = [words[rank] for rank in ranks[start : start + asked + said]]
        yield [
            {"role": "user", "content": " ".join(text[:asked]) + "?"},
            {"role": "assistant", "content": " ".join(text[asked:]) + "."},
        ]


def write_data(path: Path, rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for messages in conversations(rows):
            file.write(json.dumps({"messages": messages}) + "\n")


def tokenizer_alone(model_dir: str, path: str, share: int, shares: int, queue: Any) -> None:  # noqa: ANN401
    """Tokenise every `shares`-th batch in turns by the engine and by transformers' own call.

    Only the time in the tokenizer counts. The engine is asked for no offsets.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    engine = tokenizer.backend_tokenizer
    calls: dict[str, Callable[[list[str]], object]] = {
        "engine": lambda texts: [
            encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)
        ],
        "transformers": lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
    }
    spent = {name: [0, 0.0, 0.0] for name in calls}
    with Path(path).open(encoding="utf-8") as file:
        for number in itertools.count():
            batch = list(itertools.islice(file, _BATCH))
            if not batch:
                break
            if number % shares != share:
                continue
            texts = [json.loads(line) for line in batch]
            name = list(calls)[number // shares % len(calls)]
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name](texts)
            spent[name][0] += len(texts)
            spent[name][1] += time.perf_counter() - wall
            spent[name][2] += time.process_time() - cpu
    queue.put(spent)


def time_alone(model_dir: Path, texts: Path, processes: int) -> dict[str, tuple[float, float]]:
    """Return for each way rows a second of all processes, and seconds of CPU a row."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(
            target=tokenizer_alone, args=(str(model_dir), str(texts), share, processes, queue)
        )
        for share in range(processes)
    ]
    for worker in workers:
        worker.start()
    measured = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {
        name: (
            sum(spent[name][0] / spent[name][1] for spent in measured),
            sum(spent[name][2] for spent in measured) / sum(spent[name][0] for spent in measured),
        )
        for name in measured[0]
    }


class MemoryWatch:
    """Samples the resident sets of the processes that this one starts, and its own growth."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            me = psutil.Process()
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def time_prepare(model_dir: Path, data: Path, output: Path) -> tuple[float, float, int]:
    """Return the seconds of all, start of processes included, seconds of CPU, and bytes."""
    before = _cpu_seconds()
    with MemoryWatch() as memory:
        started = time.perf_counter()
        prepare(
            [Source(data)],
            model_dir=model_dir,
            max_seq_length=2048,
            output=output,
            trust_remote_code=False,
            vocab_size=2**31 - 1,
        )
        seconds = time.perf_counter() - started
    return seconds, _cpu_seconds() - before, memory.peak_bytes


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def render(data: Path, texts: Path, model_dir: Path) -> None:
    """Write the rendered text of each row as a JSON string."""
    from autotune.dataset.conventions.turns import parse_messages
    from autotune.dataset.shapes import ShapeCache
    from autotune.dataset.template import ChatTemplate
    from autotune.dataset.tokenizer import load_tokenizer

    template = ChatTemplate(load_tokenizer(model_dir, trust_remote_code=False))
    shapes = ShapeCache(template, whole=False)
    with data.open(encoding="utf-8") as file, texts.open("w", encoding="utf-8") as out:
        for line in file:
            (sample,) = shapes.samples(parse_messages(json.loads(line)))
            out.write(json.dumps(sample.text) + "\n")


def one_round(model: Path, data: Path, texts: Path, output: Path) -> dict[str, float]:
    """Measure both, one after the other."""
    with texts.open("rb") as file:
        rows = sum(1 for _ in file)
    alone = time_alone(model, texts, usable_cores())
    seconds, cpu_seconds, peak_bytes = time_prepare(model, data, output)
    shutil.rmtree(output)
    figures = {"prepare_rows_per_s": rows / seconds, "peak_bytes": float(peak_bytes)}
    for name, (rate, cpu_a_row) in alone.items():
        figures[f"{name}_rows_per_s"] = rate
        figures[f"ratio_to_{name}"] = rows / seconds / rate
        figures[f"cpu_ratio_to_{name}"] = cpu_a_row / (cpu_seconds / rows)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, default=builtin.directory("glm-tiny"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="autotune-benchmark-") as scratch:
        data, texts = Path(scratch) / "data.jsonl", Path(scratch) / "texts.jsonl"
        write_data(data, options.rows)
        render(data, texts, options.model)
        rounds = []
        for number in range(options.rounds):
            rounds.append(one_round(options.model, data, texts, Path(scratch) / "rows"))
            print(json.dumps({"round": number, **rounds[-1]}), flush=True)
        result: dict[str, Any] = {
            "rows": options.rows,
            "bytes": data.stat().st_size,
            "processes": usable_cores(),
            "model": options.model.name,
            "rounds": rounds,
            "median": {name: statistics.median(r[name] for r in rounds) for name in rounds[0]},
            "least": {name: min(r[name] for r in rounds) for name in rounds[0]},
            "most": {name: max(r[name] for r in rounds) for name in rounds[0]},
        }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

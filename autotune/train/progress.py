"""How far a rank has come with what takes long beside steps: progress.jsonl, a line a sign."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

PROGRESS = "progress.jsonl"
MODEL, CHECKPOINT = "model", "checkpoint"

_EVERY_S = 0.5


class Progress:
    """Writes signs of progress, of one rank alone, into the directory of the training."""

    def __init__(self, output_dir: Path, *, writes: bool) -> None:
        self._path = output_dir / PROGRESS
        self._writes = writes

    def tell(self, what: str, done: int, total: int | None, note: str = "") -> None:
        if not self._writes:
            return
        line = {"what": what, "done": done, "total": total, "note": note, "at": time.time()}
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write((json.dumps(line) + "\n").encode())

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Tell how many of a model's tensors are loaded, by the bars that transformers draws."""
        from transformers.utils.logging import set_tqdm_hook

        self.tell(MODEL, 0, None)

        def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401 - tqdm
            return _Bar(factory(*args, **kwargs), lambda n, of: self.tell(MODEL, n, of))

        before = set_tqdm_hook(hook)
        try:
            yield
        finally:
            set_tqdm_hook(before)
            self.tell(MODEL, 1, 1)


class _Bar:
    """A bar of tqdm that tells how far it has come, now and then; at its end it is not over yet."""

    def __init__(self, bar: Any, tell: Callable[[int, int | None], None]) -> None:  # noqa: ANN401 - tqdm
        self._bar = bar
        self._tell = tell
        self._told_s = 0.0

    def __iter__(self) -> Iterator[Any]:
        for number, item in enumerate(self._bar):
            self._sign(number)
            yield item

    def update(self, *args: Any) -> Any:  # noqa: ANN401 - as of tqdm
        updated = self._bar.update(*args)
        self._sign(getattr(self._bar, "n", 0))
        return updated

    def _sign(self, number: int) -> None:
        total = getattr(self._bar, "total", None)
        now = time.monotonic()
        if total and number < total and now - self._told_s >= _EVERY_S:
            self._told_s = now
            self._tell(number, total)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:  # noqa: ANN401 - as of tqdm
        return self._bar.__exit__(*error)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever tqdm has
        return getattr(self._bar, name)

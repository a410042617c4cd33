"""The run directory: where everything is, and writes that are whole or not there."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from autotune.errors import CannotWriteError
from autotune.lease import HeldError, exclusive
from autotune.outcome import Rung

_T = TypeVar("_T")

_PRIVATE_FILE, _PRIVATE_DIRECTORY = 0o600, 0o700


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths of one run; docs/reference/run-directory.md is made from what is said of each."""

    root: Path

    @property
    def run(self) -> Path:
        """Every option with where its value came from, and the versions."""
        return self.root / "run.json"

    @property
    def hardware(self) -> Path:
        """The devices, and what they really do."""
        return self.root / "hardware.json"

    @property
    def profile(self) -> Path:
        """The model in figures."""
        return self.root / "profile.json"

    @property
    def dataset_profile(self) -> Path:
        """The data in figures."""
        return self.root / "dataset.json"

    @property
    def dataset(self) -> Path:
        """The tokenised rows, memory-mapped; lines that were left out in `reported.jsonl`."""
        return self.root / "dataset"

    @property
    def plan(self) -> Path:
        """The settings with their estimates, kept or rejected with rule and numbers."""
        return self.root / "plan.json"

    @property
    def probes(self) -> Path:
        """A line an outcome, as it was measured: the truth that everything else follows from."""
        return self.root / "probes.jsonl"

    @property
    def study(self) -> Path:
        """The same as an Optuna study, for its dashboard."""
        return self.root / "study.db"

    @property
    def logs(self) -> Path:
        """A directory a probe, a file a rank; the training's log."""
        return self.root / "logs"

    @property
    def ds_config(self) -> Path:
        """The tuned DeepSpeed config, every value literal."""
        return self.root / "ds_config.json"

    @property
    def train_args(self) -> Path:
        """What the trainer gets besides it."""
        return self.root / "train_args.json"

    @property
    def launch_script(self) -> Path:
        """The same training by hand, without the tuner."""
        return self.root / "launch.sh"

    @property
    def fallbacks(self) -> Path:
        """The chosen setting with what its probe promised; the next best that need less memory."""
        return self.root / "fallbacks.json"

    @property
    def training(self) -> Path:
        """Checkpoints, `metrics.jsonl` with a line a step, `evaluations.jsonl`."""
        return self.root / "training"

    @property
    def model(self) -> Path:
        """The trained model or its adapters, and the tokenizer, as `from_pretrained` takes them."""
        return self.root / "model"

    @property
    def script(self) -> Path:
        """Of a script of the user's own: what its first process has shown it to be."""
        return self.root / "script.json"

    @property
    def configs(self) -> Path:
        """Of a script: the DeepSpeed configs that it was tried with."""
        return self.root / "configs"

    @property
    def errand(self) -> Path:
        """Of a script whose arguments do not carry all that was tuned: what it is told besides."""
        return self.root / "errand.json"

    @property
    def exports(self) -> Path:
        """What `autotune export` has written, a directory a tool."""
        return self.root / "exports"

    @property
    def status(self) -> Path:
        """Where the run is now; rewritten as it goes on."""
        return self.root / "status.json"

    @property
    def events(self) -> Path:
        """What happened, a line an event, for machines."""
        return self.root / "events.jsonl"

    @property
    def result(self) -> Path:
        """How it ended: exit reason, chosen setting, figures."""
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        """The run in one page with pictures, written anew as it goes on."""
        return self.root / "report.html"

    def create(self) -> None:
        """Make the directory, the user's alone.

        Raises:
            CannotWriteError: it cannot be made.
        """
        with writing(self.root):
            self.root.mkdir(mode=_PRIVATE_DIRECTORY, parents=True, exist_ok=True)
            self.logs.mkdir(mode=_PRIVATE_DIRECTORY, exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory against a second run; a holder that is gone holds it no longer.

        Raises:
            CannotWriteError: another process holds it, or no lock can be made.
        """
        path = self.root / ".lock"
        with ExitStack() as held:
            with writing(path):
                try:
                    held.enter_context(exclusive(path, wait=False, stop_when_lost=True))
                except HeldError as error:
                    msg = (
                        f"{self.root} is in use by {error.holder}: wait for it, or choose another "
                        "--run-dir"
                    )
                    raise CannotWriteError(msg) from None
            yield

    def append_rung(self, rung: Rung) -> None:
        """Add a line to probes.jsonl that is on the disk when this returns."""
        append_line(self.probes, rung.to_json(), durably=True)

    def read_rungs(self) -> list[Rung]:
        """Read probes.jsonl; a line torn by a kill while it was written is left out."""
        if not self.probes.exists():
            return []
        lines = self.probes.read_bytes().splitlines()
        return [rung for rung in map(_parse_rung, lines) if rung is not None]


def append_line(path: Path, document: Mapping[str, Any], *, durably: bool) -> None:
    """Add a document as a line of its own, whatever a kill has left before it.

    Raises:
        CannotWriteError: it cannot be written.
    """
    line = json.dumps(document, sort_keys=True) + "\n"
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, _PRIVATE_FILE)
        with os.fdopen(descriptor, "r+b") as file:
            _end_torn_line(file.fileno())
            file.write(line.encode())
            file.flush()
            if durably:
                os.fsync(file.fileno())


def _end_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")


def _parse_rung(line: bytes) -> Rung | None:
    try:
        return Rung.from_json(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence.

    Raises:
        CannotWriteError: something inside could not be written.
    """
    try:
        yield
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise CannotWriteError(msg) from error


def write_bytes(path: Path, content: bytes, mode: int = _PRIVATE_FILE) -> None:
    """Write a file that is seen whole or not at all, also after a power cut.

    Raises:
        CannotWriteError: the file cannot be written; what was there before still is.
    """
    with writing(path):
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(draft).chmod(mode)
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str, mode: int = _PRIVATE_FILE) -> None:
    """Write a text, whole or not at all; paths in it may hold bytes that are no UTF-8."""
    write_bytes(path, text.encode(errors="surrogateescape"), mode)


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - JSON
    """Write a JSON document, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401 - JSON
    """Read a JSON document; None if it is not there or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def cached(path: Path, make: Callable[[], Any], read: Callable[[Any], _T]) -> _T:
    """Return what `read` makes of the document at `path`.

    It is made and kept there if it is missing, torn, or of another shape than `read` takes.
    """
    try:
        return read(read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError):
        document = make()
        with writing(path):
            path.parent.mkdir(mode=_PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        write_json(path, document)
        return read(document)

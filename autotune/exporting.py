"""Exports of a tuned run: reads its files, writes a directory that another tool starts from."""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autotune.dataset import Rows, Rules, Source
from autotune.dataset.splitting import split_rows
from autotune.dataset.written import write_messages, write_sequences, write_tokens
from autotune.environment import rank_environment
from autotune.errors import InputMissingError, SetupFaultError, UsageError
from autotune.exports import EXPORTERS, Export, TunedRun
from autotune.exports.tuned import EVAL_ROWS, TRAIN_ROWS
from autotune.rundir import RunDir, read_json, write_text, writing
from autotune.setting import Setting
from autotune.units import format_bytes
from autotune.workload import TrainSpec

RUN_SCRIPT = "run.sh"
_WEIGHTS = "./model"
"""Seen from the directory of an export."""

_ERROR_CHARACTERS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        directory: of the export.
        files: in it, the model aside.
        rows: in `train.jsonl`; None where the tool gets no rows.
        notes: what differs from the run, a sentence each.
    """

    directory: Path
    files: tuple[str, ...]
    rows: int | None
    notes: tuple[str, ...]


def export_run(run_dir: RunDir, tool: str, output: Path | None) -> Exported:
    """Write a tuned run for another tool, into `output` or below the run directory.

    The directory appears when it is complete.

    Raises:
        InputMissingError: the directory holds no tuned run, or its rows or data are gone.
        UsageError: there is something in the way, or the tool cannot take the data.
        SetupFaultError: random weights of a model without any cannot be made.
        CannotWriteError: the files cannot be written.
    """
    directory = (output or run_dir.exports / tool).absolute()
    if directory.exists():
        msg = f"{directory} is there already: remove it, or choose another place with --output"
        raise UsageError(msg)
    files = _Files.of(run_dir)
    with writing(directory):
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        tuned = files.tuned(directory)
        export = EXPORTERS[tool](tuned)
        for name, text in export.files.items():
            write_text(draft / name, text)
        write_text(draft / RUN_SCRIPT, _run_script(tuned, export), mode=0o700)
        rows = _write_rows(files, export, tuned, draft)
        if tuned.spec.from_scratch and export.data != "none":
            _write_random_weights(run_dir, tuned, draft / _WEIGHTS)
        with writing(directory):
            draft.rename(directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    return Exported(directory=directory, files=tuple(names), rows=rows, notes=export.notes)


@dataclass(frozen=True, slots=True)
class _Files:
    """What a tuned run has written that an export is made from."""

    run_dir: RunDir
    options: dict[str, dict[str, Any]]
    result: dict[str, Any]
    ds_config: dict[str, Any]
    spec: TrainSpec
    ranks: int

    @classmethod
    def of(cls, run_dir: RunDir) -> "_Files":
        names = (run_dir.run, run_dir.result, run_dir.ds_config, run_dir.train_args)
        documents = [read_json(path) for path in (*names, run_dir.hardware)]
        missing = [path.name for path, found in zip(names, documents, strict=False) if not found]
        if missing or "setting" not in documents[1]:
            lacks = f"it has no {missing[0]}" if missing else "its tuning did not come to its end"
            msg = f"{run_dir.root} holds no tuned run ({lacks}): make one with `autotune tune`"
            raise InputMissingError(msg)
        run, result, ds_config, train_args, hardware = documents
        return cls(
            run_dir=run_dir,
            options=run["options"],
            result=result,
            ds_config=ds_config,
            spec=TrainSpec.from_json(train_args),
            ranks=hardware["num_devices"],
        )

    def option(self, name: str) -> Any:  # noqa: ANN401 - each option has its own type
        return self.options[name]["value"]

    def tuned(self, directory: Path) -> TunedRun:
        """Return the run as exporters take it; the export goes into `directory`."""
        job, memory = self.result["job"], self.result["memory"]
        return TunedRun(
            name=self.run_dir.root.name,
            directory=str(directory),
            model=_WEIGHTS if self.spec.from_scratch else self._model(job),
            setting=Setting.from_json(self.result["setting"]),
            ds_config=self.ds_config,
            spec=self.spec,
            ranks=self.ranks,
            max_seq_length=job["max_seq_length"],
            packing=bool(self.option("packing")),
            optimizer=job["optimizer"],
            measured=(
                f"{self.result['tokens_per_s']:.0f} tokens/s, "
                f"{format_bytes(memory['measured_bytes'])} a rank, measured"
            ),
        )

    def _model(self, job: dict[str, Any]) -> str:
        """Return the hub id of a model that is in the hub's cache; else where it is on this disk.

        The directory of the cache would mean nothing elsewhere.
        """
        in_hub_cache = Path(self.spec.model_dir).parent.name == "snapshots"
        return str(job["model"]) if in_hub_cache else self.spec.model_dir

    def sources(self) -> list[Source]:
        return [Source.parse(text) for text in self.option("dataset")]

    def rules(self) -> Rules:
        return Rules.from_options({name: entry["value"] for name, entry in self.options.items()})


def _write_rows(files: _Files, export: Export, tuned: TunedRun, draft: Path) -> int | None:
    if export.data == "none":
        return None
    if export.data == "messages":
        return write_messages(files.sources(), files.rules(), draft / TRAIN_ROWS)
    rows = Rows.open(files.run_dir.dataset)
    trained, held_out = split_rows(len(rows), tuned.spec.eval_share, tuned.spec.seed)
    if export.all_rows:
        trained, held_out = np.arange(len(rows)), held_out[:0]
    write = write_tokens if export.keeps_packs else write_sequences
    if len(held_out):
        write(rows, held_out, draft / EVAL_ROWS)
    return write(rows, trained, draft / TRAIN_ROWS)


def _write_random_weights(run_dir: RunDir, tuned: TunedRun, directory: Path) -> None:
    command = [sys.executable, "-m", "autotune.train.weights"]
    done = subprocess.run(
        [*command, str(run_dir.train_args), str(directory)],
        env={**os.environ, **rank_environment(tuned.spec.device_kind, ())},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        msg = (
            f"random weights for {tuned.spec.model_dir}, which has none, cannot be made:\n"
            f"{done.stderr[-_ERROR_CHARACTERS:]}"
        )
        raise SetupFaultError(msg)


def _run_script(tuned: TunedRun, export: Export) -> str:
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if tuned.on_cpu:
        environment |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(tuned.spec.threads_per_rank),
        }
    exports = "\n".join(
        f"export {name}={shlex.quote(value)}" for name, value in environment.items()
    )
    *before, last = export.commands
    steps = "\n".join([*before, f'exec {last} "$@"'])
    # A script of the user's own is named from where it is started.
    place = 'cd -- "$here"\n' if export.data != "none" else ""
    return f"""#!/usr/bin/env bash
# Starts what autotune has exported; to be run in the environment of the tool.
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)"
{place}{exports}
{steps}
"""

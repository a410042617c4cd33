"""The hand-off: the user's own command with what was tuned in it, run to its end."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from autotune.errors import InterruptedRunError, ScriptFailedError
from autotune.script.launch import Script
from autotune.train.launch import end_tree

_POLL_S = 0.2
_GRACE_S = 60.0
"""For a script that saves its state when it is asked to end."""

_LARGEST_OWN_CODE = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedCommand:
    """A script's command as it was tuned.

    Attributes:
        arguments: of the script, what was tuned in them.
        environment: variables for all processes.
        shim: variables for the ranks alone, where not all that was tuned can be told by arguments.
        gives_local_rank: whether the script knows `--local_rank`, as from DeepSpeed's launcher.
    """

    script: Script
    arguments: tuple[str, ...]
    ranks: int
    environment: Mapping[str, str]
    shim: Mapping[str, str]
    gives_local_rank: bool

    def command(self, launcher: str) -> list[str]:
        """Return the command of all ranks on this machine, by torchrun's module or one alike."""
        program = self.script.command(self.arguments)
        if self.gives_local_rank:
            program = ["sh", "-c", 'exec "$@" --local_rank="$LOCAL_RANK"', "sh", *program]
        if self.shim:
            program = ["env", *(f"{name}={value}" for name, value in self.shim.items()), *program]
        return [
            *(sys.executable, "-m", launcher, "--nnodes=1", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=localhost:0", f"--nproc-per-node={self.ranks}", "--no-python"),
            *program,
        ]

    def by_hand(self) -> str:
        """Return launch.sh: the same training without the tuner."""
        exports = "\n".join(
            f"export {name}={shlex.quote(value)}"
            for name, value in sorted(self.environment.items())
        )
        return f"""#!/usr/bin/env bash
# Starts the script as it was tuned, without the tuner.
set -euo pipefail
cd -- {shlex.quote(str(self.script.directory))}
{exports}
exec {shlex.join(self.command("torch.distributed.run"))} "$@"
"""

    def run(self, *, stdout: int | None = None) -> None:
        """Train to the script's end; its output is passed on as it comes.

        Args:
            stdout: descriptor that the script's goes to; None is this process's own.

        Raises:
            ScriptFailedError: it ended with another exit code than 0, which the error has.
            InterruptedRunError: stopped from outside; the script was asked to end.
        """
        process = self._start(stdout)
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
        except InterruptedRunError:
            _ask_to_end(process)
            raise
        finally:
            end_tree(process)
        if process.returncode != 0:
            raise ScriptFailedError(_failure(process.returncode), _own_code(process.returncode))

    def _start(self, stdout: int | None) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "autotune.train.leash"),
                *self.command("autotune.script.torchrun"),
            ],
            cwd=self.script.directory,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            start_new_session=True,
        )


def _ask_to_end(process: "subprocess.Popen[bytes]") -> None:
    """Have torchrun pass a SIGTERM on to its ranks, and wait while they save what they do."""
    process.terminate()
    deadline = time.monotonic() + _GRACE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _failure(code: int) -> str:
    if 0 < code <= _LARGEST_OWN_CODE:
        return f"the script ended with exit code {code}; what it wrote is above"
    return "a rank of the script was ended by a signal; what it wrote is above"


def _own_code(code: int) -> int | None:
    return code if 0 < code <= _LARGEST_OWN_CODE else None

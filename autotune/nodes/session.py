"""The files through which the processes of a launch find and hear each other.

A directory that all nodes see has of a launch

    hello-R.json           process R is there; written anew until it is welcome
    welcome.json           the session, and which part each has in it

and of a session

    alive, alive-R         touched by the controller, and by each other process, while they live
    ask-K.json             a question to each node; node N answers in ask-K-N.json
    NAME/start             work for torchrun, written last; each node starts its own
    NAME/stop              it is over
    NAME/node-N.exit       the exit code of that node's torchrun
    asked-R                process R was asked to stop, and the controller should
    closed                 the end, with the exit code of all
    gone-R                 process R has seen that
"""

import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autotune.rundir import read_json, write_json, write_text

POLL_S = 0.1
BEAT_S = 5.0
# Attributes of files are cached on network file systems, by default for up to a minute (nfs(5)).
LOST_S = 180.0
SEEN_S = 90.0
MEETING_S = 180.0
"""How long the processes of a launch may come one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A process's part in a session.

    Attributes:
        node: the number of its node, in the order of ranks; 0 is the controller's.
        serves: whether it is the one that serves there; others only wait.
        cpus: that all processes of its node may use together.
    """

    node: int
    serves: bool
    cpus: tuple[int, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Part":
        return cls(**{**fields, "cpus": tuple(fields["cpus"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """What a process says of itself.

    Attributes:
        nonce: of this process alone, so that what an earlier launch left is not taken for it.
        host: where it runs, as other machines know it.
        name: of its node, for people; Slurm has its own.
        machine: as no other machine is called.
        node: as the launcher numbers nodes; None where it does not.
        cpus: that it may use.
    """

    nonce: str
    host: str
    name: str
    machine: str
    node: int | None
    cpus: tuple[int, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Hello":
        return cls(**{**fields, "cpus": tuple(fields["cpus"])})


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def hello_of_this_process(node: int | None) -> Hello:
    host = os.uname().nodename
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    return Hello(
        nonce=uuid.uuid4().hex,
        host=host,
        name=node_name(),
        machine=f"{host} {boot}",
        node=node,
        cpus=cpus,
    )


def parts(hellos: dict[int, Hello]) -> dict[int, Part]:
    """Give each process, by rank, its part: the first of each node serves. Pure."""
    homes: dict[tuple[str, int | None], list[int]] = {}
    for rank in sorted(hellos):
        hello = hellos[rank]
        homes.setdefault((hello.machine, hello.node), []).append(rank)
    found = {}
    for node, ranks in enumerate(homes.values()):
        cpus = tuple(sorted({cpu for rank in ranks for cpu in hellos[rank].cpus}))
        for rank in ranks:
            found[rank] = Part(node=node, serves=rank == ranks[0], cpus=cpus)
    return found


class Sign:
    """How long ago, by this node's own clock, a file was last written anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = ""
        self._changed = time.monotonic()

    def seconds(self) -> float:
        try:
            content = self._path.read_text()
        except OSError:
            content = self._content
        if content != self._content:
            self._content, self._changed = content, time.monotonic()
        return time.monotonic() - self._changed


def beat(path: Path) -> None:
    write_text(path, str(time.time()))


def exit_code_in(path: Path) -> int | None:
    """Return the exit code that a file holds, None where there is none yet."""
    code = read_json(path)
    return code if isinstance(code, int) else None


def say_hello(directory: Path, rank: int, hello: Hello) -> None:
    """Be seen, also after what earlier launches left has been cleared away."""
    path = directory / f"hello-{rank}.json"
    if not path.exists():
        write_json(path, asdict(hello))


def not_shared(directory: Path, who: str) -> str:
    """Say that somebody was not seen in the directory, and what may help."""
    return (
        f"{who} was not seen in {directory} within {MEETING_S:.0f} s: the run directory has to be "
        "on a file system that all nodes see; choose one there with --run-dir"
    )

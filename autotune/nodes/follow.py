"""A process that is not the controller: serves it on its node, or waits, until all is over."""

import os
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune import __version__, processes
from autotune.detect import detect
from autotune.environment import versions
from autotune.errors import STOPPING, AutotuneError, CannotWriteError, InterruptedRunError
from autotune.nodes.facts import NodeFacts
from autotune.nodes.session import (
    BEAT_S,
    LOST_S,
    MEETING_S,
    POLL_S,
    Part,
    Sign,
    beat,
    exit_code_in,
    hello_of_this_process,
    node_name,
    not_shared,
    say_hello,
)
from autotune.nodes.work import Work, start_torchrun
from autotune.rundir import read_json, write_json, write_text, writing

if TYPE_CHECKING:
    from autotune.hardware import Cluster


def all_versions() -> dict[str, str]:
    """Return the versions that ranks which train together have to share."""
    python = ".".join(map(str, sys.version_info[:2]))
    return {"autotune": __version__, "python": python, **versions()}


def follow(directory: Path, rank: int, size: int, node: int | None) -> int:
    """Be a process that is not the controller, to the end; returns the exit code of all.

    Args:
        directory: of the launch, which all nodes see.
        rank: of this process, from 1.
        size: how many processes there are.
        node: as the launcher numbers nodes; None where it does not.

    Raises:
        CannotWriteError: no controller is seen in the directory.
        InterruptedRunError: the controller has gone.
    """
    session, part = _meet(directory, rank, size, node)
    for number in STOPPING:
        signal.signal(
            number, lambda number, _: write_text(session / f"asked-{rank}", str(int(number)))
        )
    follower = _Follower(session, rank, part)
    try:
        return follower.to_the_end()
    finally:
        follower.close()


def _meet(directory: Path, rank: int, size: int, node: int | None) -> tuple[Path, Part]:
    hello = hello_of_this_process(node)
    with writing(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + MEETING_S
    while True:
        say_hello(directory, rank, hello)
        welcome = read_json(directory / "welcome.json") or {}
        mine = welcome.get("parts", {}).get(str(rank), {})
        if mine.get("nonce") == hello.nonce:
            return directory / welcome["session"], Part.from_json(mine["part"])
        if time.monotonic() > deadline:
            raise CannotWriteError(not_shared(directory, f"the controller of {size} processes"))
        time.sleep(POLL_S)


class _Follower:
    def __init__(self, session: Path, rank: int, part: Part) -> None:
        self._session = session
        self._rank = rank
        self._part = part
        self._sign = Sign(session / "alive")
        self._over = threading.Event()
        self._answered: set[Path] = set()
        self._cluster: Cluster | None = None
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while True:
            beat(self._session / f"alive-{self._rank}")
            if self._over.wait(BEAT_S):
                return

    def to_the_end(self) -> int:
        if self._part.serves:
            # Launchers may bind each process to a processor of its own.
            os.sched_setaffinity(0, self._part.cpus)
        while (code := exit_code_in(self._session / "closed")) is None:
            if self._sign.seconds() > LOST_S:
                msg = (
                    f"the controller has not been seen in {self._session} for {LOST_S:.0f} s; "
                    "what is done is saved, and the same command goes on from there"
                )
                raise InterruptedRunError(msg)
            if self._part.serves:
                self._look_around()
            time.sleep(POLL_S)
        return code

    def close(self) -> None:
        # The launcher stops the others as soon as one has ended: all end with the same code.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        self._over.set()
        if self._session.exists():
            write_text(self._session / f"gone-{self._rank}", "")

    def _look_around(self) -> None:
        for path in sorted({*self._session.glob("ask-*.json"), *self._session.glob("*/start")}):
            if path in self._answered or "-" in path.stem.removeprefix("ask-"):
                continue
            self._answered.add(path)
            if path.name == "start":
                self._serve(path.parent)
            else:
                self._answer(path)

    def _answer(self, path: Path) -> None:
        asked = read_json(path)
        node = self._part.node
        try:
            answer = self._facts(asked) if asked["what"] == "detect" else _missing(asked["paths"])
        except AutotuneError as error:
            answer = {"error": str(error), "host": node_name()}
        write_json(path.with_name(f"{path.stem}-{node}.json"), answer)

    def _facts(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._cluster = detect(asked["devices"], asked["device_memory"])
        return asdict(NodeFacts.of(node_name(), self._cluster, all_versions()))

    def _serve(self, directory: Path) -> None:
        assert self._cluster is not None, "devices are looked for before they are used"
        work = Work.from_json(read_json(directory / "start"))
        node = self._part.node
        try:
            torchrun = start_torchrun(work, node, self._cluster.kind, self._cluster.visible_devices)
        except OSError as error:
            Path(work.logs[node]).write_text(
                f"cannot start ranks that meet at {work.host}: {error}\n"
            )
            write_json(directory / f"node-{node}.exit", 1)
            return
        while not self._is_over(directory) and torchrun.exitcode is None:
            processes.wait_for_any([torchrun], POLL_S)
        processes.end([torchrun])
        # The directory goes once every node has said that it is done.
        if directory.exists():
            write_json(directory / f"node-{node}.exit", torchrun.exitcode)

    def _is_over(self, directory: Path) -> bool:
        closed = (self._session / "closed").exists()
        return closed or (directory / "stop").exists() or self._sign.seconds() > LOST_S


def _missing(paths: list[str]) -> dict[str, Any]:
    missing = [path for path in paths if not Path(path).exists()]
    return {"host": node_name(), "missing": missing}

"""The controller's side: the processes of a launch meet, and nodes are asked and sent to work."""

import math
import os
import re
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from autotune.detect import detect
from autotune.errors import (
    CannotWriteError,
    InputMissingError,
    InterruptedRunError,
    NoUsableDeviceError,
)
from autotune.hardware import Cluster
from autotune.nodes.facts import NodeFacts, joined, require_alike
from autotune.nodes.follow import all_versions
from autotune.nodes.session import (
    BEAT_S,
    LOST_S,
    MEETING_S,
    POLL_S,
    SEEN_S,
    Hello,
    Sign,
    beat,
    exit_code_in,
    hello_of_this_process,
    not_shared,
    parts,
)
from autotune.nodes.work import Work, address_towards, new_work
from autotune.rundir import read_json, write_json, write_text, writing

_ANSWER_S = 120.0
_GONE_S = 20.0
_LOOK_S = 0.25
_FORGOTTEN_S = 3600.0


class Nodes:
    """The nodes of a launch, of which this process is on the first; there may be no other.

    Args:
        session: the directory that the processes share; None where there are no others.
        hosts: of each node, by name.
        members: rank and node of each other process that serves a node.
        others: ranks of all other processes.
        address: of this node, as the others reach it.
        ranks: that the launcher started on each node; None leaves it to the devices.
    """

    def __init__(
        self,
        session: Path | None,
        *,
        hosts: tuple[str, ...],
        members: dict[int, int],
        others: tuple[int, ...],
        address: str,
        ranks: int | None,
    ) -> None:
        self._session = session
        self.hosts = hosts
        self._signs = {
            node: Sign(session / f"alive-{rank}")
            for rank, node in members.items()
            if session is not None
        }
        self._others = others
        self._address = address
        self._ranks = ranks
        self._asked = 0
        self._cluster: Cluster | None = None
        self._closed = threading.Event()
        if session is not None:
            threading.Thread(target=self._stay_alive, args=(session,), daemon=True).start()

    @property
    def num_nodes(self) -> int:
        return len(self.hosts)

    @property
    def directory(self) -> Path:
        """Where what all nodes see in passing is written; there are several nodes."""
        assert self._session is not None, "nodes share a directory"
        return self._session

    def _stay_alive(self, session: Path) -> None:
        told, beaten_s = False, -math.inf
        while not self._closed.wait(BEAT_S / 5):
            if time.monotonic() - beaten_s > BEAT_S:
                beat(session / "alive")
                beaten_s = time.monotonic()
            if not told and (asked := sorted(session.glob("asked-*"))):
                told = True
                # A process that has to stop stops all.
                os.kill(os.getpid(), int(asked[0].read_text()))

    def detect(self, devices: str, device_memory_bytes: int | None) -> Cluster:
        """Detect the devices of every node, as many ranks on each as the launcher started.

        Raises:
            UsageError: devices are asked for that are not there.
            NoUsableDeviceError: a node has none that can be used, or nodes differ.
            SetupFaultError: what is installed on the nodes differs.
            CannotWriteError: a node does not answer.
        """
        if self._ranks is not None:
            devices = {"auto": str(self._ranks), "cpu": f"cpu:{self._ranks}"}.get(devices, devices)
        first = detect(devices, device_memory_bytes)
        if self.num_nodes == 1:
            return first
        question = {"what": "detect", "devices": devices, "device_memory": device_memory_bytes}
        answers = self._ask(question)
        for answer in answers:
            if "error" in answer:
                msg = f"{answer['host']}: {answer['error']}"
                raise NoUsableDeviceError(msg)
        here = NodeFacts.of(self.hosts[0], first, all_versions())
        facts = [here, *map(NodeFacts.from_json, answers)]
        require_alike(facts)
        self._cluster = joined(first, facts)
        return self._cluster

    def require_seen(self, paths: Sequence[Path]) -> None:
        """Refuse what the ranks of another node would not find.

        Raises:
            InputMissingError: a node does not see one of the paths.
        """
        if self.num_nodes == 1:
            return
        for answer in self._ask({"what": "see", "paths": list(map(str, paths))}):
            if answer["missing"]:
                msg = (
                    f"{answer['host']} does not see {', '.join(answer['missing'])}: ranks on all "
                    "nodes read it, so put it on a file system that all see"
                )
                raise InputMissingError(msg)

    def _ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        """Return each other node's answer, in the order of nodes."""
        self._asked += 1
        name = f"ask-{self._asked}"
        write_json(self.directory / f"{name}.json", question)
        deadline = time.monotonic() + _ANSWER_S
        paths = [self.directory / f"{name}-{node}.json" for node in range(1, self.num_nodes)]
        while None in (answers := list(map(read_json, paths))):
            if time.monotonic() > deadline:
                host = self.hosts[1 + answers.index(None)]
                msg = f"{host} has not answered in {self.directory} for {_ANSWER_S:.0f} s"
                raise CannotWriteError(msg)
            time.sleep(POLL_S)
        return answers

    def work(self, arguments: Sequence[str], *, directory: Path, logs: Sequence[Path]) -> Work:
        """Return work for all ranks, as it can be sent to the other nodes and started here."""
        assert self._cluster is not None, "devices are looked for before they are used"
        return new_work(
            arguments,
            nodes=self.num_nodes,
            ranks_a_node=self._cluster.ranks_per_node,
            host=self._address,
            directory=directory,
            logs=logs,
        )

    def send(self, work: Work, directory: Path) -> "Elsewhere":
        """Have the other nodes start the work; `directory` is one of the session, of it alone."""
        write_json(directory / "start", asdict(work))
        return Elsewhere(directory, self._signs, self.hosts)

    def new_directory(self, name: str) -> Path:
        """Return a new directory for work that is sent."""
        directory = self.directory / f"{name}-{uuid.uuid4().hex[:8]}"
        directory.mkdir(mode=0o700)
        return directory

    def close(self, exit_code: int) -> None:
        """Send the other processes home, each with this exit code, and wait until they know."""
        self._closed.set()
        if self._session is None:
            return
        with suppress(CannotWriteError):
            write_json(self._session / "closed", exit_code)
        deadline = time.monotonic() + _GONE_S
        gone = [self._session / f"gone-{rank}" for rank in self._others]
        while not all(path.exists() for path in gone) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        shutil.rmtree(self._session.parent, ignore_errors=True)


class Elsewhere:
    """Work at the other nodes."""

    def __init__(self, directory: Path, signs: dict[int, Sign], hosts: Sequence[str]) -> None:
        self._directory = directory
        self._signs = signs
        self._hosts = hosts
        self._codes: dict[int, int] = {}
        self._unheard: set[int] = set()
        self._looked_s = -math.inf

    def exit_codes(self) -> tuple[int | None, ...]:
        """Return the exit code of each other node's torchrun; of a node that is lost SIGKILL's."""
        if time.monotonic() - self._looked_s > _LOOK_S:
            self._look()
            self._looked_s = time.monotonic()
        return tuple(map(self._codes.get, sorted(self._signs)))

    def _look(self) -> None:
        for node in self._signs.keys() - self._codes.keys():
            code = exit_code_in(self._directory / f"node-{node}.exit")
            if code is None and node in self._lost():
                code = -signal.SIGKILL
            if code is not None:
                self._codes[node] = code

    def _lost(self) -> list[int]:
        silent = {node for node, sign in self._signs.items() if sign.seconds() > LOST_S}
        return sorted(silent | self._unheard)

    def lost(self) -> tuple[str, ...]:
        """Name the nodes that have not been seen for long, or did not say that work was over."""
        return tuple(self._hosts[node] for node in self._lost())

    def end(self, *, patience_s: float = 0.0) -> None:
        """End the work, after `patience_s` in which it may end by itself.

        A node that does not say so in time is lost.
        """
        self._wait(patience_s)
        write_text(self._directory / "stop", "")
        self._wait(SEEN_S)
        self._unheard |= self._signs.keys() - self._codes.keys()

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while None in self.exit_codes() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def require_there(self) -> None:
        """Stop where a node is lost: nothing can be measured or trained without it.

        Raises:
            InterruptedRunError: with the names of the lost.
        """
        if names := self.lost():
            msg = (
                f"{', '.join(names)} is lost: it is not seen in {self._directory.parent}; what is "
                "done is saved, and the same command goes on from there when it is back"
            )
            raise InterruptedRunError(msg)


def alone(ranks: int | None) -> Nodes:
    """Return the nodes of a process that was started as the only one."""
    host = os.uname().nodename
    return Nodes(None, hosts=(host,), members={}, others=(), address=host, ranks=ranks)


def gather(
    directory: Path, size: int, node: int | None, host: str | None, ranks: int | None
) -> Nodes:
    """Wait for all other processes of a launch, and give each its part.

    Args:
        directory: of the launch, which all nodes see.
        size: how many processes there are.
        node: of this process, as the launcher numbers nodes; None where it does not.
        host: a name of this node that the others reach; None is not known.
        ranks: that the launcher wants on each node, None as many as it started there.

    Raises:
        CannotWriteError: not all are seen in the directory.
        NoUsableDeviceError: there are not as many on each node.
    """
    with writing(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in (*directory.glob("hello-*"), *directory.glob("welcome*")):
        path.unlink(missing_ok=True)
    _clear_away_killed(directory.parent)
    hellos = {0: hello_of_this_process(node)} | _wait_for_hellos(directory, size)
    found = parts(hellos)
    counts = [0] * (1 + max(part.node for part in found.values()))
    for part in found.values():
        counts[part.node] += 1
    session = directory / f"session-{uuid.uuid4().hex[:8]}"
    session.mkdir(mode=0o700)
    beat(session / "alive")
    welcome = {
        str(rank): {"nonce": hellos[rank].nonce, "part": asdict(found[rank])} for rank in hellos
    }
    write_json(directory / "welcome.json", {"session": session.name, "parts": welcome})
    os.sched_setaffinity(0, found[0].cpus)
    servants = {rank: part.node for rank, part in found.items() if part.serves and rank}
    hosts = [hellos[rank].name for rank in (0, *sorted(servants))]
    nodes = Nodes(
        session,
        hosts=tuple(hosts),
        members=servants,
        others=tuple(rank for rank in hellos if rank),
        address=_address(hellos, host),
        ranks=ranks if ranks or counts[0] == 1 else counts[0],
    )
    if len(set(counts)) > 1:
        told = ", ".join(f"{name} {count}" for name, count in zip(hosts, counts, strict=True))
        msg = (
            f"the nodes differ: the processes of this launch are {told}, and ranks are as many on "
            "each: start the same number on each node"
        )
        nodes.close(NoUsableDeviceError.exit_code)
        raise NoUsableDeviceError(msg)
    return nodes


def _clear_away_killed(beside: Path) -> None:
    """Remove what launches have left that were killed, and have not been seen for an hour."""
    for path in beside.glob(".nodes-*"):
        with suppress(OSError):
            signs = [sign.stat().st_mtime for sign in path.glob("session-*/alive")]
            if signs and time.time() - max(signs) > _FORGOTTEN_S:
                shutil.rmtree(path, ignore_errors=True)


def _wait_for_hellos(directory: Path, size: int) -> dict[int, Hello]:
    deadline = time.monotonic() + MEETING_S
    paths = {rank: directory / f"hello-{rank}.json" for rank in range(1, size)}
    while True:
        found = {rank: read_json(path) for rank, path in paths.items()}
        missing = [rank for rank, hello in found.items() if hello is None]
        if not missing:
            return {rank: Hello.from_json(hello) for rank, hello in found.items()}
        if time.monotonic() > deadline:
            who = f"process {missing[0]} of {size}"
            raise CannotWriteError(not_shared(directory, who))
        time.sleep(POLL_S)


def _address(hellos: dict[int, Hello], host: str | None) -> str:
    """Return a name or address of this node that the others reach."""
    elsewhere = [hello.host for hello in hellos.values() if hello.machine != hellos[0].machine]
    if not elsewhere:
        return "127.0.0.1"
    if host is not None and not _is_loopback(host):
        return host
    if not _is_loopback(hellos[0].host):
        return hellos[0].host
    with suppress(OSError):
        return address_towards(elsewhere[0])
    return hellos[0].host


def _is_loopback(host: str) -> bool:
    """Whether a name leads nowhere but to this machine itself, or is not known."""
    try:
        return all(
            re.match(r"127\.|::1$", str(entry[4][0])) for entry in socket.getaddrinfo(host, None)
        )
    except OSError:
        return True

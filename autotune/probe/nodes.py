"""Ranks on several nodes: a torchrun agent on each, and files that all nodes see.

The controller is one of the nodes. On each of the others, started by srun or by hand with the same
environment as on the controller's, runs `python -m autotune.probe.nodes DIRECTORY NODE`, NODE
counting from 1. It follows the controller from probe to probe through DIRECTORY:

    alive                 touched by the controller while it lives
    probe-X/request.json  what a probe is to do; its ranks answer beside it
    probe-X/start         the command for torchrun, written last; each node adds its own rank
    probe-X/node-1.exit   the exit code of that node's torchrun
    probe-X/stop          the probe is over
    closed                there will be no more probes
"""

import argparse
import signal
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from autotune import processes
from autotune.environment import rank_environment
from autotune.errors import CannotWriteError
from autotune.probe.launch import Errand, Ranks, write_request
from autotune.rundir import read_json, write_json, write_text

_POLL_S = 0.1
_ALIVE_S = 5.0
# Attributes of files are cached on network file systems, by default for up to a minute (nfs(5)).
_LOST_S = 180.0
_SEEN_S = 90.0


class TorchrunLauncher:
    """Starts a torchrun agent on this node, and through files one on each of the others.

    Args:
        directory: seen by all nodes.
        nodes: how many there are, this one counted.
        ranks_a_node: ranks on each.
        endpoint: host:port of this node, free, for torchrun's rendezvous.
    """

    def __init__(self, directory: Path, *, nodes: int, ranks_a_node: int, endpoint: str) -> None:
        self.directory = directory
        self._nodes = nodes
        self._ranks_a_node = ranks_a_node
        self._endpoint = endpoint
        self._closed = threading.Event()
        threading.Thread(target=self._stay_alive, daemon=True).start()

    def _stay_alive(self) -> None:
        while not self._closed.wait(_ALIVE_S):
            write_text(self.directory / "alive", str(time.time()))

    def close(self) -> None:
        """Send the other nodes home."""
        self._closed.set()
        write_text(self.directory / "closed", "")

    def start(self, errand: Errand) -> Ranks:
        assert errand.request.ranks == self._nodes * self._ranks_a_node, "a rank for each device"
        command = [
            "-m",
            "torch.distributed.run",
            f"--nnodes={self._nodes}",
            f"--nproc-per-node={self._ranks_a_node}",
            "--max-restarts=0",
            "--rdzv-backend=c10d",
            f"--rdzv-id={uuid.uuid4().hex}",
            f"--rdzv-endpoint={self._endpoint}",
            "-m",
            "autotune.probe.rank",
            str(errand.directory),
            "--torchrun",
        ]
        write_request(errand)
        write_json(errand.directory / "start", command)
        agent = _start_agent(errand.directory, errand.logs[0])
        return _NodeRanks(agent, errand, self._nodes)


@dataclass(frozen=True, slots=True)
class _NodeRanks:
    """Torchrun tells only that a rank failed; why is in the answers and logs."""

    _agent: processes.ColdProcess
    _errand: Errand
    _nodes: int

    def wait(self, timeout_s: float) -> None:
        processes.wait_for_any([self._agent] if self._agent.exitcode is None else [], timeout_s)

    def exit_codes(self) -> tuple[int | None, ...]:
        codes = [self._agent.exitcode, *map(self._exit_code_of, range(1, self._nodes))]
        ranks_a_node = self._errand.request.ranks // self._nodes
        return tuple(code for code in codes for _ in range(ranks_a_node))

    def _exit_code_of(self, node: int) -> int | None:
        code = read_json(self._errand.directory / f"node-{node}.exit")
        return code if isinstance(code, int) else None

    def end(self) -> None:
        write_text(self._errand.directory / "stop", "")
        processes.end([self._agent])
        deadline = time.monotonic() + _SEEN_S
        while any(self._exit_code_of(node) is None for node in range(1, self._nodes)):
            if time.monotonic() > deadline:
                msg = (
                    f"a node does not see {self._errand.directory}, or its agent is gone: start "
                    "`python -m autotune.probe.nodes` on each node, with a directory that all see"
                )
                raise CannotWriteError(msg)
            time.sleep(_POLL_S)


def follow(directory: Path, node: int) -> None:
    """Serve the controller as one of its nodes, until it closes or has not been seen for long."""
    sign = _Sign(directory / "alive")
    served: set[Path] = set()
    while not (directory / "closed").exists() and sign.seconds() < _LOST_S:
        for start in sorted(directory.glob("probe-*/start")):
            if start.parent not in served:
                served.add(start.parent)
                _serve(start.parent, node, sign)
        time.sleep(_POLL_S)


def _serve(probe: Path, node: int, sign: "_Sign") -> None:
    agent = _start_agent(probe, probe / f"node-{node}.log")
    while agent.exitcode is None and not (probe / "stop").exists() and sign.seconds() < _LOST_S:
        processes.wait_for_any([agent], _POLL_S)
    processes.end([agent])
    # The probe's directory goes once every node has said that it is done.
    write_json(probe / f"node-{node}.exit", agent.exitcode)


def _start_agent(probe: Path, log: Path) -> processes.ColdProcess:
    """Start torchrun as the probe says, in the environment that ranks have on this node."""
    command, request = read_json(probe / "start"), read_json(probe / "request.json")
    kind = request["spec"]["device_kind"]
    # What this node's ranks may see of its devices is its own business.
    environment = {**rank_environment("cpu", ()), "DS_ACCELERATOR": kind}
    return processes.ColdProcess(
        [sys.executable, "-m", "autotune.train.leash", sys.executable, *command],
        log=log,
        environment={**environment, "TMPDIR": str(processes.temporary_dir())},
    )


class _Sign:
    """How long ago, by this node's own clock, a file was last written anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = ""
        self._changed = time.monotonic()

    def seconds(self) -> float:
        content = self._path.read_text() if self._path.exists() else ""
        if content != self._content:
            self._content, self._changed = content, time.monotonic()
        return time.monotonic() - self._changed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="autotune.probe.nodes", description=__doc__)
    parser.add_argument("directory", type=Path, help="seen by all nodes")
    parser.add_argument("node", type=int, help="1 for the first node beside the controller's")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    follow(options.directory, options.node)


def _stop(number: int, frame: object) -> None:
    del frame
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()

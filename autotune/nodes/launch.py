"""Starts the ranks of a probe on all nodes: a torchrun on each, whose ranks meet at the first."""

from dataclasses import dataclass

from autotune import processes
from autotune.hardware import Cluster
from autotune.nodes.control import Elsewhere, Nodes
from autotune.nodes.work import start_torchrun
from autotune.probe.launch import Errand, Ranks, write_request


class TorchrunLauncher:
    """Starts torchrun here, and through files one on each of the other nodes.

    Errands are in directories of the nodes' own (`Nodes.directory`).
    """

    def __init__(self, nodes: Nodes, cluster: Cluster) -> None:
        self._nodes = nodes
        self._cluster = cluster

    def start(self, errand: Errand) -> Ranks:
        a_node = self._cluster.ranks_per_node
        assert errand.request.ranks == self._cluster.num_devices, "a rank for each device"
        write_request(errand)
        work = self._nodes.work(
            ["-m", "autotune.probe.rank", str(errand.directory), "--torchrun"],
            directory=errand.directory,
            # What ranks say is in the log of their node's first.
            logs=errand.logs[::a_node],
        )
        elsewhere = self._nodes.send(work, errand.directory)
        kind, visible = self._cluster.kind, self._cluster.visible_devices
        return _NodeRanks(start_torchrun(work, 0, kind, visible), elsewhere, a_node)


@dataclass(frozen=True, slots=True)
class _NodeRanks:
    """Torchrun tells only that a rank failed; why is in the answers and logs."""

    _torchrun: processes.ColdProcess
    _elsewhere: Elsewhere
    _ranks_a_node: int

    def wait(self, timeout_s: float) -> None:
        running = [self._torchrun] if self._torchrun.exitcode is None else []
        processes.wait_for_any(running, timeout_s)

    def exit_codes(self) -> tuple[int | None, ...]:
        codes = [self._torchrun.exitcode, *self._elsewhere.exit_codes()]
        return tuple(code for code in codes for _ in range(self._ranks_a_node))

    def end(self) -> None:
        processes.end([self._torchrun])
        self._elsewhere.end()
        self._elsewhere.require_there()

"""Measures the ranks of all nodes together."""

import textwrap
import time
from dataclasses import asdict
from typing import Any

from autotune import processes
from autotune.errors import SetupFaultError
from autotune.hardware import Bench, Cluster
from autotune.nodes.control import Nodes
from autotune.nodes.work import start_torchrun
from autotune.rundir import read_json

_LIMIT_S = 600.0
_POLL_S = 0.25
_MOST_CHARACTERS = 500


def bench_of_all(nodes: Nodes, cluster: Cluster) -> dict[str, Any]:
    """Measure the ranks of all nodes while all are busy; returns the bench as JSON.

    Raises:
        SetupFaultError: the ranks do not meet, or torch cannot use the devices.
        InterruptedRunError: a node is lost.
    """
    directory = nodes.new_directory("bench")
    logs = [directory / f"node-{node}.log" for node in range(cluster.num_nodes)]
    program = ["-m", "autotune.profile.bench", str(directory), cluster.kind]
    work = nodes.work([*program, str(cluster.threads_per_rank)], directory=directory, logs=logs)
    elsewhere = nodes.send(work, directory)
    torchrun = start_torchrun(work, 0, cluster.kind, cluster.visible_devices)
    deadline = time.monotonic() + _LIMIT_S
    try:
        while time.monotonic() < deadline:
            codes = (torchrun.exitcode, *elsewhere.exit_codes())
            if None not in codes or any(codes):
                break
            processes.wait_for_any([torchrun] if torchrun.exitcode is None else [], _POLL_S)
            time.sleep(_POLL_S)
    finally:
        processes.end([torchrun])
        elsewhere.end()
    elsewhere.require_there()
    paths = [directory / f"bench-{rank}.json" for rank in range(cluster.num_devices)]
    answers = [read_json(path) or {} for path in paths]
    for answer in (*(one for one in answers if "error" in one), *answers):
        if "ranks" not in answer:
            why = answer.get("error") or " ".join(logs[0].read_text(errors="replace").split()[-60:])
            msg = (
                f"cannot measure the ranks of all nodes: {textwrap.shorten(why, _MOST_CHARACTERS)}"
            )
            raise SetupFaultError(msg)
    return asdict(Bench.slowest([Bench.from_json(answer) for answer in answers]))

"""One torchrun a node for the same work: what it is told, and how it is started on each."""

import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune import processes
from autotune.environment import rank_environment

_ANY_PORT = 9
"""Nothing is sent to it: what is asked is only which way it would go."""

SIGNALS = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT"}
"""Without those that Slurm sends to all processes of a step as a warning.

Ranks take them for a wish to save and end, for which they may need longer than a torchrun waits
that was told as well.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What torchrun is to run on all nodes, whose ranks meet at the first.

    Attributes:
        arguments: of torchrun, from what it is to start on.
        host: of the rendezvous, as all nodes reach it.
        port: there, free.
        directory: that ranks run in, seen by all nodes.
        logs: a file a node.
    """

    arguments: tuple[str, ...]
    nodes: int
    ranks_a_node: int
    host: str
    port: int
    name: str
    directory: str
    logs: tuple[str, ...]

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Work":
        texts = {name: tuple(fields[name]) for name in ("arguments", "logs")}
        return cls(**{**fields, **texts})


def new_work(
    arguments: Sequence[str],
    *,
    nodes: int,
    ranks_a_node: int,
    host: str,
    directory: Path,
    logs: Sequence[Path],
) -> Work:
    """Return work whose ranks meet at a port of this node that is free."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    return Work(
        arguments=tuple(arguments),
        nodes=nodes,
        ranks_a_node=ranks_a_node,
        host=host,
        port=port,
        name=uuid.uuid4().hex,
        directory=str(directory),
        logs=tuple(map(str, logs)),
    )


def torchrun_of(work: Work, node: int) -> list[str]:
    """Return the command that starts a node's ranks; the first node, 0, has the rendezvous."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={work.nodes}",
        f"--nproc-per-node={work.ranks_a_node}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        f"--rdzv-id={work.name}",
        f"--rdzv-endpoint={work.host}:{work.port}",
        f"--rdzv-conf=is_host={'true' if node == 0 else 'false'}",
        # The ranks meet at the node of rank 0, by a name of it that others may not know.
        f"--local-addr={work.host if node == 0 else address_towards(work.host)}",
        *work.arguments,
    ]


def address_towards(host: str) -> str:
    """Return the address of this node that a host sees it by.

    Raises:
        OSError: the host is not known here, or there is no way to it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, _ANY_PORT, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as way:
        way.connect(address)
        return str(way.getsockname()[0])


def start_torchrun(
    work: Work, node: int, kind: str, visible_devices: tuple[str, ...]
) -> processes.ColdProcess:
    """Start a node's torchrun, in the environment that ranks have there; it dies with this."""
    environment = rank_environment(kind, visible_devices) | SIGNALS
    return processes.ColdProcess(
        [sys.executable, "-m", "autotune.train.leash", *torchrun_of(work, node)],
        log=Path(work.logs[node]),
        environment={**environment, "TMPDIR": str(processes.temporary_dir())},
        directory=Path(work.directory),
    )

"""Which part a process has among those that a launcher started. Pure: all is in the environment.

Of processes that torchrun, MPI, srun or Kubernetes starts one is the controller, that of rank 0.
The first of each other node serves it there, and whatever else was started waits for its end. In a
Slurm allocation of several nodes, outside of any step, they have yet to be started.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

_INTERACTIVE_STEP = "4294967290"
"""What a shell of salloc on the first node is a step of; it is no step that somebody started."""

_RANKS = (
    # As torch.distributed has it; what MPIs and Slurm set may be there besides.
    ("RANK", "WORLD_SIZE", "GROUP_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ""),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID"),
    ("PMI_RANK", "PMI_SIZE", ""),
    ("PET_NODE_RANK", "PET_NNODES", "PET_NODE_RANK"),
)
"""Variables of a process's place among all, of their number, and of its node where that has one.

The first that are there count."""

_NAMES = (
    *("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"),
    *("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    *("PET_RDZV_ID", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
)
"""Variables that are the same for the processes of a launch, and of others are not."""

_OF_LAUNCHERS = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|NODE_RANK"
    r"|ROLE_RANK|ROLE_NAME|ROLE_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|SLURM_PROCID|SLURM_LOCALID"
    r"|SLURM_NODEID|SLURM_STEP_NUM_TASKS|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING"
    r"|PET_.*|OMPI_.*|PMI_.*|PMIX_.*|PRTE_.*|HYDI?_.*|MPI_LOCAL.*|MV2_COMM_.*"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """Nobody else was started.

    Attributes:
        ranks: that Kubernetes asks for on this node; None leaves it to the devices.
    """

    ranks: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocated:
    """In a Slurm allocation of several nodes, where a process on each has yet to be started."""

    nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of several processes of a launch.

    Attributes:
        rank: its place among all; 0 is the controller.
        size: how many they are.
        node: the number of its node; None is not told, and hosts tell nodes apart.
        launch: a name that processes of the same launch agree on.
        host: a name of the controller's node that the others reach; None is not told.
        ranks: as of `Alone`.
    """

    rank: int
    size: int
    node: int | None
    launch: str
    host: str | None = None
    ranks: int | None = None


Standing = Alone | Allocated | Member


def standing(environment: Mapping[str, str]) -> Standing:
    """Read which part this process has."""
    ranks = _number(environment, "PET_NPROC_PER_NODE") if "RANK" not in environment else None
    for rank_name, size_name, node_name in _RANKS:
        rank, size = _number(environment, rank_name), _number(environment, size_name)
        if rank is None or size is None:
            continue
        if size > 1 and rank < size:
            return Member(
                rank=rank,
                size=size,
                node=_number(environment, node_name),
                launch=_launch(environment),
                host=environment.get("MASTER_ADDR") or environment.get("PET_MASTER_ADDR"),
                ranks=ranks,
            )
        if not (size_name.startswith("SLURM") and _is_interactive(environment)):
            # Started as the only one, wherever that is.
            return Alone(ranks=ranks)
    nodes = _number(environment, "SLURM_JOB_NUM_NODES") or _number(environment, "SLURM_NNODES")
    if "SLURM_JOB_ID" in environment and nodes is not None and nodes > 1:
        return Allocated(nodes=nodes)
    return Alone(ranks=ranks)


def _is_interactive(environment: Mapping[str, str]) -> bool:
    return environment.get("SLURM_STEP_ID") == _INTERACTIVE_STEP


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Return a whole number; None where it is not there or is none, as of `auto` or `1:4`."""
    text = environment.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None


def _launch(environment: Mapping[str, str]) -> str:
    facts = repr([environment.get(name) for name in _NAMES])
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def of_launchers(environment: Mapping[str, str]) -> list[str]:
    """Name the variables of a launcher, which ranks started from here must not take for theirs."""
    return [name for name in environment if _OF_LAUNCHERS.fullmatch(name)]


def step_command(nodes: int, command: list[str]) -> list[str]:
    """Return what starts a command once on each node of the allocation, as one step of it."""
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"),
        # A process that is lost on one node ends the step; ranks choose their CPUs themselves.
        *("--kill-on-bad-exit=1", "--cpu-bind=none", "--mpi=none", "--input=none"),
        *command,
    ]

"""Which part a process has, from environments as launchers leave them."""

import pytest

from autotune.standing import Allocated, Alone, Member, of_launchers, standing, step_command

PLAIN = {"PATH": "/bin", "HOME": "/root", "OMP_NUM_THREADS": "1"}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "3",
    "ROLE_WORLD_SIZE": "4",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "40001",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
}
STEP = BATCH | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "4167499777",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
KUBERNETES = {
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
}


def member(environment: dict[str, str]) -> Member:
    found = standing(PLAIN | environment)
    assert isinstance(found, Member)
    return found


@pytest.mark.parametrize(
    ("environment", "rank", "size", "node", "host"),
    [
        (TORCHRUN, 3, 4, 1, "n1"),
        (STEP, 2, 4, 1, None),
        (OPEN_MPI, 1, 2, None, None),
        (HYDRA, 1, 2, None, None),
        (KUBERNETES, 1, 2, 1, "job-node-0-0.job"),
        # What a launcher was itself started by does not count.
        (STEP | TORCHRUN, 3, 4, 1, "n1"),
        (STEP | OPEN_MPI, 1, 2, None, None),
        (KUBERNETES | TORCHRUN, 3, 4, 1, "n1"),
    ],
)
def test_one_of_several_processes_knows_its_place(
    environment: dict[str, str], rank: int, size: int, node: int | None, host: str | None
) -> None:
    found = member(environment)

    assert (found.rank, found.size, found.node, found.host) == (rank, size, node, host)


def test_kubernetes_says_how_many_ranks_a_node_has_and_torchrun_starts_them() -> None:
    assert member(KUBERNETES).ranks == 8
    assert member(KUBERNETES | {"PET_NPROC_PER_NODE": "auto"}).ranks is None
    assert standing(KUBERNETES | {"PET_NNODES": "1", "PET_NODE_RANK": "0"}) == Alone(ranks=8)
    assert member(KUBERNETES | TORCHRUN).ranks is None


@pytest.mark.parametrize("environment", [TORCHRUN, STEP, OPEN_MPI, KUBERNETES])
def test_processes_of_a_launch_agree_on_its_name_and_others_do_not(
    environment: dict[str, str],
) -> None:
    ranks = {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PET_NODE_RANK"} & environment.keys()
    first = environment | dict.fromkeys(ranks, "0")
    names = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "PET_MASTER_ADDR")
    other = environment | {name: "other" for name in names if name in environment}

    assert member(first).launch == member(environment).launch != member(other).launch


def test_a_batch_script_of_several_nodes_has_yet_to_start_its_processes() -> None:
    assert standing(PLAIN | BATCH) == Allocated(nodes=2)
    interactive = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    assert standing(PLAIN | BATCH | interactive) == Allocated(nodes=2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH | {"SLURM_JOB_NUM_NODES": "1"},
        STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"},
        {"RANK": "0"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"PET_NNODES": "1:4", "PET_NODE_RANK": "0"},
    ],
)
def test_whoever_is_the_only_one_is_alone(environment: dict[str, str]) -> None:
    assert standing(PLAIN | environment) == Alone()


def test_what_launchers_set_is_known_and_nothing_else() -> None:
    everything = PLAIN | TORCHRUN | STEP | OPEN_MPI | HYDRA | KUBERNETES
    kept = everything.keys() - set(of_launchers(everything))

    assert kept >= PLAIN.keys()
    assert kept >= {"SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_STEP_ID"}
    gone = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE", "PET_NNODES"}
    gone |= {"SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMIX_NAMESPACE"}
    assert not kept & gone
    assert standing({name: everything[name] for name in kept if "SLURM" not in name}) == Alone()


def test_a_step_has_a_process_a_node() -> None:
    command = step_command(3, ["python", "autotune", "run", "--dataset", "a b"])

    assert command[0] == "srun"
    assert {"--nodes=3", "--ntasks=3", "--ntasks-per-node=1"} < set(command)
    assert command[-5:] == ["python", "autotune", "run", "--dataset", "a b"]

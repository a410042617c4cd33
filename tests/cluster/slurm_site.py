"""A real Slurm of two nodes on this machine, as root, without systemd and cgroups."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")

CONFIG = """
ClusterName=submit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=5
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


@contextmanager
def two_nodes(directory: Path) -> Iterator[Path]:
    """Start a Slurm of two nodes; its clients find it through SLURM_CONF."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if os.geteuid() or missing:
        pytest.skip(f"needs root, and the Debian packages slurm-wlm and munge: {missing}")
    _write_site(directory)
    daemons: list[subprocess.Popen[bytes]] = []
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(directory / "slurm.conf")

    def start(name: str, *arguments: object) -> None:
        with (directory / f"{name}.log").open("ab") as log:
            program = [name, *map(str, arguments)]
            daemons.append(subprocess.Popen(program, stdout=log, stderr=log))

    try:
        munge = [
            f"--{name}-file={directory}/munge.{name}" for name in ("key", "log", "pid", "seed")
        ]
        start("munged", "--foreground", "--force", f"--socket={directory}/munge.sock", *munge)
        wait_for((directory / "munge.sock").exists)
        start("slurmctld", "-D", "-f", directory / "slurm.conf")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-f", directory / "slurm.conf", "-N", node)
        wait_for(lambda: ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
        yield directory
    finally:
        subprocess.run(["scancel", "--full", "-u", "root"], check=False, timeout=30)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def _write_site(directory: Path) -> None:
    for name in ("state", "spool", "spool/n1", "spool/n2"):
        (directory / name).mkdir()
    host = os.uname().nodename.partition(".")[0]
    config = CONFIG.format(host=host, ports=_free_ports(3), directory=directory)
    (directory / "slurm.conf").write_text(config)
    for place in range(2):
        (directory / f"fake{place}").touch()
    gres = f"NodeName=n[1-2] Name=gpu File={directory}/fake[0-1]\n"
    (directory / "gres.conf").write_text(gres)
    (directory / "munge.key").write_bytes(os.urandom(1024))
    (directory / "munge.key").chmod(0o400)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_for(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


def ask(*command: object, check: bool = False) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=check, timeout=60
    )
    return done.stdout


def state_of(job: str) -> str:
    return ask("squeue", "-h", "-j", job, "-t", "all", "-o", "%T").strip()

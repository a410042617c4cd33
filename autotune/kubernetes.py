"""Manifests for Kubernetes: a TrainJob of Kubeflow Trainer with its runtime, or a JobSet.

Exit codes decide what follows a failure. What another try cannot help fails the job at once; what
saved its state, lost its node or found no device is started anew, all nodes together.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autotune.errors import (
    AutotuneError,
    CannotWriteError,
    ConfigError,
    DatasetError,
    InputMissingError,
    NothingFitsError,
    SetupFaultError,
    TrainingFailedError,
    UsageError,
)

Kind = Literal["trainjob", "jobset"]

_FINAL_ERRORS = (
    AutotuneError,
    CannotWriteError,
    ConfigError,
    DatasetError,
    InputMissingError,
    NothingFitsError,
    SetupFaultError,
    TrainingFailedError,
    UsageError,
)
FINAL_EXIT_CODES = sorted(error.exit_code for error in _FINAL_ERRORS)
"""What ends with these would end so again."""

_CONTAINER = "node"
"""Its job is called so too; Kubeflow's own torch runtime has these names."""

_PORT = 29400
_NAME_LENGTH = 40
"""Pods and hosts are called after a job, with more behind it, in at most 63 characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodJob:
    """What is asked of Kubernetes; what is None is left out.

    Attributes:
        name: of the job, a DNS label.
        image: of the container, which has autotune in it.
        nodes: pods, one a node.
        grace_s: seconds between the order to stop and the kill, in which state is saved.
        max_restarts: how often all nodes are started anew.
        namespace: that it goes to.
        gpus_per_node, cpus_per_node, memory_per_node: of each pod.
        limit_s: seconds that it may take.
        volumes: claims of volumes that all nodes mount, each with its path.
        directory: that the command runs in.
    """

    name: str
    image: str
    nodes: int
    grace_s: int
    max_restarts: int
    namespace: str | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    limit_s: int | None = None
    volumes: tuple[tuple[str, str], ...] = ()
    directory: str | None = None


def dns_label(text: str) -> str:
    """Return a name that Kubernetes takes, as near to the text as may be.

    Raises:
        ValueError: the text has no letter or digit to make one of.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower())[:_NAME_LENGTH].strip("-")
    if not plain:
        msg = f"{text!r} has nothing that the name of a job in Kubernetes can have"
        raise ValueError(msg)
    return plain if plain[0].isalpha() else f"a-{plain}"[:_NAME_LENGTH].rstrip("-")


def manifests(kind: Kind, job: PodJob, command: Sequence[str]) -> list[dict[str, Any]]:
    """Return the documents that run a command on all nodes.

    Of words that Kubernetes would put a variable into, `$(NAME)`, the dollar sign is doubled, which
    has them taken as they are.
    """
    command = [word.replace("$(", "$$(") for word in command]
    if kind == "jobset":
        return [_job_set(job, command)]
    return [_runtime(job), _train_job(job, command)]


def _job_set(job: PodJob, command: Sequence[str]) -> dict[str, Any]:
    first = f"{job.name}-{_CONTAINER}-0-0.{job.name}"
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environment: list[dict[str, Any]] = [
        {"name": "PET_NNODES", "value": str(job.nodes)},
        {"name": "PET_NPROC_PER_NODE", "value": str(job.gpus_per_node or "auto")},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
        {"name": "PET_MASTER_ADDR", "value": first},
        {"name": "PET_MASTER_PORT", "value": str(_PORT)},
    ]
    container = {
        "image": job.image,
        "command": list(command),
        "env": environment,
        **_resources("resources", job),
    }
    spec = _set_spec(job, container)
    if job.limit_s is not None:
        spec["replicatedJobs"][0]["template"]["spec"]["activeDeadlineSeconds"] = job.limit_s
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job),
        "spec": spec,
    }


def _runtime(job: PodJob) -> dict[str, Any]:
    """Return the runtime that the TrainJob names: what a TrainJob itself cannot say."""
    spec = _set_spec(job, {"image": job.image})
    # By this label Trainer finds what it sets nodes, command and PET_* of.
    labels = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    spec["replicatedJobs"][0]["template"]["metadata"] = {"labels": labels}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(job),
        "spec": {"mlPolicy": {"numNodes": job.nodes, "torch": {}}, "template": {"spec": spec}},
    }


def _train_job(job: PodJob, command: Sequence[str]) -> dict[str, Any]:
    processes = {"numProcPerNode": job.gpus_per_node} if job.gpus_per_node else {}
    limit = {"activeDeadlineSeconds": job.limit_s} if job.limit_s is not None else {}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job),
        "spec": {
            "runtimeRef": {"kind": "TrainingRuntime", "name": job.name},
            "trainer": {
                "command": list(command),
                "numNodes": job.nodes,
                **processes,
                **_resources("resourcesPerNode", job),
            },
            **limit,
        },
    }


def _metadata(job: PodJob) -> dict[str, Any]:
    namespace = {"namespace": job.namespace} if job.namespace else {}
    return {"name": job.name, **namespace}


def _resources(key: str, job: PodJob) -> dict[str, Any]:
    asked = {
        "nvidia.com/gpu": job.gpus_per_node,
        "cpu": job.cpus_per_node,
        "memory": job.memory_per_node,
    }
    amounts = {name: str(amount) for name, amount in asked.items() if amount}
    return {key: {"limits": amounts, "requests": dict(amounts)}} if amounts else {}


def _set_spec(job: PodJob, container: dict[str, Any]) -> dict[str, Any]:
    """Return the JobSet's spec: one Job with a pod a node, and what follows its failures."""
    volumes = [
        {"name": f"volume-{place}", "persistentVolumeClaim": {"claimName": claim}}
        for place, (claim, _) in enumerate(job.volumes)
    ]
    mounts = [
        {"name": f"volume-{place}", "mountPath": path}
        for place, (_, path) in enumerate(job.volumes)
    ]
    # Ranks of a node talk through it, and 64 MiB is what a container has by default.
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108 - that is its name
    directory = {"workingDir": job.directory} if job.directory else {}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [{"name": _CONTAINER, **container, **directory, "volumeMounts": mounts}],
        "volumes": volumes,
    }
    job_spec = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        # A node that fails ends the others, as they cannot go on without it.
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": _CONTAINER,
                        "operator": "In",
                        "values": list(FINAL_EXIT_CODES),
                    },
                }
            ]
        },
        "template": {"spec": pod},
    }
    return {
        "failurePolicy": {
            "maxRestarts": job.max_restarts,
            "rules": [
                {
                    "name": "final",
                    "action": "FailJobSet",
                    "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                }
            ],
        },
        "network": {"enableDNSHostnames": True},
        "replicatedJobs": [{"name": _CONTAINER, "replicas": 1, "template": {"spec": job_spec}}],
    }

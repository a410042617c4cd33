"""Nodes that are held against each other, and the parts that processes of a launch have."""

from dataclasses import replace
from typing import Any

import pytest
from records import make_cluster

from autotune.errors import AutotuneError, NoUsableDeviceError, SetupFaultError
from autotune.hardware import Device
from autotune.nodes.facts import NodeFacts, joined, require_alike
from autotune.nodes.session import Hello, Part, parts
from autotune.units import GIB

VERSIONS = {"autotune": "1", "python": "3.11", "torch": "2.13"}


def facts(host: str, **changes: Any) -> NodeFacts:  # noqa: ANN401 - fields of a NodeFacts
    return replace(NodeFacts.of(host, make_cluster(gpus=8), VERSIONS), **changes)


def test_alike_nodes_are_one_cluster_with_the_least_that_one_of_them_has() -> None:
    first = make_cluster(gpus=8, memory_bytes=70 * GIB)
    nodes = [
        NodeFacts.of("n1", first, VERSIONS),
        facts("n2", budget_bytes=60 * GIB, threads_per_rank=3),
        facts("n3", budget_bytes=65 * GIB),
    ]

    require_alike(nodes)
    cluster = joined(first, nodes)

    assert (cluster.num_devices, cluster.num_nodes, cluster.ranks_per_node) == (24, 3, 8)
    assert cluster.device_memory_bytes == 60 * GIB
    assert "n2" in cluster.device_memory_source
    assert cluster.threads_per_rank == 3
    assert cluster.visible_devices == first.visible_devices
    assert (
        NodeFacts.from_json({name: getattr(nodes[1], name) for name in NodeFacts.__slots__})
        == (nodes[1])
    )


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"device_name": "H100-80GB"}, NoUsableDeviceError, ("Example GPU", "H100-80GB")),
        ({"num_devices": 4}, NoUsableDeviceError, ("8 x Example GPU", "4 x Example GPU")),
        ({"memory_bytes": 256 * GIB}, NoUsableDeviceError, ("512", "256")),
        ({"versions": VERSIONS | {"torch": "2.12"}}, SetupFaultError, ("torch 2.13", "2.12")),
        (
            {"versions": {"autotune": "1", "python": "3.11"}},
            SetupFaultError,
            ("torch 2.13", "none"),
        ),
    ],
)
def test_nodes_that_differ_are_named_in_a_sentence(
    changes: dict[str, Any], kind: type[AutotuneError], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        require_alike([facts("n1"), facts("n2"), facts("n3", **changes)])

    said = str(caught.value)
    assert all(word in said for word in ("n1", "n3", *words))
    assert "n2" not in said


def test_a_little_less_memory_is_no_difference() -> None:
    require_alike([facts("n1"), facts("n2", memory_bytes=500 * GIB)])


def test_of_gpus_the_smallest_counts_and_not_the_host() -> None:
    devices = tuple(
        Device(index=place, uuid=None, name="x", memory_bytes=size * GIB, free_bytes=None)
        for place, size in enumerate((80, 79))
    )
    cluster = replace(make_cluster(gpus=2), devices=devices)

    assert NodeFacts.of("n", cluster, VERSIONS).memory_bytes == 79 * GIB


def test_what_cannot_be_used_on_one_node_cannot_be_used() -> None:
    first = make_cluster(gpus=8)
    nodes = [NodeFacts.of("n1", first, VERSIONS), facts("n2", unusable="torch is built without")]

    assert joined(first, nodes).unusable == "n2: torch is built without"


def hello(machine: str, node: int | None, *cpus: int) -> Hello:
    return Hello(nonce="", host=machine, name=machine, machine=machine, node=node, cpus=cpus)


def test_the_first_process_of_each_node_serves_it_with_the_processors_of_all_there() -> None:
    hellos = {
        0: hello("a", None, 0),
        2: hello("a", None, 2),
        1: hello("b", None, 0, 1),
        3: hello("b", None, 3),
    }

    assert parts(hellos) == {
        0: Part(node=0, serves=True, cpus=(0, 2)),
        1: Part(node=1, serves=True, cpus=(0, 1, 3)),
        2: Part(node=0, serves=False, cpus=(0, 2)),
        3: Part(node=1, serves=False, cpus=(0, 1, 3)),
    }


def test_nodes_of_one_machine_are_told_apart_by_their_number() -> None:
    found = parts({0: hello("a", 0, 0), 1: hello("a", 1, 0)})

    assert [found[rank].node for rank in (0, 1)] == [0, 1]
    assert all(part.serves for part in found.values())

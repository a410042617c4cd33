"""Named hardware: the table, its names, and plans for GPUs that are not there."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, autotune

from autotune.devices import GPUS, Gpu, find_gpu, named_cluster, named_rates, parse_gpus
from autotune.errors import UsageError
from autotune.memory import STATES

PRESETS = sorted(path.parent.name for path in REPOSITORY.glob("configs/models/*/config.json"))


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_gpu_is_found_by_each_of_its_names_in_any_case(gpu: Gpu) -> None:
    assert find_gpu(gpu.name.lower()) == gpu
    for product in gpu.products:
        assert find_gpu(product.upper()) == gpu


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_a_short_name_tells_the_size_on_the_box(gpu: Gpu) -> None:
    on_the_box = int(gpu.name.rpartition("-")[2].removesuffix("GB"))
    # Error correction and driver take up to a twelfth.
    assert 0.91 * on_the_box < gpu.memory_bytes / 2**30 < 1.03 * on_the_box


@pytest.mark.parametrize(
    "text", ["8xRTX3090-24GB", "8 x rtx3090-24gb", "8*NVIDIA GeForce RTX 3090"]
)
def test_count_and_name_are_read(text: str) -> None:
    node = parse_gpus(text)
    assert (node.count, node.gpu.name) == (8, "RTX3090-24GB")


@pytest.mark.parametrize(
    ("text", "said"), [("0xA100-80GB", "at least 1"), ("8xA100-88GB", "A100-80GB"), ("", "8xRTX")]
)
def test_what_is_no_gpu_is_refused_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_gpus(text)


def test_of_unlike_nodes_the_smallest_device_counts() -> None:
    cluster = named_cluster([parse_gpus("8xA100-80GB"), parse_gpus("4xA100-40GB")])
    assert cluster.num_devices == 12
    assert cluster.device_memory_bytes == find_gpu("A100-40GB").memory_bytes
    assert "unlike" in cluster.notes[0]


def test_between_nodes_the_network_is_the_link() -> None:
    node = [parse_gpus("8xH100-80GB")]
    one, two = (named_rates(node, nodes, "bf16") for nodes in (1, 2))
    assert two.link_bytes_per_s < one.link_bytes_per_s
    assert two.node_link_bytes_per_s == one.link_bytes_per_s
    assert one.node_link_bytes_per_s is None
    assert two.of_one_node() == one
    faster = named_rates(node, 2, "bf16", 5e10)
    assert faster.link_bytes_per_s == pytest.approx(2 * two.link_bytes_per_s)
    # However fast the network, the devices' own links are on the way.
    assert named_rates(node, 2, "bf16", 1e15).link_bytes_per_s == one.link_bytes_per_s


def test_a_collective_of_more_ranks_takes_longer_to_start() -> None:
    node = [parse_gpus("8xH100-80GB")]
    starts = [named_rates(node, nodes, "bf16").collective_overhead_s for nodes in (1, 2, 16, 128)]
    assert starts == sorted(starts)
    assert 5 * starts[0] < starts[-1] < 1e-2


@pytest.mark.parametrize(
    ("gpus", "nodes", "together"),
    [(["8xT4-16GB"], 1, 8), (["8xT4-16GB"], 3, 8), (["8xT4-16GB", "4xT4-16GB"], 1, 4)],
)
def test_ranks_that_stay_together_are_known(gpus: list[str], nodes: int, together: int) -> None:
    cluster = named_cluster(list(map(parse_gpus, gpus)), nodes)
    assert cluster.num_nodes == max(nodes, len(gpus))
    assert cluster.ranks_per_node == together


def test_the_presets_have_the_parameters_of_the_published_models() -> None:
    assert len(PRESETS) >= 20


def plan(cwd: Path, gpus: str) -> dict[str, Any]:
    done = autotune(
        *(
            "plan",
            "--model",
            "chatglm3-6b",
            "--gpus",
            gpus,
            "--seq-length",
            3256,
            "--all",
            "--json",
        ),
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_chatglm3_does_not_fit_one_a100_without_offload(tmp_path: Path) -> None:
    document = plan(tmp_path, "1xA100-80GB")
    assert document["model"]["parameters"] == 6_243_584_000
    for entry in document["settings"]:
        offloaded = entry["setting"]["offload_optimizer"] == "cpu"
        memory = entry["memory"]
        if not offloaded:
            # 16 bytes a parameter: 93 GiB. Of those 2 are gradients, which are let go of within
            # the step where none wait for others.
            states = sum(memory[part] for part in STATES)
            accumulates = entry["setting"]["gradient_accumulation_steps"] > 1
            least = 16 if accumulates else 14
            assert least * 6_243_584_000 <= states * 1.001 <= 16.1 * 6_243_584_000
            assert memory["allocated_bytes"] > 16 * 6_243_584_000
            assert entry["rejected_by"]["rule"] == "device_memory"
            assert not accumulates or "alone are 93.0 GiB" in entry["rejected_by"]["detail"]
    assert any(entry["fits"] for entry in document["settings"])


def test_chatglm3_fits_eight_3090s_with_checkpointing_and_zero_2_or_3(tmp_path: Path) -> None:
    document = plan(tmp_path, "8xRTX3090-24GB")
    settings = document["settings"]
    assert {entry["setting"]["zero_stage"] for entry in settings} == {0, 1, 2, 3}
    fitting = [entry["setting"] for entry in settings if entry["fits"]]
    assert fitting
    for setting in fitting:
        assert setting["checkpointing"] != "none"
        # Without offload the states alone are 93 GiB over eight devices, beside gathered weights.
        assert setting["zero_stage"] == 3 or setting["offload_optimizer"] == "cpu"

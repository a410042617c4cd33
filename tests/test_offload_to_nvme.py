"""The optimizer on NVMe: when it is tried, what is emitted, and that DeepSpeed learns the same."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autotune, write_rows
from records import LENGTHS, RATES, make_cluster, make_job, make_profile
from trainings import small_model, train, workshop

from autotune import emit
from autotune.config import resolve
from autotune.engine.ops import needed_ops
from autotune.errors import ConfigError
from autotune.knobs import NO_PINS, Pins
from autotune.optimizer import limits_of
from autotune.plan import Plan, make_plan
from autotune.profile.child import build_ops
from autotune.setting import Structure
from autotune.space import Space, enumerate_space
from autotune.throughput import DrawnRows
from autotune.units import GIB
from autotune.user_config import read_user_config
from autotune.variants import with_nvme
from autotune.zero import NVME_SUB_GROUP_ELEMENTS, Engine, Shards, offloaded_optimizer

DRAWN = DrawnRows.draw(LENGTHS, 42)
HAS_LIBAIO = (
    shutil.which("cc") is not None
    and not subprocess.run(
        ["cc", "-laio", "-shared", "-x", "c", "/dev/null", "-o", "/dev/null"],
        check=False,
        capture_output=True,
    ).returncode
)
ON_NVME = Structure(zero_stage=3, offload_optimizer="nvme")


def test_it_is_named_only_where_there_is_a_place_for_it() -> None:
    pins = Pins.of({"offload_optimizer": ["nvme"]})
    cluster = make_cluster(gpus=2)

    with pytest.raises(ConfigError, match="--nvme-path"):
        enumerate_space(cluster, 32, pins=pins, limits=limits_of("adamw", 10**9, 2))
    space = enumerate_space(cluster, 32, pins=pins, limits=limits_of("adamw", 10**9, 2, nvme=True))

    assert {one.zero_stage for one in space.structures} == {3}
    assert {one.offload_optimizer for one in space.structures} == {"nvme"}


def test_a_stage_that_cannot_is_blamed() -> None:
    pins = Pins.of({"offload_optimizer": ["nvme"], "zero_stage": [1, 2]})

    with pytest.raises(ConfigError, match="nvme at ZeRO 3 alone"):
        enumerate_space(make_cluster(gpus=2), 32, pins=pins)


@pytest.mark.parametrize(
    ("trained", "elements"),
    [((1000, 40), 520), ((3 * 10**8,) * 4, NVME_SUB_GROUP_ELEMENTS + 15 * 10**7)],
)
def test_the_host_holds_four_buffers_of_what_is_swapped_in_at_once(
    trained: tuple[int, ...], elements: int
) -> None:
    shards = Shards(
        trained=np.array(trained),
        frozen=np.array([], dtype=np.int64),
        ranks=2,
        bucket=10,
        persistence=0,
    )
    engine = Engine(
        shards=shards, zero_stage=3, compute_bytes=2, accumulates=True, gloo=False, offloads=True
    )

    assert offloaded_optimizer(engine, nvme=True) == 4 * 4 * elements
    assert offloaded_optimizer(engine, nvme=False) >= 12 * sum(trained) // 2


def test_it_is_tried_where_the_host_has_no_room(tmp_path: Path) -> None:
    def offloads(host_bytes: int) -> set[str]:
        host = replace(make_cluster().host, memory_bytes=host_bytes, available_bytes=host_bytes)  # type: ignore[type-var]
        cluster = replace(make_cluster(gpus=2, memory_bytes=12 * GIB), host=host)
        job = make_job(nvme_path=str(tmp_path))
        space = enumerate_space(cluster, job.global_batch_size)

        def estimate(space: Space) -> Plan:
            return make_plan(space, make_profile(), job, cluster, RATES, DRAWN)

        plan = with_nvme(estimate(space), estimate, NO_PINS)
        return {one.offload_optimizer for one in plan.space.structures}

    assert offloads(512 * GIB) == {"none", "cpu"}
    assert offloads(10 * GIB) == {"none", "cpu", "nvme"}


def test_what_is_emitted_names_the_place_and_builds_what_swaps() -> None:
    job = make_job(nvme_path="/local/nvme")
    setting = ON_NVME.with_micro_batch(1, 2, job.global_batch_size)

    config = emit.ds_config(job, setting, make_profile(), make_cluster(gpus=2))

    zero = config["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "nvme"
    assert zero["offload_optimizer"]["nvme_path"] == "/local/nvme"
    assert zero["sub_group_size"] == NVME_SUB_GROUP_ELEMENTS
    assert needed_ops("cuda", config) == ("CPUAdamBuilder", "AsyncIOBuilder")


def test_a_config_of_the_user_s_names_the_place_too() -> None:
    offload = {"device": "nvme", "nvme_path": "/n"}
    theirs = {"zero_optimization": {"stage": 3, "offload_optimizer": offload}}

    user = read_user_config(json.dumps(theirs), "ds.json", resolve([]), Pins())

    assert user.options["nvme_path"] == "/n"
    assert user.pins["offload_optimizer"] == ("nvme",)


def test_a_directory_that_is_not_there_is_told_before_anything_is_spent(
    tmp_path: Path, short_rows: Path
) -> None:
    done = autotune(
        *("tune", "--dataset", short_rows, "--devices", "2", "--nvme-path", tmp_path / "none"),
        cwd=tmp_path,
    )

    assert done.returncode == 78
    assert "is no directory that can be written to" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not HAS_LIBAIO, reason="DeepSpeed's async_io op needs libaio's headers")
def test_deepspeed_learns_the_same_with_the_optimizer_in_files(tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "data.jsonl", [(f"Say {n}.", f"{n} " * (1 + n % 9)) for n in range(16)]
    )
    shop = workshop(tmp_path, data, small_model(tmp_path / "model"), max_steps=4)
    drive = tmp_path / "drive"
    drive.mkdir()
    on_disk = replace(shop, job=replace(shop.job, nvme_path=str(drive)))

    plain = train(shop.emit(tmp_path / "plain", zero_stage=3), 2)
    directory = on_disk.emit(tmp_path / "emitted", zero_stage=3)
    # As for GPUs, where offloading is offered; DeepSpeed's CPU Adam then updates on the host.
    setting = ON_NVME.with_micro_batch(2, 2, shop.job.global_batch_size)
    config = emit.ds_config(on_disk.job, setting, shop.profile, make_cluster(gpus=2))
    (directory / "ds_config.json").write_text(json.dumps(config))
    build_ops(needed_ops("cpu", config), tmp_path / "ops.log")

    assert train(directory, 2) == pytest.approx(plain, abs=1e-4)
    assert list(drive.rglob("*.swp"))

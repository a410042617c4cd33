"""The bench of a machine: real ranks are measured, and what they do is used from then on."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from hypothesis import given
from hypothesis import strategies as st

from autotune import intake
from autotune.detect import detect
from autotune.devices import named_rates, parse_gpus
from autotune.environment import cache_dir
from autotune.hardware import Bench, Rates
from autotune.rundir import write_json

rates_of_ranks = st.floats(1e6, 1e15)
benches = st.builds(
    Bench,
    ranks=st.just(2),
    matmul_flops_per_s=st.tuples(
        st.tuples(st.just("fp32"), rates_of_ranks), st.tuples(st.just("bf16"), rates_of_ranks)
    ),
    memory_bytes_per_s=rates_of_ranks,
    all_reduce_bytes_per_s=rates_of_ranks,
    host_link_bytes_per_s=rates_of_ranks,
    host_memory_bytes_per_s=rates_of_ranks,
    operator_overhead_s=st.floats(1e-7, 1e-3),
    collective_overhead_s=st.floats(1e-7, 1e-2),
)


@given(st.lists(benches, min_size=1, max_size=4))
def test_the_slowest_rank_counts(ranks: list[Bench]) -> None:
    slowest = Bench.slowest(ranks)
    assert slowest.ranks == len(ranks)
    for one in ranks:
        assert slowest.memory_bytes_per_s <= one.memory_bytes_per_s
        assert slowest.operator_overhead_s >= one.operator_overhead_s
        assert slowest.collective_overhead_s >= one.collective_overhead_s
        for precision, flops in slowest.matmul_flops_per_s:
            assert flops <= dict(one.matmul_flops_per_s)[precision]


@given(benches)
def test_a_bench_is_read_as_it_was_written(bench: Bench) -> None:
    assert Bench.from_json(json.loads(json.dumps(asdict(bench)))) == bench


def test_a_precision_that_was_not_measured_has_no_rates() -> None:
    bench = Bench(
        ranks=1,
        matmul_flops_per_s=(("fp32", 1e12),),
        memory_bytes_per_s=1e11,
        all_reduce_bytes_per_s=None,
        host_link_bytes_per_s=1e10,
        host_memory_bytes_per_s=1e10,
        operator_overhead_s=1e-6,
        collective_overhead_s=0.0,
    )
    assert bench.rates("bf16") is None
    alone = bench.rates("fp32")
    assert alone is not None
    assert alone.matmul_flops_per_s == 1e12


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measure two ranks of this machine, as a user does."""
    done = autotune(
        "detect", "--bench", "--devices", "cpu:2", "--json", cwd=tmp_path_factory.mktemp("bench")
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_two_ranks_measure_each_figure(document: dict[str, Any]) -> None:
    bench = document["bench"]
    assert bench["ranks"] == 2
    assert {"fp32", "bf16"} <= bench["matmul_flops_per_s"].keys()
    # From a slow core under load to a large socket.
    assert 1e8 < bench["matmul_flops_per_s"]["fp32"] < 1e14
    assert 1e7 < bench["memory_bytes_per_s"] < 1e13
    assert 1e6 < bench["all_reduce_bytes_per_s"] < 1e12
    assert 1e-8 < bench["operator_overhead_s"] < 1e-2
    assert 1e-6 < bench["collective_overhead_s"] < 1


def measured(document: dict[str, Any]) -> Bench:
    bench = document["bench"]
    return Bench.from_json({**bench, "matmul_flops_per_s": bench["matmul_flops_per_s"].items()})


def test_it_is_kept_and_estimates_use_it(document: dict[str, Any]) -> None:
    cluster = detect("cpu:2")
    assert intake.bench(cluster) == measured(document)
    assert intake._rates(cluster, "fp32") == measured(document).rates("fp32")


def test_another_number_of_ranks_was_not_measured(document: dict[str, Any]) -> None:
    del document
    assert intake.read_bench(detect("cpu:3")) is None


def test_a_torn_bench_counts_as_none(document: dict[str, Any]) -> None:
    del document
    cluster = detect("cpu:2")
    path = intake._bench_path(cluster)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    assert intake.read_bench(cluster) is None
    path.write_text('{"device_name": "x", "bench": {"matmul_flops_per_s": [["fp32"]]}}')
    assert intake.read_bench(cluster) is None
    path.write_text(whole)
    assert intake.read_bench(cluster) is not None


@pytest.mark.parametrize(("gpus", "same_count"), [("2xA100-80GB", True), ("8xA100-80GB", False)])
def test_of_named_gpus_that_are_here_the_bench_counts_and_not_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: str, *, same_count: bool
) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path))
    named = intake.NamedHardware(gpus=(parse_gpus(gpus),))
    by_table = named_rates(named.gpus, 1, "bf16")
    assert intake._named_rates(named, "bf16") == by_table
    seen = Rates(
        matmul_flops_per_s=2.5e14,
        memory_bytes_per_s=1.4e12,
        link_bytes_per_s=1.1e11,
        host_link_bytes_per_s=2e10,
        host_memory_bytes_per_s=3e10,
        operator_overhead_s=4e-6,
        collective_overhead_s=2e-5,
    )
    bench = Bench(
        ranks=2,
        matmul_flops_per_s=(("bf16", seen.matmul_flops_per_s),),
        memory_bytes_per_s=seen.memory_bytes_per_s,
        all_reduce_bytes_per_s=seen.link_bytes_per_s,
        host_link_bytes_per_s=seen.host_link_bytes_per_s,
        host_memory_bytes_per_s=seen.host_memory_bytes_per_s,
        operator_overhead_s=seen.operator_overhead_s,
        collective_overhead_s=seen.collective_overhead_s,
    )
    (cache_dir() / "bench").mkdir()
    write_json(
        cache_dir() / "bench" / "one.json",
        {"device_name": "NVIDIA A100-SXM4-80GB", "bench": asdict(bench)},
    )

    # The table still says what depends on how many they are, and what was not measured.
    expected = (
        seen
        if same_count
        else replace(
            seen,
            link_bytes_per_s=by_table.link_bytes_per_s,
            host_memory_bytes_per_s=by_table.host_memory_bytes_per_s,
            collective_overhead_s=by_table.collective_overhead_s,
        )
    )
    assert intake._named_rates(named, "bf16") == expected
    assert intake._named_rates(named, "fp32") == named_rates(named.gpus, 1, "fp32")

"""GPUs watched while they work, through the real nvidia-ml-py and scenarios that change."""

import json
from pathlib import Path

import nvml_standin
import pytest
from nvml_standin import A100, scenario, uuid_of

from autotune.detect.health import HEALTHY, Health, slowed, unfit, worry, worsened
from autotune.units import GIB

needs_compiler = pytest.mark.skipif(nvml_standin.COMPILER is None, reason="needs a C compiler")

ONE, TWO = uuid_of(0), uuid_of(1)

PLAY = """
import json, os, pathlib, sys
from autotune.detect.monitor import watch
file = pathlib.Path(os.environ["NVML_SCENARIO"])
plays, uuids = json.loads(pathlib.Path(sys.argv[1]).read_text()), json.loads(sys.argv[2])
for name, scenarios in plays.items():
    file.write_text(scenarios[0])
    monitor = watch(uuids)
    told = []
    for scenario in scenarios[1:]:
        monitor.begin()
        file.write_text(scenario)
        told.append([monitor.new_faults(), monitor.take_peak(), dict(monitor.slowed())])
    monitor.close()
    print(json.dumps([name, told]))
"""
"""Plays scenarios one after the other to a monitor, and tells what it says of each."""

Told = dict[str, list[list[object]]]


WELL = scenario(A100, A100)


OLD = scenario(A100 | {"ecc_uncorrected": 7, "remap_pending": 1}, A100)
MUTE = scenario({"name": "NVIDIA T4"}, {"name": "NVIDIA T4"})

FAULTS = {
    "nothing": (WELL, None),
    "errors of memory": (
        scenario(A100, A100 | {"ecc_uncorrected": 3}),
        f"GPU {TWO}: 3 new uncorrectable errors of its memory",
    ),
    "a row became bad": (
        scenario(A100 | {"remap_pending": 1}, A100),
        f"GPU {ONE}: a row of its memory has become bad",
    ),
    "a row cannot be remapped": (
        scenario(A100, A100 | {"remap_failed": 1}),
        f"GPU {TWO}: a bad row of its memory could not be remapped",
    ),
    "lost": (
        scenario(A100, A100 | {"nvmlDeviceGetTotalEccErrors": 15}),
        f"GPU {TWO}: it does not answer NVML any more (GPU is lost)",
    ),
    "Xid of the hardware": (
        scenario(A100 | {"xid": 79}, A100),
        f"GPU {ONE}: Xid 79, it has fallen off the bus",
    ),
    "Xid of the memory": (
        scenario(A100, A100 | {"xid": 94}),
        f"GPU {TWO}: Xid 94, an uncorrectable error of its memory, contained",
    ),
    "Xid of a killed program": (scenario(A100 | {"xid": 45}, A100), None),
    "Xid of a wrong program": (scenario(A100 | {"xid": 31}, A100), None),
}

PLAYS = {
    **{name: [WELL, after, after] for name, (after, _) in FAULTS.items()},
    "as bad as before": [OLD, OLD],
    "memory": [
        scenario(A100 | {"used": 10 * GIB}, A100 | {"used": 0}),
        scenario(A100 | {"used": 15 * GIB}, A100 | {"used": 30 * GIB}),
    ],
    "slow": [WELL, scenario(A100 | {"throttle": 0x4}, A100 | {"throttle": 0x44})],
    "mute": [MUTE, MUTE],
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Return what the monitor says of each play, all of them in one child."""
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "plays.json").write_text(json.dumps(PLAYS))
    environ = nvml_standin.environment(nvml_standin.build(folder), folder / "scenario")
    uuids = json.dumps([ONE, TWO])
    lines = nvml_standin.lines(PLAY, folder / "plays.json", uuids, environ=environ)
    return dict(map(json.loads, lines))


@needs_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_what_goes_wrong_is_told_once_with_the_gpu(name: str, told: Told) -> None:
    _, fault = FAULTS[name]

    assert [faults for faults, *_ in told[name]] == [[fault] if fault else [], []]


@needs_compiler
def test_of_what_a_gpu_had_before_nothing_is_a_fault(told: Told) -> None:
    assert told["as bad as before"] == [[[], 0, {}]]


@needs_compiler
def test_memory_is_what_came_on_top_of_what_others_use_on_the_fullest_gpu(told: Told) -> None:
    ((_, peak, _),) = told["memory"]

    assert peak == 30 * GIB


@needs_compiler
def test_clocks_that_are_held_back_are_told_and_the_power_cap_is_not(told: Told) -> None:
    ((_, _, held_back),) = told["slow"]

    assert held_back == {TWO: ["its hardware slows it down for heat"]}


@needs_compiler
def test_a_gpu_that_tells_nothing_is_never_at_fault(told: Told) -> None:
    assert told["mute"] == [[[], None, {}]]


def test_without_nvml_nothing_is_watched() -> None:
    code = "import json; from autotune.detect.monitor import watch; print(json.dumps(watch(['0'])))"
    environ = nvml_standin.environment(None, Path("none"))

    assert nvml_standin.run(code, environ=environ) is None


def test_a_state_that_stays_as_bad_as_it_was_is_no_worse() -> None:
    bad = Health(uncorrected_errors=5, remap_pending=True, remap_failed=True, silence="lost")

    assert worsened(bad, bad) is None
    assert worsened(bad, HEALTHY) is None
    assert worsened(HEALTHY, Health(uncorrected_errors=1)) == (
        "1 new uncorrectable error of its memory"
    )


def test_only_what_would_fail_keeps_a_gpu_from_use() -> None:
    assert unfit(HEALTHY) is None
    assert worry(HEALTHY) is None
    assert unfit(Health(uncorrected_errors=5, remap_pending=True)) is None
    assert unfit(Health(remap_failed=True)) is not None
    assert worry(Health(remap_pending=True, uncorrected_errors=5)) is not None


def test_each_reason_of_a_slow_clock_has_its_words() -> None:
    assert len(slowed(0x8 | 0x20 | 0x40 | 0x80)) == 4
    assert slowed(0x1 | 0x2 | 0x4 | 0x10 | 0x100) == ()

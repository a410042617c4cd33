"""A probe whose GPUs are watched: peaks from outside, and what a GPU that goes wrong makes of it.

The prober is the real one, and so is the binding of NVML; the ranks only write what ranks write.
"""

import json
from pathlib import Path

import nvml_standin
import pytest
from nvml_standin import A100, scenario, uuid_of

from autotune.outcome import SAYS_NOTHING, Interrupted, Invalid
from autotune.units import GIB

pytestmark = pytest.mark.skipif(nvml_standin.COMPILER is None, reason="needs a C compiler")

PROGRAM = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from records import SurfaceSite, make_cluster, plan_for
from autotune.detect.monitor import watch
from autotune.errors import NoUsableDeviceError
from autotune.probe.local import LocalProber
from autotune.probe.protocol import RungMeasurement

scenarios, uuids = map(json.loads, sys.argv[1:3])
file = Path(os.environ["NVML_SCENARIO"])
file.write_text(scenarios[0])

class Ranks:
    '''Ranks that answer at once: each rung as the scenario that comes next is played.'''
    def __init__(self, errand):
        self.errand, self.step = errand, 0
    def wait(self, timeout_s):
        rungs = self.errand.request.rungs
        if self.step == len(rungs):
            return
        file.write_text(scenarios[min(self.step + 1, len(scenarios) - 1)])
        rung = rungs[self.step]
        line = {"event": "rung", "micro_batch_size": rung.micro_batch_size, "seconds": 1.0,
                "accumulate_s": [[1, [0.1]]], "boundary_s": [], "peak_bytes": 5 << 30,
                "allocated_bytes": 4 << 30}
        for rank, answer in enumerate(self.errand.answers):
            with answer.open("a") as out:
                out.write(json.dumps(line | {"allocated_bytes": (4 - rank) << 30}) + "\\n")
        self.step += 1
    def exit_codes(self):
        return (None,) * self.errand.request.ranks
    def end(self):
        pass

class Launcher:
    def start(self, errand):
        return Ranks(errand)

plan = plan_for(make_cluster(gpus=2))
ladder = [plan.space.setting(row) for row in range(len(plan.space))
          if plan.space.structure_index[row] == 0][:2]
prober = LocalProber(Path(sys.argv[4]) / "logs", launcher=Launcher(), monitor=watch(uuids))
told = []
for _ in range(int(sys.argv[5])):
    try:
        for answer in prober.probe(SurfaceSite().request(ladder)):
            kind = "measured" if isinstance(answer, RungMeasurement) else answer.outcome.kind
            told.append([kind, getattr(answer, "device_used_bytes", None),
                         getattr(answer, "allocated_bytes", None),
                         "" if kind == "measured" else answer.outcome.evidence])
    except NoUsableDeviceError as error:
        told.append(["refused", None, None, str(error)])
print(json.dumps(told))
"""


def play(folder: Path, *scenarios: str, probes: int = 1) -> list[list[object]]:
    environ = nvml_standin.environment(nvml_standin.build(folder), folder / "scenario")
    uuids = json.dumps([uuid_of(0), uuid_of(1)])
    arguments = (json.dumps(scenarios), uuids, Path(__file__).parent, folder, probes)
    told: list[list[object]] = nvml_standin.run(PROGRAM, *arguments, environ=environ)
    return told


WELL = scenario(A100, A100)


def test_each_rung_has_the_peak_of_the_fullest_gpu_above_what_was_used_before(
    tmp_path: Path,
) -> None:
    before = scenario(A100 | {"used": GIB}, A100 | {"used": 2 * GIB})
    first = scenario(A100 | {"used": 6 * GIB}, A100 | {"used": 9 * GIB})
    second = scenario(A100 | {"used": 30 * GIB}, A100 | {"used": 9 * GIB})

    told = play(tmp_path, before, first, second)

    assert [line[:3] for line in told] == [
        ["measured", 7 * GIB, 4 * GIB],
        ["measured", 29 * GIB, 4 * GIB],
    ]


def test_a_gpu_that_goes_wrong_makes_the_rung_invalid_and_ends_the_probe(tmp_path: Path) -> None:
    told = play(tmp_path, WELL, WELL, scenario(A100, A100 | {"xid": 79}))

    assert [line[0] for line in told] == ["measured", "invalid"]
    assert told[1][3] == f"GPU {uuid_of(1)}: Xid 79, it has fallen off the bus"


def test_the_second_time_the_run_ends_and_names_the_gpu(tmp_path: Path) -> None:
    told = play(
        tmp_path,
        *(WELL, scenario(A100, A100 | {"ecc_uncorrected": 1})),
        *(scenario(A100, A100 | {"ecc_uncorrected": 2}),),
        probes=3,
    )

    # In the second probe the first error is there still, and no new one.
    assert [line[0] for line in told] == ["invalid", "measured", "invalid", "refused"]
    assert f"GPU {uuid_of(1)}" in str(told[3][3])
    assert "for the second time" in str(told[3][3])


def test_what_is_invalid_or_was_interrupted_says_nothing_of_a_setting() -> None:
    assert isinstance(Invalid(evidence=""), SAYS_NOTHING)
    assert isinstance(Interrupted(evidence=""), SAYS_NOTHING)

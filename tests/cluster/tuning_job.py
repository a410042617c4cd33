"""A job of a shared study, as a program: it tunes on a surface that is known, slowly.

Arguments: the database, the job's name, its run directory, and the seconds of a rung.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from records import SurfaceSite, make_cluster, make_job, perturbed, plan_for

from autotune.outcome import Measured
from autotune.probe.fakes import ScriptedProber
from autotune.probe.protocol import ProbeRequest, RungFailure, RungMeasurement, RungPlan
from autotune.rundir import RunDir
from autotune.tune.loop import Tuner
from autotune.tune.shared_study import SharedStudy, StudyDatabase, open_storage
from autotune.units import GIB

STALE_S = 8.0


def main(address: str, job: str, directory: str, rung_s: str) -> None:
    plan = plan_for(make_cluster(gpus=4, memory_bytes=32 * GIB), job=make_job(global_batch_size=64))
    surface = perturbed(plan, 3)
    run_dir = RunDir(Path(directory))
    run_dir.create()
    known = run_dir.read_rungs()

    def answer(request: ProbeRequest, rung: RungPlan) -> RungMeasurement | RungFailure:
        time.sleep(float(rung_s))
        return surface.answer(request, rung)

    database = StudyDatabase(open_storage(address), "surface")
    study = SharedStudy(database, job, plan, known, beat_s=1.0, stale_s=STALE_S)
    tuner = Tuner(
        plan,
        ScriptedProber(answer),
        SurfaceSite(),
        known,
        record=run_dir.append_rung,
        steps=1_000_000,
        others=study,
    )
    tuned = tuner.run(max_probes=12, budget_s=None)
    study.close()
    assert tuned.best is not None
    assert isinstance(tuned.best.outcome, Measured)
    best = {
        "setting": tuned.best.setting.key(),
        "tokens_per_s": tuned.best.outcome.tokens_per_s,
        "stopped_by": tuned.stopped_by,
    }
    (run_dir.root / "best.json").write_text(json.dumps(best))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How long a phase may take."""

from autotune.probe.deadlines import Deadline, Deadlines
from autotune.probe.protocol import PHASES, RungMeasurement, RungPlan, rung_phase


def rung(size: int) -> RungPlan:
    return RungPlan(
        micro_batch_size=size, gradient_accumulation_steps=1, memory_rows=(0,), timed_rows=()
    )


def measured(size: int, seconds: float) -> RungMeasurement:
    return RungMeasurement(
        micro_batch_size=size, accumulate_s=(), boundary_s=(), peak_bytes=1, seconds=seconds
    )


def test_every_phase_before_the_first_rung_has_its_own() -> None:
    limits = [Deadlines().of(phase, rung(1), None) for phase in PHASES]
    assert limits == list(Deadlines().phases.values())
    assert all(limit.silence_s <= limit.total_s for limit in limits)


def test_a_later_rung_has_what_the_one_before_foretells() -> None:
    limit = Deadlines().of(rung_phase(rung(8)), rung(8), measured(4, 30.0))
    assert limit.total_s == 600


def test_a_quick_ladder_still_has_two_minutes_a_rung() -> None:
    assert Deadlines().of(rung_phase(rung(2)), rung(2), measured(1, 0.1)).total_s == 120


def test_no_rung_has_more_than_the_first() -> None:
    deadlines = Deadlines(first_rung=Deadline(silence_s=5, total_s=300))
    assert deadlines.of(rung_phase(rung(2)), rung(2), None).total_s == 300
    later = deadlines.of(rung_phase(rung(2)), rung(2), measured(1, 100))
    assert (later.silence_s, later.total_s) == (5, 300)

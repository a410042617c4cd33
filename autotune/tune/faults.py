"""Tells a fault of the set-up from one of a setting: whatever is probed dies, and nothing runs."""

from collections.abc import Sequence

from autotune.errors import SetupFaultError
from autotune.outcome import Crashed, Measured, Rung, TimedOut, Unknown

Death = Crashed | TimedOut | Unknown

_DEATHS_BEFORE_GIVING_UP = 3


def refuse_set_up_fault(rungs: Sequence[Rung], at_least: int = _DEATHS_BEFORE_GIVING_UP) -> None:
    """Refuse to go on where so many probes died, not of memory, and none was measured.

    Raises:
        SetupFaultError: with what the last of them left.
    """
    deaths = _deaths(rungs)
    if len(deaths) < at_least or any(isinstance(rung.outcome, Measured) for rung in rungs):
        return
    kinds = " or ".join(sorted({death.kind.replace("_", " ") for death in deaths}))
    msg = (
        f"no probe was measured and {len(deaths)} ended as {kinds}, whatever their setting: this "
        "is a fault of the set-up; mend it and run the same command again. The last one:\n"
        f"{_describe(deaths[-1])}"
    )
    raise SetupFaultError(msg)


def worth_knowing(rungs: Sequence[Rung]) -> list[Rung]:
    """Leave out deaths that were taken for a fault of the set-up.

    Whoever starts again after one has mended it, and these deaths say nothing of their settings.
    """
    measured = [isinstance(rung.outcome, Measured) for rung in rungs]
    first = measured.index(True) if any(measured) else len(rungs)
    before, after = rungs[:first], rungs[first:]
    if after and len(_deaths(before)) < _DEATHS_BEFORE_GIVING_UP:
        return list(rungs)
    return [rung for rung in before if not isinstance(rung.outcome, Death)] + list(after)


def _deaths(rungs: Sequence[Rung]) -> list[Death]:
    return [rung.outcome for rung in rungs if isinstance(rung.outcome, Death)]


def _describe(death: Death) -> str:
    """Return why a probe died and the last lines that it left."""
    return f"{_reason(death)}\n{death.evidence}".rstrip()


def _reason(death: Death) -> str:
    match death:
        case Crashed():
            return death.reason
        case TimedOut():
            return f"no sign of life for {death.seconds:.0f} s in phase {death.phase}"
        case Unknown():
            return f"it ended with exit code {death.exit_code} and without a word"

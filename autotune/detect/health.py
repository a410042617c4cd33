"""How GPUs are: errors of their memory, Xid events, clocks that are held back. Pure but for NVML.

What a GPU does wrong is no fault of the setting that was tried on it: it is told apart by its state
before and after.
"""

from dataclasses import dataclass

from autotune.detect.nvml import Nvml

_UNCORRECTED, _SINCE_BOOT = 1, 0  # NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC

XIDS_OF_HARDWARE = {
    46: "the GPU stopped processing",
    48: "an uncorrectable error of its memory (double bit)",
    62: "its microcontroller halted",
    64: "a bad row of its memory could not be remapped",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    92: "very many single-bit errors of its memory",
    94: "an uncorrectable error of its memory, contained",
    95: "an uncorrectable error of its memory, not contained",
    119: "its system processor does not answer",
    120: "an error of its system processor",
    140: "an unrecovered error of its memory",
}
"""Xid numbers that blame the device (NVIDIA's Xid catalogue). Those of a program that did wrong or
was ended, as 13, 31, 43 and 45, are what a probe that is killed leaves too."""

_SLOWED = {
    0x8: "its hardware slows it down",
    0x20: "its driver slows it down for heat",
    0x40: "its hardware slows it down for heat",
    0x80: "its power supply slows it down",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons. The software's power cap (0x4) is not among them:
a GPU at full load runs into it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Errors of a GPU's memory, as far as NVML tells.

    Attributes:
        uncorrected_errors: of its memory since the driver was loaded.
        remap_pending: a bad row is remapped when the GPU is reset.
        remap_failed: a bad row could not be remapped.
        silence: why the GPU does not even answer.
    """

    uncorrected_errors: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    silence: str | None = None


HEALTHY = Health()

_SILENT = ("GPU is lost", "Unknown Error")
"""Answers of a GPU that is gone; others say that it lacks what was asked for."""


def read_health(nvml: Nvml, gpu: object) -> Health:
    """Ask a GPU how it is; what it does not tell is taken to be well."""
    errors, why = nvml.answer("nvmlDeviceGetTotalEccErrors", gpu, _UNCORRECTED, _SINCE_BOOT)
    rows = nvml.ask("nvmlDeviceGetRemappedRows", gpu) or (0, 0, 0, 0)
    return Health(
        uncorrected_errors=errors or 0,
        remap_pending=bool(rows[2]),
        remap_failed=bool(rows[3]),
        silence=why if why in _SILENT else None,
    )


def unfit(health: Health) -> str | None:
    """Say why a GPU should not be used at all; None if nothing speaks against it."""
    if health.silence is not None:
        return f"it does not answer NVML ({health.silence})"
    return "a bad row of its memory could not be remapped" if health.remap_failed else None


def worry(health: Health) -> str | None:
    """Say what one should know of a GPU that can be used; None if there is nothing."""
    if health.remap_pending:
        return "a bad row of its memory waits to be remapped: reset the GPU when it is free"
    if health.uncorrected_errors:
        return f"{_errors(health.uncorrected_errors)} of its memory since it was started"
    return None


def worsened(before: Health, after: Health) -> str | None:
    """Say what has become worse from one state to a later one; None if nothing has."""
    if after.silence is not None and before.silence is None:
        return f"it does not answer NVML any more ({after.silence})"
    if after.remap_failed and not before.remap_failed:
        return "a bad row of its memory could not be remapped"
    new = after.uncorrected_errors - before.uncorrected_errors
    if new > 0:
        return f"{_errors(new, 'new ')} of its memory"
    if after.remap_pending and not before.remap_pending:
        return "a row of its memory has become bad"
    return None


def _errors(count: int, kind: str = "") -> str:
    return f"{count} {kind}uncorrectable error{'s' if count > 1 else ''}"


def slowed(reasons: int) -> tuple[str, ...]:
    """Say what holds clocks back, by the bits that NVML tells, load and power cap aside."""
    return tuple(words for bit, words in _SLOWED.items() if reasons & bit)

"""Judges settings by virtual runs, for the search."""

import logging
from pathlib import Path

from autotune.errors import VirtualRunUnavailableError
from autotune.intake import Workload, run_virtually
from autotune.memory import fixed_runtime_bytes
from autotune.setting import Setting

_log = logging.getLogger(__name__)

_START_S = 3.0
_OPERATOR_S = 0.005
"""What a virtual run takes of a core besides, for each operator of a pass: it takes three passes
and two updates. Measured with models of 3 to 7 billion parameters; ZeRO 3 takes twice as long."""


class VirtualJudge:
    """A judge (see tune.judge) that steps the real engine over fake tensors; answers are kept."""

    def __init__(self, workload: Workload, logs: Path) -> None:
        self._workload = workload
        self._logs = logs

    def expected_seconds(self, setting: Setting) -> float:  # noqa: ARG002 - all take about as long
        operators = max(trace.operators for _, trace in self._workload.profile.traces)
        return _START_S + _OPERATOR_S * operators

    def least_device_bytes(self, setting: Setting) -> int | None:
        log = self._logs / f"virtual-{setting.structure.label()}.log"
        try:
            run = run_virtually(self._workload, setting, log)
        except VirtualRunUnavailableError as error:
            _log.warning("not held against a virtual run, as %s", error)
            return None
        return run.peak_device_bytes + fixed_runtime_bytes(self._workload.question.cluster)

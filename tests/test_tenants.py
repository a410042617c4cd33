"""Device memory between probes, through a stand-in for NVML and a clock that is told the time."""

import logging
from collections.abc import Sequence

import pytest
from test_detect_nvidia import FakeGpu, FakeMemory, FakeNvml

from autotune.detect.nvidia import used_bytes
from autotune.probe.tenants import DeviceMemory
from autotune.units import GIB


class Machine:
    """One GPU whose memory in use goes through given figures (GiB), one each half second."""

    def __init__(self, in_use_gib: Sequence[float], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self._figures = list(in_use_gib)
        self.now = 0.0
        self.memory = DeviceMemory(self.used, clock=lambda: self.now, sleep=self._sleep)

    def used(self) -> dict[str, int]:
        free = int((80 - self._figures[0]) * GIB)
        return used_bytes(FakeNvml([FakeGpu("GPU-1", memory=FakeMemory(80 * GIB, free))]))

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.next()

    def next(self) -> None:
        if len(self._figures) > 1:
            self._figures.pop(0)


def test_a_probe_waits_for_the_memory_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([0.1, 60, 60, 30, 0.2], monkeypatch)
    machine.next()
    assert machine.memory.wait_for_baseline()
    assert machine.now == 1.5


def test_memory_that_does_not_come_back_is_noted_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine([0.1, 12], monkeypatch)
    machine.next()
    with caplog.at_level(logging.WARNING):
        assert not machine.memory.wait_for_baseline()
        assert machine.now == 30
        assert machine.memory.wait_for_baseline()
    (said,) = caplog.messages
    assert "GPU-1 has 11.9 GiB more in use" in said


def test_what_others_use_from_the_start_is_noted_and_waited_for_by_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine([20.0], monkeypatch)
    assert caplog.messages == ["others use 20.0 GiB of device GPU-1"]
    assert machine.memory.wait_for_baseline()
    assert machine.now == 0


def test_a_device_that_tells_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert used_bytes(FakeNvml([FakeGpu("GPU-1", memory=None)])) == {}
    assert DeviceMemory(dict).wait_for_baseline()

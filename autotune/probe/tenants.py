"""Device memory before a probe: what others use, and whether the last probe's is back."""

import logging
import time
from collections.abc import Callable, Mapping

from autotune.units import MIB, format_bytes

_log = logging.getLogger(__name__)

# A driver gives the memory of a dead process back within seconds; after this it is someone's.
_PATIENCE_S = 30.0
_POLL_S = 0.5
# What a driver keeps for itself comes and goes.
_TOLERANCE_BYTES = 256 * MIB

UsedBytes = Callable[[], Mapping[str, int]]


class DeviceMemory:
    """Watches the bytes in use on each device, by its name.

    What is in use when this is made, before the first probe, is other tenants' and is noted. NVML
    tells no process in a container, so what is ours is told by the difference.
    """

    def __init__(
        self,
        used_bytes: UsedBytes,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._used_bytes = used_bytes
        self._clock = clock
        self._sleep = sleep
        self._baseline = dict(used_bytes())
        for name, used in self._baseline.items():
            if used > _TOLERANCE_BYTES:
                _log.warning("others use %s of device %s", format_bytes(used), name)

    def wait_for_baseline(self) -> bool:
        """Wait until the memory in use is back to what it was; returns whether it is.

        After 30 s the rest counts as other tenants', is noted, and is the baseline from then on.
        """
        deadline = self._clock() + _PATIENCE_S
        while excess := self._excess():
            if self._clock() >= deadline:
                for name, used in excess.items():
                    _log.warning(
                        "device %s has %s more in use than before the last probe: measurements "
                        "may suffer, and less fits",
                        name,
                        format_bytes(used),
                    )
                self._baseline = dict(self._used_bytes())
                return False
            self._sleep(_POLL_S)
        return True

    def _excess(self) -> dict[str, int]:
        return {
            name: used - self._baseline.get(name, 0)
            for name, used in self._used_bytes().items()
            if used > self._baseline.get(name, 0) + _TOLERANCE_BYTES
        }

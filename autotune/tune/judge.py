"""What may be asked about a setting before a probe of it is started."""

from typing import Protocol

from autotune.setting import Setting


class Judge(Protocol):
    """Knows what a setting needs at the least, without the devices."""

    def expected_seconds(self, setting: Setting) -> float:
        """Return about how long the answer takes."""
        ...

    def least_device_bytes(self, setting: Setting) -> int | None:
        """Return what a device must have free; None where that cannot be told."""
        ...

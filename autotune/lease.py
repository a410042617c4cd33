"""Locks that need nothing of a file system but that a file is created once: leases.

Locks of the kernel (flock) do nothing or fail on some network file systems. A lease is a file that
names its holder, who touches it again and again. It is taken from a holder whose process is gone
from this host, or that has not touched it for longer than it promised to, by the watcher's clock.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import OwnerRecord, SoftFileLease

_DURATION_S = 30.0
_BEAT_S = 2.0
_WATCH_S = 0.5
_POLL_S = 0.01
_MODE = 0o600


class HeldError(Exception):
    """A lease has a holder that lives."""

    def __init__(self, owner: "OwnerRecord | None") -> None:
        super().__init__()
        # After a question mark the library has the namespace of the process.
        self.holder = (
            f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
            if owner is not None
            else "another process"
        )


@contextmanager
def exclusive(path: Path, *, wait: bool, stop_when_lost: bool = False) -> Iterator[None]:
    """Hold the lease of `path` for the length of a block.

    Args:
        path: its file, which is there while the lease is held.
        wait: for a holder that lives to be done.
        stop_when_lost: send this process SIGTERM when another has taken the lease, as it can of one
            that did not run for longer than a lease lasts.

    Raises:
        HeldError: another process holds it and shows that it lives.
        OSError: the file cannot be made.
    """
    from filelock import SoftFileLease

    lease = SoftFileLease(
        path,
        lease_duration=_DURATION_S,
        heartbeat_interval=_BEAT_S,
        on_compromise=(lambda _: os.kill(os.getpid(), signal.SIGTERM)) if stop_when_lost else None,
        mode=_MODE,
        poll_interval=_POLL_S,
    )
    _acquire(lease, path, wait=wait)
    try:
        yield
    finally:
        lease.release()


def _acquire(lease: "SoftFileLease", path: Path, *, wait: bool) -> None:
    from filelock import Timeout

    sign, since = _sign_of_life(path), time.monotonic()
    while True:
        try:
            lease.acquire(timeout=_WATCH_S)
        except Timeout:
            seen = _sign_of_life(path)
            if seen != sign:
                if not wait:
                    raise HeldError(lease.owner) from None
                sign, since = seen, time.monotonic()
            elif time.monotonic() - since > 2 * _DURATION_S:
                # Whoever made it was gone before it said who it is, so nobody else breaks it.
                lease.force_break()
        else:
            return


def _sign_of_life(path: Path) -> tuple[int, int] | None:
    """Return what changes when the holder touches its file; a network's is looked at anew."""
    with suppress(OSError), path.open("rb") as file:
        status = os.fstat(file.fileno())
        return status.st_ino, status.st_mtime_ns
    return None

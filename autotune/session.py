"""A session of processes, whatever process groups its members have made, as ninja does.

As a program (`-m autotune.session`) it ends its own session when its input is closed, which the
kernel does when whoever held the other end is gone.
"""

import os
import signal
import sys
import time
from pathlib import Path

_KILL_GRACE_S = 5.0
_POLL_S = 0.01


def members(session: int) -> list[int]:
    """Return the processes of a session that live, its leader's id being its own."""
    return [pid for pid in _processes() if _live_session_of(pid) == session]


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _live_session_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # proc(5): after the name, which may hold anything, come state, parent, group and session.
    state, _, _, session = stat.rpartition(")")[2].split()[:4]
    return None if state in "ZX" else int(session)


def send(session: int, number: signal.Signals, *, but: int | None = None) -> bool:
    """Send a signal to each member but one; returns whether there was any."""
    found = [pid for pid in members(session) if pid != but]
    for pid in found:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    return bool(found)


def kill(session: int, *, but: int | None = None) -> None:
    """Kill the members, those that are started meanwhile too, and wait until they are gone."""
    deadline = time.monotonic() + _KILL_GRACE_S
    while send(session, signal.SIGKILL, but=but) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.stdin.read()
    kill(os.getsid(0), but=os.getpid())

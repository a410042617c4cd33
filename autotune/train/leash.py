"""Becomes another program that the kernel stops when its starter dies: `-m autotune.train.leash`.

torchrun ends its ranks on SIGTERM. Without this a killed controller would leave a training behind,
and the same command again would start a second one on the same checkpoints.
"""

import os
import signal
import sys

from autotune.processes import die_with_parent

if __name__ == "__main__":
    die_with_parent(signal.SIGTERM)
    # These are for the ranks, which schedulers signal as well. torchrun takes them where it is told
    # to; else they would end it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - argv that the controller built

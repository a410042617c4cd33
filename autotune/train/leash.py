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
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - argv that the controller built

"""torchrun that exits with its first failed rank's own code: `-m autotune.script.torchrun`.

torchrun itself says 1 of any failure, whatever the script has said.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

SIGNALLED = 64
"""What is said of a rank that a signal has ended."""


def main(argv: list[str]) -> int:
    try:
        run(parse_args(argv))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else SIGNALLED
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

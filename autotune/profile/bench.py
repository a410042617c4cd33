"""A rank of the bench of several nodes: `autotune.profile.bench DIRECTORY KIND THREADS`.

Torchrun starts it. It writes DIRECTORY/bench-R.json, R its rank: a Bench, or what went wrong.
"""

import argparse
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from autotune.processes import die_with_parent
from autotune.profile.rates import bench_rank
from autotune.rundir import write_json


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="autotune.profile.bench", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("kind")
    parser.add_argument("threads", type=int)
    options = parser.parse_args(argv)
    die_with_parent()
    rank, ranks = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    local_rank = int(os.environ["LOCAL_RANK"])
    code = 0
    try:
        answer = asdict(bench_rank(options.kind, options.threads, rank, ranks, None, local_rank))
    except Exception as error:  # noqa: BLE001 - whatever it is, the controller has to know
        traceback.print_exc()
        answer, code = {"error": f"{type(error).__name__}: {error}"}, 1
    write_json(options.directory / f"bench-{rank}.json", answer)
    sys.stderr.flush()
    # A teardown would wait for ranks that are gone.
    os._exit(code)


if __name__ == "__main__":
    main()

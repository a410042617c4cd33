"""A rank of a probe as a program: `python -m autotune.probe.rank DIRECTORY [--torchrun]`.

What to do is in DIRECTORY/request.json. Which rank this is the environment tells, as torchrun sets
it; with `--torchrun` the ranks meet at its rendezvous too, else through a file in DIRECTORY.
"""

import argparse
import faulthandler
import json
import os
from pathlib import Path

from autotune.probe.protocol import ProbeRequest
from autotune.probe.worker import answer_path, run_rank
from autotune.processes import die_with_parent


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="autotune.probe.rank", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--torchrun", action="store_true")
    options = parser.parse_args(argv)
    die_with_parent()
    faulthandler.enable()
    directory: Path = options.directory
    request = ProbeRequest.from_json(json.loads((directory / "request.json").read_text()))
    rank = int(os.environ["RANK"])
    store = None if options.torchrun else str(directory / "store")
    run_rank(request, rank, store, str(answer_path(directory, rank)))


if __name__ == "__main__":
    main()

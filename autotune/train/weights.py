"""Gives a model without weights random ones: `python -m autotune.train.weights`."""

import argparse
import json
from pathlib import Path

from autotune.train.adapters import save_random
from autotune.workload import TrainSpec


def main() -> None:
    parser = argparse.ArgumentParser(prog="autotune.train.weights", description=__doc__)
    parser.add_argument("train_args", type=Path, help="train_args.json")
    parser.add_argument("directory", type=Path, help="where the model goes")
    options = parser.parse_args()
    spec = TrainSpec.from_json(json.loads(options.train_args.read_text()))
    save_random(spec, options.directory)


if __name__ == "__main__":
    main()

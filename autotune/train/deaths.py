"""What a rank leaves behind when it ends before its time; read by what started the training."""

import json
from pathlib import Path

from autotune.errors import raised_in
from autotune.rundir import read_json, write_text

STOPPED = "stopped"
"""The file that says that a training has saved a checkpoint and ended because it was asked to."""

STOPPED_CODE = 75
_MESSAGE_CHARACTERS = 600


def write_death(output_dir: Path, rank: int, error: BaseException) -> None:
    """Write down the exception that a rank ends by."""
    fields = {
        "rank": rank,
        "exception": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": str(error).strip()[:_MESSAGE_CHARACTERS],
        "raised_in": raised_in(error),
    }
    write_text(output_dir / f"death-{rank}.json", json.dumps(fields))


def take_deaths(output_dir: Path) -> list[dict[str, object]]:
    """Return what ranks wrote down, and forget it."""
    found = []
    for path in sorted(output_dir.glob("death-*.json")):
        fields = read_json(path)
        path.unlink(missing_ok=True)
        if isinstance(fields, dict):
            found.append(fields)
    return found

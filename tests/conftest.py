"""What the tests share: an environment of their own, and small inputs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest

from autotune import processes
from autotune.environment import rank_environment

hypothesis.settings.register_profile(
    # The same examples in every run; no deadline, as a busy machine is no defect.
    "autotune",
    max_examples=40,
    derandomize=True,
    deadline=None,
)
hypothesis.settings.load_profile("autotune")

REPOSITORY = Path(__file__).parent.parent
QUICKSTART = REPOSITORY / "examples" / "quickstart" / "data.jsonl"


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' caches apart from the user's; built ops stay where told, or by Python."""
    changes = {
        "AUTOTUNE_CACHE": str(tmp_path_factory.mktemp("cache")),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR")
        or str(Path(sys.executable).parent.parent / "torch_extensions"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules")),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    before = dict(os.environ)
    os.environ.update(changes)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def server(_environment: None) -> None:
    """Start the server that processes are forked from, as every command that needs one does."""
    processes.start_server(rank_environment("cpu", ()))


def autotune(
    *arguments: object, cwd: Path, timeout: float = 240
) -> "subprocess.CompletedProcess[str]":
    """Run the command as a user does, from the environment that the tests run in."""
    return subprocess.run(
        [str(Path(sys.executable).parent / "autotune"), *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def write_rows(path: Path, texts: Sequence[tuple[str, str]]) -> Path:
    """Write (question, answer) pairs in `messages` form."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
        )
        for question, answer in texts
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def short_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of 48 rows, 20 to 90 tokens long, of which an epoch takes seconds."""
    pairs = [
        (f"What is {number} plus {number}?", "It is " + f"{2 * number}, " * (1 + number % 12))
        for number in range(48)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "short.jsonl", pairs)

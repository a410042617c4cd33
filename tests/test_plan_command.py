"""`autotune plan` for named hardware: the matrix, the whole training, exact memory, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import autotune
from test_cli import model_directory, refused

from autotune import builtin
from autotune.cli.summary import bar
from autotune.errors import ConfigError
from autotune.memory import PARTS
from autotune.profile import child
from autotune.profile.request import TraceRequest

ROWS = ("--seq-length", 256, "--precision", "fp32")


def ask(cwd: Path, *arguments: object) -> dict[str, Any]:
    done = autotune("plan", *ROWS, *arguments, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_a_cell_is_the_best_of_the_plan_for_it(tmp_path: Path) -> None:
    matrix = ask(tmp_path, "--matrix", "--gpus", "A100-80GB,T4-16GB", "--counts", "1,2,3,16")
    cells = {(cell["gpu"], cell["count"]): cell for cell in matrix["cells"]}
    assert list(cells) == [
        (gpu, count) for gpu in ("A100-80GB", "T4-16GB") for count in (1, 2, 3, 16)
    ]
    plan = ask(tmp_path, "--gpus", "2xT4-16GB")
    best = next(entry for entry in plan["settings"] if entry["fits"])
    assert cells["T4-16GB", 2]["best"]["setting"] == best["setting"]
    assert cells["T4-16GB", 2]["best"]["tokens_per_s"] == best["tokens_per_s"]
    # 32 rows cannot be shared by three ranks, and sixteen are two nodes.
    assert "32" in cells["T4-16GB", 3]["refused"]
    assert cells["T4-16GB", 16]["nodes"] == 2


def test_a_cell_where_nothing_fits_says_what_is_lacking(tmp_path: Path) -> None:
    arguments = ("--matrix", "--gpus", "T4-16GB", "--counts", "1", "--device-memory", "700MiB")
    (cell,) = ask(tmp_path, *arguments)["cells"]
    plan = ask(tmp_path, "--gpus", "T4-16GB", "--device-memory", "700MiB", "--all")
    assert cell["best"] is None
    lacks = [entry["memory"]["device_bytes"] - (700 << 20) for entry in plan["settings"]]
    assert cell["shortfall"]["device_bytes"] == pytest.approx(min(lacks), abs=2)
    done = autotune("plan", *ROWS, *arguments, cwd=tmp_path)
    assert "lacks " in done.stdout


def test_without_kinds_and_counts_there_are_usual_ones(tmp_path: Path) -> None:
    matrix = ask(tmp_path, "--matrix", "--price-per-gpu-hour", "2", "--rows", 100_000)
    assert len({cell["gpu"] for cell in matrix["cells"]}) >= 6
    assert {cell["count"] for cell in matrix["cells"]} == {1, 2, 4, 8}
    for cell in matrix["cells"]:
        best = cell["best"]
        assert best["training_cost"] == pytest.approx(2 * cell["count"] * best["training_hours"])


def test_hours_are_steps_times_seconds(tmp_path: Path) -> None:
    plan = ask(tmp_path, "--gpus", "A100-80GB", "--rows", 1000, "--epochs", 2)
    for entry in plan["settings"]:
        # 32 steps an epoch: the last batch is not full.
        assert entry["training_steps"] == 64
        assert entry["training_hours"] * 3600 == pytest.approx(64 * entry["step_time_s"])
        assert "training_cost" not in entry


def test_who_does_not_say_how_many_rows_gets_no_hours(tmp_path: Path) -> None:
    plan = ask(tmp_path, "--gpus", "A100-80GB", "--price-per-gpu-hour", "2")
    assert not [entry for entry in plan["settings"] if "training_hours" in entry]


def test_a_dataset_says_how_long_the_training_is(tmp_path: Path, short_rows: Path) -> None:
    plan = ask(
        tmp_path,
        *("--dataset", short_rows, "--gpus", "A100-80GB", "--price-per-gpu-hour", "a100-80gb=3"),
    )
    entry = plan["settings"][0]
    assert entry["training_steps"] == 2
    assert entry["training_cost"] == pytest.approx(3 * entry["training_hours"])


def test_the_table_has_a_bar_and_what_would_make_the_nearest_miss_fit(tmp_path: Path) -> None:
    arguments = ("--gpus", "T4-16GB", "--device-memory", "880MiB")
    done = autotune("plan", *ROWS, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[#" in done.stdout
    assert "it would fit with micro-batch " in done.stdout
    assert "rows of at most " in done.stdout


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0.0, "[----------]   0 %"), (0.68, "[#######---]  68 %"), (1.3, "[##########] 130 %")],
)
def test_a_bar_is_the_share_of_the_device(share: float, drawn: str) -> None:
    assert bar(share) == drawn


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "8xRTX3091-24GB"], "RTX3090-24GB"),
        (["--gpus", "0xA100-80GB"], "at least 1"),
        (["--gpus", "A100-80GB", "--seq-length", 100_000], "2048 or less"),
        (["--gpus", "A100-80GB", "--max-seq-length", 100_000], "2048 or less"),
        (["--gpus", "8xA100-80GB", "--global-batch-size", 9], "8 or 16"),
        (["--gpus", "A100-80GB", "--rows", 0], "x>=1"),
        (["--gpus", "A100-80GB", "--price-per-gpu-hour", "free"], "above zero"),
        (["--counts", "2"], "--matrix"),
        (["--matrix", "--counts", "1,0"], "above zero"),
        (["--matrix", "--gpus", "8xA100-80GB"], "--counts"),
        (["--matrix", "--gpus", "A100-80GB,H200"], "H200-141GB"),
        (["--matrix", "--exact"], "--exact"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_exits_2_with_what_can(
    tmp_path: Path, arguments: list[object], says: str
) -> None:
    done = autotune("plan", "--precision", "fp32", *arguments, cwd=tmp_path)
    if done.stderr.startswith("Usage:"):
        assert done.returncode == 2
        assert says in done.stderr
    else:
        assert says in refused(done, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llamma"}, "llama"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
    ],
    ids=["unknown type", "bad value"],
)
def test_a_config_that_transformers_cannot_build_exits_78(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    model = model_directory(tmp_path / "model", **changes)
    done = autotune("plan", "--model", model, "--gpus", "A100-80GB", cwd=tmp_path)
    assert says in refused(done, 78)


def test_a_type_that_transformers_does_not_have_is_refused_with_the_nearest(
    tmp_path: Path,
) -> None:
    def request(**changes: object) -> TraceRequest:
        number = len(list(tmp_path.iterdir()))
        return TraceRequest(
            model_dir=str(model_directory(tmp_path / str(number), **changes)),
            trust_remote_code=False,
            attention="auto",
            precision="fp32",
            device_kind="cpu",
        )

    with pytest.raises(ConfigError, match="nearest are llama, "):
        child._require_known(request(model_type="llamma"))
    child._require_known(request())
    # Such a model brings its own code.
    child._require_known(request(model_type="chatglm", auto_map={"AutoConfig": "x.Y"}))


def test_a_model_that_nobody_knows_exits_66_with_the_nearest(tmp_path: Path) -> None:
    done = autotune("plan", "--model", "llama-3-9b", "--gpus", "A100-80GB", cwd=tmp_path)
    assert "llama-3-8b" in refused(done, 66)


@pytest.mark.slow
def test_the_best_are_run_virtually_and_kept_wherever_the_model_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("AUTOTUNE_CACHE", str(cache))
    model = shutil.copytree(builtin.directory("glm-tiny"), tmp_path / "model")
    arguments = ("--gpus", "2xT4-16GB", "--exact", "--model")
    plan = ask(tmp_path, *arguments, model)
    exact = [entry for entry in plan["settings"] if entry["source"] == "virtual run"]
    assert len(exact) == 3
    for entry in exact:
        memory = entry["memory"]
        parts = sum(size for name, size in memory.items() if name in PARTS)
        assert parts == memory["allocated_bytes"]
    runs = sorted((cache / "virtual").iterdir())
    assert len(runs) == 3
    written = [run.stat().st_mtime_ns for run in runs]
    runs[0].write_bytes(runs[0].read_bytes()[:50])

    again = ask(tmp_path, *arguments, shutil.copytree(model, tmp_path / "moved"))

    assert again["settings"] == plan["settings"]
    # The torn one was made again, the others were read.
    assert sorted((cache / "virtual").iterdir()) == runs
    assert [run.stat().st_mtime_ns for run in runs][1:] == written[1:]
    assert json.loads(runs[0].read_text())["peak_device_bytes"] > 0

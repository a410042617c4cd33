"""The shim is there in processes that autotune starts, and nowhere else."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from autotune.script.errand import ERRAND, SHIM, ScriptErrand, shimmed

DEEPSPEED = """
calls = []
def initialize(args=None, model=None, optimizer=None, model_parameters=None, config=None,
               config_params=None):
    calls.append(config)
    return None, None, None, None
"""


@pytest.fixture
def errand(tmp_path: Path) -> Path:
    path = tmp_path / "errand.json"
    told = ScriptErrand(device_kind="cpu", overrides={"train_batch_size": 8})
    path.write_text(json.dumps(told.to_json()))
    return path


def run(program: str, environment: dict[str, str], *path: Path) -> str:
    before = {"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **before, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_an_errand_it_does_nothing() -> None:
    found = run(
        "import sys; print([name for name in sys.modules if 'autotune' in name],"
        " [type(one).__module__ for one in sys.meta_path])",
        {"PYTHONPATH": str(SHIM), ERRAND: ""},
    )

    assert "autotune.script" not in found


def test_a_process_that_was_not_started_by_us_does_not_find_it() -> None:
    found = run("import sys; print(sys.path, sys.modules.get('sitecustomize'))", {})

    assert str(SHIM) not in found


def test_nothing_of_it_is_in_the_environment_that_python_itself_reads() -> None:
    for name in ("purelib", "platlib", "stdlib"):
        there = Path(sysconfig.get_paths()[name])
        for file in ("sitecustomize.py", "usercustomize.py"):
            path = there / file
            assert not path.exists() or "autotune" not in path.read_text()
        for path in there.glob("*.pth"):
            assert "sitecustomize" not in path.read_text(errors="replace")


def test_it_does_what_the_users_own_sitecustomize_does(tmp_path: Path, errand: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.mine = 'chained'")
    environment = shimmed({"PYTHONPATH": str(tmp_path)}, errand)

    found = run(
        "import sitecustomize, sys; print(mine, sitecustomize.__file__,"
        " 'deepspeed' in sys.modules, 'torch' in sys.modules)",
        environment,
    )

    assert found.split() == ["chained", str(tmp_path / "sitecustomize.py"), "False", "False"]


def test_an_engine_gets_the_config_however_it_is_given(tmp_path: Path, errand: Path) -> None:
    (tmp_path / "deepspeed.py").write_text(DEEPSPEED)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {}, "train_batch_size": 4, "autotuning": {}}))
    environment = shimmed({"PYTHONPATH": str(tmp_path)}, errand)

    found = run(
        "import importlib.util\n"
        "assert importlib.util.find_spec('deepspeed')\n"
        "import json, types, deepspeed\n"
        f"file = {str(file)!r}\n"
        "args = types.SimpleNamespace(deepspeed_config=file)\n"
        "deepspeed.initialize(model=1, config=json.load(open(file)))\n"
        "deepspeed.initialize(model=1, config=file)\n"
        "deepspeed.initialize(args, 1)\n"
        "deepspeed.initialize(model=1, config_params=file)\n"
        "deepspeed.initialize(model=1, config={'train_batch_size': 1})\n"
        "print(json.dumps(deepspeed.calls))",
        environment,
    )

    tuned = {"optimizer": {}, "train_batch_size": 8}
    # The last has nothing to train with: it is made to infer.
    assert json.loads(found) == [tuned] * 4 + [{"train_batch_size": 1}]

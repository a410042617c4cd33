"""Gives what `autotune export` writes to the real tools, each installed as it is today.

`make exports-check` runs it, `make exports-check TOOLS="trl axolotl"` for some. A tiny model is
tuned on two CPU ranks, once with all parameters at ZeRO 3 and once with adapters at ZeRO 2,
exported for each tool, and trained for two steps in an environment of the tool's own, which has
torch and DeepSpeed from ours and all that the tool pins in its own versions. Environments stay in
build/exports and are used again; remove one to have today's versions. What was accepted is in
benchmarks/results/exports.json, from which the documentation has its versions.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
BUILD = REPOSITORY / "build" / "exports"
RESULTS = REPOSITORY / "benchmarks" / "results" / "exports.json"
DATA = REPOSITORY / "examples" / "quickstart" / "data.jsonl"
STEPS = 2
LIMIT_S = 570

VARIANTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "full": ("--set", "zero_stage=3", "--set", "checkpointing=full"),
        "lora": ("--method", "lora", "--set", "zero_stage=2", "--set", "checkpointing=none"),
    }
)

NOT_NEEDED = {
    # Of other accelerators, clouds, user interfaces and evaluations; or of a CUDA build of torch.
    *("torch", "torchvision", "torchdata", "xformers", "fla-core"),
    *("flash-linear-attention", "gradio", "modal", "s3fs", "gcsfs", "adlfs", "ocifs", "lm-eval"),
    *("openenv-core", "trackio", "oss2", "av", "tensorboard", "optimum", "torchaudio"),
}


STAND_INS = ("torchaudio",)
"""Imported at the top of modules that are not for text; wheels for Linux are of CUDA builds."""

PROGRAMS = {
    "torchrun": "torch.distributed.run",
    "accelerate": "accelerate.commands.accelerate_cli",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A tool.

    Attributes:
        package: that is installed, with what it asks for.
        newest: what else is to be of today, where it would be content with ours.
        reads: Python that has it read the exported file and do no more.
        arguments: of run.sh.
    """

    package: str
    newest: tuple[str, ...] = ()
    reads: str | None = None
    arguments: tuple[str, ...] = ()


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        "transformers": Tool(package="transformers", newest=("accelerate",)),
        "accelerate": Tool(package="accelerate", newest=("transformers",)),
        "trl": Tool(package="trl", newest=("transformers", "accelerate")),
        "llama-factory": Tool(package="llamafactory"),
        "axolotl": Tool(
            package="axolotl",
            # Without a GPU it must not meet other ranks through NCCL as it reads.
            reads="import os; os.environ['AXOLOTL_IS_PREPROCESS'] = '1'; "
            "from axolotl.cli.config import load_cfg; load_cfg('axolotl.yaml')",
        ),
        "ms-swift": Tool(
            package="ms-swift",
            reads="import yaml; from swift.arguments import SftArguments; "
            "from swift.utils import parse_args_from_dict; "
            "said = yaml.safe_load(open('swift.yaml')); said.pop('ENV'); "
            "said |= {'model_type': 'qwen2', 'template': 'qwen2_5'}; "
            "parse_args_from_dict(SftArguments, said)",
            arguments=("--model_type", "qwen2", "--template", "qwen2_5"),
        ),
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"[all of {', '.join(TOOLS)}]")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    model = _model(BUILD / "model")
    runs = {name: _tuned(name, model, arguments) for name, arguments in VARIANTS.items()}
    failed = []
    for name in options.tools or TOOLS:
        found = _check(name, TOOLS[name], runs)
        _record(name, found)
        print(json.dumps({name: found}, indent=2), flush=True)
        failed += [name] * (not all(one["accepted"] for one in found["exports"].values()))
    if failed:
        sys.exit(f"not accepted by {', '.join(failed)}")


def _model(directory: Path) -> Path:
    """Make a Qwen2 of 64 hidden without weights, which every tool knows the type of."""
    if directory.exists():
        return directory
    directory.mkdir()
    demo = REPOSITORY / "autotune" / "builtin" / "glm-tiny"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo / name, directory / name)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "vocab_size": 4096,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _tuned(name: str, model: Path, arguments: Sequence[str]) -> Path:
    """Tune a run of two steps, unless it is there; its exports of earlier times are removed."""
    run_dir = BUILD / f"run-{name}"
    command = [str(Path(sys.executable).parent / "autotune"), "tune", "--dataset", str(DATA)]
    command += ["--model", str(model), "--devices", "cpu:2", "--run-dir", str(run_dir)]
    command += ["--global-batch-size", "4", "--max-steps", str(STEPS), "--max-seq-length", "128"]
    command += ["--set", "micro_batch_size=1", "--max-probes", "1", *arguments]
    subprocess.run(command, check=True)
    shutil.rmtree(run_dir / "exports", ignore_errors=True)
    return run_dir


def _check(name: str, tool: Tool, runs: Mapping[str, Path]) -> dict[str, Any]:
    python = _environment(name, tool)
    exports = {variant: _tried(name, tool, python, run_dir) for variant, run_dir in runs.items()}
    versions = {
        package: _version(python, package)
        for package in dict.fromkeys((tool.package, "transformers", "deepspeed", "torch"))
    }
    today = datetime.now(UTC).date().isoformat()
    return {"date": today, "versions": versions, "exports": exports}


def _environment(name: str, tool: Tool) -> Path:
    """Make the environment of a tool, unless it is there; returns its Python."""
    venv = BUILD / "environments" / name
    python = venv / "bin" / "python"
    done = venv / "complete"
    if done.exists():
        return python
    shutil.rmtree(venv, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(venv)])
    (own,) = venv.glob("lib/python*/site-packages")
    # What an environment has itself goes before what a .pth file adds.
    (own / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    constraints = BUILD / "constraints.txt"
    torch = re.search(r"^torch==.+$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert torch is not None, "constraints.txt pins torch"
    # Any other torch might be a CUDA build of gigabytes.
    constraints.write_text(f"{torch[0]}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    pip += ["--no-compile", "--constraint", str(constraints)]
    _run([*pip, "--upgrade", "--no-deps", tool.package, *tool.newest])
    _run([*pip, *_dependencies(python, tool.package)])
    # The programs of packages that come from ours.
    for program, module in PROGRAMS.items():
        _write_program(venv / "bin" / program, python, module)
    for module in STAND_INS:
        (own / module).mkdir(exist_ok=True)
        (own / module / "__init__.py").touch()
    done.touch()
    return python


def _write_program(path: Path, python: Path, module: str) -> None:
    if not path.exists():
        path.write_text(f'#!/bin/sh\nexec "{python}" -m {module} "$@"\n')
        path.chmod(0o755)


def _dependencies(python: Path, package: str) -> list[str]:
    """Return what a package asks for, extras and what is not needed here left out."""
    program = (
        "import importlib.metadata, json, sys; from packaging.requirements import Requirement; "
        "asked = map(Requirement, importlib.metadata.requires(sys.argv[1]) or []); "
        "print(json.dumps([[one.name, str(one).split(';')[0]] for one in asked "
        "if one.marker is None or one.marker.evaluate({'extra': ''})]))"
    )
    asked = json.loads(subprocess.check_output([str(python), "-c", program, package], text=True))
    return [
        requirement
        for name, requirement in asked
        if name.lower().replace("_", "-") not in NOT_NEEDED
    ]


def _tried(name: str, tool: Tool, python: Path, run_dir: Path) -> dict[str, Any]:
    """Export, have the tool read it, and train; returns what of it went well."""
    autotune = str(Path(sys.executable).parent / "autotune")
    directory = run_dir / "exports" / name
    _run([autotune, "export", str(run_dir), "--to", name])
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(python.parent.parent),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(BUILD / "cache"),
        "TORCH_EXTENSIONS_DIR": str(BUILD / "ops"),
        "AXOLOTL_DO_NOT_TRACK": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    found: dict[str, Any] = {"accepted": False, "steps": 0, "losses": []}
    if tool.reads is not None:
        log = directory / "read.log"
        alone = environment | _ONE_RANK | {"MASTER_PORT": str(_free_port())}
        found["accepted"] = _logged([str(python), "-c", tool.reads], directory, alone, log)
    command = ["bash", "run.sh", *tool.arguments]
    if name == "accelerate":
        command += _loop_arguments(run_dir)
    log = directory / "train.log"
    trained = _logged(command, directory, environment, log)
    losses = _losses(directory, log)
    found |= {"trained": trained, "steps": len(losses), "losses": losses}
    found["accepted"] |= trained and len(losses) >= STEPS
    return found


_ONE_RANK = {"MASTER_ADDR": "localhost", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""What torchrun says to a process; some tools meet the other ranks as they read their file."""


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port: int = listening.getsockname()[1]
        return port


def _loop_arguments(run_dir: Path) -> list[str]:
    """Start a loop of the user's own, on the rows and weights of the export to transformers."""
    rows = run_dir / "exports" / "transformers"
    if not rows.exists():
        autotune = str(Path(sys.executable).parent / "autotune")
        _run([autotune, "export", str(run_dir), "--to", "transformers"])
    loop = Path(__file__).with_name("accelerate_loop.py")
    return [str(loop), str(rows / "model"), str(rows / "train.jsonl")]


def _losses(directory: Path, log: Path) -> list[float]:
    """Return the loss of each step, as transformers' Trainer or the loop wrote it down."""
    states = sorted(directory.glob("output/**/trainer_state.json"), key=lambda path: len(str(path)))
    for path in states:
        history = json.loads(path.read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        if len(losses) >= STEPS:
            return losses
    printed = re.findall(r"^step \d+: loss ([\d.]+)$", log.read_text(), re.MULTILINE)
    return [float(loss) for loss in printed]


def _logged(
    command: Sequence[str], directory: Path, environment: Mapping[str, str], log: Path
) -> bool:
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode:
        print(f"{log}:\n{log.read_text()[-3000:]}", file=sys.stderr)
    return done.returncode == 0


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    subprocess.run(command, env=environment, check=True)


def _version(python: Path, package: str) -> str:
    program = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return subprocess.check_output([str(python), "-c", program, package], text=True).strip()


def _record(name: str, found: dict[str, Any]) -> None:
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    tools = before.get("tools", {}) | {name: found}
    RESULTS.write_text(
        json.dumps({"tools": {tool: tools[tool] for tool in TOOLS if tool in tools}}, indent=2)
        + "\n"
    )


if __name__ == "__main__":
    main()

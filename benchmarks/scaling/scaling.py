"""Writes the tables of docs/scaling.md from the model: what each ZeRO stage sends, and which wins.

A test makes them anew and holds the document against them.

    python benchmarks/scaling/scaling.py [--write]
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autotune import intake
from autotune.config import Layer, Options, resolve
from autotune.devices import parse_gpus
from autotune.hardware import Rates
from autotune.setting import Setting, Structure
from autotune.throughput import Communication, predicted_communication
from autotune.workload import ModelProfile

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
NODES = (1, 2, 4, 8, 16, 32, 64, 128)
GPUS_A_NODE = 8
GIGA = 1e9

_BLOCK = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A job on ever more nodes.

    Attributes:
        network: bytes a second between nodes, of each; a table for each of them.
    """

    name: str
    model: str
    gpu: str
    global_batch_size: int
    seq_length: int
    networks: tuple[float, ...]


CASES = (
    Case(
        name="7b",
        model="llama-2-7b",
        gpu="A100-80GB",
        global_batch_size=1024,
        seq_length=4096,
        networks=(25 * GIGA, 200 * GIGA),
    ),
    Case(
        name="70b",
        model="llama-2-70b",
        gpu="H100-80GB",
        global_batch_size=1024,
        seq_length=4096,
        networks=(25 * GIGA, 400 * GIGA),
    ),
    Case(
        name="6b",
        model="chatglm3-6b",
        gpu="RTX3090-24GB",
        global_batch_size=1024,
        seq_length=2048,
        networks=(3 * GIGA, 12.5 * GIGA),
    ),
)

PARTITIONS: dict[str, Callable[[Structure], bool]] = {
    "ZeRO 0": lambda one: one.zero_stage == 0,
    "ZeRO 1": lambda one: one.zero_stage == 1,
    "ZeRO 2": lambda one: one.zero_stage == 2,  # noqa: PLR2004 - a ZeRO stage
    "ZeRO 3": lambda one: one.zero_stage == 3 and one.zero_hpz_partition_size == 1,  # noqa: PLR2004
    "ZeRO 3, hpZ": lambda one: one.zero_hpz_partition_size > 1,
}


def traffic() -> str:
    """Return what a rank sends, in sizes of the model, where there are very many ranks."""
    profile = _of_one_parameter()
    columns = [
        "",
        "between nodes, a micro-step",
        "between nodes, an update",
        "within a node, a micro-step",
    ]
    rows = [[f"ZeRO {stage}", *_sent(profile, Structure(zero_stage=stage))] for stage in range(4)]
    hpz = Structure(zero_stage=3, zero_hpz_partition_size=GPUS_A_NODE)
    rows.append([f"ZeRO 3, hpZ {GPUS_A_NODE}", *_sent(profile, hpz)])
    return _table(columns, rows)


def _sent(profile: ModelProfile, structure: Structure) -> list[str]:
    far, near = (
        _seconds(profile, structure, rates) for rates in (_link(1, np.inf), _link(np.inf, 1))
    )
    a_micro_step = far.forward_s + far.backward_s
    an_update = far.first_forward_s + far.last_backward_s + far.update_s
    figures = [a_micro_step, an_update, near.forward_s + near.backward_s]
    return [f"{figure:.3g}" if figure > 0.01 else "0" for figure in figures]  # noqa: PLR2004


def _seconds(profile: ModelProfile, structure: Structure, rates: Rates) -> Communication:
    ranks = 2**20
    return predicted_communication(profile, structure, ranks, rates, 1, GPUS_A_NODE)


def _link(all_ranks: float, node: float) -> Rates:
    return Rates(
        matmul_flops_per_s=1.0,
        memory_bytes_per_s=1.0,
        link_bytes_per_s=all_ranks,
        host_link_bytes_per_s=1.0,
        host_memory_bytes_per_s=1.0,
        operator_overhead_s=0.0,
        collective_overhead_s=0.0,
        node_link_bytes_per_s=node,
        node_collective_overhead_s=0.0,
    )


def _of_one_parameter() -> ModelProfile:
    return ModelProfile(
        architecture="",
        parameters=1,
        trainable_parameters=1,
        largest_layer_parameters=1,
        largest_parameter=1,
        trained_sizes=(1,),
        frozen_sizes=(),
        num_layers=1,
        hidden_size=1,
        vocab_size=1,
        max_position_embeddings=1,
        attention="sdpa",
        precision="bf16",
        traces=(),
    )


def winners(case: Case, logs: Path) -> Iterator[tuple[str, str]]:
    """Yield a table for each network: the best of each way to share out, by the number of nodes."""
    for network in case.networks:
        hardware = [
            intake.NamedHardware(
                gpus=(parse_gpus(f"{GPUS_A_NODE}x{case.gpu}"),),
                nodes=nodes,
                network_bytes_per_s=network,
            )
            for nodes in NODES
        ]
        question = intake.ask(_options(case), hardware[0])
        intake.start_processes(question)
        found = intake.compare(
            question,
            hardware,
            dataset_dir=logs / "dataset",
            logs=logs,
            imagined=intake.ImaginedRows(seq_length=case.seq_length),
        )
        rows = []
        for nodes, workload in zip(NODES, found, strict=True):
            assert isinstance(workload, intake.Workload), workload
            rows.append([f"{nodes} x {GPUS_A_NODE}", *_best_of_each(workload)])
        columns = ["nodes", *PARTITIONS, "the fastest"]
        yield f"{case.name}-{network / GIGA:g}", _table(columns, rows)


def _options(case: Case) -> Options:
    asked = {"model": case.model, "global_batch_size": case.global_batch_size, "precision": "bf16"}
    return resolve([Layer("benchmarks/scaling", asked)])


def _best_of_each(workload: intake.Workload) -> list[str]:
    """Return tokens a second and GPU of the fastest that fits, of each partition."""
    plan = workload.plan
    speed = np.where(plan.fits, plan.tokens_per_s, 0.0)
    best: dict[str, int] = {}
    for name, belongs in PARTITIONS.items():
        chosen = [place for place, one in enumerate(plan.space.structures) if belongs(one)]
        among = np.where(np.isin(plan.space.structure_index, chosen), speed, 0.0)
        if among.max() > 0:
            best[name] = int(among.argmax())

    def of_a_gpu(row: int) -> str:
        return f"{speed[row] / plan.space.ranks:.0f}"

    fastest = max(best, key=lambda name: speed[best[name]], default="")
    cells = []
    for name in PARTITIONS:
        if name not in best:
            cells.append("-")
            continue
        cell = of_a_gpu(best[name])
        cells.append(f"**{cell}**" if cell == of_a_gpu(best[fastest]) else cell)
    return [*cells, _described(plan.space.setting(best[fastest])) if best else "nothing fits"]


def _described(setting: Setting) -> str:
    structure = setting.structure
    parts = [f"{setting.micro_batch_size} x {setting.gradient_accumulation_steps}"]
    if structure.checkpointing != "none":
        parts.append(f"ckpt {structure.checkpointing}")
    if structure.offload_optimizer != "none":
        parts.append("offload")
    if structure.overlap_comm:
        parts.append("overlap")
    return ", ".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tables() -> dict[str, str]:
    """Return every table by its name."""
    made = {"traffic": traffic()}
    with tempfile.TemporaryDirectory(prefix="autotune-scaling-") as logs:
        for case in CASES:
            made |= dict(winners(case, Path(logs)))
    return made


def filled(text: str, made: dict[str, str]) -> str:
    """Return the document with these tables in their places."""
    return _BLOCK.sub(lambda block: block[1] + made[block[2]] + block[3], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put them into {DOCUMENT.name}")
    arguments = parser.parse_args()
    made = tables()
    if arguments.write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), made))
        return
    for name, table in made.items():
        sys.stdout.write(f"{name}\n{table}\n")


if __name__ == "__main__":
    main()

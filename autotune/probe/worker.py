"""What a rank of a probe does: build the engine once, then climb the ladder."""

import json
import os
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from autotune.engine.device import MemoryMeter, enter_rank, synchronize
from autotune.probe.protocol import ProbeRequest, RungMeasurement, RungPlan, rung_phase

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_SECONDS_A_TIMING = 1.0
_MIN_REPEATS, _MAX_REPEATS = 2, 5


class Answer:
    """The file that a rank answers with, a JSON object a line, written at once."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, event: str, **fields: Any) -> None:  # noqa: ANN401 - JSON values
        line = json.dumps({"event": event, **fields}) + "\n"
        os.write(self._descriptor, line.encode())


def run_rank(request: ProbeRequest, rank: int, store: str, answer_path: str) -> None:
    """Run one rank to its end; whatever happens is written into the answer file."""
    answer = Answer(answer_path)
    try:
        _climb(request, rank, store, answer)
    except Exception as error:  # noqa: BLE001 - the one place that turns exceptions into an answer
        traceback.print_exc()
        answer.write(
            "death",
            exception=f"{type(error).__module__}.{type(error).__qualname__}",
            message=_first_lines(str(error)),
        )
        # Interpreter shutdown would wait for collectives that the other ranks never join.
        os._exit(1)
    answer.write("done")
    os._exit(0)


def _first_lines(text: str, limit: int = 600) -> str:
    return text.strip()[:limit]


def _climb(request: ProbeRequest, rank: int, store: str, answer: Answer) -> None:
    answer.write("phase", phase="start")
    _join_process_group(request, rank, store)
    spec = request.spec
    meter, _ = enter_rank(spec.device_kind, spec.device_memory_bytes, spec.threads_per_rank)
    answer.write("phase", phase="build")
    ladder = Ladder(request, meter)
    for rung in request.rungs:
        answer.write("phase", phase=rung_phase(rung))
        answer.write("rung", **ladder.measure(rung).to_json())


def _join_process_group(request: ProbeRequest, rank: int, store: str) -> None:
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch.distributed import FileStore  # type: ignore[attr-defined] # public, not in __all__

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(rank)
    torch.distributed.init_process_group(
        accelerator.communication_backend_name(),
        store=FileStore(store, request.ranks),
        rank=rank,
        world_size=request.ranks,
        timeout=_COLLECTIVE_TIMEOUT,
    )


class Ladder:
    """The engine of a structure and the micro-steps that a rung takes."""

    def __init__(self, request: ProbeRequest, meter: MemoryMeter) -> None:
        from autotune.engine.trainer import build_trainer

        self._meter = meter
        self._ranks = request.ranks
        self._trainer = build_trainer(request.spec, request.ds_config, load_weights=False)
        self._trainer.prepare_engine(request.total_steps)
        # The first update makes the optimizer's states, and ZeRO 3 learns the order of the layers.
        shortest = request.rungs[0].timed_rows[0][1]
        self._step(self._batch(shortest), request.rungs[0], boundary=True)

    def measure(self, rung: RungPlan) -> RungMeasurement:
        started = time.perf_counter()
        accumulates = rung.gradient_accumulation_steps > 1
        self._meter.reset()
        longest = self._batch(rung.memory_rows)
        if accumulates:
            self._step(longest, rung, boundary=False)
        slowest = self._step(longest, rung, boundary=True)
        peak_bytes = self._meter.peak_bytes()
        repeats = self._agree_on_repeats(slowest)
        accumulate_s = tuple(
            (length, self._time(rows, rung, repeats, boundary=not accumulates))
            for length, rows in rung.timed_rows
        )
        middle = rung.timed_rows[len(rung.timed_rows) // 2]
        boundary_s = (
            ((middle[0], self._time(middle[1], rung, repeats, boundary=True)),)
            if accumulates
            else ()
        )
        return RungMeasurement(
            micro_batch_size=rung.micro_batch_size,
            accumulate_s=accumulate_s,
            boundary_s=boundary_s,
            peak_bytes=peak_bytes,
            seconds=time.perf_counter() - started,
        )

    def _time(
        self, rows: tuple[int, ...], rung: RungPlan, repeats: int, *, boundary: bool
    ) -> tuple[float, ...]:
        batch = self._batch(rows)
        return tuple(self._step(batch, rung, boundary=boundary) for _ in range(repeats))

    def _step(self, batch: dict[str, Any], rung: RungPlan, *, boundary: bool) -> float:
        from autotune.engine.trainer import count_trained

        trained = count_trained(batch) * self._ranks * rung.gradient_accumulation_steps
        synchronize()
        started = time.perf_counter()
        self._trainer.micro_step(batch, max(1, trained), boundary=boundary)
        synchronize()
        return time.perf_counter() - started

    def _batch(self, rows: tuple[int, ...]) -> dict[str, Any]:
        dataset = self._trainer.train_dataset
        batch: dict[str, Any] = self._trainer.data_collator([dataset[row] for row in rows])
        return batch

    def _agree_on_repeats(self, slowest_s: float) -> int:
        """Return the same number on every rank, as each repetition is a collective."""
        import torch

        seconds = torch.tensor(slowest_s, device=self._trainer.args.device)
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
        repeats = int(_SECONDS_A_TIMING / max(float(seconds), 1e-6))
        return max(_MIN_REPEATS, min(_MAX_REPEATS, repeats))


def answer_events(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Read the whole lines that were added to an answer file since `offset`.

    A torn last line waits for its end; a line that is no JSON object comes back as one without an
    event.
    """
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        whole = file.read().rpartition(b"\n")[0]
    events = [_decoded(line) for line in whole.split(b"\n") if line]
    return events, offset + len(whole) + 1 if whole else offset


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) else {"garbage": line.decode(errors="replace")}

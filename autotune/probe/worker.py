"""What a rank of a probe does: build the engine once, then climb the ladder."""

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.engine.device import MemoryMeter, enter_rank, open_device, synchronize
from autotune.engine.ops import load_ops, needed_ops
from autotune.errors import raised_in
from autotune.probe.protocol import ProbeRequest, RungMeasurement, RungPlan, rung_phase
from autotune.probe.settle import settled

if TYPE_CHECKING:
    from autotune.engine.trainer import TunedTrainer

_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_BEAT_S = 1.0


def answer_path(directory: Path, rank: int) -> Path:
    """Return the file that a rank of a probe answers with."""
    return directory / f"rank-{rank}.jsonl"


class Answer:
    """The file that a rank answers with, a JSON object a line, written at once."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, event: str, **fields: Any) -> None:  # noqa: ANN401 - JSON values
        line = json.dumps({"event": event, **fields}) + "\n"
        os.write(self._descriptor, line.encode())

    def beat(self, computed_s: Callable[[], float] = time.process_time) -> None:
        """Write the seconds that this process has computed, again and again, in a thread.

        A rank that hangs in wait for another does not compute, one that is stopped does not write.
        """
        threading.Thread(target=self._beat, args=(computed_s,), daemon=True).start()

    def _beat(self, computed_s: Callable[[], float]) -> None:
        while True:
            self.write("beat", work_s=computed_s(), every_s=_BEAT_S)
            time.sleep(_BEAT_S)


def run_rank(request: ProbeRequest, rank: int, store: str | None, answer_file: str) -> None:
    """Run one rank to its end; whatever happens is written into the answer file.

    The ranks meet through the file `store`; without it, where the environment says, as torchrun's.
    """
    answer = Answer(answer_file)
    answer.beat()
    try:
        _climb(request, rank, store, answer)
    except Exception as error:  # noqa: BLE001 - the one place that turns exceptions into an answer
        traceback.print_exc()
        answer.write(
            "death",
            exception=f"{type(error).__module__}.{type(error).__qualname__}",
            message=_first_lines(str(error)),
            raised_in=raised_in(error),
            errno=getattr(error, "errno", None),
        )
        # Interpreter shutdown would wait for collectives that the other ranks never join.
        os._exit(1)
    answer.write("done")
    os._exit(0)


def _first_lines(text: str, limit: int = 600) -> str:
    return text.strip()[:limit]


def _climb(request: ProbeRequest, rank: int, store: str | None, answer: Answer) -> None:
    answer.write("phase", phase="start")
    # What a cold process imports after the baseline is read would count as memory of the model.
    from autotune.engine.trainer import build_trainer

    local_rank = int(os.environ["LOCAL_RANK"])
    open_device(local_rank)
    load_ops(needed_ops(request.spec.device_kind, request.ds_config))
    answer.write("phase", phase="meet")
    if store is not None:
        _join_process_group(request, rank, store)
    meter, _ = enter_rank(request.spec, local_rank)
    answer.write("phase", phase="build")
    trainer = build_trainer(request.spec, request.ds_config, load_weights=False)
    ladder = Ladder(request, trainer, meter)
    for rung in request.rungs:
        answer.write("phase", phase=rung_phase(rung))
        answer.write("rung", **ladder.measure(rung).to_json())


def _join_process_group(request: ProbeRequest, rank: int, store: str) -> None:
    import torch
    from deepspeed.accelerator import get_accelerator
    from torch.distributed import FileStore  # type: ignore[attr-defined] # public, not in __all__

    torch.distributed.init_process_group(
        get_accelerator().communication_backend_name(),
        store=FileStore(store, request.ranks),
        rank=rank,
        world_size=request.ranks,
        timeout=_COLLECTIVE_TIMEOUT,
    )


class Ladder:
    """The engine of a structure and the micro-steps that a rung takes."""

    def __init__(self, request: ProbeRequest, trainer: "TunedTrainer", meter: MemoryMeter) -> None:
        self._meter = meter
        self._ranks = request.ranks
        self._trainer = trainer
        self._trainer.prepare_engine(request.total_steps)
        # The first update makes the optimizer's states, and ZeRO 3 learns the order of the layers.
        shortest = request.rungs[0].timed_rows[0][1]
        self._step(shortest, request.rungs[0], boundary=True)
        # As the training does.
        gc.freeze()

    def measure(self, rung: RungPlan) -> RungMeasurement:
        started = time.perf_counter()
        accumulates = rung.gradient_accumulation_steps > 1
        self._meter.reset()
        self._fill_memory(rung)
        middle = rung.timed_rows[len(rung.timed_rows) // 2]
        series = [(length, rows, not accumulates) for length, rows in rung.timed_rows]
        if accumulates:
            series.append((*middle, True))
        times = self._time([(rows, boundary) for _, rows, boundary in series], rung)
        timed = [(length, own) for (length, _, _), own in zip(series, times, strict=True)]
        return RungMeasurement(
            micro_batch_size=rung.micro_batch_size,
            accumulate_s=tuple(timed[: len(rung.timed_rows)]),
            boundary_s=tuple(timed[len(rung.timed_rows) :]),
            peak_bytes=round(self._meter.peak_bytes() * (1 + self._meter.growth)),
            allocated_bytes=self._meter.allocated_bytes(),
            seconds=time.perf_counter() - started,
        )

    def _fill_memory(self, rung: RungPlan) -> None:
        """Take an optimizer step on the longest rows, all its micro-batches drawn before it."""
        held = [self._batch(rung.memory_rows) for _ in range(rung.gradient_accumulation_steps)]
        if len(held) > 1:
            self._take(held[0], rung, boundary=False)
        self._take(held[-1], rung, boundary=True)

    def _time(
        self, kinds: Sequence[tuple[tuple[int, ...], bool]], rung: RungPlan
    ) -> list[tuple[float, ...]]:
        """Repeat micro-steps until their times have settled; returns the repetitions that count.

        There is a series for each of `kinds`: the rows of a micro-step, and whether it is a
        boundary. They are taken in turn, as lengths come in a training too, so that what slows the
        machine for a while meets all alike. Of each micro-step the slowest rank's time is known to
        all, so all stop after the same round: a micro-step is a collective.
        """
        rounds: list[list[float]] = []
        slowest: list[float] = []
        while (sample := settled(slowest)) is None:
            rounds.append([])
            slowest.append(0.0)
            for rows, boundary in kinds:
                rounds[-1].append(self._step(rows, rung, boundary=boundary))
                slowest[-1] += self._slowest(rounds[-1][-1])
        return list(zip(*rounds[-len(sample) :], strict=True))

    def _step(self, rows: tuple[int, ...], rung: RungPlan, *, boundary: bool) -> float:
        """Take a micro-step, its batch put together as training does it in between."""
        synchronize()
        started = time.perf_counter()
        self._take(self._batch(rows), rung, boundary=boundary)
        synchronize()
        return time.perf_counter() - started

    def _take(self, batch: dict[str, Any], rung: RungPlan, *, boundary: bool) -> None:
        from autotune.engine.trainer import count_trained

        trained = count_trained(batch) * self._ranks * rung.gradient_accumulation_steps
        self._trainer.micro_step(batch, max(1, trained), boundary=boundary)

    def _batch(self, rows: tuple[int, ...]) -> dict[str, Any]:
        dataset = self._trainer.train_dataset
        batch: dict[str, Any] = self._trainer.data_collator([dataset[row] for row in rows])
        return batch

    def _slowest(self, seconds: float) -> float:
        """Return the same on every rank: the most seconds that one of them took."""
        import torch

        slowest = torch.tensor(seconds, dtype=torch.float64, device=self._trainer.args.device)
        torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
        return float(slowest)


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

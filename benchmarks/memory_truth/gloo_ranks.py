"""The steps of a virtual run, taken by real DeepSpeed on real gloo ranks, live tensors followed."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotune import processes
from autotune.optimizer import ADAMW_8BIT, OF_TRANSFORMERS
from autotune.profile.virtual import VirtualRequest

_UPDATES = 6
_TIMEOUT_S = 300.0


def real_runs(request: VirtualRequest, directory: Path) -> list[dict[str, Any]]:
    """Run every rank; return its `peak` in bytes, `flops` and `collectives` of an update.

    Raises:
        RuntimeError: a rank left no answer; the text has its last words.
    """
    logs = [directory / f"rank-{rank}.log" for rank in range(request.ranks)]
    answers = [log.with_suffix(".json") for log in logs]
    for left_over in (directory / "store", *answers):
        left_over.unlink(missing_ok=True)
    ranks = [
        processes.start(
            _run_rank,
            request,
            rank,
            str(directory / "store"),
            str(answer),
            log=log,
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(request.ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",
            },
        )
        for rank, (answer, log) in enumerate(zip(answers, logs, strict=True))
    ]
    try:
        for process in ranks:
            process.join(_TIMEOUT_S)
    finally:
        processes.end(ranks)
    for answer, log in zip(answers, logs, strict=True):
        if not answer.exists():
            msg = f"{log.name} left no answer: {log.read_text(errors='replace')[-500:]}"
            raise RuntimeError(msg)
    return [json.loads(answer.read_text()) for answer in answers]


def _run_rank(request: VirtualRequest, rank: int, store: str, answer: str) -> None:
    import torch
    from torch.distributed import FileStore  # type: ignore[attr-defined] # public, not in __all__

    from autotune.engine.trainer import build_trainer
    from autotune.profile.live_bytes import LiveBytes

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=FileStore(store, request.ranks),
        rank=rank,
        world_size=request.ranks,
    )
    trainer_arguments = {**request.spec.trainer, "output_dir": str(Path(answer).parent)}
    spec = replace(request.spec, trainer=trainer_arguments)
    accumulation = request.gradient_accumulation_steps
    _open_operators(request)
    with LiveBytes() as live:
        trainer = build_trainer(spec, request.ds_config, load_weights=False, dataset=_rows(request))
        trainer.prepare_engine(10)
        peaks = [live.peak["cpu"]]
        for _ in range(_UPDATES):
            live.peak["cpu"] = live.current["cpu"]
            live.reset_counts()
            for micro_step in range(1, accumulation + 1):
                batch = trainer.data_collator(list(trainer.train_dataset))
                trainer.micro_step(batch, 100, boundary=micro_step == accumulation)
            peaks.append(live.peak["cpu"])
    # Gloo's threads may let go of a buffer later than they could, which adds to an update's peak.
    peak = max(peaks[0], min(peaks[2:]))
    figures = {"peak": peak, "flops": live.flops, "collectives": dict(live.collectives)}
    Path(answer).write_text(json.dumps(figures))
    os._exit(0)


def _open_operators(request: VirtualRequest) -> None:
    """Let the tensors that bitsandbytes makes inside its operators be followed too."""
    lora = request.spec.lora
    in_8_bits = request.spec.trainer.get("optim") == OF_TRANSFORMERS[ADAMW_8BIT]
    if in_8_bits or (lora is not None and lora.quantised):
        import bitsandbytes
        import torch
        from bitsandbytes.backends.cpu.ops import _optimizer_update_8bit_blockwise_cpu
        from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl

        functional, operators = bitsandbytes.functional, torch.ops.bitsandbytes
        functional.optimizer_update_8bit_blockwise = _optimizer_update_8bit_blockwise_cpu
        setattr(operators.gemm_4bit, "default", _gemm_4bit_default_impl)  # noqa: B010 - no type has it


def _rows(request: VirtualRequest) -> Any:  # noqa: ANN401 - a list serves as a dataset
    """Return the rows of a micro-batch, the last one shorter if there is to be padding."""
    lengths = [request.seq_length] * request.micro_batch_size
    if request.padded:
        lengths[-1] -= 7
    return [{"input_ids": [3] * tokens, "trained": [True] * tokens} for tokens in lengths]

"""What happens between two steps by agreement of all ranks: stopping, and saving by the clock."""

import signal
import time
from types import FrameType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Each asks for a checkpoint at the end of the step, and for an end then."""


class StopRequest:
    """Whether this rank was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = self.signal or signal.Signals(number)


class StepBoundary(TrainerCallback):
    """Has all ranks save, or save and stop, at the same step, whichever of them was asked.

    `stopped` tells afterwards whether the training ended for it.
    """

    def __init__(self, request: StopRequest, save_every_s: float | None) -> None:
        self._request = request
        self._save_every_s = save_every_s
        self._saved_at = time.monotonic()
        self.stopped = False

    def on_step_end(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        wants = [self._request.signal is not None, self._is_due()]
        agreed = torch.tensor(wants, dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        stop, save = map(bool, agreed.tolist())
        # Nothing is gained by a stop after the last step.
        self.stopped = stop and state.global_step < state.max_steps
        control.should_save = control.should_save or save or self.stopped
        control.should_training_stop = control.should_training_stop or self.stopped

    def on_save(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        del args, state, control
        self._saved_at = time.monotonic()

    def _is_due(self) -> bool:
        return (
            self._save_every_s is not None
            and time.monotonic() - self._saved_at >= self._save_every_s
        )

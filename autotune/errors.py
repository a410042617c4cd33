"""What can go wrong, as a tree, and the exit code of each.

AutotuneError
├── UsageError           2   an option that cannot be meant
├── DatasetError        65   the dataset's content
├── InputMissingError   66   a file, model or tokenizer that is not there
├── NoUsableDeviceError 69   devices that cannot be used
├── SetupFaultError     70   every probe failed alike
├── NothingFitsError    71   no setting fits the devices
├── TrainingFailedError 72   the training ended badly
│   └── ScriptFailedError    so did a user's script: its own code if that is 1 to 63
├── CannotWriteError    73   the run directory or a cache cannot be written
├── ConfigError         78   a configuration file or a model's configuration
└── VirtualRunUnavailableError   never reaches the user as such: arithmetic answers instead

InterruptedRunError     75   stopped from outside or out of budget; state saved

Anything else that reaches the command line is a bug: exit code 1.
"""

import signal
from typing import ClassVar

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that stop a run: schedulers warn with the last two before they end a job."""


class AutotuneError(Exception):
    """Base of every error whose text is meant for the user: found, needed, what to do next."""

    exit_code: ClassVar[int] = 1


class UsageError(AutotuneError):
    exit_code = 2


class DatasetError(AutotuneError):
    exit_code = 65


class InputMissingError(AutotuneError):
    exit_code = 66


class NoUsableDeviceError(AutotuneError):
    exit_code = 69


class SetupFaultError(AutotuneError):
    exit_code = 70


class NothingFitsError(AutotuneError):
    exit_code = 71


class TrainingFailedError(AutotuneError):
    exit_code = 72


class ScriptFailedError(TrainingFailedError):
    """A user's script ended badly.

    Args:
        own_code: its exit code, which is passed on; None is the one of a failed training.
    """

    def __init__(self, message: str, own_code: int | None) -> None:
        super().__init__(message)
        if own_code is not None:
            self.exit_code = own_code  # type: ignore[misc] # of this error alone


class CannotWriteError(AutotuneError):
    exit_code = 73


class InterruptedRunError(BaseException):
    """A stop. No Exception, so that no library's broad handler keeps a run from stopping.

    Attributes:
        warned: whether it was for the end of the time that a scheduler gives.
    """

    exit_code: ClassVar[int] = 75

    def __init__(self, message: str, *, warned: bool = False) -> None:
        super().__init__(message)
        self.warned = warned


class ConfigError(AutotuneError):
    exit_code = 78


class VirtualRunUnavailableError(AutotuneError):
    """The engine cannot be run over fake tensors here; estimates go on with arithmetic."""


def raised_in(error: BaseException) -> str:
    """Return the innermost function of Python's that an exception comes from."""
    trace, name = error.__traceback__, ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_name
        trace = trace.tb_next
    return name

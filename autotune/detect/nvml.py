"""One session with NVML: started, asked, shut down; no question can end in an exception.

NVML is a C library of the driver's, of any version, behind a binding of another. Any function may
be missing, unsupported on a device, or forbidden in a container; a name may be no text. So each
question is put by the function's name and answered by None where there is no answer.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WSL_LIBRARY = Path("/usr/lib/wsl/lib/libnvidia-ml.so.1")
"""Where Windows puts the library for its Linux; the loader does not look there by itself."""

_STARTS = 2
"""An "Unknown Error" while the driver starts passes; one that stays is the second's too."""


class NvmlUnavailableError(Exception):
    """NVML does not start; the text is its own reason."""


@dataclass(frozen=True, slots=True)
class Nvml:
    """The binding while NVML runs, and the words of the last refusals."""

    binding: Any

    def ask(self, function: str, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 - C values
        """Put one question; None is no answer."""
        return self.answer(function, *args, **kwargs)[0]

    def answer(self, function: str, *args: object, **kwargs: object) -> tuple[Any, str | None]:
        """Put one question; returns the answer, or why there is none."""
        try:
            return getattr(self.binding, function)(*args, **kwargs), None
        except Exception as error:  # noqa: BLE001 - see the module's text
            return None, _words(error)


@contextmanager
def session(binding: Any = None, wsl_library: Path = WSL_LIBRARY) -> Iterator[Nvml]:  # noqa: ANN401
    """Start NVML and shut it down in the end.

    Raises:
        NvmlUnavailableError: it does not start, or does not count its devices.
    """
    nvml = start(binding, wsl_library)
    try:
        yield nvml
    finally:
        nvml.ask("nvmlShutdown")


def start(binding: Any = None, wsl_library: Path = WSL_LIBRARY) -> Nvml:  # noqa: ANN401 - a module
    """Start NVML; whoever starts it calls nvmlShutdown.

    Raises:
        NvmlUnavailableError: it does not start.
    """
    if binding is None:
        import pynvml

        binding = pynvml
        _load_on_wsl(wsl_library)
    nvml, why = Nvml(binding), None
    for _ in range(_STARTS):
        _, why = nvml.answer("nvmlInit")
        if why is None:
            return nvml
    raise NvmlUnavailableError(why)


def is_wsl() -> bool:
    """Tell whether this is a Linux under Windows, whose driver tells less than others."""
    return "microsoft" in platform.release().lower()


def _load_on_wsl(library: Path) -> None:
    """Load the library by its path; asked for by its name it is then the one that is there."""
    if is_wsl() and library.exists():
        try:
            ctypes.CDLL(str(library))
        except OSError:
            # The binding says so too, and better.
            return


_KNOWN_AS = {18: "Driver/library version mismatch"}
"""Codes for which people look by other words than the binding's: those of nvidia-smi."""


def _words(error: Exception) -> str:
    return _KNOWN_AS.get(getattr(error, "value", 0)) or str(error) or type(error).__name__

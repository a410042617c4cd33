"""What an hour of a device costs, as the user says it."""

from collections.abc import Sequence
from dataclasses import dataclass

from autotune.devices import canonical_name, find_gpu
from autotune.errors import UsageError


@dataclass(frozen=True, slots=True)
class Prices:
    """Price of a device and hour, in whatever money; `anywhere` where a device has none its own."""

    anywhere: float | None
    by_name: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, texts: Sequence[str]) -> "Prices":
        """Read PRICE, or NAME=PRICE for one kind of GPU, each as often as wanted.

        Raises:
            UsageError: a price is no number above zero, or a GPU is not known.
        """
        anywhere: float | None = None
        by_name: list[tuple[str, float]] = []
        for text in texts:
            name, equals, price = text.rpartition("=")
            if equals:
                by_name.append((find_gpu(name.strip()).name, _price(price)))
            else:
                anywhere = _price(price)
        return cls(anywhere, tuple(by_name))

    def of(self, device_name: str) -> float | None:
        """Return the price of a device and hour; None if none was named."""
        return dict(self.by_name).get(canonical_name(device_name), self.anywhere)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = float("nan")
    if not 0 < price < float("inf"):
        msg = (
            f"--price-per-gpu-hour {text!r} is no price: pass a number above zero, or NAME=NUMBER "
            "for one kind of GPU"
        )
        raise UsageError(msg)
    return price


NO_PRICES = Prices(None, ())

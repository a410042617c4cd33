"""Prices of devices, as a user names them."""

import pytest

from autotune.errors import UsageError
from autotune.prices import NO_PRICES, Prices


def test_a_price_is_that_of_the_kind_and_else_that_of_any() -> None:
    prices = Prices.parse(["2.5", "rtx3090-24gb=.25"])
    assert prices.of("A100-80GB") == 2.5
    assert prices.of("RTX3090-24GB") == 0.25
    # What a driver calls it.
    assert prices.of("NVIDIA GeForce RTX 3090") == 0.25


def test_a_kind_without_a_price_has_none() -> None:
    assert Prices.parse(["A100-80GB=2"]).of("H100-80GB") is None
    assert NO_PRICES.of("A100-80GB") is None


@pytest.mark.parametrize("text", ["", "0", "-1", "inf", "nan", "dear", "A100-80GB=", "A101=3"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--price-per-gpu-hour|no GPU is known"):
        Prices.parse([text])

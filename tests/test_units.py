"""Sizes, durations and counts as people write and read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.units import (
    GIB,
    KIB,
    MIB,
    format_bytes,
    format_count,
    format_duration,
    parse_bytes,
    parse_duration,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * GIB),
        ("2 gib", 2 * GIB),
        ("512M", 512 * MIB),
        ("1.5k", 1536),
        ("80GB", 80 * 10**9),
        ("8000000000", 8_000_000_000),
        ("7b", 7),
        (" 1T ", 1024 * GIB),
    ],
)
def test_a_size_is_read_with_binary_and_decimal_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), ("2D", 172_800)]
)
def test_a_duration_is_read_with_its_unit(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "abc", "-1", "0", "0.0s", "1.5.2", "2 X", "2 G B", "inf", "nan", "1e3", "9" * 400],
)
def test_what_is_no_amount_is_refused_by_its_text(text: str) -> None:
    for parse in (parse_bytes, parse_duration):
        with pytest.raises(ValueError, match="is not a") as refusal:
            parse(text)
        assert repr(text) in str(refusal.value)


@given(st.integers(1, 2**60))
def test_a_written_size_reads_as_itself_to_three_places(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.005)


@given(st.integers(1, 10**15))
def test_a_whole_number_of_bytes_reads_as_itself(size: int) -> None:
    assert parse_bytes(str(size)) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1.00 KiB"),
        (15 * MIB, "15.0 MiB"),
        (250 * GIB, "250 GiB"),
        (3 * 1024 * GIB, "3.00 TiB"),
        (-2 * GIB, "-2.00 GiB"),
    ],
)
def test_a_size_is_written_with_three_places(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4249, "0.42 s"),
        (48.2, "48 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7800, "2 h 10 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_a_duration_is_written_in_the_units_that_matter(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1500, "1.50 k"), (3_148_736, "3.15 M"), (6_243_584_000, "6.24 B")],
)
def test_a_count_is_written_with_three_places(count: int, text: str) -> None:
    assert format_count(count) == text

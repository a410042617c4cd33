"""The document on scaling says what the model says."""

import re

import pytest
from scaling import CASES, DOCUMENT, NODES, PARTITIONS, filled, tables, traffic

TEXT = DOCUMENT.read_text()


def table_of(name: str) -> list[list[str]]:
    """Return the rows of a table of the document, without its head."""
    block = re.search(rf"<!-- table {re.escape(name)} -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)
    assert block, name
    rows = [line.strip("| ").split(" | ") for line in block[1].splitlines()]
    return rows[2:]


def speeds(name: str, nodes: int) -> dict[str, float]:
    """Return tokens a second and GPU by partition; what does not fit is left out."""
    cells = table_of(name)[NODES.index(nodes)][1:-1]
    found = zip(PARTITIONS, (cell.strip("*") for cell in cells), strict=True)
    return {partition: float(cell) for partition, cell in found if cell != "-"}


def fastest(name: str, nodes: int) -> set[str]:
    found = speeds(name, nodes)
    return {partition for partition, speed in found.items() if speed == max(found.values())}


def test_what_is_sent_is_what_the_model_counts() -> None:
    assert f"<!-- table traffic -->\n{traffic()}<!-- end -->" in TEXT


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_table_is_what_the_model_says() -> None:
    assert filled(TEXT, tables()) == TEXT, (
        "docs/scaling.md differs from the model; if the change is meant, make it anew with "
        "python benchmarks/scaling/scaling.py --write"
    )


def test_every_case_has_its_tables() -> None:
    for case in CASES:
        for network in case.networks:
            assert len(table_of(f"{case.name}-{network / 1e9:g}")) == len(NODES)


def test_what_the_text_says_of_zero_3_is_in_the_tables() -> None:
    for name in ("7b-25", "7b-200", "70b-25", "70b-400", "6b-12.5"):
        assert fastest(name, 1) == {"ZeRO 3"}
    for nodes in (1, 2, 4, 8, 16, 32, 64):
        assert "ZeRO 3" in fastest("7b-200", nodes)
        assert "ZeRO 3" in fastest("70b-400", nodes)


def test_what_the_text_says_of_hpz_is_in_the_tables() -> None:
    for nodes in NODES[1:]:
        for name in ("70b-25", "6b-3"):
            assert fastest(name, nodes) == {"ZeRO 3, hpZ"}
            assert speeds(name, nodes)["ZeRO 3, hpZ"] > speeds(name, nodes)["ZeRO 3"]
        assert "ZeRO 3, hpZ" not in speeds("70b-400", nodes)
        assert "ZeRO 3, hpZ" not in speeds("7b-200", nodes)
    assert "ZeRO 3, hpZ" not in speeds("70b-25", 1)


def test_what_the_text_says_of_zero_1_is_in_the_tables() -> None:
    assert "ZeRO 1" in fastest("7b-200", NODES[-1])
    behind = [
        speeds("7b-200", nodes)["ZeRO 3"] / speeds("7b-200", nodes)["ZeRO 1"] for nodes in NODES
    ]
    assert behind[-1] < 1 < behind[-2]
    one_micro_step = speeds("7b-200", NODES[-1])
    assert one_micro_step["ZeRO 1"] == one_micro_step["ZeRO 2"]


def test_what_the_text_says_of_offload_is_in_the_tables() -> None:
    for case in CASES:
        for network in case.networks:
            described = [row[-1] for row in table_of(f"{case.name}-{network / 1e9:g}")]
            offloads = ["offload" in text for text in described]
            assert offloads == sorted(offloads, reverse=True)
            assert not offloads[-1]
